// SPDX-License-Identifier: Apache-2.0
// LoRA of the embeddings: hidden[row][j] = A[token[row]][j], bf16 -> fp32 (lora.h: A by token). A
// warp per row: it looks for the row's segment, then copies up to 512 ranks. Bound by the launch,
// and by two dependent reads behind it (page number, row). No sums: the bits are A's own.
#include "kernels/cuda/lora.cuh"

struct gather_work {
    struct lora_work w;
    const int32_t *token;
    float *hidden;
    uint32_t vocab;
};

// The adapter of a row, or LORA_BASE.
__device__ __forceinline__ uint32_t adapter_of(const struct lora_work &w, uint32_t row)
{
    uint32_t low = 0, high = control_lora_segments(w.control);
    while (low < high) { // the last segment that begins at or before the row
        uint32_t middle = (low + high) / 2;
        if (w.row_begin[middle] <= row)
            low = middle + 1;
        else
            high = middle;
    }
    return low && row < w.row_begin[low] ? w.adapter[low - 1] : LORA_BASE;
}

static __global__ void lora_gather_kernel(const __grid_constant__ struct gather_work a)
{
    uint32_t rows, row = blockIdx.x * WARPS + threadIdx.x / 32;
    if (!segment_enter(a.w.control, a.w.slot, &rows) || row >= rows)
        return;
    uint32_t adapter = adapter_of(a.w, row);
    if (adapter == LORA_BASE)
        return;
    const struct lora_adapter_view view = a.w.adapters[adapter];
    const struct lora_slice slice = (view.pairs + (uint64_t)a.w.pair[0] * view.experts)->a;
    if (!slice.rank)
        return;
    uint32_t token = (uint32_t)a.token[row]; // negative: beyond any vocabulary
    bool lost = token >= a.vocab;
    const uint16_t *from = (const uint16_t *)lora_row(a.w.arena, a.w.page_bytes, view.pages, &slice,
                                                      lost ? 0 : token);
    float *to = a.hidden + (uint64_t)row * control_lora_rank(a.w.control);
    for (uint32_t j = threadIdx.x % 32; j < slice.rank; j += 32)
        to[j] = lost ? 0.0f : __uint_as_float((uint32_t)from[j] << 16);
}

void cuda__lora_gather(const struct cuda_launch *l, const struct lora_gather_args *a)
{
    CHECK(a->module == LORA_EMBED);
    struct gather_work g = {};
    g.w = work_of(l, a->batch);
    g.w.pair[0] = (uint32_t)lora_pair_row(a->layer, a->module);
    g.token = a->token;
    g.hidden = a->hidden;
    g.vocab = a->vocab;
    launch_kernel(l, lora_gather_kernel, dim3((l->rows_max + WARPS - 1) / WARPS), dim3(THREADS), 0,
                  g);
}
