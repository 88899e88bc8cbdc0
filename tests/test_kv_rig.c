// SPDX-License-Identifier: Apache-2.0
#include "test_kv_rig.h"

#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <cmocka.h>
#include <stdlib.h>
#include <string.h>

#include "base/check.h"
#include "base/rng.h"

static void copy_bytes(void *context, void *to, const void *from, size_t bytes)
{
    struct bench *bench = context;
    bench->copied_pages++;
    memcpy(to, from, bytes);
}

struct bench *bench_open_sized(struct sizes sizes)
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
struct bench *bench_open(uint32_t device, uint32_t host)
{
    return bench_open_sized((struct sizes){8, device, host, 1024});
}

void bench_check(struct bench *bench)
{
    pool_check(bench->pool);
    kv_check(bench->kv);
}

void bench_close(struct bench *bench)
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

void make_tokens(int32_t *tokens, uint32_t count, uint32_t text)
{
    for (uint32_t i = 0; i < count; i++)
        tokens[i] = (int32_t)(rng_at(5, text, i) % 8192);
}

uint64_t value_at(const int32_t *tokens, uint32_t position)
{
    uint64_t value = 1;
    for (uint32_t i = 0; i <= position; i++)
        value = rng_mix(value ^ (uint32_t)tokens[i]);
    return value;
}

kv_sequence open_as(struct bench *bench, uint32_t owner, const struct digest *root)
{
    kv_sequence sequence = {0};
    assert_int_equal(kv_open(bench->kv, owner, root, &sequence), STATUS_OK);
    return sequence;
}

kv_sequence open_sequence(struct bench *bench)
{
    return open_as(bench, 1, &bench->root);
}

void pages_of(struct bench *bench, kv_sequence sequence, uint32_t *pages)
{
    kv_fill_pages(bench->kv, sequence, pages, BLOCKS);
}

enum status try_reserve(struct bench *bench, kv_sequence sequence, uint32_t tokens)
{
    struct kv_copier copier = {copy_bytes, bench};
    return kv_reserve(bench->kv, sequence, tokens, &copier);
}

// Computes positions [from, count) as a model would.
void compute(struct bench *bench, kv_sequence sequence, const int32_t *tokens, uint32_t from,
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

void assert_holds(struct bench *bench, kv_sequence sequence, const int32_t *tokens, uint32_t count)
{
    static uint32_t pages[BLOCKS * 8];
    pages_of(bench, sequence, pages);
    for (uint32_t p = 0; p < count; p++)
        assert_true(fake_kv_is(bench->device, PAGE, &bench->shape, pages, p, value_at(tokens, p)));
}

enum kv_state wait_while(struct bench *bench, kv_sequence sequence, enum kv_state state)
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
void drain(struct bench *bench)
{
    for (int i = 0; i < 1000 && !copy_is_idle(bench->copies); i++) {
        bench->now += 10;
        pool_poll(bench->pool);
    }
    assert_true(copy_is_idle(bench->copies));
}

struct kv_stats stats_of(struct bench *bench)
{
    struct kv_stats stats;
    kv_stats(bench->kv, &stats);
    return stats;
}

uint32_t free_pages(struct bench *bench)
{
    struct pool_stats stats;
    pool_stats(bench->pool, &stats);
    return stats.device_free;
}

uint32_t match(struct bench *bench, kv_sequence sequence, const int32_t *tokens, uint32_t count)
{
    return kv_match_prefix(bench->kv, sequence, tokens, count);
}
