# base/safetensors, experts/, runtime/model.
polder_test(test_safetensors LIBS polder_base LABELS fast)
polder_test(test_experts SOURCES fakes.c LIBS polder_experts LABELS fast)
polder_test(test_model_config SOURCES test_model_files.c LIBS polder_model LABELS fast)
polder_test(test_model SOURCES test_model_files.c LIBS polder_model LABELS fast)
polder_test(test_model_store SOURCES test_model_files.c LIBS polder_model LABELS fast)
polder_fuzzer(fuzz_safetensors LIBS polder_base)
polder_fuzzer(fuzz_config LIBS polder_model)
