# The real binary on models/demo. Debian's interpreter: python3-msgpack belongs to it. 77: something is not
# installed, said by the test. Several of these at once would only measure each other, so they take turns.
function(polder_binary_script name)
    cmake_parse_arguments(T "" "TIMEOUT;LABEL" "" ${ARGN})
    add_test(NAME ${name} COMMAND /usr/bin/python3 ${PROJECT_SOURCE_DIR}/tests/${name}.py)
    set_tests_properties(${name} PROPERTIES TIMEOUT ${T_TIMEOUT} SKIP_RETURN_CODE 77 LABELS "${T_LABEL}"
        RESOURCE_LOCK polder_binary
        ENVIRONMENT "POLDER=$<TARGET_FILE:polder>;POLDER_CLIENT_EXAMPLE=$<TARGET_FILE:polder_client_example>;POLDER_FAULTY=$<TARGET_FILE:polder_faulty>;POLDER_DYING=$<TARGET_FILE:polder_dying>;POLDER_HAS_CUDA=$<BOOL:${POLDER_CUDA}>;PYTHONDONTWRITEBYTECODE=1")
endfunction()
# The objects of the binary on a device that fails when it is told to.
get_target_property(polder_libraries polder LINK_LIBRARIES)
add_executable(polder_faulty faulty_device.c $<TARGET_OBJECTS:polder>)
target_link_libraries(polder_faulty PRIVATE ${polder_libraries})
target_link_options(polder_faulty PRIVATE -Wl,--wrap=device_create_cpu)
# ... and on files that kill it.
add_executable(polder_dying dying_files.c $<TARGET_OBJECTS:polder>)
target_link_libraries(polder_dying PRIVATE ${polder_libraries})
foreach(call open openat mkdir flock mkostemps pwrite write fsync fdatasync rename unlink unlinkat rmdir)
    target_link_options(polder_dying PRIVATE -Wl,--wrap=${call})
endforeach()
polder_binary_script(test_adapter_kill TIMEOUT 300 LABEL cli)
polder_binary_script(test_cli TIMEOUT 180 LABEL cli)
polder_binary_script(test_cli_adapter TIMEOUT 180 LABEL cli)
polder_binary_script(test_e2e TIMEOUT 300 LABEL cli)
polder_binary_script(test_e2e_fault TIMEOUT 300 LABEL cli)
polder_binary_script(test_e2e_rss TIMEOUT 400 LABEL slow)
polder_binary_script(test_e2e_soak TIMEOUT 300 LABEL cli) # 300 cycles; POLDER_SOAK=10000 by hand
