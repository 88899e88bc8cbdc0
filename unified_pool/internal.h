// SPDX-License-Identifier: Apache-2.0
// What the files of this folder share. Nobody else includes it.
//
//                 take                     give back
//   PAGE_FREE ------------> PAGE_OWNED ---------------+--> PAGE_FREE     nothing can still touch it
//      ^                                              |
//      |   last copy done                             +--> PAGE_LEAVING  a copy in flight reads or
//      fills it
//      +--------------------------------------------- |        | last copy done, an epoch is open
//      |   epochs retired                             v        v
//      +--------------------------------------------- PAGE_WAITING (device only)
//
// A copy's record is kept in the page it fills (page.move, page.copy, page.partner): a page is
// filled by at most one copy. While the page is OWNED the copy belongs to the object of page.slot;
// once it is LEAVING nobody waits for that copy any more and only the two pages' `busy` counts
// matter. So an object can be dropped, destroyed or fetched again at any moment, without waiting
// for the link.
#ifndef POLDER_UNIFIED_POOL_INTERNAL_H
#define POLDER_UNIFIED_POOL_INTERNAL_H

#include "base/check.h"
#include "unified_pool/place.h"
#include "unified_pool/pool.h"

enum { NONE = POOL_PAGE_NONE };
// content_owner of a page that holds bytes of nobody known, or of several: never equal to an owner.
enum { CONTENT_UNKNOWN = 0xffffffff };
enum { COPY_RANKS = COPY_CLASSES * COPY_NEEDS }; // upper bound of copy__rank
enum { SLOT_FILLED = 1, SLOT_ON_HOST = 2 };      // content is there, not only a page
enum { RUN_BINS = 32, EPOCHS_MAX = 256 };

enum tier_id { TIER_DEVICE, TIER_HOST, TIERS };
enum page_state { PAGE_FREE, PAGE_OWNED, PAGE_LEAVING, PAGE_WAITING };
enum page_move { MOVE_NONE, MOVE_READ, MOVE_UP, MOVE_DOWN }; // file to host, host to device, back

struct page {
    uint32_t next,
        prev;      // of the one list it is in: free, waiting for epochs, droppable host copies
    uint32_t slot; // OWNED: the slot that has it
    uint32_t busy; // copies in flight that read or fill it
    uint32_t content_owner; // whose bytes it may hold
    uint32_t partner;       // the other page of the copy that fills it
    copy_id copy;           // the copy that fills it, when move is not MOVE_NONE
    uint64_t epoch;         // WAITING: free once every epoch up to this one has retired
    uint8_t state, move;
    uint8_t kind;         // the kind that had it last, PAGE_KINDS: none
    uint8_t content_kind; // as which kind content_owner's bytes were written
    bool listed;          // among the droppable
};

struct tier {
    struct page *pages;
    uint8_t *arena;
    uint32_t total, free, waiting; // waiting: LEAVING and WAITING
    uint32_t free_head, wait_head, wait_tail;
    uint32_t drop_head, drop_tail, droppable; // host: copies of read-only objects, oldest first
    uint32_t by_kind[PAGE_KINDS];
};

struct object {
    uint32_t generation, next_free;
    uint32_t owner, first, slots; // its slots are first .. first + slots - 1
    uint32_t device, filled;      // slots with a device page; with content in it
    uint32_t host, on_host;       // slots with a host page; with content in it
    uint32_t head;          // of those created together, the index of the first (may be itself)
    uint32_t group_on_host; // of a head: the sum of on_host of them all
    uint32_t pins;
    uint32_t evictable;  // its share of pool->evictable
    uint32_t cursor;     // slots before it need no copy to be started
    uint32_t next, prev; // in pool->stalled[rank]
    uint8_t kind, class, need, rank;
    bool is_live, is_fetching, is_writing, is_stalled;
    enum status fetch_status;
    struct reader *file;
    uint64_t file_offset, tag;
};

// A run of slots; of a free run the first and the last know its size (boundary tags).
struct run {
    uint32_t size, next, prev;
    bool is_free;
};

struct run_table {
    struct run *runs;
    uint32_t count;
    uint32_t bins[RUN_BINS]; // free runs of size 2^i .. 2^(i+1) - 1
};

struct stall_list {
    uint32_t head, tail;
};

struct pool {
    struct pool_options options;
    struct tier tiers[TIERS];
    struct object *objects;
    uint32_t object_free, objects_live;
    struct run_table runs;
    uint32_t *device_page, *host_page, *slot_object; // [slots_max]
    uint8_t *slot_flags;                             // [slots_max]
    uint32_t *owner_pages;                           // [owners_max], device
    struct pool_pressure pressure[PAGE_KINDS];
    uint32_t limits[PAGE_KINDS]; // device pages each kind may have
    uint32_t evictable_of[PAGE_KINDS];
    uint32_t evictable; // device pages of objects that could be offered: an upper bound of what is
    struct stall_list
        stalled[COPY_RANKS]; // fetches and write-backs that need a host page or queue room
    uint32_t stalled_count;
    uint32_t host_kept; // host pages that write-backs leave for file reads to pass through
    uint64_t epoch_last, epoch_oldest; // last opened; oldest that has not retired (last + 1: none)
    bool epoch_retired[EPOCHS_MAX];
    uint64_t taken_from[PAGE_KINDS][PAGE_KINDS];
    uint64_t fetches, fetch_failures, give_backs, write_backs;
    uint64_t fetches_ended; // cancelled ones too
};

// copy.c: the one order of needs, 0 is the most urgent.
uint32_t copy__rank(enum copy_class class, enum copy_need need);

// slots.c: contiguous runs of slots.
void pool__runs_init(struct run_table *table);
uint32_t pool__runs_take(struct run_table *table, uint32_t size); // NONE: no such run is free
void pool__runs_give(struct run_table *table, uint32_t first, uint32_t size);
void pool__runs_check(const struct run_table *table, uint32_t used);

// pages.c
void pool__tier_init(struct tier *tier, uint32_t total, uint8_t *arena);
uint8_t *pool__address(const struct pool *pool, enum tier_id tier, uint32_t page);
// From the free list for a slot; the caller knows there is one. Device pages keep their content.
uint32_t pool__take(struct pool *pool, enum tier_id tier, uint32_t slot);
void pool__give(struct pool *pool, enum tier_id tier,
                uint32_t page); // from its slot, which forgets it
void pool__copy_left(struct pool *pool, enum tier_id tier,
                     uint32_t page); // a copy no longer touches it
void pool__zero_for(struct pool *pool, uint32_t page, const struct object *object);
uint32_t pool__host_take(struct pool *pool, uint32_t slot); // drops the oldest copy if needed; NONE
void pool__host_settle(struct pool *pool, uint32_t page);   // droppable now, or not
void pool__host_touch(struct pool *pool, uint32_t page);    // to the young end
void pool__release_epochs(struct pool *pool);

// object.c
struct object *pool__object(const struct pool *pool, pool_object handle); // CHECKs that it lives
pool_object pool__handle(const struct pool *pool, const struct object *object);
void pool__on_host(struct pool *pool, struct object *object, int32_t pages); // that many more
void pool__recount(struct pool *pool, struct object *object); // after any change of evictability
struct object *pool__object_of_slot(const struct pool *pool, uint32_t slot);

// move.c
void pool__fetch_abandon(struct pool *pool, struct object *object, enum status status);
void pool__write_abandon(struct pool *pool, struct object *object);
void pool__drop_device(struct pool *pool, struct object *object);
void pool__drop_host(struct pool *pool, struct object *object);
void pool__pump_all(struct pool *pool);

// pressure.c: `pages` free device pages, or FULL; offers above price_max are not taken.
enum status pool__make_room(struct pool *pool, uint32_t pages, float price_max);
// Device pages for every slot of an object that has none.
enum status pool__reserve_pages(struct pool *pool, struct object *object, bool zero,
                                float price_max);

#endif
