add_library(engine_driver STATIC engine_driver.c)
target_link_libraries(engine_driver PUBLIC polder_stack)
polder_test(test_engine LIBS engine_driver LABELS fast)
