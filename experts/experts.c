// SPDX-License-Identifier: Apache-2.0
// Residency of routed experts. Owns one pool object per (layer, expert), the page tables that the
// kernels read, the history that prices are made of, and the gate (what a segment that missed waits
// for). It does not decide who is fair (unified_pool asks for a price only) nor when a segment runs
// (runtime/engine).
//
// States of an expert, and who moves it:
//
//     absent --experts_gate_bring, experts_prefetch--> fetching --settle--> resident
//     fetching --settle (copy failed or cancelled)--> absent
//     resident --give_back (the pool, under pressure)--> absent
//
// Invariants:
//   1. fetching[] lists exactly the experts in state fetching; `settle` is the only place that
//   reads the
//      outcome of a fetch, so every change of residency passes through mark_dirty once.
//   2. the device table agrees with the states, except for the experts in dirty[]; experts_flush
//   writes
//      those. Between experts_flush and the submit of that segment nothing may take pages (engine).
//   3. a held expert (hold[] = 1) is never offered to the pool; it is pinned from the moment it is
//   resident
//      until experts_gate_done.
//   4. nothing allocates after experts_create.
#include "experts/experts.h"

#include <stdlib.h>
#include <string.h>

#include "base/arith.h"
#include "base/check.h"
#include "experts/layout.h"
#include "experts/policy.h"

// Flushes whose arrays may still be read by segments in flight: one running and one queued, for
// each of three priority classes, rounded up.
enum { FLUSHES_ALIVE = 8, NO_STEP = UINT32_MAX };

enum state { ABSENT, FETCHING, RESIDENT };

struct entry {
    pool_object object;
    struct expert_history history;
    uint64_t used_order; // larger: used later; breaks ties of price
    float price;         // as of step price_step of its layer; NO_STEP: not known
    uint32_t price_step;
    uint8_t state, dirty, hold, pinned, prefetch;
};

struct experts {
    struct expert_options options;
    uint32_t total; // layers * experts
    struct entry *entries;
    uint32_t *fetching, fetching_count;
    uint32_t *dirty, dirty_count;
    uint32_t *held, held_count; // of all layers: a handful
    uint32_t *steps;            // [layers] steps seen, the clock of the history
    uint32_t *gate_misses;      // [layers] since the last experts_used
    enum status *gate_status;   // [layers] first failure among the held
    uint32_t *table;            // device memory, [total][pages_per_expert]
    uint32_t *flush;            // alloc_host, [FLUSHES_ALIVE][index, value][places]
    uint32_t flush_next;
    uint64_t order;
    struct expert_stats stats;
};

static uint32_t index_of(const struct experts *experts, uint32_t layer, uint32_t expert)
{
    CHECK(layer < experts->options.shape.layers && expert < experts->options.shape.experts);
    return layer * experts->options.shape.experts + expert;
}

static uint32_t layer_of(const struct experts *experts, uint32_t index)
{
    return index / experts->options.shape.experts;
}

static void mark_dirty(struct experts *experts, uint32_t index)
{
    struct entry *entry = &experts->entries[index];
    if (!entry->dirty) {
        entry->dirty = 1;
        experts->dirty[experts->dirty_count++] = index;
    }
}

static void pin_if_held(struct experts *experts, struct entry *entry)
{
    if (entry->hold && !entry->pinned && entry->state == RESIDENT) {
        pool_pin(experts->options.pool, entry->object);
        entry->pinned = 1;
    }
}

// Takes note of fetches that came to an end (invariant 1).
static void settle(struct experts *experts)
{
    struct pool *pool = experts->options.pool;
    for (uint32_t i = 0; i < experts->fetching_count;) {
        uint32_t index = experts->fetching[i];
        struct entry *entry = &experts->entries[index];
        if (pool_is_fetching(pool, entry->object)) {
            i++;
            continue;
        }
        experts->fetching[i] = experts->fetching[--experts->fetching_count];
        entry->prefetch = 0;
        if (pool_is_resident(pool, entry->object)) {
            entry->state = RESIDENT;
            experts->stats.resident++;
            experts->stats.fetched_bytes += (uint64_t)experts->options.shape.pages_per_expert *
                                            experts->options.shape.page_bytes;
            mark_dirty(experts, index);
            pin_if_held(experts, entry);
            continue;
        }
        entry->state = ABSENT;
        if (entry->hold) {
            enum status status = pool_fetch_status(pool, entry->object);
            enum status *first = &experts->gate_status[layer_of(experts, index)];
            if (!*first || *first == STATUS_FULL)
                *first = status ? status : STATUS_IO;
        }
    }
}

// ---- pressure: what the pool asks when it needs pages ----

// Computed once per step and expert: a gate that brings many experts asks for many offers.
static float price_of(struct experts *experts, struct entry *entry, uint32_t now)
{
    if (entry->price_step != now) {
        entry->price =
            expert_probability(&entry->history, now) * experts->options.fetch_us_per_byte;
        entry->price_step = now;
    }
    return entry->price;
}

static bool cheapest(void *context, struct pool_offer *out)
{
    struct experts *experts = context;
    const struct expert_shape *shape = &experts->options.shape;
    struct entry *best = NULL;
    float best_price = 0.0f;
    settle(experts);
    for (uint32_t layer = 0; layer < shape->layers; layer++) {
        struct entry *entry = &experts->entries[(size_t)layer * shape->experts];
        for (uint32_t e = 0; e < shape->experts; e++, entry++) {
            if (entry->state != RESIDENT || entry->hold)
                continue;
            float price = price_of(experts, entry, experts->steps[layer]);
            if (!best || price < best_price ||
                (price == best_price && entry->used_order < best->used_order)) {
                best = entry;
                best_price = price;
            }
        }
    }
    if (best)
        *out = (struct pool_offer){.object = best->object, .price = best_price};
    return best != NULL;
}

static void give_back(void *context, pool_object object)
{
    struct experts *experts = context;
    uint32_t index = (uint32_t)pool_tag(experts->options.pool, object);
    struct entry *entry = &experts->entries[index];
    CHECK(entry->state == RESIDENT && !entry->hold);
    entry->state = ABSENT;
    experts->stats.resident--;
    experts->stats.given_back++;
    mark_dirty(experts, index);
    pool_drop_device(experts->options.pool, object);
}

static bool nothing_to_offer(void *context, struct pool_offer *out)
{
    (void)context;
    (void)out;
    return false;
}

// ---- life ----

static enum status allocate(struct experts *experts)
{
    uint32_t layers = experts->options.shape.layers;
    size_t places = (size_t)experts->total * experts->options.shape.pages_per_expert;
    experts->entries = calloc(experts->total, sizeof *experts->entries);
    experts->fetching = calloc(experts->total, sizeof *experts->fetching);
    experts->dirty = calloc(experts->total, sizeof *experts->dirty);
    experts->held = calloc(experts->total, sizeof *experts->held);
    experts->steps = calloc(layers, sizeof *experts->steps);
    experts->gate_misses = calloc(layers, sizeof *experts->gate_misses);
    experts->gate_status = calloc(layers, sizeof *experts->gate_status);
    bool complete = experts->entries && experts->fetching && experts->dirty && experts->held &&
                    experts->steps && experts->gate_misses && experts->gate_status;
    if (!complete)
        return STATUS_NO_MEMORY;
    struct device *device = experts->options.device;
    enum status status = device->table->alloc_host(
        device, FLUSHES_ALIVE * 2 * places * sizeof(uint32_t), (void **)&experts->flush);
    if (status)
        return status;
    return device->table->alloc(device, places * sizeof(uint32_t), (void **)&experts->table);
}

static enum status create_objects(struct experts *experts)
{
    const struct expert_shape *shape = &experts->options.shape;
    for (uint32_t i = 0; i < experts->total; i++) {
        struct pool_object_options object = {
            .kind = PAGE_EXPERT,
            .owner = experts->options.owner,
            .slots = shape->pages_per_expert,
            .file = experts->options.store,
            .file_offset = expert_store_offset(shape, i / shape->experts, i % shape->experts),
            .tag = i};
        enum status status =
            pool_object_create(experts->options.pool, &object, &experts->entries[i].object);
        if (status)
            return status;
        experts->entries[i].price_step = NO_STEP;
        mark_dirty(experts, i); // the zeroed table must become PAGE_NONE
    }
    return STATUS_OK;
}

enum status experts_create(const struct expert_options *options, struct experts **out,
                           struct fault *fault)
{
    const struct expert_shape *shape = &options->shape;
    CHECK(shape->layers && shape->experts && shape->pages_per_expert);
    size_t places = 0;
    if (!mul_size((size_t)shape->layers * shape->experts, shape->pages_per_expert, &places) ||
        places > UINT32_MAX)
        return fault_set(fault, STATUS_INVALID, "the model has more expert pages than 2^32.");
    struct experts *experts = calloc(1, sizeof *experts);
    if (!experts)
        return fault_set(fault, STATUS_NO_MEMORY, "out of memory for the expert tables.");
    experts->options = *options;
    experts->total = shape->layers * shape->experts;
    experts->stats.total = experts->total;
    enum status status = allocate(experts);
    if (status) {
        (void)fault_set(fault, status, "no memory for the tables of %u experts.", experts->total);
    } else {
        status = create_objects(experts);
        if (status)
            (void)fault_set(fault, status,
                            "the pool has no room for %u expert objects of %u pages each.",
                            experts->total, shape->pages_per_expert);
    }
    if (status) {
        experts_destroy(experts);
        return status;
    }
    pool_set_pressure(options->pool, PAGE_EXPERT,
                      &(struct pool_pressure){experts, cheapest, give_back});
    *out = experts;
    return STATUS_OK;
}

void experts_destroy(struct experts *experts)
{
    if (!experts)
        return;
    struct pool *pool = experts->options.pool;
    pool_set_pressure(pool, PAGE_EXPERT, &(struct pool_pressure){NULL, nothing_to_offer, NULL});
    for (uint32_t i = 0; experts->entries && i < experts->total; i++) {
        if (experts->entries[i].pinned)
            pool_unpin(pool, experts->entries[i].object);
        if (experts->entries[i].object.bits)
            pool_object_destroy(pool, experts->entries[i].object);
    }
    if (experts->table)
        experts->options.device->table->release(experts->options.device, experts->table);
    if (experts->flush)
        experts->options.device->table->release_host(experts->options.device, experts->flush);
    free(experts->entries);
    free(experts->fetching);
    free(experts->dirty);
    free(experts->held);
    free(experts->steps);
    free(experts->gate_misses);
    free(experts->gate_status);
    free(experts);
}

// ---- the table ----

struct expert_view experts_view(const struct experts *experts, uint32_t layer)
{
    const struct expert_shape *shape = &experts->options.shape;
    return (struct expert_view){.arena = experts->options.arena,
                                .page_bytes = shape->page_bytes,
                                .pages = experts->table + (size_t)index_of(experts, layer, 0) *
                                                              shape->pages_per_expert,
                                .pages_per_expert = shape->pages_per_expert,
                                .experts = shape->experts,
                                .down_tile = shape->down_tile};
}

bool experts_is_resident(const struct experts *experts, uint32_t layer, uint32_t expert)
{
    return pool_is_resident(experts->options.pool,
                            experts->entries[index_of(experts, layer, expert)].object);
}

uint32_t experts_flush_pending(const struct experts *experts)
{
    return experts->dirty_count;
}

void experts_flush(struct experts *experts, struct stream *stream)
{
    settle(experts);
    if (!experts->dirty_count)
        return;
    uint32_t slots = experts->options.shape.pages_per_expert, count = 0;
    size_t places = (size_t)experts->total * slots;
    uint32_t *index = experts->flush + experts->flush_next * 2 * places, *value = index + places;
    experts->flush_next = (experts->flush_next + 1) % FLUSHES_ALIVE;
    for (uint32_t i = 0; i < experts->dirty_count; i++) {
        struct entry *entry = &experts->entries[experts->dirty[i]];
        const uint32_t *pages = pool_device_pages(experts->options.pool, entry->object);
        for (uint32_t slot = 0; slot < slots; slot++, count++) {
            index[count] = experts->dirty[i] * slots + slot;
            value[count] = entry->state == RESIDENT ? pages[slot] : (uint32_t)PAGE_NONE;
        }
        entry->dirty = 0;
    }
    experts->dirty_count = 0;
    stream->device->table->scatter(
        stream, &(struct scatter_args){
                    .table = experts->table, .index = index, .value = value, .count = count});
}

// ---- the gate ----

static void hold(struct experts *experts, uint32_t index)
{
    struct entry *entry = &experts->entries[index];
    if (!entry->hold) {
        entry->hold = 1;
        experts->held[experts->held_count++] = index;
    }
    pin_if_held(experts, entry);
}

// Prefetches of this layer that the gate does not want; with state NULL all prefetches of all
// layers.
static void cancel_prefetches(struct experts *experts, uint32_t layer, const uint8_t *state)
{
    uint32_t first = index_of(experts, layer, 0);
    for (uint32_t i = 0; i < experts->fetching_count; i++) {
        uint32_t index = experts->fetching[i];
        struct entry *entry = &experts->entries[index];
        if (!entry->prefetch ||
            (state && (layer_of(experts, index) != layer || state[index - first] == 2)))
            continue;
        entry->prefetch = 0;
        pool_fetch_cancel(experts->options.pool, entry->object);
    }
    settle(experts);
}

// Starts or promotes the fetch of one expert and holds it.
static enum status bring(struct experts *experts, uint32_t index, enum copy_class class)
{
    struct entry *entry = &experts->entries[index];
    if (entry->state != RESIDENT) {
        enum status status = pool_fetch(experts->options.pool, entry->object, class, COPY_GATE);
        if (status)
            return status;
        if (entry->state == ABSENT)
            experts->fetching[experts->fetching_count++] = index;
        entry->state = FETCHING;
        entry->prefetch = 0;
        experts->gate_misses[layer_of(experts, index)]++;
        experts->stats.misses++;
    }
    hold(experts, index);
    return STATUS_OK;
}

enum status experts_gate_bring(struct experts *experts, uint32_t layer, const uint8_t *state,
                               enum copy_class class, uint32_t *started)
{
    uint32_t first = index_of(experts, layer, 0);
    experts->gate_status[layer] = STATUS_OK;
    *started = 0;
    settle(experts);
    cancel_prefetches(experts, layer, state);
    // What is already here or under way is held first: bringing one of them must not drive out
    // another.
    for (uint32_t pass = 0; pass < 2; pass++)
        for (uint32_t e = 0; e < experts->options.shape.experts; e++) {
            if (state[e] != 2 || experts->entries[first + e].hold ||
                (experts->entries[first + e].state != ABSENT) != (pass == 0))
                continue;
            enum status status = bring(experts, first + e, class);
            if (status == STATUS_FULL && *started)
                return STATUS_OK;
            if (status == STATUS_FULL) { // prefetches may sit on all the room there is
                cancel_prefetches(experts, layer, NULL);
                status = bring(experts, first + e, class);
            }
            if (status)
                return status;
            ++*started;
        }
    return STATUS_OK;
}

bool experts_gate_ready(struct experts *experts, uint32_t layer, enum status *status)
{
    pool_poll(experts->options.pool);
    settle(experts);
    uint32_t arrived = 0;
    for (uint32_t i = 0; i < experts->held_count; i++) {
        if (layer_of(experts, experts->held[i]) != layer)
            continue;
        const struct entry *entry = &experts->entries[experts->held[i]];
        if (entry->state == FETCHING)
            return false;
        arrived += entry->state == RESIDENT;
    }
    // A fetch that the pool gave up for want of host pages comes with the next round, if others
    // arrived.
    *status = experts->gate_status[layer];
    if (*status == STATUS_FULL && arrived)
        *status = STATUS_OK;
    return true;
}

void experts_gate_done(struct experts *experts, uint32_t layer)
{
    for (uint32_t i = 0; i < experts->held_count;) {
        struct entry *entry = &experts->entries[experts->held[i]];
        if (layer_of(experts, experts->held[i]) != layer) {
            i++;
            continue;
        }
        if (entry->pinned)
            pool_unpin(experts->options.pool, entry->object);
        entry->pinned = entry->hold = 0;
        // Until experts_used counts the use, it must not look like the oldest one.
        entry->used_order = ++experts->order;
        experts->held[i] = experts->held[--experts->held_count];
    }
}

// ---- history and prefetch ----

void experts_used(struct experts *experts, uint32_t layer, const uint32_t *need)
{
    uint32_t first = index_of(experts, layer, 0), now = ++experts->steps[layer], used = 0;
    for (uint32_t e = 0; e < experts->options.shape.experts; e++) {
        if (!need[e])
            continue;
        struct entry *entry = &experts->entries[first + e];
        expert_history_use(&entry->history, now);
        entry->price_step = NO_STEP;
        entry->used_order = ++experts->order;
        used++;
    }
    uint32_t missed = experts->gate_misses[layer];
    experts->stats.hits += used > missed ? used - missed : 0;
    experts->gate_misses[layer] = 0;
}

static bool has_free_pages(const struct experts *experts)
{
    struct pool_stats stats;
    pool_stats(experts->options.pool, &stats);
    return stats.device_free >= experts->options.shape.pages_per_expert;
}

static bool prefetch_one(struct experts *experts, uint32_t index)
{
    struct entry *entry = &experts->entries[index];
    if (!has_free_pages(experts) ||
        pool_fetch(experts->options.pool, entry->object, COPY_BATCH, COPY_PREFETCH))
        return false;
    entry->state = FETCHING;
    entry->prefetch = 1;
    experts->fetching[experts->fetching_count++] = index;
    experts->stats.prefetched++;
    return true;
}

uint32_t experts_prefetch(struct experts *experts, uint32_t fetches_max)
{
    settle(experts);
    uint32_t started = 0;
    if (experts->stats.resident + experts->fetching_count == experts->total ||
        !has_free_pages(experts))
        return 0;
    // First what was used within the window, then whatever there is room for.
    for (uint32_t pass = 0; pass < 2; pass++)
        for (uint32_t i = 0; i < experts->total; i++) {
            struct entry *entry = &experts->entries[i];
            float count = expert_count_at(&entry->history, experts->steps[layer_of(experts, i)]);
            if (entry->state != ABSENT || (pass == 0 && count < 0.5f))
                continue;
            if (started == fetches_max || !prefetch_one(experts, i))
                return started;
            started++;
        }
    return started;
}

void experts_stats(const struct experts *experts, struct expert_stats *out)
{
    *out = experts->stats;
}
