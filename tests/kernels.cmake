polder_test(test_tile LIBS polder_kernels LABELS fast)
foreach(part dense)
    polder_test(test_kernels_${part} SOURCES test_kernels_rig.c LIBS polder_kernels LABELS fast)
endforeach()
