add_library(engine_driver STATIC engine_driver.c)
target_link_libraries(engine_driver PUBLIC polder_stack)
polder_test(test_engine LIBS engine_driver LABELS fast)
polder_test(test_goldens SOURCES golden_file.c LIBS engine_driver polder_base LABELS fast)
