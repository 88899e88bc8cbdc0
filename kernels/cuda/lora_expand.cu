// SPDX-License-Identifier: Apache-2.0
// LoRA expand (lora.cuh). A task is one warp's: 128 columns of a module x up to ROWS_EXPAND rows of
// a segment. A unit is four ranks of it: lanes 0..15 take the even ones, 8 columns (16 bytes of
// B^T) each, lanes 16..31 the odd ones. hidden stays fp32 (rounding it to bf16 would cost 2^-9), so
// these are fp32 FMAs on the CUDA cores, for every (row, column) the even ranks ascending, the odd
// ranks ascending, then both: the same bits alone or in a batch. They reach y as one reduction,
// which nobody waits for. Each warp walks the same share of all units, from column to column, so
// that going on costs little. The columns of two expands of a launch are disjoint. Where B^T is cut
// (lora.h) a block is a whole number of tasks, and its rows are found anew. FIFO: EXPAND_DEPTH
// units a warp (36 KiB).
//
// Tolerance: fp32 sums in another order than the CPU's.
#include "kernels/cuda/lora.cuh"

enum {
    LANE_COLUMNS = 8,
    TASK_COLUMNS = 16 * LANE_COLUMNS,
    ROWS_EXPAND = 8,
    UNIT_RANKS = 4,
    EXPAND_DEPTH = 4,
    UNIT_HIDDEN = 2 * 32 * 16, // where the unit's values of hidden stand: [UNIT_RANKS][ROWS_EXPAND]
    UNIT_BYTES = UNIT_HIDDEN + UNIT_RANKS * ROWS_EXPAND * 4,
    EXPAND_SHARED = WARPS * EXPAND_DEPTH * UNIT_BYTES,
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

__device__ __forceinline__ float bf16_low(uint32_t pair)
{
    return __uint_as_float(pair << 16);
}

__device__ __forceinline__ float bf16_high(uint32_t pair)
{
    return __uint_as_float(pair & 0xffff0000u);
}

// Where a warp stands: a task, and the unit of it.
struct expand_cursor {
    uint32_t segment, module, column, group; // column: block of TASK_COLUMNS
    uint32_t cut;                            // column at which the block of B^T begins
    uint32_t task_unit, unit;                // first unit of the task, unit within it
    uint32_t mine; // lane l: where the columns of rank l (of 32) begin in the arena, in 64 bytes
};

__device__ __forceinline__ uint32_t task_units(const struct segment &s, uint32_t module)
{
    return div_up32(s.slice[module].rank, UNIT_RANKS);
}

__device__ __forceinline__ uint32_t task_rows(const struct segment &s, uint32_t group)
{
    return min(s.rows - group * ROWS_EXPAND, ROWS_EXPAND);
}

// Bytes of a row of B^T before the cursor's columns.
__device__ __forceinline__ uint32_t bytes_before(const struct expand_cursor &c)
{
    return (c.column - c.cut) * (TASK_COLUMNS * 2);
}

// Finds the rows of B^T of the 32 ranks that the cursor's unit belongs to.
__device__ __forceinline__ void expand_rows_find(const struct expand_work &a,
                                                 const struct survey &v, struct expand_cursor &c)
{
    const struct segment &s = v.table[c.segment];
    const struct lora_slice &slice = s.slice[c.module];
    uint32_t rank = c.unit * UNIT_RANKS + threadIdx.x % 32;
    uint32_t block = c.column / div_up32(slice.row_bytes, TASK_COLUMNS * 2); // 0 but when cut
    c.cut = block * (slice.row_bytes / (TASK_COLUMNS * 2));
    c.mine = 0;
    if (rank < slice.rank)
        c.mine = (uint32_t)((lora_row(a.w.arena, a.w.page_bytes, s.pages, &slice,
                                      block * slice.rank + rank) -
                             a.w.arena) /
                            64) +
                 bytes_before(c) / 64;
}

// To a segment and module that have tasks, from `module` of the cursor's segment on.
__device__ __forceinline__ void expand_module_find(const struct expand_work &a,
                                                   const struct survey &v, struct expand_cursor &c)
{
    while (c.segment < SURVEY) {
        const struct segment &s = v.table[c.segment];
        while (c.module < MODULES && (!s.rows || !s.slice[c.module].rank || !a.w.columns[c.module]))
            c.module++;
        if (c.module < MODULES)
            return;
        c.module = 0;
        c.segment++;
    }
}

// To the next task.
__device__ __forceinline__ void expand_next(const struct expand_work &a, const struct survey &v,
                                            uint32_t end, struct expand_cursor &c)
{
    const struct segment &s = v.table[c.segment];
    c.task_unit += task_units(s, c.module);
    c.unit = 0;
    if (c.task_unit >= end)
        return;
    bool same_rows = s.slice[c.module].rank <= 32;
    if ((c.group + 1) * ROWS_EXPAND < s.rows) {
        c.group++;
    } else {
        c.group = 0;
        c.mine += TASK_COLUMNS * 2 / 64;
        if (++c.column == a.w.columns[c.module]) {
            c.column = 0;
            c.module++;
            expand_module_find(a, v, c);
            same_rows = false;
        } else if (bytes_before(c) >= s.slice[c.module].row_bytes) {
            same_rows = false; // the next block
        }
    }
    if (!same_rows)
        expand_rows_find(a, v, c);
}

// To the first task whose first unit is not before `begin`.
__device__ __forceinline__ struct expand_cursor
expand_begin(const struct expand_work &a, const struct survey &v, uint32_t begin, uint32_t end)
{
    struct expand_cursor c = {};
    c.segment = (uint32_t)(&segment_of(v, &segment::first, begin) - v.table);
    c.task_unit = v.table[c.segment].first;
    const struct segment &s = v.table[c.segment];
    uint32_t groups = div_up32(s.rows, ROWS_EXPAND);
    for (; c.module < MODULES; c.module++) {
        uint32_t units = task_units(s, c.module),
                 tasks = units ? a.w.columns[c.module] * groups : 0;
        uint32_t skip = units && begin > c.task_unit ? div_up32(begin - c.task_unit, units) : 0;
        if (skip < tasks) {
            c.column = skip / groups;
            c.group = skip % groups;
            c.task_unit += skip * units;
            break;
        }
        c.task_unit += tasks * units;
    }
    if (c.task_unit >= end)
        return c;
    expand_module_find(a, v, c);
    expand_rows_find(a, v, c);
    return c;
}

// Requests the cursor's unit, of B^T and, or, of hidden, and advances.
template <bool B, bool HIDDEN>
__device__ __forceinline__ void expand_issue(const struct expand_work &a, const struct survey &v,
                                             uint32_t end, struct expand_cursor &c, uint32_t stride,
                                             uint8_t *slot)
{
    if (c.task_unit < end) {
        const struct segment &s = v.table[c.segment];
        const struct lora_slice &slice = s.slice[c.module];
        uint32_t lane = threadIdx.x % 32, j = c.unit * UNIT_RANKS;
        if (B) {
            bool has = bytes_before(c) + lane % 16 * 16 < slice.row_bytes;
#pragma unroll
            for (int i = 0; i < 2; i++) {
                uint32_t rank = j + i * 2 + lane / 16;
                uint64_t at = __shfl_sync(0xffffffffu, c.mine, rank % 32) * 64ull + lane % 16 * 16;
                bool is_there = has && rank < slice.rank;
                async_load16(slot + (i * 32 + lane) * 16, a.w.arena + (is_there ? at : 0),
                             is_there ? 16 : 0);
            }
        }
        if (HIDDEN) {
            uint32_t r = c.group * ROWS_EXPAND + lane % ROWS_EXPAND, rank = j + lane / ROWS_EXPAND;
            bool is_there = r < s.rows && rank < slice.rank;
            uint64_t at = (uint64_t)(s.row + r) * stride + rank;
            async_load4(slot + UNIT_HIDDEN + lane * 4, a.hidden[c.module] + (is_there ? at : 0),
                        is_there ? 4 : 0);
        }
        if (++c.unit == task_units(s, c.module))
            expand_next(a, v, end, c);
        else if (c.unit * UNIT_RANKS % 32 == 0)
            expand_rows_find(a, v, c);
    }
    async_commit();
}

// sum[r] += this half's two ranks, for ROWS rows.
template <int ROWS>
__device__ __forceinline__ void unit_multiply(const uint8_t *slot,
                                              float sum[ROWS_EXPAND][LANE_COLUMNS])
{
    uint32_t lane = threadIdx.x % 32;
#pragma unroll
    for (int i = 0; i < 2; i++) {
        uint4 b = ((const uint4 *)slot)[i * 32 + lane];
        const float *h = (const float *)(slot + UNIT_HIDDEN) + (i * 2 + lane / 16) * ROWS_EXPAND;
        float w[LANE_COLUMNS] = {bf16_low(b.x), bf16_high(b.x), bf16_low(b.y), bf16_high(b.y),
                                 bf16_low(b.z), bf16_high(b.z), bf16_low(b.w), bf16_high(b.w)};
#pragma unroll
        for (int r = 0; r < ROWS; r++) {
            float value = h[r];
#pragma unroll
            for (int k = 0; k < LANE_COLUMNS; k++)
                sum[r][k] = fmaf(value, w[k], sum[r][k]);
        }
    }
}

// y += scale * (even ranks + odd ranks): each half of the warp adds four of a lane's columns.
template <int ROWS>
__device__ __forceinline__ void add_to_y(const struct expand_work &a, const struct segment &s,
                                         const struct expand_cursor &c,
                                         const float sum[ROWS_EXPAND][LANE_COLUMNS])
{
    uint32_t m = c.module, odd = threadIdx.x / 16 % 2, d_out = a.d_out[m];
    uint32_t rows = task_rows(s, c.group);
    uint32_t column = c.column * TASK_COLUMNS + threadIdx.x % 16 * LANE_COLUMNS + odd * 4;
    float scale = s.scale[m];
    uint64_t at = a.half[m] < 0 ? column : (uint64_t)(column / 8) * 16 + a.half[m] * 8 + column % 8;
    float *y = a.y[m] + (uint64_t)(s.row + c.group * ROWS_EXPAND) * a.y_stride[m] + at;
#pragma unroll
    for (int r = 0; r < ROWS; r++, y += a.y_stride[m]) {
        float v[4];
#pragma unroll
        for (int i = 0; i < 4; i++) {
            float own = odd ? sum[r][4 + i] : sum[r][i], other = odd ? sum[r][i] : sum[r][4 + i];
            v[i] = scale * (own + __shfl_xor_sync(0xffffffffu, other, 16));
        }
        if (r >= (int)rows)
            continue;
        if (a.vector[m] && column + 4 <= d_out) {
            asm volatile("red.global.add.v4.f32 [%0], {%1, %2, %3, %4};" ::"l"(y), "f"(v[0]),
                         "f"(v[1]), "f"(v[2]), "f"(v[3])
                         : "memory");
            continue;
        }
#pragma unroll
        for (int i = 0; i < 4; i++)
            if (column + i < d_out)
                atomicAdd(y + i, v[i]);
    }
}

// What a warp goes through.
struct expand_walk {
    uint32_t end, stride, slot;
    uint8_t *fifo; // of this warp
    struct expand_cursor ahead;
};

template <int ROWS>
__device__ __forceinline__ void expand_task(const struct expand_work &a, const struct survey &v,
                                            const struct expand_cursor &c, struct expand_walk &w)
{
    const struct segment &s = v.table[c.segment];
    float sum[ROWS_EXPAND][LANE_COLUMNS] = {};
    for (uint32_t u = task_units(s, c.module); u; u--) {
        uint8_t *slot = w.fifo + w.slot * UNIT_BYTES;
        async_wait<EXPAND_DEPTH - 1>();
        __syncwarp();
        unit_multiply<ROWS>(slot, sum);
        __syncwarp();
        expand_issue<true, true>(a, v, w.end, w.ahead, w.stride, slot);
        w.slot = w.slot + 1 == EXPAND_DEPTH ? 0 : w.slot + 1;
    }
    add_to_y<ROWS>(a, s, c, sum);
}

// The tasks of a survey; as shrink_short.
__device__ __forceinline__ bool expand_all(const struct expand_work &a, const struct survey &v,
                                           uint8_t *fifo, uint32_t stride, bool *entered)
{
    uint32_t warp = threadIdx.x / 32, warps = gridDim.x * WARPS;
    uint64_t nth = blockIdx.x * WARPS + warp;
    uint32_t begin = (uint32_t)(v.tasks * nth / warps);
    struct expand_walk w = {};
    w.end = (uint32_t)(v.tasks * (nth + 1) / warps);
    w.stride = stride;
    w.fifo = fifo + warp * (EXPAND_DEPTH * UNIT_BYTES);
    struct expand_cursor c = {};
    c.task_unit = w.end;
    if (begin < w.end)
        c = expand_begin(a, v, begin, w.end);
    struct expand_cursor again = c;
    w.ahead = c;
    for (int i = 0; i < EXPAND_DEPTH; i++)
        expand_issue<true, false>(a, v, w.end, w.ahead, stride, w.fifo + i * UNIT_BYTES);
    if (!*entered && !enter(a.w))
        return false;
    *entered = true;
    for (int i = 0; i < EXPAND_DEPTH; i++)
        expand_issue<false, true>(a, v, w.end, again, stride, w.fifo + i * UNIT_BYTES);
    for (; c.task_unit < w.end; expand_next(a, v, w.end, c)) {
        uint32_t rows = task_rows(v.table[c.segment], c.group);
        if (rows == 1)
            expand_task<1>(a, v, c, w);
        else if (rows <= 4)
            expand_task<4>(a, v, c, w);
        else
            expand_task<ROWS_EXPAND>(a, v, c, w);
    }
    async_wait<0>();
    return true;
}

__global__ void __launch_bounds__(THREADS, 2)
    lora_expand_kernel(const __grid_constant__ struct expand_work a)
{
    extern __shared__ __align__(16) uint8_t fifo[];
    __shared__ struct survey v;
    bool entered = !a.w.settled;
    if (entered && !enter(a.w))
        return;
    uint32_t segments = control_lora_segments(a.w.control);
    uint32_t stride = control_lora_rank(a.w.control);
    uint32_t rows = control_rows(a.w.control, a.w.slot);
    for (uint32_t base = 0; base < segments; base += SURVEY) {
        survey_make<true>(a.w, base, segments, rows, v, [&](struct segment &s) {
            for (int m = 0; m < MODULES; m++)
                s.first += task_units(s, m) * a.w.columns[m];
            s.first *= div_up32(s.rows, ROWS_EXPAND);
        });
        if (!expand_all(a, v, fifo, stride, &entered))
            return;
        __syncthreads();
    }
    if (!entered) // whoever waits for us relies on what we waited for
        (void)enter(a.w);
}

// ---- launcher ----

void cuda__lora_expand(const struct cuda_launch *l, const struct lora_expand_args *a,
                       uint32_t count)
{
    CHECK(count && count <= MODULES);
    struct expand_work e = {};
    e.w = work_of(l, a->batch);
    e.w.count = count;
    for (uint32_t i = 0; i < count; i++) {
        CHECK(a[i].module < LORA_MODULES_ALL && a[i].interleave_half <= 1);
        e.w.pair[i] = (uint32_t)lora_pair_row(a[i].layer, a[i].module);
        e.w.columns[i] = (uint32_t)div_up(a[i].d_out, TASK_COLUMNS);
        e.hidden[i] = a[i].hidden;
        e.y[i] = a[i].y;
        e.y_stride[i] = a[i].y_stride;
        e.d_out[i] = a[i].d_out;
        e.half[i] = a[i].interleave_half;
        e.vector[i] = (uintptr_t)a[i].y % 16 == 0 && a[i].y_stride % 4 == 0;
    }
    launch_kernel(l, lora_expand_kernel, grid_of(l), dim3(THREADS), EXPAND_SHARED, e);
}

enum status cuda__lora_expand_prepare(struct cuda_device *device)
{
    cudaFuncAttribute what = cudaFuncAttributeMaxDynamicSharedMemorySize;
    CUDA_TRY(device, cudaFuncSetAttribute(lora_expand_kernel, what, EXPAND_SHARED));
    return STATUS_OK;
}
