// SPDX-License-Identifier: Apache-2.0
// QK-norm, RoPE and the write of K and V into the paged cache.
//
//   n = x * (1 / sqrt(mean(x^2) + epsilon)) * weight        (weight NULL: n = x)
//   out[i] = n[i] cos - n[i + half] sin,  out[i + half] = n[i + half] cos + n[i] sin,
//   angle = position * inv_freq[i] in fp32, as the reference computes it.
//
// q [rows][q_stride] fp32 in place; k, v [rows][k_stride], [rows][v_stride] fp32; the cache bf16,
// [layer][K|V][kv_head][token][dim] in pages (attention.h). K is rounded once, when it enters.
//
// A warp per (row, head), from 128 rows on per (row, 8 heads), heads being q, then k, then v heads;
// lane t owns the pairs (i, i + half)
// of i = t + 32 j, j < PAIRS, PAIRS = 1, 2, 4 for half up to 32, 64, 128. Neighbouring lanes read
// and write neighbouring floats, so that any alignment is coalesced and no alignment is asked for.
// The sum of squares is per lane in ascending j, then a butterfly: a function of head_dim alone, so
// the same kernel serves --batch-invariant. inv_freq is static and loaded before the kernel waits
// for its predecessor. Sine and cosine are those of the CUDA library with full range reduction:
// positions reach angles of 10^6. A warp computes the angles of its row once; they are the longest
// part of a short kernel, but sharing them over warps would take a barrier.
//
// Bound by latency at decode; in prefill by (2 heads + 2 kv_heads) * dim * 4 bytes read and written
// per row, and by the sines: about 2 * 40 instructions per pair. No shared memory. Tolerance: q
// 1e-6 of |n[i]| + |n[i + half]|, K 2^-8.
#include "kernels/cuda/common.cuh"

enum { QK_WARPS = 4 };

static __device__ __forceinline__ uint8_t *kv_slot(const struct qk_args &a, uint32_t row,
                                                   uint32_t value, uint32_t head, uint32_t position)
{
    const struct kv_shape &s = a.kv.shape;
    uint32_t block = position / s.block_tokens, in_block = position - block * s.block_tokens;
    uint64_t at = ((uint64_t)a.sequence[row] * a.kv.blocks_max + block) * s.pages_per_block +
                  a.layer / s.layers_per_page;
    uint64_t token = ((uint64_t)value * s.kv_heads + head) * s.block_tokens + in_block;
    return a.kv.arena + (uint64_t)a.kv.pages[at] * a.kv.page_bytes +
           (uint64_t)(a.layer % s.layers_per_page) * s.part_bytes + token * s.head_dim * 2;
}

template <int PAIRS> struct pairs {
    float low[PAIRS], high[PAIRS];
};

template <int PAIRS>
static __device__ __forceinline__ void pairs_load(pairs<PAIRS> *x, const float *from, uint32_t half,
                                                  uint32_t lane)
{
#pragma unroll
    for (int j = 0; j < PAIRS; j++) {
        uint32_t i = lane + 32 * j;
        x->low[j] = i < half ? from[i] : 0.0f;
        x->high[j] = i < half ? from[i + half] : 0.0f;
    }
}

template <int PAIRS>
static __device__ __forceinline__ void pairs_norm(pairs<PAIRS> *x, const pairs<PAIRS> &weight,
                                                  uint32_t dim, float epsilon)
{
    float sum = 0;
#pragma unroll
    for (int j = 0; j < PAIRS; j++)
        sum += x->low[j] * x->low[j] + x->high[j] * x->high[j];
    float scale = 1.0f / sqrtf(warp_sum(sum) / (float)dim + epsilon);
#pragma unroll
    for (int j = 0; j < PAIRS; j++) {
        x->low[j] = x->low[j] * scale * weight.low[j];
        x->high[j] = x->high[j] * scale * weight.high[j];
    }
}

// The turn of a position, the same for all heads of a row.
template <int PAIRS> struct turn {
    float sine[PAIRS], cosine[PAIRS];
};

template <int PAIRS>
static __device__ __forceinline__ void pairs_turn(pairs<PAIRS> *x, const turn<PAIRS> &t)
{
#pragma unroll
    for (int j = 0; j < PAIRS; j++) {
        float low = x->low[j], high = x->high[j];
        x->low[j] = low * t.cosine[j] - high * t.sine[j];
        x->high[j] = high * t.cosine[j] + low * t.sine[j];
    }
}

// One head of one row: where it stands, and the same normed, turned and put where it goes.
template <int PAIRS>
static __device__ __forceinline__ void head_run(const struct qk_args &a, uint32_t row,
                                                uint32_t head, uint32_t position,
                                                const turn<PAIRS> &t)
{
    uint32_t lane = threadIdx.x % 32, kv_heads = a.kv.shape.kv_heads, dim = a.kv.shape.head_dim;
    uint32_t half = dim / 2;
    bool is_q = head < a.heads, turned = head < a.heads + kv_heads;
    const float *weight = is_q ? a.q_weight : turned ? a.k_weight : NULL;
    uint32_t of_kv = is_q ? 0 : turned ? head - a.heads : head - a.heads - kv_heads;
    float *q = a.q + (uint64_t)row * a.q_stride + (uint64_t)head * dim;
    const float *from = is_q     ? q
                        : turned ? a.k + (uint64_t)row * a.k_stride + (uint64_t)of_kv * dim
                                 : a.v + (uint64_t)row * a.v_stride + (uint64_t)of_kv * dim;
    pairs<PAIRS> x, w;
    pairs_load(&x, from, half, lane);
    bf16 *to = is_q ? NULL : (bf16 *)kv_slot(a, row, !turned, of_kv, position);
    if (weight) {
        pairs_load(&w, weight, half, lane);
        pairs_norm(&x, w, dim, a.epsilon);
    }
    if (turned)
        pairs_turn(&x, t);
#pragma unroll
    for (int j = 0; j < PAIRS; j++) {
        uint32_t i = lane + 32 * j;
        if (i >= half)
            continue;
        if (is_q) {
            q[i] = x.low[j];
            q[i + half] = x.high[j];
        } else {
            to[i] = __float2bfloat16_rn(x.low[j]);
            to[i + half] = __float2bfloat16_rn(x.high[j]);
        }
    }
}

template <int PAIRS, int HEADS>
static __global__ void __launch_bounds__(QK_WARPS * 32)
    qk_kernel(const struct cuda_control *control, uint32_t slot, struct qk_args a)
{
    uint32_t lane = threadIdx.x % 32, first = (blockIdx.x * QK_WARPS + threadIdx.x / 32) * HEADS;
    uint32_t rows, row = blockIdx.y, kv_heads = a.kv.shape.kv_heads;
    uint32_t half = a.kv.shape.head_dim / 2, all = a.heads + 2 * kv_heads;
    turn<PAIRS> t = {};
    float inv_freq[PAIRS];
#pragma unroll
    for (int j = 0; j < PAIRS; j++)
        inv_freq[j] = lane + 32 * j < half ? a.inv_freq[lane + 32 * j] : 0.0f;
    if (!segment_enter(control, slot, &rows) || row >= rows || first >= all)
        return;
    uint32_t position = a.position[row];
    if (first < a.heads + kv_heads) {
#pragma unroll
        for (int j = 0; j < PAIRS; j++)
            sincosf((float)position * inv_freq[j], &t.sine[j], &t.cosine[j]);
    }
    for (uint32_t head = first; head < min(first + HEADS, all); head++)
        head_run(a, row, head, position, t);
}

template <int PAIRS> static void qk_launch(const struct cuda_launch *l, const struct qk_args *a)
{
    enum { MANY = 8 }; // heads of a warp where there are enough rows to fill the machine
    uint32_t heads = a->heads + 2 * a->kv.shape.kv_heads;
    if (l->rows_max < 128)
        launch_kernel(l, qk_kernel<PAIRS, 1>, dim3((heads + QK_WARPS - 1) / QK_WARPS, l->rows_max),
                      dim3(QK_WARPS * 32), 0, l->control, l->slot, *a);
    else
        launch_kernel(l, qk_kernel<PAIRS, MANY>,
                      dim3((heads + QK_WARPS * MANY - 1) / (QK_WARPS * MANY), l->rows_max),
                      dim3(QK_WARPS * 32), 0, l->control, l->slot, *a);
}

void cuda__qk_norm_rope_kv(const struct cuda_launch *l, const struct qk_args *a)
{
    const struct kv_shape *s = &a->kv.shape;
    if (!l->rows_max)
        return;
    CHECK(s->head_dim && s->head_dim <= HEAD_DIM_MAX && s->head_dim % 2 == 0);
    CHECK(s->block_tokens && s->kv_heads && s->layers_per_page && a->heads);
    CHECK(a->layer < s->layers && a->layer / s->layers_per_page < s->pages_per_block);
    CHECK(s->part_bytes >= (size_t)4 * s->kv_heads * s->block_tokens * s->head_dim);
    CHECK(l->rows_max <= 65535);
    if (s->head_dim <= 64)
        qk_launch<1>(l, a);
    else if (s->head_dim <= 128)
        qk_launch<2>(l, a);
    else
        qk_launch<4>(l, a);
}
