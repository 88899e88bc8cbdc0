// SPDX-License-Identifier: Apache-2.0
// The pool: pages, epochs, pins, prices with exact counts, fetches through host and file,
// write-backs, zeroing between owners, failures of the n-th copy, object and slot. Small synthetic
// kinds offer pages back.
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <cmocka.h>
#include <stdlib.h>
#include <string.h>

#include "base/check.h"
#include "base/rng.h"
#include "fakes.h"
#include "unified_pool/pool.h"

enum { PAGE = 32 << 10, OFFERS = 512, OWNERS = 4 };

// A kind that offers its objects in the order of their prices.
struct kind {
    struct bench *bench;
    struct {
        pool_object object;
        float price;
        uint32_t id;
    } list[OFFERS];
    uint32_t count;
    uint32_t gone[OFFERS], gone_count; // ids in the order they left
    bool destroys;
};

struct bench {
    uint64_t now;
    struct fake_link link;
    struct copy_queues *copies;
    struct fake_reader file;
    uint8_t *device, *host;
    struct pool *pool;
    struct kind kinds[PAGE_KINDS];
};

static bool kind_cheapest(void *context, struct pool_offer *out)
{
    struct kind *kind = context;
    bool found = false;
    for (uint32_t i = 0; i < kind->count; i++) {
        pool_object object = kind->list[i].object;
        struct pool *pool = kind->bench->pool;
        if (pool_pins(pool, object) || !pool_is_resident(pool, object) ||
            pool_is_writing_back(pool, object))
            continue;
        if (!found || kind->list[i].price < out->price)
            *out = (struct pool_offer){object, kind->list[i].price};
        found = true;
    }
    return found;
}

static void kind_give_back(void *context, pool_object object)
{
    struct kind *kind = context;
    for (uint32_t i = 0; i < kind->count; i++) {
        if (kind->list[i].object.bits != object.bits)
            continue;
        kind->gone[kind->gone_count++ % OFFERS] = kind->list[i].id;
        kind->list[i] = kind->list[--kind->count];
        break;
    }
    if (kind->destroys)
        pool_object_destroy(kind->bench->pool, object);
    else
        pool_drop_device(kind->bench->pool, object);
}

static void kind_offer(struct bench *bench, enum page_kind which, pool_object object, float price,
                       uint32_t id)
{
    struct kind *kind = &bench->kinds[which];
    CHECK(kind->count < OFFERS);
    kind->list[kind->count].object = object;
    kind->list[kind->count].price = price;
    kind->list[kind->count++].id = id;
}

struct sizes {
    uint32_t device, host, objects, slots, copies;
};

static struct bench *bench_open_sized(struct sizes sizes)
{
    struct bench *bench = calloc(1, sizeof *bench);
    CHECK(bench);
    fake_link_init(&bench->link, 1, &bench->now);
    fake_reader_init(&bench->file, 5, 1 << 30);
    struct copy_options copy_options = {.link = &bench->link.link,
                                        .clock = clock_fake(&bench->now),
                                        .copies_max = sizes.copies,
                                        .owners_max = OWNERS};
    assert_int_equal(copy_create(&copy_options, &bench->copies), STATUS_OK);
    bench->device = malloc((size_t)sizes.device * PAGE);
    bench->host = malloc((size_t)sizes.host * PAGE + 1);
    CHECK(bench->device && bench->host);
    memset(bench->device, 0xee, (size_t)sizes.device * PAGE);
    struct pool_options options = {.page_bytes = PAGE,
                                   .device_pages = sizes.device,
                                   .host_pages = sizes.host,
                                   .objects_max = sizes.objects,
                                   .slots_max = sizes.slots,
                                   .owners_max = OWNERS,
                                   .device_arena = bench->device,
                                   .host_arena = bench->host,
                                   .copies = bench->copies};
    assert_int_equal(pool_create(&options, &bench->pool, NULL), STATUS_OK);
    for (int k = 0; k < PAGE_KINDS; k++) {
        bench->kinds[k].bench = bench;
        bench->kinds[k].destroys = k == PAGE_KV;
        struct pool_pressure pressure = {&bench->kinds[k], kind_cheapest, kind_give_back};
        pool_set_pressure(bench->pool, (enum page_kind)k, &pressure);
    }
    return bench;
}

static struct bench *bench_open(uint32_t device, uint32_t host)
{
    return bench_open_sized((struct sizes){device, host, 512, 1024, 256});
}

static void bench_close(struct bench *bench)
{
    pool_check(bench->pool);
    copy_destroy(bench->copies);
    pool_destroy(bench->pool);
    free(bench->device);
    free(bench->host);
    free(bench);
}

static pool_object make(struct bench *bench, enum page_kind kind, uint32_t owner, uint32_t slots)
{
    pool_object object = {0};
    struct pool_object_options options = {.kind = kind, .owner = owner, .slots = slots};
    assert_int_equal(pool_object_create(bench->pool, &options, &object), STATUS_OK);
    return object;
}

static pool_object make_filed(struct bench *bench, enum page_kind kind, uint32_t owner,
                              uint32_t slots, uint64_t first_page)
{
    pool_object object = {0};
    struct pool_object_options options = {.kind = kind,
                                          .owner = owner,
                                          .slots = slots,
                                          .file = &bench->file.reader,
                                          .file_offset = first_page * PAGE,
                                          .tag = first_page};
    assert_int_equal(pool_object_create(bench->pool, &options, &object), STATUS_OK);
    return object;
}

static pool_object make_reserved(struct bench *bench, enum page_kind kind, uint32_t owner,
                                 uint32_t slots)
{
    pool_object object = make(bench, kind, owner, slots);
    assert_int_equal(pool_reserve(bench->pool, object), STATUS_OK);
    return object;
}

static uint8_t *slot_memory(struct bench *bench, pool_object object, uint32_t slot)
{
    return bench->device + (size_t)pool_device_pages(bench->pool, object)[slot] * PAGE;
}

static void assert_file_content(struct bench *bench, pool_object object)
{
    assert_true(pool_is_resident(bench->pool, object));
    for (uint32_t s = 0; s < pool_slots(bench->pool, object); s++)
        assert_true(fake_content_is(5, (pool_tag(bench->pool, object) + s) * PAGE,
                                    slot_memory(bench, object, s), PAGE));
}

static void settle(struct bench *bench)
{
    for (int i = 0; i < 10000; i++) {
        pool_poll(bench->pool);
        pool_check(bench->pool);
        if (copy_is_idle(bench->copies))
            return;
        bench->now += 10;
    }
    fail_msg("the copies never end");
}

static struct pool_stats stats_of(struct bench *bench)
{
    struct pool_stats stats;
    pool_stats(bench->pool, &stats);
    return stats;
}

static bool is_zero(const uint8_t *memory)
{
    for (size_t i = 0; i < PAGE; i++)
        if (memory[i])
            return false;
    return true;
}

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
        pool_object b = make_reserved(bench, PAGE_KV, 2, 1);
        assert_true(is_zero(slot_memory(bench, b, 0)));
        bench_close(bench);
    }
}

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
        cmocka_unit_test(test_pool_pins_balance),
        cmocka_unit_test(test_pool_zeroes_between_owners),
        cmocka_unit_test(test_pool_zeroes_after_half_a_fetch),
        cmocka_unit_test(test_pool_fetch_from_file_and_host),
        cmocka_unit_test(test_pool_fetch_promotes),
        cmocka_unit_test(test_pool_host_copies_are_a_cache),
        cmocka_unit_test(test_pool_fetch_through_few_host_pages),
        cmocka_unit_test(test_pool_fetch_without_host_pages),
        cmocka_unit_test(test_pool_fetch_takes_the_cheapest),
        cmocka_unit_test(test_pool_write_back_and_return),
        cmocka_unit_test(test_pool_write_back_takes_host_copies),
        cmocka_unit_test(test_pool_nth_copy_fails),
        cmocka_unit_test(test_pool_leaving_in_each_state),
        cmocka_unit_test(test_pool_each_kind_takes_from_each),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
