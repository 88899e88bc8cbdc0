// SPDX-License-Identifier: Apache-2.0
// Mixture of experts: router top-k, the task map with the residency test, expert GEMMs from tiles
// through the page table, combine in slot order.
//
// A pair is (row, slot): pair = row * top_k + slot. Expert outputs are written per pair and
// combined in slot order, never in arrival order.
#ifndef POLDER_KERNELS_MOE_H
#define POLDER_KERNELS_MOE_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "kernels/lora.h"

// logits[row][e] = x[row] . W[e], all fp32; softmax over all experts; the top_k largest in
// descending order, ties to the lower index; weights renormalised to sum 1 when normalize. A row
// whose logits are not finite gets experts 0..top_k-1 with weight NaN, so that only that row is
// lost.
struct router_args {
    const float *x;      // [rows][dim], the fp32 output of rmsnorm
    const float *weight; // [experts][dim] fp32, row-major
    uint32_t *expert;    // [rows][top_k]
    float *gate;         // [rows][top_k]
    uint32_t rows, dim, experts, top_k;
    bool normalize;
};

// The experts of one layer in the pool. Expert e's tiles stand in pages[e * pages_per_expert + i]:
// first gate+up interleaved (2*intermediate x hidden), then from tile down_tile on down (hidden x
// intermediate).
struct expert_view {
    const uint8_t *arena;
    size_t page_bytes;
    const uint32_t *pages; // [experts][pages_per_expert]; PAGE_NONE in any of them: not resident
    uint32_t pages_per_expert, experts, down_tile;
};

// The experts of this rank (kernels/comm.h): [first, first + count). count 0: all of them. Pairs of
// other ranks' experts are nothing to do here.
struct expert_range {
    uint32_t first, count;
};

static inline bool expert_is_mine(const struct expert_range *range, uint32_t expert)
{
    return !range->count || expert - range->first < range->count;
}

// Work areas of one MoE layer in one step; kept while a gate waits, so that what is done stays
// done.
struct moe_work {
    uint32_t *expert; // [rows][top_k] from router
    float *gate;      // [rows][top_k] from router
    uint32_t *begin;  // [experts + 1]: pairs of expert e are order[begin[e] .. begin[e+1])
    uint32_t *order;  // [rows * top_k] pair numbers, ascending within an expert
    // [experts]: 0 no pairs, 1 to run now, 2 waiting for pages, 3 done (a backend may leave 1 until
    // the next map says 3)
    uint8_t *state;
    void *hidden; // act [rows * top_k][intermediate], by pair
    float *out;   // [rows * top_k][dim], by pair
};

// Sorts pairs by expert; marks experts with pairs 1 (resident) or 2 (missing), and leaves those in
// state 3 alone when `resume`. need[e] = number of pairs, host-visible (activation history, what to
// bring). When an expert is missing: the miss state of the stream is set with `layer`. Experts of
// other ranks keep their place in begin and order and get state 0 and need 0.
//
// With expert LoRA an expert is missing also when a page of the part (lora.h) of one of its pairs'
// adapters is. part_wanted[segment][expert] becomes 1 for every missing expert and the segments
// with pairs of it whose adapter has a part there: all of these have to be there at once (who reads
// it clears it). page_used becomes 1 for the pages that were found.
struct moe_map_args {
    struct moe_work work;
    struct expert_view view;
    uint32_t *need;      // [experts], host-visible
    uint8_t *host_state; // [experts], host-visible, or NULL: state as the map left it
    uint32_t rows, top_k, layer;
    bool resume; // false: state is rebuilt
    struct expert_range mine;
    const struct lora_batch *lora; // NULL: no adapter of this step has parts
    uint8_t *part_wanted;          // [segments][experts], host-visible
    uint8_t *page_used;            // [pages of the arena], or NULL
};

// moe_gate_up: hidden[pair] = silu(Wg x[row] + LoRA) * (Wu x[row] + LoRA) for experts in state 1.
// moe_down:    out[pair] = Wd hidden[pair] + LoRA, then state 1 -> 3. Both run during a miss of
// this layer.
struct moe_gemm_args {
    struct moe_work work;
    struct expert_view view;
    const void *x; // act [rows][dim]; used by moe_gate_up
    uint32_t rows, dim, intermediate, top_k, layer;
    const struct lora_batch *lora; // NULL: no expert LoRA in this step
};

// y[row] += sum over slots ascending of gate[row][slot] * out[row * top_k + slot], over slots whose
// expert is this rank's. replace: y[row] = that sum.
struct moe_combine_args {
    struct moe_work work;
    float *y; // [rows][dim]
    uint32_t rows, dim, top_k;
    struct expert_range mine;
    bool replace;
};

#endif
