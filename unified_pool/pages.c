// SPDX-License-Identifier: Apache-2.0
// Pages of both tiers: which are free, which still wait for a copy or an epoch, whose bytes they
// hold, and the sums by kind and owner. It does not decide who gets a page.
//
// Every list is intrusive; nothing here walks the arena. The list of waiting pages is in the order
// of their epochs, because the last opened epoch only grows; so retiring looks at its head alone.
#include <string.h>

#include "unified_pool/internal.h"

uint8_t *pool__address(const struct pool *pool, enum tier_id tier, uint32_t page)
{
    return pool->tiers[tier].arena + (size_t)page * pool->options.page_bytes;
}

static void push_free(struct tier *tier, uint32_t page)
{
    tier->pages[page].state = PAGE_FREE;
    tier->pages[page].slot = NONE;
    tier->pages[page].next = tier->free_head;
    tier->free_head = page;
    tier->free++;
}

void pool__tier_init(struct tier *tier, uint32_t total, uint8_t *arena)
{
    tier->arena = arena;
    tier->total = total;
    tier->free_head = tier->wait_head = tier->wait_tail = NONE;
    tier->drop_head = tier->drop_tail = NONE;
    for (uint32_t i = total; i-- > 0;) {
        tier->pages[i].content_owner = CONTENT_UNKNOWN;
        tier->pages[i].kind = PAGE_KINDS;
        push_free(tier, i);
    }
}

// ---- droppable host copies, oldest first ----

static void drop_unlink(struct tier *tier, uint32_t page)
{
    struct page *p = &tier->pages[page];
    if (!p->listed)
        return;
    if (p->prev != NONE)
        tier->pages[p->prev].next = p->next;
    else
        tier->drop_head = p->next;
    if (p->next != NONE)
        tier->pages[p->next].prev = p->prev;
    else
        tier->drop_tail = p->prev;
    p->listed = false;
    tier->droppable--;
}

static void drop_append(struct tier *tier, uint32_t page)
{
    struct page *p = &tier->pages[page];
    p->next = NONE;
    p->prev = tier->drop_tail;
    if (tier->drop_tail != NONE)
        tier->pages[tier->drop_tail].next = page;
    else
        tier->drop_head = page;
    tier->drop_tail = page;
    p->listed = true;
    tier->droppable++;
}

static bool is_droppable(const struct pool *pool, uint32_t page)
{
    const struct page *p = &pool->tiers[TIER_HOST].pages[page];
    if (p->state != PAGE_OWNED || p->busy || !(pool->slot_flags[p->slot] & SLOT_ON_HOST))
        return false;
    const struct object *object = pool__object_of_slot(pool, p->slot);
    return object->file && !(object->is_fetching && !(pool->slot_flags[p->slot] & SLOT_FILLED));
}

void pool__host_settle(struct pool *pool, uint32_t page)
{
    struct tier *host = &pool->tiers[TIER_HOST];
    bool wanted = is_droppable(pool, page);
    if (wanted && !host->pages[page].listed)
        drop_append(host, page);
    else if (!wanted)
        drop_unlink(host, page);
}

void pool__host_touch(struct pool *pool, uint32_t page)
{
    struct tier *host = &pool->tiers[TIER_HOST];
    if (host->pages[page].listed) {
        drop_unlink(host, page);
        drop_append(host, page);
    }
}

// ---- taking ----

uint32_t pool__take(struct pool *pool, enum tier_id tier_id, uint32_t slot)
{
    struct tier *tier = &pool->tiers[tier_id];
    uint32_t page = tier->free_head;
    CHECK(page != NONE);
    struct page *p = &tier->pages[page];
    CHECK(p->state == PAGE_FREE && !p->busy && p->move == MOVE_NONE);
    struct object *object = pool__object_of_slot(pool, slot);
    tier->free_head = p->next;
    tier->free--;
    p->state = PAGE_OWNED;
    p->slot = slot;
    tier->by_kind[object->kind]++;
    if (tier_id == TIER_DEVICE) {
        CHECK(pool->device_page[slot] == NONE);
        pool->device_page[slot] = page;
        object->device++;
        pool->owner_pages[object->owner]++;
        if (p->kind != PAGE_KINDS && p->kind != object->kind)
            pool->taken_from[object->kind][p->kind]++;
    } else {
        CHECK(pool->host_page[slot] == NONE);
        pool->host_page[slot] = page;
        object->host++;
    }
    return page;
}

uint32_t pool__host_take(struct pool *pool, uint32_t slot)
{
    struct tier *host = &pool->tiers[TIER_HOST];
    if (!host->free) {
        if (host->drop_head == NONE)
            return NONE;
        pool__give(pool, TIER_HOST, host->drop_head);
    }
    uint32_t page = pool__take(pool, TIER_HOST, slot);
    host->pages[page].kind = pool__object_of_slot(pool, slot)->kind;
    return page;
}

// The page, just taken, will be written piece by piece: what it held must not show through. Bytes
// of the same owner and kind may stay: he wrote them, and as that kind they are valid numbers.
void pool__zero_for(struct pool *pool, uint32_t page, const struct object *object)
{
    struct page *p = &pool->tiers[TIER_DEVICE].pages[page];
    if (p->content_owner == object->owner && p->content_kind == object->kind)
        return;
    uint8_t *memory = pool__address(pool, TIER_DEVICE, page);
    if (pool->options.zero)
        pool->options.zero(pool->options.zero_context, memory, pool->options.page_bytes);
    else
        memset(memory, 0, pool->options.page_bytes);
    p->content_owner = object->owner;
    p->content_kind = object->kind;
}

// ---- giving back ----

static bool epoch_is_open(const struct pool *pool)
{
    return pool->epoch_oldest <= pool->epoch_last;
}

// No copy touches it any more.
static void retire_page(struct pool *pool, enum tier_id tier_id, uint32_t page)
{
    struct tier *tier = &pool->tiers[tier_id];
    struct page *p = &tier->pages[page];
    if (tier_id == TIER_HOST || !epoch_is_open(pool)) {
        tier->waiting--;
        push_free(tier, page);
        return;
    }
    p->state = PAGE_WAITING;
    p->epoch = pool->epoch_last;
    p->next = NONE;
    if (tier->wait_tail != NONE)
        tier->pages[tier->wait_tail].next = page;
    else
        tier->wait_head = page;
    tier->wait_tail = page;
}

void pool__give(struct pool *pool, enum tier_id tier_id, uint32_t page)
{
    struct tier *tier = &pool->tiers[tier_id];
    struct page *p = &tier->pages[page];
    CHECK(p->state == PAGE_OWNED);
    uint32_t slot = p->slot;
    struct object *object = pool__object_of_slot(pool, slot);
    uint8_t flag = tier_id == TIER_DEVICE ? SLOT_FILLED : SLOT_ON_HOST;
    uint32_t had = (pool->slot_flags[slot] & flag) != 0;
    pool->slot_flags[slot] &= (uint8_t)~flag;
    tier->by_kind[object->kind]--;
    if (tier_id == TIER_DEVICE) {
        pool->device_page[slot] = NONE;
        object->device--;
        object->filled -= had;
        pool->owner_pages[object->owner]--;
    } else {
        drop_unlink(tier, page);
        pool->host_page[slot] = NONE;
        object->host--;
        pool__on_host(pool, object, -(int32_t)had);
    }
    p->kind = object->kind;
    p->slot = NONE;
    p->state = PAGE_LEAVING;
    tier->waiting++;
    if (!p->busy)
        retire_page(pool, tier_id, page);
}

void pool__copy_left(struct pool *pool, enum tier_id tier_id, uint32_t page)
{
    struct page *p = &pool->tiers[tier_id].pages[page];
    CHECK(p->busy);
    if (--p->busy)
        return;
    if (p->state == PAGE_LEAVING)
        retire_page(pool, tier_id, page);
    else if (tier_id == TIER_HOST)
        pool__host_settle(pool, page);
}

void pool__release_epochs(struct pool *pool)
{
    struct tier *tier = &pool->tiers[TIER_DEVICE];
    while (tier->wait_head != NONE && tier->pages[tier->wait_head].epoch < pool->epoch_oldest) {
        uint32_t page = tier->wait_head;
        tier->wait_head = tier->pages[page].next;
        if (tier->wait_head == NONE)
            tier->wait_tail = NONE;
        tier->waiting--;
        push_free(tier, page);
    }
}
