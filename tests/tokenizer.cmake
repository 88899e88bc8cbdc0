polder_test(test_json LIBS polder_base LABELS fast)
polder_test(test_tokenizer LIBS polder_tokenizer LABELS fast)
target_link_options(test_tokenizer PRIVATE
    -Wl,--wrap=malloc -Wl,--wrap=calloc -Wl,--wrap=realloc)
polder_test(test_tokenizer_golden LIBS polder_tokenizer LABELS fast)
polder_fuzzer(fuzz_tokenizer LIBS polder_tokenizer)
# -DPOLDER_PLANT_BUG=ON: a bug that only a tokenizer that loads can reach (see fuzz_tokenizer.c).
if(POLDER_PLANT_BUG)
    target_compile_definitions(fuzz_tokenizer PRIVATE POLDER_PLANT_BUG)
endif()
