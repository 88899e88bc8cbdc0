// SPDX-License-Identifier: Apache-2.0
// The pool: ONE arena of pages per device that holds KV blocks, adapters and experts, a pinned host
// arena of the same page size, and store files below (DESIGN.md 4).
//
// Terms
//   object    what owns pages: a KV block, an adapter, an expert. It has a fixed number of slots;
//   each slot
//             may have a device page, a host page and a place in a file. Residency is a fact per
//             (slot, tier).
//   owner     an opaque number (a tenant) that bytes are charged to; the pool does not know who is
//   fair. fetch     bring all slots of an object onto the device through the copy queues. pin a
//   submitted segment needs the object: its device pages stay where they are. epoch     one
//   submitted segment. A device page given back is reused only after the last epoch open at
//             that moment has retired.
//   price     what giving an object back would cost, in microseconds per byte; the cheapest leaves
//   first.
//
// Read-only objects (experts, adapters) have a file place: giving them back is free of copies. KV
// objects have none: they are dropped (recompute) or written to host pages first (pool_write_back).
//
// Invariants (pool_check): 1. free + owned + waiting-for-an-epoch = total, per tier. 2. a page has
// one owner. 3. pins >= 0, a pinned object is resident. 4. per-owner and per-kind sums match. 5. a
// page is zeroed before an object of another owner can read what it held. 6. no page is handed out
// before the epochs that might read it have retired.
//
// Engine thread only. Nothing allocates after pool_create. Copies move in pool_poll; give the copy
// queues room for device_pages + host_pages copies, then a fetch never waits for a place in a
// queue.
#ifndef POLDER_UNIFIED_POOL_POOL_H
#define POLDER_UNIFIED_POOL_POOL_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "base/reader.h"
#include "base/status.h"
#include "unified_pool/copy.h"

enum page_kind { PAGE_KV, PAGE_ADAPTER, PAGE_EXPERT, PAGE_KINDS };

enum { POOL_PAGE_NONE = 0xffffffff }; // the same value as PAGE_NONE of the kernels

// A handle: slot and generation, so that a stale one is caught. 0 is never a valid handle.
typedef struct {
    uint64_t bits;
} pool_object;

struct pool;

struct pool_options {
    size_t page_bytes;          // power of two, 32 KiB .. 2 MiB
    uint32_t device_pages;      // size of the device arena
    uint32_t host_pages;        // size of the host arena
    uint32_t objects_max;       // objects alive at once
    uint32_t slots_max;         // slots of all objects together
    uint32_t owners_max;        // owner numbers are 0 .. owners_max - 1
    uint8_t *device_arena;      // device_pages * page_bytes, from the device's alloc
    uint8_t *host_arena;        // host_pages * page_bytes
    struct copy_queues *copies; // not owned
    // How device pages are zeroed, in the order of the device's work; NULL: memset.
    void (*zero)(void *context, void *device_memory, size_t bytes);
    void *zero_context;
};

MUST_USE enum status pool_create(const struct pool_options *options, struct pool **out,
                                 struct fault *fault);
// Order: the owners of objects, the copy queues (which wait for chunks in flight), the pool, the
// arenas.
void pool_destroy(struct pool *pool);

// ---- pressure: how each kind offers to give pages back ----

struct pool_offer {
    pool_object object; // unpinned, has device pages, nothing in flight
    float price;        // microseconds per byte
};

struct pool_pressure {
    void *context;
    // The cheapest offer of this kind, false when there is none. Called while pool_reserve looks
    // for room.
    bool (*cheapest)(void *context, struct pool_offer *out);
    // The pool takes the offer: the kind forgets the object's residency (page tables, index) and
    // calls pool_drop_device, or destroys the object.
    void (*give_back)(void *context, pool_object object);
};

// Prices of all kinds are microseconds per byte that giving the pages back is going to cost within
// this time: the probability of a use times what bringing them back takes. About the 16 steps that
// experts look ahead; with a longer time for one kind than for another its pages seem worth as much
// as others that are used ten times as often (docs/decisions.md).
enum { POOL_HORIZON_US = 500000 };

void pool_set_pressure(struct pool *pool, enum page_kind kind,
                       const struct pool_pressure *pressure);

// How many device pages a kind may have at once (at the start: all of them). A reservation that
// would pass its kind's limit has only its own kind's offers to take, and is FULL when they do not
// suffice; what a kind has above a new limit stays until it next asks for more. Limits that add up
// to no more than the pool split it; that is what the one pool is compared with.
void pool_set_limit(struct pool *pool, enum page_kind kind, uint32_t pages);
uint32_t pool_limit(const struct pool *pool, enum page_kind kind);

// ---- objects ----

struct pool_object_options {
    enum page_kind kind;
    uint32_t owner;
    uint32_t slots;
    struct reader *file;  // NULL: no lower copy (KV). Not owned; outlives the object.
    uint64_t file_offset; // slot i stands at file_offset + i * page_bytes
    uint64_t tag;         // the kind's own number, given back by pool_tag
};

// FULL when objects_max is reached or no run of `slots` free slots is left.
MUST_USE enum status
pool_object_create(struct pool *pool, const struct pool_object_options *options, pool_object *out);
// out[0] as pool_object_create makes it, and out[1 .. pages]: objects of one page each, which come
// and go one by one. Their slots follow each other in one run, their places in the file and their
// tags too. All or none; destroyed one by one, out[0] last.
MUST_USE enum status pool_objects_create(struct pool *pool,
                                         const struct pool_object_options *options, uint32_t pages,
                                         pool_object *out);
// Gives back every page (device pages after their epochs). CHECKs that it is not pinned. Copies in
// flight are cancelled or awaited internally; the handle is dead at once.
void pool_object_destroy(struct pool *pool, pool_object object);
uint64_t pool_tag(const struct pool *pool, pool_object object);
uint32_t pool_slots(const struct pool *pool, pool_object object);
// The object's slots are a run of the pool's slots_max, from this one on; nobody else has them
// while it lives.
uint32_t pool_first_slot(const struct pool *pool, pool_object object);

// Device page of each slot (POOL_PAGE_NONE: none); stable address, [slots].
const uint32_t *pool_device_pages(const struct pool *pool, pool_object object);
// All slots on the device with their content there (reserved and not being filled).
bool pool_is_resident(const struct pool *pool, pool_object object);
bool pool_is_fetching(const struct pool *pool, pool_object object);
bool pool_has_host_copy(const struct pool *pool, pool_object object);
// Host pages with content, of out[0] of pool_objects_create: of all that were created with it.
uint32_t pool_host_pages(const struct pool *pool, pool_object object);
bool pool_is_writing_back(const struct pool *pool, pool_object object);
// Where a device page stands, for copy-on-write.
void *pool_device_address(const struct pool *pool, uint32_t page);

// ---- device pages ----

// Device pages for all slots that have none, to be written by the caller (a fresh KV block). Takes
// free pages, else the cheapest offers. FULL, with nothing changed for this object, when they do
// not suffice now; pages waiting for an epoch do not count. Offers are taken also while an epoch is
// open: their pages are not room now, but they are after it has retired, and until then the same
// request takes no more. When all that could be offered would not suffice, nothing is given back.
// Pages that held bytes of another owner or kind are zeroed.
MUST_USE enum status pool_reserve(struct pool *pool, pool_object object);
// The same without an object: OK when `pages` device pages are free, so that several reservations
// that follow at once cannot fail half way.
MUST_USE enum status pool_make_room(struct pool *pool, uint32_t pages);
// Likewise, from what is offered up to price_max; some may have gone when it is FULL. Asking once
// for many pages costs less than once for each.
MUST_USE enum status pool_make_room_within(struct pool *pool, uint32_t pages, float price_max);
// Reserves and starts copies from the highest tier that holds each slot (host, else file through a
// host page, which stays as a host copy while there is room). OK when started or already there or
// under way; a repeated call with a more urgent (class, need) promotes. FULL as pool_reserve, or
// when no host page can come; NOT_FOUND when no tier holds it. When a copy fails the object is not
// resident, pages are given back, and pool_fetch_status says why (IO, FULL, CANCELLED; OK while
// under way and after success).
MUST_USE enum status pool_fetch(struct pool *pool, pool_object object, enum copy_class class,
                                enum copy_need need);
// The same, but nothing that is offered above price_max is given back for it: for what may be
// needed soon, which should not push out what is needed now. FULL then, though some pages may have
// gone.
MUST_USE enum status pool_fetch_within(struct pool *pool, pool_object object, enum copy_class class,
                                       enum copy_need need, float price_max);
enum status pool_fetch_status(const struct pool *pool, pool_object object);
// Fetches that came to an end, in whatever way: who follows many looks at them when this has
// changed.
uint64_t pool_fetches_ended(const struct pool *pool);
void pool_fetch_cancel(struct pool *pool,
                       pool_object object); // prefetches that are no longer wanted
// Forget the device pages (free of copies; content is lost unless a lower tier has it). Cancels a
// fetch or write-back under way; CHECKs that the object is not pinned.
void pool_drop_device(struct pool *pool, pool_object object);
// Copies the device content to host pages (KV swap-out); when pool_is_written_back turns true the
// caller may pool_drop_device. Host pages come from the free list or from droppable host copies of
// read-only objects, except the last few (1/16, at most 8) that file reads pass through; FULL
// otherwise. The content must not change meanwhile. When a copy fails the host pages are given back
// and neither pool_is_writing_back nor pool_is_written_back is true.
MUST_USE enum status pool_write_back(struct pool *pool, pool_object object, enum copy_class class);
bool pool_is_written_back(const struct pool *pool, pool_object object);
void pool_drop_host(struct pool *pool,
                    pool_object object); // cancels a fetch or write-back under way

void pool_pin(struct pool *pool, pool_object object);
void pool_unpin(struct pool *pool, pool_object object);
uint32_t pool_pins(const struct pool *pool, pool_object object);

// ---- epochs ----

uint64_t pool_epoch_open(struct pool *pool);               // at submit
void pool_epoch_retire(struct pool *pool, uint64_t epoch); // when that segment has retired

// Moves copies along and finishes fetches; call it often.
void pool_poll(struct pool *pool);

// ---- numbers ----

struct pool_stats {
    size_t page_bytes;
    uint32_t device_total, device_free, device_waiting; // waiting: given back, epoch not retired
    uint32_t host_total, host_free;
    uint32_t slots_max;
    uint32_t device_by_kind[PAGE_KINDS], host_by_kind[PAGE_KINDS];
    uint64_t taken_from[PAGE_KINDS][PAGE_KINDS]; // [for kind][from kind] pages that changed kind
    uint64_t fetches, fetch_failures, give_backs, write_backs;
};
void pool_stats(const struct pool *pool, struct pool_stats *out);
uint32_t pool_owner_pages(const struct pool *pool, uint32_t owner); // device pages
void pool_check(const struct pool *pool); // every invariant; a broken one aborts

#endif
