add_executable(bench_step_cpu bench_step_cpu.c)
target_link_libraries(bench_step_cpu PRIVATE polder_stack polder_base Threads::Threads m)
