// SPDX-License-Identifier: Apache-2.0
// Choosing the page size. Pure functions over shapes.
//
// A page size wastes: the end of an expert's last page, the end of a KV block's pages, and on
// average half a KV block at the end of every sequence. Measured (DESIGN.md 4): bigger pages copy
// faster up to 512 KiB, nothing is gained beyond. So: the largest size up to 512 KiB that wastes at
// most 1% more than the best; a larger one only when it is better by more than that.
#include "runtime/model/internal.h"

#include "base/arith.h"
#include "runtime/kv/kv.h"

enum { PAGE_MIN = 32 << 10, PAGE_PREFERRED = 512 << 10, PAGE_MAX = 2 << 20 };
static const double TIE = 0.01;
static const double SEQUENCE_TOKENS = 512; // a typical length, for the half block at its end

struct expert_shape model__expert_shape(const struct model_config *config, enum dtype dtype,
                                        size_t page_bytes)
{
    struct expert_shape shape = {.experts = config->experts,
                                 .hidden = config->hidden,
                                 .intermediate = config->moe_intermediate,
                                 .dtype = dtype,
                                 .page_bytes = page_bytes};
    if (!config->experts)
        return (struct expert_shape){0};
    for (uint32_t layer = 0; layer < config->layers; layer++)
        shape.layers += config->is_moe[layer];
    expert_shape_complete(&shape);
    return shape;
}

// Wasted over used, of both kinds. False when a layer's KV does not fit such a page.
static bool waste(const struct model_config *config, enum dtype dtype, size_t page_bytes,
                  double *out)
{
    struct kv_shape kv;
    struct fault fault;
    if (kv_shape_choose(config->layers, config->kv_heads, config->head_dim, dtype, page_bytes, &kv,
                        &fault))
        return false;
    double used = (double)kv.layers * (double)kv.part_bytes;
    *out = (double)kv.pages_per_block * (double)page_bytes / used - 1.0;
    *out += (double)kv.block_tokens / 2 / SEQUENCE_TOKENS;
    if (config->experts) {
        struct expert_shape shape = model__expert_shape(config, dtype, page_bytes);
        size_t tiles = shape.down_tile + tile_count(dtype, shape.hidden, shape.intermediate);
        *out += (double)shape.pages_per_expert * (double)page_bytes / ((double)tiles * TILE_BYTES) -
                1.0;
    }
    return true;
}

enum status model__page_bytes(const struct model_config *config, enum dtype dtype, size_t asked,
                              size_t *out, struct fault *fault)
{
    double least = 0, score = 0;
    if (asked) {
        if (!is_power_of_two(asked) || asked < PAGE_MIN || asked > PAGE_MAX)
            return fault_set(fault, STATUS_INVALID,
                             "the page size must be a power of two from 32 KiB to 2 MiB, not %zu.",
                             asked);
        if (!waste(config, dtype, asked, &score))
            return fault_set(fault, STATUS_INVALID,
                             "one layer's KV of 8 tokens does not fit a page of %zu bytes.", asked);
        *out = asked;
        return STATUS_OK;
    }
    size_t best = 0;
    for (size_t page = PAGE_MIN; page <= PAGE_MAX; page *= 2)
        if (waste(config, dtype, page, &score) && (!best || score < least)) {
            least = score;
            best = page;
        }
    if (!best)
        return fault_set(fault, STATUS_UNSUPPORTED,
                         "one layer's KV of 8 tokens does not fit a page of 2 MiB.");
    for (size_t page = PAGE_MIN; page <= PAGE_PREFERRED; page *= 2)
        if (waste(config, dtype, page, &score) && score <= least + TIE &&
            (page > best || best > PAGE_PREFERRED))
            best = page;
    *out = best;
    return STATUS_OK;
}
