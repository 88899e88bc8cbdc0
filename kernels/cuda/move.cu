// SPDX-License-Identifier: Apache-2.0
// Look-ups and writes of single words, bound by bytes or, at decode sizes, by the launch.
//
//   scatter   table[index[i]] = value[i]; eager, count is exact. A thread per word. Indices of one
//             command are distinct (page tables: a place changes once a step).
//   gather    to[i][:] = from[index[i]][:], fp32. A CTA per row.
//   embed     x[i][:] = table[token[i]][:], bf16 -> fp32; a token outside [0, vocab) is what sample
//             gives a row that is lost: its row is NaN, so it stays lost. A CTA per row.
//
// A row moves in pieces of 4 values per thread when its addresses allow it (16 bytes of fp32, 8 of
// bf16), else value by value. No shared memory, no sums.
#include "kernels/cuda/common.cuh"

enum { MOVE_THREADS = 256 };

static __global__ void scatter_kernel(const struct cuda_control *control, uint32_t slot,
                                      struct scatter_args a)
{
    uint32_t rows;
    if (!segment_enter(control, slot, &rows))
        return;
    uint32_t i = blockIdx.x * MOVE_THREADS + threadIdx.x;
    if (i < a.count)
        a.table[a.index[i]] = a.value[i];
}

template <bool WIDE>
static __global__ void gather_kernel(const struct cuda_control *control, uint32_t slot,
                                     struct gather_args a)
{
    uint32_t rows, row = blockIdx.x;
    if (!segment_enter(control, slot, &rows) || row >= rows)
        return;
    const float *from = a.from + (uint64_t)a.index[row] * a.dim;
    float *to = a.to + (uint64_t)row * a.dim;
    if (WIDE)
        for (uint32_t i = threadIdx.x; i < a.dim / 4; i += MOVE_THREADS)
            ((float4 *)to)[i] = ((const float4 *)from)[i];
    else
        for (uint32_t i = threadIdx.x; i < a.dim; i += MOVE_THREADS)
            to[i] = from[i];
}

template <bool WIDE>
static __global__ void embed_kernel(const struct cuda_control *control, uint32_t slot,
                                    struct embed_args a)
{
    uint32_t rows, row = blockIdx.x;
    if (!segment_enter(control, slot, &rows) || row >= rows)
        return;
    int32_t token = a.token[row];
    bool lost = token < 0 || (uint32_t)token >= a.vocab;
    const uint16_t *from = (const uint16_t *)a.table + (uint64_t)(lost ? 0 : token) * a.dim;
    float *to = a.x + (uint64_t)row * a.dim;
    const float nan = __int_as_float(0x7fc00000);
    if (WIDE)
        for (uint32_t i = threadIdx.x; i < a.dim / 4; i += MOVE_THREADS) {
            uint2 v = lost ? make_uint2(0, 0) : ((const uint2 *)from)[i];
            float4 f = make_float4(__uint_as_float(v.x << 16), __uint_as_float(v.x & 0xffff0000u),
                                   __uint_as_float(v.y << 16), __uint_as_float(v.y & 0xffff0000u));
            ((float4 *)to)[i] = lost ? make_float4(nan, nan, nan, nan) : f;
        }
    else
        for (uint32_t i = threadIdx.x; i < a.dim; i += MOVE_THREADS)
            to[i] = lost ? nan : __uint_as_float((uint32_t)from[i] << 16);
}

static bool aligned16(const void *a, const void *b)
{
    return (((uintptr_t)a | (uintptr_t)b) & 15) == 0;
}

void cuda__scatter(const struct cuda_launch *l, const struct scatter_args *a)
{
    if (a->count)
        launch_kernel(l, scatter_kernel, dim3((a->count + MOVE_THREADS - 1) / MOVE_THREADS),
                      dim3(MOVE_THREADS), 0, l->control, l->slot, *a);
}

void cuda__gather(const struct cuda_launch *l, const struct gather_args *a)
{
    if (!l->rows_max || !a->dim)
        return;
    bool wide = a->dim % 4 == 0 && aligned16(a->from, a->to);
    launch_kernel(l, wide ? gather_kernel<true> : gather_kernel<false>, dim3(l->rows_max),
                  dim3(MOVE_THREADS), 0, l->control, l->slot, *a);
}

void cuda__embed(const struct cuda_launch *l, const struct embed_args *a)
{
    if (!l->rows_max || !a->dim)
        return;
    bool wide = a->dim % 4 == 0 && aligned16(a->table, a->x);
    launch_kernel(l, wide ? embed_kernel<true> : embed_kernel<false>, dim3(l->rows_max),
                  dim3(MOVE_THREADS), 0, l->control, l->slot, *a);
}
