// SPDX-License-Identifier: Apache-2.0
// The CUDA device itself: nothing falls back to the CPU, units are captured once per bucket, faults
// are said and stay said, memory that is not there is refused with numbers. A printed skip without
// a GPU.
#include <math.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <cmocka.h>

#include "engine_driver.h"
#include "kernels/device.h"

#define MODEL POLDER_SOURCE_DIR "/models/demo"

static struct device *gpu_open(void)
{
    struct device *device = NULL;
    struct fault fault = {.text = ""};
    struct cuda_options options = {.dtype = DTYPE_BF16};
    if (device_create_cuda(&options, &device, &fault))
        fail_msg("%s", fault.text);
    return device;
}

static void poisoned(void)
{
    (void)fprintf(stderr, "an operation of the CPU backend was called\n");
    abort();
}

// A CPU device lives beside the GPU with every operation poisoned; a model answers on the GPU.
static void test_cuda_never_falls_back_to_the_cpu(void **state)
{
    (void)state;
    struct device *cpu, *gpu = gpu_open();
    struct cpu_options options = {.threads = 1};
    assert_int_equal(device_create_cpu(&options, &cpu, NULL), STATUS_OK);
    const struct device_table *real = cpu->table;
    void (*cpu_entry[sizeof *real / sizeof(void (*)(void))])(void);
    void (*gpu_entry[sizeof *real / sizeof(void (*)(void))])(void);
    memcpy(cpu_entry, real, sizeof *real);
    memcpy(gpu_entry, gpu->table, sizeof *real);
    for (size_t i = 0; i < sizeof cpu_entry / sizeof *cpu_entry; i++) {
        assert_true(gpu_entry[i] != NULL);
        assert_true(gpu_entry[i] != cpu_entry[i]); // every entry is the GPU's own
        cpu_entry[i] = poisoned;
    }
    cpu->table = (const struct device_table *)(const void *)cpu_entry;
    gpu->table->destroy(gpu);
    char directory[64];
    driver_make_directory(directory, sizeof directory);
    struct stack_options o = {.model = MODEL,
                              .state_directory = directory,
                              .device = "cuda:0",
                              .context_max = 256,
                              .sequences_max = 4,
                              .rows_max = 64};
    struct driver *d = driver_create(&o);
    const int32_t prompt[] = {5, 6, 7, 8};
    struct driver_ask ask = {.prompt = prompt, .prompt_tokens = 4, .max_tokens = 8};
    uint64_t id = driver_submit(d, &ask);
    driver_finish(d);
    assert_int_equal(driver_answer_of(d, id)->status, STATUS_OK);
    assert_int_equal(driver_answer_of(d, id)->count, 8);
    driver_destroy(d);
    driver_remove(directory);
    cpu->table = real;
    real->destroy(cpu);
}

// Rows of one bucket share a graph; another bucket is captured; results are those of each count.
static void test_cuda_captures_a_unit_once_per_bucket(void **state)
{
    (void)state;
    enum { DIM = 96, MOST = 64 };
    struct device *gpu = gpu_open();
    const struct device_table *t = gpu->table;
    struct stream *s;
    float *x, *weight, *out;
    assert_int_equal(t->stream_create(gpu, 64, &s), STATUS_OK);
    assert_int_equal(t->alloc_host(gpu, MOST * DIM * 4, (void **)&x), STATUS_OK);
    assert_int_equal(t->alloc_host(gpu, DIM * 4, (void **)&weight), STATUS_OK);
    assert_int_equal(t->alloc_host(gpu, MOST * DIM * 4, (void **)&out), STATUS_OK);
    for (int i = 0; i < MOST * DIM; i++)
        x[i] = 1;
    for (int i = 0; i < DIM; i++)
        weight[i] = 2;
    static const uint32_t rows[] = {33, 40, 48, 33, 49, 64, 50};
    static const uint64_t captured[] = {1, 1, 1, 1, 2, 2, 2};
    for (size_t i = 0; i < sizeof rows / sizeof *rows; i++) {
        struct segment_result result;
        memset(out, 0xff, MOST * DIM * 4);
        t->unit(s);
        t->rmsnorm(s, &(struct rmsnorm_args){x, weight, NULL, out, rows[i], DIM, 0});
        assert_int_equal(t->submit(s), STATUS_OK);
        assert_int_equal(t->wait(s, &result), STATUS_OK);
        assert_int_equal(t->captures(s), captured[i]);
        for (uint32_t r = 0; r < MOST; r++)
            assert_true(r < rows[i] ? fabsf(out[r * DIM] - 2) < 1e-5f : isnan(out[r * DIM]));
    }
    t->release_host(gpu, x);
    t->release_host(gpu, weight);
    t->release_host(gpu, out);
    t->stream_destroy(s);
    t->destroy(gpu);
}

static void test_cuda_says_what_memory_was_asked_for_and_what_is_free(void **state)
{
    (void)state;
    char directory[64];
    struct stack *stack = NULL;
    struct fault fault = {.text = ""};
    driver_make_directory(directory, sizeof directory);
    struct stack_options o = {.model = MODEL,
                              .state_directory = directory,
                              .device = "cuda:0",
                              .page_bytes = 2 << 20,
                              .pool_bytes = (uint64_t)1 << 40};
    assert_int_equal(stack_create(&o, &stack, &fault), STATUS_NO_MEMORY);
    (void)printf("%s\n", fault.text);
    assert_non_null(strstr(fault.text, "1048576 MiB"));
    assert_non_null(strstr(fault.text, "free"));
    o.device = "cuda:99";
    assert_int_equal(stack_create(&o, &stack, &fault), STATUS_UNSUPPORTED);
    (void)printf("%s\n", fault.text);
    assert_non_null(strstr(fault.text, "cuda:99"));
    driver_remove(directory);
}

// Last, because a GPU fault spoils this process's context for good.
static void test_cuda_a_fault_is_said_and_stays(void **state)
{
    (void)state;
    struct device *gpu = gpu_open();
    const struct device_table *t = gpu->table;
    struct stream *s;
    struct segment_result result;
    assert_int_equal(t->stream_create(gpu, 64, &s), STATUS_OK);
    float *nowhere = (float *)(uintptr_t)0x7000000000u;
    t->rmsnorm(s, &(struct rmsnorm_args){nowhere, nowhere, NULL, nowhere, 1, 64, 0});
    assert_int_equal(t->submit(s), STATUS_OK);
    assert_int_equal(t->wait(s, &result), STATUS_DEVICE);
    assert_int_equal(result.status, STATUS_DEVICE);
    assert_int_equal(t->submit(s), STATUS_DEVICE);
    void *memory;
    assert_int_equal(t->alloc(gpu, 64, &memory), STATUS_DEVICE);
    t->stream_destroy(s);
    t->destroy(gpu);
}

int main(void)
{
    driver_skip_without_device();
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_cuda_never_falls_back_to_the_cpu),
        cmocka_unit_test(test_cuda_captures_a_unit_once_per_bucket),
        cmocka_unit_test(test_cuda_says_what_memory_was_asked_for_and_what_is_free),
        cmocka_unit_test(test_cuda_a_fault_is_said_and_stays),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
