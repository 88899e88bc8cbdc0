# unified_pool and runtime/kv.
polder_test(test_copy SOURCES fakes.c LIBS polder_pool LABELS fast)
polder_test(test_pool SOURCES test_pool_rig.c fakes.c LIBS polder_pool LABELS fast)
polder_test(test_pool_moves SOURCES test_pool_rig.c fakes.c LIBS polder_pool LABELS fast)
polder_test(test_kv SOURCES test_kv_rig.c fakes.c LIBS polder_kv LABELS fast)
polder_test(test_kv_swap SOURCES test_kv_rig.c fakes.c LIBS polder_kv LABELS fast)
polder_test(sim_pool SOURCES fakes.c LIBS polder_kv LABELS fast)
