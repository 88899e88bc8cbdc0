polder_test(test_adapters_golden SOURCES test_adapters_tool.c fakes.c LIBS polder_adapters polder_pool
    polder_kernels polder_base LABELS fast)
