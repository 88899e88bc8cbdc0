// SPDX-License-Identifier: Apache-2.0
// Objects: handles with generations, their runs of slots, pins, and the questions about residency.
//
// A handle is (generation, index + 1). Destroying an object counts its generation up, so that a
// stale handle is caught at its next use. No object waits for a copy: pages do (internal.h).
#include "unified_pool/internal.h"

struct object *pool__object(const struct pool *pool, pool_object handle)
{
    uint32_t index = (uint32_t)handle.bits - 1;
    CHECK(index < pool->options.objects_max);
    struct object *object = &pool->objects[index];
    CHECK(object->is_live && object->generation == (uint32_t)(handle.bits >> 32));
    return object;
}

pool_object pool__handle(const struct pool *pool, const struct object *object)
{
    uint32_t index = (uint32_t)(object - pool->objects);
    return (pool_object){(uint64_t)object->generation << 32 | (index + 1)};
}

struct object *pool__object_of_slot(const struct pool *pool, uint32_t slot)
{
    return &pool->objects[pool->slot_object[slot]];
}

void pool__recount(struct pool *pool, struct object *object)
{
    bool can_go = object->is_live && !object->pins && !object->is_fetching && !object->is_writing;
    uint32_t now = can_go ? object->device : 0;
    uint32_t *of_kind = &pool->evictable_of[object->kind];
    *of_kind = *of_kind - object->evictable + now;
    pool->evictable = pool->evictable - object->evictable + now;
    object->evictable = now;
}

// Takes a free place for an object whose slots are a run that is the caller's.
static struct object *object_place(struct pool *pool, const struct pool_object_options *options,
                                   uint32_t first, uint32_t slots, uint32_t head)
{
    uint32_t index = pool->object_free;
    struct object *object = &pool->objects[index];
    pool->object_free = object->next_free;
    *object = (struct object){.generation = object->generation,
                              .next_free = NONE,
                              .owner = options->owner,
                              .first = first,
                              .slots = slots,
                              .head = head == NONE ? index : head,
                              .next = NONE,
                              .prev = NONE,
                              .kind = (uint8_t)options->kind,
                              .is_live = true,
                              .file = options->file,
                              .file_offset = options->file_offset,
                              .tag = options->tag};
    for (uint32_t s = first; s < first + slots; s++) {
        pool->device_page[s] = pool->host_page[s] = NONE;
        pool->slot_object[s] = index;
        pool->slot_flags[s] = 0;
    }
    pool->objects_live++;
    return object;
}

enum status pool_object_create(struct pool *pool, const struct pool_object_options *options,
                               pool_object *out)
{
    CHECK((unsigned)options->kind < PAGE_KINDS && options->slots);
    CHECK(options->owner < pool->options.owners_max);
    if (pool->object_free == NONE)
        return STATUS_FULL;
    uint32_t first = pool__runs_take(&pool->runs, options->slots);
    if (first == NONE)
        return STATUS_FULL;
    *out = pool__handle(pool, object_place(pool, options, first, options->slots, NONE));
    return STATUS_OK;
}

enum status pool_objects_create(struct pool *pool, const struct pool_object_options *options,
                                uint32_t pages, pool_object *out)
{
    CHECK((unsigned)options->kind < PAGE_KINDS && options->slots);
    CHECK(options->owner < pool->options.owners_max);
    if (pool->options.objects_max - pool->objects_live <= pages)
        return STATUS_FULL;
    uint32_t first = pool__runs_take(&pool->runs, options->slots + pages);
    if (first == NONE)
        return STATUS_FULL;
    struct pool_object_options page = *options;
    page.file_offset += (uint64_t)options->slots * pool->options.page_bytes;
    uint32_t head = pool->object_free;
    out[0] = pool__handle(pool, object_place(pool, options, first, options->slots, NONE));
    for (uint32_t i = 1; i <= pages; i++) {
        page.tag++;
        out[i] =
            pool__handle(pool, object_place(pool, &page, first + options->slots + i - 1, 1, head));
        page.file_offset += pool->options.page_bytes;
    }
    return STATUS_OK;
}

void pool_object_destroy(struct pool *pool, pool_object handle)
{
    struct object *object = pool__object(pool, handle);
    CHECK(!object->pins);
    pool__drop_device(pool, object);
    pool__drop_host(pool, object);
    CHECK(!object->device && !object->host && !object->is_stalled && !object->group_on_host);
    for (uint32_t s = object->first; s < object->first + object->slots; s++)
        pool->slot_object[s] = NONE;
    pool__runs_give(&pool->runs, object->first, object->slots);
    object->is_live = false;
    pool__recount(pool, object);
    object->generation++;
    object->next_free = pool->object_free;
    pool->object_free = (uint32_t)(object - pool->objects);
    pool->objects_live--;
}

uint64_t pool_tag(const struct pool *pool, pool_object handle)
{
    return pool__object(pool, handle)->tag;
}

uint32_t pool_slots(const struct pool *pool, pool_object handle)
{
    return pool__object(pool, handle)->slots;
}

uint32_t pool_first_slot(const struct pool *pool, pool_object handle)
{
    return pool__object(pool, handle)->first;
}

const uint32_t *pool_device_pages(const struct pool *pool, pool_object handle)
{
    return pool->device_page + pool__object(pool, handle)->first;
}

bool pool_is_resident(const struct pool *pool, pool_object handle)
{
    const struct object *object = pool__object(pool, handle);
    return object->filled == object->slots;
}

bool pool_is_fetching(const struct pool *pool, pool_object handle)
{
    return pool__object(pool, handle)->is_fetching;
}

bool pool_is_writing_back(const struct pool *pool, pool_object handle)
{
    return pool__object(pool, handle)->is_writing;
}

bool pool_has_host_copy(const struct pool *pool, pool_object handle)
{
    const struct object *object = pool__object(pool, handle);
    return object->on_host == object->slots;
}

uint32_t pool_host_pages(const struct pool *pool, pool_object handle)
{
    return pool__object(pool, handle)->group_on_host;
}

void pool__on_host(struct pool *pool, struct object *object, int32_t pages)
{
    object->on_host += (uint32_t)pages;
    pool->objects[object->head].group_on_host += (uint32_t)pages;
}

bool pool_is_written_back(const struct pool *pool, pool_object handle)
{
    return pool_has_host_copy(pool, handle);
}

enum status pool_fetch_status(const struct pool *pool, pool_object handle)
{
    return pool__object(pool, handle)->fetch_status;
}

uint64_t pool_fetches_ended(const struct pool *pool)
{
    return pool->fetches_ended;
}

void pool_pin(struct pool *pool, pool_object handle)
{
    struct object *object = pool__object(pool, handle);
    CHECK(object->filled == object->slots && object->pins < UINT32_MAX);
    object->pins++;
    pool__recount(pool, object);
}

void pool_unpin(struct pool *pool, pool_object handle)
{
    struct object *object = pool__object(pool, handle);
    CHECK(object->pins);
    object->pins--;
    pool__recount(pool, object);
}

uint32_t pool_pins(const struct pool *pool, pool_object handle)
{
    return pool__object(pool, handle)->pins;
}
