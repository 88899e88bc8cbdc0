polder_test(test_comm LIBS polder_kernels Threads::Threads LABELS fast)
polder_test(test_tile LIBS polder_kernels LABELS fast)
foreach(name test_kernels_dense test_kernels_attention test_kernels_lora test_kernels_moe test_kernels_sample
        test_kernels_stream)
    polder_test(${name} SOURCES test_kernels_rig.c test_kernels_adapters.c LIBS polder_kernels LABELS fast)
    polder_gpu_test(${name})
endforeach()
