// SPDX-License-Identifier: Apache-2.0
// Experts: the store file, the price with exact numbers, residency over the real pool and the CPU
// device's page table, gates with tiny pools, reads that fail, prefetch.
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <setjmp.h>
#include <cmocka.h>

#include <dirent.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "base/check.h"
#include "experts/experts.h"
#include "experts/policy.h"
#include "fakes.h"

enum { PAGE = 32 << 10, LAYERS = 2, EXPERTS = 6, SLOTS = 3, SEED = 5 };

// ---- the store ----

static void test_experts_shape_counts_pages(void **state)
{
    (void)state;
    static const struct {
        uint32_t hidden, intermediate, down_tile, pages;
        enum dtype dtype;
        size_t page;
    } cases[] = {
        {256, 64, 8, 3, DTYPE_BF16, 32 << 10},       // the demo model: 12 tiles
        {256, 64, 16, 6, DTYPE_F32, 32 << 10},       // the same in fp32
        {2048, 768, 768, 18, DTYPE_BF16, 512 << 10}, // Qwen3-30B: 9 MiB
        {40, 24, 1, 1, DTYPE_BF16, 32 << 10},        // 48 interleaved rows, 1 + 1 tiles
        {72, 33, 4, 2, DTYPE_BF16, 32 << 10},        // 80 rows x 72: 2 x 2; 72 x 33: 2 x 1
    };
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        struct expert_shape shape = {.layers = 1,
                                     .experts = 1,
                                     .hidden = cases[i].hidden,
                                     .intermediate = cases[i].intermediate,
                                     .dtype = cases[i].dtype,
                                     .page_bytes = cases[i].page};
        expert_shape_complete(&shape);
        assert_int_equal(shape.down_tile, cases[i].down_tile);
        assert_int_equal(shape.pages_per_expert, cases[i].pages);
    }
}

static struct expert_shape small_shape(void)
{
    struct expert_shape shape = {.layers = LAYERS,
                                 .experts = EXPERTS,
                                 .hidden = 40,
                                 .intermediate = 24,
                                 .dtype = DTYPE_BF16,
                                 .page_bytes = PAGE};
    expert_shape_complete(&shape);
    return shape;
}

static uint16_t weight(uint32_t layer, uint32_t expert, uint32_t which, uint32_t i)
{
    return (uint16_t)(0x3000u + (layer * EXPERTS + expert) * 3000 + which * 1000 + i);
}

static void put_all(struct expert_store_writer *writer)
{
    static uint16_t m[3][24 * 40];
    for (uint32_t r = LAYERS * EXPERTS; r-- > 0;) { // any order will do
        for (uint32_t w = 0; w < 3; w++)
            for (uint32_t i = 0; i < 24 * 40; i++)
                m[w][i] = weight(r / EXPERTS, r % EXPERTS, w, i);
        assert_int_equal(expert_store_put(writer, r / EXPERTS, r % EXPERTS, m[0], m[1], m[2], NULL),
                         STATUS_OK);
    }
}

static int files_in(const char *directory)
{
    int files = 0;
    DIR *d = opendir(directory);
    assert_non_null(d);
    for (struct dirent *entry; (entry = readdir(d));)
        files += entry->d_name[0] != '.';
    (void)closedir(d);
    return files;
}

static void test_experts_store_holds_what_was_put(void **state)
{
    (void)state;
    char directory[] = "/tmp/test_experts.XXXXXX", path[64];
    assert_non_null(mkdtemp(directory));
    (void)snprintf(path, sizeof path, "%s/store", directory);
    struct expert_shape shape = small_shape();
    struct digest base = hash_bytes(NULL, "base", 4), other = hash_bytes(NULL, "other", 5);
    struct expert_store_writer *writer = NULL;
    struct reader *reader = NULL;
    assert_int_equal(expert_store_open(path, &shape, &base, &reader, NULL), STATUS_NOT_FOUND);
    assert_int_equal(expert_store_create(path, &shape, &base, &writer, NULL), STATUS_OK);
    put_all(writer);
    assert_int_equal(access(path, F_OK), -1); // nothing to see before it is whole
    assert_int_equal(expert_store_finish(writer, NULL), STATUS_OK);
    assert_int_equal(files_in(directory), 1);

    assert_int_equal(expert_store_open(path, &shape, &other, &reader, NULL), STATUS_CORRUPT);
    struct expert_shape wider = shape;
    wider.hidden = 41;
    assert_int_equal(expert_store_open(path, &wider, &base, &reader, NULL), STATUS_CORRUPT);
    assert_int_equal(expert_store_open(path, &shape, &base, &reader, NULL), STATUS_OK);
    static uint8_t page[PAGE];
    for (uint32_t r = 0; r < LAYERS * EXPERTS; r++) {
        assert_int_equal(reader_read(reader, (1 + (uint64_t)r) * PAGE, page, PAGE), STATUS_OK);
        for (uint32_t i = 0; i < 24 * 40; i++) {
            uint16_t found[3];
            for (size_t half = 0; half < 2; half++)
                memcpy(&found[half],
                       page +
                           tile_offset(DTYPE_BF16, 40, tile_interleaved_row(i / 40, half), i % 40),
                       2);
            memcpy(&found[2],
                   page + shape.down_tile * TILE_BYTES +
                       tile_offset(DTYPE_BF16, 24, i / 24, i % 24),
                   2);
            for (uint32_t w = 0; w < 3; w++)
                assert_int_equal(found[w], weight(r / EXPERTS, r % EXPERTS, w, i));
        }
    }
    reader_close(reader);
    assert_int_equal(truncate(path, (1 + LAYERS * EXPERTS) * PAGE - 1), 0);
    assert_int_equal(expert_store_open(path, &shape, &base, &reader, NULL), STATUS_CORRUPT);
    (void)unlink(path);
    assert_int_equal(expert_store_create(path, &shape, &base, &writer, NULL), STATUS_OK);
    expert_store_abandon(writer);
    assert_int_equal(files_in(directory), 0);
    (void)rmdir(directory);
}

// ---- the price ----

static void test_experts_history_ages(void **state)
{
    (void)state;
    struct expert_history history = {0};
    assert_true(expert_probability(&history, 100) == 1.0f / 4096.0f); // never used: not nothing
    expert_history_use(&history, 10);
    assert_true(history.count == 1.0f);
    assert_true(expert_count_at(&history, 11) == 63.0f / 64.0f);
    assert_true(expert_count_at(&history, 12) == 63.0f / 64.0f * (63.0f / 64.0f));
    expert_history_use(&history, 11);
    assert_true(history.count == 63.0f / 64.0f + 1.0f);
    // One use in 64 steps, 16 steps ahead: 1 - (63/64)^16.
    struct expert_history once = {.count = 1.0f, .step = 5};
    assert_true(expert_probability(&once, 5) > 0.222f && expert_probability(&once, 5) < 0.224f);
    // In every step for ever: the count tends to the window, the probability to 1, never beyond.
    for (uint32_t step = 12; step < 2000; step++)
        expert_history_use(&history, step);
    assert_true(history.count > 63.9f && history.count <= 64.0f);
    assert_true(expert_probability(&history, 1999) > 0.999f);
    assert_true(expert_probability(&history, 1999) <= 1.0f);
    assert_true(expert_count_at(&history, 1999 + 6401) == 0.0f);
}

// ---- residency ----

struct bench {
    uint64_t now;
    struct fake_link link;
    struct fake_reader store;
    struct copy_queues *copies;
    struct device *device;
    struct stream *stream;
    uint8_t *arena, *host;
    struct pool *pool;
    struct experts *experts;
    struct expert_shape shape;
};

// A pool of `pages` pages; experts of three pages each, read from a file whose bytes are a formula.
static struct bench *bench_open(uint32_t pages)
{
    struct bench *b = calloc(1, sizeof *b);
    CHECK(b);
    b->shape = (struct expert_shape){.layers = LAYERS,
                                     .experts = EXPERTS,
                                     .hidden = 256,
                                     .intermediate = 64,
                                     .dtype = DTYPE_BF16,
                                     .page_bytes = PAGE};
    expert_shape_complete(&b->shape);
    assert_int_equal(b->shape.pages_per_expert, SLOTS);
    fake_link_init(&b->link, 1, &b->now);
    fake_reader_init(&b->store, SEED, (1 + LAYERS * EXPERTS * SLOTS) * PAGE);
    struct copy_options copies = {
        .link = &b->link.link, .clock = clock_fake(&b->now), .copies_max = 256, .owners_max = 2};
    assert_int_equal(copy_create(&copies, &b->copies), STATUS_OK);
    struct cpu_options cpu = {.threads = 1, .dtype = DTYPE_BF16};
    assert_int_equal(device_create_cpu(&cpu, &b->device, NULL), STATUS_OK);
    assert_int_equal(b->device->table->stream_create(b->device, 16, &b->stream), STATUS_OK);
    assert_int_equal(b->device->table->alloc(b->device, (size_t)pages * PAGE, (void **)&b->arena),
                     STATUS_OK);
    uint32_t host_pages = 2 * SLOTS;
    b->host = malloc((size_t)host_pages * PAGE);
    struct pool_options pool = {.page_bytes = PAGE,
                                .device_pages = pages,
                                .host_pages = host_pages,
                                .objects_max = 64,
                                .slots_max = 256,
                                .owners_max = 2,
                                .device_arena = b->arena,
                                .host_arena = b->host,
                                .copies = b->copies};
    assert_int_equal(pool_create(&pool, &b->pool, NULL), STATUS_OK);
    struct expert_options options = {.shape = b->shape,
                                     .pool = b->pool,
                                     .device = b->device,
                                     .arena = b->arena,
                                     .store = &b->store.reader,
                                     .clock = clock_fake(&b->now),
                                     .owner = 1,
                                     .fetch_us_per_byte = 0.5f};
    assert_int_equal(experts_create(&options, &b->experts, NULL), STATUS_OK);
    return b;
}

static void bench_close(struct bench *b)
{
    pool_check(b->pool);
    experts_destroy(b->experts);
    pool_check(b->pool);
    struct pool_stats stats;
    pool_stats(b->pool, &stats);
    assert_int_equal(stats.device_by_kind[PAGE_EXPERT], 0);
    copy_destroy(b->copies);
    pool_destroy(b->pool);
    b->device->table->release(b->device, b->arena);
    b->device->table->stream_destroy(b->stream);
    b->device->table->destroy(b->device);
    free(b->host);
    free(b);
}

static void flush(struct bench *b)
{
    struct segment_result result;
    experts_flush(b->experts, b->stream);
    assert_int_equal(experts_flush_pending(b->experts), 0);
    assert_int_equal(b->device->table->submit(b->stream), STATUS_OK);
    assert_int_equal(b->device->table->wait(b->stream, &result), STATUS_OK);
}

// In the table of the device: -1 not there, else checks the bytes behind it and gives 0.
static int in_table(struct bench *b, uint32_t layer, uint32_t expert)
{
    struct expert_view view = experts_view(b->experts, layer);
    const uint32_t *pages = view.pages + expert * SLOTS;
    for (uint32_t s = 0; s < SLOTS; s++) {
        assert_int_equal(pages[s] == PAGE_NONE, pages[0] == PAGE_NONE);
        uint64_t offset = (1 + (uint64_t)(layer * EXPERTS + expert) * SLOTS + s) * PAGE;
        if (pages[s] != PAGE_NONE)
            assert_true(fake_content_is(SEED, offset, view.arena + (size_t)pages[s] * PAGE, PAGE));
    }
    return pages[0] == PAGE_NONE ? -1 : 0;
}

static enum status wait_gate(struct bench *b, uint32_t layer)
{
    enum status status = STATUS_INTERNAL;
    for (int i = 0; i < 1000; i++, b->now++)
        if (experts_gate_ready(b->experts, layer, &status))
            return status;
    fail_msg("the gate never opens");
    return status;
}

// Brings the experts whose bit is set, one gate after the other until all were there once; the
// number of rounds. As the engine does: bring, wait, flush, compute what is there (state 3), done.
static uint32_t run_gates(struct bench *b, uint32_t layer, uint32_t bits)
{
    uint8_t state[EXPERTS] = {0};
    uint32_t rounds = 0, need[EXPERTS] = {0};
    for (uint32_t e = 0; e < EXPERTS; e++)
        need[e] = bits >> e & 1;
    for (;; rounds++) {
        flush(b);
        bool missing = false;
        for (uint32_t e = 0; e < EXPERTS; e++) {
            if (need[e] && state[e] != 3)
                state[e] = in_table(b, layer, e) == 0 ? 3 : 2;
            missing = missing || state[e] == 2;
        }
        experts_gate_done(b->experts, layer);
        if (!missing)
            break;
        uint32_t started = 0;
        assert_int_equal(experts_gate_bring(b->experts, layer, state, COPY_STANDARD, &started),
                         STATUS_OK);
        assert_true(started > 0 && rounds < 100);
        assert_int_equal(wait_gate(b, layer), STATUS_OK);
        pool_check(b->pool);
    }
    experts_used(b->experts, layer, need);
    return rounds;
}

static void test_experts_table_follows_residency(void **state)
{
    (void)state;
    struct bench *b = bench_open(LAYERS * EXPERTS * SLOTS);
    assert_int_equal(experts_flush_pending(b->experts), LAYERS * EXPERTS);
    flush(b);
    for (uint32_t i = 0; i < LAYERS * EXPERTS; i++)
        assert_int_equal(in_table(b, i / EXPERTS, i % EXPERTS), -1);
    assert_int_equal(run_gates(b, 1, 0x05), 1);
    for (uint32_t i = 0; i < LAYERS * EXPERTS; i++) {
        int expected = i == EXPERTS || i == EXPERTS + 2 ? 0 : -1;
        assert_int_equal(in_table(b, i / EXPERTS, i % EXPERTS), expected);
        assert_int_equal(experts_is_resident(b->experts, i / EXPERTS, i % EXPERTS), expected == 0);
    }
    assert_int_equal(run_gates(b, 1, 0x05), 0);
    struct expert_stats stats;
    experts_stats(b->experts, &stats);
    assert_int_equal(stats.resident, 2);
    assert_int_equal(stats.total, LAYERS * EXPERTS);
    assert_int_equal(stats.misses, 2);
    assert_int_equal(stats.hits, 2);
    assert_int_equal(stats.fetched_bytes, 2 * SLOTS * PAGE);
    assert_int_equal(pool_owner_pages(b->pool, 1), 2 * SLOTS);
    bench_close(b);
}

static void test_experts_cheapest_leaves_first(void **state)
{
    (void)state;
    struct bench *b = bench_open(3 * SLOTS);
    (void)run_gates(b, 0, 0x07); // 0, 1 and 2: used once each
    (void)run_gates(b, 0, 0x05); // 0 and 2 again
    (void)run_gates(b, 0, 0x01); // 0 once more
    (void)run_gates(b, 0, 0x08); // 3 comes, 1 goes
    assert_int_equal(in_table(b, 0, 0), 0);
    assert_int_equal(in_table(b, 0, 1), -1);
    assert_int_equal(in_table(b, 0, 2), 0);
    assert_int_equal(in_table(b, 0, 3), 0);
    (void)run_gates(b, 0, 0x10); // 4 comes, 3 goes: used once, 2 twice
    assert_int_equal(in_table(b, 0, 3), -1);
    assert_int_equal(in_table(b, 0, 2), 0);
    // Of equal price the one used longest ago goes: layers age by their own steps.
    (void)run_gates(b, 1, 0x01);
    struct expert_stats stats;
    experts_stats(b->experts, &stats);
    assert_int_equal(stats.given_back, 3);
    assert_int_equal(stats.resident, 3);
    assert_int_equal(stats.misses, 6);
    assert_int_equal(stats.hits, 3);
    bench_close(b);
}

static void test_experts_gates_work_in_tiny_pools(void **state)
{
    (void)state;
    for (uint32_t room = 1; room <= EXPERTS; room++) {
        for (uint32_t spare = 0; spare < 2; spare++) { // pages that fit no expert
            struct bench *b = bench_open(room * SLOTS + spare);
            uint32_t rounds = run_gates(b, 0, 0x3f);
            assert_int_equal(rounds, (EXPERTS + room - 1) / room);
            (void)run_gates(b, 1, 0x2a);
            (void)run_gates(b, 0, 0x15);
            bench_close(b);
        }
    }
}

static void test_experts_gate_waits_behind_pinned_pages(void **state)
{
    (void)state;
    struct bench *b = bench_open(SLOTS);
    struct pool_object_options options = {.kind = PAGE_KV, .owner = 0, .slots = 1};
    pool_object kv;
    assert_int_equal(pool_object_create(b->pool, &options, &kv), STATUS_OK);
    assert_int_equal(pool_reserve(b->pool, kv), STATUS_OK);
    pool_pin(b->pool, kv);
    uint8_t need[EXPERTS] = {2};
    uint32_t started = 7;
    assert_int_equal(experts_gate_bring(b->experts, 0, need, COPY_STANDARD, &started), STATUS_FULL);
    assert_int_equal(started, 0);
    enum status status;
    assert_true(experts_gate_ready(b->experts, 0, &status));
    pool_unpin(b->pool, kv);
    pool_object_destroy(b->pool, kv);
    assert_int_equal(experts_gate_bring(b->experts, 0, need, COPY_STANDARD, &started), STATUS_OK);
    assert_int_equal(started, 1);
    assert_int_equal(wait_gate(b, 0), STATUS_OK);
    experts_gate_done(b->experts, 0);
    bench_close(b);
}

static void test_experts_read_that_fails_is_reported_once(void **state)
{
    (void)state;
    for (uint64_t n = 1; n <= 2 * SLOTS; n++) {
        struct bench *b = bench_open(4 * SLOTS);
        uint8_t need[EXPERTS] = {2, 2};
        uint32_t started = 0;
        b->store.fail_at = n;
        assert_int_equal(experts_gate_bring(b->experts, 0, need, COPY_BATCH, &started), STATUS_OK);
        assert_int_equal(started, 2);
        assert_int_equal(wait_gate(b, 0), STATUS_IO);
        experts_gate_done(b->experts, 0);
        flush(b);
        assert_int_equal(in_table(b, 0, 0) + in_table(b, 0, 1), -1); // the other one is there
        assert_int_equal(run_gates(b, 0, 0x03), 1);                  // and now both
        bench_close(b);
    }
}

static void test_experts_prefetch_takes_free_pages_only(void **state)
{
    (void)state;
    struct bench *b = bench_open(4 * SLOTS + 2);
    (void)run_gates(b, 1, 0x20);
    assert_int_equal(experts_prefetch(b->experts, 2), 2);
    assert_int_equal(experts_prefetch(b->experts, 100), 1);
    assert_int_equal(experts_prefetch(b->experts, 100), 0);
    for (int i = 0; i < 1000; i++, b->now++)
        pool_poll(b->pool);
    flush(b);
    for (uint32_t e = 0; e < 3; e++)
        assert_int_equal(in_table(b, 0, e), 0);
    assert_int_equal(in_table(b, 1, 5), 0); // nothing was given back for a prefetch
    struct expert_stats stats;
    experts_stats(b->experts, &stats);
    assert_int_equal(stats.prefetched, 3);
    assert_int_equal(stats.given_back, 0);
    bench_close(b);
}

static void test_experts_prefetch_makes_way_for_a_gate(void **state)
{
    (void)state;
    struct bench *b = bench_open(2 * SLOTS);
    for (int r = 0; r < COPY_RESOURCES; r++)
        b->link.held[r] = true;
    assert_int_equal(experts_prefetch(b->experts, 100), 2); // (0, 0) and (0, 1)
    uint8_t need[EXPERTS] = {0, 2, 2, 2};
    uint32_t started = 0;
    // (0, 0) is not wanted here and goes; (0, 1) is under way already and only becomes urgent.
    enum status status = experts_gate_bring(b->experts, 0, need, COPY_STANDARD, &started);
    assert_int_equal(status, STATUS_OK);
    assert_true(started >= 1);
    for (int r = 0; r < COPY_RESOURCES; r++)
        b->link.held[r] = false;
    assert_int_equal(wait_gate(b, 0), STATUS_OK);
    assert_true(experts_is_resident(b->experts, 0, 1));
    experts_gate_done(b->experts, 0);
    assert_int_equal(run_gates(b, 0, 0x0e) <= 2, 1);
    // A gate of another layer, with the pool full of prefetches under way.
    struct bench *c = bench_open(SLOTS);
    c->link.held[COPY_READ] = true;
    assert_int_equal(experts_prefetch(c->experts, 1), 1);
    uint8_t other[EXPERTS] = {2};
    status = experts_gate_bring(c->experts, 1, other, COPY_STANDARD, &started);
    assert_true(status == STATUS_OK || status == STATUS_FULL);
    c->link.held[COPY_READ] = false;
    assert_int_equal(wait_gate(c, 1), STATUS_OK);
    assert_int_equal(run_gates(c, 1, 0x01) <= 1, 1);
    bench_close(c);
    bench_close(b);
}

// The pool of the bench has room for 64 objects, five times these experts.
static void test_experts_create_undoes_what_failed(void **state)
{
    (void)state;
    struct bench *b = bench_open(4 * SLOTS);
    struct expert_options options = {.shape = b->shape,
                                     .pool = b->pool,
                                     .device = b->device,
                                     .arena = b->arena,
                                     .store = &b->store.reader,
                                     .clock = clock_fake(&b->now)};
    for (int round = 0; round < 3; round++) {
        struct experts *more[8];
        uint32_t made = 0;
        struct fault fault = {0};
        enum status status;
        while (!(status = experts_create(&options, &more[made], &fault)))
            made++;
        assert_int_equal(status, STATUS_FULL);
        assert_int_equal(made, 4);
        assert_non_null(strstr(fault.text, "12 expert objects"));
        while (made)
            experts_destroy(more[--made]);
    }
    bench_close(b);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_experts_create_undoes_what_failed),
        cmocka_unit_test(test_experts_shape_counts_pages),
        cmocka_unit_test(test_experts_store_holds_what_was_put),
        cmocka_unit_test(test_experts_history_ages),
        cmocka_unit_test(test_experts_table_follows_residency),
        cmocka_unit_test(test_experts_cheapest_leaves_first),
        cmocka_unit_test(test_experts_gates_work_in_tiny_pools),
        cmocka_unit_test(test_experts_gate_waits_behind_pinned_pages),
        cmocka_unit_test(test_experts_read_that_fails_is_reported_once),
        cmocka_unit_test(test_experts_prefetch_takes_free_pages_only),
        cmocka_unit_test(test_experts_prefetch_makes_way_for_a_gate),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
