// SPDX-License-Identifier: Apache-2.0
// The schedule of the decode kernel: which (row, lane, segment) a CTA computes next. It is a
// function of the positions alone and is found by every CTA for itself, because a step may be
// entered at any half-layer: nothing of an earlier launch is relied on.
//
// lane: a KV head and one pass of at most 8 of its query heads. unit: a (row, segment).
//
// Shared prefixes. `together` rows of the list that follow each other (8 / query heads of a pass,
// so that their heads fill the columns of the products; a list entry at a multiple of it leads) are
// one task in each segment that they see as a whole and whose pages are the same: the last block's
// page tells, since a block is only ever shared together with those before it. The leader's task
// covers the others, whose own tasks begin behind what is covered. Rows of one sequence (a short
// chunk) share everything but their last segment. A column's arithmetic is the same in any company.
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
// Shared memory: 7.5 KiB for the list, 4 bytes per 32 rows for the bits of runs.
#pragma once

#include "kernels/cuda/attention.cuh"

enum {
    DECODE_WARPS = 4,
    DECODE_THREADS = DECODE_WARPS * 32,
    LIST_MAX = 320,
    COUNTERS = 1 << 18,
};

struct list_entry {
    uint32_t start; // units of the rows before
    uint32_t row, sequence, position;
    uint32_t cover; // segments that the leader's tasks do for this row
    uint32_t
        task; // units of the rows before that are not covered: number of its first task / lanes
};

struct schedule {
    list_entry list[LIST_MAX];
    uint32_t warp_rows[DECODE_WARPS], warp_units[DECODE_WARPS], tasks;
};

// Uniform over the CTA.
struct schedule_view {
    uint32_t rows, count, units;
    uint32_t tasks; // units that are not covered
    bool by_rows;
};

struct task {
    uint32_t at;                // task number; the walk continues from it
    uint32_t row, lane;         //
    uint32_t segment, segments; // of the row
    uint32_t tokens;            // of this segment, 1..KV_SEGMENT; 0: there is no task
    uint32_t sequence;
    uint32_t entry;    // by segments: index in the list
    uint32_t together; // entries from there on that this task is for
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

// How many leading segments two rows see as a whole and have in the same pages.
static __device__ __forceinline__ uint32_t segments_shared(const struct attention_args &a,
                                                           const struct attention_plan &plan,
                                                           const list_entry &x, const list_entry &y)
{
    const struct kv_shape &s = a.kv.shape;
    const uint32_t *pages = a.kv.pages + plan.page_at;
    uint64_t x_at = (uint64_t)x.sequence * a.kv.blocks_max,
             y_at = (uint64_t)y.sequence * a.kv.blocks_max;
    uint32_t low = 0, high = (min(x.position, y.position) + 1) / KV_SEGMENT;
    for (uint32_t probe = 1; low < high; probe = low + (high - low + 1) / 2) {
        uint32_t block = (probe * KV_SEGMENT - 1) / s.block_tokens;
        if (pages[(x_at + block) * s.pages_per_block] == pages[(y_at + block) * s.pages_per_block])
            low = probe;
        else
            high = probe - 1;
    }
    return low;
}

// Finds `cover` and `task` of the list. All threads; begins and ends with a barrier.
static __device__ void schedule_share(schedule *s, const struct attention_args &a,
                                      const struct attention_plan &plan, schedule_view *view)
{
    constexpr uint32_t EACH = (LIST_MAX + DECODE_THREADS - 1) / DECODE_THREADS;
    uint32_t cover[EACH], count = view->count;
    bool is_shared = false;
    __syncthreads();
    for (uint32_t i = threadIdx.x; i < count; i += DECODE_THREADS)
        if (i % plan.together) {
            s->list[i].cover = segments_shared(a, plan, s->list[i - 1], s->list[i]);
            is_shared |= s->list[i].cover > 0;
        }
    if (!__syncthreads_or(is_shared))
        return; // as the list was made
#pragma unroll
    for (uint32_t j = 0; j < EACH; j++) { // what is shared all the way from the leader
        uint32_t i = threadIdx.x + j * DECODE_THREADS;
        cover[j] = i < count ? s->list[i].cover : 0;
        for (uint32_t k = i; i < count && cover[j] && (k - 1) % plan.together; k--)
            cover[j] = min(cover[j], s->list[k - 1].cover);
    }
    __syncthreads();
#pragma unroll
    for (uint32_t j = 0; j < EACH; j++)
        if (threadIdx.x + j * DECODE_THREADS < count)
            s->list[threadIdx.x + j * DECODE_THREADS].cover = cover[j];
    __syncthreads();
    uint32_t lane = threadIdx.x, strip = (count + 31) / 32, own = 0;
    if (lane < 32) {
        for (uint32_t i = lane * strip; i < min((lane + 1) * strip, count); i++)
            own += segments_of(s->list[i].position) - s->list[i].cover;
        uint32_t end = own;
#pragma unroll
        for (int i = 1; i < 32; i *= 2) {
            uint32_t left = __shfl_up_sync(0xffffffffu, end, i);
            end += lane >= i ? left : 0;
        }
        uint32_t at = end - own;
        for (uint32_t i = lane * strip; i < min((lane + 1) * strip, count); i++) {
            s->list[i].task = at;
            at += segments_of(s->list[i].position) - s->list[i].cover;
        }
        if (lane == 31)
            s->tasks = end;
    }
    __syncthreads();
    view->tasks = s->tasks;
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
                s->list[at++] = {start, row, a.sequence[row], position, 0, start};
                start += segments_of(position);
            }
    view->tasks = units;
    if (!view->by_rows && count > 1 && plan.together > 1)
        schedule_share(s, a, plan, view);
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
    if (unit >= view.tasks)
        return;
    uint32_t low = 0, high = view.count; // list[low].task <= unit < list[high].task
    while (high - low > 1) {
        uint32_t middle = (low + high) / 2;
        if (s->list[middle].task <= unit)
            low = middle;
        else
            high = middle;
    }
    list_entry e = s->list[low];
    t->entry = low;
    t->row = e.row;
    t->sequence = e.sequence;
    t->lane = at - unit * plan.lanes;
    t->segment = unit - e.task + e.cover;
    t->together = 1;
    while ((low + t->together) % plan.together && low + t->together < view.count &&
           t->segment < s->list[low + t->together].cover)
        t->together++;
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
    t->together = 1;
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
