add_executable(bench_step_cpu bench_step_cpu.c)
target_link_libraries(bench_step_cpu PRIVATE polder_stack polder_base Threads::Threads m)
add_executable(bench_step bench_step.c bench_lora.c bench_state.c)
target_link_libraries(bench_step PRIVATE polder_stack polder_base m)
target_compile_definitions(bench_step PRIVATE POLDER_COMMIT="${POLDER_COMMIT}")
add_test(NAME bench_step_smoke COMMAND bench_step --model synth:tiny --batch 1,3 --context 40
    --steps 5 --prefill 64)
set_tests_properties(bench_step_smoke PROPERTIES LABELS fast TIMEOUT 60)
add_test(NAME bench_step_adapters_smoke COMMAND bench_step --model synth:tiny,tied=0 --batch 1,5 --context 40
    --steps 5 --adapters 3 --rank 4,8 --read-ceiling 40)
add_test(NAME bench_step_adapters_refusal COMMAND bench_step --model synth:tiny --batch 2 --context 40
    --steps 5 --adapters 8 --rank 512 --targets attention --pool-mib 2)
set_tests_properties(bench_step_adapters_refusal PROPERTIES PASS_REGULAR_EXPRESSION "cannot hold 8 adapters")
set_tests_properties(bench_step_adapters_smoke bench_step_adapters_refusal PROPERTIES LABELS fast TIMEOUT 60)
add_library(bench_workload STATIC workload.c)
target_link_libraries(bench_workload PUBLIC polder_base polder_flags m)
add_executable(bench_adapters bench_adapters.c bench_serve.c bench_lora.c bench_state.c)
target_link_libraries(bench_adapters PRIVATE bench_workload polder_stack polder_base m)
target_compile_definitions(bench_adapters PRIVATE POLDER_COMMIT="${POLDER_COMMIT}")
add_test(NAME bench_adapters_smoke COMMAND bench_adapters --model synth:tiny,tied=0 --rank 4,8
    --workload ${CMAKE_CURRENT_SOURCE_DIR}/workloads/slora.txt,requests=30,rate=200,input=8..32,output=2..8,adapters=1
    --workload ${CMAKE_CURRENT_SOURCE_DIR}/workloads/tenants.txt,requests=30,input=8..32,output=2..8,concurrency=8,warm=4
    --workload ${CMAKE_CURRENT_SOURCE_DIR}/workloads/uniform.txt,requests=30,input=8..32,output=2..8,adapters=2fit,rank=64,concurrency=8
    --workload ${CMAKE_CURRENT_SOURCE_DIR}/workloads/uniform.txt,requests=30,input=8..32,output=2..8,adapters=20,rank=16,adapter_mib=1,concurrency=8
    --pool-mib 8 --sequences 8)
set_tests_properties(bench_adapters_smoke PROPERTIES LABELS fast TIMEOUT 60)
add_executable(bench_register bench_register.c bench_serve.c bench_lora.c bench_state.c)
target_link_libraries(bench_register PRIVATE bench_workload polder_stack polder_base m)
target_compile_definitions(bench_register PRIVATE POLDER_COMMIT="${POLDER_COMMIT}")
add_test(NAME bench_register_smoke COMMAND bench_register --model synth:tiny,tied=0 --mib 1 --times 3 --pool-mib 8)
set_tests_properties(bench_register_smoke PROPERTIES LABELS fast TIMEOUT 60)
add_test(NAME test_bench_leftovers COMMAND /usr/bin/python3
    ${PROJECT_SOURCE_DIR}/tests/test_bench_leftovers.py $<TARGET_FILE:bench_register>)
set_tests_properties(test_bench_leftovers PROPERTIES LABELS engine TIMEOUT 120)
# Many more adapters than the pool holds, and a slow link: everybody ends (it hung once).
add_test(NAME test_adapters_in_a_small_pool COMMAND bench_adapters
    --model synth:tiny,tied=0,hidden=128,layers=4,experts=0,intermediate=256,max_positions=1024 --rank 16
    --targets all --sequences 32 --concurrency 32 --h2d 0.5 --pool-mib 3
    --workload ${PROJECT_SOURCE_DIR}/bench/workloads/uniform.txt,requests=100,input=4..8,output=8..24,adapters=100)
set_tests_properties(test_adapters_in_a_small_pool PROPERTIES TIMEOUT 120 LABELS engine)
