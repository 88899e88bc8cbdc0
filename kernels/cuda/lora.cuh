// SPDX-License-Identifier: Apache-2.0
// LoRA at true rank, up to three modules of one layer in a launch:
//
//   shrink  hidden[row][j] = sum_k A[j][k] x[row][k]          A: rank rows of d_in, bf16, in pages
//   expand  y[row][c] += scale * sum_j hidden[row][j] Bt[j][c]  Bt: rank rows of d_out, bf16, ditto
//
// x is act [rows][round_up(d_in, 64)] bf16, hidden fp32 [rows][lora_rank], y fp32. Rows of a slice
// are padded with zeros to 64 bytes; nothing behind the padding is read, nor a row >= rows.
//
// Both kernels are persistent, one CTA of 8 warps per multiprocessor. Each CTA first surveys up to
// SURVEY segments at once (thread i looks at segment i: adapter, view, pairs), scans their numbers
// of tasks and then walks its share. A base segment or an absent module has no tasks.
//
// Bound at decode by the bytes of the distinct adapters' slices, and by what stands around them: 8
// launches a layer. So weights pass through a FIFO in shared memory that each lane fills with
// 16-byte cp.async for itself alone (no barrier), across tasks; and when the launch is settled
// (cuda.h) the survey is made and the FIFO filled with weights while the kernel before still runs.
// Shrink stands behind the dense product, which lets nothing begin beside it when it is cuBLAS;
// expand stands behind shrink, and the two fit into a multiprocessor together.
#pragma once

#include "kernels/cuda/common.cuh"

enum {
    MODULES = 3, // of one launch
    WARPS = 8,
    THREADS = 32 * WARPS,
    SURVEY = 128,
    LORA_BASE = 0xffffffff,
};

// What both kernels know of a launch.
struct lora_work {
    const struct cuda_control *control;
    const uint8_t *arena;
    uint64_t page_bytes;
    const uint32_t *row_begin, *adapter;
    const struct lora_adapter_view *adapters;
    uint32_t slot, count;
    bool settled;
    uint32_t pair[MODULES];    // lora_pair_row
    uint32_t columns[MODULES]; // expand: tasks over the columns
};

// A segment as the survey found it.
struct segment {
    const uint32_t *pages;
    uint32_t row, rows;
    uint32_t first, first_long; // tasks of the survey; expand: first unit
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

// Turns the numbers of tasks into the first task of each segment; by one warp. Returns the sum.
__device__ __forceinline__ uint32_t tasks_scan(struct segment *table, uint32_t segment::*first)
{
    uint32_t lane = threadIdx.x % 32, count[SURVEY / 32], sum = 0; // four segments a lane
#pragma unroll
    for (int j = 0; j < SURVEY / 32; j++)
        sum += count[j] = table[lane * (SURVEY / 32) + j].*first;
    uint32_t end = sum;
#pragma unroll
    for (uint32_t step = 1; step < 32; step *= 2) {
        uint32_t below = __shfl_up_sync(0xffffffffu, end, step);
        end += lane >= step ? below : 0;
    }
    uint32_t at = end - sum;
#pragma unroll
    for (int j = 0; j < SURVEY / 32; j++) {
        table[lane * (SURVEY / 32) + j].*first = at;
        at += count[j];
    }
    return __shfl_sync(0xffffffffu, end, 31);
}

// Segments [base, base + SURVEY) of the step.
struct survey {
    struct segment table[SURVEY];
    uint32_t tasks, long_tasks;
};

// All threads; what they did with the survey before must be done.
// count(s) fills in the segment's tasks.
template <bool EXPAND, typename Count>
__device__ __forceinline__ void survey_make(const struct lora_work &w, uint32_t base,
                                            uint32_t segments, uint32_t rows, struct survey &v,
                                            Count count)
{
    uint32_t i = threadIdx.x;
    if (i < SURVEY) {
        look<EXPAND>(w, base + i, segments, rows, v.table[i]);
        v.table[i].first = v.table[i].first_long = 0;
        count(v.table[i]);
    }
    __syncthreads();
    if (i < 32)
        v.tasks = tasks_scan(v.table, &segment::first);
    else if (i < 64)
        v.long_tasks = tasks_scan(v.table, &segment::first_long);
    __syncthreads();
}

// The segment of a task: the last one whose first task is not behind it. (Segments without tasks
// have the same first as the one that follows them.)
__device__ __forceinline__ const struct segment &segment_of(const struct survey &v,
                                                            uint32_t segment::*first, uint32_t task)
{
    uint32_t low = 0;
#pragma unroll
    for (uint32_t step = SURVEY / 2; step; step /= 2)
        low += v.table[low + step].*first <= task ? step : 0;
    return v.table[low];
}

// What was written before the unit may be read; false: the segment has missed.
__device__ __forceinline__ bool enter(const struct lora_work &w)
{
    uint32_t rows;
    bool go_on = segment_enter(w.control, w.slot, &rows);
    if (!go_on)
        async_wait<0>();
    return go_on;
}

static inline struct lora_work work_of(const struct cuda_launch *l, const struct lora_batch *b)
{
    struct lora_work w = {};
    w.control = l->control;
    w.arena = b->arena;
    w.page_bytes = b->page_bytes;
    w.row_begin = b->row_begin;
    w.adapter = b->adapter;
    w.adapters = b->adapters;
    w.slot = l->slot;
    w.settled = l->settled;
    return w;
}

static inline dim3 grid_of(const struct cuda_launch *l)
{
    return dim3((unsigned)l->device->multiprocessors);
}

enum status cuda__lora_expand_prepare(struct cuda_device *device);
