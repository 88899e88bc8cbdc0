add_executable(bench_step_cpu bench_step_cpu.c)
target_link_libraries(bench_step_cpu PRIVATE polder_stack polder_base Threads::Threads m)
add_executable(bench_step bench_step.c)
target_link_libraries(bench_step PRIVATE polder_stack polder_base m)
add_test(NAME bench_step_smoke COMMAND bench_step --model synth:tiny --batch 1,3 --context 40
    --steps 5 --prefill 64)
set_tests_properties(bench_step_smoke PROPERTIES LABELS fast TIMEOUT 60)
