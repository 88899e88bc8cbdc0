// SPDX-License-Identifier: Apache-2.0
// Fetches and write-backs: which copy each slot needs next, what happens when one is done or fails.
//
// A fetch, per slot:       file --MOVE_READ--> host page --MOVE_UP--> device page (SLOT_FILLED)
//                                 (a slot that is on the host starts at the second arrow)
// A write-back, per slot:  device page --MOVE_DOWN--> host page (SLOT_ON_HOST)
//
// pump() starts what can be started, from object->cursor on; an object that lacks a host page or
// room in a copy queue is stalled, in the list of its rank, and pumped again at every poll, the
// most urgent first.
//
// Invariants
//   1. A copy whose page is OWNED belongs to an object that is fetching (READ, UP) or writing
//   (DOWN).
//   2. Abandoning gives the pages back first and cancels the copies after, so that the cancelled
//   copy's
//      callback, which may come at once, finds a page nobody waits for.
//   3. A fetch or write-back ends as a whole: all slots, or none of its device (host) pages stay.
#include <math.h>

#include "unified_pool/internal.h"

static const enum copy_resource move_resource[] = {
    [MOVE_READ] = COPY_READ, [MOVE_UP] = COPY_H2D, [MOVE_DOWN] = COPY_D2H};

static enum tier_id destination_of(enum page_move move)
{
    return move == MOVE_UP ? TIER_DEVICE : TIER_HOST;
}

// ---- stalled objects ----

static void unstall(struct pool *pool, struct object *object)
{
    if (!object->is_stalled)
        return;
    struct stall_list *list = &pool->stalled[object->rank];
    if (object->prev != NONE)
        pool->objects[object->prev].next = object->next;
    else
        list->head = object->next;
    if (object->next != NONE)
        pool->objects[object->next].prev = object->prev;
    else
        list->tail = object->prev;
    object->is_stalled = false;
    pool->stalled_count--;
}

static void stall(struct pool *pool, struct object *object)
{
    if (object->is_stalled)
        return;
    uint32_t index = (uint32_t)(object - pool->objects);
    struct stall_list *list = &pool->stalled[object->rank];
    object->next = NONE;
    object->prev = list->tail;
    if (list->tail != NONE)
        pool->objects[list->tail].next = index;
    else
        list->head = index;
    list->tail = index;
    object->is_stalled = true;
    pool->stalled_count++;
}

static void set_urgency(struct object *object, enum copy_class class, enum copy_need need)
{
    object->class = (uint8_t) class;
    object->need = (uint8_t)need;
    object->rank = (uint8_t)copy__rank(class, need);
}

// ---- starting copies ----

static void moved(void *context, uint64_t tag, enum status status);

static enum status submit(struct pool *pool, struct object *object, uint32_t slot,
                          enum page_move move)
{
    uint32_t device = pool->device_page[slot], host = pool->host_page[slot];
    uint32_t to = move == MOVE_UP ? device : host;
    struct page *page = &pool->tiers[destination_of(move)].pages[to];
    CHECK(page->move == MOVE_NONE && !page->busy);
    struct copy_request request = {
        .whole = {.resource = move_resource[move],
                  .to = pool__address(pool, destination_of(move), to),
                  .bytes = pool->options.page_bytes},
        .class = (enum copy_class)object->class,
        .need = (enum copy_need)object->need,
        .owner = object->owner,
        .done = moved,
        .context = pool,
        .tag = (uint64_t)move << 32 | to,
    };
    if (move == MOVE_READ) {
        request.whole.file = object->file;
        request.whole.offset =
            object->file_offset + (uint64_t)(slot - object->first) * pool->options.page_bytes;
    } else if (move == MOVE_UP) {
        request.whole.from = pool__address(pool, TIER_HOST, host);
    } else {
        request.whole.from = pool__address(pool, TIER_DEVICE, device);
    }
    enum status status = copy_submit(pool->options.copies, &request, &page->copy);
    if (status)
        return status;
    page->move = (uint8_t)move;
    page->busy++;
    page->partner = NONE;
    if (move == MOVE_UP) {
        page->content_owner = CONTENT_UNKNOWN; // until the copy is whole
        page->partner = host;
        pool->tiers[TIER_HOST].pages[host].busy++;
        pool__host_settle(pool, host);
    } else if (move == MOVE_DOWN) {
        page->partner = device;
        pool->tiers[TIER_DEVICE].pages[device].busy++;
    }
    return STATUS_OK;
}

static bool pump_fetch_slot(struct pool *pool, struct object *object, uint32_t slot)
{
    uint32_t device = pool->device_page[slot];
    if (pool->slot_flags[slot] & SLOT_FILLED ||
        pool->tiers[TIER_DEVICE].pages[device].move != MOVE_NONE)
        return true;
    if (pool->slot_flags[slot] & SLOT_ON_HOST)
        return submit(pool, object, slot, MOVE_UP) == STATUS_OK;
    if (pool->host_page[slot] == NONE && pool__host_take(pool, slot) == NONE)
        return false;
    if (pool->tiers[TIER_HOST].pages[pool->host_page[slot]].move != MOVE_NONE)
        return true;
    return submit(pool, object, slot, MOVE_READ) == STATUS_OK;
}

static bool pump_write_slot(struct pool *pool, struct object *object, uint32_t slot)
{
    if (pool->slot_flags[slot] & SLOT_ON_HOST ||
        pool->tiers[TIER_HOST].pages[pool->host_page[slot]].move != MOVE_NONE)
        return true;
    return submit(pool, object, slot, MOVE_DOWN) == STATUS_OK;
}

// Starts every copy that can be started; stalls the object when some cannot.
static void pump(struct pool *pool, struct object *object)
{
    for (; object->cursor < object->slots; object->cursor++) {
        uint32_t slot = object->first + object->cursor;
        bool started = object->is_fetching ? pump_fetch_slot(pool, object, slot)
                                           : pump_write_slot(pool, object, slot);
        if (!started) {
            stall(pool, object);
            return;
        }
    }
    unstall(pool, object);
}

// When no copy is under way nothing will ever bring a host page: the least urgent fetch gives up.
static void break_deadlock(struct pool *pool)
{
    if (!pool->stalled_count || !copy_is_idle(pool->options.copies))
        return;
    for (int r = COPY_RANKS - 1; r >= 0; r--)
        if (pool->stalled[r].tail != NONE) {
            struct object *object = &pool->objects[pool->stalled[r].tail];
            CHECK(object->is_fetching);
            pool__fetch_abandon(pool, object, STATUS_FULL);
            return;
        }
}

void pool__pump_all(struct pool *pool)
{
    for (int r = 0; r < COPY_RANKS; r++)
        for (uint32_t at = pool->stalled[r].head; at != NONE;) {
            uint32_t next = pool->objects[at].next;
            pump(pool, &pool->objects[at]);
            at = next;
        }
    break_deadlock(pool);
}

// ---- copies that ended ----

static void read_done(struct pool *pool, struct object *object, uint32_t slot)
{
    pool__on_host(pool, object, 1);
    pool->slot_flags[slot] |= SLOT_ON_HOST;
    if (submit(pool, object, slot, MOVE_UP) == STATUS_OK)
        return;
    uint32_t place = slot - object->first;
    if (place < object->cursor)
        object->cursor = place;
    stall(pool, object);
}

static void up_done(struct pool *pool, struct object *object, uint32_t page, uint32_t slot)
{
    pool->tiers[TIER_DEVICE].pages[page].content_owner = object->owner;
    pool->tiers[TIER_DEVICE].pages[page].content_kind = object->kind;
    pool->slot_flags[slot] |= SLOT_FILLED;
    if (++object->filled < object->slots)
        return;
    object->is_fetching = false;
    pool->fetches++;
    pool->fetches_ended++;
    unstall(pool, object);
    pool__recount(pool, object);
}

static void down_done(struct pool *pool, struct object *object, uint32_t slot)
{
    pool->slot_flags[slot] |= SLOT_ON_HOST;
    pool__on_host(pool, object, 1);
    if (object->on_host < object->slots)
        return;
    object->is_writing = false;
    pool->write_backs++;
    unstall(pool, object);
    pool__recount(pool, object);
}

static void moved(void *context, uint64_t tag, enum status status)
{
    struct pool *pool = context;
    enum page_move move = (enum page_move)(tag >> 32);
    enum tier_id tier = destination_of(move);
    uint32_t index = (uint32_t)tag;
    struct page *page = &pool->tiers[tier].pages[index];
    CHECK(page->move == move);
    uint32_t slot = page->slot, partner = page->partner;
    bool is_wanted = page->state == PAGE_OWNED;
    page->move = MOVE_NONE;
    page->busy--;
    if (is_wanted) {
        struct object *object = pool__object_of_slot(pool, slot);
        CHECK(move == MOVE_DOWN ? object->is_writing : object->is_fetching);
        if (status && move == MOVE_DOWN)
            pool__write_abandon(pool, object);
        else if (status)
            pool__fetch_abandon(pool, object, status);
        else if (move == MOVE_READ)
            read_done(pool, object, slot);
        else if (move == MOVE_UP)
            up_done(pool, object, index, slot);
        else
            down_done(pool, object, slot);
    } else {
        page->busy++; // the page itself leaves like its partner
        pool__copy_left(pool, tier, index);
    }
    if (partner != NONE)
        pool__copy_left(pool, tier == TIER_DEVICE ? TIER_HOST : TIER_DEVICE, partner);
    if (is_wanted && tier == TIER_HOST)
        pool__host_settle(pool, index);
}

// ---- giving up ----

static copy_id copy_into(const struct pool *pool, enum tier_id tier, uint32_t page)
{
    const struct page *p = &pool->tiers[tier].pages[page];
    return p->move == MOVE_NONE ? (copy_id){0} : p->copy;
}

static void give_and_cancel(struct pool *pool, enum tier_id tier, uint32_t page)
{
    copy_id copy = copy_into(pool, tier, page);
    pool__give(pool, tier, page);
    if (copy.bits)
        copy_cancel(pool->options.copies, copy);
}

void pool__fetch_abandon(struct pool *pool, struct object *object, enum status status)
{
    object->is_fetching = false;
    object->fetch_status = status;
    pool->fetches_ended++;
    if (status != STATUS_CANCELLED)
        pool->fetch_failures++;
    unstall(pool, object);
    for (uint32_t s = object->first; s < object->first + object->slots; s++) {
        if (pool->device_page[s] != NONE)
            give_and_cancel(pool, TIER_DEVICE, pool->device_page[s]);
        uint32_t host = pool->host_page[s];
        if (host == NONE)
            continue;
        if (pool->slot_flags[s] & SLOT_ON_HOST)
            pool__host_settle(pool, host);
        else
            give_and_cancel(pool, TIER_HOST, host);
    }
    pool__recount(pool, object);
}

void pool__write_abandon(struct pool *pool, struct object *object)
{
    object->is_writing = false;
    unstall(pool, object);
    for (uint32_t s = object->first; s < object->first + object->slots; s++) {
        uint32_t host = pool->host_page[s];
        if (host != NONE && !(object->file && pool->slot_flags[s] & SLOT_ON_HOST))
            give_and_cancel(pool, TIER_HOST, host);
    }
    pool__recount(pool, object);
}

void pool__drop_device(struct pool *pool, struct object *object)
{
    CHECK(!object->pins);
    if (object->is_fetching)
        pool__fetch_abandon(pool, object, STATUS_CANCELLED);
    if (object->is_writing)
        pool__write_abandon(pool, object);
    if (!object->device)
        return;
    for (uint32_t s = object->first; s < object->first + object->slots; s++) {
        if (pool->host_page[s] != NONE)
            pool__host_touch(pool, pool->host_page[s]); // now the only fast copy
        if (pool->device_page[s] != NONE)
            pool__give(pool, TIER_DEVICE, pool->device_page[s]);
    }
    pool__recount(pool, object);
}

void pool__drop_host(struct pool *pool, struct object *object)
{
    if (object->is_fetching)
        pool__fetch_abandon(pool, object, STATUS_CANCELLED);
    if (object->is_writing)
        pool__write_abandon(pool, object);
    if (!object->host)
        return;
    for (uint32_t s = object->first; s < object->first + object->slots; s++)
        if (pool->host_page[s] != NONE)
            pool__give(pool, TIER_HOST, pool->host_page[s]);
}

// ---- what callers ask for ----

static void promote(struct pool *pool, struct object *object, enum copy_class class,
                    enum copy_need need)
{
    if (copy__rank(class, need) >= object->rank)
        return;
    bool was_stalled = object->is_stalled;
    unstall(pool, object);
    set_urgency(object, class, need);
    if (was_stalled)
        stall(pool, object);
    for (uint32_t s = object->first; s < object->first + object->slots; s++) {
        uint32_t device = pool->device_page[s], host = pool->host_page[s];
        copy_id up = device == NONE ? (copy_id){0} : copy_into(pool, TIER_DEVICE, device);
        copy_id to_host = host == NONE ? (copy_id){0} : copy_into(pool, TIER_HOST, host);
        if (up.bits)
            copy_promote(pool->options.copies, up, class, need);
        if (to_host.bits)
            copy_promote(pool->options.copies, to_host, class, need);
    }
}

static bool host_page_will_come(const struct pool *pool)
{
    const struct tier *host = &pool->tiers[TIER_HOST];
    return host->free || host->droppable || (host->total && !copy_is_idle(pool->options.copies));
}

enum status pool_fetch(struct pool *pool, pool_object handle, enum copy_class class,
                       enum copy_need need)
{
    return pool_fetch_within(pool, handle, class, need, INFINITY);
}

enum status pool_fetch_within(struct pool *pool, pool_object handle, enum copy_class class,
                              enum copy_need need, float price_max)
{
    struct object *object = pool__object(pool, handle);
    if (object->filled == object->slots)
        return STATUS_OK;
    if (object->is_fetching) {
        promote(pool, object, class, need);
        return STATUS_OK;
    }
    if (object->on_host < object->slots) {
        if (!object->file)
            return STATUS_NOT_FOUND;
        if (!host_page_will_come(pool))
            return STATUS_FULL;
    }
    enum status status = pool__reserve_pages(pool, object, false, price_max);
    if (status)
        return status;
    set_urgency(object, class, need);
    object->fetch_status = STATUS_OK;
    object->is_fetching = true;
    object->cursor = 0;
    pool__recount(pool, object);
    pump(pool, object);
    return STATUS_OK;
}

void pool_fetch_cancel(struct pool *pool, pool_object handle)
{
    struct object *object = pool__object(pool, handle);
    if (object->is_fetching)
        pool__fetch_abandon(pool, object, STATUS_CANCELLED);
}

void pool_drop_device(struct pool *pool, pool_object handle)
{
    pool__drop_device(pool, pool__object(pool, handle));
}

void pool_drop_host(struct pool *pool, pool_object handle)
{
    pool__drop_host(pool, pool__object(pool, handle));
}

enum status pool_write_back(struct pool *pool, pool_object handle, enum copy_class class)
{
    struct object *object = pool__object(pool, handle);
    CHECK(object->filled == object->slots);
    if (object->on_host == object->slots)
        return STATUS_OK;
    if (object->is_writing) {
        promote(pool, object, class, COPY_KV);
        return STATUS_OK;
    }
    const struct tier *host = &pool->tiers[TIER_HOST];
    uint32_t wanted = object->slots - object->host;
    if ((uint64_t)host->free + host->droppable < (uint64_t)wanted + pool->host_kept)
        return STATUS_FULL;
    for (uint32_t s = object->first; s < object->first + object->slots; s++)
        if (pool->host_page[s] == NONE)
            CHECK(pool__host_take(pool, s) != NONE);
    set_urgency(object, class, COPY_KV);
    object->is_writing = true;
    object->cursor = 0;
    pool__recount(pool, object);
    pump(pool, object);
    return STATUS_OK;
}
