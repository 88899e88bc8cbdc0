// SPDX-License-Identifier: Apache-2.0
// The pool: pages, handles, epochs, pins, prices with exact counts, zeroing between owners, kinds
// that trade pages.
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <cmocka.h>
#include <string.h>

#include "base/rng.h"
#include "test_pool_rig.h"

// ---- pages, objects, handles ----

static void test_pool_options_are_checked(void **state)
{
    (void)state;
    struct pool *pool;
    struct fault fault;
    struct pool_options options = {.page_bytes = 3 << 15, .device_pages = 1};
    assert_int_equal(pool_create(&options, &pool, &fault), STATUS_INVALID);
    assert_non_null(strstr(fault.text, "power of two"));
    options.page_bytes = PAGE;
    options.device_pages = 0;
    assert_int_equal(pool_create(&options, &pool, &fault), STATUS_INVALID);
}

static void test_pool_counts_by_kind_and_owner(void **state)
{
    (void)state;
    struct bench *bench = bench_open(10, 4);
    pool_object a = make_reserved(bench, PAGE_KV, 1, 3);
    pool_object b = make_reserved(bench, PAGE_ADAPTER, 2, 2);
    struct pool_stats stats = stats_of(bench);
    assert_int_equal(stats.device_free, 5);
    assert_int_equal(stats.device_by_kind[PAGE_KV], 3);
    assert_int_equal(stats.device_by_kind[PAGE_ADAPTER], 2);
    assert_int_equal(pool_owner_pages(bench->pool, 1), 3);
    assert_int_equal(pool_owner_pages(bench->pool, 2), 2);
    pool_check(bench->pool);
    pool_object_destroy(bench->pool, a);
    pool_drop_device(bench->pool, b);
    assert_false(pool_is_resident(bench->pool, b));
    assert_int_equal(stats_of(bench).device_free, 10);
    assert_int_equal(pool_owner_pages(bench->pool, 1), 0);
    assert_int_equal(stats_of(bench).device_by_kind[PAGE_ADAPTER], 0);
    bench_close(bench);
}

static void test_pool_full_changes_nothing(void **state)
{
    (void)state;
    struct bench *bench = bench_open(4, 0);
    pool_object a = make_reserved(bench, PAGE_KV, 0, 3);
    pool_object b = make(bench, PAGE_KV, 0, 2);
    assert_int_equal(pool_reserve(bench->pool, b), STATUS_FULL);
    assert_int_equal(pool_device_pages(bench->pool, b)[0], POOL_PAGE_NONE);
    assert_int_equal(stats_of(bench).device_free, 1);
    pool_check(bench->pool);
    pool_object_destroy(bench->pool, a);
    assert_int_equal(pool_reserve(bench->pool, b), STATUS_OK);
    bench_close(bench);
}

// The n-th object or run of slots cannot be had, for every n.
static void test_pool_nth_object_and_slot_fail(void **state)
{
    (void)state;
    for (uint32_t n = 1; n <= 6; n++) {
        struct bench *bench = bench_open_sized((struct sizes){32, 4, n, 64, 8});
        struct pool_object_options options = {.kind = PAGE_KV, .slots = 2};
        pool_object object[8];
        for (uint32_t i = 0; i < n; i++)
            object[i] = make_reserved(bench, PAGE_KV, 0, 2);
        assert_int_equal(pool_object_create(bench->pool, &options, &object[n]), STATUS_FULL);
        pool_check(bench->pool);
        pool_object_destroy(bench->pool, object[0]);
        assert_int_equal(pool_object_create(bench->pool, &options, &object[0]), STATUS_OK);
        bench_close(bench);
        bench = bench_open_sized((struct sizes){32, 4, 16, 2 * n + 1, 8});
        for (uint32_t i = 0; i < n; i++)
            object[i] = make_reserved(bench, PAGE_KV, 0, 2);
        assert_int_equal(pool_object_create(bench->pool, &options, &object[n]), STATUS_FULL);
        pool_check(bench->pool);
        for (uint32_t i = 0; i < n; i++)
            pool_object_destroy(bench->pool, object[i]);
        options.slots = 2 * n + 1; // the runs have grown together again
        assert_int_equal(pool_object_create(bench->pool, &options, &object[0]), STATUS_OK);
        bench_close(bench);
    }
}

static void test_pool_slot_runs_of_all_sizes(void **state)
{
    (void)state;
    struct bench *bench = bench_open_sized((struct sizes){1, 0, 256, 1024, 8});
    struct rng rng = {.seed = 3};
    pool_object live[256];
    uint32_t count = 0, failed = 0;
    for (int step = 0; step < 5000; step++) {
        struct pool_object_options options = {.kind = PAGE_ADAPTER,
                                              .slots = 1 + (uint32_t)rng_below(&rng, 20)};
        if (rng_below(&rng, 100) < 52 && count < 256) {
            if (pool_object_create(bench->pool, &options, &live[count]) == STATUS_OK)
                count++;
            else
                failed++;
        } else if (count) {
            uint32_t i = (uint32_t)rng_below(&rng, count);
            pool_object_destroy(bench->pool, live[i]);
            live[i] = live[--count];
        }
        if (step % 50 == 0)
            pool_check(bench->pool);
    }
    assert_true(failed > 0);
    while (count)
        pool_object_destroy(bench->pool, live[--count]);
    (void)make(bench, PAGE_ADAPTER, 0, 1024);
    bench_close(bench);
}

// ---- epochs ----

static void test_pool_epoch_holds_pages(void **state)
{
    (void)state;
    struct bench *bench = bench_open(4, 0);
    pool_object a = make_reserved(bench, PAGE_KV, 0, 4);
    uint64_t one = pool_epoch_open(bench->pool), two = pool_epoch_open(bench->pool);
    pool_object_destroy(bench->pool, a);
    assert_int_equal(stats_of(bench).device_free, 0);
    assert_int_equal(stats_of(bench).device_waiting, 4);
    uint64_t three = pool_epoch_open(bench->pool); // opened later: does not hold them
    pool_object b = make(bench, PAGE_KV, 0, 1);
    assert_int_equal(pool_reserve(bench->pool, b), STATUS_FULL);
    pool_epoch_retire(bench->pool, two); // out of order: `one` is still open
    pool_check(bench->pool);
    assert_int_equal(pool_reserve(bench->pool, b), STATUS_FULL);
    pool_epoch_retire(bench->pool, one);
    pool_check(bench->pool);
    assert_int_equal(stats_of(bench).device_waiting, 0);
    assert_int_equal(pool_reserve(bench->pool, b), STATUS_OK);
    pool_epoch_retire(bench->pool, three);
    pool_drop_device(bench->pool, b);
    assert_int_equal(stats_of(bench).device_free, 4);
    for (int i = 0; i < 1000; i++) // numbers far beyond the table of open ones
        pool_epoch_retire(bench->pool, pool_epoch_open(bench->pool));
    bench_close(bench);
}

// While an epoch is open an offer is taken once, is not room, and is room afterwards.
static void test_pool_epoch_pages_are_not_room(void **state)
{
    (void)state;
    struct bench *bench = bench_open(4, 0);
    for (uint32_t i = 0; i < 4; i++)
        kind_offer(bench, PAGE_KV, make_reserved(bench, PAGE_KV, 0, 1), 1.0f + (float)i, i);
    uint64_t epoch = pool_epoch_open(bench->pool);
    pool_object b = make(bench, PAGE_ADAPTER, 0, 2);
    for (int i = 0; i < 3; i++) {
        assert_int_equal(pool_reserve(bench->pool, b), STATUS_FULL);
        assert_int_equal(stats_of(bench).give_backs, 2);
    }
    pool_epoch_retire(bench->pool, epoch);
    assert_int_equal(pool_reserve(bench->pool, b), STATUS_OK);
    assert_int_equal(stats_of(bench).give_backs, 2);
    assert_int_equal(stats_of(bench).taken_from[PAGE_ADAPTER][PAGE_KV], 2);
    bench_close(bench);
}

// ---- pins and prices ----

static void test_pool_cheapest_leaves_first(void **state)
{
    (void)state;
    struct bench *bench = bench_open(12, 0);
    // id: price, pages. KV 0: 5, 2; 1: 1, 2 (pinned); adapter 2: 3, 3; 3: 4, 1; expert 4: 2, 2; 5:
    // 6, 2.
    pool_object o[6] = {
        make_reserved(bench, PAGE_KV, 0, 2),      make_reserved(bench, PAGE_KV, 0, 2),
        make_reserved(bench, PAGE_ADAPTER, 0, 3), make_reserved(bench, PAGE_ADAPTER, 0, 1),
        make_reserved(bench, PAGE_EXPERT, 0, 2),  make_reserved(bench, PAGE_EXPERT, 0, 2)};
    static const float prices[] = {5, 1, 3, 4, 2, 6};
    static const enum page_kind kinds[] = {PAGE_KV,      PAGE_KV,     PAGE_ADAPTER,
                                           PAGE_ADAPTER, PAGE_EXPERT, PAGE_EXPERT};
    for (uint32_t i = 0; i < 6; i++)
        kind_offer(bench, kinds[i], o[i], prices[i], i);
    pool_pin(bench->pool, o[1]);
    pool_object big = make(bench, PAGE_KV, 1, 4);
    assert_int_equal(pool_reserve(bench->pool, big), STATUS_OK); // takes 4 (2 pages), 2 (3 pages)
    assert_int_equal(stats_of(bench).give_backs, 2);
    assert_int_equal(bench->kinds[PAGE_EXPERT].gone[0], 4);
    assert_int_equal(bench->kinds[PAGE_ADAPTER].gone[0], 2);
    assert_int_equal(stats_of(bench).device_free, 1);
    pool_object next = make(bench, PAGE_EXPERT, 1, 2);
    assert_int_equal(pool_reserve(bench->pool, next), STATUS_OK); // one free and adapter 3
    assert_int_equal(bench->kinds[PAGE_ADAPTER].gone[1], 3);
    assert_int_equal(stats_of(bench).give_backs, 3);
    pool_check(bench->pool);
    pool_unpin(bench->pool, o[1]);
    pool_object last = make(bench, PAGE_EXPERT, 1, 1);
    assert_int_equal(pool_reserve(bench->pool, last), STATUS_OK); // now the pinned one was cheapest
    assert_int_equal(bench->kinds[PAGE_KV].gone[0], 1);
    bench_close(bench);
}

static void test_pool_nothing_leaves_in_vain(void **state)
{
    (void)state;
    struct bench *bench = bench_open(6, 0);
    pool_object pinned = make_reserved(bench, PAGE_EXPERT, 0, 4);
    kind_offer(bench, PAGE_EXPERT, pinned, 1, 0);
    kind_offer(bench, PAGE_KV, make_reserved(bench, PAGE_KV, 0, 2), 1, 1);
    pool_pin(bench->pool, pinned);
    pool_object big = make(bench, PAGE_ADAPTER, 0, 3);
    assert_int_equal(pool_reserve(bench->pool, big), STATUS_FULL);
    assert_int_equal(stats_of(bench).give_backs, 0);
    assert_int_equal(pool_make_room(bench->pool, 7), STATUS_FULL);
    assert_int_equal(stats_of(bench).give_backs, 0);
    assert_int_equal(pool_make_room(bench->pool, 2), STATUS_OK);
    assert_int_equal(stats_of(bench).give_backs, 1);
    assert_int_equal(stats_of(bench).device_free, 2);
    pool_unpin(bench->pool, pinned);
    bench_close(bench);
}

static void test_pool_a_limit_is_kept_with_ones_own_pages(void **state)
{
    (void)state;
    struct bench *bench = bench_open(8, 0);
    pool_object o[4];
    for (uint32_t i = 0; i < 3; i++) {
        o[i] = make_reserved(bench, PAGE_ADAPTER, 0, 1);
        kind_offer(bench, PAGE_ADAPTER, o[i], 10 + (float)i, i);
    }
    kind_offer(bench, PAGE_KV, make_reserved(bench, PAGE_KV, 0, 2), 1, 9); // cheaper, but not asked
    assert_int_equal(pool_limit(bench->pool, PAGE_ADAPTER), 8);
    pool_set_limit(bench->pool, PAGE_ADAPTER, 3);
    assert_int_equal(pool_limit(bench->pool, PAGE_ADAPTER), 3);
    o[3] = make(bench, PAGE_ADAPTER, 0, 2);
    pool_pin(bench->pool, o[0]);
    pool_pin(bench->pool, o[1]);
    assert_int_equal(pool_reserve(bench->pool, o[3]),
                     STATUS_FULL); // one of two could go: none does
    assert_int_equal(stats_of(bench).give_backs, 0);
    pool_unpin(bench->pool, o[0]);
    assert_int_equal(pool_reserve(bench->pool, o[3]), STATUS_OK);
    assert_int_equal(bench->kinds[PAGE_ADAPTER].gone_count, 2);
    assert_int_equal(bench->kinds[PAGE_ADAPTER].gone[0], 0);
    assert_int_equal(bench->kinds[PAGE_ADAPTER].gone[1], 2);
    assert_int_equal(bench->kinds[PAGE_KV].gone_count, 0);
    assert_int_equal(stats_of(bench).device_by_kind[PAGE_ADAPTER], 3);
    pool_set_limit(bench->pool, PAGE_ADAPTER, POOL_PAGE_NONE);
    assert_int_equal(pool_reserve(bench->pool, make(bench, PAGE_ADAPTER, 0, 3)), STATUS_OK);
    pool_check(bench->pool);
    pool_unpin(bench->pool, o[1]);
    bench_close(bench);
}

static void test_pool_pins_balance(void **state)
{
    (void)state;
    struct bench *bench = bench_open(2, 0);
    pool_object a = make_reserved(bench, PAGE_KV, 0, 2);
    pool_pin(bench->pool, a);
    pool_pin(bench->pool, a);
    assert_int_equal(pool_pins(bench->pool, a), 2);
    pool_unpin(bench->pool, a);
    assert_int_equal(pool_pins(bench->pool, a), 1);
    pool_check(bench->pool);
    kind_offer(bench, PAGE_KV, a, 1, 0);
    assert_int_equal(pool_make_room(bench->pool, 1), STATUS_FULL);
    pool_unpin(bench->pool, a);
    assert_int_equal(pool_make_room(bench->pool, 1), STATUS_OK);
    bench_close(bench);
}

// ---- zeroing ----

static void test_pool_zeroes_between_owners(void **state)
{
    (void)state;
    struct bench *bench = bench_open(1, 0);
    pool_object a = make_reserved(bench, PAGE_KV, 1, 1);
    assert_true(is_zero(slot_memory(bench, a, 0))); // also the arena's first content
    memset(slot_memory(bench, a, 0), 0x55, PAGE);
    pool_object_destroy(bench->pool, a);
    a = make_reserved(bench, PAGE_KV, 1, 1); // the same owner: not zeroed
    assert_int_equal(slot_memory(bench, a, 0)[7], 0x55);
    pool_object_destroy(bench->pool, a);
    a = make_reserved(bench, PAGE_KV, 2, 1);
    assert_true(is_zero(slot_memory(bench, a, 0)));
    memset(slot_memory(bench, a, 0), 0x66, PAGE);
    pool_object_destroy(bench->pool, a);
    a = make_reserved(bench, PAGE_ADAPTER, 2, 1); // another kind
    assert_true(is_zero(slot_memory(bench, a, 0)));
    bench_close(bench);
}

// A fetch that stops half way leaves a mixture; it must not be taken for its owner's bytes.
static void test_pool_zeroes_after_half_a_fetch(void **state)
{
    (void)state;
    for (int fail = 0; fail < 2; fail++) {
        struct bench *bench = bench_open(1, 4);
        pool_object secret = make_reserved(bench, PAGE_KV, 1, 1);
        memset(slot_memory(bench, secret, 0), 0x77, PAGE);
        pool_object_destroy(bench->pool, secret);
        pool_object a = make_filed(bench, PAGE_KV, 2, 1, 0);
        bench->link.held[COPY_H2D] = true;
        bench->link.fail_at = fail ? 2 : 0;
        assert_int_equal(pool_fetch(bench->pool, a, COPY_BATCH, COPY_PREFETCH), STATUS_OK);
        for (int i = 0; i < 5; i++)
            pool_poll(bench->pool);
        if (!fail)
            pool_fetch_cancel(bench->pool, a);
        bench->link.held[COPY_H2D] = false;
        settle(bench);
        assert_int_equal(pool_fetch_status(bench->pool, a), fail ? STATUS_IO : STATUS_CANCELLED);
        pool_object b = make_reserved(bench, PAGE_KV, 1, 1); // whose bytes stand in the other half
        assert_true(is_zero(slot_memory(bench, b, 0)));
        bench_close(bench);
    }
}

// ---- kinds trade pages ----

static void test_pool_each_kind_takes_from_each(void **state)
{
    (void)state;
    enum { PAGES = 96 };
    struct bench *bench = bench_open(PAGES, 64);
    struct rng rng = {.seed = 11};
    uint64_t file_page = 0, epoch = pool_epoch_open(bench->pool);
    bench->kinds[PAGE_ADAPTER].destroys = bench->kinds[PAGE_EXPERT].destroys = true;
    for (uint32_t step = 0; step < 3000; step++) {
        // A wave: each kind is in demand in turn, with some of the others between.
        enum page_kind kind = (enum page_kind)(step / 200 % PAGE_KINDS);
        if (rng_below(&rng, 4) == 0)
            kind = (enum page_kind)rng_below(&rng, PAGE_KINDS);
        uint32_t slots = kind == PAGE_KV ? 1 : 1 + (uint32_t)rng_below(&rng, 4);
        uint32_t owner = (uint32_t)rng_below(&rng, OWNERS);
        pool_object object = kind == PAGE_KV
                                 ? make(bench, kind, owner, slots)
                                 : make_filed(bench, kind, owner, slots, file_page++ % 1000);
        enum status status = kind == PAGE_KV
                                 ? pool_reserve(bench->pool, object)
                                 : pool_fetch(bench->pool, object, COPY_STANDARD, COPY_ADAPTER);
        settle(bench);
        if (status == STATUS_OK)
            kind_offer(bench, kind, object, (float)step, step); // the oldest is the cheapest
        else
            pool_object_destroy(bench->pool, object);
        if (step % 3 == 0) {
            uint64_t next = pool_epoch_open(bench->pool);
            pool_epoch_retire(bench->pool, epoch);
            epoch = next;
        }
        if (step % 100 == 0)
            pool_check(bench->pool);
    }
    struct pool_stats stats = stats_of(bench);
    for (int k = 0; k < PAGE_KINDS; k++)
        for (int from = 0; from < PAGE_KINDS; from++) {
            print_message("kind %d took %llu pages from kind %d\n", k,
                          (unsigned long long)stats.taken_from[k][from], from);
            assert_true(k == from ? stats.taken_from[k][from] == 0
                                  : stats.taken_from[k][from] >= 100);
        }
    bench_close(bench);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_pool_options_are_checked),
        cmocka_unit_test(test_pool_counts_by_kind_and_owner),
        cmocka_unit_test(test_pool_full_changes_nothing),
        cmocka_unit_test(test_pool_nth_object_and_slot_fail),
        cmocka_unit_test(test_pool_slot_runs_of_all_sizes),
        cmocka_unit_test(test_pool_epoch_holds_pages),
        cmocka_unit_test(test_pool_epoch_pages_are_not_room),
        cmocka_unit_test(test_pool_cheapest_leaves_first),
        cmocka_unit_test(test_pool_nothing_leaves_in_vain),
        cmocka_unit_test(test_pool_a_limit_is_kept_with_ones_own_pages),
        cmocka_unit_test(test_pool_pins_balance),
        cmocka_unit_test(test_pool_zeroes_between_owners),
        cmocka_unit_test(test_pool_zeroes_after_half_a_fetch),
        cmocka_unit_test(test_pool_each_kind_takes_from_each),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
