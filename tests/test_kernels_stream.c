// SPDX-License-Identifier: Apache-2.0
// The device and its streams: the table is full, order is kept, threads do not change bits,
// polling, waiting, two streams, idle costs nothing.
#include "tests/test_kernels_rig.h"

#include <sys/resource.h>
#include <time.h>
#include <unistd.h>

static void test_kernels_every_entry_of_the_table_is_filled(void **state)
{
    (void)state;
    struct rig rig;
    rig_open(&rig, "portable", DTYPE_BF16, 1);
    void (*const *entry)(void) = (void (*const *)(void))(const void *)rig.table;
    assert_int_equal(sizeof(struct device_table) % sizeof *entry, 0);
    for (size_t i = 0; i < sizeof(struct device_table) / sizeof *entry; i++)
        assert_true(entry[i] != NULL);
    rig_close(&rig);
}

static void test_kernels_an_unknown_instruction_set_is_refused_with_a_sentence(void **state)
{
    (void)state;
    struct cpu_options options = {.threads = 1, .instruction_set = "z80"};
    struct device *device;
    struct fault fault = {0};
    assert_int_equal(device_create_cpu(&options, &device, &fault), STATUS_INVALID);
    assert_null(device);
    assert_non_null(strstr(fault.text, "z80"));
    options = (struct cpu_options){.threads = 1000000};
    assert_int_equal(device_create_cpu(&options, &device, &fault), STATUS_INVALID);
    assert_int_equal(device_create_cpu(&options, &device, NULL), STATUS_INVALID);
}

static void test_kernels_device_info_names_what_was_chosen(void **state)
{
    (void)state;
    struct cpu_options options = {0};
    struct device *device;
    struct device_info info;
    assert_int_equal(device_create_cpu(&options, &device, NULL), STATUS_OK);
    device->table->info(device, &info);
    printf("%s\n", info.name);
    assert_non_null(strstr(info.name, info.instruction_set));
    assert_true(info.threads >= 1);
    device->table->destroy(device);
}

// A chain of dependent and independent commands, in random order of need, against the same in plain
// C.
static void chain(struct rig *rig, uint32_t steps, float *value, size_t n, uint32_t seed)
{
    struct rng rng = {seed, 0};
    enum { CELLS = 6 };
    for (uint32_t i = 0; i < steps; i++) {
        uint32_t from = (uint32_t)rng_below(&rng, CELLS), to = (uint32_t)rng_below(&rng, CELLS);
        static const uint32_t zero[1] = {0};
        if (from == to)
            continue;
        if (rig)
            rig->table->gather(rig->stream, &(struct gather_args){value + from * n, zero,
                                                                  value + to * n, 1, (uint32_t)n});
        else
            memcpy(value + to * n, value + from * n, n * sizeof *value);
        if (i % 5 == 0) {
            if (rig)
                rig->table->zero(rig->stream, value + from * n, 8);
            else
                memset(value + from * n, 0, 8);
        }
    }
}

static void test_kernels_a_stream_keeps_its_order(void **state)
{
    (void)state;
    enum { N = 333, CELLS = 6 };
    static float got[CELLS * N], want[CELLS * N];
    for (uint32_t threads = 1; threads <= 4; threads++) {
        struct rig rig;
        rig_open(&rig, "portable", DTYPE_F32, threads);
        for (uint32_t round = 0; round < 300; round++) {
            for (int i = 0; i < CELLS * N; i++)
                got[i] = want[i] = random_float();
            chain(&rig, 40, got, N, round);
            chain(NULL, 40, want, N, round);
            rig_run(&rig);
            assert_memory_equal(got, want, sizeof got);
        }
        rig_close(&rig);
    }
}

// Two layers' worth of dense operations; every thread count gives the same bits.
static void block_run(struct rig *rig, float *x, const void *w1, const void *w2, const float *norm,
                      uint32_t rows, uint32_t dim, uint32_t units)
{
    size_t wide = tile_interleaved_rows(units);
    void *act = rig_alloc(rig, rig->table->act_bytes(rig->device, rows, dim));
    void *hidden = rig_alloc(rig, rig->table->act_bytes(rig->device, rows, units));
    float *gate_up = rig_poison(rig, rows * wide);
    for (int layer = 0; layer < 4; layer++) {
        rig->table->rmsnorm(rig->stream,
                            &(struct rmsnorm_args){x, norm, act, NULL, rows, dim, 1e-6f});
        rig->table->gemm(rig->stream, &(struct gemm_args){act, w1, gate_up, wide, rows,
                                                          (uint32_t)wide, dim, false});
        rig->table->swiglu(rig->stream,
                           &(struct swiglu_args){gate_up, (uint32_t)wide, hidden, rows, units});
        rig->table->gemm(rig->stream,
                         &(struct gemm_args){hidden, w2, x, dim, rows, dim, units, true});
    }
}

static void test_kernels_bits_do_not_depend_on_the_threads(void **state)
{
    (void)state;
    enum { ROWS = 100, DIM = 200 };
    const uint32_t units = 168;
    static float first[ROWS * DIM];
    for (uint32_t threads = 1; threads <= 5; threads++) {
        struct rig rig;
        rig_open(&rig, NULL, DTYPE_BF16, threads);
        struct rng keep = rig_rng;
        rig_rng.counter = 1000; // the same inputs for every thread count
        size_t wide = tile_interleaved_rows(units);
        float *x = rig_floats(&rig, (size_t)ROWS * DIM), *norm = rig_floats(&rig, DIM);
        void *w1 = rig_dense(&rig, rig_weight(&rig, wide, DIM), wide, DIM);
        void *w2 = rig_dense(&rig, rig_weight(&rig, DIM, units), DIM, units);
        rig_rng = keep;
        block_run(&rig, x, w1, w2, norm, ROWS, DIM, units);
        rig_run(&rig);
        if (threads == 1)
            memcpy(first, x, sizeof first);
        assert_memory_equal(first, x, sizeof first);
        for (int i = 0; i < ROWS * DIM; i++)
            if (isnan(x[i]))
                fail_msg("element %d is not a number", i);
        rig_close(&rig);
    }
}

static void test_kernels_poll_finishes_without_wait(void **state)
{
    (void)state;
    for (uint32_t threads = 1; threads <= 3; threads++) {
        struct rig rig;
        rig_open(&rig, NULL, DTYPE_BF16, threads);
        uint8_t *memory = rig_alloc(&rig, 3 << 20);
        struct segment_result result = {.missed = true, .miss_layer = 7};
        assert_true(rig.table->poll(rig.stream, &result)); // nothing in flight
        assert_false(result.missed);
        for (int round = 0; round < 200; round++) {
            for (int i = 0; i < 6; i++)
                rig.table->copy(rig.stream, memory + (1 << 20), memory, 1 << 20);
            assert_int_equal(rig.table->submit(rig.stream), STATUS_OK);
            if (round % 3 == 0)
                usleep(50);
            if (round % 3 == 1) // part polled, part waited for
                (void)rig.table->poll(rig.stream, &result);
            if (round % 3 < 2)
                assert_int_equal(rig.table->wait(rig.stream, &result), STATUS_OK);
            while (!rig.table->poll(rig.stream, &result))
                ;
        }
        assert_int_equal(rig.table->submit(rig.stream), STATUS_OK); // empty
        assert_int_equal(rig.table->wait(rig.stream, NULL), STATUS_OK);
        rig_close(&rig);
    }
}

static void test_kernels_a_second_submit_is_refused_while_one_is_in_flight(void **state)
{
    (void)state;
    struct rig rig;
    struct segment_result result;
    rig_open(&rig, NULL, DTYPE_BF16, 2);
    uint8_t *memory = rig_alloc(&rig, 1 << 20);
    rig.table->zero(rig.stream, memory, 1 << 20);
    assert_int_equal(rig.table->submit(rig.stream), STATUS_OK);
    assert_int_equal(rig.table->submit(rig.stream), STATUS_BUSY);
    assert_int_equal(rig.table->wait(rig.stream, &result), STATUS_OK);
    rig_close(&rig);
}

static void test_kernels_two_streams_run_side_by_side(void **state)
{
    (void)state;
    struct rig rig;
    struct stream *other;
    struct segment_result result;
    rig_open(&rig, NULL, DTYPE_BF16, 2);
    assert_int_equal(rig.table->stream_create(rig.device, 32, &other), STATUS_OK);
    uint8_t *a = rig_alloc(&rig, 1 << 20), *b = rig_alloc(&rig, 1 << 20);
    for (int round = 0; round < 300; round++) {
        memset(a, 1, 1 << 20);
        memset(b, 1, 1 << 20);
        rig.table->zero(rig.stream, a, 1 << 20);
        rig.table->zero(other, b, 1 << 20);
        assert_int_equal(rig.table->submit(rig.stream), STATUS_OK);
        assert_int_equal(rig.table->submit(other), STATUS_OK);
        assert_int_equal(rig.table->wait(round % 2 ? other : rig.stream, &result), STATUS_OK);
        assert_int_equal(rig.table->wait(round % 2 ? rig.stream : other, &result), STATUS_OK);
        assert_true(!a[0] && !a[(1 << 20) - 1] && !b[0] && !b[(1 << 20) - 1]);
    }
    rig.table->stream_destroy(other);
    rig_close(&rig);
}

static double cpu_seconds(void)
{
    struct rusage usage;
    getrusage(RUSAGE_SELF, &usage);
    return (double)(usage.ru_utime.tv_sec + usage.ru_stime.tv_sec) +
           1e-6 * (double)(usage.ru_utime.tv_usec + usage.ru_stime.tv_usec);
}

static void test_kernels_an_idle_device_uses_no_processor(void **state)
{
    (void)state;
    struct rig rig;
    rig_open(&rig, NULL, DTYPE_BF16, 4);
    float *x = rig_floats(&rig, 64);
    rig.table->zero(rig.stream, x, 256);
    rig_run(&rig);
    usleep(100000);
    double before = cpu_seconds();
    usleep(500000);
    assert_true(cpu_seconds() - before < 0.02);
    rig_close(&rig);
}

static void test_kernels_memory_is_zeroed_aligned_and_refused_when_too_large(void **state)
{
    (void)state;
    struct rig rig;
    rig_open(&rig, "portable", DTYPE_F32, 1);
    static const size_t sizes[] = {0, 1, 100, 4096, (2 << 20) - 1, 2 << 20, (5 << 20) + 1};
    for (size_t i = 0; i < ARRAY_COUNT(sizes); i++) {
        uint8_t *p = rig_alloc(&rig, sizes[i]);
        for (size_t j = 0; j < sizes[i]; j++)
            assert_int_equal(p[j], 0);
        memset(p, 0xff, sizes[i]);
    }
    void *out;
    assert_int_equal(rig.table->alloc(rig.device, SIZE_MAX - 100, &out), STATUS_NO_MEMORY);
    assert_null(out);
    assert_int_equal(rig.table->alloc(rig.device, (size_t)1 << 50, &out), STATUS_NO_MEMORY);
    rig.table->release(rig.device, NULL);
    rig_close(&rig);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_kernels_every_entry_of_the_table_is_filled),
        cmocka_unit_test(test_kernels_an_unknown_instruction_set_is_refused_with_a_sentence),
        cmocka_unit_test(test_kernels_device_info_names_what_was_chosen),
        cmocka_unit_test(test_kernels_memory_is_zeroed_aligned_and_refused_when_too_large),
        cmocka_unit_test(test_kernels_a_stream_keeps_its_order),
        cmocka_unit_test(test_kernels_bits_do_not_depend_on_the_threads),
        cmocka_unit_test(test_kernels_poll_finishes_without_wait),
        cmocka_unit_test(test_kernels_a_second_submit_is_refused_while_one_is_in_flight),
        cmocka_unit_test(test_kernels_two_streams_run_side_by_side),
        cmocka_unit_test(test_kernels_an_idle_device_uses_no_processor),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
