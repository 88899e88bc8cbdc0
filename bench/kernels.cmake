add_executable(bench_kernels_cpu bench_kernels_cpu.c bench_kernels_ceiling.c)
target_link_libraries(bench_kernels_cpu PRIVATE polder_kernels polder_flags Threads::Threads m)
execute_process(COMMAND git rev-parse --short HEAD WORKING_DIRECTORY ${PROJECT_SOURCE_DIR}
    OUTPUT_VARIABLE POLDER_COMMIT OUTPUT_STRIP_TRAILING_WHITESPACE ERROR_QUIET)
target_compile_definitions(bench_kernels_cpu PRIVATE POLDER_COMMIT="${POLDER_COMMIT}")
