// SPDX-License-Identifier: Apache-2.0
#include "test_pool_rig.h"

#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <cmocka.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "base/check.h"
#include "base/rng.h"

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

void kind_offer(struct bench *bench, enum page_kind which, pool_object object, float price,
                uint32_t id)
{
    struct kind *kind = &bench->kinds[which];
    CHECK(kind->count < OFFERS);
    kind->list[kind->count].object = object;
    kind->list[kind->count].price = price;
    kind->list[kind->count++].id = id;
}

struct bench *bench_open_on(struct sizes sizes, struct link *link, struct clock clock)
{
    struct bench *bench = calloc(1, sizeof *bench);
    CHECK(bench);
    fake_link_init(&bench->link, 1, &bench->now);
    fake_reader_init(&bench->file, 5, 1 << 30);
    struct copy_options copy_options = {.link = link ? link : &bench->link.link,
                                        .clock = link ? clock : clock_fake(&bench->now),
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

struct bench *bench_open_sized(struct sizes sizes)
{
    return bench_open_on(sizes, NULL, (struct clock){0});
}

struct bench *bench_open(uint32_t device, uint32_t host)
{
    return bench_open_sized((struct sizes){device, host, 512, 1024, 256});
}

void bench_close(struct bench *bench)
{
    pool_check(bench->pool);
    copy_destroy(bench->copies);
    pool_destroy(bench->pool);
    free(bench->device);
    free(bench->host);
    free(bench);
}

pool_object make(struct bench *bench, enum page_kind kind, uint32_t owner, uint32_t slots)
{
    pool_object object = {0};
    struct pool_object_options options = {.kind = kind, .owner = owner, .slots = slots};
    assert_int_equal(pool_object_create(bench->pool, &options, &object), STATUS_OK);
    return object;
}

pool_object make_filed(struct bench *bench, enum page_kind kind, uint32_t owner, uint32_t slots,
                       uint64_t first_page)
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

pool_object make_reserved(struct bench *bench, enum page_kind kind, uint32_t owner, uint32_t slots)
{
    pool_object object = make(bench, kind, owner, slots);
    assert_int_equal(pool_reserve(bench->pool, object), STATUS_OK);
    return object;
}

uint8_t *slot_memory(struct bench *bench, pool_object object, uint32_t slot)
{
    return bench->device + (size_t)pool_device_pages(bench->pool, object)[slot] * PAGE;
}

void assert_file_content(struct bench *bench, pool_object object)
{
    assert_true(pool_is_resident(bench->pool, object));
    for (uint32_t s = 0; s < pool_slots(bench->pool, object); s++)
        assert_true(fake_content_is(5, (pool_tag(bench->pool, object) + s) * PAGE,
                                    slot_memory(bench, object, s), PAGE));
}

void settle(struct bench *bench)
{
    for (int i = 0; i < 10000; i++) {
        pool_poll(bench->pool);
        pool_check(bench->pool);
        if (copy_is_idle(bench->copies))
            return;
        bench->now += 10;
        if (i > 1000)
            (void)usleep(10); // a link with threads
    }
    fail_msg("the copies never end");
}

struct pool_stats stats_of(struct bench *bench)
{
    struct pool_stats stats;
    pool_stats(bench->pool, &stats);
    return stats;
}

bool is_zero(const uint8_t *memory)
{
    for (size_t i = 0; i < PAGE; i++)
        if (memory[i])
            return false;
    return true;
}
