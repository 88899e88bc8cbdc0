polder_test(test_yaml LIBS polder_base LABELS fast)
polder_test(test_tenants LIBS polder_tenants LABELS fast)

# The real server over a fake engine, for the tests that come over a socket.
add_library(fake_engine STATIC fake_engine.c)
target_link_libraries(fake_engine PUBLIC polder_server)
add_executable(test_server_main test_server_main.c)
target_link_libraries(test_server_main PRIVATE fake_engine)
