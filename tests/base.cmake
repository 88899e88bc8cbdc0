polder_test(test_base LIBS polder_base LABELS fast)
polder_test(test_tidy LABELS fast)
polder_test(test_workload LIBS bench_workload polder_base LABELS fast)
