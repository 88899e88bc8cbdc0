// SPDX-License-Identifier: Apache-2.0
// Sequences: their block tables, prefix matching, room for new positions, copy-on-write. Blocks are
// in blocks.c, the index in prefix.c, swapping in swap.c.
//
// Invariants
//   1. [0, computed) of a sequence hold KV; positions from `computed` on are what is written next.
//   2. A block that will be written is used by this sequence alone and not in the index: kv_reserve
//   copies it
//      or takes it out first. So what the index points at never changes.
//   3. The first `keyed` blocks have their chain key; keyed * block_tokens <= computed.
#include "runtime/kv/kv.h"

#include <stdlib.h>
#include <string.h>

#include "runtime/kv/internal.h"
#include "unified_pool/place.h"

enum { SLOT_BITS = 20 };

static void lay_out(struct placer *placer, const struct kv_options *options, struct kv **self,
                    struct kv *body)
{
    *self = place(placer, 1, sizeof **self);
    body->sequences = place(placer, options->sequences_max, sizeof(struct sequence));
    body->tables =
        place(placer, (size_t)options->sequences_max * options->blocks_max, sizeof(uint32_t));
    body->scratch = place(placer, options->blocks_max, sizeof(uint32_t));
    body->blocks = place(placer, body->blocks_total, sizeof(struct block));
    body->index = place(placer, (size_t)body->index_mask + 1, sizeof(uint32_t));
}

// Every block has pages on the device or the host, or is lost and waits for its sequences to
// notice.
static uint32_t count_blocks(const struct kv_options *options)
{
    struct pool_stats stats;
    pool_stats(options->pool, &stats);
    uint32_t pages = stats.device_total + stats.host_total;
    return pages / options->shape.pages_per_block + options->sequences_max;
}

static void fill(struct kv *kv)
{
    for (uint32_t i = 0; i < kv->options.sequences_max; i++) {
        kv->sequences[i].generation = 1;
        kv->sequences[i].next_free = i + 1 < kv->options.sequences_max ? i + 1 : NONE;
    }
    for (uint32_t i = 0; i < kv->blocks_total; i++) {
        kv->blocks[i].next = i + 1 < kv->blocks_total ? i + 1 : NONE;
        kv->blocks[i].list = KV_LISTS;
    }
    for (int i = 0; i < KV_LISTS; i++)
        kv->lists[i] = (struct block_list){NONE, NONE, 0};
    for (uint32_t i = 0; i <= kv->index_mask; i++)
        kv->index[i] = NONE;
}

enum status kv_create(const struct kv_options *options, struct kv **out)
{
    const struct kv_shape *shape = &options->shape;
    if (!options->pool || !options->sequences_max || options->sequences_max >= 1u << SLOT_BITS ||
        !options->blocks_max || !shape->block_tokens || !shape->pages_per_block)
        return STATUS_INVALID;
    struct kv body = {.options = *options, .blocks_total = count_blocks(options)};
    uint32_t slots = 16;
    while (slots < 2 * body.blocks_total)
        slots *= 2;
    body.index_mask = slots - 1;
    struct kv *self;
    struct placer placer = {0};
    lay_out(&placer, options, &self, &body);
    void *memory = calloc(1, placer.used);
    if (!memory)
        return STATUS_NO_MEMORY;
    placer = (struct placer){.base = memory};
    lay_out(&placer, options, &self, &body);
    *self = body;
    fill(self);
    kv__offer(self);
    *out = self;
    return STATUS_OK;
}

void kv_destroy(struct kv *kv)
{
    if (!kv)
        return;
    struct pool_pressure none = {0};
    pool_set_pressure(kv->options.pool, PAGE_KV, &none);
    for (uint32_t i = 0; i < kv->blocks_total; i++) {
        struct block *block = &kv->blocks[i];
        if (!block->is_live || !block->object.bits)
            continue;
        while (pool_pins(kv->options.pool, block->object))
            pool_unpin(kv->options.pool, block->object);
        pool_object_destroy(kv->options.pool, block->object);
    }
    free(kv);
}

void kv_set_recompute(struct kv *kv, float us_per_token)
{
    kv->options.recompute_us_per_token = us_per_token;
}

// ---- sequences ----

struct sequence *kv__sequence(const struct kv *kv, kv_sequence handle)
{
    uint32_t slot = (handle.bits & ((1u << SLOT_BITS) - 1)) - 1;
    CHECK(slot < kv->options.sequences_max);
    struct sequence *sequence = &kv->sequences[slot];
    CHECK(sequence->is_open &&
          handle.bits >> SLOT_BITS == (sequence->generation & ((1u << (32 - SLOT_BITS)) - 1)));
    return sequence;
}

enum status kv_open(struct kv *kv, uint32_t owner, const struct digest *root, kv_sequence *out)
{
    uint32_t slot = kv->sequence_free;
    if (slot == NONE)
        return STATUS_FULL;
    struct sequence *sequence = &kv->sequences[slot];
    kv->sequence_free = sequence->next_free;
    *sequence = (struct sequence){.generation = sequence->generation,
                                  .owner = owner,
                                  .root = *root,
                                  .state = KV_RESIDENT,
                                  .is_open = true,
                                  .is_active = true};
    kv->sequences_open++;
    *out = (kv_sequence){sequence->generation << SLOT_BITS | (slot + 1)};
    return STATUS_OK;
}

void kv_drop(struct kv *kv, kv_sequence handle)
{
    struct sequence *sequence = kv__sequence(kv, handle);
    CHECK(!sequence->pins);
    uint32_t *table = kv__table(kv, sequence);
    while (sequence->blocks) // the last first: see blocks.c
        kv__block_release(kv, table[--sequence->blocks], sequence->is_active);
    sequence->computed = sequence->keyed = 0;
    sequence->state = KV_RESIDENT;
    sequence->is_active = true;
}

void kv_close(struct kv *kv, kv_sequence handle)
{
    kv_drop(kv, handle);
    struct sequence *sequence = kv__sequence(kv, handle);
    sequence->is_open = false;
    sequence->generation++;
    sequence->next_free = kv->sequence_free;
    kv->sequence_free = (uint32_t)(sequence - kv->sequences);
    kv->sequences_open--;
}

// ---- prefixes ----

uint32_t kv_match_prefix(struct kv *kv, kv_sequence handle, const int32_t *tokens, uint32_t count)
{
    struct sequence *sequence = kv__sequence(kv, handle);
    CHECK(!sequence->blocks && !sequence->pins && sequence->state == KV_RESIDENT);
    kv->prefix_queries += count;
    if (!kv->options.prefix_sharing || !count)
        return 0;
    uint32_t block_tokens = kv->options.shape.block_tokens;
    uint32_t *table = kv__table(kv, sequence), found = 0;
    struct digest key = sequence->root;
    for (; found < count / block_tokens && found < kv->options.blocks_max; found++) {
        key = kv__chain(kv, &key, tokens + (size_t)found * block_tokens);
        uint32_t index = kv__index_find(kv, &key);
        if (index == NONE || !pool_is_resident(kv->options.pool, kv->blocks[index].object))
            break;
        struct block *block = &kv->blocks[index];
        block->refs++;
        block->active++;
        block->hits += block->hits < UINT32_MAX;
        block->write_failed = false;
        kv__block_settle(kv, index);
        if (block->list != KV_LEAVING_LIST) // another sequence may have just brought it back
            pool_drop_host(kv->options.pool, block->object);
        table[found] = index;
    }
    uint32_t known = found * block_tokens;
    sequence->blocks = found;
    sequence->computed = known < count ? known : count - 1; // the last token is always computed
    sequence->keyed = sequence->computed / block_tokens;
    kv->prefix_hits += sequence->computed;
    return sequence->computed;
}

void kv_commit(struct kv *kv, kv_sequence handle, const int32_t *tokens, uint32_t computed)
{
    struct sequence *sequence = kv__sequence(kv, handle);
    uint32_t block_tokens = kv->options.shape.block_tokens;
    uint32_t *table = kv__table(kv, sequence), before = sequence->computed;
    CHECK(div_up(computed, block_tokens) <= sequence->blocks);
    uint32_t least = before < computed ? before : computed;
    uint32_t most = before < computed ? computed : before;
    for (uint32_t i = least / block_tokens; i < div_up(most, block_tokens); i++) {
        struct block *block = &kv->blocks[table[i]];
        uint32_t begin = i * block_tokens;
        uint32_t mine = computed <= begin                 ? 0
                        : computed - begin < block_tokens ? computed - begin
                                                          : block_tokens;
        if (block->refs == 1)
            block->tokens = mine;
        if (mine < block_tokens && block->refs == 1 && block->is_indexed)
            kv__index_remove(kv, table[i]); // rolled back: other tokens may follow
    }
    if (sequence->keyed > computed / block_tokens)
        sequence->keyed = computed / block_tokens;
    sequence->computed = computed;
    for (; sequence->keyed < computed / block_tokens; sequence->keyed++) {
        uint32_t i = sequence->keyed;
        struct block *block = &kv->blocks[table[i]];
        const struct digest *parent = i ? &kv->blocks[table[i - 1]].key : &sequence->root;
        struct digest key = kv__chain(kv, parent, tokens + (size_t)i * block_tokens);
        if (block->is_indexed) { // shared, or computed again in place
            CHECK(digest_equal(&key, &block->key));
            continue;
        }
        block->key = key;
        if (kv->options.prefix_sharing && kv__index_find(kv, &key) == NONE)
            kv__index_add(kv, table[i]);
    }
}

// ---- room ----

// Blocks of the table that positions [computed, tokens) will write although others may read them.
static uint32_t first_written(const struct kv *kv, const struct sequence *sequence)
{
    uint32_t first = sequence->computed / kv->options.shape.block_tokens;
    return first < sequence->blocks ? first : sequence->blocks;
}

static uint32_t count_copies(const struct kv *kv, const struct sequence *sequence, uint32_t blocks)
{
    const uint32_t *table = kv__table(kv, sequence);
    uint32_t count = 0;
    for (uint32_t i = first_written(kv, sequence); i < sequence->blocks && i < blocks; i++)
        count += kv->blocks[table[i]].refs > 1;
    return count;
}

// `count` fresh blocks with device pages into out, or FULL and nothing.
static enum status fresh_blocks(struct kv *kv, uint32_t owner, uint32_t *out, uint32_t count)
{
    struct pool *pool = kv->options.pool;
    uint32_t made = 0;
    enum status status = STATUS_OK;
    for (; made < count && !status; made += !status)
        status = kv__block_new(kv, owner, &out[made]);
    if (!status)
        status = pool_make_room(pool, count * kv->options.shape.pages_per_block);
    for (uint32_t i = 0; i < made && !status; i++)
        status = pool_reserve(pool, kv->blocks[out[i]].object);
    if (status)
        while (made)
            kv__block_release(kv, out[--made], true);
    return status;
}

static void copy_block(struct kv *kv, uint32_t to, uint32_t from, const struct kv_copier *copier)
{
    struct pool *pool = kv->options.pool;
    const uint32_t *to_pages = pool_device_pages(pool, kv->blocks[to].object);
    const uint32_t *from_pages = pool_device_pages(pool, kv->blocks[from].object);
    for (uint32_t p = 0; p < kv->options.shape.pages_per_block; p++)
        copier->copy(copier->context, pool_device_address(pool, to_pages[p]),
                     pool_device_address(pool, from_pages[p]), kv->options.page_bytes);
    kv->copies_on_write++;
}

// Makes the written blocks this sequence's own, with the fresh ones at `fresh`.
static void own_written(struct kv *kv, struct sequence *sequence, uint32_t blocks, uint32_t *fresh,
                        const struct kv_copier *copier)
{
    struct pool *pool = kv->options.pool;
    uint32_t *table = kv__table(kv, sequence), block_tokens = kv->options.shape.block_tokens;
    for (uint32_t i = first_written(kv, sequence); i < sequence->blocks && i < blocks; i++) {
        uint32_t old = table[i];
        if (kv->blocks[old].refs == 1) {
            if (kv->blocks[old].is_indexed)
                kv__index_remove(kv, old);
            if (kv->blocks[old].list ==
                KV_LEAVING_LIST) { // of one that has closed: it would be stale
                kv__list_remove(kv, old);
                pool_drop_host(pool, kv->blocks[old].object);
            }
        } else {
            table[i] = *fresh++;
            if (sequence->computed > i * block_tokens) {
                copy_block(kv, table[i], old, copier);
                kv->blocks[table[i]].tokens = sequence->computed - i * block_tokens;
            }
            if (sequence->pins) {
                pool_pin(pool, kv->blocks[table[i]].object);
                pool_unpin(pool, kv->blocks[old].object);
            }
            kv__block_release(kv, old, true);
        }
        if (sequence->keyed > i)
            sequence->keyed = i;
    }
}

enum status kv_reserve(struct kv *kv, kv_sequence handle, uint32_t tokens,
                       const struct kv_copier *copier)
{
    struct sequence *sequence = kv__sequence(kv, handle);
    CHECK(sequence->state == KV_RESIDENT);
    if (tokens <= sequence->computed)
        return STATUS_OK;
    uint32_t blocks = (uint32_t)div_up(tokens, kv->options.shape.block_tokens);
    if (blocks > kv->options.blocks_max)
        return STATUS_LIMIT;
    uint32_t copies = count_copies(kv, sequence, blocks);
    uint32_t more = blocks > sequence->blocks ? blocks - sequence->blocks : 0;
    if (copies + more) {
        // Copies stand first in scratch; copies + more <= blocks <= blocks_max.
        enum status status = fresh_blocks(kv, sequence->owner, kv->scratch, copies + more);
        if (status)
            return status;
    }
    CHECK(!copies || copier);
    own_written(kv, sequence, blocks, kv->scratch, copier);
    uint32_t *table = kv__table(kv, sequence);
    for (uint32_t i = 0; i < more; i++) {
        uint32_t index = kv->scratch[copies + i];
        table[sequence->blocks++] = index;
        if (sequence->pins)
            pool_pin(kv->options.pool, kv->blocks[index].object);
    }
    return STATUS_OK;
}

// ---- running ----

void kv_fill_pages(const struct kv *kv, kv_sequence handle, uint32_t *out, uint32_t blocks_max)
{
    const struct sequence *sequence = kv__sequence(kv, handle);
    const uint32_t *table = kv__table(kv, sequence);
    uint32_t pages = kv->options.shape.pages_per_block;
    CHECK(sequence->blocks <= blocks_max && sequence->state == KV_RESIDENT);
    for (uint32_t i = 0; i < sequence->blocks; i++) {
        pool_object object = kv->blocks[table[i]].object;
        CHECK(pool_is_resident(kv->options.pool, object));
        memcpy(out + (size_t)i * pages, pool_device_pages(kv->options.pool, object),
               pages * sizeof *out);
    }
}

void kv_pin(struct kv *kv, kv_sequence handle)
{
    struct sequence *sequence = kv__sequence(kv, handle);
    const uint32_t *table = kv__table(kv, sequence);
    CHECK(sequence->state == KV_RESIDENT);
    if (sequence->pins++)
        return;
    for (uint32_t i = 0; i < sequence->blocks; i++)
        pool_pin(kv->options.pool, kv->blocks[table[i]].object);
}

void kv_unpin(struct kv *kv, kv_sequence handle)
{
    struct sequence *sequence = kv__sequence(kv, handle);
    const uint32_t *table = kv__table(kv, sequence);
    CHECK(sequence->pins);
    if (--sequence->pins)
        return;
    for (uint32_t i = 0; i < sequence->blocks; i++)
        pool_unpin(kv->options.pool, kv->blocks[table[i]].object);
}
