polder_test(test_yaml LIBS polder_base LABELS fast)
polder_test(test_tenants LIBS polder_tenants LABELS fast)

# The real server over a fake engine, for the tests that come over a socket.
add_library(fake_engine STATIC fake_engine.c)
target_link_libraries(fake_engine PUBLIC polder_server)
add_executable(test_server_main test_server_main.c)
target_link_libraries(test_server_main PRIVATE fake_engine)
target_link_options(test_server_main PRIVATE -Wl,--wrap=fsync)

# Debian's interpreter: python3-msgpack belongs to it. 77: something is not installed, said by the test.
function(polder_server_script name)
    cmake_parse_arguments(T "" "TIMEOUT" "" ${ARGN})
    add_test(NAME ${name} COMMAND /usr/bin/python3 ${PROJECT_SOURCE_DIR}/tests/${name}.py)
    set_tests_properties(${name} PROPERTIES TIMEOUT ${T_TIMEOUT} SKIP_RETURN_CODE 77 LABELS server
        ENVIRONMENT "POLDER_TEST_SERVER=$<TARGET_FILE:test_server_main>;PYTHONDONTWRITEBYTECODE=1")
endfunction()
polder_server_script(test_server_rpc TIMEOUT 240)
polder_server_script(test_server_hostile TIMEOUT 300)
polder_server_script(test_server_nvim TIMEOUT 180)
polder_server_script(test_server_upload TIMEOUT 180)

polder_test(test_rpc LIBS polder_server ${MSGPACK_LIBRARY} LABELS fast)
polder_fuzzer(fuzz_rpc LIBS polder_server ${MSGPACK_LIBRARY})
polder_fuzzer(fuzz_yaml LIBS polder_tenants)
polder_server_script(test_server_doc TIMEOUT 180)

polder_test(test_server_client LIBS polder_client_json polder_base TIMEOUT 180 LABELS server)
add_dependencies(test_server_client test_server_main)
set_tests_properties(test_server_client PROPERTIES
    ENVIRONMENT "POLDER_TEST_SERVER=$<TARGET_FILE:test_server_main>")
