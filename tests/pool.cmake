# unified_pool and runtime/kv.
polder_test(test_copy SOURCES fakes.c LIBS polder_pool LABELS fast)
polder_test(test_pool SOURCES fakes.c LIBS polder_pool LABELS fast)
polder_test(test_kv SOURCES fakes.c LIBS polder_kv LABELS fast)
polder_test(sim_pool SOURCES fakes.c LIBS polder_kv LABELS fast)
