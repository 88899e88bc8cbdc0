// SPDX-License-Identifier: Apache-2.0
// KV cache: block tables over pool objects, prefix sharing, copy-on-write, swapping.
//
// A sequence has a block table; a block is one pool object (kind KV) that holds block_tokens
// positions of all layers. Full blocks are entered into the prefix index under a keyed BLAKE2b
// chain over (root key, token ids); a root key is BLAKE2b of (tenant salt, base digest, adapter
// digest), so that KV of two tenants or two adapters is never mixed. Blocks nobody uses stay in the
// index until the pool wants their pages (price: time to recompute them x probability of use).
//
// Engine thread only. Nothing allocates after kv_create.
#ifndef POLDER_RUNTIME_KV_KV_H
#define POLDER_RUNTIME_KV_KV_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "base/clock.h"
#include "base/hash.h"
#include "base/status.h"
#include "kernels/attention.h"
#include "kernels/tile.h"
#include "unified_pool/pool.h"

struct kv;

typedef struct {
    uint32_t bits; // slot and generation, 0: none
} kv_sequence;

struct kv_options {
    struct pool *pool;
    struct clock clock;
    struct kv_shape shape;
    size_t page_bytes;
    uint32_t sequences_max, blocks_max; // per sequence
    struct digest secret;               // key of the hash chain, random per process
    float recompute_us_per_token; // for the price; measured by the engine, see kv_set_recompute
    bool prefix_sharing;
};

// Chooses block_tokens (8, 16, 32), pages per block and layers per page that waste least for a
// model. INVALID when one layer's part of 8 tokens does not fit a page.
MUST_USE enum status kv_shape_choose(uint32_t layers, uint32_t kv_heads, uint32_t head_dim,
                                     enum dtype dtype, size_t page_bytes, struct kv_shape *out,
                                     struct fault *fault);

// Installs the pool's pressure callbacks for PAGE_KV. Destroy before the copy queues and the pool.
MUST_USE enum status kv_create(const struct kv_options *options, struct kv **out);
void kv_destroy(struct kv *kv);
void kv_set_recompute(struct kv *kv, float us_per_token);

// What giving a cached block back costs, in microseconds per byte: (1 + hits) / (2 + hits + age /
// 30 s), taken as the probability that it is used within 30 s and so, spread evenly, within
// POOL_HORIZON_US, times the time to recompute it, per byte. Falls with age, rises with hits; both
// are what is known about a block that was let go `age_us` ago.
float kv_price(uint32_t hits, uint64_t age_us, float recompute_us, size_t bytes);

MUST_USE enum status kv_open(struct kv *kv, uint32_t owner, const struct digest *root,
                             kv_sequence *out);
// Not while pinned. Its full blocks stay in the index while there is room.
void kv_close(struct kv *kv, kv_sequence sequence);

// Shares blocks already computed for tokens[0..count): returns how many leading tokens need no
// prefill (whole blocks, plus a copied partial block when the implementation has one). At most
// count - 1, so that the last token is always computed. Only on an empty sequence.
uint32_t kv_match_prefix(struct kv *kv, kv_sequence sequence, const int32_t *tokens,
                         uint32_t count);

// Makes room for positions [0, tokens): blocks with device pages; a shared block about to be
// written is copied first (copy-on-write; `copy` is asked to copy device bytes before the next
// segment runs). To be called before every segment that writes, with all positions it writes. FULL
// (try later) and LIMIT (more than blocks_max) leave the sequence as it was. Also while pinned: new
// blocks are pinned as well.
struct kv_copier {
    void (*copy)(void *context, void *to, const void *from, size_t bytes);
    void *context;
};
MUST_USE enum status kv_reserve(struct kv *kv, kv_sequence sequence, uint32_t tokens,
                                const struct kv_copier *copier);
// Positions [0, computed) hold KV of tokens[0..computed): full blocks enter the index. Fewer than
// before takes positions back (surplus tokens that were dropped).
void kv_commit(struct kv *kv, kv_sequence sequence, const int32_t *tokens, uint32_t computed);

// Page numbers of the sequence's blocks into out[blocks * pages_per_block]; CHECKs that it is
// resident.
void kv_fill_pages(const struct kv *kv, kv_sequence sequence, uint32_t *out, uint32_t blocks_max);
void kv_pin(struct kv *kv, kv_sequence sequence);   // before a segment is submitted; they nest
void kv_unpin(struct kv *kv, kv_sequence sequence); // when it has retired

// Swap out: blocks used by this sequence alone go to host pages and leave the device. Shared blocks
// stay or go with the last user. Swap in brings them back. Both run in the copy queues: poll with
// kv_state, after pool_poll. FULL (no host pages; no device pages) leaves the sequence as it was,
// BUSY: still on the way. A LOST sequence can only be dropped or closed.
enum kv_state { KV_RESIDENT, KV_LEAVING, KV_SWAPPED, KV_COMING, KV_LOST };
MUST_USE enum status kv_swap_out(struct kv *kv, kv_sequence sequence, enum copy_class class);
MUST_USE enum status kv_swap_in(struct kv *kv, kv_sequence sequence, enum copy_class class);
enum kv_state kv_state(struct kv *kv, kv_sequence sequence); // LOST: a copy failed, recompute
// Gives up the KV of a sequence (recompute later): computed becomes 0, the table empty.
void kv_drop(struct kv *kv, kv_sequence sequence);

struct kv_stats {
    uint64_t reserved_bytes; // device pages of sequences' blocks
    uint64_t used_bytes;     // bytes of positions that hold KV
    uint64_t cached_blocks;  // in the index, used by nobody
    uint64_t sequences, blocks, shared_blocks;
    uint64_t prefix_queries, prefix_hits; // in tokens
    uint64_t copies_on_write, swapped_out, swapped_in;
};
void kv_stats(const struct kv *kv, struct kv_stats *out); // walks all blocks: for reports
uint32_t kv_cached_blocks(const struct kv *kv);           // kv_stats.cached_blocks, at once
void kv_check(const struct kv *kv);

#endif
