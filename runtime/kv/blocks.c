// SPDX-License-Identifier: Apache-2.0
// Blocks: their records, who uses them, where they go when nobody does, and what the pool is
// offered.
//
// Offers. Each list is in the order in which its blocks were let go, and within a list the price
// only depends on the age, so the head of each list is its cheapest and the cheapest of all is
// found by looking at KV_HIT_LISTS + 1 heads. A sequence lets go of its blocks from the last to the
// first, so that the end of a prefix always leaves before its beginning, without which it could not
// be found.
#include "runtime/kv/internal.h"

// In which half of the prefixes that were used once come back; OPEN: to be fitted to recorded
// traces.
enum { RETURN_US = 30000000 };

float kv_price(uint32_t hits, uint64_t age_us, float recompute_us, size_t bytes)
{
    float weight = 1.0f + (float)hits;
    float probability = weight / (weight + 1.0f + (float)age_us / (float)RETURN_US);
    return probability * ((float)POOL_HORIZON_US / (float)RETURN_US) * recompute_us / (float)bytes;
}

// How likely a prefix that was never used again will be: the share of prompt tokens that the index
// has served so far, after a prior of a few prompts that all hit. Measured with 1,500 requests
// without common prefixes in a 40 MiB pool, together with the price of bringing experts back:
// 123,172 expert misses before, 21,448 after; 254 of 256 experts resident at the end instead of 32.
static float hit_share(const struct kv *kv)
{
    enum { PRIOR_TOKENS = 4096 };
    return (float)(kv->prefix_hits + PRIOR_TOKENS) / (float)(kv->prefix_queries + PRIOR_TOKENS);
}

// ---- lists ----

void kv__list_remove(struct kv *kv, uint32_t index)
{
    struct block *block = &kv->blocks[index];
    if (block->list == KV_LISTS)
        return;
    struct block_list *list = &kv->lists[block->list];
    if (block->prev != NONE)
        kv->blocks[block->prev].next = block->next;
    else
        list->head = block->next;
    if (block->next != NONE)
        kv->blocks[block->next].prev = block->prev;
    else
        list->tail = block->prev;
    list->count--;
    block->list = KV_LISTS;
}

void kv__list_append(struct kv *kv, uint32_t index, uint32_t which)
{
    kv__list_remove(kv, index);
    struct block *block = &kv->blocks[index];
    struct block_list *list = &kv->lists[which];
    block->next = NONE;
    block->prev = list->tail;
    if (list->tail != NONE)
        kv->blocks[list->tail].next = index;
    else
        list->head = index;
    list->tail = index;
    list->count++;
    block->list = (uint8_t)which;
}

static uint32_t list_of_hits(uint32_t hits)
{
    uint32_t power = hits ? 32u - (uint32_t)__builtin_clz(hits) : 0;
    return power < KV_HIT_LISTS ? power : KV_HIT_LISTS - 1;
}

static uint32_t least_hits(uint32_t list)
{
    return list ? 1u << (list - 1) : 0;
}

// ---- life ----

static void block_free(struct kv *kv, uint32_t index)
{
    struct block *block = &kv->blocks[index];
    kv__list_remove(kv, index);
    if (block->is_indexed)
        kv__index_remove(kv, index);
    if (block->object.bits)
        pool_object_destroy(kv->options.pool, block->object);
    block->is_live = false;
    block->next = kv->block_free;
    kv->block_free = index;
    kv->blocks_live--;
}

// The cheapest block that is cached only; NONE.
static uint32_t cheapest_cached(const struct kv *kv)
{
    for (uint32_t list = 0; list < KV_HIT_LISTS; list++)
        if (kv->lists[list].head != NONE)
            return kv->lists[list].head;
    return NONE;
}

enum status kv__block_new(struct kv *kv, uint32_t owner, uint32_t *out)
{
    if (kv->block_free == NONE && cheapest_cached(kv) != NONE)
        block_free(kv, cheapest_cached(kv));
    uint32_t index = kv->block_free;
    if (index == NONE)
        return STATUS_FULL;
    struct pool_object_options options = {
        .kind = PAGE_KV, .owner = owner, .slots = kv->options.shape.pages_per_block, .tag = index};
    pool_object object;
    while (pool_object_create(kv->options.pool, &options, &object) != STATUS_OK) {
        uint32_t cached = cheapest_cached(kv); // cached blocks take up objects as well
        if (cached == NONE)
            return STATUS_FULL;
        block_free(kv, cached);
        index = kv->block_free;
        options.tag = index;
    }
    kv->block_free = kv->blocks[index].next;
    kv->blocks[index] = (struct block){.object = object,
                                       .refs = 1,
                                       .active = 1,
                                       .next = NONE,
                                       .prev = NONE,
                                       .list = KV_LISTS,
                                       .is_live = true};
    kv->blocks_live++;
    *out = index;
    return STATUS_OK;
}

static void settle_unused(struct kv *kv, uint32_t index)
{
    struct block *block = &kv->blocks[index];
    struct pool *pool = kv->options.pool;
    kv__list_remove(kv, index);
    if (!block->is_indexed || !block->object.bits || !pool_is_resident(pool, block->object)) {
        block_free(kv, index);
        return;
    }
    pool_drop_host(pool, block->object); // and a write-back nobody waits for
    block->used_us = clock_now_us(&kv->options.clock);
    kv__list_append(kv, index, list_of_hits(block->hits));
}

void kv__block_settle(struct kv *kv, uint32_t index)
{
    struct block *block = &kv->blocks[index];
    struct pool *pool = kv->options.pool;
    if (!block->refs) {
        settle_unused(kv, index);
    } else if (block->list == KV_LEAVING_LIST) {
        return; // kv__write_backs_end will see
    } else if (block->active) {
        kv__list_remove(kv, index);
    } else if (block->object.bits) {
        if (pool_has_host_copy(pool, block->object)) // also when it was coming back
            pool_drop_device(pool, block->object);
        else if (pool_is_resident(pool, block->object) && block->list != KV_HELD)
            kv__list_append(kv, index, KV_HELD);
    }
}

void kv__block_release(struct kv *kv, uint32_t index, bool was_active)
{
    struct block *block = &kv->blocks[index];
    CHECK(block->is_live && block->refs && block->active >= was_active);
    block->refs--;
    block->active -= was_active;
    kv__block_settle(kv, index);
}

// ---- what the pool is offered ----

static bool cheapest(void *context, struct pool_offer *out)
{
    const struct kv *kv = context;
    const struct kv_shape *shape = &kv->options.shape;
    uint64_t now = clock_now_us(&kv->options.clock);
    float recompute_us = kv->options.recompute_us_per_token * (float)shape->block_tokens;
    size_t bytes = shape->pages_per_block * kv->options.page_bytes;
    bool found = false;
    for (uint32_t list = 0; list <= KV_HELD; list++) {
        uint32_t index = kv->lists[list].head;
        if (index == NONE)
            continue;
        const struct block *block = &kv->blocks[index];
        float price = list == KV_HELD
                          ? recompute_us / (float)bytes // a sequence will come back for it
                          : kv_price(least_hits(list), now - block->used_us, recompute_us, bytes);
        if (list != KV_HELD && !least_hits(list))
            price *= hit_share(kv);
        if (!found || price < out->price)
            *out = (struct pool_offer){block->object, price};
        found = true;
    }
    return found;
}

static void give_back(void *context, pool_object object)
{
    struct kv *kv = context;
    uint32_t index = (uint32_t)pool_tag(kv->options.pool, object);
    struct block *block = &kv->blocks[index];
    CHECK(block->is_live && block->object.bits == object.bits && !block->active);
    if (!block->refs) {
        block_free(kv, index);
        return;
    }
    // Only swapped sequences use it: they will find it lost.
    kv__list_remove(kv, index);
    if (block->is_indexed)
        kv__index_remove(kv, index);
    pool_object_destroy(kv->options.pool, object);
    block->object = (pool_object){0};
}

void kv__offer(struct kv *kv)
{
    struct pool_pressure pressure = {kv, cheapest, give_back};
    pool_set_pressure(kv->options.pool, PAGE_KV, &pressure);
}
