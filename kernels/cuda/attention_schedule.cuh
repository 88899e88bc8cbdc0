// SPDX-License-Identifier: Apache-2.0
// The schedule of the decode kernel: which (row, lane, segment) a CTA computes next. It is a
// function of the positions alone and is found by every CTA for itself, because a step may be
// entered at any half-layer: nothing of an earlier launch is relied on.
//
// lane: a KV head and one pass of at most 8 of its query heads. unit: a (row, segment).
//
// By segments, when the decode rows are few (LIST_MAX) and their partial results fit: a list of the
// rows with the prefix sum of their segments stands in shared memory; task t is unit t / lanes,
// lane t % lanes, and CTA c takes tasks c, c + grid, ...: all tasks are one segment, so that a
// skewed batch is balanced to within one segment. Neighbouring CTAs read neighbouring KV heads of
// the same blocks. The last CTA to finish a (row, lane) merges its segments (attention.cu).
//
// By rows, otherwise: task t is row t / lanes, lane t % lanes; the CTA walks the segments of the
// row and merges them as it goes, with the same arithmetic in the same order: the same bits.
//
// Shared memory: 8 KiB for the list, 4 bytes per 32 rows for the bits of runs.
#pragma once

#include "kernels/cuda/attention.cuh"

enum {
    DECODE_WARPS = 4,
    DECODE_THREADS = DECODE_WARPS * 32,
    LIST_MAX = 512,
    COUNTERS = 1 << 18,
};

struct list_entry {
    uint32_t start; // units of the rows before
    uint32_t row, sequence, position;
};

struct schedule {
    list_entry list[LIST_MAX];
    uint32_t warp_rows[DECODE_WARPS], warp_units[DECODE_WARPS];
};

// Uniform over the CTA.
struct schedule_view {
    uint32_t rows, count, units;
    bool by_rows;
};

struct task {
    uint32_t at;                // task number; the walk continues from it
    uint32_t row, lane;         //
    uint32_t segment, segments; // of the row
    uint32_t tokens;            // of this segment, 1..KV_SEGMENT; 0: there is no task
    uint32_t sequence;
    uint32_t entry; // by segments: index in the list
};

static __device__ __forceinline__ uint32_t segments_of(uint32_t position)
{
    return position / KV_SEGMENT + 1;
}

// continues bits of all rows; mask has rows / 32 + 2 words. Ends without a barrier.
static __device__ void schedule_mask(const struct attention_args &a, uint32_t rows, uint32_t *mask)
{
    for (uint32_t base = 0; base < rows + 64; base += DECODE_THREADS) {
        uint32_t row = base + threadIdx.x;
        uint32_t bits = __ballot_sync(0xffffffffu, continues_row(a, row, rows));
        if (threadIdx.x % 32 == 0 && row / 32 < rows / 32 + 2)
            mask[row / 32] = bits;
    }
}

static __device__ __forceinline__ bool decode_row(const struct attention_plan &plan,
                                                  const uint32_t *mask, uint32_t row)
{
    uint32_t word = row / 32;
    return !plan.runs || !in_run(word ? mask[word - 1] : 0, mask[word], mask[word + 1], row);
}

// Sums of (rows, units) of the threads before this one; *rows and *units become those of the CTA.
static __device__ __forceinline__ void schedule_scan(schedule *s, uint32_t *rows, uint32_t *units,
                                                     uint32_t *rows_before, uint32_t *units_before)
{
    uint32_t lane = threadIdx.x % 32, warp = threadIdx.x / 32, r = *rows, u = *units;
#pragma unroll
    for (int i = 1; i < 32; i *= 2) {
        uint32_t r_left = __shfl_up_sync(0xffffffffu, r, i);
        uint32_t u_left = __shfl_up_sync(0xffffffffu, u, i);
        r += lane >= i ? r_left : 0;
        u += lane >= i ? u_left : 0;
    }
    if (lane == 31) {
        s->warp_rows[warp] = r;
        s->warp_units[warp] = u;
    }
    __syncthreads();
    *rows_before = r - *rows;
    *units_before = u - *units;
    *rows = *units = 0;
#pragma unroll
    for (uint32_t w = 0; w < DECODE_WARPS; w++) {
        *rows_before += w < warp ? s->warp_rows[w] : 0;
        *units_before += w < warp ? s->warp_units[w] : 0;
        *rows += s->warp_rows[w];
        *units += s->warp_units[w];
    }
}

// All threads. Ends with a barrier.
static __device__ void schedule_make(schedule *s, uint32_t *mask, const struct attention_args &a,
                                     const struct attention_plan &plan, uint32_t rows,
                                     schedule_view *view)
{
    if (plan.runs) {
        schedule_mask(a, rows, mask);
        __syncthreads();
    }
    uint32_t strip = (rows + DECODE_THREADS - 1) / DECODE_THREADS, first = threadIdx.x * strip;
    uint32_t last = first + strip < rows ? first + strip : rows;
    uint32_t count = 0, units = 0, at, start;
    for (uint32_t row = first; row < last; row++)
        if (decode_row(plan, mask, row)) {
            count++;
            units += segments_of(a.position[row]);
        }
    schedule_scan(s, &count, &units, &at, &start);
    uint64_t floats = (uint64_t)units * a.heads * (a.kv.shape.head_dim + 2);
    view->rows = rows;
    view->count = count;
    view->units = units;
    view->by_rows =
        count > LIST_MAX || floats > plan.partial_floats || (uint64_t)count * plan.lanes > COUNTERS;
    if (!view->by_rows)
        for (uint32_t row = first; row < last; row++)
            if (decode_row(plan, mask, row)) {
                uint32_t position = a.position[row];
                s->list[at++] = {start, row, a.sequence[row], position};
                start += segments_of(position);
            }
    __syncthreads();
}

static __device__ __forceinline__ uint32_t segment_tokens(uint32_t position, uint32_t segment)
{
    uint32_t seen = position + 1 - segment * KV_SEGMENT;
    return seen < KV_SEGMENT ? seen : KV_SEGMENT;
}

static __device__ __forceinline__ void task_by_segment(const schedule *s, const schedule_view &view,
                                                       const struct attention_plan &plan,
                                                       uint32_t at, task *t)
{
    uint32_t unit = at / plan.lanes;
    t->at = at;
    t->tokens = 0;
    if (unit >= view.units)
        return;
    uint32_t low = 0, high = view.count; // list[low].start <= unit < list[high].start
    while (high - low > 1) {
        uint32_t middle = (low + high) / 2;
        if (s->list[middle].start <= unit)
            low = middle;
        else
            high = middle;
    }
    list_entry e = s->list[low];
    t->entry = low;
    t->row = e.row;
    t->sequence = e.sequence;
    t->lane = at - unit * plan.lanes;
    t->segment = unit - e.start;
    t->segments = segments_of(e.position);
    t->tokens = segment_tokens(e.position, t->segment);
}

// The first task at `at` or behind it.
static __device__ __forceinline__ void task_by_row(const uint32_t *mask, const schedule_view &view,
                                                   const struct attention_args &a,
                                                   const struct attention_plan &plan, uint32_t at,
                                                   task *t)
{
    uint32_t row = at / plan.lanes;
    while (row < view.rows && !decode_row(plan, mask, row)) {
        at += gridDim.x;
        row = at / plan.lanes;
    }
    t->at = at;
    t->tokens = 0;
    if (row >= view.rows)
        return;
    t->entry = 0;
    t->row = row;
    t->sequence = a.sequence[row];
    t->lane = at - row * plan.lanes;
    t->segment = 0;
    t->segments = segments_of(a.position[row]);
    t->tokens = segment_tokens(a.position[row], 0);
}

static __device__ __forceinline__ task task_first(const schedule *s, const uint32_t *mask,
                                                  const schedule_view &view,
                                                  const struct attention_args &a,
                                                  const struct attention_plan &plan)
{
    task t = {};
    if (view.by_rows)
        task_by_row(mask, view, a, plan, blockIdx.x, &t);
    else
        task_by_segment(s, view, plan, blockIdx.x, &t);
    return t;
}

static __device__ __forceinline__ task task_next(const schedule *s, const uint32_t *mask,
                                                 const schedule_view &view,
                                                 const struct attention_args &a,
                                                 const struct attention_plan &plan, task t)
{
    if (!t.tokens)
        return t;
    if (!view.by_rows)
        task_by_segment(s, view, plan, t.at + gridDim.x, &t);
    else if (t.segment + 1 < t.segments) {
        t.segment++;
        t.tokens = segment_tokens(a.position[t.row], t.segment);
    } else
        task_by_row(mask, view, a, plan, t.at + gridDim.x, &t);
    return t;
}
