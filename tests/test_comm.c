// SPDX-License-Identifier: Apache-2.0
// Ranks of the in-process form: every rank gets the sum in ascending rank order, bit for bit, many
// times in a row; who disagrees or leaves fails the others and hangs nobody. Alone, and as a
// command of CPU devices with a thread each.
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <setjmp.h>
#include <cmocka.h>

#include <pthread.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "base/check.h"
#include "base/rng.h"
#include "kernels/device.h"

enum { RANKS_MAX = 3, COUNT_MAX = 5000, ROUNDS = 40 };

struct member {
    struct comm *comm;
    pthread_t thread;
    float from[COUNT_MAX], to[COUNT_MAX];
    size_t count;
    bool in_place, leaves;
    uint32_t rounds;
    enum status status;
};

static void make(struct member *members, uint32_t world)
{
    struct comm *comms[RANKS_MAX];
    struct fault fault = {.text = ""};
    assert_int_equal(comm_create_local(world, comms, &fault), STATUS_OK);
    for (uint32_t r = 0; r < world; r++) {
        assert_int_equal(comms[r]->rank, r);
        assert_int_equal(comms[r]->world, world);
        members[r].comm = comms[r];
    }
}

static void drop(struct member *members, uint32_t world)
{
    for (uint32_t r = 0; r < world; r++)
        members[r].comm->table->destroy(members[r].comm);
}

static void fill(struct member *m, uint64_t seed)
{
    struct rng rng = {.seed = seed};
    for (size_t i = 0; i < COUNT_MAX; i++) {
        // Of very different sizes, so that the order of additions shows.
        double size = rng_below(&rng, 2) ? 1e4 : 1e-3;
        m->from[i] = (float)(size * ((double)rng_below(&rng, 20001) - 10000.0) / 10001.0);
    }
}

static void *take_part(void *context)
{
    struct member *m = context;
    for (uint32_t i = 0; i < m->rounds && !m->status; i++) {
        float *to = m->in_place ? m->from : m->to;
        m->status = m->comm->table->all_reduce(m->comm, NULL, m->from, to, m->count);
    }
    if (m->leaves) {
        (void)usleep(20000); // until the others wait, most likely
        m->comm->table->leave(m->comm);
    }
    return NULL;
}

static void run(struct member *members, uint32_t world)
{
    for (uint32_t r = 0; r < world; r++)
        assert_int_equal(pthread_create(&members[r].thread, NULL, take_part, &members[r]), 0);
    for (uint32_t r = 0; r < world; r++)
        assert_int_equal(pthread_join(members[r].thread, NULL), 0);
}

static struct member *members_new(uint32_t world)
{
    struct member *members = calloc(world, sizeof *members);
    assert_non_null(members);
    for (uint32_t r = 0; r < world; r++)
        members[r].rounds = 1;
    make(members, world);
    return members;
}

static void test_comm_sums_in_rank_order_on_every_rank(void **state)
{
    static const size_t counts[] = {0, 1, 2, 7, 255, 256, 257, 768, 1001, COUNT_MAX};
    static float want[COUNT_MAX];
    (void)state;
    for (uint32_t world = 1; world <= RANKS_MAX; world++) {
        struct member *members = members_new(world);
        for (size_t c = 0; c < sizeof counts / sizeof *counts; c++) {
            for (uint32_t r = 0; r < world; r++) {
                fill(&members[r], 100 * c + r);
                members[r].count = counts[c];
                members[r].in_place = r == 0;
            }
            for (size_t i = 0; i < counts[c]; i++) {
                want[i] = members[0].from[i];
                for (uint32_t r = 1; r < world; r++)
                    want[i] += members[r].from[i];
            }
            run(members, world);
            for (uint32_t r = 0; r < world; r++) {
                const float *got = r ? members[r].to : members[r].from;
                assert_int_equal(members[r].status, STATUS_OK);
                assert_memory_equal(got, want, counts[c] * sizeof *want);
            }
        }
        drop(members, world);
        free(members);
    }
}

static void test_comm_many_sums_in_a_row_keep_apart(void **state)
{
    (void)state;
    struct member *members = members_new(RANKS_MAX);
    for (uint32_t r = 0; r < RANKS_MAX; r++) {
        for (size_t i = 0; i < COUNT_MAX; i++)
            members[r].from[i] = r ? 1.0f : 0.0f;
        members[r].count = COUNT_MAX;
        members[r].in_place = r == 0;
        members[r].rounds = ROUNDS;
    }
    run(members, RANKS_MAX);
    for (uint32_t r = 0; r < RANKS_MAX; r++) {
        const float *got = r ? members[r].to : members[r].from;
        for (size_t i = 0; i < COUNT_MAX; i++)
            assert_true(got[i] == (float)(ROUNDS * (RANKS_MAX - 1)));
    }
    drop(members, RANKS_MAX);
    free(members);
}

static void test_comm_ranks_that_disagree_all_fail(void **state)
{
    (void)state;
    struct member *members = members_new(2);
    members[0].count = 10;
    members[1].count = 11;
    run(members, 2);
    assert_int_equal(members[0].status, STATUS_DEVICE);
    assert_int_equal(members[1].status, STATUS_DEVICE);
    drop(members, 2);
    free(members);
}

static void test_comm_a_rank_that_leaves_hangs_nobody(void **state)
{
    (void)state;
    for (int late = 0; late < 2; late++) {
        struct member *members = members_new(RANKS_MAX);
        for (uint32_t r = 0; r < RANKS_MAX; r++)
            members[r].count = 100;
        members[1].rounds = 0;
        members[1].leaves = !late;
        if (late) // it is gone before anybody comes
            members[1].comm->table->leave(members[1].comm);
        run(members, RANKS_MAX);
        assert_int_equal(members[0].status, STATUS_DEVICE);
        assert_int_equal(members[2].status, STATUS_DEVICE);
        drop(members, RANKS_MAX);
        free(members);
    }
}

// ---- as a command ----

struct rank_device {
    struct device *device;
    struct stream *stream;
    struct member member;
    float copy[COUNT_MAX];
};

static void device_open(struct rank_device *d)
{
    struct cpu_options options = {.threads = 1};
    struct fault fault = {.text = ""};
    assert_int_equal(device_create_cpu(&options, &d->device, &fault), STATUS_OK);
    assert_int_equal(d->device->table->stream_create(d->device, 8, &d->stream), STATUS_OK);
}

static void device_close(struct rank_device *d)
{
    d->device->table->stream_destroy(d->stream);
    d->device->table->destroy(d->device);
}

static void record(struct rank_device *d, uint32_t rows, uint32_t cols)
{
    const struct device_table *t = d->device->table;
    struct all_reduce_args a = {.comm = d->member.comm,
                                .from = d->member.from,
                                .to = d->member.to,
                                .rows = rows,
                                .cols = cols};
    t->all_reduce(d->stream, &a);
    t->copy(d->stream, d->copy, d->member.to, (size_t)rows * cols * sizeof(float));
    assert_int_equal(t->submit(d->stream), STATUS_OK);
}

static void devices_make(struct rank_device *d)
{
    struct comm *comms[2];
    struct fault fault = {.text = ""};
    assert_int_equal(comm_create_local(2, comms, &fault), STATUS_OK);
    for (uint32_t r = 0; r < 2; r++) {
        device_open(&d[r]);
        d[r].member.comm = comms[r];
        fill(&d[r].member, r);
    }
}

static void test_comm_is_a_command_in_stream_order(void **state)
{
    (void)state;
    struct rank_device *d = calloc(2, sizeof *d);
    struct segment_result result;
    devices_make(d);
    record(&d[0], 7, 33);
    const struct device_table *t = d[0].device->table;
    for (int i = 0; i < 100; i++)
        assert_false(t->poll(d[0].stream, &result)); // rank 1 has not come
    record(&d[1], 7, 33);
    // With one thread a device computes in whoever waits for it: rank 1 first, rank 0 is polled.
    for (uint32_t r = 2; r-- > 0;) {
        assert_int_equal(t->wait(d[r].stream, &result), STATUS_OK);
        assert_int_equal(result.status, STATUS_OK);
        for (size_t i = 0; i < 7 * 33; i++)
            assert_true(d[r].copy[i] == d[0].member.from[i] + d[1].member.from[i]);
    }
    for (uint32_t r = 0; r < 2; r++) {
        device_close(&d[r]);
        d[r].member.comm->table->destroy(d[r].member.comm);
    }
    free(d);
}

static void test_comm_a_failed_sum_fails_the_segment(void **state)
{
    (void)state;
    struct rank_device *d = calloc(2, sizeof *d);
    struct segment_result result;
    devices_make(d);
    record(&d[0], 3, 5);
    d[1].member.comm->table->destroy(d[1].member.comm);
    const struct device_table *t = d[0].device->table;
    assert_int_equal(t->wait(d[0].stream, &result), STATUS_OK);
    assert_int_equal(result.status, STATUS_DEVICE);
    for (size_t i = 0; i < 15; i++)
        assert_true(d[0].copy[i] == 0); // what follows is skipped
    t->zero(d[0].stream, d[0].copy, sizeof d[0].copy);
    assert_int_equal(t->submit(d[0].stream), STATUS_OK);
    assert_int_equal(t->wait(d[0].stream, &result), STATUS_OK);
    assert_int_equal(result.status, STATUS_OK);
    device_close(&d[0]);
    device_close(&d[1]);
    d[0].member.comm->table->destroy(d[0].member.comm);
    free(d);
}

static void test_comm_refuses_no_ranks_and_too_many(void **state)
{
    (void)state;
    struct comm *comms[1];
    struct fault fault = {.text = ""};
    assert_int_equal(comm_create_local(0, comms, &fault), STATUS_INVALID);
    assert_int_equal(comm_create_local(COMM_RANKS_MAX + 1, comms, &fault), STATUS_INVALID);
    assert_true(strlen(fault.text) > 0);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_comm_sums_in_rank_order_on_every_rank),
        cmocka_unit_test(test_comm_many_sums_in_a_row_keep_apart),
        cmocka_unit_test(test_comm_ranks_that_disagree_all_fail),
        cmocka_unit_test(test_comm_a_rank_that_leaves_hangs_nobody),
        cmocka_unit_test(test_comm_is_a_command_in_stream_order),
        cmocka_unit_test(test_comm_a_failed_sum_fails_the_segment),
        cmocka_unit_test(test_comm_refuses_no_ranks_and_too_many),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
