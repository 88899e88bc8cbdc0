# adapters/: refusals, store file, registry and residency, goldens of PEFT, the fuzzer of adapter_config.json.
foreach(name test_adapters test_adapters_store test_adapters_pool test_adapters_golden
        test_adapters_formats test_adapters_patterns test_adapters_registry test_adapters_parts
        test_adapters_vocabulary)
    polder_test(${name} SOURCES test_adapters_tool.c fakes.c LIBS polder_adapters polder_pool
        polder_kernels polder_base LABELS fast)
endforeach()
polder_test(test_adapters_faults SOURCES test_adapters_tool.c fakes.c LIBS polder_adapters polder_pool
    polder_kernels polder_base LABELS fast)
foreach(call malloc calloc realloc aligned_alloc strdup pread pwrite fsync rename mkostemps)
    target_link_options(test_adapters_faults PRIVATE -Wl,--wrap=${call})
endforeach()
polder_fuzzer(fuzz_adapter_config LIBS polder_adapters polder_pool polder_kernels polder_base)
