// SPDX-License-Identifier: Apache-2.0
// The pool's life, its epochs and its numbers. Pages are in pages.c, objects in object.c, copies in
// move.c, who gives back in pressure.c, the invariants in pool_check.c; internal.h has the states.
//
// All memory is one block, laid out by lay_out, which first only counts.
#include <stdlib.h>

#include "unified_pool/internal.h"

// Host pages that write-backs never take, so that file reads always have a page to pass through:
// 1/16 of the host arena, at most 8.
enum { HOST_KEPT_SHIFT = 4, HOST_KEPT_MAX = 8, HOST_KEPT_FROM = 5 };

static void lay_out(struct placer *placer, const struct pool_options *options, struct pool **self,
                    struct pool *body)
{
    *self = place(placer, 1, sizeof **self);
    body->tiers[TIER_DEVICE].pages = place(placer, options->device_pages, sizeof(struct page));
    body->tiers[TIER_HOST].pages = place(placer, options->host_pages, sizeof(struct page));
    body->objects = place(placer, options->objects_max, sizeof(struct object));
    body->runs.runs = place(placer, options->slots_max, sizeof(struct run));
    body->device_page = place(placer, options->slots_max, sizeof(uint32_t));
    body->host_page = place(placer, options->slots_max, sizeof(uint32_t));
    body->slot_object = place(placer, options->slots_max, sizeof(uint32_t));
    body->slot_flags = place(placer, options->slots_max, sizeof(uint8_t));
    body->owner_pages = place(placer, options->owners_max, sizeof(uint32_t));
}

static enum status check_options(const struct pool_options *o, struct fault *fault)
{
    if (!is_power_of_two(o->page_bytes) || o->page_bytes < 32u << 10 || o->page_bytes > 2u << 20)
        return fault_set(
            fault, STATUS_INVALID,
            "the page size is %zu bytes; it must be a power of two from 32 KiB to 2 MiB.",
            o->page_bytes);
    if (!o->device_pages || o->device_pages >= NONE || o->host_pages >= NONE)
        return fault_set(fault, STATUS_INVALID, "the pool needs at least one device page.");
    if (!o->objects_max || o->objects_max >= NONE || !o->slots_max || o->slots_max >= NONE ||
        !o->owners_max)
        return fault_set(fault, STATUS_INVALID, "objects, slots and owners must be at least 1.");
    if (!o->device_arena || (o->host_pages && !o->host_arena) || !o->copies)
        return fault_set(fault, STATUS_INVALID, "the pool has no arena or no copy queues.");
    return STATUS_OK;
}

static void fill(struct pool *pool)
{
    const struct pool_options *options = &pool->options;
    pool__tier_init(&pool->tiers[TIER_DEVICE], options->device_pages, options->device_arena);
    pool__tier_init(&pool->tiers[TIER_HOST], options->host_pages, options->host_arena);
    for (uint32_t i = 0; i < options->objects_max; i++) {
        pool->objects[i].generation = 1;
        pool->objects[i].next_free = i + 1 < options->objects_max ? i + 1 : NONE;
    }
    for (uint32_t s = 0; s < options->slots_max; s++)
        pool->device_page[s] = pool->host_page[s] = pool->slot_object[s] = NONE;
    for (int kind = 0; kind < PAGE_KINDS; kind++)
        pool->limits[kind] = NONE;
    for (int r = 0; r < COPY_RANKS; r++)
        pool->stalled[r] = (struct stall_list){NONE, NONE};
    pool->runs.count = options->slots_max;
    pool__runs_init(&pool->runs);
    pool->epoch_oldest = 1;
    // At least one: without it swapped KV could take the last page that a file read passes through.
    uint32_t kept = (uint32_t)min_size(options->host_pages >> HOST_KEPT_SHIFT, HOST_KEPT_MAX);
    pool->host_kept = kept || options->host_pages < HOST_KEPT_FROM ? kept : 1;
}

enum status pool_create(const struct pool_options *options, struct pool **out, struct fault *fault)
{
    enum status status = check_options(options, fault);
    if (status)
        return status;
    struct pool body = {.options = *options};
    struct pool *self;
    struct placer placer = {0};
    lay_out(&placer, options, &self, &body);
    void *memory = calloc(1, placer.used);
    if (!memory)
        return fault_set(fault, STATUS_NO_MEMORY,
                         "out of memory for the pool's %zu bytes of tables.", placer.used);
    placer = (struct placer){.base = memory};
    lay_out(&placer, options, &self, &body);
    *self = body;
    fill(self);
    *out = self;
    return STATUS_OK;
}

void pool_destroy(struct pool *pool)
{
    free(pool);
}

void pool_set_pressure(struct pool *pool, enum page_kind kind, const struct pool_pressure *pressure)
{
    CHECK((unsigned)kind < PAGE_KINDS);
    pool->pressure[kind] = *pressure;
}

void pool_set_limit(struct pool *pool, enum page_kind kind, uint32_t pages)
{
    CHECK((unsigned)kind < PAGE_KINDS);
    pool->limits[kind] = pages;
}

uint32_t pool_limit(const struct pool *pool, enum page_kind kind)
{
    CHECK((unsigned)kind < PAGE_KINDS);
    return (uint32_t)min_size(pool->limits[kind], pool->options.device_pages);
}

void *pool_device_address(const struct pool *pool, uint32_t page)
{
    CHECK(page < pool->options.device_pages);
    return pool__address(pool, TIER_DEVICE, page);
}

// ---- epochs ----

uint64_t pool_epoch_open(struct pool *pool)
{
    uint64_t epoch = ++pool->epoch_last;
    CHECK(epoch - pool->epoch_oldest < EPOCHS_MAX);
    pool->epoch_retired[epoch % EPOCHS_MAX] = false;
    return epoch;
}

void pool_epoch_retire(struct pool *pool, uint64_t epoch)
{
    CHECK(epoch >= pool->epoch_oldest && epoch <= pool->epoch_last);
    CHECK(!pool->epoch_retired[epoch % EPOCHS_MAX]);
    pool->epoch_retired[epoch % EPOCHS_MAX] = true;
    while (pool->epoch_oldest <= pool->epoch_last &&
           pool->epoch_retired[pool->epoch_oldest % EPOCHS_MAX])
        pool->epoch_oldest++;
    pool__release_epochs(pool);
}

void pool_poll(struct pool *pool)
{
    copy_poll(pool->options.copies);
    if (pool->stalled_count) {
        pool__pump_all(pool);
        copy_poll(pool->options.copies);
    }
}

// ---- numbers ----

void pool_stats(const struct pool *pool, struct pool_stats *out)
{
    const struct tier *device = &pool->tiers[TIER_DEVICE], *host = &pool->tiers[TIER_HOST];
    *out = (struct pool_stats){.page_bytes = pool->options.page_bytes,
                               .device_total = device->total,
                               .device_free = device->free,
                               .device_waiting = device->waiting,
                               .host_total = host->total,
                               .host_free = host->free,
                               .slots_max = pool->options.slots_max,
                               .fetches = pool->fetches,
                               .fetch_failures = pool->fetch_failures,
                               .give_backs = pool->give_backs,
                               .write_backs = pool->write_backs};
    for (int kind = 0; kind < PAGE_KINDS; kind++) {
        out->device_by_kind[kind] = device->by_kind[kind];
        out->host_by_kind[kind] = host->by_kind[kind];
        for (int from = 0; from < PAGE_KINDS; from++)
            out->taken_from[kind][from] = pool->taken_from[kind][from];
    }
}

uint32_t pool_owner_pages(const struct pool *pool, uint32_t owner)
{
    CHECK(owner < pool->options.owners_max);
    return pool->owner_pages[owner];
}
