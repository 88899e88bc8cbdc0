// SPDX-License-Identifier: Apache-2.0
// The prefix index: from the keyed hash of (root, all tokens up to the end of a full block) to the
// block.
//
// Open addressing with linear probing over a table of at least twice the blocks there can be, so it
// never grows and never fills; removal shifts back, so there are no tombstones. Keys are outputs of
// a keyed hash that nobody outside can steer, so 8 bytes of them are the position; the whole key is
// compared.
#include <string.h>

#include "runtime/kv/internal.h"

struct digest kv__chain(const struct kv *kv, const struct digest *before, const int32_t *tokens)
{
    struct hash_stream stream;
    hash_begin(&stream, &kv->options.secret);
    hash_update(&stream, before->bytes, sizeof before->bytes);
    hash_update(&stream, tokens, kv->options.shape.block_tokens * sizeof *tokens);
    return hash_end(&stream);
}

static uint32_t home_of(const struct kv *kv, const struct digest *key)
{
    uint64_t head;
    memcpy(&head, key->bytes, sizeof head);
    return (uint32_t)head & kv->index_mask;
}

static uint32_t place_of(const struct kv *kv, const struct digest *key)
{
    uint32_t at = home_of(kv, key);
    while (kv->index[at] != NONE && !digest_equal(&kv->blocks[kv->index[at]].key, key))
        at = (at + 1) & kv->index_mask;
    return at;
}

uint32_t kv__index_find(const struct kv *kv, const struct digest *key)
{
    return kv->index[place_of(kv, key)];
}

void kv__index_add(struct kv *kv, uint32_t block)
{
    uint32_t at = place_of(kv, &kv->blocks[block].key);
    CHECK(kv->index[at] == NONE && !kv->blocks[block].is_indexed);
    kv->index[at] = block;
    kv->blocks[block].is_indexed = true;
    kv->indexed++;
}

void kv__index_remove(struct kv *kv, uint32_t block)
{
    uint32_t hole = place_of(kv, &kv->blocks[block].key);
    CHECK(kv->index[hole] == block && kv->blocks[block].is_indexed);
    kv->blocks[block].is_indexed = false;
    kv->indexed--;
    for (uint32_t at = hole;;) {
        at = (at + 1) & kv->index_mask;
        if (kv->index[at] == NONE)
            break;
        // May the entry move into the hole? Only if its home does not lie between the hole and
        // itself.
        uint32_t home = home_of(kv, &kv->blocks[kv->index[at]].key);
        if (((at - home) & kv->index_mask) >= ((at - hole) & kv->index_mask)) {
            kv->index[hole] = kv->index[at];
            hole = at;
        }
    }
    kv->index[hole] = NONE;
}
