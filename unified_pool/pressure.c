// SPDX-License-Identifier: Apache-2.0
// Making room: asks the kinds for their cheapest offers and takes the cheapest of all until enough
// pages are free or on their way. It does not know who is fair: prices do.
//
// While an epoch is open a page given back now is not room now. It is given back all the same, and
// counted as coming, so that the same request finds it free once the epoch has retired, and so that
// asking again before that gives nothing more away. When even everything that could be offered
// would not suffice, nothing is touched.
//
// A kind that has a limit (pool_set_limit) keeps to it first, with its own offers alone.
#include <math.h>

#include "unified_pool/internal.h"

// The cheapest of the kinds' offers; `known` caches those that were asked already.
static bool best_offer(struct pool *pool, struct pool_offer offers[PAGE_KINDS],
                       bool known[PAGE_KINDS], bool has[PAGE_KINDS], int *kind_out)
{
    int best = -1;
    for (int kind = 0; kind < PAGE_KINDS; kind++) {
        const struct pool_pressure *pressure = &pool->pressure[kind];
        if (!known[kind]) {
            has[kind] = pressure->cheapest && pressure->cheapest(pressure->context, &offers[kind]);
            known[kind] = true;
        }
        // A price that is not a number never wins against one that is.
        if (has[kind] && (best < 0 || offers[kind].price < offers[best].price ||
                          offers[best].price != offers[best].price))
            best = kind;
    }
    *kind_out = best;
    return best >= 0;
}

static void take_offer(struct pool *pool, int kind, pool_object handle)
{
    const struct object *object = pool__object(pool, handle);
    CHECK(object->kind == kind && object->device && object->evictable == object->device);
    uint32_t generation = object->generation;
    pool->give_backs++;
    pool->pressure[kind].give_back(pool->pressure[kind].context, handle);
    CHECK(object->generation != generation || !object->device);
}

enum status pool__make_room(struct pool *pool, uint32_t pages, float price_max)
{
    const struct tier *device = &pool->tiers[TIER_DEVICE];
    if (device->free >= pages)
        return STATUS_OK;
    if ((uint64_t)device->free + device->waiting + pool->evictable < pages)
        return STATUS_FULL;
    struct pool_offer offers[PAGE_KINDS];
    bool known[PAGE_KINDS] = {false}, has[PAGE_KINDS] = {false};
    while (device->free + device->waiting < pages) {
        int kind;
        if (!best_offer(pool, offers, known, has, &kind) || offers[kind].price > price_max)
            break;
        take_offer(pool, kind, offers[kind].object);
        known[kind] = false;
    }
    return device->free >= pages ? STATUS_OK : STATUS_FULL;
}

enum status pool_make_room(struct pool *pool, uint32_t pages)
{
    return pool__make_room(pool, pages, INFINITY);
}

enum status pool_make_room_within(struct pool *pool, uint32_t pages, float price_max)
{
    return pool__make_room(pool, pages, price_max);
}

// Its own kind gives back what `pages` more would take it above its limit.
static enum status keep_limit(struct pool *pool, uint8_t kind, uint32_t pages, float price_max)
{
    const uint32_t *held = &pool->tiers[TIER_DEVICE].by_kind[kind];
    const struct pool_pressure *pressure = &pool->pressure[kind];
    uint32_t limit = pool->limits[kind];
    if ((uint64_t)*held + pages > (uint64_t)limit + pool->evictable_of[kind])
        return STATUS_FULL;
    while ((uint64_t)*held + pages > limit) {
        struct pool_offer offer;
        if (!pressure->cheapest || !pressure->cheapest(pressure->context, &offer) ||
            offer.price > price_max)
            return STATUS_FULL;
        take_offer(pool, kind, offer.object);
    }
    return STATUS_OK;
}

enum status pool__reserve_pages(struct pool *pool, struct object *object, bool zero,
                                float price_max)
{
    enum status status = keep_limit(pool, object->kind, object->slots - object->device, price_max);
    if (!status)
        status = pool__make_room(pool, object->slots - object->device, price_max);
    if (status)
        return status;
    for (uint32_t s = object->first; s < object->first + object->slots; s++) {
        if (pool->device_page[s] != NONE)
            continue;
        uint32_t page = pool__take(pool, TIER_DEVICE, s);
        if (zero) {
            pool__zero_for(pool, page, object);
            pool->slot_flags[s] |= SLOT_FILLED;
            object->filled++;
        }
    }
    pool__recount(pool, object);
    return STATUS_OK;
}

enum status pool_reserve(struct pool *pool, pool_object handle)
{
    struct object *object = pool__object(pool, handle);
    CHECK(!object->is_fetching);
    return pool__reserve_pages(pool, object, true, INFINITY);
}
