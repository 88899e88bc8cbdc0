// SPDX-License-Identifier: Apache-2.0
// Experts: the store file, residency in the pool, activation history, page tables for the kernels.
//
// Store file: one header page (magic, version, shape, element type, base digest), then every routed
// expert of every MoE layer as pages_per_expert pages: gate+up tiles interleaved, then the down
// tiles from tile down_tile on (kernels/tile.h). Written once by the loader, read by pread.
//
// Page tables: one device array [layers][experts][pages_per_expert]; changed only by experts_flush,
// which records a scatter into the stream. A give-back takes effect in the table at the next flush;
// the pool does not reuse the pages before the running segment's epoch has retired. Engine thread,
// except the store writer. Nothing allocates after experts_create.
#ifndef POLDER_EXPERTS_EXPERTS_H
#define POLDER_EXPERTS_EXPERTS_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "base/clock.h"
#include "base/hash.h"
#include "base/reader.h"
#include "base/status.h"
#include "kernels/device.h"
#include "unified_pool/pool.h"

struct expert_shape {
    uint32_t layers; // MoE layers, numbered 0.. in the order of the model (not model layers)
    uint32_t experts, hidden, intermediate;
    enum dtype dtype;
    size_t page_bytes;
    uint32_t pages_per_expert, down_tile;
};

// Fills pages_per_expert and down_tile.
void expert_shape_complete(struct expert_shape *shape);

// ---- store ----
struct expert_store_writer;
// Creates `path` through a temporary name; the finished file appears at once or not at all.
MUST_USE enum status expert_store_create(const char *path, const struct expert_shape *shape,
                                         const struct digest *base,
                                         struct expert_store_writer **out, struct fault *fault);
// gate, up: [intermediate][hidden]; down: [hidden][intermediate]; row-major, element type
// shape->dtype.
MUST_USE enum status expert_store_put(struct expert_store_writer *writer, uint32_t layer,
                                      uint32_t expert, const void *gate, const void *up,
                                      const void *down, struct fault *fault);
MUST_USE enum status expert_store_finish(struct expert_store_writer *writer, struct fault *fault);
void expert_store_abandon(struct expert_store_writer *writer);
// Opens and checks the header against shape and base; NOT_FOUND or CORRUPT: make it anew.
MUST_USE enum status expert_store_open(const char *path, const struct expert_shape *shape,
                                       const struct digest *base, struct reader **out,
                                       struct fault *fault);

// ---- residency ----
struct experts;
struct expert_options {
    struct expert_shape shape;
    struct pool *pool;
    struct device *device; // for the page-table array
    const uint8_t *arena;  // device arena of the pool
    struct reader *store;  // not owned
    struct clock clock;
    uint32_t owner;          // owner number that experts are charged to
    float fetch_us_per_byte; // for the price: measured or configured link speed
};
MUST_USE enum status experts_create(const struct expert_options *options, struct experts **out,
                                    struct fault *fault);
void experts_destroy(struct experts *experts);

struct expert_view experts_view(const struct experts *experts, uint32_t layer);
bool experts_is_resident(const struct experts *experts, uint32_t layer, uint32_t expert);
// Records the pending page-table changes into the stream, before the segment's other commands.
void experts_flush(struct experts *experts, struct stream *stream);
uint32_t experts_flush_pending(const struct experts *experts);

// A gate fired: state[e] == 2 (kernels/moe.h) marks the experts that miss. Drops left-over
// prefetches of the layer, then fetches and pins as many missing experts as fit; *started counts
// them. FULL when not even one fits now. Call again after they were computed (experts_gate_done
// unpins those in state 3).
MUST_USE enum status experts_gate_bring(struct experts *experts, uint32_t layer,
                                        const uint8_t *state, enum copy_class class,
                                        uint32_t *started);
// True when everything started by experts_gate_bring is resident (or failed: *status).
bool experts_gate_ready(struct experts *experts, uint32_t layer, enum status *status);
void experts_gate_done(struct experts *experts, uint32_t layer);

// need[e] pairs went to expert e of this layer in the step that ran (activation history, recency).
void experts_used(struct experts *experts, uint32_t layer, const uint32_t *need);
// Asks for the experts the history calls likely, in layer order, while free pages last (start-up,
// idle).
uint32_t experts_prefetch(struct experts *experts, uint32_t fetches_max);

struct expert_stats {
    uint64_t resident, total, hits, misses, fetched_bytes, prefetched, given_back;
};
void experts_stats(const struct experts *experts, struct expert_stats *out);

#endif
