// SPDX-License-Identifier: Apache-2.0
// LoRA at true rank, up to three modules of one layer in a launch:
//
//   shrink  hidden[row][j] = sum_k A[j][k] x[row][k]          A: rank rows of d_in, bf16, in pages
//   expand  y[row][c] += scale * sum_j hidden[row][j] Bt[j][c]  Bt: rank rows of d_out, bf16, ditto
//
// x is act [rows][round_up(d_in, 64)] bf16, hidden fp32 [rows][lora_rank], y fp32. Rows of a slice
// are padded with zeros to 64 bytes; nothing behind the padding is read, nor a row >= rows.
//
// Both kernels are persistent, two CTAs of 8 warps per multiprocessor, so that the grid is the same
// for every step. Each CTA first surveys up to SURVEY segments at once (thread i looks at segment
// i: adapter, view, pairs), scans their numbers of tasks and then walks its share. A base segment
// or an absent module has no tasks.
//
// Shrink. The ranks of the modules of a segment stand one behind another ("virtual" ranks), since
// all read the same x. A task is 8 virtual ranks x 8 rows (segments of up to SHORT_ROWS rows) or 32
// x 32. One arithmetic for both: mma.m16n8k16 with x rows as M and ranks as N. Lane (g, t) = (lane
// / 4, lane % 4) loads 16 bytes of row g at column 8 t of a chunk of 32 columns, of A and of x
// alike, and feeds them to two mma: both sides permute k in the same way, so the products match.
// Warp w takes the pieces of 64 columns w, w + 8, ..., ascending; the 8 sums are added in order of
// warp. So a bit of hidden depends on its row, its rank and d_in alone; this one kernel serves
// --batch-invariant.
//
// Expand. A task is one warp's: 128 columns (4 a lane: 8 bytes of a row of B^T) of a module x up to
// ROWS_EXPAND rows of a segment. hidden stays fp32 (rounding it to bf16 would cost 2^-9), so these
// are fp32 FMAs on the CUDA cores, j ascending from zero for every (row, column), whatever the
// number of rows: the same bits alone or in a batch. Consecutive tasks go to different CTAs, so a
// single adapter fills the machine. The columns of two expands of a launch are disjoint.
//
// Shared memory: shrink 47 KiB (survey 11, sums of the 8 warps 36), expand 15 KiB (survey 11, a
// 8 x 16 block of hidden per warp). Bound at decode by the bytes of the distinct adapters' slices;
// each warp keeps 4 KiB (expand: 8) of them in flight before the first is used. Tolerance: fp32
// sums in another order than the CPU's.
#include "kernels/cuda/common.cuh"

enum {
    MODULES = 3, // of one launch
    WARPS = 8,
    THREADS = 32 * WARPS,
    CTAS = 2, // per multiprocessor
    SURVEY = 128,
    LORA_BASE = 0xffffffff,
    // shrink
    CHUNK_BYTES = 64, // 32 columns: two mma
    SHORT_ROWS = 32,
    SHORT_TILE = 8,
    LONG_TILE = 32,
    LONG_STRIDE = LONG_TILE + 4, // floats: fewer bank conflicts
    BATCH = 4,                   // pieces of 64 columns whose loads are issued together
    // expand
    LANE_COLUMNS = 4,
    TASK_COLUMNS = 32 * LANE_COLUMNS,
    ROWS_EXPAND = 8,
    HIDDEN_BLOCK = 32, // ranks
};

// What both kernels know of a launch.
struct lora_work {
    const struct cuda_control *control;
    const uint8_t *arena;
    uint64_t page_bytes;
    const uint32_t *row_begin, *adapter;
    const struct lora_adapter_view *adapters;
    uint32_t slot, count;
    uint32_t pair[MODULES];    // layer * LORA_MODULES + module
    uint32_t columns[MODULES]; // expand: tasks over the columns
};

struct shrink_work {
    struct lora_work w;
    const uint8_t *x;
    uint64_t x_row_bytes;
    uint32_t chunks; // of 32 columns in a row of A
    float *hidden[MODULES];
};

struct expand_work {
    struct lora_work w;
    const float *hidden[MODULES];
    float *y[MODULES];
    uint64_t y_stride[MODULES];
    uint32_t d_out[MODULES];
    int half[MODULES];
    bool vector[MODULES]; // four columns of y are 16 aligned bytes
};

// A segment as the survey found it.
struct segment {
    const uint32_t *pages;
    uint32_t row, rows;
    uint32_t first; // task of the survey
    struct lora_slice slice[MODULES];
    float scale[MODULES];
};

__device__ __forceinline__ uint32_t div_up32(uint32_t a, uint32_t b)
{
    return (a + b - 1) / b;
}

__device__ __forceinline__ uint32_t ranks_of(const struct segment &s)
{
    return s.slice[0].rank + s.slice[1].rank + s.slice[2].rank;
}

// ---- the survey ----

template <bool EXPAND>
__device__ __forceinline__ void look(const struct lora_work &w, uint32_t index, uint32_t segments,
                                     uint32_t rows, struct segment &s)
{
    s.row = s.rows = 0;
    for (int m = 0; m < MODULES; m++)
        s.slice[m].rank = 0;
    if (index >= segments)
        return;
    uint32_t adapter = w.adapter[index], begin = w.row_begin[index];
    uint32_t end = min(w.row_begin[index + 1], rows);
    if (adapter == LORA_BASE || begin >= end)
        return;
    const struct lora_adapter_view view = w.adapters[adapter];
    s.pages = view.pages;
    s.row = begin;
    s.rows = end - begin;
#pragma unroll
    for (int m = 0; m < MODULES; m++) {
        if (m >= (int)w.count)
            continue;
        const struct lora_pair *pair = view.pairs + (uint64_t)w.pair[m] * view.experts;
        s.slice[m] = EXPAND ? pair->b : pair->a;
        s.scale[m] = pair->scale;
    }
}

template <bool EXPAND>
__device__ __forceinline__ uint32_t tasks_of(const struct lora_work &w, const struct segment &s)
{
    if (!EXPAND) {
        uint32_t tile = s.rows <= SHORT_ROWS ? SHORT_TILE : LONG_TILE;
        return div_up32(ranks_of(s), tile) * div_up32(s.rows, tile);
    }
    uint32_t columns = 0;
    for (int m = 0; m < MODULES; m++)
        columns += s.slice[m].rank ? w.columns[m] : 0;
    return columns * div_up32(s.rows, ROWS_EXPAND);
}

// Fills `table` with segments [base, base + SURVEY); their tasks in all. All threads.
template <bool EXPAND>
__device__ uint32_t survey(const struct lora_work &w, uint32_t base, uint32_t segments,
                           uint32_t rows, struct segment *table, uint32_t *total)
{
    uint32_t i = threadIdx.x;
    __syncthreads(); // the tasks of the survey before are done
    if (i < SURVEY) {
        look<EXPAND>(w, base + i, segments, rows, table[i]);
        table[i].first = tasks_of<EXPAND>(w, table[i]);
    }
    __syncthreads();
    if (i < 32) { // four segments a lane
        uint32_t count[SURVEY / 32], sum = 0;
        for (int j = 0; j < SURVEY / 32; j++)
            sum += count[j] = table[i * (SURVEY / 32) + j].first;
        uint32_t end = sum;
        for (uint32_t step = 1; step < 32; step *= 2) {
            uint32_t below = __shfl_up_sync(0xffffffffu, end, step);
            end += i >= step ? below : 0;
        }
        uint32_t first = end - sum;
        for (int j = 0; j < SURVEY / 32; j++) {
            table[i * (SURVEY / 32) + j].first = first;
            first += count[j];
        }
        if (i == 31)
            *total = end;
    }
    __syncthreads();
    return *total;
}

// The segment of a task: the last one whose first task is not behind it. (Segments without tasks
// have the same first as the one that follows them.)
__device__ __forceinline__ uint32_t segment_of(const struct segment *table, uint32_t task)
{
    uint32_t low = 0, high = SURVEY;
    while (high - low > 1) {
        uint32_t middle = (low + high) / 2;
        if (table[middle].first <= task)
            low = middle;
        else
            high = middle;
    }
    return low;
}

// ---- shrink ----

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

// Chunks 2 (piece + u WARPS) + h of this lane's row of A.
__device__ __forceinline__ void load_batch(uint4 to[2 * BATCH], const uint8_t *row, uint32_t piece,
                                           uint32_t chunks, uint32_t t)
{
#pragma unroll
    for (int i = 0; i < 2 * BATCH; i++) {
        uint32_t chunk = 2 * (piece + i / 2 * WARPS) + i % 2;
        to[i] = make_uint4(0, 0, 0, 0);
        if (row && chunk < chunks)
            to[i] = load_once(row + chunk * CHUNK_BYTES + t * 16);
    }
}

// 8 ranks x 8 rows; sums[warp][8 rows][8 ranks].
__device__ __forceinline__ void shrink_short(const struct shrink_work &a, const struct segment &s,
                                             uint32_t rank0, uint32_t row0, float *sums)
{
    uint32_t warp = threadIdx.x / 32, g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
    const uint8_t *from = rank_row(a.w, s, rank0 + g), *x = x_row(a, s, row0 + g);
    float d[4] = {0, 0, 0, 0};
    uint4 now[2 * BATCH], next[2 * BATCH], v[2 * BATCH];
    load_batch(now, from, warp, a.chunks, t);
    for (uint32_t piece = warp; 2 * piece < a.chunks; piece += BATCH * WARPS) {
#pragma unroll
        for (int i = 0; i < 2 * BATCH; i++) {
            uint32_t chunk = 2 * (piece + i / 2 * WARPS) + i % 2;
            v[i] = load_x(chunk < a.chunks ? x : NULL, chunk * CHUNK_BYTES + t * 16);
        }
        load_batch(next, from, piece + BATCH * WARPS, a.chunks, t);
#pragma unroll
        for (int i = 0; i < 2 * BATCH; i++) {
            uint32_t low[4] = {v[i].x, 0, v[i].y, 0}, high[4] = {v[i].z, 0, v[i].w, 0};
            mma_16816(d, low, now[i].x, now[i].y);
            mma_16816(d, high, now[i].z, now[i].w);
            now[i] = next[i];
        }
    }
    *(float2 *)(sums + (warp * SHORT_TILE + g) * SHORT_TILE + 2 * t) = make_float2(d[0], d[1]);
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

__device__ void shrink_task(const struct shrink_work &a, const struct segment &s, uint32_t task,
                            float *sums, uint32_t stride)
{
    bool is_short = s.rows <= SHORT_ROWS;
    uint32_t tile = is_short ? SHORT_TILE : LONG_TILE;
    uint32_t tiles = div_up32(ranks_of(s), tile);
    uint32_t rank0 = task % tiles * tile, row0 = task / tiles * tile;
    if (is_short)
        shrink_short(a, s, rank0, row0, sums);
    else
        shrink_long(a, s, rank0, row0, sums);
    __syncthreads();
    if (is_short)
        store_tile<SHORT_TILE, SHORT_TILE>(a, s, rank0, row0, sums, stride);
    else
        store_tile<LONG_TILE, LONG_STRIDE>(a, s, rank0, row0, sums, stride);
    __syncthreads();
}

__global__ void __launch_bounds__(THREADS, CTAS)
    lora_shrink_kernel(const __grid_constant__ struct shrink_work a)
{
    __shared__ struct segment table[SURVEY];
    __shared__ __align__(16) float sums[WARPS * LONG_TILE * LONG_STRIDE];
    __shared__ uint32_t total;
    uint32_t rows, done = 0, task = blockIdx.x;
    if (!segment_enter(a.w.control, a.w.slot, &rows))
        return;
    uint32_t segments = control_lora_segments(a.w.control);
    uint32_t stride = control_lora_rank(a.w.control);
    for (uint32_t base = 0; base < segments; base += SURVEY) {
        uint32_t end = done + survey<false>(a.w, base, segments, rows, table, &total);
        for (; task < end; task += gridDim.x) {
            const struct segment &s = table[segment_of(table, task - done)];
            shrink_task(a, s, task - done - s.first, sums, stride);
        }
        done = end;
    }
}

// ---- expand ----

// 8 bytes that are read once.
__device__ __forceinline__ uint2 load_once8(const void *p)
{
    uint2 v;
    asm volatile("ld.global.nc.L1::no_allocate.L2::256B.v2.u32 {%0, %1}, [%2];"
                 : "=r"(v.x), "=r"(v.y)
                 : "l"(p));
    return v;
}

__device__ __forceinline__ float bf16_low(uint32_t pair)
{
    return __uint_as_float(pair << 16);
}

__device__ __forceinline__ float bf16_high(uint32_t pair)
{
    return __uint_as_float(pair & 0xffff0000u);
}

// One warp's task.
struct expand_task {
    const struct segment *segment;
    uint32_t module, row, rows; // rows [row, row + rows) of the step
    uint32_t column;            // this lane's first
};

template <int ROWS>
__device__ __forceinline__ void add_to_y(const struct expand_work &a, const struct expand_task &k,
                                         const float sum[ROWS][LANE_COLUMNS])
{
    uint32_t m = k.module, column = k.column, d_out = a.d_out[m];
    if (column >= d_out)
        return;
    float scale = k.segment->scale[m];
    uint64_t at = a.half[m] < 0 ? column : (uint64_t)(column / 8) * 16 + a.half[m] * 8 + column % 8;
#pragma unroll
    for (int r = 0; r < ROWS; r++) {
        if (r >= (int)k.rows)
            continue;
        float *y = a.y[m] + (uint64_t)(k.row + r) * a.y_stride[m] + at;
        if (a.vector[m] && column + LANE_COLUMNS <= d_out) {
            float4 v = *(float4 *)y;
            // + 0: a sum of nothing but zeros has one sign, however many rows were padded
            v.x = fmaf(scale, sum[r][0] + 0.0f, v.x);
            v.y = fmaf(scale, sum[r][1] + 0.0f, v.y);
            v.z = fmaf(scale, sum[r][2] + 0.0f, v.z);
            v.w = fmaf(scale, sum[r][3] + 0.0f, v.w);
            *(float4 *)y = v;
            continue;
        }
#pragma unroll
        for (int c = 0; c < LANE_COLUMNS; c++)
            if (column + c < d_out)
                y[c] = fmaf(scale, sum[r][c] + 0.0f, y[c]);
    }
}

// hidden[rows][block] of this warp's rows from rank j0 on, zeros where there is none.
template <int ROWS, int BLOCK>
__device__ __forceinline__ void stage_hidden(const struct expand_work &a,
                                             const struct expand_task &k, uint32_t j0,
                                             uint32_t rank, uint32_t stride, float *staged)
{
    uint32_t lane = threadIdx.x % 32;
    const float *hidden = a.hidden[k.module] + (uint64_t)k.row * stride + j0;
#pragma unroll
    for (int i = 0; i < ROWS * BLOCK / 32; i++) {
        uint32_t at = i * 32 + lane, row = at / BLOCK, j = at % BLOCK;
        bool is_there = row < k.rows && j0 + j < rank;
        staged[at] = is_there ? hidden[(uint64_t)row * stride + j] : 0.0f;
    }
    __syncwarp();
}

// BLOCK ranks at a time; `staged`: [ROWS][BLOCK] of this warp.
template <int ROWS, int BLOCK>
__device__ __forceinline__ void expand_rows(const struct expand_work &a,
                                            const struct expand_task &k, uint32_t stride,
                                            float *staged)
{
    const struct segment &s = *k.segment;
    const struct lora_slice &slice = s.slice[k.module];
    uint32_t lane = threadIdx.x % 32, rank = slice.rank;
    bool has_columns = k.column * 2 < slice.row_bytes;
    float sum[ROWS][LANE_COLUMNS] = {};
    uint64_t mine = 0;
    for (uint32_t j0 = 0; j0 < rank; j0 += BLOCK) {
        if (j0 % 32 == 0) // lane i finds row j0 + i
            mine = j0 + lane < rank
                       ? (uint64_t)lora_row(a.w.arena, a.w.page_bytes, s.pages, &slice, j0 + lane)
                       : 0;
        uint2 b[BLOCK];
#pragma unroll
        for (int i = 0; i < BLOCK; i++) {
            uint64_t row = __shfl_sync(0xffffffffu, mine, j0 % 32 + i);
            b[i] = make_uint2(0, 0);
            if (row && has_columns)
                b[i] = load_once8((const uint8_t *)row + k.column * 2);
        }
        stage_hidden<ROWS, BLOCK>(a, k, j0, rank, stride, staged);
#pragma unroll
        for (int i = 0; i < BLOCK; i += 4)
#pragma unroll
            for (int r = 0; r < ROWS; r++) {
                const float4 h4 = *(const float4 *)(staged + r * BLOCK + i);
                const float h[4] = {h4.x, h4.y, h4.z, h4.w};
#pragma unroll
                for (int j = 0; j < 4; j++) {
                    sum[r][0] = fmaf(h[j], bf16_low(b[i + j].x), sum[r][0]);
                    sum[r][1] = fmaf(h[j], bf16_high(b[i + j].x), sum[r][1]);
                    sum[r][2] = fmaf(h[j], bf16_low(b[i + j].y), sum[r][2]);
                    sum[r][3] = fmaf(h[j], bf16_high(b[i + j].y), sum[r][3]);
                }
            }
        __syncwarp();
    }
    add_to_y<ROWS>(a, k, sum);
}

__device__ void expand_one(const struct expand_work &a, const struct segment &s, uint32_t task,
                           uint32_t stride, float *staged)
{
    uint32_t groups = div_up32(s.rows, ROWS_EXPAND), columns = task / groups, m = 0;
    for (; m < MODULES - 1; m++) {
        uint32_t here = s.slice[m].rank ? a.w.columns[m] : 0;
        if (columns < here)
            break;
        columns -= here;
    }
    uint32_t first = task % groups * ROWS_EXPAND;
    struct expand_task k = {.segment = &s,
                            .module = m,
                            .row = s.row + first,
                            .rows = min(s.rows - first, ROWS_EXPAND),
                            .column = columns * TASK_COLUMNS + threadIdx.x % 32 * LANE_COLUMNS};
    if (k.rows == 1)
        expand_rows<1, HIDDEN_BLOCK>(a, k, stride, staged);
    else if (k.rows <= 2)
        expand_rows<2, HIDDEN_BLOCK / 2>(a, k, stride, staged);
    else
        expand_rows<ROWS_EXPAND, HIDDEN_BLOCK / 2>(a, k, stride, staged);
}

__global__ void __launch_bounds__(THREADS, CTAS)
    lora_expand_kernel(const __grid_constant__ struct expand_work a)
{
    __shared__ struct segment table[SURVEY];
    __shared__ __align__(16) float hidden[WARPS][ROWS_EXPAND * HIDDEN_BLOCK / 2];
    __shared__ uint32_t total;
    uint32_t rows, done = 0, warp = threadIdx.x / 32, task = blockIdx.x + gridDim.x * warp;
    if (!segment_enter(a.w.control, a.w.slot, &rows))
        return;
    uint32_t segments = control_lora_segments(a.w.control);
    uint32_t stride = control_lora_rank(a.w.control);
    for (uint32_t base = 0; base < segments; base += SURVEY) {
        uint32_t end = done + survey<true>(a.w, base, segments, rows, table, &total);
        for (; task < end; task += gridDim.x * WARPS) {
            const struct segment &s = table[segment_of(table, task - done)];
            expand_one(a, s, task - done - s.first, stride, hidden[warp]);
        }
        done = end;
    }
}

// ---- launchers ----

static struct lora_work work_of(const struct cuda_launch *l, const struct lora_batch *b)
{
    struct lora_work w = {};
    w.control = l->control;
    w.arena = b->arena;
    w.page_bytes = b->page_bytes;
    w.row_begin = b->row_begin;
    w.adapter = b->adapter;
    w.adapters = b->adapters;
    w.slot = l->slot;
    return w;
}

static dim3 grid_of(const struct cuda_launch *l)
{
    return dim3((unsigned)(l->device->multiprocessors * CTAS));
}

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
        CHECK(a[i].x == a->x && a[i].d_in == a->d_in && a[i].module < LORA_MODULES);
        s.w.pair[i] = a[i].layer * LORA_MODULES + a[i].module;
        s.hidden[i] = a[i].hidden;
    }
    launch_kernel(l, lora_shrink_kernel, grid_of(l), dim3(THREADS), 0, s);
}

void cuda__lora_expand(const struct cuda_launch *l, const struct lora_expand_args *a,
                       uint32_t count)
{
    CHECK(count && count <= MODULES);
    struct expand_work e = {};
    e.w = work_of(l, a->batch);
    e.w.count = count;
    for (uint32_t i = 0; i < count; i++) {
        CHECK(a[i].module < LORA_MODULES && a[i].interleave_half <= 1);
        e.w.pair[i] = a[i].layer * LORA_MODULES + a[i].module;
        e.w.columns[i] = (uint32_t)div_up(a[i].d_out, TASK_COLUMNS);
        e.hidden[i] = a[i].hidden;
        e.y[i] = a[i].y;
        e.y_stride[i] = a[i].y_stride;
        e.d_out[i] = a[i].d_out;
        e.half[i] = a[i].interleave_half;
        e.vector[i] = (uintptr_t)a[i].y % 16 == 0 && a[i].y_stride % 4 == 0;
    }
    launch_kernel(l, lora_expand_kernel, grid_of(l), dim3(THREADS), 0, e);
}

enum status cuda__lora_prepare(struct cuda_device *device)
{
    // Two CTAs of shrink need 95 KiB; the rest of the 256 KiB stays L1.
    CUDA_TRY(device, cudaFuncSetAttribute(lora_shrink_kernel,
                                          cudaFuncAttributePreferredSharedMemoryCarveout, 50));
    return STATUS_OK;
}
