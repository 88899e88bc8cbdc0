// SPDX-License-Identifier: Apache-2.0
// What the files of this folder share. Nobody else includes it.
//
// A block is used by `refs` sequences, of which `active` are not swapped out. Where it is follows
// from that alone, and block_settle (blocks.c) is the one function that puts it there:
//
//   active > 0             on the device without a host copy, or coming; in no list, or still in
//   the leaving list active = 0, refs > 0   leaving: a write-back is under way, in the leaving list
//                          on the host only, in no list
//                          still on the device without a host copy (another sequence left it
//                          behind): in the list KV_HELD, offered to the pool at the full price;
//                          given back it is lost
//   refs = 0               in the index and on the device: cached, in the list of its hits; else it
//   is freed
#ifndef POLDER_RUNTIME_KV_INTERNAL_H
#define POLDER_RUNTIME_KV_INTERNAL_H

#include "base/check.h"
#include "runtime/kv/kv.h"

enum { NONE = 0xffffffff };
// Lists of blocks that can be offered: by the power of two of their hits, then KV_HELD.
enum { KV_HIT_LISTS = 8, KV_HELD = KV_HIT_LISTS, KV_LEAVING_LIST, KV_LISTS };

struct block {
    pool_object object; // 0: lost
    struct digest key;  // of all tokens up to its end, when is_indexed or counted by sequence.keyed
    uint64_t used_us;   // when the last sequence let go of it
    uint32_t refs, active;
    uint32_t hits;       // times a prefix was found here
    uint32_t tokens;     // positions that hold KV
    uint32_t next, prev; // of the list it is in, or of the free list
    uint8_t list;        // KV_LISTS: none
    bool is_live, is_indexed, write_failed;
};

struct block_list {
    uint32_t head, tail, count; // oldest first
};

struct sequence {
    uint32_t generation, next_free;
    uint32_t owner, blocks, computed;
    uint32_t keyed; // leading blocks whose key is known
    uint32_t pins;
    struct digest root;
    enum kv_state state;
    bool is_open, is_active;
};

struct kv {
    struct kv_options options;
    struct sequence *sequences;
    uint32_t sequence_free, sequences_open;
    uint32_t *tables;  // [sequences_max][blocks_max], block numbers
    uint32_t *scratch; // [blocks_max]
    struct block *blocks;
    uint32_t blocks_total, block_free, blocks_live;
    struct block_list lists[KV_LISTS];
    uint32_t *index; // open addressing, linear probing; block numbers, NONE: empty
    uint32_t index_mask, indexed;
    uint64_t prefix_queries, prefix_hits, copies_on_write, swapped_out, swapped_in;
};

struct sequence *kv__sequence(const struct kv *kv, kv_sequence handle); // CHECKs that it is open
static inline uint32_t *kv__table(const struct kv *kv, const struct sequence *sequence)
{
    return kv->tables + (size_t)(sequence - kv->sequences) * kv->options.blocks_max;
}

// prefix.c
struct digest kv__chain(const struct kv *kv, const struct digest *before, const int32_t *tokens);
uint32_t kv__index_find(const struct kv *kv, const struct digest *key); // NONE
void kv__index_add(struct kv *kv, uint32_t block);                      // its key is not there yet
void kv__index_remove(struct kv *kv, uint32_t block);

// blocks.c
// A fresh block with a pool object and no pages, used by one active sequence. FULL.
enum status kv__block_new(struct kv *kv, uint32_t owner, uint32_t *out);
void kv__block_settle(struct kv *kv, uint32_t block); // after any change of refs, active or copies
void kv__block_release(struct kv *kv, uint32_t block, bool was_active);
void kv__list_append(struct kv *kv, uint32_t block, uint32_t list); // from wherever it is
void kv__list_remove(struct kv *kv, uint32_t block);
void kv__offer(struct kv *kv); // installs the pressure callbacks

// swap.c
void kv__write_backs_end(struct kv *kv); // what has been written leaves the device

#endif
