// SPDX-License-Identifier: Apache-2.0
// The KV cache over the real pool: shapes, room, prefix sharing, copy-on-write, offers with exact
// order, swapping, losses, tenant separation, and the waste of 64 sequences. KV is faked: each
// position holds a value made of all tokens up to it, so that a wrong page, block or order shows.
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <cmocka.h>
#include <stdlib.h>
#include <string.h>

#include "base/arith.h"
#include "base/check.h"
#include "base/rng.h"
#include "fakes.h"
#include "runtime/kv/kv.h"
#include "unified_pool/pool.h"

enum { PAGE = 32 << 10, BLOCKS = 64, TOKENS = 512 };

struct bench {
    uint64_t now;
    struct fake_link link;
    struct copy_queues *copies;
    uint8_t *device, *host;
    struct pool *pool;
    struct kv *kv;
    struct kv_shape shape;
    struct digest root;
    uint32_t copied_pages;
};

struct sizes {
    uint32_t layers, device, host, objects;
};

static void copy_bytes(void *context, void *to, const void *from, size_t bytes)
{
    struct bench *bench = context;
    bench->copied_pages++;
    memcpy(to, from, bytes);
}

static struct bench *bench_open_sized(struct sizes sizes)
{
    struct bench *bench = calloc(1, sizeof *bench);
    CHECK(bench);
    bench->now = 1000;
    fake_link_init(&bench->link, 1, &bench->now);
    struct copy_options copy_options = {.link = &bench->link.link,
                                        .clock = clock_fake(&bench->now),
                                        .copies_max = 256,
                                        .owners_max = 4};
    assert_int_equal(copy_create(&copy_options, &bench->copies), STATUS_OK);
    bench->device = malloc((size_t)sizes.device * PAGE);
    bench->host = malloc((size_t)sizes.host * PAGE + 1);
    CHECK(bench->device && bench->host);
    struct pool_options options = {.page_bytes = PAGE,
                                   .device_pages = sizes.device,
                                   .host_pages = sizes.host,
                                   .objects_max = sizes.objects,
                                   .slots_max = 4096,
                                   .owners_max = 4,
                                   .device_arena = bench->device,
                                   .host_arena = bench->host,
                                   .copies = bench->copies};
    assert_int_equal(pool_create(&options, &bench->pool, NULL), STATUS_OK);
    assert_int_equal(kv_shape_choose(sizes.layers, 2, 64, DTYPE_BF16, PAGE, &bench->shape, NULL),
                     STATUS_OK);
    struct kv_options kv_options = {.pool = bench->pool,
                                    .clock = clock_fake(&bench->now),
                                    .shape = bench->shape,
                                    .page_bytes = PAGE,
                                    .sequences_max = 80,
                                    .blocks_max = BLOCKS,
                                    .recompute_us_per_token = 100,
                                    .prefix_sharing = true};
    kv_options.secret = hash_bytes(NULL, "secret", 6);
    bench->root = hash_bytes(NULL, "root", 4);
    assert_int_equal(kv_create(&kv_options, &bench->kv), STATUS_OK);
    return bench;
}

// 8 layers of 2 heads of 64 in bf16: 8 tokens are exactly one page. 32 layers: 4 pages a block.
static struct bench *bench_open(uint32_t device, uint32_t host)
{
    return bench_open_sized((struct sizes){8, device, host, 1024});
}

static void bench_check(struct bench *bench)
{
    pool_check(bench->pool);
    kv_check(bench->kv);
}

static void bench_close(struct bench *bench)
{
    bench_check(bench);
    struct pool_stats stats;
    kv_destroy(bench->kv);
    copy_destroy(bench->copies);
    pool_stats(bench->pool, &stats);
    assert_int_equal(stats.device_by_kind[PAGE_KV], 0);
    pool_destroy(bench->pool);
    free(bench->device);
    free(bench->host);
    free(bench);
}

static void make_tokens(int32_t *tokens, uint32_t count, uint32_t text)
{
    for (uint32_t i = 0; i < count; i++)
        tokens[i] = (int32_t)(rng_at(5, text, i) % 8192);
}

static uint64_t value_at(const int32_t *tokens, uint32_t position)
{
    uint64_t value = 1;
    for (uint32_t i = 0; i <= position; i++)
        value = rng_mix(value ^ (uint32_t)tokens[i]);
    return value;
}

static kv_sequence open_as(struct bench *bench, uint32_t owner, const struct digest *root)
{
    kv_sequence sequence = {0};
    assert_int_equal(kv_open(bench->kv, owner, root, &sequence), STATUS_OK);
    return sequence;
}

static kv_sequence open_sequence(struct bench *bench)
{
    return open_as(bench, 1, &bench->root);
}

static void pages_of(struct bench *bench, kv_sequence sequence, uint32_t *pages)
{
    kv_fill_pages(bench->kv, sequence, pages, BLOCKS);
}

static enum status try_reserve(struct bench *bench, kv_sequence sequence, uint32_t tokens)
{
    struct kv_copier copier = {copy_bytes, bench};
    return kv_reserve(bench->kv, sequence, tokens, &copier);
}

// Computes positions [from, count) as a model would.
static void compute(struct bench *bench, kv_sequence sequence, const int32_t *tokens, uint32_t from,
                    uint32_t count)
{
    static uint32_t pages[BLOCKS * 8];
    assert_int_equal(try_reserve(bench, sequence, count), STATUS_OK);
    pages_of(bench, sequence, pages);
    kv_pin(bench->kv, sequence);
    for (uint32_t p = from; p < count; p++)
        fake_kv_write(bench->device, PAGE, &bench->shape, pages, p, value_at(tokens, p));
    kv_unpin(bench->kv, sequence);
    kv_commit(bench->kv, sequence, tokens, count);
}

static void assert_holds(struct bench *bench, kv_sequence sequence, const int32_t *tokens,
                         uint32_t count)
{
    static uint32_t pages[BLOCKS * 8];
    pages_of(bench, sequence, pages);
    for (uint32_t p = 0; p < count; p++)
        assert_true(fake_kv_is(bench->device, PAGE, &bench->shape, pages, p, value_at(tokens, p)));
}

static enum kv_state wait_while(struct bench *bench, kv_sequence sequence, enum kv_state state)
{
    for (int i = 0; i < 100000; i++) {
        pool_poll(bench->pool);
        enum kv_state now = kv_state(bench->kv, sequence);
        bench_check(bench);
        if (now != state)
            return now;
        bench->now += 10;
    }
    fail_msg("the state never changes");
    return state;
}

// Until no copy is under way, nobody waiting for them any more.
static void drain(struct bench *bench)
{
    for (int i = 0; i < 1000 && !copy_is_idle(bench->copies); i++) {
        bench->now += 10;
        pool_poll(bench->pool);
    }
    assert_true(copy_is_idle(bench->copies));
}

static struct kv_stats stats_of(struct bench *bench)
{
    struct kv_stats stats;
    kv_stats(bench->kv, &stats);
    return stats;
}

static uint32_t free_pages(struct bench *bench)
{
    struct pool_stats stats;
    pool_stats(bench->pool, &stats);
    return stats.device_free;
}

static uint32_t match(struct bench *bench, kv_sequence sequence, const int32_t *tokens,
                      uint32_t count)
{
    return kv_match_prefix(bench->kv, sequence, tokens, count);
}

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
    assert_float_equal(kv_price(0, 0, 800, 32768), 0.5f * 800 / 32768, 1e-9);
    assert_float_equal(kv_price(1, 30000000, 800, 32768), 0.5f * 800 / 32768, 1e-9);
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
        cmocka_unit_test(test_kv_swap_out_and_in),
        cmocka_unit_test(test_kv_swap_of_shared_blocks),
        cmocka_unit_test(test_kv_held_blocks_can_be_lost),
        cmocka_unit_test(test_kv_match_while_leaving),
        cmocka_unit_test(test_kv_swap_out_without_host_pages),
        cmocka_unit_test(test_kv_nth_copy_fails),
        cmocka_unit_test(test_kv_close_in_each_state),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
