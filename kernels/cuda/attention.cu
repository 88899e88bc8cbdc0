// SPDX-License-Identifier: Apache-2.0
// Paged attention: the decode kernel, which can do every row, and the launcher of both kernels.
//
//   out[row][head] = softmax(q . K[0..position] * scale) V
//
// KV is reduced in segments of KV_SEGMENT = 256 tokens at absolute positions. A segment gives, for
// each query head, m = max of s * scale * log2(e), l = sum p, acc = sum p V with p = 2^(s - m);
// segments are merged in ascending order (state_merge). q is rounded to bf16 for the tensor cores,
// p is split into two bf16 terms (its rounding and what is left: 16 bits), l is the sum of the
// whole p; all else is fp32. What is computed for one (row, head) depends on its position alone:
// this kernel serves --batch-invariant.
//
// Layouts. q [rows][q_stride] fp32; K, V [layer][K|V][kv_head][token][dim] bf16 in pages; out act
// [rows][act_cols] bf16, column head * dim + d. Scratch: counters [list entry][lane], then m and l
// [unit][head] as float2, then acc [unit][head][dim] fp32.
//
// Task: the (at most 8) query heads of one pass of one KV head of one row x one segment
// (attention_schedule.cuh), a CTA of 4 warps. The heads are the 8 columns of mma.m16n8k16, tokens
// and then columns of V its 16 rows: S^T = K Q^T, O^T = V^T P^T. Unused heads are computed and
// dropped. So a head costs half the products and half the registers that it does as one of 16
// rows, and what a lane knows of a head's softmax serves both. Warp w owns the tiles of
// 16 tokens w, w + 4, w + 8, w + 12 of the segment, its SLOTS, and loads K and V of each itself
// with cp.async into its own ring of STAGES tiles, so that between the barriers of a task no warp
// waits for another. The ring runs on into the next task: at the end of a task STAGES - 1 tiles of
// the next one are in flight, and the page numbers of the one after that are in registers (a lane
// holds two tokens' pages). Per tile: scores (dim / 16 mma), online softmax, acc += p V (dim / 16 x
// 2 mma). Then the four warps put acc, m and l side by side in shared memory (acc into the tile
// just consumed) and warp w merges heads w, w + 4, lane t owning columns 2t + 64j and the next.
//
// A row of one segment is then written. Else the segment goes to scratch. When a CTA has done all
// its tasks it counts them, and merges the segments of each (row, lane) that this completes. Not
// before: the fence between would wait for the loads of the next task too, which made it a quarter
// of the kernel. Which CTA merges changes nothing: the order of the sums is fixed.
//
// Tokens behind the row's position are not read (zeros stand for them): NaN there does no harm.
//
// Shared memory for DIM 64 / 128 / 256: ring 64 / 64 / 192 KiB, q 1 / 2 / 4 KiB, list 8 KiB: 3, 3
// and 1 CTAs per multiprocessor, with 192 KiB of tiles at most in flight. Bound by bytes:
// rows * context * kv_heads * dim * 4, e.g. 64 x 1024 x 8 x 128: 268 MB for K and V of one layer in
// bf16 (2 x 134 MB), 89 us at 3.0 TB/s; scratch adds 2 * (dim + 2) * 4 / 256 bytes per query head
// and token, 3% at 4 heads. Tolerance 2^-8 of sum p |v|: the rounding of the result to bf16 can
// take all of it, which is why p has two terms.
#include "kernels/cuda/attention_schedule.cuh"

enum { TILE_TOKENS = 16, SLOTS = KV_SEGMENT / TILE_TOKENS / DECODE_WARPS };

template <int DIM> struct decode_shape {
    static constexpr int STAGES = DIM == 64 ? 4 : DIM == 128 ? 2 : 3;
    static constexpr int TILE = TILE_TOKENS * DIM * 2; // K or V
    static constexpr int STAGE = 2 * TILE;             // both: also acc of 8 heads in fp32
    static constexpr int CTAS = DIM <= 128 ? 3 : 1;
};

template <int DIM> struct decode_shared {
    alignas(128) uint8_t ring[DECODE_WARPS][decode_shape<DIM>::STAGES][decode_shape<DIM>::STAGE];
    uint8_t query[HEADS_MAX * DIM * 2];
    float max[DECODE_WARPS][HEADS_MAX], sum[DECODE_WARPS][HEADS_MAX];
    schedule plan;
    uint32_t complete[HEADS_MAX]; // bits: tasks of 32 whose i-th (row, lane) is complete
    uint32_t mask[];              // rows_max / 32 + 2
};

// What a warp knows of the tokens of a task: lane t holds tokens t % 16 of slots t / 16 and
// 2 + t / 16.
struct token_pages {
    uint32_t page[2];
    uint32_t offset[2]; // of the K row in the layer's part
};

// ---- loads ----

// The token in the segment that lane `lane` holds at i.
static __device__ __forceinline__ uint32_t held_token(uint32_t i, uint32_t warp, uint32_t lane)
{
    return ((2 * i + lane / 16) * DECODE_WARPS + warp) * TILE_TOKENS + lane % 16;
}

static __device__ __forceinline__ void pages_load(token_pages *p, const struct attention_args &a,
                                                  const struct attention_plan &plan, const task &t,
                                                  uint32_t warp, uint32_t lane)
{
    const struct kv_shape &s = a.kv.shape;
    uint64_t at[2];
#pragma unroll
    for (uint32_t i = 0; i < 2; i++) {
        uint32_t position = t.segment * KV_SEGMENT + held_token(i, warp, lane);
        uint32_t block = position / s.block_tokens;
        at[i] = ((uint64_t)t.sequence * a.kv.blocks_max + block) * s.pages_per_block + plan.page_at;
        p->offset[i] = (t.lane / plan.passes * s.block_tokens + position - block * s.block_tokens) *
                       s.head_dim * 2;
    }
#pragma unroll
    for (uint32_t i = 0; i < 2; i++) // both are on their way before either is needed
        p->page[i] = held_token(i, warp, lane) < t.tokens ? __ldg(a.kv.pages + at[i]) : 0;
}

static __device__ __forceinline__ void pages_resolve(uint64_t address[2], const token_pages &p,
                                                     const struct attention_args &a,
                                                     const struct attention_plan &plan)
{
#pragma unroll
    for (int i = 0; i < 2; i++)
        address[i] = (uint64_t)a.kv.arena + (uint64_t)p.page[i] * a.kv.page_bytes + plan.layer_at +
                     p.offset[i];
}

// K and V of one slot, any even head_dim and any alignment of 4.
template <int DIM>
static __device__ __noinline__ void slot_load_narrow(uint8_t *stage, uint64_t held, uint32_t from,
                                                     uint32_t tokens, uint32_t dim,
                                                     uint64_t values_at, uint32_t lane)
{
#pragma unroll 1
    for (uint32_t i = 0; i < TILE_TOKENS * DIM / 2; i += 32) {
        uint32_t token = i / (DIM / 2), word = i % (DIM / 2) + lane;
        uint64_t row = __shfl_sync(0xffffffffu, held, from + token);
        uint32_t bytes = token < tokens && 2 * word < dim ? 4 : 0;
        const uint8_t *k = (const uint8_t *)row + (bytes ? word * 4 : 0);
        uint8_t *to = stage + chunk_at<DIM>(token, word / 4) + word % 4 * 4;
        async_load4(to, k, bytes);
        async_load4(to + decode_shape<DIM>::TILE, k + (bytes ? values_at : 0), bytes);
    }
}

// Begins the loads of slot `slot` of a task of `in_segment` tokens.
template <int DIM>
static __device__ __forceinline__ void
slot_load(uint8_t *stage, const uint64_t address[2], uint32_t slot, uint32_t in_segment,
          const struct attention_args &a, const struct attention_plan &plan, uint32_t warp,
          uint32_t lane)
{
    constexpr uint32_t CHUNKS = DIM / 8, ROWS = 32 / CHUNKS;
    uint32_t first = (slot * DECODE_WARPS + warp) * TILE_TOKENS;
    if (first >= in_segment)
        return;
    uint64_t held = slot < 2 ? address[0] : address[1];
    uint32_t from = slot % 2 * 16, tokens = in_segment - first, dim = a.kv.shape.head_dim;
    if (!plan.wide) {
        slot_load_narrow<DIM>(stage, held, from, tokens, dim, plan.values_at, lane);
        return;
    }
    uint32_t chunk = lane % CHUNKS;
    bool inside = chunk * 8 < dim;
#pragma unroll
    for (uint32_t i = 0; i < TILE_TOKENS / ROWS; i++) {
        uint32_t token = i * ROWS + lane / CHUNKS;
        uint64_t row = __shfl_sync(0xffffffffu, held, from + token);
        uint32_t bytes = inside && token < tokens ? 16 : 0;
        const uint8_t *k = (const uint8_t *)row + chunk * 16;
        uint8_t *to = stage + chunk_at<DIM>(token, chunk);
        async_load16(to, bytes ? k : a.kv.arena, bytes);
        async_load16(to + decode_shape<DIM>::TILE, bytes ? k + plan.values_at : a.kv.arena, bytes);
    }
}

// Begins the loads of the first slots of a warp's first task.
template <int DIM>
static __device__ __forceinline__ void
ring_fill(uint8_t ring[][decode_shape<DIM>::STAGE], const uint64_t address[2], uint32_t in_segment,
          const struct attention_args &a, const struct attention_plan &plan, uint32_t warp,
          uint32_t lane)
{
#pragma unroll
    for (int i = 0; i < decode_shape<DIM>::STAGES; i++) {
        slot_load<DIM>(ring[i], address, i, in_segment, a, plan, warp, lane);
        async_commit();
    }
}

// The query heads of a task, of each of its rows: column c is head c % count of row c / count.
struct task_heads {
    uint32_t first, count;
};

static __device__ __forceinline__ task_heads heads_of(const struct attention_plan &plan,
                                                      const task &t)
{
    uint32_t in_group = t.lane % plan.passes * HEADS_MAX;
    return {t.lane / plan.passes * plan.group + in_group,
            min(plan.group - in_group, (uint32_t)HEADS_MAX)};
}

// q of a task's heads: a thread's part, [i]: pair threadIdx.x + i * DECODE_THREADS of columns.
template <int DIM> struct query_part {
    float2 pair[HEADS_MAX * DIM / 2 / DECODE_THREADS];
};

template <int DIM>
static __device__ __forceinline__ void query_load(query_part<DIM> *part, const schedule *s,
                                                  const struct attention_args &a,
                                                  const struct attention_plan &plan, const task &t)
{
    if (!t.tokens)
        return;
    uint32_t dim = a.kv.shape.head_dim;
    task_heads heads = heads_of(plan, t);
#pragma unroll
    for (uint32_t i = 0; i < HEADS_MAX * DIM / 2 / DECODE_THREADS; i++) {
        uint32_t at = threadIdx.x + i * DECODE_THREADS, of = at / (DIM / 2), d = at % (DIM / 2) * 2;
        bool is_there = of < t.together * heads.count && d < dim;
        uint32_t of_row = t.together > 1 ? of / heads.count : 0;
        uint32_t row = of_row && is_there ? s->list[t.entry + of_row].row : t.row;
        const float *q = a.q + (uint64_t)row * a.q_stride +
                         (uint64_t)(heads.first + of - of_row * heads.count) * dim + d;
        part->pair[i].x = is_there ? q[0] : 0.0f;
        part->pair[i].y = is_there ? q[1] : 0.0f;
    }
}

// Rounded to bf16. The caller synchronises.
template <int DIM>
static __device__ __forceinline__ void query_put(uint8_t *query, const query_part<DIM> &part)
{
#pragma unroll
    for (uint32_t i = 0; i < HEADS_MAX * DIM / 2 / DECODE_THREADS; i++) {
        uint32_t at = threadIdx.x + i * DECODE_THREADS, of = at / (DIM / 2), d = at % (DIM / 2) * 2;
        *(uint32_t *)(query + chunk_at<DIM>(of, d / 8) + d % 8 * 2) =
            pack_bf16(part.pair[i].x, part.pair[i].y);
    }
}

// ---- a tile ----

// The state of a warp. Lane: heads 2 (lane % 4) and the next, tokens (of a tile) and columns (of
// 16) lane / 4 and lane / 4 + 8: acc[i][2 r + h] is column 16 i + lane / 4 + 8 r of its head h.
template <int DIM> struct warp_state {
    float max[2], sum[2]; // sum: of this lane's tokens only
    float acc[DIM / 16][4];
};

template <int DIM> static __device__ __forceinline__ void state_clear(warp_state<DIM> *s)
{
#pragma unroll
    for (int i = 0; i < 2; i++) {
        s->max[i] = NO_SCORE;
        s->sum[i] = 0;
    }
#pragma unroll
    for (int i = 0; i < DIM / 16; i++)
#pragma unroll
        for (int j = 0; j < 4; j++)
            s->acc[i][j] = 0;
}

// The B fragments of q: 8 heads, all columns.
template <int DIM>
static __device__ __forceinline__ void query_fragments(uint32_t q[DIM / 16][2],
                                                       const uint8_t *query, uint32_t lane)
{
#pragma unroll
    for (int i = 0; i < DIM / 32; i++) {
        uint32_t b[4];
        matrix_load4(b, query + chunk_at<DIM>(lane % 8, 4 * i + lane / 8));
        q[2 * i][0] = b[0];
        q[2 * i][1] = b[1];
        q[2 * i + 1][0] = b[2];
        q[2 * i + 1][1] = b[3];
    }
}

static __device__ __forceinline__ float tokens_max(float x)
{
#pragma unroll
    for (int i = 4; i < 32; i *= 2)
        x = fmaxf(x, __shfl_xor_sync(0xffffffffu, x, i));
    return x;
}

static __device__ __forceinline__ float tokens_sum(float x)
{
#pragma unroll
    for (int i = 4; i < 32; i *= 2)
        x += __shfl_xor_sync(0xffffffffu, x, i);
    return x;
}

// The softmax of 16 scores per head; s becomes p. `tokens`: how many of the tile the row sees.
template <int DIM>
static __device__ __forceinline__ void tile_softmax(warp_state<DIM> *w, float s[4], float scale,
                                                    uint32_t tokens, uint32_t lane)
{
    float keep[2];
#pragma unroll
    for (int i = 0; i < 4; i++)
        s[i] = lane / 4 + i / 2 * 8 < tokens ? s[i] * scale : NO_SCORE;
#pragma unroll
    for (int h = 0; h < 2; h++) {
        float top = fmaxf(w->max[h], tokens_max(fmaxf(s[h], s[2 + h])));
        float shift = shift_of(top);
        keep[h] = exp2_fast(w->max[h] - shift);
        w->max[h] = top;
        s[h] = exp2_fast(s[h] - shift);
        s[2 + h] = exp2_fast(s[2 + h] - shift);
        w->sum[h] = w->sum[h] * keep[h] + (s[h] + s[2 + h]);
    }
    // Multiplying by one changes nothing, so leaving it out changes no bits.
    if (__any_sync(0xffffffffu, keep[0] != 1.0f || keep[1] != 1.0f))
#pragma unroll
        for (int i = 0; i < DIM / 16; i++) {
            w->acc[i][0] *= keep[0];
            w->acc[i][1] *= keep[1];
            w->acc[i][2] *= keep[0];
            w->acc[i][3] *= keep[1];
        }
}

// An 8 x 8 matrix of bf16 (row lane / 4, columns 2 (lane % 4) and the next), transposed.
static __device__ __forceinline__ uint32_t matrix_transpose(uint32_t x)
{
    uint32_t y;
    asm("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(y) : "r"(x));
    return y;
}

template <int DIM>
static __device__ __forceinline__ void tile_compute(warp_state<DIM> *w, const uint8_t *stage,
                                                    const uint32_t query[DIM / 16][2], float scale,
                                                    uint32_t tokens, uint32_t lane)
{
    float s[4] = {};
#pragma unroll
    for (int step = 0; step < DIM / 16; step++) {
        uint32_t k[4];
        keys_fragment<DIM>(k, stage, 0, step, lane);
        uint32_t rows[4] = {k[0], k[2], k[1], k[3]};
        mma_16816(s, rows, query[step][0], query[step][1]);
    }
    tile_softmax(w, s, scale, tokens, lane);
    uint32_t p[2], rest[2];
#pragma unroll
    for (int i = 0; i < 2; i++) { // p as its rounding and the rounding of what that leaves
        uint32_t both = pack_bf16(s[2 * i], s[2 * i + 1]);
        p[i] = matrix_transpose(both);
        rest[i] = matrix_transpose(pack_bf16(s[2 * i] - __uint_as_float(both << 16),
                                             s[2 * i + 1] - __uint_as_float(both & 0xffff0000u)));
    }
#pragma unroll
    for (int step = 0; step < DIM / 16; step++) {
        uint32_t v[4];
        values_fragment<DIM>(v, stage + decode_shape<DIM>::TILE, 0, step, lane);
        uint32_t rows[4] = {v[0], v[2], v[1], v[3]};
        mma_16816(w->acc[step], rows, p[0], p[1]);
        mma_16816(w->acc[step], rows, rest[0], rest[1]);
    }
}

// ---- segments ----

// The state of one (row, head): this lane's columns 2 lane + 64 j and the next.
template <int DIM> struct row_state {
    float max, sum;
    float2 acc[DIM / 64];
};

// into = into merged with the segment that follows.
template <int DIM>
static __device__ __forceinline__ void state_merge(row_state<DIM> *into, const row_state<DIM> &next)
{
    float top = fmaxf(into->max, next.max), shift = shift_of(top);
    float keep = exp2_fast(into->max - shift), add = exp2_fast(next.max - shift);
    into->max = top;
    into->sum = __fmaf_rn(into->sum, keep, __fmul_rn(next.sum, add));
#pragma unroll
    for (int j = 0; j < DIM / 64; j++) {
        into->acc[j].x = __fmaf_rn(into->acc[j].x, keep, __fmul_rn(next.acc[j].x, add));
        into->acc[j].y = __fmaf_rn(into->acc[j].y, keep, __fmul_rn(next.acc[j].y, add));
    }
}

// Where acc of row `row`, columns `column` and the next, stands in a consumed stage.
template <int DIM> static __device__ __forceinline__ uint32_t acc_at(uint32_t row, uint32_t column)
{
    return row * (DIM * 4) + (((column / 8) ^ (row & 7)) * 32) + column % 8 * 4;
}

template <int DIM>
static __device__ __forceinline__ void state_put(decode_shared<DIM> *shared, uint8_t *stage,
                                                 warp_state<DIM> *w, uint32_t warp, uint32_t lane,
                                                 uint32_t heads)
{
#pragma unroll
    for (int h = 0; h < 2; h++) {
        float sum = tokens_sum(w->sum[h]);
        uint32_t head = lane % 4 * 2 + h;
        if (head >= heads)
            continue;
        if (lane < 4) {
            shared->max[warp][head] = w->max[h];
            shared->sum[warp][head] = sum;
        }
#pragma unroll
        for (int i = 0; i < DIM / 8; i++)
            *(float *)(stage + acc_at<DIM>(head, i * 8 + lane / 4)) = w->acc[i / 2][i % 2 * 2 + h];
    }
}

// The state of `row` over the whole segment from those of the first `warps` warps, in their order.
template <int DIM>
static __device__ __forceinline__ row_state<DIM> state_take(const decode_shared<DIM> *shared,
                                                            uint32_t stage, uint32_t row,
                                                            uint32_t warps, uint32_t lane)
{
    row_state<DIM> s = {};
    float factor[DECODE_WARPS];
    s.max = NO_SCORE;
#pragma unroll
    for (uint32_t w = 0; w < DECODE_WARPS; w++)
        if (w < warps)
            s.max = fmaxf(s.max, shared->max[w][row]);
#pragma unroll
    for (uint32_t w = 0; w < DECODE_WARPS; w++) {
        if (w >= warps)
            continue;
        factor[w] = exp2_fast(shared->max[w][row] - shift_of(s.max));
        s.sum = __fmaf_rn(shared->sum[w][row], factor[w], s.sum);
#pragma unroll
        for (int j = 0; j < DIM / 64; j++) {
            float2 x =
                *(const float2 *)(shared->ring[w][stage] + acc_at<DIM>(row, 2 * lane + 64 * j));
            s.acc[j].x = __fmaf_rn(x.x, factor[w], s.acc[j].x);
            s.acc[j].y = __fmaf_rn(x.y, factor[w], s.acc[j].y);
        }
    }
    return s;
}

template <int DIM>
static __device__ __forceinline__ void
state_write(const struct attention_args &a, const struct attention_plan &plan, uint32_t row,
            uint32_t head, const row_state<DIM> &s, uint32_t lane)
{
    uint32_t dim = a.kv.shape.head_dim;
    bf16 *out = (bf16 *)a.out + (uint64_t)row * plan.act_cols;
    float scale = 1.0f / s.sum;
#pragma unroll
    for (int j = 0; j < DIM / 64; j++) {
        uint32_t d = 2 * lane + 64 * j;
        if (d < dim)
            *(uint32_t *)(out + head * dim + d) = pack_bf16(s.acc[j].x * scale, s.acc[j].y * scale);
    }
    if (head + 1 == a.heads)
        for (uint32_t c = a.heads * dim + lane; c < plan.act_cols; c += 32)
            out[c] = __float2bfloat16_rn(0.0f);
}

// Scratch of one state: [at] of `states`. Read past L1, which does not see other CTAs' writes.
template <int DIM>
static __device__ __forceinline__ void state_save(float *scratch, uint64_t states, uint64_t at,
                                                  uint32_t dim, const row_state<DIM> &s,
                                                  uint32_t lane)
{
    float *acc = scratch + 2 * states + at * dim;
    if (lane == 0)
        __stcg((float2 *)scratch + at, make_float2(s.max, s.sum));
#pragma unroll
    for (int j = 0; j < DIM / 64; j++)
        if (2 * lane + 64 * j < dim)
            __stcg((float2 *)(acc + 2 * lane + 64 * j), s.acc[j]);
}

template <int DIM>
static __device__ __forceinline__ row_state<DIM>
state_load(const float *scratch, uint64_t states, uint64_t at, uint32_t dim, uint32_t lane)
{
    row_state<DIM> s = {};
    const float *acc = scratch + 2 * states + at * dim;
    float2 both = __ldcg((const float2 *)scratch + at);
    s.max = both.x;
    s.sum = both.y;
#pragma unroll
    for (int j = 0; j < DIM / 64; j++)
        if (2 * lane + 64 * j < dim)
            s.acc[j] = __ldcg((const float2 *)(acc + 2 * lane + 64 * j));
    return s;
}

// Merges all segments of the task's row and lane and writes the row's heads.
template <int DIM>
static __device__ __noinline__ void
segments_merge(const struct attention_args &a, const struct attention_plan &plan, uint32_t row,
               uint64_t states, uint64_t first, uint32_t segments, uint32_t head, uint32_t heads)
{
    constexpr int AHEAD = DIM == 256 ? 4 : 8;
    uint32_t lane = threadIdx.x % 32, dim = a.kv.shape.head_dim;
    for (uint32_t i = threadIdx.x / 32; i < heads; i += DECODE_WARPS) {
        uint64_t at = first * a.heads + head + i;
        row_state<DIM> sum = state_load<DIM>(plan.partials, states, at, dim, lane);
        for (uint32_t s = 1; s < segments; s += AHEAD) {
            row_state<DIM> next[AHEAD];
#pragma unroll
            for (int j = 0; j < AHEAD; j++)
                if (s + j < segments)
                    next[j] = state_load<DIM>(plan.partials, states,
                                              at + (uint64_t)(s + j) * a.heads, dim, lane);
#pragma unroll
            for (int j = 0; j < AHEAD; j++)
                if (s + j < segments)
                    state_merge(&sum, next[j]);
        }
        state_write(a, plan, row, head + i, sum, lane);
    }
}

// The segment's states leave shared memory: to `out`, to scratch, or merged into what stands there.
template <int DIM>
static __device__ __forceinline__ void
segment_leave(const decode_shared<DIM> *shared, uint32_t stage, const struct attention_args &a,
              const struct attention_plan &plan, const schedule_view &view, const task &t,
              uint32_t head, uint32_t heads)
{
    uint32_t lane = threadIdx.x % 32, dim = a.kv.shape.head_dim;
    uint32_t tiles = (t.tokens + TILE_TOKENS - 1) / TILE_TOKENS;
    uint64_t states =
        view.by_rows ? (uint64_t)gridDim.x * HEADS_MAX : (uint64_t)view.units * a.heads;
    for (uint32_t i = threadIdx.x / 32; i < t.together * heads; i += DECODE_WARPS) {
        row_state<DIM> s = state_take<DIM>(shared, stage, i, tiles, lane);
        uint32_t of_row = i / heads, of = head + i % heads, row = t.row, segments = t.segments;
        uint64_t at = blockIdx.x * HEADS_MAX + i;
        if (!view.by_rows) {
            const list_entry &e = shared->plan.list[t.entry + of_row];
            at = ((uint64_t)e.start + t.segment) * a.heads + of;
            row = e.row;
            segments = segments_of(e.position);
        } else if (t.segment) {
            row_state<DIM> before = state_load<DIM>(plan.partials, states, at, dim, lane);
            state_merge(&before, s);
            s = before;
            __syncwarp(); // all lanes have read max and sum, which lane 0 is going to overwrite
        }
        if (segments == 1 || (view.by_rows && t.segment + 1 == segments))
            state_write(a, plan, row, of, s, lane);
        else
            state_save(plan.partials, states, at, dim, s, lane);
    }
}

// Counts a segment of a list entry and lane; whether it was the last, if there are several.
static __device__ __forceinline__ bool
segment_is_last(const schedule *s, const struct attention_plan &plan, uint32_t entry, uint32_t lane)
{
    uint32_t segments = segments_of(s->list[entry].position);
    uint32_t *counter = plan.counters + entry * plan.lanes + lane;
    bool is_last = segments > 1 && atomicAdd(counter, 1) + 1 == segments;
    if (is_last)
        *counter = 0;
    return is_last;
}

// All segments of the CTA's tasks are in scratch: counts them, and merges what is complete. Sets
// the counters of that back to zero.
template <int DIM>
static __device__ __forceinline__ void
segments_finish(decode_shared<DIM> *shared, const struct attention_args &a,
                const struct attention_plan &plan, const schedule_view &view)
{
    uint32_t tasks = view.tasks * plan.lanes;
    __threadfence();
    for (uint32_t first = blockIdx.x; first < tasks; first += 32 * gridDim.x) {
        __syncthreads();
        if (threadIdx.x < 32) { // lane i: the i-th of 32 tasks
            task t;
            task_by_segment(&shared->plan, view, plan, first + threadIdx.x * gridDim.x, &t);
            for (uint32_t i = 0; i < HEADS_MAX; i++) {
                bool is_last = t.tokens && i < t.together &&
                               segment_is_last(&shared->plan, plan, t.entry + i, t.lane);
                uint32_t mask = __ballot_sync(0xffffffffu, is_last);
                if (threadIdx.x == 0)
                    shared->complete[i] = mask;
            }
            __threadfence();
        }
        __syncthreads();
        for (uint32_t i = 0; i < plan.together; i++)
            for (uint32_t mask = shared->complete[i]; mask; mask &= mask - 1) {
                task t;
                task_by_segment(&shared->plan, view, plan,
                                first + (uint32_t)(__ffs((int)mask) - 1) * gridDim.x, &t);
                task_heads heads = heads_of(plan, t);
                const list_entry &e = shared->plan.list[t.entry + i];
                segments_merge<DIM>(a, plan, e.row, (uint64_t)view.units * a.heads, e.start,
                                    segments_of(e.position), heads.first, heads.count);
            }
    }
}

// ---- the kernel ----

template <int DIM>
static __global__ void __launch_bounds__(DECODE_THREADS, decode_shape<DIM>::CTAS)
    attention_kernel(const struct cuda_control *control, uint32_t control_slot,
                     const __grid_constant__ struct attention_args a,
                     const __grid_constant__ struct attention_plan plan)
{
    using shape = decode_shape<DIM>;
    extern __shared__ __align__(128) uint8_t memory[];
    decode_shared<DIM> *shared = (decode_shared<DIM> *)memory;
    uint32_t lane = threadIdx.x % 32, warp = threadIdx.x / 32, rows, stage = 0;
    if (!segment_enter_alone(control, control_slot, &rows))
        return;
    schedule_view view;
    schedule_make(&shared->plan, shared->mask, a, plan, rows, &view);
    task now = task_first(&shared->plan, shared->mask, view, a, plan);
    task next = task_next(&shared->plan, shared->mask, view, a, plan, now), later;
    token_pages pages, pages_later;
    uint64_t address[2], address_next[2];
    query_part<DIM> part;
    query_load<DIM>(&part, &shared->plan, a, plan, now);
    pages_load(&pages, a, plan, now, warp, lane);
    pages_load(&pages_later, a, plan, next, warp, lane);
    pages_resolve(address, pages, a, plan);
    ring_fill<DIM>(shared->ring[warp], address, now.tokens, a, plan, warp, lane);
    while (now.tokens) {
        later = task_next(&shared->plan, shared->mask, view, a, plan, next);
        pages_resolve(address_next, pages_later, a, plan);
        pages_load(&pages_later, a, plan, later, warp, lane);
        task_heads heads = heads_of(plan, now);
        query_put<DIM>(shared->query, part);
        query_load<DIM>(&part, &shared->plan, a, plan, next);
        __syncthreads();
        uint32_t query[DIM / 16][2];
        query_fragments<DIM>(query, shared->query, lane);
        warp_state<DIM> state;
        state_clear(&state);
#pragma unroll
        for (int slot = 0; slot < SLOTS; slot++) {
            uint8_t *tile = shared->ring[warp][stage];
            uint32_t first = (slot * DECODE_WARPS + warp) * TILE_TOKENS;
            async_wait<shape::STAGES - 1>();
            __syncwarp();
            if (first < now.tokens)
                tile_compute<DIM>(&state, tile, query, a.scale, now.tokens - first, lane);
            __syncwarp();
            if (slot == SLOTS - 1) {
                if (warp * TILE_TOKENS < now.tokens)
                    state_put(shared, tile, &state, warp, lane, now.together * heads.count);
                __syncthreads();
                segment_leave<DIM>(shared, stage, a, plan, view, now, heads.first, heads.count);
                __syncthreads();
            }
            int ahead = slot + shape::STAGES;
            if (ahead < SLOTS)
                slot_load<DIM>(tile, address, ahead, now.tokens, a, plan, warp, lane);
            else
                slot_load<DIM>(tile, address_next, ahead - SLOTS, next.tokens, a, plan, warp, lane);
            async_commit();
            stage = stage + 1 == shape::STAGES ? 0 : stage + 1;
        }
        now = next;
        next = later;
        address[0] = address_next[0];
        address[1] = address_next[1];
    }
    if (!view.by_rows)
        segments_finish<DIM>(shared, a, plan, view);
}

template <int DIM> static size_t decode_bytes(uint32_t rows)
{
    return sizeof(decode_shared<DIM>) + (rows / 32 + 2) * sizeof(uint32_t);
}

template <int DIM>
static void decode_launch(const struct cuda_launch *l, const struct attention_args *a,
                          const struct attention_plan *plan)
{
    dim3 grid(l->device->multiprocessors * decode_shape<DIM>::CTAS);
    launch_kernel(l, attention_kernel<DIM>, grid, dim3(DECODE_THREADS),
                  decode_bytes<DIM>(l->rows_max), l->control, l->slot, *a, *plan);
}

// Whether every row of K and V begins at a multiple of 16 bytes and is a multiple of 16 long.
static bool rows_are_wide(const struct kv_view *kv)
{
    return kv->shape.head_dim % 8 == 0 && kv->page_bytes % 16 == 0 &&
           kv->shape.part_bytes % 16 == 0 && (uintptr_t)kv->arena % 16 == 0;
}

void cuda__attention(const struct cuda_launch *l, const struct attention_args *args)
{
    const struct kv_shape *s = &args->kv.shape;
    if (!l->rows_max)
        return;
    CHECK(s->head_dim && s->head_dim <= HEAD_DIM_MAX && s->head_dim % 2 == 0);
    CHECK(s->block_tokens && s->kv_heads && s->layers_per_page);
    CHECK(args->layer < s->layers && args->layer / s->layers_per_page < s->pages_per_block);
    CHECK(s->part_bytes >= (size_t)4 * s->kv_heads * s->block_tokens * s->head_dim);
    CHECK(args->heads && args->heads % s->kv_heads == 0 && args->scale > 0);
    struct attention_args a = *args;
    a.scale *= LOG2_E;
    struct attention_plan plan = {};
    plan.act_cols = (uint32_t)cuda__act_cols((size_t)a.heads * s->head_dim);
    plan.group = a.heads / s->kv_heads;
    plan.passes = (plan.group + HEADS_MAX - 1) / HEADS_MAX;
    plan.lanes = s->kv_heads * plan.passes;
    plan.together = plan.group < HEADS_MAX ? HEADS_MAX / plan.group : 1;
    plan.wide = rows_are_wide(&a.kv);
    plan.layer_at = (uint64_t)(a.layer % s->layers_per_page) * s->part_bytes;
    plan.values_at = (uint64_t)s->kv_heads * s->block_tokens * s->head_dim * 2;
    plan.page_at = a.layer / s->layers_per_page;
    plan.counters = (uint32_t *)l->partials;
    plan.partials = (float *)(plan.counters + COUNTERS);
    plan.partial_floats = ATTENTION_PARTIAL_BYTES / sizeof(float) - COUNTERS;
    plan.runs = l->rows_max > PREFILL_ROWS && !l->device->invariant;
    if (plan.runs)
        cuda__attention_prefill(l, &a, &plan);
    if (s->head_dim <= 64)
        decode_launch<64>(l, &a, &plan);
    else if (s->head_dim <= 128)
        decode_launch<128>(l, &a, &plan);
    else
        decode_launch<256>(l, &a, &plan);
}

enum status cuda__attention_prepare(struct cuda_device *device)
{
    enum { MOST_ROWS = 1 << 16 };
    const cudaFuncAttribute most = cudaFuncAttributeMaxDynamicSharedMemorySize;
    CUDA_TRY(device,
             cudaFuncSetAttribute(attention_kernel<64>, most, (int)decode_bytes<64>(MOST_ROWS)));
    CUDA_TRY(device,
             cudaFuncSetAttribute(attention_kernel<128>, most, (int)decode_bytes<128>(MOST_ROWS)));
    CUDA_TRY(device,
             cudaFuncSetAttribute(attention_kernel<256>, most, (int)decode_bytes<256>(MOST_ROWS)));
    return cuda__attention_prefill_prepare(device);
}
