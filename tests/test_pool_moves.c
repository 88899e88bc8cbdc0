// SPDX-License-Identifier: Apache-2.0
// The pool: fetches through host and file, host copies, write-backs, failures of the n-th copy,
// leaving in each state, and the same over the threaded link.
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <cmocka.h>
#include <string.h>

#include "base/rng.h"
#include "test_pool_rig.h"

// ---- fetching ----

static void test_pool_fetch_from_file_and_host(void **state)
{
    (void)state;
    struct bench *bench = bench_open(8, 8);
    pool_object a = make_filed(bench, PAGE_EXPERT, 1, 3, 10);
    assert_int_equal(pool_fetch(bench->pool, a, COPY_BATCH, COPY_PREFETCH), STATUS_OK);
    assert_true(pool_is_fetching(bench->pool, a));
    assert_false(pool_is_resident(bench->pool, a));
    assert_int_equal(pool_fetch(bench->pool, a, COPY_STANDARD, COPY_GATE), STATUS_OK);
    settle(bench);
    assert_false(pool_is_fetching(bench->pool, a));
    assert_file_content(bench, a);
    assert_int_equal(bench->file.reads, 6); // two halves each
    assert_true(pool_has_host_copy(bench->pool, a));
    assert_int_equal(copy_owner_bytes(bench->copies, 1, COPY_READ), 3 * PAGE);
    assert_int_equal(copy_owner_bytes(bench->copies, 1, COPY_H2D), 3 * PAGE);
    pool_drop_device(bench->pool, a);
    assert_int_equal(stats_of(bench).device_free, 8);
    assert_int_equal(stats_of(bench).host_by_kind[PAGE_EXPERT], 3);
    assert_int_equal(pool_fetch(bench->pool, a, COPY_BATCH, COPY_GATE), STATUS_OK);
    settle(bench);
    assert_file_content(bench, a);
    assert_int_equal(bench->file.reads, 6); // from the host copy
    assert_int_equal(stats_of(bench).fetches, 2);
    pool_object none = make(bench, PAGE_KV, 0, 1);
    assert_int_equal(pool_fetch(bench->pool, none, COPY_BATCH, COPY_KV), STATUS_NOT_FOUND);
    bench_close(bench);
}

static void test_pool_fetch_promotes(void **state)
{
    (void)state;
    struct bench *bench = bench_open(8, 8);
    pool_object o[3];
    for (uint32_t i = 0; i < 3; i++) {
        o[i] = make_filed(bench, PAGE_EXPERT, 0, 2, 10 * i);
        assert_int_equal(pool_fetch(bench->pool, o[i], COPY_BATCH, COPY_PREFETCH), STATUS_OK);
    }
    assert_int_equal(pool_fetch(bench->pool, o[2], COPY_BATCH, COPY_GATE), STATUS_OK);
    bench->link.delay_min_us = bench->link.delay_max_us = 10;
    settle(bench);
    static const uint64_t want[] = {20, 21, 0, 1, 10, 11};
    uint32_t reads = 0;
    for (uint64_t i = 0; i < bench->link.chunks; i++)
        if (bench->link.log[i].resource == COPY_READ)
            assert_int_equal(bench->link.log[i].offset, want[reads++] * PAGE);
    assert_int_equal(reads, 6);
    bench_close(bench);
}

// Host copies of read-only objects: the least recently used leaves for the next.
static void test_pool_host_copies_are_a_cache(void **state)
{
    (void)state;
    struct bench *bench = bench_open(8, 4);
    pool_object o[3];
    for (uint32_t i = 0; i < 3; i++) {
        o[i] = make_filed(bench, PAGE_EXPERT, 0, 2, 10 * i);
        assert_int_equal(pool_fetch(bench->pool, o[i], COPY_BATCH, COPY_KV), STATUS_OK);
        settle(bench);
    }
    assert_false(pool_has_host_copy(bench->pool, o[0]));
    assert_true(pool_has_host_copy(bench->pool, o[1]));
    assert_true(pool_has_host_copy(bench->pool, o[2]));
    pool_drop_device(bench->pool, o[1]); // its host copy becomes the young end
    assert_int_equal(pool_fetch(bench->pool, o[0], COPY_BATCH, COPY_KV), STATUS_OK);
    pool_drop_device(bench->pool, o[0]);
    assert_int_equal(pool_fetch(bench->pool, o[0], COPY_BATCH, COPY_KV), STATUS_OK);
    settle(bench);
    assert_true(pool_has_host_copy(bench->pool, o[1]));
    assert_false(pool_has_host_copy(bench->pool, o[2]));
    assert_file_content(bench, o[0]);
    bench_close(bench);
}

// An object of 12 slots passes through 2 host pages; with few places in the queues as well.
static void test_pool_fetch_through_few_host_pages(void **state)
{
    (void)state;
    for (uint32_t copies = 1; copies <= 3; copies++) {
        struct bench *bench = bench_open_sized((struct sizes){32, 2, 8, 64, copies});
        bench->link.delay_min_us = 5;
        bench->link.delay_max_us = 30;
        pool_object a = make_filed(bench, PAGE_ADAPTER, 0, 12, 0);
        pool_object b = make_filed(bench, PAGE_EXPERT, 0, 12, 50);
        assert_int_equal(pool_fetch(bench->pool, a, COPY_BATCH, COPY_ADAPTER), STATUS_OK);
        assert_int_equal(pool_fetch(bench->pool, b, COPY_BATCH, COPY_GATE), STATUS_OK);
        settle(bench);
        assert_file_content(bench, a);
        assert_file_content(bench, b);
        assert_int_equal(stats_of(bench).fetch_failures, 0);
        bench_close(bench);
    }
}

// Host pages all held by KV: the fetch is refused, or gives up, and nothing waits for ever.
static void test_pool_fetch_without_host_pages(void **state)
{
    (void)state;
    struct bench *bench = bench_open(8, 4);
    pool_object kv = make_reserved(bench, PAGE_KV, 0, 3);
    assert_int_equal(pool_write_back(bench->pool, kv, COPY_BATCH), STATUS_OK);
    settle(bench);
    pool_object more = make_reserved(bench, PAGE_KV, 0, 1);
    pool_object a = make_filed(bench, PAGE_ADAPTER, 0, 2, 0);
    assert_int_equal(pool_fetch(bench->pool, a, COPY_BATCH, COPY_KV),
                     STATUS_OK); // one page to pass
    pool_fetch_cancel(bench->pool, a);
    settle(bench);
    assert_int_equal(pool_write_back(bench->pool, more, COPY_BATCH), STATUS_OK);
    settle(bench);
    assert_int_equal(pool_fetch(bench->pool, a, COPY_BATCH, COPY_KV), STATUS_FULL);
    pool_drop_host(bench->pool, more);
    bench->link.held[COPY_READ] = true;
    assert_int_equal(pool_fetch(bench->pool, a, COPY_BATCH, COPY_KV), STATUS_OK);
    bench->link.held[COPY_READ] = false;
    settle(bench);
    assert_file_content(bench, a);
    bench_close(bench);
}

// The host pages a fetch hoped for went to KV: it gives up with FULL as soon as nothing is under
// way.
static void test_pool_fetch_gives_up(void **state)
{
    (void)state;
    struct bench *bench = bench_open(8, 2);
    pool_object kv = make_reserved(bench, PAGE_KV, 0, 2);
    pool_object a = make_filed(bench, PAGE_ADAPTER, 0, 2, 0);
    bench->link.held[COPY_D2H] = true;
    assert_int_equal(pool_write_back(bench->pool, kv, COPY_BATCH), STATUS_OK);
    assert_int_equal(pool_fetch(bench->pool, a, COPY_BATCH, COPY_KV), STATUS_OK);
    pool_poll(bench->pool);
    assert_true(pool_is_fetching(bench->pool, a));
    bench->link.held[COPY_D2H] = false;
    settle(bench);
    assert_true(pool_is_written_back(bench->pool, kv));
    assert_false(pool_is_fetching(bench->pool, a));
    assert_int_equal(pool_fetch_status(bench->pool, a), STATUS_FULL);
    assert_int_equal(stats_of(bench).device_free, 6);
    bench_close(bench);
}

static void test_pool_fetch_takes_the_cheapest(void **state)
{
    (void)state;
    struct bench *bench = bench_open(4, 8);
    pool_object a = make_filed(bench, PAGE_EXPERT, 0, 2, 0);
    pool_object b = make_filed(bench, PAGE_EXPERT, 0, 2, 10);
    pool_object c = make_filed(bench, PAGE_ADAPTER, 0, 2, 20);
    assert_int_equal(pool_fetch(bench->pool, a, COPY_BATCH, COPY_GATE), STATUS_OK);
    assert_int_equal(pool_fetch(bench->pool, b, COPY_BATCH, COPY_GATE), STATUS_OK);
    assert_int_equal(pool_fetch(bench->pool, c, COPY_BATCH, COPY_GATE), STATUS_FULL); // in flight
    settle(bench);
    kind_offer(bench, PAGE_EXPERT, a, 2, 0);
    kind_offer(bench, PAGE_EXPERT, b, 1, 1);
    assert_int_equal(pool_fetch(bench->pool, c, COPY_BATCH, COPY_GATE), STATUS_OK);
    settle(bench);
    assert_int_equal(bench->kinds[PAGE_EXPERT].gone[0], 1);
    assert_int_equal(stats_of(bench).give_backs, 1);
    assert_file_content(bench, a);
    assert_file_content(bench, c);
    assert_int_equal(stats_of(bench).taken_from[PAGE_ADAPTER][PAGE_EXPERT], 2);
    bench_close(bench);
}

// ---- write-back ----

static void test_pool_write_back_and_return(void **state)
{
    (void)state;
    struct bench *bench = bench_open(4, 8);
    bench->link.delay_max_us = 50;
    pool_object a = make_reserved(bench, PAGE_KV, 3, 3);
    for (uint32_t s = 0; s < 3; s++)
        fake_content(100 + s, 0, slot_memory(bench, a, s), PAGE);
    assert_int_equal(pool_write_back(bench->pool, a, COPY_BATCH), STATUS_OK);
    assert_true(pool_is_writing_back(bench->pool, a));
    assert_false(pool_is_written_back(bench->pool, a));
    settle(bench);
    assert_true(pool_is_written_back(bench->pool, a));
    assert_int_equal(stats_of(bench).write_backs, 1);
    assert_int_equal(copy_owner_bytes(bench->copies, 3, COPY_D2H), 3 * PAGE);
    pool_drop_device(bench->pool, a);
    pool_object other = make_reserved(bench, PAGE_KV, 1, 4);
    for (uint32_t s = 0; s < 4; s++)
        memset(slot_memory(bench, other, s), 0xaa, PAGE);
    pool_object_destroy(bench->pool, other);
    assert_int_equal(pool_fetch(bench->pool, a, COPY_INTERACTIVE, COPY_KV), STATUS_OK);
    settle(bench);
    for (uint32_t s = 0; s < 3; s++)
        assert_true(fake_content_is(100 + s, 0, slot_memory(bench, a, s), PAGE));
    pool_drop_host(bench->pool, a);
    assert_int_equal(stats_of(bench).host_free, 8);
    bench_close(bench);
}

static void test_pool_write_back_takes_host_copies(void **state)
{
    (void)state;
    struct bench *bench = bench_open(64, 32); // of 32 host pages 2 are kept for reads
    pool_object expert = make_filed(bench, PAGE_EXPERT, 0, 32, 0);
    assert_int_equal(pool_fetch(bench->pool, expert, COPY_BATCH, COPY_GATE), STATUS_OK);
    settle(bench);
    assert_int_equal(stats_of(bench).host_free, 0);
    pool_object kv = make_reserved(bench, PAGE_KV, 0, 30);
    assert_int_equal(pool_write_back(bench->pool, kv, COPY_BATCH), STATUS_OK);
    pool_object more = make_reserved(bench, PAGE_KV, 0, 1);
    assert_int_equal(pool_write_back(bench->pool, more, COPY_BATCH), STATUS_FULL);
    settle(bench);
    assert_true(pool_is_written_back(bench->pool, kv));
    assert_false(pool_has_host_copy(bench->pool, expert));
    assert_file_content(bench, expert);
    bench_close(bench);
}

// ---- failures and cancelling ----

// A mixed load whose n-th chunk fails, for every n: no page is lost, the rest still arrives.
static void test_pool_nth_copy_fails(void **state)
{
    (void)state;
    enum { CHUNKS = 18 }; // 8 slots read and uploaded, 2 written
    for (uint64_t n = 1; n <= CHUNKS; n++) {
        struct bench *bench = bench_open(16, 6);
        bench->link.delay_max_us = 30;
        bench->link.fail_at = n;
        pool_object a = make_filed(bench, PAGE_EXPERT, 0, 3, 0);
        pool_object b = make_filed(bench, PAGE_ADAPTER, 1, 5, 10);
        pool_object kv = make_reserved(bench, PAGE_KV, 2, 2);
        for (uint32_t s = 0; s < 2; s++)
            fake_content(s, 0, slot_memory(bench, kv, s), PAGE);
        assert_int_equal(pool_write_back(bench->pool, kv, COPY_BATCH), STATUS_OK);
        assert_int_equal(pool_fetch(bench->pool, a, COPY_BATCH, COPY_GATE), STATUS_OK);
        assert_int_equal(pool_fetch(bench->pool, b, COPY_BATCH, COPY_ADAPTER), STATUS_OK);
        settle(bench);
        int failures = !pool_is_resident(bench->pool, a) + !pool_is_resident(bench->pool, b) +
                       !pool_is_written_back(bench->pool, kv);
        assert_int_equal(failures, 1);
        assert_int_equal(bench->link.failed, 1);
        if (!pool_is_resident(bench->pool, a))
            assert_int_equal(pool_fetch_status(bench->pool, a), STATUS_IO);
        // Again, without the failure: everything arrives.
        assert_int_equal(pool_write_back(bench->pool, kv, COPY_BATCH), STATUS_OK);
        settle(bench);
        pool_drop_device(bench->pool, kv);
        assert_int_equal(pool_fetch(bench->pool, kv, COPY_BATCH, COPY_KV), STATUS_OK);
        assert_int_equal(pool_fetch(bench->pool, a, COPY_BATCH, COPY_GATE), STATUS_OK);
        assert_int_equal(pool_fetch(bench->pool, b, COPY_BATCH, COPY_ADAPTER), STATUS_OK);
        settle(bench);
        assert_file_content(bench, a);
        assert_file_content(bench, b);
        for (uint32_t s = 0; s < 2; s++)
            assert_true(fake_content_is(s, 0, slot_memory(bench, kv, s), PAGE));
        pool_object_destroy(bench->pool, a);
        pool_object_destroy(bench->pool, b);
        pool_object_destroy(bench->pool, kv);
        assert_int_equal(stats_of(bench).device_free, 16);
        assert_int_equal(stats_of(bench).host_free, 6);
        bench_close(bench);
    }
}

// Cancels, drops or destroys after k polls, for every k: nothing is lost, and a page a copy still
// fills or reads is not given to another before.
static void test_pool_leaving_in_each_state(void **state)
{
    (void)state;
    for (int how = 0; how < 3; how++)
        for (int k = 0; k < 24; k++) {
            struct bench *bench = bench_open(6, 4);
            bench->link.delay_min_us = bench->link.delay_max_us = 20;
            pool_object a = make_filed(bench, PAGE_EXPERT, 0, 4, 0);
            pool_object kv = make_reserved(bench, PAGE_KV, 1, 2);
            fake_content(1, 0, slot_memory(bench, kv, 0), PAGE);
            assert_int_equal(pool_write_back(bench->pool, kv, COPY_BATCH), STATUS_OK);
            assert_int_equal(pool_fetch(bench->pool, a, COPY_BATCH, COPY_GATE), STATUS_OK);
            for (int i = 0; i < k; i++) {
                bench->now += 10;
                pool_poll(bench->pool);
            }
            if (how == 0) {
                pool_fetch_cancel(bench->pool, a);
            } else if (how == 1) {
                pool_drop_device(bench->pool, a);
                pool_drop_device(bench->pool, kv);
                pool_drop_host(bench->pool, kv);
            } else {
                pool_object_destroy(bench->pool, a);
                pool_object_destroy(bench->pool, kv);
            }
            pool_check(bench->pool);
            // Whatever is free now can be used at once.
            uint32_t room = stats_of(bench).device_free;
            pool_object b = {0};
            if (room) {
                b = make_reserved(bench, PAGE_ADAPTER, 2, room);
                for (uint32_t s = 0; s < room; s++)
                    fake_content(50 + s, 0, slot_memory(bench, b, s), PAGE);
            }
            settle(bench);
            for (uint32_t s = 0; s < room; s++)
                assert_true(fake_content_is(50 + s, 0, slot_memory(bench, b, s), PAGE));
            if (room)
                pool_object_destroy(bench->pool, b);
            if (how == 2) {
                assert_int_equal(stats_of(bench).device_free, 6);
                assert_int_equal(stats_of(bench).host_free, 4);
            } else {
                pool_drop_device(bench->pool, kv);
                assert_int_equal(pool_fetch(bench->pool, a, COPY_BATCH, COPY_GATE), STATUS_OK);
                settle(bench);
                assert_file_content(bench, a);
            }
            bench_close(bench);
        }
}

// ---- the threaded link ----

// The same mechanisms with real threads moving the bytes (and ThreadSanitizer looking on).
static void test_pool_over_the_threaded_link(void **state)
{
    (void)state;
    struct link_options speeds = {.h2d_gbytes_per_s = 4, .d2h_gbytes_per_s = 2, .latency_us = 5};
    struct link *link;
    assert_int_equal(copy_link_threads(&speeds, &link), STATUS_OK);
    struct bench *bench = bench_open_on((struct sizes){12, 8, 64, 64, 64}, link, clock_monotonic());
    struct rng rng = {.seed = 4};
    pool_object o[6], kv = make_reserved(bench, PAGE_KV, 1, 2);
    for (uint32_t s = 0; s < 2; s++)
        fake_content(s, 0, slot_memory(bench, kv, s), PAGE);
    for (uint32_t i = 0; i < 6; i++)
        o[i] = make_filed(bench, PAGE_EXPERT, 0, 3, 10 * i);
    for (int round = 0; round < 200; round++) {
        pool_object object = o[rng_below(&rng, 6)];
        if (rng_below(&rng, 3) == 0)
            pool_drop_device(bench->pool, object);
        else
            (void)!pool_fetch(bench->pool, object, COPY_STANDARD,
                              (enum copy_need)rng_below(&rng, COPY_NEEDS));
        if (round % 20 == 5 && pool_is_resident(bench->pool, kv)) {
            // FULL when fetches hold all host pages but the one that is kept for them.
            enum status status = pool_write_back(bench->pool, kv, COPY_BATCH);
            assert_true(status == STATUS_OK || status == STATUS_FULL);
        }
        if (pool_is_written_back(bench->pool, kv) && pool_is_resident(bench->pool, kv))
            pool_drop_device(bench->pool, kv);
        else if (!pool_is_resident(bench->pool, kv))
            (void)!pool_fetch(bench->pool, kv, COPY_STANDARD, COPY_KV);
        pool_poll(bench->pool);
        pool_check(bench->pool);
        for (uint32_t i = 0; i < 6; i++)
            if (pool_is_resident(bench->pool, o[i]))
                assert_file_content(bench, o[i]);
    }
    settle(bench);
    for (uint32_t i = 0; i < 6; i++)
        pool_drop_device(bench->pool, o[i]);
    settle(bench);
    assert_int_equal(pool_fetch(bench->pool, kv, COPY_STANDARD, COPY_KV), STATUS_OK);
    settle(bench);
    for (uint32_t s = 0; s < 2; s++)
        assert_true(fake_content_is(s, 0, slot_memory(bench, kv, s), PAGE));
    bench_close(bench);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_pool_fetch_from_file_and_host),
        cmocka_unit_test(test_pool_fetch_promotes),
        cmocka_unit_test(test_pool_host_copies_are_a_cache),
        cmocka_unit_test(test_pool_fetch_through_few_host_pages),
        cmocka_unit_test(test_pool_fetch_without_host_pages),
        cmocka_unit_test(test_pool_fetch_gives_up),
        cmocka_unit_test(test_pool_fetch_takes_the_cheapest),
        cmocka_unit_test(test_pool_write_back_and_return),
        cmocka_unit_test(test_pool_write_back_takes_host_copies),
        cmocka_unit_test(test_pool_nth_copy_fails),
        cmocka_unit_test(test_pool_leaving_in_each_state),
        cmocka_unit_test(test_pool_over_the_threaded_link),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
