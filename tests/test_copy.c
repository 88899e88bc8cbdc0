// SPDX-License-Identifier: Apache-2.0
// The copy queues: order, overtaking, promotion, cancelling in each state, charges, failures; and
// the threaded link: bytes, speed, waiting without using the CPU.
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <cmocka.h>
#include <stdlib.h>
#include <string.h>
#include <sys/resource.h>
#include <time.h>

#include "base/arith.h"
#include "base/check.h"
#include "fakes.h"
#include "unified_pool/copy.h"

enum { CHUNK = 4096, ENDS = 128 };

struct bench {
    uint64_t now;
    struct fake_link link;
    struct copy_queues *queues;
    uint8_t from[64 * CHUNK], to[64 * CHUNK];
    struct {
        uint64_t tag;
        enum status status;
    } ends[ENDS];
    uint32_t ended;
};

static void ended(void *context, uint64_t tag, enum status status)
{
    struct bench *bench = context;
    CHECK(bench->ended < ENDS);
    bench->ends[bench->ended].tag = tag;
    bench->ends[bench->ended++].status = status;
}

static struct bench *bench_open(uint32_t copies_max)
{
    struct bench *bench = calloc(1, sizeof *bench);
    CHECK(bench);
    fake_link_init(&bench->link, 1, &bench->now);
    bench->link.delay_min_us = bench->link.delay_max_us = 10;
    fake_content(7, 0, bench->from, sizeof bench->from);
    struct copy_options options = {.link = &bench->link.link,
                                   .clock = clock_fake(&bench->now),
                                   .copies_max = copies_max,
                                   .owners_max = 4,
                                   .chunk_bytes = CHUNK};
    assert_int_equal(copy_create(&options, &bench->queues), STATUS_OK);
    return bench;
}

static void bench_close(struct bench *bench)
{
    copy_destroy(bench->queues);
    free(bench);
}

// A copy of `chunks` chunks of page `tag`, so that the log tells who moved.
static copy_id put(struct bench *bench, uint64_t tag, size_t chunks, enum copy_class class,
                   enum copy_need need)
{
    copy_id id = {0};
    struct copy_request request = {.whole = {.resource = COPY_H2D,
                                             .to = bench->to + tag * 4 * CHUNK,
                                             .from = bench->from + tag * 4 * CHUNK,
                                             .bytes = chunks * CHUNK},
                                   .class = class,
                                   .need = need,
                                   .owner = (uint32_t)tag % 4,
                                   .done = ended,
                                   .context = bench,
                                   .tag = tag};
    assert_int_equal(copy_submit(bench->queues, &request, &id), STATUS_OK);
    return id;
}

static void tick(struct bench *bench, int chunks)
{
    for (int i = 0; i < chunks; i++) {
        bench->now += 10;
        copy_poll(bench->queues);
    }
}

static void assert_order(struct bench *bench, const uint64_t *tags, uint32_t count)
{
    assert_int_equal(bench->link.chunks, count);
    for (uint32_t i = 0; i < count; i++) {
        uint64_t at = (uint64_t)((uint8_t *)bench->link.log[i].to - bench->to) / (4 * CHUNK);
        assert_int_equal(at, tags[i]);
    }
}

static void test_copy_order(void **state)
{
    (void)state;
    struct bench *bench = bench_open(16);
    (void)put(bench, 0, 1, COPY_BATCH, COPY_TIDY);
    (void)put(bench, 1, 1, COPY_BATCH, COPY_ADAPTER);
    (void)put(bench, 2, 1, COPY_INTERACTIVE, COPY_PREFETCH);
    (void)put(bench, 3, 1, COPY_STANDARD, COPY_KV);
    (void)put(bench, 4, 1, COPY_STANDARD, COPY_ADAPTER);
    (void)put(bench, 5, 1, COPY_BATCH, COPY_GATE);
    (void)put(bench, 6, 1, COPY_STANDARD, COPY_KV);
    (void)put(bench, 7, 1, COPY_INTERACTIVE, COPY_GATE);
    tick(bench, 12);
    static const uint64_t want[] = {7, 5, 2, 4, 3, 6, 1, 0};
    assert_order(bench, want, 8);
    for (int i = 0; i < 8; i++) {
        assert_int_equal(bench->ends[i].tag, want[i]);
        assert_int_equal(bench->ends[i].status, STATUS_OK);
    }
    for (size_t i = 0; i < 8; i++)
        assert_memory_equal(bench->to + i * 4 * CHUNK, bench->from + i * 4 * CHUNK, CHUNK);
    assert_true(copy_is_idle(bench->queues));
    bench_close(bench);
}

static void test_copy_overtakes_at_chunks(void **state)
{
    (void)state;
    struct bench *bench = bench_open(16);
    (void)put(bench, 0, 4, COPY_BATCH, COPY_PREFETCH);
    tick(bench, 2); // chunk 1 started, then chunk 2
    (void)put(bench, 1, 2, COPY_INTERACTIVE, COPY_GATE);
    tick(bench, 8);
    static const uint64_t want[] = {0, 0, 1, 1, 0, 0};
    assert_order(bench, want, 6);
    assert_int_equal(bench->ends[0].tag, 1);
    assert_int_equal(bench->ends[1].tag, 0);
    assert_memory_equal(bench->to, bench->from, 4 * CHUNK);
    bench_close(bench);
}

static void test_copy_promote(void **state)
{
    (void)state;
    struct bench *bench = bench_open(16);
    copy_id ids[5];
    for (uint64_t i = 0; i < 5; i++)
        ids[i] = put(bench, i, 1, COPY_BATCH, COPY_PREFETCH);
    copy_promote(bench->queues, ids[3], COPY_BATCH, COPY_GATE);
    copy_promote(bench->queues, ids[4], COPY_STANDARD, COPY_KV);
    copy_promote(bench->queues, ids[2], COPY_STANDARD, COPY_KV); // asked before 4, so goes first
    copy_promote(bench->queues, ids[3], COPY_BATCH, COPY_TIDY);  // never less urgent
    tick(bench, 8);
    static const uint64_t want[] = {3, 2, 4, 0, 1};
    assert_order(bench, want, 5);
    copy_promote(bench->queues, ids[0], COPY_BATCH, COPY_GATE); // of the dead: nothing
    bench_close(bench);
}

static void test_copy_cancel_each_state(void **state)
{
    (void)state;
    struct bench *bench = bench_open(16);
    copy_id flying = put(bench, 0, 3, COPY_STANDARD, COPY_KV);
    copy_id waiting = put(bench, 1, 1, COPY_STANDARD, COPY_KV);
    copy_id begun = put(bench, 2, 3, COPY_STANDARD, COPY_TIDY);
    copy_cancel(bench->queues, waiting); // at once
    assert_int_equal(bench->ended, 1);
    assert_int_equal(bench->ends[0].tag, 1);
    assert_int_equal(bench->ends[0].status, STATUS_CANCELLED);
    tick(bench, 1);
    copy_cancel(bench->queues, flying); // after its chunk
    copy_cancel(bench->queues, flying);
    assert_int_equal(bench->ended, 1);
    tick(bench, 1);
    assert_int_equal(bench->ended, 2);
    assert_int_equal(bench->ends[1].tag, 0);
    assert_int_equal(bench->ends[1].status, STATUS_CANCELLED);
    (void)put(bench, 3, 4, COPY_STANDARD, COPY_KV); // overtakes `begun` between two of its chunks
    tick(bench, 1);
    copy_cancel(bench->queues, begun);
    assert_int_equal(bench->ended, 3);
    assert_int_equal(bench->ends[2].tag, 2);
    copy_cancel(bench->queues, begun);
    tick(bench, 8);
    assert_int_equal(bench->ended, 4);
    assert_int_equal(bench->ends[3].status, STATUS_OK);
    struct copy_stats stats;
    copy_stats(bench->queues, &stats);
    assert_int_equal(stats.cancelled, 3);
    assert_int_equal(stats.copies[COPY_H2D], 1);
    bench_close(bench);
}

static void test_copy_charges_owners(void **state)
{
    (void)state;
    struct bench *bench = bench_open(16);
    (void)put(bench, 1, 3, COPY_STANDARD, COPY_KV);
    (void)put(bench, 5, 2, COPY_STANDARD, COPY_KV); // owner 1 as well
    copy_id cut = put(bench, 2, 4, COPY_STANDARD, COPY_TIDY);
    tick(bench, 7); // five chunks done, one of `cut` done, one in flight
    copy_cancel(bench->queues, cut);
    tick(bench, 3);
    assert_int_equal(copy_owner_bytes(bench->queues, 1, COPY_H2D), 5 * CHUNK);
    assert_int_equal(copy_owner_bytes(bench->queues, 2, COPY_H2D), 2 * CHUNK); // what moved
    assert_int_equal(copy_owner_bytes(bench->queues, 0, COPY_H2D), 0);
    assert_int_equal(copy_owner_bytes(bench->queues, 1, COPY_D2H), 0);
    struct copy_stats stats;
    copy_stats(bench->queues, &stats);
    assert_int_equal(stats.bytes[COPY_H2D], 7 * CHUNK);
    assert_int_equal(stats.busy_us[COPY_H2D], 70);
    bench_close(bench);
}

static void test_copy_full_and_failures(void **state)
{
    (void)state;
    struct bench *bench = bench_open(2);
    copy_id id;
    (void)put(bench, 0, 3, COPY_STANDARD, COPY_KV);
    (void)put(bench, 1, 1, COPY_STANDARD, COPY_KV);
    struct copy_request request = {
        .whole = {.resource = COPY_H2D, .to = bench->to, .from = bench->from, .bytes = 8}};
    assert_int_equal(copy_submit(bench->queues, &request, &id), STATUS_FULL);
    bench->link.fail_at = 2; // the second chunk of copy 0
    tick(bench, 8);
    assert_int_equal(bench->ended, 2);
    assert_int_equal(bench->ends[0].tag, 0);
    assert_int_equal(bench->ends[0].status, STATUS_IO);
    assert_int_equal(bench->ends[1].status, STATUS_OK);
    assert_int_equal(bench->link.chunks, 3); // the third chunk of copy 0 was never tried
    assert_int_equal(copy_submit(bench->queues, &request, &id), STATUS_OK);
    bench_close(bench);
}

static void test_copy_resources_are_independent(void **state)
{
    (void)state;
    struct bench *bench = bench_open(8);
    struct fake_reader file;
    fake_reader_init(&file, 9, sizeof bench->from);
    (void)put(bench, 0, 4, COPY_STANDARD, COPY_KV);
    bench->link.held[COPY_H2D] = true;
    copy_id id;
    struct copy_request read = {.whole = {.resource = COPY_READ,
                                          .to = bench->to + 16 * CHUNK,
                                          .file = &file.reader,
                                          .offset = 2 * CHUNK,
                                          .bytes = 2 * CHUNK + 8},
                                .done = ended,
                                .context = bench,
                                .tag = 77};
    assert_int_equal(copy_submit(bench->queues, &read, &id), STATUS_OK);
    tick(bench, 5);
    assert_int_equal(bench->ended, 1);
    assert_int_equal(bench->ends[0].tag, 77);
    assert_true(fake_content_is(9, 2 * CHUNK, bench->to + 16 * CHUNK, (size_t)read.whole.bytes));
    bench->link.held[COPY_H2D] = false;
    tick(bench, 5);
    assert_int_equal(bench->ended, 2);
    bench_close(bench);
}

// ---- the threaded link ----

static double seconds(clockid_t clock)
{
    struct timespec t;
    (void)clock_gettime(clock, &t);
    return (double)t.tv_sec + (double)t.tv_nsec * 1e-9;
}

static void wait_idle(struct copy_queues *queues)
{
    struct timespec nap = {.tv_nsec = 20000};
    while (!copy_is_idle(queues)) {
        copy_poll(queues);
        (void)nanosleep(&nap, NULL);
    }
}

static void test_copy_threads_move_and_pace(void **state)
{
    (void)state;
    enum { BYTES = 4 << 20 };
    struct link_options speeds = {.h2d_gbytes_per_s = 0.1, .latency_us = 100};
    struct link *link;
    struct copy_queues *queues;
    assert_int_equal(copy_link_threads(&speeds, &link), STATUS_OK);
    struct copy_options options = {
        .link = link, .clock = clock_monotonic(), .copies_max = 8, .owners_max = 1};
    assert_int_equal(copy_create(&options, &queues), STATUS_OK);
    uint8_t *from = malloc(BYTES), *to = calloc(1, BYTES), *read = calloc(1, BYTES);
    assert_true(from && to && read);
    fake_content(3, 0, from, BYTES);
    struct fake_reader file;
    fake_reader_init(&file, 4, BYTES);
    copy_id id;
    struct copy_request up = {
        .whole = {.resource = COPY_H2D, .to = to, .from = from, .bytes = BYTES}};
    struct copy_request in = {
        .whole = {.resource = COPY_READ, .to = read, .file = &file.reader, .bytes = BYTES}};
    double begin = seconds(CLOCK_MONOTONIC);
    assert_int_equal(copy_submit(queues, &up, &id), STATUS_OK);
    assert_int_equal(copy_submit(queues, &in, &id), STATUS_OK);
    wait_idle(queues);
    double took = seconds(CLOCK_MONOTONIC) - begin;
    assert_memory_equal(from, to, BYTES);
    assert_true(fake_content_is(4, 0, read, BYTES));
    double least = BYTES / 0.1e9 + 4 * 100e-6;
    print_message("4 MiB at 0.1 GB/s and 100 us a chunk: %.2f ms, at least %.2f\n", took * 1e3,
                  least * 1e3);
    assert_true(took >= least);
    copy_destroy(queues);
    free(from);
    free(to);
    free(read);
}

static void test_copy_threads_idle_uses_no_cpu(void **state)
{
    (void)state;
    struct link_options speeds = {0};
    struct link *link;
    assert_int_equal(copy_link_threads(&speeds, &link), STATUS_OK);
    double before = seconds(CLOCK_PROCESS_CPUTIME_ID);
    struct timespec nap = {.tv_nsec = 50000000};
    (void)nanosleep(&nap, NULL);
    double used = seconds(CLOCK_PROCESS_CPUTIME_ID) - before;
    print_message("three idle workers used %.0f us of CPU in 50 ms\n", used * 1e6);
    assert_true(used < 0.005);
    link->destroy(link);
}

struct reads {
    struct copy_queues *queues;
    uint32_t ended;
};

static void read_ended(void *context, uint64_t tag, enum status status)
{
    struct reads *reads = context;
    assert_int_equal(status, STATUS_OK);
    assert_int_equal(tag, reads->ended++); // told of in the order in which they began
}

// Small and large, ended in any order by four threads, and sometimes cut off.
static void test_copy_threads_several_read(void **state)
{
    (void)state;
    enum { READS = 400, ROOM = 40000 };
    struct rng rng = {.seed = 12};
    struct fake_reader file;
    uint8_t *to = malloc((size_t)READS * ROOM);
    fake_reader_init(&file, 4, READS * ROOM);
    for (int round = 0; round < 20; round++) {
        struct link_options speeds = {.read_threads = 4};
        struct reads reads = {.ended = 0};
        struct link *link;
        size_t bytes[READS];
        assert_int_equal(copy_link_threads(&speeds, &link), STATUS_OK);
        struct copy_options options = {
            .link = link, .clock = clock_monotonic(), .copies_max = READS, .owners_max = 1};
        assert_int_equal(copy_create(&options, &reads.queues), STATUS_OK);
        memset(to, 0, (size_t)READS * ROOM);
        for (uint32_t i = 0; i < READS; i++) {
            copy_id id;
            bytes[i] = 8 + 8 * rng_below(&rng, i % 7 ? 25 : ROOM / 8);
            struct copy_request in = {.whole = {.resource = COPY_READ,
                                                .to = to + (size_t)i * ROOM,
                                                .file = &file.reader,
                                                .offset = (uint64_t)i * ROOM,
                                                .bytes = bytes[i]},
                                      .done = read_ended,
                                      .context = &reads,
                                      .tag = i};
            assert_int_equal(copy_submit(reads.queues, &in, &id), STATUS_OK);
        }
        if (round % 4 == 3) {
            copy_poll(reads.queues);
        } else {
            wait_idle(reads.queues);
            assert_int_equal(reads.ended, READS);
            for (uint32_t i = 0; i < READS; i++)
                assert_true(
                    fake_content_is(4, (uint64_t)i * ROOM, to + (size_t)i * ROOM, bytes[i]));
        }
        copy_destroy(reads.queues);
    }
    free(to);
}

static void test_copy_threads_destroy_in_flight(void **state)
{
    (void)state;
    enum { BYTES = 256 << 10 };
    uint8_t *from = calloc(1, BYTES), *to = calloc(1, BYTES);
    for (int round = 0; round < 20; round++) {
        struct link_options speeds = {.latency_us = 50};
        struct link *link;
        struct copy_queues *queues;
        assert_int_equal(copy_link_threads(&speeds, &link), STATUS_OK);
        struct copy_options options = {
            .link = link, .clock = clock_monotonic(), .copies_max = 2, .owners_max = 1};
        assert_int_equal(copy_create(&options, &queues), STATUS_OK);
        copy_id id;
        struct copy_request up = {
            .whole = {.resource = COPY_D2H, .to = to, .from = from, .bytes = BYTES}};
        assert_int_equal(copy_submit(queues, &up, &id), STATUS_OK);
        copy_poll(queues);
        copy_destroy(queues);
    }
    free(from);
    free(to);
}

// ---- a link that takes several chunks ----

enum { DEPTH = 3 };

struct deep_link {
    struct link link;
    size_t started[ENDS];             // bytes
    uint32_t starts, polls, finished; // finished: how many may be answered
};

static void deep_start(struct link *link, const struct copy_chunk *chunk)
{
    struct deep_link *deep = (struct deep_link *)link;
    CHECK(deep->starts < ENDS && deep->starts - deep->polls < DEPTH);
    deep->started[deep->starts++] = chunk->bytes;
}

static bool deep_poll(struct link *link, enum copy_resource resource, enum status *status)
{
    struct deep_link *deep = (struct deep_link *)link;
    (void)resource;
    *status = STATUS_OK;
    return deep->polls < deep->finished && deep->polls++ < ENDS;
}

static void deep_destroy(struct link *link)
{
    (void)link;
}

static struct bench *deep_open(struct deep_link *deep)
{
    struct bench *bench = calloc(1, sizeof *bench);
    CHECK(bench);
    *deep = (struct deep_link){.link = {.start = deep_start,
                                        .poll = deep_poll,
                                        .destroy = deep_destroy,
                                        .depth = {[COPY_H2D] = DEPTH}}};
    struct copy_options options = {.link = &deep->link,
                                   .clock = clock_fake(&bench->now),
                                   .copies_max = 16,
                                   .owners_max = 4,
                                   .chunk_bytes = CHUNK};
    assert_int_equal(copy_create(&options, &bench->queues), STATUS_OK);
    return bench;
}

static copy_id put_bytes(struct bench *bench, uint64_t tag, size_t bytes, enum copy_need need)
{
    copy_id id = {0};
    struct copy_request request = {
        .whole = {.resource = COPY_H2D, .to = bench->to, .from = bench->from, .bytes = bytes},
        .class = COPY_STANDARD,
        .need = need,
        .done = ended,
        .context = bench,
        .tag = tag};
    assert_int_equal(copy_submit(bench->queues, &request, &id), STATUS_OK);
    return id;
}

// In flight are as many as the link takes, and never more than a chunk's bytes: what is urgent
// comes next, behind one chunk at most.
static void test_copy_several_in_flight(void **state)
{
    (void)state;
    struct deep_link deep;
    struct bench *bench = deep_open(&deep);
    copy_id id[6];
    for (uint64_t tag = 0; tag < 5; tag++)
        id[tag] = put_bytes(bench, tag, CHUNK / 2, COPY_ADAPTER);
    copy_poll(bench->queues);
    assert_int_equal(deep.starts, 2); // two halves are a chunk
    id[5] = put_bytes(bench, 5, CHUNK / 4, COPY_GATE);
    copy_cancel(bench->queues, id[0]);                            // it is under way
    copy_promote(bench->queues, id[1], COPY_STANDARD, COPY_GATE); // so is this one
    copy_cancel(bench->queues, id[4]);                            // this one is not
    assert_int_equal(bench->ended, 1);
    deep.finished = 1;
    copy_poll(bench->queues);
    assert_int_equal(deep.starts, 3); // the urgent one; half a chunk more has no room beside it
    assert_int_equal(deep.started[2], CHUNK / 4);
    deep.finished = 2;
    copy_poll(bench->queues);
    assert_int_equal(deep.starts, 4);
    assert_false(copy_is_idle(bench->queues));
    while (deep.finished < deep.starts) {
        deep.finished++;
        copy_poll(bench->queues);
    }
    assert_true(copy_is_idle(bench->queues));
    const uint64_t order[] = {4, 0, 1, 5, 2, 3};
    assert_int_equal(bench->ended, 6);
    for (uint32_t i = 0; i < 6; i++) {
        assert_int_equal(bench->ends[i].tag, order[i]);
        assert_int_equal(bench->ends[i].status, i < 2 ? STATUS_CANCELLED : STATUS_OK);
    }
    copy_destroy(bench->queues);
    free(bench);
}

// One of several chunks has one of them in flight at a time, and others fly beside its last.
static void test_copy_several_chunks_beside_others(void **state)
{
    (void)state;
    struct deep_link deep;
    struct bench *bench = deep_open(&deep);
    (void)put_bytes(bench, 0, 2 * CHUNK + CHUNK / 4, COPY_ADAPTER);
    for (uint64_t tag = 1; tag < 6; tag++)
        (void)put_bytes(bench, tag, CHUNK / 8, COPY_ADAPTER);
    copy_poll(bench->queues);
    const uint32_t starts[] = {1, 2, 5, 6, 7, 8, 8, 8};
    for (uint32_t i = 0; i < 8; i++) {
        assert_int_equal(deep.starts, starts[i]);
        deep.finished++;
        copy_poll(bench->queues);
    }
    assert_true(copy_is_idle(bench->queues));
    for (uint32_t i = 0; i < 6; i++)
        assert_int_equal(bench->ends[i].tag, i);
    copy_destroy(bench->queues);
    free(bench);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_copy_order),
        cmocka_unit_test(test_copy_overtakes_at_chunks),
        cmocka_unit_test(test_copy_promote),
        cmocka_unit_test(test_copy_several_in_flight),
        cmocka_unit_test(test_copy_several_chunks_beside_others),
        cmocka_unit_test(test_copy_cancel_each_state),
        cmocka_unit_test(test_copy_charges_owners),
        cmocka_unit_test(test_copy_full_and_failures),
        cmocka_unit_test(test_copy_resources_are_independent),
        cmocka_unit_test(test_copy_threads_move_and_pace),
        cmocka_unit_test(test_copy_threads_idle_uses_no_cpu),
        cmocka_unit_test(test_copy_threads_several_read),
        cmocka_unit_test(test_copy_threads_destroy_in_flight),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
