// SPDX-License-Identifier: Apache-2.0
// Expert LoRA inside the expert GEMMs: which adapter a pair has, and the expansion of one column.
//
// The hidden vectors stand in l->work behind the list: [position - first][2][control_lora_rank]
// fp32, where position is the place in order[]; module 1 is up, 0 gate or down.
#pragma once

#include "kernels/cuda/moe.cuh"

// Device copy of what the kernels need of a lora_batch.
struct moe_lora {
    bool present;
    const uint8_t *arena;
    uint64_t page_bytes;
    const uint32_t *row_begin, *adapter;
    const struct lora_adapter_view *adapters;
    float *hidden;
    uint32_t first, end; // positions whose hidden vectors fit
};

// The segment of a row, or NO_SEGMENT; by binary search.
enum : uint32_t { NO_SEGMENT = 0xffffffff };
__device__ __forceinline__ uint32_t moe_lora_segment(const uint32_t *row_begin, uint32_t segments,
                                                     uint32_t row)
{
    if (!segments || row < row_begin[0] || row >= row_begin[segments])
        return NO_SEGMENT;
    uint32_t low = 0, high = segments; // row_begin[low] <= row < row_begin[high]
    while (high - low > 1) {
        uint32_t middle = (low + high) / 2;
        if (row_begin[middle] <= row)
            low = middle;
        else
            high = middle;
    }
    return low;
}

// The adapter of a row, or NULL.
__device__ __forceinline__ const struct lora_adapter_view *
moe_lora_view(const struct moe_lora &b, uint32_t segments, uint32_t row)
{
    uint32_t segment = moe_lora_segment(b.row_begin, segments, row);
    uint32_t adapter = segment == NO_SEGMENT ? 0xffffffff : b.adapter[segment];
    return adapter == 0xffffffff ? NULL : b.adapters + adapter;
}

__device__ __forceinline__ const struct lora_pair *
moe_lora_pair(const struct lora_adapter_view *view, uint32_t layer, uint32_t module,
              uint32_t expert)
{
    return view->pairs + ((uint64_t)layer * LORA_MODULES + module) * view->experts +
           (view->experts > 1 ? expert : 0);
}

// scale * sum_j hidden[j] * Bt[j][col], j ascending.
__device__ __forceinline__ float moe_lora_column(const struct moe_lora &b,
                                                 const struct lora_adapter_view *view,
                                                 const struct lora_pair *pair, const float *hidden,
                                                 uint32_t col)
{
    struct lora_slice s = pair->b;
    float sum = 0;
    if (!s.rank)
        return 0;
    uint32_t left = ((uint32_t)b.page_bytes - s.first_byte) / s.row_bytes, slot = s.first_slot;
    uint64_t byte = s.first_byte;
    for (uint32_t j = 0; j < s.rank;) {
        const uint8_t *row = b.arena + view->pages[slot++] * b.page_bytes + byte + col * 2;
        uint32_t n = min(left, s.rank - j);
#pragma unroll 4
        for (uint32_t i = 0; i < n; i++)
            sum = fmaf(hidden[j + i],
                       __bfloat162float(*(const bf16 *)(row + (uint64_t)i * s.row_bytes)), sum);
        j += n;
        byte = 0;
        left = (uint32_t)b.page_bytes / s.row_bytes;
    }
    return pair->scale * sum;
}

// moe_lora.cu: the hidden vectors of positions [lora->first, lora->end).
void cuda__moe_shrink(const struct cuda_launch *l, const struct moe_gemm_args *a, bool down,
                      const struct moe_lora *lora);
