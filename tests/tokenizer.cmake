polder_test(test_tokenizer_golden LIBS polder_tokenizer LABELS fast)
# -DPOLDER_PLANT_BUG=ON: a bug that only a tokenizer that loads can reach (see fuzz_tokenizer.c).
