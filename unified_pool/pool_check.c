// SPDX-License-Identifier: Apache-2.0
// Every invariant of pool.h and internal.h, by walking everything. For debug builds, tests and the
// simulator, once a step.
#include "unified_pool/internal.h"

static void check_lists(const struct tier *tier)
{
    uint32_t count = 0;
    for (uint32_t at = tier->free_head; at != NONE; at = tier->pages[at].next) {
        CHECK(tier->pages[at].state == PAGE_FREE && count < tier->total);
        count++;
    }
    CHECK(count == tier->free);
    uint64_t epoch = 0;
    for (uint32_t at = tier->wait_head; at != NONE; at = tier->pages[at].next) {
        CHECK(tier->pages[at].state == PAGE_WAITING && tier->pages[at].epoch >= epoch);
        epoch = tier->pages[at].epoch;
    }
    uint32_t prev = NONE;
    count = 0;
    for (uint32_t at = tier->drop_head; at != NONE; at = tier->pages[at].next) {
        CHECK(tier->pages[at].listed && tier->pages[at].prev == prev);
        prev = at;
        count++;
    }
    CHECK(count == tier->droppable && tier->drop_tail == prev);
}

static void check_owned(const struct pool *pool, enum tier_id tier, uint32_t index)
{
    const struct page *page = &pool->tiers[tier].pages[index];
    CHECK(page->slot < pool->options.slots_max && pool->slot_object[page->slot] != NONE);
    const struct object *object = pool__object_of_slot(pool, page->slot);
    CHECK(object->is_live);
    CHECK((tier == TIER_DEVICE ? pool->device_page : pool->host_page)[page->slot] == index);
    if (page->move == MOVE_READ || page->move == MOVE_UP)
        CHECK(object->is_fetching);
    if (page->move == MOVE_DOWN)
        CHECK(object->is_writing);
    if (tier == TIER_DEVICE) {
        if (pool->slot_flags[page->slot] & SLOT_FILLED)
            CHECK(page->content_owner == object->owner && page->content_kind == object->kind &&
                  page->move == MOVE_NONE);
        return;
    }
    bool holds = pool->slot_flags[page->slot] & SLOT_ON_HOST;
    bool awaited = object->is_fetching && !(pool->slot_flags[page->slot] & SLOT_FILLED);
    if (holds)
        CHECK(page->move == MOVE_NONE);
    if (page->listed)
        CHECK(holds && !page->busy && object->file);
    if (holds && !page->busy && object->file && !awaited)
        CHECK(page->listed);
}

static void check_tier(const struct pool *pool, enum tier_id id)
{
    const struct tier *tier = &pool->tiers[id];
    uint32_t by_state[4] = {0}, by_kind[PAGE_KINDS] = {0};
    check_lists(tier);
    for (uint32_t i = 0; i < tier->total; i++) {
        const struct page *page = &tier->pages[i];
        by_state[page->state]++;
        CHECK(page->move == MOVE_NONE || page->busy);
        CHECK(page->state != PAGE_OWNED ? page->slot == NONE && !page->listed : true);
        if (page->state == PAGE_OWNED) {
            check_owned(pool, id, i);
            by_kind[pool__object_of_slot(pool, page->slot)->kind]++;
        } else if (page->state == PAGE_LEAVING) {
            CHECK(page->busy);
        } else {
            CHECK(!page->busy);
        }
        if (page->state == PAGE_WAITING)
            CHECK(page->epoch >= pool->epoch_oldest && page->epoch <= pool->epoch_last);
    }
    CHECK(by_state[PAGE_FREE] == tier->free);
    CHECK(by_state[PAGE_LEAVING] + by_state[PAGE_WAITING] == tier->waiting);
    CHECK(by_state[PAGE_FREE] + by_state[PAGE_OWNED] + tier->waiting == tier->total);
    for (int k = 0; k < PAGE_KINDS; k++)
        CHECK(by_kind[k] == tier->by_kind[k]);
}

static void check_object(const struct pool *pool, const struct object *object)
{
    uint32_t device = 0, filled = 0, host = 0, on_host = 0;
    for (uint32_t s = object->first; s < object->first + object->slots; s++) {
        CHECK(pool->slot_object[s] == (uint32_t)(object - pool->objects));
        device += pool->device_page[s] != NONE;
        host += pool->host_page[s] != NONE;
        filled += (pool->slot_flags[s] & SLOT_FILLED) != 0;
        on_host += (pool->slot_flags[s] & SLOT_ON_HOST) != 0;
    }
    CHECK(device == object->device && filled == object->filled);
    CHECK(host == object->host && on_host == object->on_host);
    CHECK(filled <= device && on_host <= host);
    CHECK(device == 0 || device == object->slots);
    if (object->pins)
        CHECK(filled == object->slots);
    CHECK(!(object->is_fetching && object->is_writing));
    if (object->is_fetching)
        CHECK(device == object->slots && filled < object->slots);
    else
        CHECK(filled == device);
    if (object->is_writing)
        CHECK(host == object->slots && on_host < object->slots && filled == object->slots);
    if (!object->is_fetching && !object->is_writing)
        CHECK(host == on_host);
    bool can_go = !object->pins && !object->is_fetching && !object->is_writing;
    CHECK(object->evictable == (can_go ? device : 0));
}

static void check_stalled(const struct pool *pool)
{
    uint32_t count = 0;
    for (int r = 0; r < COPY_RANKS; r++)
        for (uint32_t at = pool->stalled[r].head; at != NONE; at = pool->objects[at].next) {
            const struct object *object = &pool->objects[at];
            CHECK(object->is_live && object->is_stalled && object->rank == r);
            CHECK(object->is_fetching || object->is_writing);
            count++;
        }
    CHECK(count == pool->stalled_count);
}

static void check_owners(const struct pool *pool)
{
    uint32_t sum = 0, pages = 0;
    for (uint32_t o = 0; o < pool->options.owners_max; o++)
        sum += pool->owner_pages[o];
    for (int k = 0; k < PAGE_KINDS; k++)
        pages += pool->tiers[TIER_DEVICE].by_kind[k];
    CHECK(sum == pages);
    for (uint32_t o = 0; o < pool->options.owners_max && o < 64; o++) {
        uint32_t mine = 0;
        for (uint32_t i = 0; i < pool->options.objects_max; i++)
            if (pool->objects[i].is_live && pool->objects[i].owner == o)
                mine += pool->objects[i].device;
        CHECK(mine == pool->owner_pages[o]);
    }
}

void pool_check(const struct pool *pool)
{
    uint32_t live = 0, evictable = 0, slots = 0, of_kind[PAGE_KINDS] = {0};
    uint64_t on_host = 0, of_groups = 0;
    for (int t = 0; t < TIERS; t++)
        check_tier(pool, (enum tier_id)t);
    for (uint32_t i = 0; i < pool->options.objects_max; i++) {
        const struct object *object = &pool->objects[i];
        if (!object->is_live)
            continue;
        check_object(pool, object);
        live++;
        slots += object->slots;
        evictable += object->evictable;
        on_host += object->on_host;
        of_groups += object->group_on_host;
        CHECK(pool->objects[object->head].head == object->head);
        of_kind[object->kind] += object->evictable;
    }
    for (int kind = 0; kind < PAGE_KINDS; kind++)
        CHECK(of_kind[kind] == pool->evictable_of[kind]);
    CHECK(on_host == of_groups && live == pool->objects_live && evictable == pool->evictable);
    CHECK(pool->epoch_oldest >= 1 && pool->epoch_oldest <= pool->epoch_last + 1);
    pool__runs_check(&pool->runs, slots);
    check_stalled(pool);
    check_owners(pool);
}
