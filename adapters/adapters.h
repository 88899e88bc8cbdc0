// SPDX-License-Identifier: Apache-2.0
// Adapters: PEFT LoRA reading and checking, the adapter store file, residency in the pool, slice
// tables.
//
// Store file (docs/formats.md): header page(s) with the slice table (JSON-free, fixed binary form,
// digest), then the adapter's pages: A as `rank` rows of d_in, B transposed as `rank` rows of
// d_out, compute dtype, slices (layer, module[, expert]) packed one after another, rows padded to
// 64 bytes, no row straddling a page (kernels/lora.h says what differs for embed_tokens and
// lm_head). alpha/rank is kept as a scale, not multiplied in.
//
// adapter_convert, adapter_verify: any thread. Everything else: engine thread, nothing allocates in
// the step loop (adapter_register may allocate).
#ifndef POLDER_ADAPTERS_ADAPTERS_H
#define POLDER_ADAPTERS_ADAPTERS_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "base/clock.h"
#include "base/hash.h"
#include "base/reader.h"
#include "base/status.h"
#include "kernels/device.h"
#include "kernels/lora.h"
#include "kernels/tile.h"
#include "unified_pool/pool.h"

enum { ADAPTER_NAME_MAX = 64, ADAPTER_LAYOUT_BYTES = 64 };

// What an adapter may be applied to: shapes of the base model, without runtime's types.
struct adapter_base {
    uint32_t layers, hidden, heads, kv_heads, head_dim;
    uint32_t intermediate;              // dense MLP
    uint32_t experts, moe_intermediate; // 0: dense
    uint32_t vocab;                     // 0: nothing is known of embed_tokens and lm_head
    bool tied;                          // lm_head is embed_tokens
    const uint8_t *is_moe;              // [layers]
    enum dtype dtype;
    struct digest digest;
    // safetensors_digest of its tensors "model.embed_tokens.weight" and "lm_head.weight"; zero: not
    // known, or there is none.
    struct digest embedding_weights, head_weights;
};

struct adapter_report {
    uint32_t matrices_applied, matrices_possible; // "applied to N of M matrices"
    uint32_t rank_min, rank_max;
    uint64_t bytes; // in the store, pages rounded
    // "attention, dense, fused, head, transposed, by version": what the file holds, in which order
    char layout[ADAPTER_LAYOUT_BYTES];
    char ignored[512];    // adapter_config fields that were ignored, comma separated
    struct digest digest; // content
    struct digest source; // of the two files it was made from; zero: not known
    uint32_t version;     // of its name, from 1
};

// Names are [A-Za-z0-9._-], not starting with '.', at most ADAPTER_NAME_MAX - 1 long.
bool adapter_name_is_valid(const char *name);

// Reads directory/adapter_config.json and adapter_model.safetensors, checks everything (pairs,
// shapes against the base, finite values, rank, unsupported features refused by name), writes the
// store file atomically.
MUST_USE enum status adapter_convert(const char *directory, const struct adapter_base *base,
                                     size_t page_bytes, const char *store_path,
                                     struct adapter_report *report, struct fault *fault);
// The same for the version of a name that was registered before; adapter_convert writes version 1.
MUST_USE enum status adapter_convert_version(const char *directory, const struct adapter_base *base,
                                             size_t page_bytes, uint32_t version,
                                             const char *store_path, struct adapter_report *report,
                                             struct fault *fault);
// Digest of the two files, as adapter_convert puts it into report->source.
MUST_USE enum status adapter_source(const char *directory, struct digest *out, struct fault *fault);
// Another one of the same files: what adapters.upload announces.
MUST_USE enum status adapter_upload_digest(const char *directory, struct digest *out,
                                           struct fault *fault);

// The version of the store file at this path, 0 when there is none that can be read. *same (may be
// NULL): converting the directory for this base and page size would give the same content.
uint32_t adapter_version_at(const char *store_path, const char *directory,
                            const struct adapter_base *base, size_t page_bytes, bool *same);

// What a store file says of itself, for whom its base is not at hand. Any thread.
struct adapter_summary {
    struct adapter_report report;
    struct digest base;
    enum dtype dtype;
    size_t page_bytes;
    uint64_t file_bytes;
};
// whole: also reads the pages and compares them with their digest.
MUST_USE enum status adapter_inspect(const char *store_path, bool whole,
                                     struct adapter_summary *out, struct fault *fault);

// Reads a whole store file and compares it with its digests; adapter_register checks all but the
// content of the pages. Any thread.
MUST_USE enum status adapter_verify(const char *store_path, const struct adapter_base *base,
                                    size_t page_bytes, struct fault *fault);

struct adapters;
typedef struct {
    uint32_t bits; // slot and generation; 0: none (the base model)
} adapter_id;

struct adapter_options {
    struct pool *pool;
    struct device *device; // for the tables that kernels read; outlives
    const uint8_t *arena;
    struct adapter_base base; // is_moe must outlive
    struct clock clock;
    uint32_t adapters_max;
    // not used: every registered adapter has its row of the view table (24 bytes)
    uint32_t resident_max;
    float fetch_us_per_byte;
    // Pages of all registered adapters together, resident or not; 0: what the pool's tables hold.
    // Keeps registrations from using up the slots that KV needs.
    uint64_t slots_max;
};
MUST_USE enum status adapters_create(const struct adapter_options *options, struct adapters **out);
void adapters_destroy(struct adapters *adapters);
// From now on an adapter of a larger rank is refused with LIMIT: what the work areas of the engine
// hold.
void adapters_limit_rank(struct adapters *adapters, uint32_t rank_max);

// Registers a store file under a name. EXISTS when taken; CORRUPT, or DENIED for another base;
// INVALID for other pages or another dtype (convert again); LIMIT when there are too many or it is
// larger than the pool. The file stays open: the process needs a descriptor for every registered
// adapter.
MUST_USE enum status adapter_register(struct adapters *adapters, const char *name,
                                      const char *store_path, uint32_t owner, adapter_id *out,
                                      struct fault *fault);
// The next version of a name, or its first: a name that is taken goes over to the new store file
// and keeps its owner. Requests that hold the old version finish on it; what comes later gets the
// new one. A failure leaves the old one as it was.
MUST_USE enum status adapter_replace(struct adapters *adapters, const char *name,
                                     const char *store_path, uint32_t owner, adapter_id *out,
                                     struct fault *fault);
// The name is free at once; running requests finish, then pages and file handle go.
MUST_USE enum status adapter_remove(struct adapters *adapters, const char *name);
MUST_USE enum status adapter_find(const struct adapters *adapters, const char *name,
                                  adapter_id *out);

// A request holds its adapter from admission to its end.
void adapter_acquire(struct adapters *adapters, adapter_id id);
void adapter_release(struct adapters *adapters, adapter_id id);
uint32_t adapter_owner(const struct adapters *adapters, adapter_id id);
struct digest adapter_digest(const struct adapters *adapters, adapter_id id);

MUST_USE enum status adapter_fetch(struct adapters *adapters, adapter_id id, enum copy_class class,
                                   enum copy_need need);
bool adapter_is_resident(const struct adapters *adapters, adapter_id id);
// Why the last fetch failed; forgotten when an idle adapter is acquired, so that a new request
// tries again.
enum status adapter_fetch_status(const struct adapters *adapters, adapter_id id);
// Pages that a step needs of it at once: those of attention and dense MLPs, and with expert LoRA
// what one expert needs of it. All its pages: adapter_pages_whole.
uint32_t adapter_page_count(const struct adapters *adapters, adapter_id id);
uint32_t adapter_pages_whole(const struct adapters *adapters, adapter_id id);
// A sequence that runs on it, between its steps too: whoever lets one more run looks at what all
// that run need. Pages of distinct adapters, without `except` and those that tenants have pinned.
void adapter_run(struct adapters *adapters, adapter_id id);
void adapter_rest(struct adapters *adapters, adapter_id id);
uint32_t adapters_running_pages(const struct adapters *adapters, adapter_id except);

// Expert LoRA, page by page. adapter_fetch, adapter_is_resident and the pins are about the trunk:
// what every row needs. The parts of single experts come and go one by one; the map of a MoE layer
// (kernels/moe.h) finds out which are missing, and a gate brings them.
//
// Begins to fetch its absent parts, in the order of layers, as far as free pages last and pages
// that are offered for less than they are worth: likely is the probability that a part will be
// used. *next, 0 at first, says how far it came; false: ask again, room is on its way.
bool adapter_fetch_parts(struct adapters *adapters, adapter_id id, enum copy_class class,
                         float likely, uint32_t *next);
uint32_t adapter_parts_coming(struct adapters *adapters, adapter_id id); // being fetched
uint32_t adapter_parts_there(const struct adapters *adapters, adapter_id id);
// IO when one could not be read since they were last asked for from the start.
enum status adapter_parts_status(const struct adapters *adapters, adapter_id id);
bool adapter_is_whole(const struct adapters *adapters, adapter_id id); // all parts are there
bool adapter_has_parts(const struct adapters *adapters, adapter_id id);
// A gate fired: the part of (layer of the model, expert) is missing for the adapter with this row
// of the view table. Fetches and holds its pages; *started counts those that were not there. FULL
// when one finds no room now; what was held stays held.
MUST_USE enum status adapters_gate_bring(struct adapters *adapters, uint32_t view_index,
                                         uint32_t layer, uint32_t expert, enum copy_class class,
                                         uint32_t *started);
// True when everything that is held has arrived, or will not. FULL: nothing of it arrived for want
// of host pages. When a page cannot be read its adapter is broken, until its last user releases it:
// whoever runs on it has to be ended, and the step goes on as if its rows had no adapter.
bool adapters_gate_ready(struct adapters *adapters, enum status *status);
void adapters_gate_done(struct adapters *adapters); // lets go what is held
bool adapter_is_broken(const struct adapters *adapters, adapter_id id);
bool adapters_view_is_broken(const struct adapters *adapters, uint32_t view_index);
void adapters_step(struct adapters *adapters); // a step is done: what it did not use grows older
// moe_map_args.page_used. Once a step the marks are recorded into the stream, to be taken when that
// segment has retired: who is used stays.
uint8_t *adapters_page_used(const struct adapters *adapters);
void adapters_record_used(struct adapters *adapters, struct stream *stream);
void adapters_take_used(struct adapters *adapters);

void adapter_pin(struct adapters *adapters, adapter_id id); // while a step uses it
void adapter_unpin(struct adapters *adapters, adapter_id id);
void adapter_used(struct adapters *adapters, adapter_id id); // recency, popularity

// Begins to fetch its pages, as if a request had asked. FULL: no room now.
MUST_USE enum status adapter_load(struct adapters *adapters, adapter_id id);
// Gives its device pages back. BUSY when it is used, on its way or kept.
MUST_USE enum status adapter_unload(struct adapters *adapters, adapter_id id, struct fault *fault);
// Pins it for a tenant: never given back under pressure until every tenant that has pinned it has
// let it go, or it is removed or replaced. Its pages count from here on, once however many pin it,
// and are fetched by adapters_fetch_kept: at every turn of the engine. LIMIT: too many are pinned.
enum { ADAPTER_NO_KEEPER = 0xffffffff };
MUST_USE enum status adapter_keep(struct adapters *adapters, adapter_id id, uint32_t keeper);
void adapter_let_go(struct adapters *adapters, adapter_id id, uint32_t keeper);
bool adapter_is_kept(const struct adapters *adapters, adapter_id id);
// The n-th tenant that has pinned it, or ADAPTER_NO_KEEPER.
uint32_t adapter_keeper(const struct adapters *adapters, adapter_id id, uint32_t n);
bool adapter_is_kept_by(const struct adapters *adapters, adapter_id id, uint32_t keeper);
uint64_t adapters_kept_pages(const struct adapters *adapters);
uint64_t adapters_kept_pages_of(const struct adapters *adapters, uint32_t keeper);
void adapters_fetch_kept(struct adapters *adapters);

// Records the page numbers of the adapters that became resident since the last flush into the
// stream, before the segment's other commands. Between this and the submit of that segment nothing
// may take pages.
void adapters_flush(struct adapters *adapters, struct stream *stream);

// The table lora_batch.adapters points at, in device memory, and the row of an adapter in it. A
// resident adapter's row is right in the segments after a flush, for the whole time it is pinned.
const struct lora_adapter_view *adapters_views(const struct adapters *adapters);
uint32_t adapter_view_index(const struct adapters *adapters, adapter_id id);
uint32_t adapter_rank_max(const struct adapters *adapters, adapter_id id);
bool adapter_has_module(const struct adapters *adapters, adapter_id id, enum lora_module module);

// How requests found an adapter when they were admitted, and how long its pages took to arrive:
// from the fetch to the first segment that may use them. A fetch that failed or was undone is no
// load.
struct adapter_loads {
    uint64_t hits, misses;
    uint64_t loads, load_us, load_us_max;
    uint64_t part_pages, part_misses; // pages of parts that arrived; of them, asked for by gates
};

struct adapter_info {
    char name[ADAPTER_NAME_MAX];
    uint32_t owner;
    bool resident;
    adapter_id id;
    uint32_t pages, trunk_pages;              // all; what comes before its first step
    uint32_t device_pages, host_pages, users; // of its pages, those on the device, in the host tier
    struct adapter_report report;
    struct adapter_loads loads;
};
uint32_t adapters_count(const struct adapters *adapters);
// The place in name order of the first adapter behind `name` (of any text).
uint32_t adapters_behind(const struct adapters *adapters, const char *name);
// The i-th registered adapter in name order; false past the end.
bool adapter_at(const struct adapters *adapters, uint32_t index, struct adapter_info *out);
// All that the owner has registered, but for the one of that name; and the most that all owners
// together can have (options).
struct adapters_owned {
    uint32_t count, count_max;
    uint64_t pages, pages_max; // max 0: what the pool's tables hold
};
struct adapters_owned adapters_owned(const struct adapters *adapters, uint32_t owner,
                                     const char *but);

struct adapters_stats {
    uint32_t registered, leaving; // leaving: removed, still used by running requests
    uint32_t resident, resident_pages, fetching;
    uint32_t kept; // pinned by tenants
    uint64_t kept_pages;
    uint64_t fetches, given_back;
    uint32_t parts_resident; // pages
    uint64_t parts_given_back;
    struct adapter_loads loads; // since the start, of removed adapters too
};
void adapters_stats(const struct adapters *adapters, struct adapters_stats *out);

#endif
