// SPDX-License-Identifier: Apache-2.0
// The registry of adapters: names, handles, who uses them, and their residency in the pool.
//
// States of a slot, and who moves it:
//
//   FREE --adapter_register, adapter_replace--> NAMED --adapter_remove, adapter_replace--> LEAVING
//     --bury--> BURIED --graves_close--> FREE
//
// A NAMED adapter has a place in the name index. A LEAVING one has none: its name is free, requests
// that hold it go on, and it is buried when the last user has released it and nothing pins it.
// Burying destroys the pool objects at once. The pool does not wait for a read that is under way,
// so a BURIED adapter still has its file, until no copy can read from it.
//
// Every registered adapter owns a pool object for its trunk (what every row needs), one for each
// page behind that (parts.c), all in one run of slots, and one row of the view table, the row of
// its slot, so that nothing has to be assigned when an adapter becomes resident. Whether it is
// resident is the pool's fact and is asked there; `warm` only lists those worth asking.
//
// A NAMED adapter may have keepers (keep.c), tenants that pinned it: then it is not offered under
// pressure, and its pages count as taken whether they are there yet or not.
//
// Invariants: 1. `order` holds the slots in state NAMED, by name. 2. users > 0 or pinned: the
// object lives. 3. warm holds every adapter with device pages, no slot twice. 4. an id names one
// registration: slot and generation. 5. a resident adapter is in `arriving` or its pages stand in
// the page table (tables.c). Does not decide who may use an adapter (runtime) nor who gives pages
// back (the pool; the price is price.c).
#include "adapters/internal.h"

#include <sched.h>
#include <stdlib.h>
#include <string.h>

#include "base/check.h"

// A pool object's tag: the adapter's slot, and below TAG_SLOT 0 for the trunk, else which part.
enum { SLOTS_MAX = 0xffff, QUIET_TRIES = 1000000, TAG_SLOT = 32 };
#define TAG_PART 0xffffffffu

bool adapter_name_is_valid(const char *name)
{
    size_t length = strlen(name);
    if (!length || length >= ADAPTER_NAME_MAX || *name == '.')
        return false;
    return strspn(name, "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789._-") ==
           length;
}

adapter_id adapter__id(const struct adapters *adapters, uint32_t slot)
{
    return (adapter_id){(slot + 1) | (uint32_t)adapters->slots[slot].generation << 16};
}

static uint32_t slot_of(const struct adapters *adapters, adapter_id id)
{
    uint32_t slot = (id.bits & SLOTS_MAX) - 1;
    CHECK(slot < adapters->options.adapters_max);
    CHECK(adapters->slots[slot].state == STATE_NAMED ||
          adapters->slots[slot].state == STATE_LEAVING);
    CHECK(adapters->slots[slot].generation == id.bits >> 16);
    return slot;
}

struct adapter *adapter__of(const struct adapters *adapters, adapter_id id)
{
    return &adapters->slots[slot_of(adapters, id)];
}

// ---- warm: those that may have device pages ----

static void warm_add(struct adapters *adapters, uint32_t slot)
{
    struct adapter *adapter = &adapters->slots[slot];
    if (adapter->place != NO_PLACE)
        return;
    adapter->place = adapters->warm_count;
    adapters->warm[adapters->warm_count++] = slot;
}

void adapter__warm_remove(struct adapters *adapters, struct adapter *adapter)
{
    uint32_t place = adapter->place;
    if (place == NO_PLACE)
        return;
    uint32_t last = adapters->warm[--adapters->warm_count];
    adapters->warm[place] = last;
    adapters->slots[last].place = place;
    adapter->place = NO_PLACE;
}

// ---- arriving: those whose pages the page table does not know yet ----

static void arriving_add(struct adapters *adapters, uint32_t slot)
{
    struct adapter *adapter = &adapters->slots[slot];
    if (adapter->arriving)
        return;
    adapter->arriving = true;
    adapters->arriving[adapters->arriving_count++] = slot;
}

static void arriving_remove(struct adapters *adapters, uint32_t slot)
{
    if (!adapters->slots[slot].arriving)
        return;
    adapters->slots[slot].arriving = false;
    for (uint32_t i = 0; i < adapters->arriving_count; i++) {
        if (adapters->arriving[i] == slot) {
            adapters->arriving[i] = adapters->arriving[--adapters->arriving_count];
            return;
        }
    }
    CHECK(false);
}

// ---- pressure ----

// The order of prices (adapter__price) at any one time, without computing them.
static bool is_cheaper(const struct adapter *a, const struct adapter *b)
{
    return a->users < b->users || (a->users == b->users && a->heat.level < b->heat.level);
}

static bool cheapest_trunk(struct adapters *adapters, struct pool_offer *out)
{
    struct pool *pool = adapters->options.pool;
    const struct adapter *best = NULL;
    for (uint32_t i = adapters->warm_count; i-- > 0;) {
        struct adapter *adapter = &adapters->slots[adapters->warm[i]];
        if (best && !is_cheaper(adapter, best))
            continue;
        if (adapter->keeper != NO_PLACE || pool_is_fetching(pool, adapter->object) ||
            pool_pins(pool, adapter->object))
            continue;
        if (pool_is_resident(pool, adapter->object))
            best = adapter;
        else
            adapter__warm_remove(adapters, adapter); // its fetch failed
    }
    if (!best)
        return false;
    uint64_t now = clock_now_us(&adapters->options.clock);
    *out = (struct pool_offer){.object = best->object,
                               .price = adapter__price(&best->heat, best->users,
                                                       adapters->options.fetch_us_per_byte, now)};
    return true;
}

static bool cheapest(void *context, struct pool_offer *out)
{
    struct adapters *adapters = context;
    struct pool_offer part;
    bool has_trunk = cheapest_trunk(adapters, out);
    if (!adapter__parts_cheapest(adapters, &part))
        return has_trunk;
    if (!has_trunk || part.price < out->price)
        *out = part;
    return true;
}

static void give_back(void *context, pool_object object)
{
    struct adapters *adapters = context;
    uint64_t tag = pool_tag(adapters->options.pool, object);
    struct adapter *adapter = &adapters->slots[tag >> TAG_SLOT];
    if (tag & TAG_PART) {
        adapter__part_give_back(adapters, object);
        return;
    }
    adapter__warm_remove(adapters, adapter);
    adapters->given_back++;
    pool_drop_device(adapters->options.pool, object);
}

static bool offers_nothing(void *context, struct pool_offer *out)
{
    (void)context;
    (void)out;
    return false;
}

// ---- life ----

static enum status allocate(struct adapters *adapters)
{
    uint32_t slots = adapters->options.adapters_max;
    struct device *device = adapters->options.device;
    struct pool_stats stats;
    adapters->slots = calloc(slots, sizeof *adapters->slots);
    adapters->arriving = calloc(slots, sizeof *adapters->arriving);
    adapters->free_slots = calloc(slots, sizeof *adapters->free_slots);
    adapters->order = calloc(slots, sizeof *adapters->order);
    adapters->warm = calloc(slots, sizeof *adapters->warm);
    adapters->graves = calloc(slots, sizeof *adapters->graves);
    adapters->kept = calloc(slots, sizeof *adapters->kept);
    adapters->claims_max = (uint32_t)(CLAIMS_EACH * slots);
    adapters->claims = calloc(adapters->claims_max, sizeof *adapters->claims);
    if (!adapters->slots || !adapters->arriving || !adapters->free_slots || !adapters->order ||
        !adapters->warm || !adapters->graves || !adapters->kept || !adapters->claims)
        return STATUS_NO_MEMORY;
    pool_stats(adapters->options.pool, &stats);
    adapters->page_bytes = stats.page_bytes;
    // What is resident has pages of its own; of parts as many may have left.
    adapters->flush_words = stats.device_total * (adapters->options.base.experts ? 2 : 1);
    enum status status =
        device->table->alloc(device, slots * sizeof *adapters->views, (void **)&adapters->views);
    if (!status)
        status = device->table->alloc(device, stats.slots_max * sizeof(uint32_t),
                                      (void **)&adapters->page_table);
    if (!status)
        status = device->table->alloc_host(
            device, (size_t)FLUSHES_ALIVE * 2 * adapters->flush_words * sizeof(uint32_t),
            (void **)&adapters->flush);
    return status ? status : adapter__parts_create(adapters, &stats);
}

enum status adapters_create(const struct adapter_options *options, struct adapters **out)
{
    uint32_t slots = options->adapters_max;
    if (!slots || slots >= SLOTS_MAX)
        return STATUS_LIMIT;
    struct adapters *adapters = calloc(1, sizeof *adapters);
    if (!adapters)
        return STATUS_NO_MEMORY;
    adapters->options = *options;
    enum status status = allocate(adapters);
    if (status) {
        adapters->options.pool = NULL;
        adapters_destroy(adapters);
        return status;
    }
    for (uint32_t slot = slots; slot-- > 0;) {
        adapters->slots[slot].place = adapters->slots[slot].keeper = NO_PLACE;
        adapters->free_slots[adapters->free_count++] = slot;
    }
    pool_set_pressure(options->pool, PAGE_ADAPTER,
                      &(struct pool_pressure){adapters, cheapest, give_back});
    *out = adapters;
    return STATUS_OK;
}

// No copy is on its way into a page that nobody owns any more: host pages that are neither free nor
// of a kind are the targets of such copies.
static bool pool_is_quiet(const struct pool *pool)
{
    struct pool_stats stats;
    pool_stats(pool, &stats);
    uint32_t held = 0;
    for (int kind = 0; kind < PAGE_KINDS; kind++)
        held += stats.host_by_kind[kind];
    return stats.host_free + held == stats.host_total;
}

static void slot_free(struct adapters *adapters, uint32_t slot)
{
    struct adapter *adapter = &adapters->slots[slot];
    adapter__tables_release(adapters, adapter);
    reader_close(adapter->file);
    adapter__store_clear(&adapter->store);
    *adapter = (struct adapter){
        .generation = (uint16_t)(adapter->generation + 1), .place = NO_PLACE, .keeper = NO_PLACE};
    adapters->free_slots[adapters->free_count++] = slot;
}

static void graves_close(struct adapters *adapters)
{
    if (!adapters->graves_count || !pool_is_quiet(adapters->options.pool))
        return;
    for (uint32_t i = 0; i < adapters->graves_count; i++)
        slot_free(adapters, adapters->graves[i]);
    adapters->graves_count = 0;
}

static void bury(struct adapters *adapters, struct adapter *adapter)
{
    uint32_t slot = (uint32_t)(adapter - adapters->slots);
    struct pool *pool = adapters->options.pool;
    // After a fetch that failed a read of another page may still be under way.
    bool is_read = pool_is_fetching(pool, adapter->object) ||
                   pool_fetch_status(pool, adapter->object) != STATUS_OK;
    is_read |= adapter__parts_end(adapters, adapter);
    adapter__warm_remove(adapters, adapter);
    arriving_remove(adapters, slot);
    pool_object_destroy(pool, adapter->object);
    adapters->pool_slots -= adapter->store.pages;
    if (is_read) {
        adapter->state = STATE_BURIED;
        adapters->graves[adapters->graves_count++] = slot;
    } else {
        slot_free(adapters, slot);
    }
    graves_close(adapters);
}

static void bury_if_done(struct adapters *adapters, struct adapter *adapter)
{
    if (adapter->state == STATE_LEAVING && !adapter->users &&
        !pool_pins(adapters->options.pool, adapter->object))
        bury(adapters, adapter);
}

void adapters_destroy(struct adapters *adapters)
{
    if (!adapters)
        return;
    struct pool *pool = adapters->options.pool;
    if (pool) {
        adapters_gate_done(adapters); // of a step that the device did not survive
        for (uint32_t slot = 0; slot < adapters->options.adapters_max; slot++)
            if (adapters->slots[slot].state == STATE_NAMED ||
                adapters->slots[slot].state == STATE_LEAVING)
                bury(adapters, &adapters->slots[slot]);
        for (int i = 0; i < QUIET_TRIES && adapters->graves_count; i++) {
            pool_poll(pool);
            graves_close(adapters);
            (void)sched_yield();
        }
        pool_set_pressure(pool, PAGE_ADAPTER, &(struct pool_pressure){.cheapest = offers_nothing});
    }
    adapter__parts_destroy(adapters);
    struct device *device = adapters->options.device;
    for (uint32_t slot = 0; adapters->slots && slot < adapters->options.adapters_max; slot++)
        adapter__tables_release(adapters, &adapters->slots[slot]); // of graves that stayed open
    if (adapters->views)
        device->table->release(device, adapters->views);
    if (adapters->page_table)
        device->table->release(device, adapters->page_table);
    if (adapters->flush)
        device->table->release_host(device, adapters->flush);
    free(adapters->graves);
    free(adapters->kept);
    free(adapters->claims);
    free(adapters->slots);
    free(adapters->arriving);
    free(adapters->free_slots);
    free(adapters->order);
    free(adapters->warm);
    free(adapters);
}

void adapters_limit_rank(struct adapters *adapters, uint32_t rank_max)
{
    adapters->rank_max = rank_max;
}

// ---- names ----

// The place of the first name that is not below `name`; *found when it is that name.
static uint32_t order_place(const struct adapters *adapters, const char *name, bool *found)
{
    uint32_t low = 0, high = adapters->count;
    *found = false;
    while (low < high) {
        uint32_t middle = low + (high - low) / 2;
        int order = strcmp(adapters->slots[adapters->order[middle]].name, name);
        if (order == 0) {
            *found = true;
            return middle;
        }
        if (order < 0)
            low = middle + 1;
        else
            high = middle;
    }
    return low;
}

// The trunk's object, and one for each page behind it.
static enum status objects_make(struct adapters *adapters, struct adapter *adapter, uint32_t slot)
{
    struct pool_object_options options = {.kind = PAGE_ADAPTER,
                                          .owner = adapter->owner,
                                          .slots = adapter->store.trunk_pages,
                                          .file = adapter->file,
                                          .file_offset = adapter->store.header_bytes,
                                          .tag = (uint64_t)slot << TAG_SLOT};
    adapter->part_count = adapter->store.pages - adapter->store.trunk_pages;
    pool_object *objects = calloc((size_t)adapter->part_count + 1, sizeof *objects);
    if (!objects)
        return STATUS_NO_MEMORY;
    enum status status =
        pool_objects_create(adapters->options.pool, &options, adapter->part_count, objects);
    if (!status) {
        adapter->object = objects[0];
        adapter__parts_begin(adapters, adapter, objects + 1);
    }
    free(objects);
    return status;
}

static enum status object_create(struct adapters *adapters, struct adapter *adapter, uint32_t slot,
                                 struct fault *fault)
{
    struct pool_stats stats;
    uint32_t needed = adapter__step_pages(adapter);
    pool_stats(adapters->options.pool, &stats);
    if (needed > stats.device_total)
        return fault_set(fault, STATUS_LIMIT,
                         "adapter \"%s\" needs %u pages at once; the pool has %u.", adapter->name,
                         needed, stats.device_total);
    uint64_t wanted = adapters->pool_slots + adapter->store.pages;
    if (adapters->options.slots_max && wanted > adapters->options.slots_max)
        return fault_set(
            fault, STATUS_LIMIT,
            "adapter \"%s\" has %u pages; the registered adapters have %llu of at most "
            "%llu: remove some or raise --pool-bytes.",
            adapter->name, adapter->store.pages, (unsigned long long)adapters->pool_slots,
            (unsigned long long)adapters->options.slots_max);
    enum status status = objects_make(adapters, adapter, slot);
    if (status)
        return fault_set(fault, status,
                         "the pool's tables have no room for adapter \"%s\" (%u pages).",
                         adapter->name, adapter->store.pages);
    adapters->pool_slots = wanted;
    return STATUS_OK;
}

static enum status slot_fill(struct adapters *adapters, struct adapter *adapter, uint32_t slot,
                             const char *store_path, struct fault *fault)
{
    char label[ADAPTER_NAME_MAX + 32] = "the store file of adapter ";
    strcat(label, adapter->name);
    enum status status = reader_open(store_path, &adapter->file, fault);
    if (!status)
        status = adapter__store_open(adapter->file, label, &adapters->options.base,
                                     adapters->page_bytes, &adapter->store, fault);
    if (!status)
        status = adapter__store_reader(adapter->file, adapter->name, &adapter->store,
                                       &adapter->file, fault);
    uint32_t rank = adapter->store.report.rank_max, rank_max = adapters->rank_max;
    if (!status && rank_max && rank > rank_max)
        status = fault_set(fault, STATUS_LIMIT,
                           "The adapter has rank %u; this server takes up to %u (--max-lora-rank).",
                           rank, rank_max);
    if (!status)
        status = object_create(adapters, adapter, slot, fault);
    if (status)
        return status;
    status = adapter__tables_upload(adapters, adapter, slot, fault);
    if (status) {
        (void)adapter__parts_end(adapters, adapter); // nothing was fetched
        pool_object_destroy(adapters->options.pool, adapter->object);
        adapters->pool_slots -= adapter->store.pages;
    }
    return status;
}

static void name_insert(struct adapters *adapters, uint32_t place, uint32_t slot)
{
    memmove(adapters->order + place + 1, adapters->order + place,
            (adapters->count - place) * sizeof *adapters->order);
    adapters->order[place] = slot;
    adapters->count++;
}

// The name goes over to the new version; the old one leaves when its users have.
static void name_hand_over(struct adapters *adapters, uint32_t place, uint32_t slot)
{
    struct adapter *old = &adapters->slots[adapters->order[place]];
    adapters->order[place] = slot;
    adapter__let_go(adapters, old);
    old->state = STATE_LEAVING;
    bury_if_done(adapters, old);
}

static enum status register_as(struct adapters *adapters, const char *name, const char *store_path,
                               uint32_t owner, bool replace, adapter_id *out, struct fault *fault)
{
    bool found;
    if (!adapter_name_is_valid(name))
        return fault_set(fault, STATUS_INVALID, "\"%.80s\" is not an adapter name.", name);
    uint32_t place = order_place(adapters, name, &found);
    if (found && !replace)
        return fault_set(fault, STATUS_EXISTS, "there is an adapter \"%s\" already.", name);
    graves_close(adapters);
    if (!adapters->free_count)
        return fault_set(fault, STATUS_LIMIT, "there is no room for more than %u adapters.",
                         adapters->options.adapters_max);
    uint32_t slot = adapters->free_slots[adapters->free_count - 1];
    struct adapter *adapter = &adapters->slots[slot];
    strcpy(adapter->name, name);
    adapter->owner = found ? adapters->slots[adapters->order[place]].owner : owner;
    enum status status = slot_fill(adapters, adapter, slot, store_path, fault);
    if (status) {
        adapter__tables_release(adapters, adapter);
        adapter__store_clear(&adapter->store);
        reader_close(adapter->file);
        *adapter = (struct adapter){
            .generation = adapter->generation, .place = NO_PLACE, .keeper = NO_PLACE};
        return status;
    }
    adapter->state = STATE_NAMED;
    adapters->free_count--;
    if (found)
        name_hand_over(adapters, place, slot);
    else
        name_insert(adapters, place, slot);
    *out = adapter__id(adapters, slot);
    return STATUS_OK;
}

enum status adapter_register(struct adapters *adapters, const char *name, const char *store_path,
                             uint32_t owner, adapter_id *out, struct fault *fault)
{
    return register_as(adapters, name, store_path, owner, false, out, fault);
}

enum status adapter_replace(struct adapters *adapters, const char *name, const char *store_path,
                            uint32_t owner, adapter_id *out, struct fault *fault)
{
    return register_as(adapters, name, store_path, owner, true, out, fault);
}

enum status adapter_remove(struct adapters *adapters, const char *name)
{
    bool found;
    uint32_t place = order_place(adapters, name, &found);
    if (!found)
        return STATUS_NOT_FOUND;
    struct adapter *adapter = &adapters->slots[adapters->order[place]];
    adapters->count--;
    memmove(adapters->order + place, adapters->order + place + 1,
            (adapters->count - place) * sizeof *adapters->order);
    adapter__let_go(adapters, adapter);
    adapter->state = STATE_LEAVING;
    bury_if_done(adapters, adapter);
    return STATUS_OK;
}

enum status adapter_find(const struct adapters *adapters, const char *name, adapter_id *out)
{
    bool found;
    uint32_t place = order_place(adapters, name, &found);
    if (!found)
        return STATUS_NOT_FOUND;
    *out = adapter__id(adapters, adapters->order[place]);
    return STATUS_OK;
}

// ---- use ----

void adapter_acquire(struct adapters *adapters, adapter_id id)
{
    struct adapter *adapter = adapter__of(adapters, id);
    adapter__heat_add(&adapter->heat, clock_now_us(&adapters->options.clock));
    bool is_hit = pool_is_resident(adapters->options.pool, adapter->object);
    adapter->loads.hits += is_hit;
    adapter->loads.misses += !is_hit;
    adapters->loads.hits += is_hit;
    adapters->loads.misses += !is_hit;
    adapter->likely_step = UINT64_MAX;
    if (!adapter->users++)
        adapter->forgiven = true;
}

void adapter_release(struct adapters *adapters, adapter_id id)
{
    struct adapter *adapter = adapter__of(adapters, id);
    CHECK(adapter->users);
    adapter->likely_step = UINT64_MAX;
    if (!--adapter->users)
        adapter->broken = false;
    bury_if_done(adapters, adapter);
}

uint32_t adapter_owner(const struct adapters *adapters, adapter_id id)
{
    return adapter__of(adapters, id)->owner;
}

struct digest adapter_digest(const struct adapters *adapters, adapter_id id)
{
    return adapter__of(adapters, id)->store.report.digest;
}

enum status adapter_fetch(struct adapters *adapters, adapter_id id, enum copy_class class,
                          enum copy_need need)
{
    uint32_t slot = slot_of(adapters, id);
    struct adapter *adapter = &adapters->slots[slot];
    struct pool *pool = adapters->options.pool;
    bool begins =
        !pool_is_fetching(pool, adapter->object) && !pool_is_resident(pool, adapter->object);
    enum status status = pool_fetch(pool, adapter->object, class, need);
    if (status)
        return status;
    warm_add(adapters, slot);
    if (begins) {
        arriving_add(adapters, slot);
        adapter->fetch_us = clock_now_us(&adapters->options.clock);
    }
    adapter->forgiven = false;
    adapters->fetches += begins;
    return STATUS_OK;
}

bool adapter_is_resident(const struct adapters *adapters, adapter_id id)
{
    return pool_is_resident(adapters->options.pool, adapter__of(adapters, id)->object);
}

enum status adapter_fetch_status(const struct adapters *adapters, adapter_id id)
{
    const struct adapter *adapter = adapter__of(adapters, id);
    return adapter->forgiven ? STATUS_OK
                             : pool_fetch_status(adapters->options.pool, adapter->object);
}

bool adapter_is_broken(const struct adapters *adapters, adapter_id id)
{
    return adapter__of(adapters, id)->broken;
}

uint32_t adapter__step_pages(const struct adapter *adapter)
{
    return adapter->store.trunk_pages + adapter->store.part_pages_max;
}

uint32_t adapter_page_count(const struct adapters *adapters, adapter_id id)
{
    return adapter__step_pages(adapter__of(adapters, id));
}

uint32_t adapter_pages_whole(const struct adapters *adapters, adapter_id id)
{
    return adapter__of(adapters, id)->store.pages;
}

void adapter_run(struct adapters *adapters, adapter_id id)
{
    struct adapter *adapter = adapter__of(adapters, id);
    adapters->running_pages += adapter->runs++ ? 0 : adapter__step_pages(adapter);
}

void adapter_rest(struct adapters *adapters, adapter_id id)
{
    struct adapter *adapter = adapter__of(adapters, id);
    CHECK(adapter->runs);
    adapters->running_pages -= --adapter->runs ? 0 : adapter__step_pages(adapter);
}

uint32_t adapters_running_pages(const struct adapters *adapters, adapter_id except)
{
    uint32_t pages = adapters->running_pages;
    for (uint32_t i = 0; i < adapters->kept_count; i++) {
        const struct adapter *kept = &adapters->slots[adapters->kept[i]];
        pages -= kept->runs ? adapter__step_pages(kept) : 0;
    }
    if (!except.bits)
        return pages;
    const struct adapter *adapter = &adapters->slots[slot_of(adapters, except)];
    bool counted = adapter->runs && adapter->keeper == NO_PLACE;
    return pages - (counted ? adapter__step_pages(adapter) : 0);
}

void adapter_pin(struct adapters *adapters, adapter_id id)
{
    pool_pin(adapters->options.pool, adapter__of(adapters, id)->object);
}

void adapter_unpin(struct adapters *adapters, adapter_id id)
{
    struct adapter *adapter = adapter__of(adapters, id);
    pool_unpin(adapters->options.pool, adapter->object);
    bury_if_done(adapters, adapter);
}

void adapter_used(struct adapters *adapters, adapter_id id)
{
    struct adapter *adapter = adapter__of(adapters, id);
    adapter__heat_keep(&adapter->heat, clock_now_us(&adapters->options.clock));
}

uint32_t adapter_view_index(const struct adapters *adapters, adapter_id id)
{
    return slot_of(adapters, id);
}

uint32_t adapter_rank_max(const struct adapters *adapters, adapter_id id)
{
    return adapter__of(adapters, id)->store.report.rank_max;
}

bool adapter_has_module(const struct adapters *adapters, adapter_id id, enum lora_module module)
{
    return adapter__of(adapters, id)->store.modules >> module & 1;
}
