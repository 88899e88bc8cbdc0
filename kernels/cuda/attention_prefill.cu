// SPDX-License-Identifier: Apache-2.0
// Paged attention over runs of rows: chunks of a prompt, by tensor cores (FlashAttention-2).
//
//   out[row][head] = softmax(q . K[0..position] * scale) V
//
// Layouts as in attention.cu. Which rows are meant: attention.cuh.
//
// A CTA of 4 warps owns one query head of a window of ROWS rows, 128 (head_dim up to 128) or 64.
// The window is cut where runs begin and end; each piece has consecutive positions of one sequence
// and is computed by itself. Warp w owns tile rows [16 MTILES w, 16 MTILES (w + 1)): MTILES = 2 or
// 1 mma tiles, so that a K or V fragment read from shared memory serves two products. KV goes by in
// tiles of 64 tokens in ascending order: scores (q rounded to bf16), causal mask where a tile
// reaches beyond the warp's first row, online softmax in fp32, acc += p V with p rounded to bf16.
// In the first tile p has two bf16 terms (weights_split): rows near the begin of a sequence see few
// tokens and their roundings do not average out.
//
// Tiles are double-buffered, fetched by cp.async one tile ahead. The address of each token's K row
// is found two tiles ahead, by a thread per token, and passed through shared memory. Windows are
// taken last first, because the last ones see most; the heads of a KV head run side by side and
// share its tiles in L2.
//
// NaN and inf. A row's V must not reach the rows before it, but 0 * NaN is NaN. So tiles with
// masked scores are searched for values that are not finite; when there are any, those are added to
// the rows that see them and replaced by zero.
//
// The order of sums depends on where a run is cut into windows: not for --batch-invariant.
//
// Shared memory for DIM 64 / 128 / 256: q 16 / 32 / 32 KiB, tiles 32 / 64 / 128 KiB, addresses 1
// KiB: two CTAs per multiprocessor, one for 256. Bound by tensor cores: 4 * heads * dim * (tokens
// seen) flops per row; 2048 tokens of 32 heads of 128: 34 GFLOP, 35 us at the
// dense peak of 989 TFLOP/s, which mma.sync, unlike wgmma, cannot reach. Tolerance: 2^-8 of sum p
// |v| for the rounding of the result, and about
// 2^-9 / sqrt(tokens) for that of p.
#include "kernels/cuda/attention.cuh"

enum { PREFILL_WARPS = 4, PREFILL_THREADS = PREFILL_WARPS * 32, KV_TILE = 64 };

template <int DIM> struct prefill_shape {
    static constexpr int MTILES = DIM == 256 ? 1 : 2;
    static constexpr int ROWS = PREFILL_WARPS * MTILES * 16;
    static constexpr int CTAS = DIM == 256 ? 1 : 2;
    static constexpr int TILE = KV_TILE * DIM * 2; // K or V
    static constexpr int WORDS = ROWS / 32 + 2;    // bits of the window and 32 rows on both sides
};

template <int DIM> struct prefill_shared {
    alignas(128) uint8_t query[prefill_shape<DIM>::ROWS * DIM * 2];
    uint8_t keys[2][prefill_shape<DIM>::TILE], values[2][prefill_shape<DIM>::TILE];
    uint64_t address[2][KV_TILE]; // of the K row of each token
    uint32_t continues[prefill_shape<DIM>::WORDS];
    uint32_t stray[DIM];
};

// Rows [row, row + rows) of one run.
struct piece {
    uint32_t row, rows, sequence, position; // position of the first row
    uint32_t tokens;                        // seen by the last row
};

template <int DIM> struct prefill_state {
    static constexpr int MTILES = prefill_shape<DIM>::MTILES;
    float max[MTILES][2], sum[MTILES][2]; // sum: of this lane's columns only
    float acc[MTILES][DIM / 8][4];
};

// ---- loads ----

// The address of the K row of token `token`; any valid one behind the last token.
static __device__ __forceinline__ uint64_t token_address(const struct attention_args &a,
                                                         const struct attention_plan &plan,
                                                         const piece &p, uint32_t kv_head,
                                                         uint32_t token)
{
    const struct kv_shape &s = a.kv.shape;
    if (token >= p.tokens)
        return (uint64_t)a.kv.arena;
    uint32_t block = token / s.block_tokens, in_block = token - block * s.block_tokens;
    uint64_t at =
        ((uint64_t)p.sequence * a.kv.blocks_max + block) * s.pages_per_block + plan.page_at;
    return (uint64_t)a.kv.arena + (uint64_t)a.kv.pages[at] * a.kv.page_bytes + plan.layer_at +
           ((uint64_t)kv_head * s.block_tokens + in_block) * s.head_dim * 2;
}

template <int DIM>
static __device__ __noinline__ void
tile_load_narrow(prefill_shared<DIM> *shared, uint32_t buffer, const struct attention_args &a,
                 const struct attention_plan &plan, uint32_t tokens)
{
    for (uint32_t i = threadIdx.x; i < KV_TILE * DIM / 2; i += PREFILL_THREADS) {
        uint32_t token = i / (DIM / 2), word = i % (DIM / 2);
        uint32_t bytes = token < tokens && 2 * word < a.kv.shape.head_dim ? 4 : 0;
        uint32_t at = chunk_at<DIM>(token, word / 4) + word % 4 * 4;
        const uint8_t *k =
            bytes ? (const uint8_t *)shared->address[buffer][token] + word * 4 : a.kv.arena;
        async_load4(shared->keys[buffer] + at, k, bytes);
        async_load4(shared->values[buffer] + at, k + (bytes ? plan.values_at : 0), bytes);
    }
}

// Begins the loads of a tile whose addresses stand in shared memory. tokens: how many are seen.
template <int DIM>
static __device__ __forceinline__ void tile_load(prefill_shared<DIM> *shared, uint32_t buffer,
                                                 const struct attention_args &a,
                                                 const struct attention_plan &plan, uint32_t tokens)
{
    constexpr uint32_t CHUNKS = DIM / 8, STRIDE = PREFILL_THREADS / CHUNKS;
    if (!plan.wide) {
        tile_load_narrow<DIM>(shared, buffer, a, plan, tokens);
        return;
    }
    uint32_t chunk = threadIdx.x % CHUNKS;
    bool inside = chunk * 8 < a.kv.shape.head_dim;
#pragma unroll
    for (uint32_t i = 0; i < KV_TILE / STRIDE; i++) {
        uint32_t token = i * STRIDE + threadIdx.x / CHUNKS;
        uint32_t bytes = inside && token < tokens ? 16 : 0;
        const uint8_t *k =
            bytes ? (const uint8_t *)shared->address[buffer][token] + chunk * 16 : a.kv.arena;
        async_load16(shared->keys[buffer] + chunk_at<DIM>(token, chunk), k, bytes);
        async_load16(shared->values[buffer] + chunk_at<DIM>(token, chunk),
                     k + (bytes ? plan.values_at : 0), bytes);
    }
}

// q of the piece, rounded to bf16; zeros behind its last row.
template <int DIM>
static __device__ __forceinline__ void rows_load(uint8_t *query, const struct attention_args &a,
                                                 const piece &p, uint32_t head)
{
    uint32_t dim = a.kv.shape.head_dim;
#pragma unroll 4
    for (uint32_t i = threadIdx.x; i < prefill_shape<DIM>::ROWS * (DIM / 2); i += PREFILL_THREADS) {
        uint32_t row = i / (DIM / 2), d = i % (DIM / 2) * 2;
        bool inside = row < p.rows && d < dim;
        const float *q = a.q + (uint64_t)(p.row + row) * a.q_stride + (uint64_t)head * dim + d;
        float low = inside ? q[0] : 0.0f, high = inside ? q[1] : 0.0f;
        *(uint32_t *)(query + chunk_at<DIM>(row, d / 8) + d % 8 * 2) = pack_bf16(low, high);
    }
}

// ---- a tile ----

template <int DIM>
static __device__ __forceinline__ void tile_scores(float s[prefill_shape<DIM>::MTILES][8][4],
                                                   const uint8_t *query, const uint8_t *keys,
                                                   uint32_t row, uint32_t lane)
{
    constexpr int MTILES = prefill_shape<DIM>::MTILES;
#pragma unroll
    for (int m = 0; m < MTILES; m++)
#pragma unroll
        for (int n = 0; n < 8; n++)
#pragma unroll
            for (int j = 0; j < 4; j++)
                s[m][n][j] = 0;
#pragma unroll
    for (int step = 0; step < DIM / 16; step++) {
        uint32_t q[MTILES][4];
#pragma unroll
        for (int m = 0; m < MTILES; m++)
            rows_fragment<DIM>(q[m], query, row + 16 * m, step, lane);
#pragma unroll
        for (int n = 0; n < 4; n++) {
            uint32_t k[4];
            keys_fragment<DIM>(k, keys, 16 * n, step, lane);
#pragma unroll
            for (int m = 0; m < MTILES; m++) {
                mma_16816(s[m][2 * n], q[m], k[0], k[1]);
                mma_16816(s[m][2 * n + 1], q[m], k[2], k[3]);
            }
        }
    }
}

// Scores of tokens that the row does not see become -inf. seen: how many tokens of the tile the
// row of fragment row lane / 4 sees, at most; it may be negative.
static __device__ __forceinline__ void scores_mask(float s[8][4], int seen, uint32_t lane)
{
#pragma unroll
    for (int n = 0; n < 8; n++)
#pragma unroll
        for (int j = 0; j < 4; j++)
            if (n * 8 + (int)(lane % 4) * 2 + j % 2 >= seen + j / 2 * 8)
                s[n][j] = NO_SCORE;
}

// Scores of 16 rows become p; max and sum go on; keep: what acc has to be multiplied by.
static __device__ __forceinline__ void scores_softmax(float s[8][4], float max[2], float sum[2],
                                                      float keep[2], float scale)
{
#pragma unroll
    for (int r = 0; r < 2; r++) {
        float top = NO_SCORE;
#pragma unroll
        for (int n = 0; n < 8; n++)
            top = fmaxf(top, fmaxf(s[n][2 * r], s[n][2 * r + 1]));
        top = fmaxf(max[r], quad_max(top) * scale);
        float shift = shift_of(top), total = 0;
        keep[r] = exp2_fast(max[r] - shift);
        max[r] = top;
#pragma unroll
        for (int n = 0; n < 8; n++)
#pragma unroll
            for (int j = 2 * r; j < 2 * r + 2; j++) {
                s[n][j] = exp2_fast(__fmaf_rn(s[n][j], scale, -shift));
                total += s[n][j];
            }
        sum[r] = sum[r] * keep[r] + total;
    }
}

template <int DIM, bool SPLIT>
static __device__ __forceinline__ void tile_mix(prefill_state<DIM> *w,
                                                float s[prefill_shape<DIM>::MTILES][8][4],
                                                const uint8_t *values, uint32_t lane)
{
    constexpr int MTILES = prefill_shape<DIM>::MTILES;
#pragma unroll
    for (int n = 0; n < 4; n++) {
        uint32_t p[MTILES][4], rest[MTILES][4];
#pragma unroll
        for (int m = 0; m < MTILES; m++)
            weights_split(p[m], rest[m], s[m] + 2 * n);
#pragma unroll
        for (int step = 0; step < DIM / 16; step++) {
            uint32_t v[4];
            values_fragment<DIM>(v, values, 16 * n, step, lane);
#pragma unroll
            for (int m = 0; m < MTILES; m++) {
                mma_16816(w->acc[m][2 * step], p[m], v[0], v[1]);
                mma_16816(w->acc[m][2 * step + 1], p[m], v[2], v[3]);
                if (SPLIT) {
                    mma_16816(w->acc[m][2 * step], rest[m], v[0], v[1]);
                    mma_16816(w->acc[m][2 * step + 1], rest[m], v[2], v[3]);
                }
            }
        }
    }
}

// seen: tokens of the tile that the warp's first row sees; it may be negative.
template <int DIM>
static __device__ __forceinline__ void
tile_attend(prefill_state<DIM> *w, const prefill_shared<DIM> *shared, uint32_t buffer, int seen,
            bool first, float scale, uint32_t warp, uint32_t lane)
{
    constexpr int MTILES = prefill_shape<DIM>::MTILES;
    float s[MTILES][8][4], keep[MTILES][2];
    bool changed = false;
    tile_scores<DIM>(s, shared->query, shared->keys[buffer], warp * MTILES * 16, lane);
#pragma unroll
    for (int m = 0; m < MTILES; m++) {
        if (seen + 16 * m < KV_TILE)
            scores_mask(s[m], seen + 16 * m + (int)(lane / 4), lane);
        scores_softmax(s[m], w->max[m], w->sum[m], keep[m], scale);
        changed |= keep[m][0] != 1.0f || keep[m][1] != 1.0f;
    }
    if (__any_sync(0xffffffffu, changed))
#pragma unroll
        for (int m = 0; m < MTILES; m++)
#pragma unroll
            for (int i = 0; i < DIM / 8; i++)
#pragma unroll
                for (int j = 0; j < 4; j++)
                    w->acc[m][i][j] *= keep[m][j / 2];
    if (first)
        tile_mix<DIM, true>(w, s, shared->values[buffer], lane);
    else
        tile_mix<DIM, false>(w, s, shared->values[buffer], lane);
}

// ---- values that are not finite ----

static __device__ __forceinline__ bool not_finite(uint32_t half)
{
    return (half & 0x7f80) == 0x7f80;
}

// Whether V of a tile has such values. All threads; contains a barrier.
template <int DIM> static __device__ __forceinline__ bool values_stray(const uint8_t *values)
{
    int found = 0;
#pragma unroll 4
    for (uint32_t i = threadIdx.x; i < KV_TILE * DIM / 2; i += PREFILL_THREADS) {
        uint32_t both = ((const uint32_t *)values)[i];
        found |= not_finite(both) || not_finite(both >> 16);
    }
    return __syncthreads_or(found);
}

// Replaces them by zero; stray[d]: the first token that had one in column d. Ends with a barrier.
template <int DIM>
static __device__ __noinline__ void values_isolate(uint8_t *values, uint32_t *stray)
{
    for (uint32_t d = threadIdx.x; d < DIM; d += PREFILL_THREADS) {
        uint32_t first = KV_TILE;
        for (uint32_t t = KV_TILE; t-- > 0;) {
            uint16_t *x = (uint16_t *)(values + chunk_at<DIM>(t, d / 8) + d % 8 * 2);
            if (not_finite(*x)) {
                first = t;
                *x = 0;
            }
        }
        stray[d] = first;
    }
    __syncthreads();
}

// NaN to what sees them.
template <int DIM>
static __device__ __forceinline__ void values_mark(prefill_state<DIM> *w, const uint32_t *stray,
                                                   int seen, uint32_t lane)
{
#pragma unroll
    for (int i = 0; i < DIM / 8; i++)
#pragma unroll
        for (int j = 0; j < 4; j++) {
            int first = (int)stray[i * 8 + lane % 4 * 2 + j % 2];
#pragma unroll
            for (int m = 0; m < prefill_shape<DIM>::MTILES; m++)
                if (first < KV_TILE && first < seen + 16 * m + (int)(lane / 4) + j / 2 * 8)
                    w->acc[m][i][j] = __int_as_float(0x7fffffff);
        }
}

// ---- pieces ----

template <int DIM>
static __device__ __forceinline__ void
piece_write(prefill_state<DIM> *w, const struct attention_args &a,
            const struct attention_plan &plan, const piece &p, uint32_t head, uint32_t warp,
            uint32_t lane)
{
    constexpr int MTILES = prefill_shape<DIM>::MTILES;
    uint32_t dim = a.kv.shape.head_dim;
#pragma unroll
    for (int m = 0; m < MTILES; m++)
#pragma unroll
        for (int r = 0; r < 2; r++) {
            float scale = 1.0f / quad_sum(w->sum[m][r]);
            uint32_t row = (warp * MTILES + m) * 16 + 8 * r + lane / 4;
            if (row >= p.rows)
                continue;
            bf16 *out = (bf16 *)a.out + (uint64_t)(p.row + row) * plan.act_cols;
#pragma unroll
            for (int i = 0; i < DIM / 8; i++) {
                uint32_t d = i * 8 + lane % 4 * 2;
                if (d < dim)
                    *(uint32_t *)(out + head * dim + d) =
                        pack_bf16(w->acc[m][i][2 * r] * scale, w->acc[m][i][2 * r + 1] * scale);
            }
            if (head + 1 == a.heads)
                for (uint32_t c = a.heads * dim + lane % 4; c < plan.act_cols; c += 4)
                    out[c] = __float2bfloat16_rn(0.0f);
        }
}

template <int DIM> static __device__ __forceinline__ void prefill_clear(prefill_state<DIM> *w)
{
#pragma unroll
    for (int m = 0; m < prefill_shape<DIM>::MTILES; m++) {
#pragma unroll
        for (int r = 0; r < 2; r++) {
            w->max[m][r] = NO_SCORE;
            w->sum[m][r] = 0;
        }
#pragma unroll
        for (int i = 0; i < DIM / 8; i++)
#pragma unroll
            for (int j = 0; j < 4; j++)
                w->acc[m][i][j] = 0;
    }
}

template <int DIM>
static __device__ __forceinline__ void
piece_attend(prefill_shared<DIM> *shared, const struct attention_args &a,
             const struct attention_plan &plan, const piece &p, uint32_t head)
{
    constexpr int WARP_ROWS = prefill_shape<DIM>::MTILES * 16;
    uint32_t lane = threadIdx.x % 32, warp = threadIdx.x / 32, kv_head = head / plan.group;
    uint32_t tiles = (p.tokens + KV_TILE - 1) / KV_TILE, token = threadIdx.x;
    if (token < KV_TILE)
        for (uint32_t i = 0; i < 2; i++)
            shared->address[i][token] = token_address(a, plan, p, kv_head, i * KV_TILE + token);
    rows_load<DIM>(shared->query, a, p, head);
    __syncthreads();
    tile_load<DIM>(shared, 0, a, plan, p.tokens);
    async_commit();
    prefill_state<DIM> state;
    prefill_clear(&state);
    for (uint32_t tile = 0; tile < tiles; tile++) {
        uint32_t buffer = tile % 2, first = tile * KV_TILE;
        async_wait<0>();
        __syncthreads();
        if (tile + 1 < tiles)
            tile_load<DIM>(shared, buffer ^ 1, a, plan, p.tokens - first - KV_TILE);
        async_commit();
        uint64_t address = 0;
        if (token < KV_TILE)
            address = token_address(a, plan, p, kv_head, first + 2 * KV_TILE + token);
        // Tokens of the tile that the piece's first row sees, and the warp's first row.
        int seen = (int)(p.position + 1 - first), seen_warp = seen + (int)warp * WARP_ROWS;
        if (seen < KV_TILE && values_stray<DIM>(shared->values[buffer])) {
            values_isolate<DIM>(shared->values[buffer], shared->stray);
            values_mark<DIM>(&state, shared->stray, seen_warp, lane);
        }
        if (seen_warp + WARP_ROWS > 1 && warp * WARP_ROWS < p.rows)
            tile_attend<DIM>(&state, shared, buffer, seen_warp, tile == 0, a.scale, warp, lane);
        if (token < KV_TILE)
            shared->address[buffer][token] = address;
    }
    piece_write<DIM>(&state, a, plan, p, head, warp, lane);
    __syncthreads(); // the next piece writes what the last tile was read from
}

template <int DIM>
static __global__ void __launch_bounds__(PREFILL_THREADS, prefill_shape<DIM>::CTAS)
    prefill_kernel(const struct cuda_control *control, uint32_t control_slot,
                   const __grid_constant__ struct attention_args a,
                   const __grid_constant__ struct attention_plan plan)
{
    using shape = prefill_shape<DIM>;
    extern __shared__ __align__(128) uint8_t memory[];
    prefill_shared<DIM> *shared = (prefill_shared<DIM> *)memory;
    uint32_t rows, begin = (gridDim.y - 1 - blockIdx.y) * shape::ROWS;
    if (!segment_enter_alone(control, control_slot, &rows) || begin >= rows)
        return;
    for (uint32_t i = threadIdx.x; i < (shape::WORDS + 3) / 4 * 128; i += PREFILL_THREADS) {
        uint32_t row = begin + i - 32; // wraps below zero: beyond all rows
        uint32_t bits = __ballot_sync(0xffffffffu, continues_row(a, row, rows));
        if (i % 32 == 0 && i / 32 < shape::WORDS)
            shared->continues[i / 32] = bits;
    }
    __syncthreads();
    uint32_t end = begin + shape::ROWS < rows ? begin + shape::ROWS : rows;
    for (uint32_t row = begin; row < end;) {
        uint32_t word = (row - begin) / 32 + 1, next = row + 1;
        if (in_run(shared->continues[word - 1], shared->continues[word],
                   shared->continues[word + 1], row)) {
            while (next < end && shared->continues[(next - begin) / 32 + 1] >> next % 32 & 1)
                next++;
            piece p = {row, next - row, a.sequence[row], a.position[row], 0};
            p.tokens = p.position + p.rows;
            piece_attend<DIM>(shared, a, plan, p, blockIdx.x);
        }
        row = next;
    }
}

template <int DIM>
static void prefill_launch(const struct cuda_launch *l, const struct attention_args *a,
                           const struct attention_plan *plan)
{
    uint32_t windows = (l->rows_max + prefill_shape<DIM>::ROWS - 1) / prefill_shape<DIM>::ROWS;
    launch_kernel(l, prefill_kernel<DIM>, dim3(a->heads, windows), dim3(PREFILL_THREADS),
                  sizeof(prefill_shared<DIM>), l->control, l->slot, *a, *plan);
}

void cuda__attention_prefill(const struct cuda_launch *l, const struct attention_args *a,
                             const struct attention_plan *plan)
{
    if (a->kv.shape.head_dim <= 64)
        prefill_launch<64>(l, a, plan);
    else if (a->kv.shape.head_dim <= 128)
        prefill_launch<128>(l, a, plan);
    else
        prefill_launch<256>(l, a, plan);
}

enum status cuda__attention_prefill_prepare(struct cuda_device *device)
{
    const cudaFuncAttribute most = cudaFuncAttributeMaxDynamicSharedMemorySize;
    CUDA_TRY(device,
             cudaFuncSetAttribute(prefill_kernel<64>, most, (int)sizeof(prefill_shared<64>)));
    CUDA_TRY(device,
             cudaFuncSetAttribute(prefill_kernel<128>, most, (int)sizeof(prefill_shared<128>)));
    CUDA_TRY(device,
             cudaFuncSetAttribute(prefill_kernel<256>, most, (int)sizeof(prefill_shared<256>)));
    return STATUS_OK;
}
