// SPDX-License-Identifier: Apache-2.0
// The registry's state, shared by adapters.c (life, residency), keep.c (load, unload, pin) and
// numbers.c (folder-internal). The states and invariants are drawn in adapters.c. Engine thread.
#ifndef POLDER_ADAPTERS_INTERNAL_H
#define POLDER_ADAPTERS_INTERNAL_H

#include "adapters/adapters.h"
#include "adapters/price.h"
#include "adapters/store.h"

enum {
    NO_PLACE = 0xffffffff,
    CLAIMS_EACH = 4
}; // CLAIMS_EACH: of pinning, per place for an adapter

enum state { STATE_FREE, STATE_NAMED, STATE_LEAVING, STATE_BURIED };

struct adapter {
    char name[ADAPTER_NAME_MAX];
    enum state state;
    uint16_t generation;
    uint32_t owner, users, runs;
    uint32_t place; // in warm, or NO_PLACE
    bool forgiven;  // a failed fetch of the past no longer counts
    bool arriving;  // in the list of that name
    struct reader *file;
    struct adapter_store store; // without the pairs
    struct lora_pair *pairs;    // device memory
    pool_object object;
    struct adapter_heat heat;
    struct adapter_loads loads;
    uint64_t fetch_us; // when the fetch under way began
    uint32_t keeper;   // the first of the tenants that have pinned it, or NO_PLACE
};

// One tenant has pinned one adapter.
struct adapter_claim {
    uint32_t slot, keeper;
};

struct adapters {
    struct adapter_options options;
    size_t page_bytes;
    struct adapter *slots;           // [adapters_max]
    struct lora_adapter_view *views; // device memory, [adapters_max], by slot
    uint32_t *page_table;            // device memory, [slots of the pool]
    uint32_t *flush;                 // alloc_host, [FLUSHES_ALIVE][index, value][flush_words]
    uint32_t flush_words, flush_next;
    uint32_t *arriving, arriving_count; // fetched since the last flush
    uint32_t *free_slots, free_count;
    uint32_t rank_max;      // 0: any
    uint32_t *order, count; // slots by name
    uint64_t pool_slots;    // of all pool objects that live
    uint32_t running_pages; // of adapters with runs
    uint32_t *warm, warm_count;
    uint32_t *graves, graves_count; // slots in state BURIED
    uint32_t *kept, kept_count;     // slots whose keeper is a tenant
    struct adapter_claim *claims;   // in the order they were made
    uint32_t claims_count, claims_max;
    uint64_t kept_pages;
    uint64_t fetches, given_back;
    struct adapter_loads loads; // of all adapters, removed ones too
};

adapter_id adapter__id(const struct adapters *adapters, uint32_t slot);
struct adapter *adapter__of(const struct adapters *adapters, adapter_id id);
// It no longer has device pages.
void adapter__warm_remove(struct adapters *adapters, struct adapter *adapter);
// Whoever has pinned it: no longer. Also for one that nobody has.
void adapter__let_go(struct adapters *adapters, struct adapter *adapter);

#endif
