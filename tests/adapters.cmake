# adapters/: refusals, store file, registry and residency, goldens of PEFT, the fuzzer of adapter_config.json.
foreach(name test_adapters test_adapters_store test_adapters_pool test_adapters_golden)
    polder_test(${name} SOURCES test_adapters_tool.c fakes.c LIBS polder_adapters polder_pool
        polder_kernels polder_base LABELS fast)
endforeach()
polder_fuzzer(fuzz_adapter_config LIBS polder_adapters polder_pool polder_kernels polder_base)
