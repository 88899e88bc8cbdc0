// SPDX-License-Identifier: Apache-2.0
// The numbers and the invariants of the KV cache, by walking everything.
#include "runtime/kv/internal.h"

uint32_t kv_cached_blocks(const struct kv *kv)
{
    uint32_t count = 0;
    for (int list = 0; list < KV_HIT_LISTS; list++)
        count += kv->lists[list].count;
    return count;
}

void kv_stats(const struct kv *kv, struct kv_stats *out)
{
    const struct kv_shape *shape = &kv->options.shape;
    uint64_t token_bytes = (uint64_t)shape->layers * shape->part_bytes / shape->block_tokens;
    *out = (struct kv_stats){.sequences = kv->sequences_open,
                             .blocks = kv->blocks_live,
                             .prefix_queries = kv->prefix_queries,
                             .prefix_hits = kv->prefix_hits,
                             .copies_on_write = kv->copies_on_write,
                             .swapped_out = kv->swapped_out,
                             .swapped_in = kv->swapped_in};
    out->cached_blocks = kv_cached_blocks(kv);
    for (uint32_t i = 0; i < kv->blocks_total; i++) {
        const struct block *block = &kv->blocks[i];
        if (!block->is_live || !block->refs)
            continue;
        out->shared_blocks += block->refs > 1;
        if (!block->object.bits || !pool_is_resident(kv->options.pool, block->object))
            continue;
        out->reserved_bytes += (uint64_t)shape->pages_per_block * kv->options.page_bytes;
        out->used_bytes += block->tokens * token_bytes;
    }
}

static void check_lists(const struct kv *kv)
{
    for (uint32_t list = 0; list < KV_LISTS; list++) {
        uint32_t count = 0, prev = NONE;
        uint64_t used_us = 0;
        for (uint32_t i = kv->lists[list].head; i != NONE; i = kv->blocks[i].next) {
            const struct block *block = &kv->blocks[i];
            CHECK(block->is_live && block->list == list && block->prev == prev);
            CHECK(block->object.bits);
            if (list < KV_HIT_LISTS) {
                CHECK(!block->refs && block->is_indexed && block->used_us >= used_us);
                CHECK(!pool_pins(kv->options.pool, block->object));
                used_us = block->used_us;
            } else {
                CHECK(block->refs && (list == KV_LEAVING_LIST || !block->active));
            }
            prev = i;
            count++;
        }
        CHECK(count == kv->lists[list].count && kv->lists[list].tail == prev);
    }
}

static void check_sequence(const struct kv *kv, const struct sequence *sequence)
{
    const uint32_t *table = kv__table(kv, sequence);
    uint32_t block_tokens = kv->options.shape.block_tokens;
    CHECK(sequence->blocks <= kv->options.blocks_max);
    CHECK(div_up(sequence->computed, block_tokens) <= sequence->blocks);
    CHECK(sequence->keyed <= sequence->computed / block_tokens);
    CHECK(sequence->is_active || sequence->state == KV_LEAVING || sequence->state == KV_SWAPPED ||
          sequence->state == KV_LOST);
    for (uint32_t i = 0; i < sequence->blocks; i++) {
        const struct block *block = &kv->blocks[table[i]];
        CHECK(block->is_live && block->refs);
        if (sequence->state == KV_RESIDENT) {
            CHECK(pool_is_resident(kv->options.pool, block->object));
            CHECK(block->list == KV_LEAVING_LIST ||
                  !pool_has_host_copy(kv->options.pool, block->object));
        }
        if (sequence->pins)
            CHECK(pool_pins(kv->options.pool, block->object));
    }
}

void kv_check(const struct kv *kv)
{
    uint32_t live = 0, indexed = 0, open = 0;
    uint64_t refs = 0, active = 0, refs_seen = 0, active_seen = 0;
    check_lists(kv);
    for (uint32_t i = 0; i < kv->blocks_total; i++) {
        const struct block *block = &kv->blocks[i];
        if (!block->is_live)
            continue;
        live++;
        refs += block->refs;
        active += block->active;
        CHECK(block->active <= block->refs);
        CHECK(block->refs || block->list < KV_HIT_LISTS);
        if (block->object.bits)
            CHECK(pool_tag(kv->options.pool, block->object) == i);
        else
            CHECK(!block->is_indexed && !block->active);
        if (block->is_indexed) {
            indexed++;
            CHECK(kv__index_find(kv, &block->key) == i);
        }
    }
    for (uint32_t s = 0; s < kv->options.sequences_max; s++) {
        const struct sequence *sequence = &kv->sequences[s];
        if (!sequence->is_open)
            continue;
        open++;
        refs_seen += sequence->blocks;
        active_seen += sequence->is_active ? sequence->blocks : 0;
        check_sequence(kv, sequence);
    }
    CHECK(live == kv->blocks_live && indexed == kv->indexed && open == kv->sequences_open);
    CHECK(refs == refs_seen && active == active_seen);
}
