// SPDX-License-Identifier: Apache-2.0
// QK-norm + RoPE + KV write, and paged causal attention over KV blocks.
//
// A KV block holds block_tokens positions of all layers, [layer][K|V][kv_head][token][dim] in the
// compute dtype; a layer's part never straddles a page: page = layer / layers_per_page of the
// block's pages, the part at (layer % layers_per_page) * part_bytes in it.
#ifndef POLDER_KERNELS_ATTENTION_H
#define POLDER_KERNELS_ATTENTION_H

#include <stddef.h>
#include <stdint.h>

enum { KV_SEGMENT = 256 }; // tokens reduced together; merged in ascending order

struct kv_shape {
    uint32_t layers, kv_heads, head_dim;
    uint32_t block_tokens, pages_per_block, layers_per_page;
    size_t part_bytes; // 2 * kv_heads * block_tokens * head_dim * element
};

struct kv_view {
    uint8_t *arena;
    size_t page_bytes;
    const uint32_t *pages; // [sequences][blocks_max][pages_per_block], page numbers
    uint32_t blocks_max;
    struct kv_shape shape;
};

// For each row: q and k heads are RMS-normalised over head_dim (weights NULL: skipped), rotated by
// the row's position (NeoX halves: pairs (i, i + head_dim / 2), angle position *
// theta^(-2i/head_dim)), k and v written to the row's KV slot. q is rotated in place.
struct qk_args {
    float *q;       // [rows][q_stride], heads * head_dim used
    const float *k; // [rows][k_stride]
    const float *v; // [rows][v_stride]
    size_t q_stride, k_stride, v_stride;
    const float *q_weight, *k_weight; // [head_dim] or NULL
    const float *inv_freq;            // [head_dim / 2], fp32
    const uint32_t *sequence;         // [rows] index into kv->pages
    const uint32_t *position;         // [rows]
    struct kv_view kv;
    uint32_t rows, heads, layer;
    float epsilon;
};

// out[row][head] = softmax(q . K[0..position] * scale) V. Rows of one sequence stand together in
// ascending position (a prefill chunk) or alone (decode). KV of the rows themselves is already
// written.
struct attention_args {
    const float *q; // [rows][q_stride]
    size_t q_stride;
    void *out; // act [rows][heads * head_dim]
    const uint32_t *sequence, *position;
    struct kv_view kv;
    uint32_t rows, heads, layer;
    float scale;
};

#endif
