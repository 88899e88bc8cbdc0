// SPDX-License-Identifier: Apache-2.0
// How many tokens a block holds and how its layers lie in pages: a pure function of the model's
// shape.
//
// Two wastes are weighed together: what a block leaves empty at the ends of its pages, and what a
// sequence of middling length leaves empty in its last block ((block_tokens - 1) / 2 tokens on
// average). The smaller reservation per token wins, the smaller block in a tie.
#include "base/arith.h"
#include "runtime/kv/kv.h"

enum { MIDDLING_TOKENS = 256 }; // sequences of 64 to 448 tokens, the run that the 4 % promise names

static const uint32_t candidates[] = {8, 16, 32};

// False when one layer's part does not fit a page.
static bool shape_for(struct kv_shape *shape, uint32_t block_tokens, size_t element,
                      size_t page_bytes)
{
    size_t part;
    if (!mul_size(2 * block_tokens * element, shape->kv_heads, &part) ||
        !mul_size(part, shape->head_dim, &part) || part > page_bytes)
        return false;
    shape->block_tokens = block_tokens;
    shape->part_bytes = part;
    shape->layers_per_page = (uint32_t)min_size(page_bytes / part, shape->layers);
    shape->pages_per_block = (uint32_t)div_up(shape->layers, shape->layers_per_page);
    return true;
}

// Reserved pages of 2 * MIDDLING_TOKENS tokens, times block_tokens.
static uint64_t weight_of(const struct kv_shape *shape)
{
    return (uint64_t)shape->pages_per_block * (2 * MIDDLING_TOKENS + shape->block_tokens - 1);
}

enum status kv_shape_choose(uint32_t layers, uint32_t kv_heads, uint32_t head_dim, enum dtype dtype,
                            size_t page_bytes, struct kv_shape *out, struct fault *fault)
{
    if (!layers || !kv_heads || !head_dim || !page_bytes)
        return fault_set(fault, STATUS_INVALID, "a KV cache needs layers, heads and a page size.");
    bool found = false;
    for (size_t i = 0; i < sizeof candidates / sizeof candidates[0]; i++) {
        struct kv_shape shape = {.layers = layers, .kv_heads = kv_heads, .head_dim = head_dim};
        if (!shape_for(&shape, candidates[i], dtype_bytes(dtype), page_bytes))
            continue;
        if (!found || weight_of(&shape) * out->block_tokens < weight_of(out) * shape.block_tokens)
            *out = shape;
        found = true;
    }
    if (found)
        return STATUS_OK;
    return fault_set(
        fault, STATUS_INVALID,
        "KV of 8 tokens of one layer (%u heads of %u) does not fit a page of %zu bytes; "
        "choose larger pages.",
        kv_heads, head_dim, page_bytes);
}
