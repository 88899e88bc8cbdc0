polder_test(test_yaml LIBS polder_base LABELS fast)
polder_test(test_tenants LIBS polder_tenants LABELS fast)
