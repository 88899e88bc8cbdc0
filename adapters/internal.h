// SPDX-License-Identifier: Apache-2.0
// The registry's state, shared by adapters.c (life, residency), tables.c (what
// kernels read), parts.c (the pages of single
// experts), keep.c (load, unload, pin) and numbers.c (folder-internal). The states and invariants
// are drawn in adapters.c. Engine thread.
#ifndef POLDER_ADAPTERS_INTERNAL_H
#define POLDER_ADAPTERS_INTERNAL_H

#include "adapters/adapters.h"
#include "adapters/price.h"
#include "adapters/store.h"

// CLAIMS_EACH: of pinning, for each place of an adapter. FLUSHES_ALIVE: as in experts.c, flushes
// whose arrays segments in flight may still read.
enum { NO_PLACE = 0xffffffff, CLAIMS_EACH = 4, FLUSHES_ALIVE = 8 };

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
    uint32_t part_count, first_part; // pages behind the trunk; the first one's slot in the pool
    uint32_t parts_resident, parts_coming;
    uint32_t head, tail; // of its parts, those that may be offered: unused for longest first
    uint32_t rich;       // its place among those that have such parts, or NO_PLACE
    float likely;        // that it is used within the horizon, as of likely_step; 1 with users
    uint64_t likely_step;
    struct lora_part *ranges;        // [layers][experts], as the store says, or NULL
    struct lora_part *ranges_device; // the same, for kernels
    bool broken;                     // a gate went on without one of its parts
    enum status part_status;         // why a part could not be fetched
    struct adapter_heat heat;
    struct adapter_loads loads;
    uint64_t fetch_us; // when the fetch under way began
    uint32_t keeper;   // the first of the tenants that have pinned it, or NO_PLACE
};

// One tenant has pinned one adapter.
struct adapter_claim {
    uint32_t slot, keeper;
};

// A page of an adapter behind its trunk; see parts.c.
struct part {
    pool_object object; // 0: none
    uint64_t used_step;
    uint32_t adapter;        // slot
    uint32_t next, previous; // in its adapter's list
    uint8_t state;
    bool listed, dirty, held, pinned;
    bool shown; // the device's page table names a page
};

struct parts {
    struct part *part; // [slots of the pool]
    uint32_t *fetching, fetching_count;
    uint64_t ended; // pool_fetches_ended when they were looked at last
    uint32_t *dirty, dirty_count;
    uint32_t *held, held_count; // what the gate waits for
    uint32_t gate_arrived;      // of those, since it began
    uint64_t step;              // steps so far
    uint32_t *rich, rich_count; // slots of adapters that have parts to offer
    uint32_t pages, resident;   // of the device arena; parts
    uint32_t *of_page;          // [pages] the part that had it last
    uint8_t *used;              // device memory, [pages]: marks of moe_map
    uint8_t *used_host;         // alloc_host
    bool marks_asked;           // copies of them are recorded
    uint64_t given_back;
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
    struct parts parts;
    uint64_t fetches, given_back;
    struct adapter_loads loads; // of all adapters, removed ones too
};

adapter_id adapter__id(const struct adapters *adapters, uint32_t slot);
struct adapter *adapter__of(const struct adapters *adapters, adapter_id id);
// It no longer has device pages.
void adapter__warm_remove(struct adapters *adapters, struct adapter *adapter);
// Whoever has pinned it: no longer. Also for one that nobody has.
void adapter__let_go(struct adapters *adapters, struct adapter *adapter);

// What a step that uses it needs at once: the trunk, and room for one expert's part.
uint32_t adapter__step_pages(const struct adapter *adapter);

// ---- tables.c ----

// The row of views and the tables of an adapter that has its objects.
MUST_USE enum status adapter__tables_upload(struct adapters *adapters, struct adapter *adapter,
                                            uint32_t slot, struct fault *fault);
void adapter__tables_release(struct adapters *adapters, struct adapter *adapter);

// ---- parts.c ----

MUST_USE enum status adapter__parts_create(struct adapters *adapters,
                                           const struct pool_stats *pool);
void adapter__parts_destroy(struct adapters *adapters); // while the pool lives
// objects: its part_count pages behind the trunk.
void adapter__parts_begin(struct adapters *adapters, struct adapter *adapter,
                          const pool_object *objects);
// Destroys them; true when a read of one may still be under way.
bool adapter__parts_end(struct adapters *adapters, struct adapter *adapter);
bool adapter__parts_cheapest(struct adapters *adapters, struct pool_offer *out);
void adapter__part_give_back(struct adapters *adapters, pool_object object);
// Gives all device pages back; false when some are on their way or held.
bool adapter__parts_unload(struct adapters *adapters, struct adapter *adapter);
// Its keeper has changed.
void adapter__parts_relist(struct adapters *adapters, const struct adapter *adapter);
// Pairs for the page table; at most `room`. Returns how many.
uint32_t adapter__parts_flush(struct adapters *adapters, uint32_t *index, uint32_t *value,
                              uint32_t room);

#endif
