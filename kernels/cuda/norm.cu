// SPDX-License-Identifier: Apache-2.0
// RMSNorm and SwiGLU: row-wise, bound by bytes in prefill and by latency at decode.
//
// rmsnorm   out[r][i] = x[r][i] * (1 / sqrt(mean(x[r]^2) + epsilon)) * weight[i]
//   x [rows][dim] fp32; out act [rows][act_cols(dim)] bf16 (padding zero) and, or, fp32
//   [rows][dim]. A CTA of 512 threads per row; thread t holds columns 4 (t + 512 v) .. +3 for v < V
//   in registers, V = 1, 2, 4, 8 by dim (up to 16,384), so that x is read once. Squares are summed
//   per thread in ascending order, then by a butterfly in the warp, then over the 16 warps in
//   order: a function of dim alone, so that batches give the same bits as single rows
//   (--batch-invariant uses the same kernel). The norm's weight is static and loaded before the
//   kernel waits for its predecessor. Shared memory: 64 bytes. Tolerance 1e-6 relative: a chain of
//   fp32 roundings.
//
// swiglu    out[r][u] = silu(gate) * up, gate and up interleaved in blocks of 8 (tile.h)
//   A thread per 4 units: 16 bytes of gate, 16 of up, 8 bytes of act. No sums.
//
// Rows whose addresses are not 16-byte aligned (odd dim, odd stride) take value by value loads; the
// thread that owns a column is the same, so are the bits.
#include "kernels/cuda/common.cuh"

enum { NORM_THREADS = 512, NORM_WARPS = NORM_THREADS / 32, SWIGLU_THREADS = 128 };

template <bool WIDE>
static __device__ __forceinline__ float4 row_load4(const float *row, uint32_t col, uint32_t cols)
{
    if (WIDE)
        return col < cols ? *(const float4 *)(row + col) : make_float4(0, 0, 0, 0);
    float4 v;
    v.x = col < cols ? row[col] : 0.0f;
    v.y = col + 1 < cols ? row[col + 1] : 0.0f;
    v.z = col + 2 < cols ? row[col + 2] : 0.0f;
    v.w = col + 3 < cols ? row[col + 3] : 0.0f;
    return v;
}

template <bool WIDE>
static __device__ __forceinline__ void row_store4(float *row, uint32_t col, uint32_t cols, float4 v)
{
    if (WIDE) {
        if (col < cols)
            *(float4 *)(row + col) = v;
        return;
    }
    if (col < cols)
        row[col] = v.x;
    if (col + 1 < cols)
        row[col + 1] = v.y;
    if (col + 2 < cols)
        row[col + 2] = v.z;
    if (col + 3 < cols)
        row[col + 3] = v.w;
}

// The sum over the CTA, in all threads.
static __device__ __forceinline__ float block_sum(float x)
{
    __shared__ float partial[NORM_WARPS];
    x = warp_sum(x);
    if (threadIdx.x % 32 == 0)
        partial[threadIdx.x / 32] = x;
    __syncthreads();
    float sum = 0;
#pragma unroll
    for (int w = 0; w < NORM_WARPS; w++)
        sum += partial[w];
    return sum;
}

template <int V, bool WIDE>
static __global__ void __launch_bounds__(NORM_THREADS)
    rmsnorm_kernel(const struct cuda_control *control, uint32_t slot, struct rmsnorm_args a,
                   uint32_t act_cols)
{
    float4 weight[V], x[V];
    uint32_t rows, row = blockIdx.x;
#pragma unroll
    for (int v = 0; v < V; v++)
        weight[v] = row_load4<WIDE>(a.weight, 4 * (threadIdx.x + NORM_THREADS * v), a.dim);
    if (!segment_enter(control, slot, &rows) || row >= rows)
        return;
    const float *from = a.x + (uint64_t)row * a.dim;
    float square = 0;
#pragma unroll
    for (int v = 0; v < V; v++)
        x[v] = row_load4<WIDE>(from, 4 * (threadIdx.x + NORM_THREADS * v), a.dim);
#pragma unroll
    for (int v = 0; v < V; v++)
        square = square + x[v].x * x[v].x + x[v].y * x[v].y + x[v].z * x[v].z + x[v].w * x[v].w;
    float scale = 1.0f / sqrtf(block_sum(square) / (float)a.dim + a.epsilon);
#pragma unroll
    for (int v = 0; v < V; v++) {
        uint32_t col = 4 * (threadIdx.x + NORM_THREADS * v);
        float4 out;
        // Behind the row stand zeros, whatever the scale (it may not be a number).
        out.x = col < a.dim ? x[v].x * scale * weight[v].x : 0.0f;
        out.y = col + 1 < a.dim ? x[v].y * scale * weight[v].y : 0.0f;
        out.z = col + 2 < a.dim ? x[v].z * scale * weight[v].z : 0.0f;
        out.w = col + 3 < a.dim ? x[v].w * scale * weight[v].w : 0.0f;
        if (a.out_f32)
            row_store4<WIDE>(a.out_f32 + (uint64_t)row * a.dim, col, a.dim, out);
        if (a.out && col < act_cols)
            *(uint2 *)((bf16 *)a.out + (uint64_t)row * act_cols + col) =
                make_uint2(pack_bf16(out.x, out.y), pack_bf16(out.z, out.w));
    }
}

// A thread does CHUNKS times four units, all requested before the first is needed.
template <bool WIDE, int CHUNKS>
static __global__ void __launch_bounds__(SWIGLU_THREADS)
    swiglu_kernel(const struct cuda_control *control, uint32_t slot, struct swiglu_args a,
                  uint32_t act_cols)
{
    uint32_t rows, row = blockIdx.x;
    uint32_t first = 4 * (blockIdx.y * SWIGLU_THREADS * CHUNKS + threadIdx.x);
    if (!segment_enter(control, slot, &rows) || row >= rows)
        return;
    const float *from = a.gate_up + (uint64_t)row * a.stride;
    uint32_t end = (a.intermediate + 7) / 8 * 16;
    float4 gate[CHUNKS], up[CHUNKS];
#pragma unroll
    for (int c = 0; c < CHUNKS; c++) {
        uint32_t unit = first + 4 * c * SWIGLU_THREADS, at = unit / 8 * 16 + unit % 8;
        gate[c] = row_load4<WIDE>(from, at, end);
        up[c] = row_load4<WIDE>(from, at + 8, end);
    }
#pragma unroll
    for (int c = 0; c < CHUNKS; c++) {
        uint32_t unit = first + 4 * c * SWIGLU_THREADS;
        float x = unit < a.intermediate ? silu(gate[c].x) * up[c].x : 0.0f;
        float y = unit + 1 < a.intermediate ? silu(gate[c].y) * up[c].y : 0.0f;
        float z = unit + 2 < a.intermediate ? silu(gate[c].z) * up[c].z : 0.0f;
        float w = unit + 3 < a.intermediate ? silu(gate[c].w) * up[c].w : 0.0f;
        if (unit < act_cols)
            *(uint2 *)((bf16 *)a.out + (uint64_t)row * act_cols + unit) =
                make_uint2(pack_bf16(x, y), pack_bf16(z, w));
    }
}

template <bool WIDE, int CHUNKS>
static void swiglu_launch(const struct cuda_launch *l, const struct swiglu_args *a)
{
    uint32_t act_cols = (uint32_t)cuda__act_cols(a->intermediate), each = 4 * CHUNKS;
    uint32_t parts = (act_cols + each * SWIGLU_THREADS - 1) / (each * SWIGLU_THREADS);
    launch_kernel(l, swiglu_kernel<WIDE, CHUNKS>, dim3(l->rows_max, parts), dim3(SWIGLU_THREADS), 0,
                  l->control, l->slot, *a, act_cols);
}

template <int V>
static void rmsnorm_launch(const struct cuda_launch *l, const struct rmsnorm_args *a, bool wide)
{
    launch_kernel(l, wide ? rmsnorm_kernel<V, true> : rmsnorm_kernel<V, false>, dim3(l->rows_max),
                  dim3(NORM_THREADS), 0, l->control, l->slot, *a, (uint32_t)cuda__act_cols(a->dim));
}

void cuda__rmsnorm(const struct cuda_launch *l, const struct rmsnorm_args *a)
{
    enum { STEP = 4 * NORM_THREADS };
    CHECK(a->dim <= 8 * STEP);
    if (!l->rows_max || !a->dim)
        return;
    uintptr_t bits = (uintptr_t)a->x | (uintptr_t)a->weight | (uintptr_t)a->out_f32;
    bool wide = a->dim % 4 == 0 && bits % 16 == 0;
    if (a->dim <= STEP)
        rmsnorm_launch<1>(l, a, wide);
    else if (a->dim <= 2 * STEP)
        rmsnorm_launch<2>(l, a, wide);
    else if (a->dim <= 4 * STEP)
        rmsnorm_launch<4>(l, a, wide);
    else
        rmsnorm_launch<8>(l, a, wide);
}

void cuda__swiglu(const struct cuda_launch *l, const struct swiglu_args *a)
{
    CHECK(a->stride >= (a->intermediate + 7) / 8 * 16);
    if (!l->rows_max || !a->intermediate)
        return;
    bool wide = a->stride % 4 == 0 && (uintptr_t)a->gate_up % 16 == 0;
    if (!wide)
        swiglu_launch<false, 1>(l, a);
    else if (l->rows_max < 32)
        swiglu_launch<true, 1>(l, a);
    else
        swiglu_launch<true, 4>(l, a);
}
