// SPDX-License-Identifier: Apache-2.0
// Parts: the pages of an adapter behind its trunk, which hold the slices of single experts. Each is
// a pool object of its own, so that of an adapter of a gigabyte only what tokens touch has to be on
// the device. A part is known by its slot in the pool.
//
//   ABSENT --adapter_fetch_parts, adapters_gate_bring--> FETCHING --settle--> RESIDENT
//   FETCHING --settle (failed, cancelled)--> ABSENT;  RESIDENT --give_back, unload--> ABSENT
//
// When a gate waits for a page that cannot be read, the adapter is broken until its last user has
// left: the engine goes on as if its rows had no adapter, and ends the requests that use it.
//
// Who goes first under pressure: the part that was not used for longest. Kernels mark the pages
// that they find (moe.h), in device memory; once a step the marks are copied to the host and
// cleared (adapters_record_used, adapters_take_used), so they lag by a step. Unused for n steps,
// the probability of a use within the next H is H / (H + n): a Poisson process of unknown rate,
// with the prior 1 / rate, of which nothing was seen for n since its last event. Steps, not
// seconds, as for experts (experts/policy.c), so that the two compare at any speed of the machine.
//
// Invariants: 1. `fetching` lists exactly the parts in state FETCHING; settle alone reads how a
// fetch ended. 2. a part that is RESIDENT, not held and of no kept adapter stands in its adapter's
// list, by last use (after an unpin: by place). 3. the device's page table agrees with the states,
// but for the parts in `dirty`; the flush writes those. 4. held parts are pinned from when they are
// resident to adapters_gate_done.
#include "adapters/internal.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "base/check.h"

enum { PART_ABSENT, PART_FETCHING, PART_RESIDENT };
// Pages that are on their way ahead of need, at most, and that are made room for at once. Pages of
// a step in flight are room only when it has retired: what one step leaves has to keep the link
// busy through the next. 1 GiB of 512 KiB pages, 20 ms of a PCIe 5 link.
enum { AHEAD_MAX = 2048 };

// ---- life ----

enum status adapter__parts_create(struct adapters *adapters, const struct pool_stats *pool)
{
    struct parts *p = &adapters->parts;
    struct device *device = adapters->options.device;
    if (!adapters->options.base.experts)
        return STATUS_OK;
    p->part = calloc(pool->slots_max, sizeof *p->part);
    p->dirty = calloc(pool->slots_max, sizeof *p->dirty);
    p->fetching = calloc(pool->device_total, sizeof *p->fetching);
    p->held = calloc(pool->device_total, sizeof *p->held);
    p->of_page = calloc(pool->device_total, sizeof *p->of_page);
    p->rich = calloc(adapters->options.adapters_max, sizeof *p->rich);
    if (!p->part || !p->dirty || !p->fetching || !p->held || !p->of_page || !p->rich)
        return STATUS_NO_MEMORY;
    p->pages = pool->device_total;
    enum status status = device->table->alloc(device, p->pages, (void **)&p->used);
    return status ? status : device->table->alloc_host(device, p->pages, (void **)&p->used_host);
}

void adapter__parts_destroy(struct adapters *adapters)
{
    struct parts *p = &adapters->parts;
    struct device *device = adapters->options.device;
    if (p->used)
        device->table->release(device, p->used);
    if (p->used_host)
        device->table->release_host(device, p->used_host);
    free(p->part);
    free(p->dirty);
    free(p->fetching);
    free(p->held);
    free(p->of_page);
    free(p->rich);
}

// ---- the lists: what may be offered, of each adapter the longest unused first ----

static void rich_change(struct adapters *adapters, struct adapter *adapter)
{
    struct parts *p = &adapters->parts;
    bool has = adapter->head != NO_PLACE;
    if (has == (adapter->rich != NO_PLACE))
        return;
    if (has) {
        adapter->rich = p->rich_count;
        p->rich[p->rich_count++] = (uint32_t)(adapter - adapters->slots);
    } else {
        uint32_t last = p->rich[--p->rich_count];
        p->rich[adapter->rich] = last;
        adapters->slots[last].rich = adapter->rich;
        adapter->rich = NO_PLACE;
    }
}

static void list_remove(struct adapters *adapters, uint32_t at)
{
    struct part *part = &adapters->parts.part[at];
    struct adapter *adapter = &adapters->slots[part->adapter];
    if (!part->listed)
        return;
    if (part->previous != NO_PLACE)
        adapters->parts.part[part->previous].next = part->next;
    else
        adapter->head = part->next;
    if (part->next != NO_PLACE)
        adapters->parts.part[part->next].previous = part->previous;
    else
        adapter->tail = part->previous;
    part->listed = false;
    rich_change(adapters, adapter);
}

// To the end that was used last, if it may be offered at all.
static void list_add(struct adapters *adapters, uint32_t at)
{
    struct part *part = &adapters->parts.part[at];
    struct adapter *adapter = &adapters->slots[part->adapter];
    list_remove(adapters, at);
    if (part->state != PART_RESIDENT || part->held || adapter->keeper != NO_PLACE)
        return;
    part->previous = adapter->tail;
    part->next = NO_PLACE;
    if (adapter->tail != NO_PLACE)
        adapters->parts.part[adapter->tail].next = at;
    else
        adapter->head = at;
    adapter->tail = at;
    part->listed = true;
    rich_change(adapters, adapter);
}

// ---- states ----

// The page table has to say something else of it at the next flush.
static void mark_dirty(struct parts *p, uint32_t at)
{
    struct part *part = &p->part[at];
    if (part->dirty || (part->state != PART_RESIDENT && !part->shown))
        return;
    part->dirty = true;
    p->dirty[p->dirty_count++] = at;
}

static void pin_if_held(struct adapters *adapters, struct part *part)
{
    if (!part->held || part->pinned || part->state != PART_RESIDENT)
        return;
    pool_pin(adapters->options.pool, part->object);
    part->pinned = true;
}

static void arrived(struct adapters *adapters, uint32_t at)
{
    struct parts *p = &adapters->parts;
    struct part *part = &p->part[at];
    part->state = PART_RESIDENT;
    part->used_step = p->step;
    p->of_page[*pool_device_pages(adapters->options.pool, part->object)] = at;
    p->resident++;
    adapters->slots[part->adapter].parts_resident++;
    adapters->slots[part->adapter].loads.part_pages++;
    adapters->loads.part_pages++;
    p->gate_arrived += part->held;
    mark_dirty(p, at);
    pin_if_held(adapters, part);
    list_add(adapters, at);
}

static void did_not_arrive(struct adapters *adapters, uint32_t at)
{
    struct part *part = &adapters->parts.part[at];
    enum status status = pool_fetch_status(adapters->options.pool, part->object);
    struct adapter *adapter = &adapters->slots[part->adapter];
    part->state = PART_ABSENT;
    if (status == STATUS_FULL || status == STATUS_CANCELLED || !status)
        return;
    adapter->part_status = STATUS_IO;
    adapter->broken |= part->held;
}

static void settle(struct adapters *adapters)
{
    struct parts *p = &adapters->parts;
    struct pool *pool = adapters->options.pool;
    uint64_t ended = pool_fetches_ended(pool);
    if (ended == p->ended)
        return;
    p->ended = ended;
    for (uint32_t i = 0; i < p->fetching_count;) {
        uint32_t at = p->fetching[i];
        if (pool_is_fetching(pool, p->part[at].object)) {
            i++;
            continue;
        }
        p->fetching[i] = p->fetching[--p->fetching_count];
        adapters->slots[p->part[at].adapter].parts_coming--;
        if (pool_is_resident(pool, p->part[at].object))
            arrived(adapters, at);
        else
            did_not_arrive(adapters, at);
    }
}

static void leave(struct adapters *adapters, uint32_t at)
{
    struct parts *p = &adapters->parts;
    struct part *part = &p->part[at];
    CHECK(part->state == PART_RESIDENT && !part->held);
    list_remove(adapters, at);
    part->state = PART_ABSENT;
    p->resident--;
    adapters->slots[part->adapter].parts_resident--;
    mark_dirty(p, at);
    pool_drop_device(adapters->options.pool, part->object);
}

// ---- registration ----

void adapter__parts_begin(struct adapters *adapters, struct adapter *adapter,
                          const pool_object *objects)
{
    struct parts *p = &adapters->parts;
    uint32_t slot = (uint32_t)(adapter - adapters->slots);
    adapter->head = adapter->tail = adapter->rich = NO_PLACE;
    adapter->likely_step = UINT64_MAX;
    adapter->first_part =
        adapter->part_count ? pool_first_slot(adapters->options.pool, objects[0]) : NO_PLACE;
    for (uint32_t i = 0; i < adapter->part_count; i++)
        p->part[adapter->first_part + i] = (struct part){.object = objects[i], .adapter = slot};
}

bool adapter__parts_end(struct adapters *adapters, struct adapter *adapter)
{
    struct parts *p = &adapters->parts;
    struct pool *pool = adapters->options.pool;
    bool is_read = false;
    settle(adapters);
    for (uint32_t i = 0; i < adapter->part_count; i++) {
        uint32_t at = adapter->first_part + i;
        struct part *part = &p->part[at];
        CHECK(!part->held);
        // After a fetch that failed or was cancelled a read may still be under way.
        is_read |= part->state == PART_FETCHING || pool_fetch_status(pool, part->object);
        list_remove(adapters, at);
        p->resident -= part->state == PART_RESIDENT;
        pool_object_destroy(pool, part->object);
        part->object.bits = 0;
        part->state = PART_ABSENT;
    }
    for (uint32_t i = 0; i < p->fetching_count;)
        if (p->part[p->fetching[i]].object.bits)
            i++;
        else
            p->fetching[i] = p->fetching[--p->fetching_count];
    for (uint32_t i = 0; i < p->dirty_count;)
        if (p->part[p->dirty[i]].object.bits)
            i++;
        else
            p->dirty[i] = p->dirty[--p->dirty_count];
    return is_read;
}

// ---- pressure ----

// Once a step, and when the first user comes or the last one goes (likely_step is forgotten then).
static float likely(struct adapters *adapters, struct adapter *adapter)
{
    if (adapter->likely_step != adapters->parts.step) {
        uint64_t now = clock_now_us(&adapters->options.clock);
        adapter->likely = adapter->users ? 1.0f : (float)adapter__idle_likely(&adapter->heat, now);
        adapter->likely_step = adapters->parts.step;
    }
    return adapter->likely;
}

bool adapter__parts_cheapest(struct adapters *adapters, struct pool_offer *out)
{
    struct parts *p = &adapters->parts;
    for (uint32_t i = 0; i < p->rich_count; i++) {
        struct adapter *adapter = &adapters->slots[p->rich[i]];
        const struct part *part = &p->part[adapter->head];
        float price = likely(adapters, adapter) * adapters->options.fetch_us_per_byte *
                      adapter__part_likely(p->step - part->used_step);
        if (!i || price < out->price)
            *out = (struct pool_offer){.object = part->object, .price = price};
    }
    return p->rich_count;
}

void adapter__part_give_back(struct adapters *adapters, pool_object object)
{
    adapters->parts.given_back++;
    leave(adapters, pool_first_slot(adapters->options.pool, object));
}

// ---- fetching ahead ----

static enum status fetch(struct adapters *adapters, uint32_t at, enum copy_class class,
                         enum copy_need need, float price_max)
{
    struct parts *p = &adapters->parts;
    struct part *part = &p->part[at];
    enum status status =
        pool_fetch_within(adapters->options.pool, part->object, class, need, price_max);
    if (status || part->state == PART_FETCHING)
        return status;
    part->state = PART_FETCHING;
    p->fetching[p->fetching_count++] = at;
    adapters->slots[part->adapter].parts_coming++;
    return STATUS_OK;
}

// Room for some of `pages` more; false when there is none. *later: but there will be, when segments
// have retired.
static bool room(struct adapters *adapters, uint32_t pages, float price_max, bool *later)
{
    struct pool *pool = adapters->options.pool;
    struct pool_stats stats;
    pool_stats(pool, &stats);
    if (stats.device_free)
        return true;
    if (pool_make_room_within(pool, pages < AHEAD_MAX ? pages : AHEAD_MAX, price_max))
        pool_stats(pool, &stats);
    else
        return true;
    *later = stats.device_waiting;
    return stats.device_free;
}

bool adapter_fetch_parts(struct adapters *adapters, adapter_id id, enum copy_class class,
                         float likely, uint32_t *next)
{
    struct adapter *adapter = adapter__of(adapters, id);
    // Half of what it is worth: what running adapters have used a moment ago stays.
    float price_max = 0.5f * likely * adapters->options.fetch_us_per_byte;
    settle(adapters);
    if (!*next)
        adapter->part_status = STATUS_OK; // a new try
    for (; *next < adapter->part_count; ++*next) {
        uint32_t at = adapter->first_part + *next, state = adapters->parts.part[at].state;
        bool later = false;
        if (state != PART_ABSENT && state != PART_FETCHING)
            continue;
        if (adapters->parts.fetching_count >= AHEAD_MAX)
            return false;
        if (state == PART_ABSENT && !room(adapters, adapter->part_count - *next, price_max, &later))
            return !later;
        if (fetch(adapters, at, class, COPY_ADAPTER, price_max))
            return true;
    }
    return true;
}

uint32_t adapter_parts_coming(struct adapters *adapters, adapter_id id)
{
    struct parts *p = &adapters->parts;
    // Not at every page of many: a full look now and then is as good.
    if (pool_fetches_ended(adapters->options.pool) - p->ended >= p->fetching_count / 16)
        settle(adapters);
    return adapter__of(adapters, id)->parts_coming;
}

uint32_t adapter_parts_there(const struct adapters *adapters, adapter_id id)
{
    return adapter__of(adapters, id)->parts_resident;
}

enum status adapter_parts_status(const struct adapters *adapters, adapter_id id)
{
    return adapter__of(adapters, id)->part_status;
}

bool adapters_view_is_broken(const struct adapters *adapters, uint32_t view_index)
{
    return adapters->slots[view_index].broken;
}

bool adapter_is_whole(const struct adapters *adapters, adapter_id id)
{
    const struct adapter *adapter = adapter__of(adapters, id);
    return adapter->parts_resident == adapter->part_count;
}

bool adapter_has_parts(const struct adapters *adapters, adapter_id id)
{
    return adapter__of(adapters, id)->part_count;
}

bool adapter__parts_unload(struct adapters *adapters, struct adapter *adapter)
{
    settle(adapters);
    for (uint32_t i = 0; i < adapter->part_count; i++) {
        const struct part *part = &adapters->parts.part[adapter->first_part + i];
        if (part->held || part->state == PART_FETCHING)
            return false;
    }
    for (uint32_t i = 0; i < adapter->part_count; i++)
        if (adapters->parts.part[adapter->first_part + i].state == PART_RESIDENT)
            leave(adapters, adapter->first_part + i);
    return true;
}

void adapter__parts_relist(struct adapters *adapters, const struct adapter *adapter)
{
    for (uint32_t i = 0; i < adapter->part_count; i++)
        list_add(adapters, adapter->first_part + i);
}

// ---- the gate ----

static void hold(struct adapters *adapters, uint32_t at)
{
    struct parts *p = &adapters->parts;
    struct part *part = &p->part[at];
    if (!part->held) {
        part->held = true;
        p->held[p->held_count++] = at;
    }
    list_remove(adapters, at);
    pin_if_held(adapters, part);
}

static enum status bring(struct adapters *adapters, uint32_t at, enum copy_class class,
                         uint32_t *started)
{
    struct part *part = &adapters->parts.part[at];
    struct adapter *adapter = &adapters->slots[part->adapter];
    enum status status = STATUS_OK;
    if (part->state != PART_RESIDENT) {
        bool begins = part->state == PART_ABSENT;
        status = fetch(adapters, at, class, COPY_GATE, INFINITY);
        if (status)
            return status;
        adapter->loads.part_misses += begins;
        adapters->loads.part_misses += begins;
        ++*started;
    }
    hold(adapters, at);
    return STATUS_OK;
}

enum status adapters_gate_bring(struct adapters *adapters, uint32_t view_index, uint32_t layer,
                                uint32_t expert, enum copy_class class, uint32_t *started)
{
    const struct adapter *adapter = &adapters->slots[view_index];
    CHECK(adapter->ranges);
    struct lora_part range = adapter->ranges[layer * adapters->options.base.experts + expert];
    uint32_t first = adapter->first_part + range.first - adapter->store.trunk_pages;
    settle(adapters);
    for (int pass = 0; pass < 2; pass++) // what is here or on its way must not be driven out
        for (uint32_t at = first; at < first + range.count; at++) {
            if ((adapters->parts.part[at].state == PART_ABSENT) != (pass == 1))
                continue;
            enum status status = bring(adapters, at, class, started);
            if (status)
                return status;
        }
    return STATUS_OK;
}

bool adapters_gate_ready(struct adapters *adapters, enum status *status)
{
    struct parts *p = &adapters->parts;
    uint32_t lost = 0;
    pool_poll(adapters->options.pool);
    settle(adapters);
    *status = STATUS_OK;
    for (uint32_t i = 0; i < p->held_count; i++) {
        const struct part *part = &p->part[p->held[i]];
        if (part->state == PART_FETCHING)
            return false;
        lost += part->state == PART_ABSENT && !adapters->slots[part->adapter].broken;
    }
    if (lost && !p->gate_arrived)
        *status = STATUS_FULL;
    return true;
}

void adapters_gate_done(struct adapters *adapters)
{
    struct parts *p = &adapters->parts;
    for (uint32_t i = 0; i < p->held_count; i++) {
        struct part *part = &p->part[p->held[i]];
        if (part->pinned)
            pool_unpin(adapters->options.pool, part->object);
        part->held = part->pinned = false;
        part->used_step = p->step;
        list_add(adapters, p->held[i]);
    }
    p->held_count = p->gate_arrived = 0;
}

// ---- use ----

void adapters_step(struct adapters *adapters)
{
    adapters->parts.step++;
}

uint8_t *adapters_page_used(const struct adapters *adapters)
{
    return adapters->parts.used;
}

void adapters_record_used(struct adapters *adapters, struct stream *stream)
{
    struct parts *p = &adapters->parts;
    if (!p->resident || p->marks_asked)
        return;
    stream->device->table->copy(stream, p->used_host, p->used, p->pages);
    stream->device->table->zero(stream, p->used, p->pages);
    p->marks_asked = true;
}

void adapters_take_used(struct adapters *adapters)
{
    struct parts *p = &adapters->parts;
    if (!p->marks_asked)
        return;
    p->marks_asked = false;
    uint64_t word;
    for (uint32_t page = 0; page < p->pages; page++) {
        if (page % 8 == 0 && page + 8 <= p->pages) {
            memcpy(&word, p->used_host + page, sizeof word);
            if (!word) {
                page += 7;
                continue;
            }
        }
        uint32_t at = p->of_page[page];
        struct part *part = &p->part[at];
        if (!p->used_host[page] || part->state != PART_RESIDENT ||
            *pool_device_pages(adapters->options.pool, part->object) != page)
            continue; // it went to somebody else meanwhile
        part->used_step = p->step;
        list_add(adapters, at);
    }
}

// ---- the page table ----

uint32_t adapter__parts_flush(struct adapters *adapters, uint32_t *index, uint32_t *value,
                              uint32_t room)
{
    struct parts *p = &adapters->parts;
    uint32_t count = 0;
    settle(adapters);
    for (uint32_t i = 0; i < p->dirty_count; i++) {
        uint32_t at = p->dirty[i];
        struct part *part = &p->part[at];
        bool resident = part->state == PART_RESIDENT;
        part->dirty = false;
        if (!resident && !part->shown)
            continue;
        CHECK(count < room);
        index[count] = at;
        value[count++] = resident ? *pool_device_pages(adapters->options.pool, part->object)
                                  : (uint32_t)PAGE_NONE;
        part->shown = resident;
    }
    p->dirty_count = 0;
    return count;
}
