// SPDX-License-Identifier: Apache-2.0
// LoRA shrink (lora.cuh). The ranks of the modules of a segment stand one behind another ("virtual"
// ranks), since all read the same x. A task is 8 virtual ranks x 8 rows (segments of up to
// SHORT_ROWS rows) or 32 x 32. One arithmetic for both: mma.m16n8k16 with x rows as M and ranks as
// N. Lane (g, t) = (lane / 4, lane % 4) loads 16 bytes of row g at column 8 t of a chunk of 32
// columns, of A and of x alike, and feeds them to two mma: both sides permute k in the same way, so
// the products match. Warp w takes the pieces of 64 columns w, w + 8, ..., ascending; the 8 sums
// are added in order of warp. So a bit of hidden depends on its row, its rank and d_in alone; this
// one kernel serves --batch-invariant. FIFO: SHRINK_DEPTH pieces a warp, 1 KiB of A and 1 KiB of x
// each (48 KiB); long tasks use the place for the warps' sums.
//
// Tolerance: fp32 sums in another order than the CPU's.
#include "kernels/cuda/lora.cuh"

enum {
    CHUNK_BYTES = 64, // 32 columns: two mma
    SHORT_ROWS = 32,
    SHORT_TILE = 8,
    LONG_TILE = 32,
    LONG_STRIDE = LONG_TILE + 4, // floats: fewer bank conflicts
    SHRINK_DEPTH = 3,
    PIECE_BYTES = 2 * 2 * 32 * 16, // two chunks of A, two of x, 16 bytes a lane
    SHRINK_SHARED = WARPS * SHRINK_DEPTH * PIECE_BYTES,
};
static_assert(SHRINK_SHARED >= WARPS * LONG_TILE * LONG_STRIDE * 4, "sums of long tasks");

struct shrink_work {
    struct lora_work w;
    const uint8_t *x;
    uint64_t x_row_bytes;
    uint32_t chunks; // of 32 columns in a row of A
    float *hidden[MODULES];
};

// Module and rank of a virtual rank.
__device__ __forceinline__ uint32_t module_of(const struct segment &s, uint32_t *rank)
{
    uint32_t m = 0;
    while (m < MODULES - 1 && *rank >= s.slice[m].rank)
        *rank -= s.slice[m++].rank;
    return m;
}

__device__ __forceinline__ const uint8_t *rank_row(const struct lora_work &w,
                                                   const struct segment &s, uint32_t rank)
{
    if (rank >= ranks_of(s))
        return NULL;
    uint32_t m = module_of(s, &rank);
    return lora_row(w.arena, w.page_bytes, s.pages, &s.slice[m], rank);
}

__device__ __forceinline__ const uint8_t *x_row(const struct shrink_work &a,
                                                const struct segment &s, uint32_t row)
{
    return row < s.rows ? a.x + (uint64_t)(s.row + row) * a.x_row_bytes : NULL;
}

__device__ __forceinline__ uint4 load_x(const uint8_t *row, uint32_t at)
{
    return row ? *(const uint4 *)(row + at) : make_uint4(0, 0, 0, 0);
}

// A short task: 8 ranks x 8 rows.
struct short_task {
    const struct segment *segment;
    uint32_t rank0, row0;
};

__device__ __forceinline__ struct short_task short_task_at(const struct survey &v, uint32_t task)
{
    const struct segment &s = segment_of(v, &segment::first, task);
    uint32_t tiles = div_up32(ranks_of(s), SHORT_TILE);
    task -= s.first;
    return {&s, task % tiles * SHORT_TILE, task / tiles * SHORT_TILE};
}

// Where a warp stands: a task, and the piece of it.
struct shrink_cursor {
    uint32_t task, piece;
    const uint8_t *a, *x; // this lane's rows, NULL: zeros
};

__device__ __forceinline__ void shrink_open(const struct shrink_work &a, const struct survey &v,
                                            struct shrink_cursor &c)
{
    c.piece = threadIdx.x / 32;
    if (2 * c.piece >= a.chunks)
        c.task = v.tasks; // nothing for this warp in any task
    if (c.task >= v.tasks)
        return;
    struct short_task k = short_task_at(v, c.task);
    uint32_t g = threadIdx.x % 32 / 4;
    c.a = rank_row(a.w, *k.segment, k.rank0 + g);
    c.x = x_row(a, *k.segment, k.row0 + g);
}

// Requests the cursor's piece, of A and, or, of x, and advances.
template <bool A, bool X>
__device__ __forceinline__ void shrink_issue(const struct shrink_work &a, const struct survey &v,
                                             struct shrink_cursor &c, uint8_t *slot)
{
    if (c.task < v.tasks) {
        uint32_t lane = threadIdx.x % 32, at = c.piece * 2 * CHUNK_BYTES + lane % 4 * 16;
#pragma unroll
        for (int h = 0; h < 2; h++, at += CHUNK_BYTES) {
            bool is_there = 2 * c.piece + h < a.chunks;
            if (A)
                async_load16(slot + (h * 32 + lane) * 16, c.a ? c.a + at : a.w.arena,
                             is_there && c.a ? 16 : 0);
            if (X)
                async_load16(slot + ((2 + h) * 32 + lane) * 16, c.x ? c.x + at : a.x,
                             is_there && c.x ? 16 : 0);
        }
        c.piece += WARPS;
        if (2 * c.piece >= a.chunks) {
            c.task += gridDim.x;
            shrink_open(a, v, c);
        }
    }
    async_commit();
}

__device__ __forceinline__ void piece_multiply(const uint8_t *slot, float d[4])
{
    const uint4 *from = (const uint4 *)slot + threadIdx.x % 32;
#pragma unroll
    for (int h = 0; h < 2; h++) {
        uint4 b = from[h * 32], x = from[(2 + h) * 32];
        uint32_t low[4] = {x.x, 0, x.y, 0}, high[4] = {x.z, 0, x.w, 0};
        mma_16816(d, low, b.x, b.y);
        mma_16816(d, high, b.z, b.w);
    }
}

// 32 ranks x 32 rows; sums[warp][32 rows][LONG_STRIDE].
__device__ __forceinline__ void shrink_long(const struct shrink_work &a, const struct segment &s,
                                            uint32_t rank0, uint32_t row0, float *sums)
{
    uint32_t warp = threadIdx.x / 32, g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
    uint32_t tiles = min(div_up32(ranks_of(s) - rank0, 8), LONG_TILE / 8);
    const uint8_t *from[4], *x[4];
    float d[2][4][4] = {};
#pragma unroll
    for (int i = 0; i < 4; i++) {
        from[i] = rank_row(a.w, s, rank0 + i * 8 + g);
        x[i] = x_row(a, s, row0 + i * 8 + g);
    }
    for (uint32_t piece = warp; 2 * piece < a.chunks; piece += WARPS)
        for (uint32_t chunk = 2 * piece; chunk < min(2 * piece + 2, a.chunks); chunk++) {
            uint32_t at = chunk * CHUNK_BYTES + t * 16;
            uint4 v[4], b[4];
#pragma unroll
            for (int i = 0; i < 4; i++) {
                v[i] = load_x(x[i], at);
                b[i] = load_x(from[i], at);
            }
#pragma unroll
            for (int m = 0; m < 2; m++) {
                uint32_t low[4] = {v[2 * m].x, v[2 * m + 1].x, v[2 * m].y, v[2 * m + 1].y};
                uint32_t high[4] = {v[2 * m].z, v[2 * m + 1].z, v[2 * m].w, v[2 * m + 1].w};
#pragma unroll
                for (int n = 0; n < 4; n++) {
                    if (n >= (int)tiles)
                        continue;
                    mma_16816(d[m][n], low, b[n].x, b[n].y);
                    mma_16816(d[m][n], high, b[n].z, b[n].w);
                }
            }
        }
#pragma unroll
    for (int m = 0; m < 2; m++)
#pragma unroll
        for (int n = 0; n < 4; n++) {
            float *to = sums + (warp * LONG_TILE + m * 16 + g) * LONG_STRIDE + n * 8 + 2 * t;
            *(float2 *)to = make_float2(d[m][n][0], d[m][n][1]);
            *(float2 *)(to + 8 * LONG_STRIDE) = make_float2(d[m][n][2], d[m][n][3]);
        }
}

// Adds the warps' sums in order and stores a tile.
template <int TILE, int STRIDE>
__device__ __forceinline__ void store_tile(const struct shrink_work &a, const struct segment &s,
                                           uint32_t rank0, uint32_t row0, const float *sums,
                                           uint32_t stride)
{
    for (uint32_t i = threadIdx.x; i < TILE * TILE; i += THREADS) {
        uint32_t row = i / TILE, rank = rank0 + i % TILE;
        if (row0 + row >= s.rows || rank >= ranks_of(s))
            continue;
        float sum = 0.0f;
#pragma unroll
        for (int w = 0; w < WARPS; w++)
            sum += sums[(w * TILE + row) * STRIDE + i % TILE];
        uint32_t m = module_of(s, &rank);
        a.hidden[m][(uint64_t)(s.row + row0 + row) * stride + rank] = sum;
    }
}

// The short tasks of a survey. `entered`: the kernel before is done; false: the segment has missed.
__device__ __forceinline__ bool shrink_short(const struct shrink_work &a, const struct survey &v,
                                             uint8_t *fifo, float *sums, uint32_t stride,
                                             bool *entered)
{
    constexpr uint32_t TILE_SUMS = WARPS * SHORT_TILE * SHORT_TILE;
    uint32_t warp = threadIdx.x / 32, g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
    uint8_t *mine = fifo + warp * (SHRINK_DEPTH * PIECE_BYTES);
    struct shrink_cursor c = {blockIdx.x, 0, NULL, NULL};
    shrink_open(a, v, c);
    struct shrink_cursor again = c;
    for (int i = 0; i < SHRINK_DEPTH; i++)
        shrink_issue<true, false>(a, v, c, mine + i * PIECE_BYTES);
    if (!*entered && !enter(a.w))
        return false;
    *entered = true;
    for (int i = 0; i < SHRINK_DEPTH; i++)
        shrink_issue<false, true>(a, v, again, mine + i * PIECE_BYTES);
    uint32_t slot = 0, buffer = 0;
    for (uint32_t task = blockIdx.x; task < v.tasks; task += gridDim.x) {
        float d[4] = {0, 0, 0, 0};
        for (uint32_t piece = warp; 2 * piece < a.chunks; piece += WARPS) {
            async_wait<SHRINK_DEPTH - 1>();
            piece_multiply(mine + slot * PIECE_BYTES, d);
            shrink_issue<true, true>(a, v, c, mine + slot * PIECE_BYTES);
            slot = slot + 1 == SHRINK_DEPTH ? 0 : slot + 1;
        }
        float *to = sums + buffer * TILE_SUMS;
        *(float2 *)(to + (warp * SHORT_TILE + g) * SHORT_TILE + 2 * t) = make_float2(d[0], d[1]);
        __syncthreads();
        struct short_task k = short_task_at(v, task);
        store_tile<SHORT_TILE, SHORT_TILE>(a, *k.segment, k.rank0, k.row0, to, stride);
        buffer ^= 1;
    }
    async_wait<0>();
    return true;
}

__device__ __forceinline__ void shrink_longs(const struct shrink_work &a, const struct survey &v,
                                             float *sums, uint32_t stride)
{
    for (uint32_t task = blockIdx.x; task < v.long_tasks; task += gridDim.x) {
        const struct segment &s = segment_of(v, &segment::first_long, task);
        uint32_t tiles = div_up32(ranks_of(s), LONG_TILE), in_segment = task - s.first_long;
        uint32_t rank0 = in_segment % tiles * LONG_TILE, row0 = in_segment / tiles * LONG_TILE;
        __syncthreads(); // the sums are free
        shrink_long(a, s, rank0, row0, sums);
        __syncthreads();
        store_tile<LONG_TILE, LONG_STRIDE>(a, s, rank0, row0, sums, stride);
    }
}

__device__ __forceinline__ void tasks_count(struct segment &s)
{
    bool is_short = s.rows <= SHORT_ROWS;
    uint32_t tile = is_short ? SHORT_TILE : LONG_TILE;
    *(is_short ? &s.first : &s.first_long) = div_up32(ranks_of(s), tile) * div_up32(s.rows, tile);
}

__global__ void __launch_bounds__(THREADS, 2)
    lora_shrink_kernel(const __grid_constant__ struct shrink_work a)
{
    extern __shared__ __align__(16) uint8_t fifo[];
    __shared__ struct survey v;
    __shared__ __align__(16) float sums[2 * WARPS * SHORT_TILE * SHORT_TILE];
    bool entered = !a.w.settled;
    if (entered && !enter(a.w))
        return;
    uint32_t segments = control_lora_segments(a.w.control);
    uint32_t stride = control_lora_rank(a.w.control);
    uint32_t rows = control_rows(a.w.control, a.w.slot);
    for (uint32_t base = 0; base < segments; base += SURVEY) {
        survey_make<false>(a.w, base, segments, rows, v, tasks_count);
        if (!shrink_short(a, v, fifo, sums, stride, &entered))
            return;
        shrink_longs(a, v, (float *)fifo, stride);
        __syncthreads();
    }
    if (!entered) // whoever waits for us relies on what we waited for
        (void)enter(a.w);
}

// ---- launcher ----

void cuda__lora_shrink(const struct cuda_launch *l, const struct lora_shrink_args *a,
                       uint32_t count)
{
    CHECK(count && count <= MODULES);
    struct shrink_work s = {};
    s.w = work_of(l, a->batch);
    s.w.count = count;
    s.x = (const uint8_t *)a->x;
    s.x_row_bytes = cuda__act_cols(a->d_in) * sizeof(bf16);
    s.chunks = (uint32_t)div_up(a->d_in * sizeof(bf16), CHUNK_BYTES);
    for (uint32_t i = 0; i < count; i++) {
        CHECK(a[i].x == a->x && a[i].d_in == a->d_in &&
              a[i].module < LORA_MODULES_ALL && a[i].module != LORA_EMBED);
        s.w.pair[i] = (uint32_t)lora_pair_row(a[i].layer, a[i].module);
        s.hidden[i] = a[i].hidden;
    }
    launch_kernel(l, lora_shrink_kernel, grid_of(l), dim3(THREADS), SHRINK_SHARED, s);
}

enum status cuda__lora_prepare(struct cuda_device *device)
{
    cudaFuncAttribute what = cudaFuncAttributeMaxDynamicSharedMemorySize;
    CUDA_TRY(device, cudaFuncSetAttribute(lora_shrink_kernel, what, SHRINK_SHARED));
    return cuda__lora_expand_prepare(device);
}
