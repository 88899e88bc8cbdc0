// SPDX-License-Identifier: Apache-2.0
// Random adapters for the kernel tests: in pages as the kernels see them, and as plain matrices.
#ifndef POLDER_TESTS_TEST_KERNELS_ADAPTERS_H
#define POLDER_TESTS_TEST_KERNELS_ADAPTERS_H

#include "tests/test_kernels_rig.h"

// A: [rank][d_in], B^T: [rank][d_out], values exact in the compute dtype.
struct plain_pair {
    uint32_t rank;
    float scale, *a, *b;
};

enum { ADAPTERS_MAX = 8, SEGMENTS_MAX = 130 };

struct adapters {
    struct rig *rig;
    struct lora_batch batch;
    struct lora_adapter_view *view;         // [ADAPTERS_MAX]
    struct plain_pair *plain[ADAPTERS_MAX]; // as pairs
    uint32_t count, layers, experts;
    uint32_t *row_begin, *adapter;                      // [SEGMENTS_MAX]
    uint32_t *free_pages, next_page, page, fill, align; // packing of slices, one after another
    uint8_t *arena;
    uint32_t *slots, slot_count;
};

// Adapters of the given ranks (0: an adapter with nothing). Modules LORA_GATE, LORA_UP map hidden
// to intermediate, LORA_DOWN back; d_in and d_out for all others. Here gate and up are d_in x d_out
// and down is d_out x d_in. Some (module, expert) are absent, ranks differ by module. LORA_EMBED
// has d_in tokens, LORA_HEAD a vocabulary of d_out. What does not fit a page is absent, but
// LORA_HEAD's B^T is cut.
void adapters_make(struct adapters *l, struct rig *rig, const uint32_t *ranks, uint32_t count,
                   uint32_t layers, uint32_t experts, uint32_t d_in, uint32_t d_out,
                   size_t page_bytes);
// Random segments over rows, base rows and empty segments among them.
void adapters_batch(struct adapters *l, uint32_t rows);
uint32_t adapters_of(const struct adapters *l, uint32_t row); // 0xffffffff: base
// Tells the views which pages each (layer, expert) needs: all that its slices stand in.
void adapters_parts(struct adapters *l);
// NULL: base row.
const struct plain_pair *adapters_pair(const struct adapters *l, uint32_t row, uint32_t layer,
                                       enum lora_module module, uint32_t expert);

#endif
