// SPDX-License-Identifier: Apache-2.0
// Expert LoRA, the shrink: hidden[position][module][0..rank) = A x for the pairs of experts in
// state 1 whose row has an adapter with (layer, module, expert).
//
// CTA: one position of order[] x one module x every SPLITS-th group of 8 ranks; a warp per rank,
// lane l takes the 16-byte columns l + 32 i (products of bf16 in fp32), summed by a butterfly: the
// order depends on d_in alone. Bound by the bytes of A, read once per pair; a pair without an
// adapter costs a look. Slices and act rows are padded with zeros, so whole 16-byte columns are
// read.
#include "kernels/cuda/moe_lora.cuh"

enum { SHRINK_WARPS = 8, SPLITS = 4 };

struct shrink_args {
    struct moe_gemm_args a;
    struct moe_lora lora;
    const uint8_t *x;
    uint64_t x_bytes;
    uint32_t per_x, module, modules;
};

__device__ __forceinline__ float dot_bf16(uint32_t a, uint32_t b, float sum)
{
    sum = fmaf(__uint_as_float(a << 16), __uint_as_float(b << 16), sum);
    return fmaf(__uint_as_float(a & 0xffff0000u), __uint_as_float(b & 0xffff0000u), sum);
}

// grid: (positions, modules * SPLITS)
__global__ void __launch_bounds__(SHRINK_WARPS * 32)
    shrink_kernel(const struct cuda_control *control, uint32_t slot, struct shrink_args n)
{
    uint32_t rows, lane = threadIdx.x % 32, position = n.lora.first + blockIdx.x;
    if (!segment_enter_moe(control, slot, n.a.layer, &rows) || position >= rows * n.a.top_k)
        return;
    uint32_t pair = n.a.work.order[position], expert = n.a.work.expert[pair];
    uint32_t module = blockIdx.y % n.modules, stride = control_lora_rank(control);
    if (n.a.work.state[expert] != 1)
        return;
    const struct lora_adapter_view *view =
        moe_lora_view(n.lora, control_lora_segments(control), pair / n.a.top_k);
    if (!view)
        return;
    struct lora_slice a = moe_lora_pair(view, n.a.layer, n.module + module, expert)->a;
    const uint8_t *x = n.x + pair / n.per_x * n.x_bytes;
    float *hidden = n.lora.hidden + ((uint64_t)blockIdx.x * 2 + module) * stride;
    uint32_t bytes = min(a.row_bytes, (uint32_t)n.x_bytes);
    uint32_t j = blockIdx.y / n.modules * SHRINK_WARPS + threadIdx.x / 32;
    for (; j < a.rank; j += SHRINK_WARPS * SPLITS) {
        const uint8_t *w = lora_row(n.lora.arena, n.lora.page_bytes, view->pages, &a, j);
        float sum = 0;
#pragma unroll 4
        for (uint32_t i = lane * 16; i < bytes; i += 512) {
            uint4 u = *(const uint4 *)(w + i), v = *(const uint4 *)(x + i);
            sum = dot_bf16(u.x, v.x, sum);
            sum = dot_bf16(u.y, v.y, sum);
            sum = dot_bf16(u.z, v.z, sum);
            sum = dot_bf16(u.w, v.w, sum);
        }
        sum = warp_sum(sum);
        if (lane == 0)
            hidden[j] = sum;
    }
}

void cuda__moe_shrink(const struct cuda_launch *l, const struct moe_gemm_args *a, bool down,
                      const struct moe_lora *lora)
{
    struct shrink_args n = {};
    n.a = *a;
    n.lora = *lora;
    n.x = (const uint8_t *)(down ? a->work.hidden : a->x);
    n.x_bytes = cuda__act_cols(down ? a->intermediate : a->dim) * 2;
    n.per_x = down ? 1 : a->top_k;
    n.module = down ? LORA_DOWN : LORA_GATE;
    n.modules = down ? 1 : 2;
    launch_kernel(l, shrink_kernel, dim3(lora->end - lora->first, n.modules * SPLITS),
                  dim3(SHRINK_WARPS * 32), 0, l->control, l->slot, n);
}
