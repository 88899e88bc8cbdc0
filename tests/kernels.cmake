polder_test(test_tile LIBS polder_kernels LABELS fast)
foreach(part dense attention lora moe sample stream)
    polder_test(test_kernels_${part} SOURCES test_kernels_rig.c test_kernels_adapters.c LIBS polder_kernels LABELS fast)
endforeach()
