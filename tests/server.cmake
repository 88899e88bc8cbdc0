polder_test(test_yaml LIBS polder_base LABELS fast)
