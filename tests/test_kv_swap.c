// SPDX-License-Identifier: Apache-2.0
// The KV cache: swapping out and in, shared blocks, losses, failures of the n-th copy, closing in
// each state.
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <cmocka.h>
#include <string.h>

#include "test_kv_rig.h"

// ---- swapping ----

static void test_kv_swap_out_and_in(void **state)
{
    (void)state;
    struct bench *bench = bench_open(8, 16);
    bench->link.delay_max_us = 40;
    int32_t one[TOKENS], two[TOKENS];
    make_tokens(one, TOKENS, 1);
    make_tokens(two, TOKENS, 2);
    kv_sequence a = open_sequence(bench), b = open_as(bench, 2, &bench->root);
    compute(bench, a, one, 0, 60);
    assert_int_equal(kv_swap_out(bench->kv, a, COPY_BATCH), STATUS_OK);
    assert_int_equal(kv_state(bench->kv, a), KV_LEAVING);
    assert_int_equal(kv_swap_in(bench->kv, a, COPY_BATCH), STATUS_BUSY);
    assert_int_equal(wait_while(bench, a, KV_LEAVING), KV_SWAPPED);
    assert_int_equal(free_pages(bench), 8);
    compute(bench, b, two, 0, 64);
    assert_int_equal(kv_swap_in(bench->kv, a, COPY_INTERACTIVE), STATUS_FULL);
    assert_int_equal(kv_state(bench->kv, a), KV_SWAPPED);
    kv_close(bench->kv, b);
    assert_int_equal(kv_swap_in(bench->kv, a, COPY_INTERACTIVE), STATUS_OK);
    assert_int_equal(wait_while(bench, a, KV_COMING), KV_RESIDENT);
    assert_holds(bench, a, one, 60);
    struct pool_stats stats;
    pool_stats(bench->pool, &stats);
    assert_int_equal(stats.host_free, 16);
    compute(bench, a, one, 60, 64);
    assert_holds(bench, a, one, 64);
    kv_close(bench->kv, a);
    bench_close(bench);
}

static void test_kv_swap_of_shared_blocks(void **state)
{
    (void)state;
    struct bench *bench = bench_open(16, 16);
    int32_t one[TOKENS], two[TOKENS];
    make_tokens(one, TOKENS, 1);
    make_tokens(two, TOKENS, 2);
    memcpy(two, one, 16 * sizeof *two);
    kv_sequence a = open_sequence(bench), b = open_sequence(bench);
    compute(bench, a, one, 0, 30);
    assert_int_equal(match(bench, b, two, 30), 16);
    compute(bench, b, two, 16, 30);
    assert_int_equal(free_pages(bench), 10);
    assert_int_equal(kv_swap_out(bench->kv, a, COPY_BATCH), STATUS_OK);
    assert_int_equal(wait_while(bench, a, KV_LEAVING), KV_SWAPPED);
    assert_int_equal(free_pages(bench), 12); // its own two; the shared two stay
    assert_holds(bench, b, two, 30);
    assert_int_equal(kv_swap_out(bench->kv, b, COPY_BATCH), STATUS_OK);
    assert_int_equal(wait_while(bench, b, KV_LEAVING), KV_SWAPPED);
    assert_int_equal(free_pages(bench), 16); // the last user took them along
    assert_int_equal(kv_swap_in(bench->kv, a, COPY_BATCH), STATUS_OK);
    assert_int_equal(wait_while(bench, a, KV_COMING), KV_RESIDENT);
    assert_holds(bench, a, one, 30);
    kv_close(bench->kv, a); // the shared blocks are held by b alone, which is swapped
    bench_check(bench);
    assert_int_equal(free_pages(bench), 13); // two held, one of a's cached
    // b takes the held blocks out as well, if asked.
    assert_int_equal(kv_swap_out(bench->kv, b, COPY_BATCH), STATUS_OK);
    assert_int_equal(wait_while(bench, b, KV_LEAVING), KV_SWAPPED);
    assert_int_equal(kv_swap_in(bench->kv, b, COPY_BATCH), STATUS_OK);
    assert_int_equal(wait_while(bench, b, KV_COMING), KV_RESIDENT);
    assert_holds(bench, b, two, 30);
    bench_close(bench);
}

// Blocks that only a swapped sequence holds may be given back; it finds them lost and starts again.
static void test_kv_held_blocks_can_be_lost(void **state)
{
    (void)state;
    struct bench *bench = bench_open(8, 16);
    int32_t tokens[TOKENS];
    make_tokens(tokens, TOKENS, 1);
    kv_sequence a = open_sequence(bench), b = open_sequence(bench);
    compute(bench, a, tokens, 0, 24);
    assert_int_equal(match(bench, b, tokens, 25), 24);
    assert_int_equal(kv_swap_out(bench->kv, b, COPY_BATCH), STATUS_OK);
    assert_int_equal(wait_while(bench, b, KV_LEAVING), KV_SWAPPED);
    kv_close(bench->kv, a);
    assert_int_equal(pool_make_room(bench->pool, 8), STATUS_OK);
    bench_check(bench);
    assert_int_equal(kv_swap_in(bench->kv, b, COPY_BATCH), STATUS_OK);
    assert_int_equal(kv_state(bench->kv, b), KV_LOST);
    bench_check(bench);
    kv_drop(bench->kv, b);
    assert_int_equal(kv_state(bench->kv, b), KV_RESIDENT);
    assert_int_equal(match(bench, b, tokens, 25), 0);
    compute(bench, b, tokens, 0, 25);
    assert_holds(bench, b, tokens, 25);
    bench_close(bench);
}

static void test_kv_match_while_leaving(void **state)
{
    (void)state;
    struct bench *bench = bench_open(8, 16);
    bench->link.delay_min_us = bench->link.delay_max_us = 50;
    int32_t tokens[TOKENS];
    make_tokens(tokens, TOKENS, 1);
    kv_sequence a = open_sequence(bench), b = open_sequence(bench), c = open_sequence(bench);
    compute(bench, a, tokens, 0, 24);
    assert_int_equal(kv_swap_out(bench->kv, a, COPY_BATCH), STATUS_OK);
    assert_int_equal(match(bench, b, tokens, 25), 24); // still here, so it stays
    bench_check(bench);
    assert_int_equal(wait_while(bench, a, KV_LEAVING), KV_SWAPPED);
    for (int i = 0; i < 100; i++) {
        bench->now += 50;
        pool_poll(bench->pool);
        (void)kv_state(bench->kv, a);
    }
    assert_holds(bench, b, tokens, 24);
    assert_int_equal(kv_swap_in(bench->kv, a, COPY_BATCH), STATUS_OK);
    assert_int_equal(wait_while(bench, a, KV_COMING), KV_RESIDENT);
    assert_holds(bench, a, tokens, 24);
    kv_close(bench->kv, b);
    assert_int_equal(kv_swap_out(bench->kv, a, COPY_BATCH), STATUS_OK);
    assert_int_equal(wait_while(bench, a, KV_LEAVING), KV_SWAPPED);
    assert_int_equal(match(bench, c, tokens, 25), 0); // not on the device: not shared
    bench_close(bench);
}

// A sequence closes while its block is being written back; the one that took the block over writes
// in it.
static void test_kv_write_while_leaving(void **state)
{
    (void)state;
    struct bench *bench = bench_open(8, 16);
    bench->link.delay_min_us = bench->link.delay_max_us = 50;
    int32_t one[TOKENS], two[TOKENS];
    make_tokens(one, TOKENS, 1);
    make_tokens(two, TOKENS, 2);
    memcpy(two, one, 4 * sizeof *two);
    kv_sequence a = open_sequence(bench), b = open_sequence(bench);
    compute(bench, a, one, 0, 8);
    assert_int_equal(kv_swap_out(bench->kv, a, COPY_BATCH), STATUS_OK);
    pool_poll(bench->pool); // half of it is on the host
    assert_int_equal(match(bench, b, one, 9), 8);
    kv_close(bench->kv, a);
    kv_commit(bench->kv, b, one, 4); // four tokens are taken back, four others follow
    compute(bench, b, two, 4, 8);
    assert_int_equal(kv_swap_out(bench->kv, b, COPY_BATCH), STATUS_OK);
    assert_int_equal(wait_while(bench, b, KV_LEAVING), KV_SWAPPED);
    assert_int_equal(kv_swap_in(bench->kv, b, COPY_BATCH), STATUS_OK);
    assert_int_equal(wait_while(bench, b, KV_COMING), KV_RESIDENT);
    assert_holds(bench, b, two, 8);
    bench_close(bench);
}

// The last one that waits for a fetch closes; the others are swapped: the pages are free again.
static void test_kv_close_while_coming(void **state)
{
    (void)state;
    for (int k = 0; k < 12; k++) {
        struct bench *bench = bench_open(8, 16);
        bench->link.delay_min_us = bench->link.delay_max_us = 20;
        int32_t tokens[TOKENS];
        make_tokens(tokens, TOKENS, 1);
        kv_sequence a = open_sequence(bench), b = open_sequence(bench);
        compute(bench, a, tokens, 0, 24);
        assert_int_equal(match(bench, b, tokens, 25), 24);
        assert_int_equal(kv_swap_out(bench->kv, a, COPY_BATCH), STATUS_OK);
        assert_int_equal(kv_swap_out(bench->kv, b, COPY_BATCH), STATUS_OK);
        assert_int_equal(wait_while(bench, b, KV_LEAVING), KV_SWAPPED);
        assert_int_equal(kv_state(bench->kv, a), KV_SWAPPED);
        assert_int_equal(kv_swap_in(bench->kv, a, COPY_BATCH), STATUS_OK);
        for (int i = 0; i < k; i++) {
            bench->now += 10;
            pool_poll(bench->pool);
        }
        kv_close(bench->kv, a);
        drain(bench);
        bench_check(bench);
        assert_int_equal(free_pages(bench), 8);
        assert_int_equal(kv_swap_in(bench->kv, b, COPY_BATCH), STATUS_OK);
        assert_int_equal(wait_while(bench, b, KV_COMING), KV_RESIDENT);
        assert_holds(bench, b, tokens, 24);
        bench_close(bench);
    }
}

static void test_kv_swap_out_without_host_pages(void **state)
{
    (void)state;
    struct bench *bench = bench_open(16, 4);
    int32_t one[TOKENS];
    make_tokens(one, TOKENS, 1);
    kv_sequence a = open_sequence(bench);
    compute(bench, a, one, 0, 40); // five blocks
    assert_int_equal(kv_swap_out(bench->kv, a, COPY_BATCH), STATUS_FULL);
    bench_check(bench);
    assert_int_equal(kv_state(bench->kv, a), KV_RESIDENT);
    for (int i = 0; i < 10; i++)
        pool_poll(bench->pool);
    struct pool_stats stats;
    pool_stats(bench->pool, &stats);
    assert_int_equal(stats.host_free, 4);
    assert_holds(bench, a, one, 40);
    bench_close(bench);
}

// The n-th copy fails, for every n: the sequence is lost, nothing else is, and it can start again.
static void test_kv_nth_copy_fails(void **state)
{
    (void)state;
    for (uint64_t n = 1; n <= 9; n++) {
        struct bench *bench = bench_open(8, 16);
        bench->link.delay_max_us = 20;
        bench->link.fail_at = n; // 1..4 out, 5..8 in, 9 none
        int32_t one[TOKENS];
        make_tokens(one, TOKENS, 1);
        kv_sequence a = open_sequence(bench);
        compute(bench, a, one, 0, 30);
        assert_int_equal(kv_swap_out(bench->kv, a, COPY_BATCH), STATUS_OK);
        enum kv_state end = wait_while(bench, a, KV_LEAVING);
        assert_int_equal(end, n <= 4 ? KV_LOST : KV_SWAPPED);
        if (end == KV_SWAPPED) {
            assert_int_equal(kv_swap_in(bench->kv, a, COPY_BATCH), STATUS_OK);
            end = wait_while(bench, a, KV_COMING);
            assert_int_equal(end, n <= 8 ? KV_LOST : KV_RESIDENT);
        }
        if (end == KV_LOST) {
            kv_drop(bench->kv, a);
            bench_check(bench);
            uint32_t found =
                match(bench, a, one, 30); // blocks that did not fail may still be there
            drain(bench);
            compute(bench, a, one, found, 30);
        }
        assert_holds(bench, a, one, 30);
        kv_close(bench->kv, a);
        drain(bench);
        assert_int_equal(pool_make_room(bench->pool, 8), STATUS_OK);
        struct pool_stats stats;
        pool_stats(bench->pool, &stats);
        assert_int_equal(stats.host_free, 16);
        bench_close(bench);
    }
}

// Closing or dropping in the middle of a swap.
static void test_kv_close_in_each_state(void **state)
{
    (void)state;
    for (int k = 0; k < 40; k++) {
        struct bench *bench = bench_open(8, 16);
        bench->link.delay_min_us = bench->link.delay_max_us = 30;
        int32_t one[TOKENS];
        make_tokens(one, TOKENS, 1);
        kv_sequence a = open_sequence(bench);
        compute(bench, a, one, 0, 30);
        assert_int_equal(kv_swap_out(bench->kv, a, COPY_BATCH), STATUS_OK);
        bool asked = false;
        for (int i = 0; i < k; i++) {
            bench->now += 10;
            pool_poll(bench->pool);
            if (kv_state(bench->kv, a) == KV_SWAPPED && !asked) {
                assert_int_equal(kv_swap_in(bench->kv, a, COPY_BATCH), STATUS_OK);
                asked = true;
            }
        }
        kv_close(bench->kv, a);
        bench_check(bench);
        kv_sequence b = open_as(bench, 2, &bench->root);
        if (try_reserve(bench, b, 48) == STATUS_OK) { // pages that copies touch are not among them
            static uint32_t pages[BLOCKS * 8];
            pages_of(bench, b, pages);
            for (uint32_t p = 0; p < 48; p++)
                fake_kv_write(bench->device, PAGE, &bench->shape, pages, p, p);
            drain(bench);
            for (uint32_t p = 0; p < 48; p++)
                assert_true(fake_kv_is(bench->device, PAGE, &bench->shape, pages, p, p));
        }
        drain(bench);
        kv_close(bench->kv, b);
        assert_int_equal(pool_make_room(bench->pool, 8), STATUS_OK);
        bench_close(bench);
    }
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_kv_swap_out_and_in),
        cmocka_unit_test(test_kv_swap_of_shared_blocks),
        cmocka_unit_test(test_kv_held_blocks_can_be_lost),
        cmocka_unit_test(test_kv_match_while_leaving),
        cmocka_unit_test(test_kv_write_while_leaving),
        cmocka_unit_test(test_kv_close_while_coming),
        cmocka_unit_test(test_kv_swap_out_without_host_pages),
        cmocka_unit_test(test_kv_nth_copy_fails),
        cmocka_unit_test(test_kv_close_in_each_state),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
