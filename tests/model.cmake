# base/safetensors, experts/, runtime/model.
polder_test(test_safetensors LIBS polder_base LABELS fast)
polder_test(test_experts SOURCES fakes.c LIBS polder_experts LABELS fast)
polder_fuzzer(fuzz_safetensors LIBS polder_base)
