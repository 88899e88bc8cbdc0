// SPDX-License-Identifier: Apache-2.0
// The KV cache: shapes, prices, room, prefix sharing, copy-on-write, offers with exact order,
// tenant separation, and the waste of 64 sequences.
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <cmocka.h>
#include <string.h>

#include "base/rng.h"
#include "test_kv_rig.h"

// ---- shapes ----

static void test_kv_shape_choose(void **state)
{
    (void)state;
    struct kv_shape shape;
    struct fault fault;
    assert_int_equal(kv_shape_choose(8, 2, 64, DTYPE_BF16, PAGE, &shape, &fault), STATUS_OK);
    assert_int_equal(shape.block_tokens, 8); // the demo model
    assert_int_equal(shape.pages_per_block, 1);
    assert_int_equal(shape.layers_per_page, 8);
    assert_int_equal(shape.part_bytes, 4096);
    // 3 layers, 1 head of 40, float32: 32 tokens fill 30,720 of 32,768 bytes.
    assert_int_equal(kv_shape_choose(3, 1, 40, DTYPE_F32, PAGE, &shape, &fault), STATUS_OK);
    assert_int_equal(shape.block_tokens, 32);
    assert_int_equal(shape.pages_per_block, 1);
    assert_int_equal(shape.part_bytes, 2 * 32 * 40 * 4);
    // Qwen3-30B: 48 layers, 4 heads of 128: 32 tokens of a layer are 64 KiB.
    assert_int_equal(kv_shape_choose(48, 4, 128, DTYPE_BF16, 512 << 10, &shape, &fault), STATUS_OK);
    assert_int_equal(shape.pages_per_block * shape.layers_per_page, 48);
    // 8 tokens of a layer exactly a page; then one dimension too many.
    assert_int_equal(kv_shape_choose(5, 8, 128, DTYPE_BF16, PAGE, &shape, &fault), STATUS_OK);
    assert_int_equal(shape.block_tokens, 8);
    assert_int_equal(shape.layers_per_page, 1);
    assert_int_equal(shape.pages_per_block, 5);
    assert_int_equal(kv_shape_choose(5, 8, 129, DTYPE_BF16, PAGE, &shape, &fault), STATUS_INVALID);
    assert_non_null(strstr(fault.text, "larger pages"));
    assert_int_equal(kv_shape_choose(0, 8, 64, DTYPE_BF16, PAGE, &shape, &fault), STATUS_INVALID);
    // No part straddles a page and all layers have a place, whatever the shape.
    struct rng rng = {.seed = 1};
    for (int i = 0; i < 2000; i++) {
        uint32_t layers = 1 + (uint32_t)rng_below(&rng, 100);
        uint32_t heads = 1 + (uint32_t)rng_below(&rng, 16),
                 dim = 2 + (uint32_t)rng_below(&rng, 256);
        enum dtype dtype = rng_below(&rng, 2) ? DTYPE_F32 : DTYPE_BF16;
        size_t page = (size_t)PAGE << rng_below(&rng, 7);
        if (kv_shape_choose(layers, heads, dim, dtype, page, &shape, NULL))
            continue;
        assert_true(shape.layers_per_page * shape.part_bytes <= page);
        assert_true(shape.pages_per_block * shape.layers_per_page >= layers);
        assert_true((shape.pages_per_block - 1) * shape.layers_per_page < layers);
        assert_int_equal(shape.part_bytes,
                         2 * heads * shape.block_tokens * dim * dtype_bytes(dtype));
    }
}

static void test_kv_price_is_monotone(void **state)
{
    (void)state;
    const float half = 0.5f * 800 / 32768 * POOL_HORIZON_US / 30000000;
    assert_float_equal(kv_price(0, 0, 800, 32768), half, 1e-9);
    assert_float_equal(kv_price(1, 30000000, 800, 32768), half, 1e-9);
    for (uint32_t hits = 0; hits < 100; hits++)
        for (uint64_t age = 0; age < 100000000; age += 9999999) {
            assert_true(kv_price(hits, age + 1000000, 800, 32768) <
                        kv_price(hits, age, 800, 32768));
            assert_true(kv_price(hits + 1, age, 800, 32768) > kv_price(hits, age, 800, 32768));
        }
}

// ---- the promise: 64 sequences of 64 to 448 tokens ----

static void test_kv_waste_of_64_sequences(void **state)
{
    (void)state;
    struct bench *bench = bench_open_sized((struct sizes){8, 64 * 56, 4, 64 * 56});
    struct rng rng = {.seed = 2026};
    int32_t tokens[TOKENS];
    uint64_t total = 0;
    for (uint32_t s = 0; s < 64; s++) {
        uint32_t count = 64 + (uint32_t)rng_below(&rng, 448 - 64 + 1);
        kv_sequence sequence = open_sequence(bench);
        make_tokens(tokens, count, s + 1);
        assert_int_equal(try_reserve(bench, sequence, count), STATUS_OK);
        kv_commit(bench->kv, sequence, tokens, count);
        total += count;
    }
    struct kv_stats stats = stats_of(bench);
    assert_int_equal(stats.used_bytes, total * 4096);
    double waste = 1.0 - (double)stats.used_bytes / (double)stats.reserved_bytes;
    print_message("64 sequences, %llu tokens: %llu bytes reserved, %llu used, waste %.2f %%\n",
                  (unsigned long long)total, (unsigned long long)stats.reserved_bytes,
                  (unsigned long long)stats.used_bytes, 100 * waste);
    assert_true(waste < 0.04);
    bench_close(bench);
}

// ---- room ----

static void test_kv_room_and_limits(void **state)
{
    (void)state;
    struct bench *bench = bench_open(4, 4);
    int32_t tokens[TOKENS];
    make_tokens(tokens, TOKENS, 1);
    kv_sequence a = open_sequence(bench);
    compute(bench, a, tokens, 0, 20);
    assert_int_equal(free_pages(bench), 1);
    assert_int_equal(try_reserve(bench, a, 33), STATUS_FULL);
    assert_int_equal(free_pages(bench), 1);
    assert_holds(bench, a, tokens, 20);
    compute(bench, a, tokens, 20, 32);
    assert_holds(bench, a, tokens, 32);
    assert_int_equal(try_reserve(bench, a, BLOCKS * 8 + 1), STATUS_LIMIT);
    kv_drop(bench->kv, a); // four full blocks stay in the index
    assert_int_equal(stats_of(bench).cached_blocks, 4);
    kv_sequence b = open_as(bench, 2, &bench->root);
    make_tokens(tokens, TOKENS, 2);
    compute(bench, b, tokens, 0, 32); // takes them all
    assert_int_equal(stats_of(bench).cached_blocks, 0);
    assert_holds(bench, b, tokens, 32);
    kv_close(bench->kv, b);
    kv_close(bench->kv, a);
    bench_close(bench);
}

static void test_kv_blocks_of_several_pages(void **state)
{
    (void)state;
    struct bench *bench = bench_open_sized((struct sizes){32, 32, 16, 64});
    assert_int_equal(bench->shape.pages_per_block, 4);
    int32_t tokens[TOKENS];
    make_tokens(tokens, TOKENS, 1);
    kv_sequence a = open_sequence(bench), b = open_sequence(bench);
    compute(bench, a, tokens, 0, 16);
    assert_int_equal(match(bench, b, tokens, 16), 15);
    compute(bench, b, tokens, 15, 16);
    assert_int_equal(bench->copied_pages, 4);
    assert_holds(bench, a, tokens, 16);
    assert_holds(bench, b, tokens, 16);
    assert_int_equal(kv_swap_out(bench->kv, a, COPY_BATCH), STATUS_OK);
    assert_int_equal(wait_while(bench, a, KV_LEAVING), KV_SWAPPED);
    assert_int_equal(kv_swap_in(bench->kv, a, COPY_BATCH), STATUS_OK);
    assert_int_equal(wait_while(bench, a, KV_COMING), KV_RESIDENT);
    assert_holds(bench, a, tokens, 16);
    bench_close(bench);
}

// Cached blocks take up objects; when those run out the cheapest makes way.
static void test_kv_objects_run_out(void **state)
{
    (void)state;
    struct bench *bench = bench_open_sized((struct sizes){8, 64, 4, 6});
    int32_t tokens[TOKENS];
    for (uint32_t round = 0; round < 5; round++) {
        kv_sequence a = open_sequence(bench);
        make_tokens(tokens, 40, round + 1);
        compute(bench, a, tokens, 0, 40);
        assert_int_equal(try_reserve(bench, a, 56), STATUS_FULL);
        bench_check(bench);
        kv_close(bench->kv, a);
    }
    bench_close(bench);
}

static void test_kv_pins_follow_growth(void **state)
{
    (void)state;
    struct bench *bench = bench_open(8, 4);
    int32_t tokens[TOKENS];
    make_tokens(tokens, TOKENS, 1);
    kv_sequence a = open_sequence(bench), b = open_sequence(bench);
    compute(bench, a, tokens, 0, 16);
    assert_int_equal(match(bench, b, tokens, 16), 15);
    kv_pin(bench->kv, b);
    kv_pin(bench->kv, b);
    assert_int_equal(try_reserve(bench, b, 24), STATUS_OK); // copies one block, adds one
    bench_check(bench);
    assert_int_equal(pool_make_room(bench->pool, 8), STATUS_FULL);
    kv_unpin(bench->kv, b);
    bench_check(bench);
    kv_unpin(bench->kv, b);
    kv_close(bench->kv, b);
    kv_close(bench->kv, a);
    assert_int_equal(pool_make_room(bench->pool, 8), STATUS_OK); // no pin was left behind
    bench_close(bench);
}

// ---- prefixes ----

static void test_kv_prefix_match(void **state)
{
    (void)state;
    struct bench *bench = bench_open(64, 4);
    int32_t one[TOKENS], two[TOKENS];
    make_tokens(one, TOKENS, 1);
    kv_sequence a = open_sequence(bench);
    compute(bench, a, one, 0, 20);
    kv_sequence b = open_sequence(bench);
    assert_int_equal(match(bench, b, one, 40), 16); // two full blocks; 4 tokens were not full
    assert_int_equal(stats_of(bench).shared_blocks, 2);
    compute(bench, b, one, 16, 40);
    assert_holds(bench, b, one, 40);
    memcpy(two, one, sizeof two);
    two[10]++;
    kv_sequence c = open_sequence(bench);
    assert_int_equal(match(bench, c, two, 40), 8);
    compute(bench, c, two, 8, 40);
    assert_holds(bench, a, one, 20);
    assert_holds(bench, b, one, 40);
    assert_holds(bench, c, two, 40);
    assert_int_equal(stats_of(bench).prefix_hits, 24);
    assert_int_equal(stats_of(bench).prefix_queries, 80);
    kv_sequence d = open_sequence(bench);
    assert_int_equal(match(bench, d, one, 7), 0); // no full block
    kv_close(bench->kv, d);
    d = open_sequence(bench);
    assert_int_equal(match(bench, d, one, 1), 0);
    bench_check(bench);
    bench_close(bench);
}

// The same tokens under another root (tenant, adapter, base) are another text.
static void test_kv_roots_do_not_mix(void **state)
{
    (void)state;
    struct bench *bench = bench_open(64, 4);
    int32_t tokens[TOKENS];
    make_tokens(tokens, TOKENS, 1);
    struct digest other = bench->root;
    other.bytes[31] ^= 1;
    kv_sequence a = open_sequence(bench), b = open_as(bench, 2, &other);
    compute(bench, a, tokens, 0, 64);
    assert_int_equal(match(bench, b, tokens, 64), 0);
    compute(bench, b, tokens, 0, 64);
    assert_int_equal(stats_of(bench).shared_blocks, 0);
    kv_close(bench->kv, a);
    kv_close(bench->kv, b);
    kv_sequence c = open_as(bench, 2, &other);
    assert_int_equal(match(bench, c, tokens, 65), 64);
    assert_int_equal(pool_owner_pages(bench->pool, 2), 8);
    bench_close(bench);
}

static void test_kv_copy_on_write(void **state)
{
    (void)state;
    struct bench *bench = bench_open(8, 4);
    int32_t one[TOKENS], two[TOKENS];
    make_tokens(one, TOKENS, 1);
    memcpy(two, one, sizeof two);
    two[16]++;
    kv_sequence a = open_sequence(bench), b = open_sequence(bench);
    compute(bench, a, one, 0, 16);
    assert_int_equal(match(bench, b, two, 16), 15); // the last token is computed again
    assert_int_equal(stats_of(bench).shared_blocks, 2);
    compute(bench, b, two, 15, 20);
    assert_int_equal(stats_of(bench).copies_on_write, 1);
    assert_int_equal(bench->copied_pages, 1);
    assert_int_equal(stats_of(bench).shared_blocks, 1);
    compute(bench, a, one, 16, 20);
    assert_int_equal(bench->copied_pages, 1); // a's block was full: no copy
    assert_holds(bench, a, one, 20);
    assert_holds(bench, b, two, 20);
    bench_check(bench);
    // The writer is the only user: the block leaves the index for a while instead of being copied.
    kv_close(bench->kv, a);
    kv_close(bench->kv, b);
    kv_sequence c = open_sequence(bench);
    assert_int_equal(match(bench, c, one, 16), 15);
    compute(bench, c, one, 15, 16);
    assert_int_equal(bench->copied_pages, 1);
    kv_sequence d = open_sequence(bench);
    assert_int_equal(match(bench, d, one, 17), 16);
    assert_holds(bench, d, one, 16);
    bench_close(bench);
}

// FULL in the middle of a copy-on-write changes nothing.
static void test_kv_copy_on_write_without_room(void **state)
{
    (void)state;
    struct bench *bench = bench_open(2, 4);
    int32_t tokens[TOKENS];
    make_tokens(tokens, TOKENS, 1);
    kv_sequence a = open_sequence(bench), b = open_sequence(bench);
    compute(bench, a, tokens, 0, 16);
    assert_int_equal(match(bench, b, tokens, 16), 15);
    assert_int_equal(try_reserve(bench, b, 16), STATUS_FULL);
    bench_check(bench);
    assert_holds(bench, a, tokens, 16);
    kv_close(bench->kv, a);
    assert_int_equal(try_reserve(bench, b, 16), STATUS_OK); // alone now
    bench_close(bench);
}

static void test_kv_commit_takes_back(void **state)
{
    (void)state;
    struct bench *bench = bench_open(8, 4);
    int32_t one[TOKENS], two[TOKENS];
    make_tokens(one, TOKENS, 1);
    make_tokens(two, TOKENS, 2);
    memcpy(two, one, 12 * sizeof *two); // the same up to 12
    kv_sequence a = open_sequence(bench);
    compute(bench, a, one, 0, 16);
    kv_commit(bench->kv, a, one, 12); // four surplus tokens are dropped
    bench_check(bench);
    compute(bench, a, two, 12, 24);
    assert_holds(bench, a, two, 24);
    kv_sequence b = open_sequence(bench), c = open_sequence(bench);
    assert_int_equal(match(bench, b, one, 17), 8); // the dropped tokens are not found
    assert_int_equal(match(bench, c, two, 25), 24);
    assert_holds(bench, c, two, 24);
    assert_int_equal(stats_of(bench).used_bytes, 24 * 4096);
    bench_close(bench);
}

// The end of a prefix leaves before its beginning, an old text before a new one, a popular one
// last.
static void test_kv_offers_in_order(void **state)
{
    (void)state;
    struct bench *bench = bench_open(6, 4);
    int32_t tokens[3][TOKENS];
    for (uint32_t t = 0; t < 3; t++) {
        make_tokens(tokens[t], TOKENS, t + 1);
        kv_sequence a = open_sequence(bench);
        compute(bench, a, tokens[t], 0, 16);
        kv_close(bench->kv, a);
        bench->now += 1000000;
    }
    kv_sequence a = open_sequence(bench);
    assert_int_equal(match(bench, a, tokens[0], 17), 16); // text 0 becomes popular
    kv_close(bench->kv, a);
    assert_int_equal(stats_of(bench).cached_blocks, 6);
    static const uint32_t left[6][3] = {{16, 8, 16}, {16, 0, 16}, {16, 0, 8},
                                        {16, 0, 0},  {8, 0, 0},   {0, 0, 0}};
    for (uint32_t n = 0; n < 6; n++) {
        assert_int_equal(pool_make_room(bench->pool, n + 1), STATUS_OK);
        bench_check(bench);
        // Count what is there by its pages, without touching the order.
        uint32_t blocks = 0;
        for (uint32_t t = 0; t < 3; t++)
            blocks += left[n][t] / 8;
        assert_int_equal(stats_of(bench).cached_blocks, blocks);
    }
    bench_close(bench);
    // The same once more for every n, looking the texts up at the end.
    for (uint32_t n = 0; n < 6; n++) {
        bench = bench_open(6, 4);
        for (uint32_t t = 0; t < 3; t++) {
            a = open_sequence(bench);
            compute(bench, a, tokens[t], 0, 16);
            kv_close(bench->kv, a);
            bench->now += 1000000;
        }
        a = open_sequence(bench);
        assert_int_equal(match(bench, a, tokens[0], 17), 16);
        kv_close(bench->kv, a);
        assert_int_equal(pool_make_room(bench->pool, n + 1), STATUS_OK);
        for (uint32_t t = 0; t < 3; t++) {
            a = open_sequence(bench);
            assert_int_equal(match(bench, a, tokens[t], 17), left[n][t]);
        }
        bench_close(bench);
    }
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_kv_shape_choose),
        cmocka_unit_test(test_kv_price_is_monotone),
        cmocka_unit_test(test_kv_waste_of_64_sequences),
        cmocka_unit_test(test_kv_room_and_limits),
        cmocka_unit_test(test_kv_blocks_of_several_pages),
        cmocka_unit_test(test_kv_objects_run_out),
        cmocka_unit_test(test_kv_pins_follow_growth),
        cmocka_unit_test(test_kv_prefix_match),
        cmocka_unit_test(test_kv_roots_do_not_mix),
        cmocka_unit_test(test_kv_copy_on_write),
        cmocka_unit_test(test_kv_copy_on_write_without_room),
        cmocka_unit_test(test_kv_commit_takes_back),
        cmocka_unit_test(test_kv_offers_in_order),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
