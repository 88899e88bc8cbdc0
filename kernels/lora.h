// SPDX-License-Identifier: Apache-2.0
// LoRA at true rank (Hu et al., 2021; segments as in Punica's SGMV): y += scale * (x A^T) B^T,
// where an adapter stores A as `rank` rows of d_in and B transposed as `rank` rows of d_out, in
// pages.
//
// Rows of a step are sorted by adapter; a segment is a run of rows of one adapter. Rows of the base
// model belong to no segment. A row of a slice is row_bytes long (64-byte multiple, zero-padded),
// rows follow one another and never straddle a page (see lora_row_at).
//
// Two forms of rows are other than that:
//   cut    B^T whose d_out columns do not fit row_bytes stands in blocks of as many columns as do:
//          row c * rank + j of the slice is block c of rank row j. (lm_head: a row of the
//          vocabulary may be longer than a page.)
//   by token   A of LORA_EMBED: row t of the slice is column t of A, rank elements, row_bytes a
//          multiple of 16, so that a look-up of a token is one piece.
#ifndef POLDER_KERNELS_LORA_H
#define POLDER_KERNELS_LORA_H

#include <stddef.h>
#include <stdint.h>

enum lora_module {
    LORA_Q,
    LORA_K,
    LORA_V,
    LORA_O,
    LORA_GATE, // dense MLP, or expert when the layer is MoE
    LORA_UP,
    LORA_DOWN,
    LORA_MODULES, // of a layer
    // Once in a model; as their `layer` counts the number of layers.
    LORA_EMBED = LORA_MODULES, // embed_tokens: lora_gather, not lora_shrink
    LORA_HEAD,                 // lm_head: over the rows that are sampled
    LORA_MODULES_ALL
};

// One A or B^T: `rank` rows from byte first_byte of page slot first_slot of the adapter. rank 0:
// absent.
struct lora_slice {
    uint32_t first_slot, first_byte, row_bytes, rank;
};

struct lora_pair {
    struct lora_slice a, b;
    float scale; // lora_alpha / rank, or / sqrt(rank) for rsLoRA
};

// The pages that the slices of one (layer, expert) stand in: slots [first, first + count) of the
// adapter. count 0: none, or such as are always there.
struct lora_part {
    uint32_t first, count;
};

// An adapter as the kernels see it.
struct lora_adapter_view {
    const uint32_t *pages;         // page numbers by slot of the adapter; PAGE_NONE in parts only
    const struct lora_pair *pairs; // [lora_pair_rows(layers)][experts_or_1], see lora_pair_at
    uint32_t experts;              // slices per module: model's experts when expert LoRA, else 1
    const struct lora_part *parts; // [layers][experts], or NULL: all of it is always there
};

// The segments of a step.
struct lora_batch {
    const uint8_t *arena;
    size_t page_bytes;
    uint32_t segments, rows;   // rows of the step: what is known when a command is recorded
    const uint32_t *row_begin; // [segments + 1]; rows [row_begin[i], row_begin[i+1]) use adapter[i]
    const uint32_t *adapter;   // [segments], index into adapters, 0xffffffff: base rows
    const struct lora_adapter_view *adapters;
    uint32_t rank_max; // largest rank in the batch: stride of `hidden`
};

// Rows of a table of pairs: [layers][LORA_MODULES], then LORA_EMBED and LORA_HEAD.
static inline size_t lora_pair_row(uint32_t layer, enum lora_module module)
{
    uint32_t m = (uint32_t)module;
    return (size_t)layer * LORA_MODULES + (m < LORA_MODULES ? m : m - LORA_MODULES);
}

static inline size_t lora_pair_rows(uint32_t layers)
{
    return (size_t)layers * LORA_MODULES + (LORA_MODULES_ALL - LORA_MODULES);
}

static inline const struct lora_pair *lora_pair_at(const struct lora_adapter_view *view,
                                                   uint32_t layer, enum lora_module module,
                                                   uint32_t expert)
{
    return view->pairs + lora_pair_row(layer, module) * view->experts +
           (view->experts > 1 ? expert : 0);
}

// Address of row `row` of a slice.
static inline const uint8_t *lora_row_at(const uint8_t *arena, size_t page_bytes,
                                         const uint32_t *pages, const struct lora_slice *slice,
                                         uint32_t row)
{
    size_t in_first = (page_bytes - slice->first_byte) / slice->row_bytes;
    if (row < in_first)
        return arena + (size_t)pages[slice->first_slot] * page_bytes + slice->first_byte +
               (size_t)row * slice->row_bytes;
    size_t left = row - in_first, per_page = page_bytes / slice->row_bytes;
    return arena + (size_t)pages[slice->first_slot + 1 + left / per_page] * page_bytes +
           left % per_page * slice->row_bytes;
}

// hidden[row][0..rank) = A[token[row]] for the rows of segments whose adapter has (layer, module);
// zeros for a token outside [0, vocab), whose row embed has lost already.
struct lora_gather_args {
    const struct lora_batch *batch;
    const int32_t *token; // [rows]
    float *hidden;        // [rows][rank_max]
    uint32_t layer, vocab;
    enum lora_module module;
};

// hidden[row][0..rank) = A x[row] for the rows of segments whose adapter has (layer, module).
struct lora_shrink_args {
    const struct lora_batch *batch;
    const void *x; // act [rows][d_in]
    float *hidden; // [rows][rank_max]
    uint32_t layer, d_in;
    enum lora_module module;
};

// y[row][..] += scale * sum_j hidden[row][j] * Bt[j][..], j ascending.
struct lora_expand_args {
    const struct lora_batch *batch;
    const float *hidden;
    float *y;
    size_t y_stride;
    uint32_t layer, d_out;
    enum lora_module module;
    int interleave_half; // -1: plain columns; 0 gate, 1 up: columns as in tile_interleaved_row
};

#endif
