// SPDX-License-Identifier: Apache-2.0
// LoRA at true rank: shrink hidden = A x (dots over rows of A), expand y += scale * B^T hidden (mix
// over rows of B^T, j ascending). Rows of one adapter stand together, so that a task reads a row of
// A or B once for up to ROWS_TASK rows of the batch. Bound by the bytes of the distinct adapters at
// decode. Adapters without the module, rank 0 and base rows cost a look. gather copies a row of A
// for each row.
//
// Tasks: shrink c->parts rows x RANK_TASK ranks, expand c->parts rows x COLUMNS_CHUNK columns
// (blocks of B^T that is cut are whole chunks), gather ROWS_TASK rows; parts: ROWS_TASK rows, fewer
// when the batch is small, so that all threads have some.
#include <string.h>

#include "kernels/cpu/cpu.h"

enum { ROWS_TASK = 16, RANK_TASK = 16, TASKS_THREAD = 4, BASE = 0xffffffff };

static uint32_t lora_segment(const struct lora_batch *b, uint32_t row)
{
    uint32_t low = 0, high = b->segments; // the last segment that begins at or before row
    while (low < high) {
        uint32_t middle = low + (high - low) / 2;
        if (b->row_begin[middle] <= row)
            low = middle + 1;
        else
            high = middle;
    }
    return low;
}

uint32_t cpu__lora_segment(const struct lora_batch *b, uint32_t row)
{
    return lora_segment(b, row) - 1;
}

const struct lora_adapter_view *cpu__lora_view(const struct lora_batch *b, uint32_t row,
                                               uint32_t *last)
{
    uint32_t segment = b->segments ? lora_segment(b, row) : 0;
    bool base = !segment || row >= b->row_begin[segment];
    if (base) { // before the first segment, or behind the last
        *last = b->segments && !segment ? b->row_begin[0] : UINT32_MAX;
        return NULL;
    }
    *last = b->row_begin[segment];
    uint32_t adapter = b->adapter[segment - 1];
    return adapter == BASE ? NULL : &b->adapters[adapter];
}

// Rows from `at` on that stand together, at most `count`: those up to the end of the page.
static uint32_t rows_together(const struct lora_batch *b, const struct lora_slice *slice,
                              const uint8_t *at, uint32_t count)
{
    size_t left = b->page_bytes - (size_t)(at - b->arena) % b->page_bytes;
    return (uint32_t)min_size(left / slice->row_bytes, count);
}

void cpu__lora_rows(const struct lora_batch *b, const struct lora_adapter_view *view,
                    const struct lora_slice *slice, uint32_t first, uint32_t count,
                    const uint8_t **rows)
{
    for (uint32_t j = 0, n; j < count; j += n) {
        const uint8_t *at = lora_row_at(b->arena, b->page_bytes, view->pages, slice, first + j);
        n = rows_together(b, slice, at, count - j);
        for (uint32_t i = 0; i < n; i++)
            rows[j + i] = at + (size_t)i * slice->row_bytes;
    }
}

void cpu__lora_fetch(const struct lora_batch *b, const struct lora_adapter_view *view,
                     const struct lora_slice *slice, uint32_t first, uint32_t count)
{
    for (uint32_t j = 0, n; j < count; j += n) {
        const uint8_t *at = lora_row_at(b->arena, b->page_bytes, view->pages, slice, first + j);
        n = rows_together(b, slice, at, count - j);
        for (size_t byte = 0; byte < (size_t)n * slice->row_bytes; byte += 64)
            __builtin_prefetch(at + byte, 0, 2);
    }
    __asm__ volatile(""); // GCC drops calls of a function that only fetches
}

// Fetches rows [first, first + count) of A or B^T of the rows from `row` on, as far as they are
// there; nothing at `end`.
static void fetch_next(const struct command *c, const struct lora_batch *b, uint32_t row,
                       uint32_t end, bool is_b, uint32_t first)
{
    uint32_t last;
    const struct lora_adapter_view *view = row < end ? cpu__lora_view(b, row, &last) : NULL;
    if (!view)
        return;
    const struct lora_pair *pair =
        is_b ? lora_pair_at(view, c->a.expand.layer, c->a.expand.module, 0)
             : lora_pair_at(view, c->a.shrink.layer, c->a.shrink.module, 0);
    const struct lora_slice *slice = is_b ? &pair->b : &pair->a;
    uint32_t most = is_b ? RANK_MAX : RANK_TASK;
    if (slice->rank > first)
        cpu__lora_fetch(b, view, slice, first, (uint32_t)min_size(most, slice->rank - first));
}

static void gather_task(struct cpu_stream *s, struct slot *slot, struct command *c, uint32_t task)
{
    (void)slot;
    const struct lora_gather_args *a = &c->a.lora_gather;
    const struct lora_batch *b = a->batch;
    uint32_t row = task * ROWS_TASK, last;
    uint32_t end = (uint32_t)min_size(row + ROWS_TASK, b->row_begin[b->segments]);
    for (; row < end; row = last) {
        const struct lora_adapter_view *view = cpu__lora_view(b, row, &last);
        last = last < end ? last : end;
        const struct lora_slice *slice =
            view ? &lora_pair_at(view, a->layer, a->module, 0)->a : NULL;
        for (uint32_t r = row; view && slice->rank && r < last; r++) {
            float *to = a->hidden + (size_t)r * b->rank_max;
            uint32_t token = (uint32_t)a->token[r]; // negative: beyond any vocabulary
            if (token < a->vocab)
                cpu__kernel(s)->load(
                    lora_row_at(b->arena, b->page_bytes, view->pages, slice, token), to,
                    slice->rank);
            else
                memset(to, 0, slice->rank * sizeof *to);
        }
    }
}

static uint32_t gather_prepare(struct cpu_stream *s, struct command *c)
{
    (void)s;
    const struct lora_batch *b = c->a.lora_gather.batch;
    return (uint32_t)div_up(b->row_begin[b->segments], ROWS_TASK);
}

static const struct operation gather_operation = {.prepare = gather_prepare, .task = gather_task};

void cpu__lora_gather(struct stream *s, const struct lora_gather_args *a)
{
    CHECK(a->batch->rank_max <= RANK_MAX && a->module == LORA_EMBED);
    if (!a->batch->segments || !a->batch->rank_max)
        return;
    struct command *c = cpu__record(s, &gather_operation, 0);
    c->a.lora_gather = *a;
    size_t rows = a->batch->rows; // row_begin is device memory: it may not be there yet
    cpu__reads(c, a->token, rows * sizeof *a->token, 0, 1);
    cpu__writes(c, a->hidden, rows * a->batch->rank_max * sizeof(float), 0, 1);
    cpu__record_end(s, c);
}

static void shrink_task(struct cpu_stream *s, struct slot *slot, struct command *c, uint32_t task)
{
    const struct lora_shrink_args *a = &c->a.shrink;
    const struct lora_batch *b = a->batch;
    uint32_t row = task / c->split * c->parts, rank0 = task % c->split * RANK_TASK, last;
    uint32_t end = (uint32_t)min_size(row + c->parts, b->row_begin[b->segments]);
    size_t x_bytes = cpu__act_row_bytes(cpu__device(s)->dtype, a->d_in);
    for (; row < end; row = last) {
        const struct lora_adapter_view *view = cpu__lora_view(b, row, &last);
        last = last < end ? last : end;
        fetch_next(c, b, last, end, false, rank0);
        const struct lora_slice *slice =
            view ? &lora_pair_at(view, a->layer, a->module, 0)->a : NULL;
        if (!view || slice->rank <= rank0)
            continue;
        uint32_t ranks = (uint32_t)min_size(RANK_TASK, slice->rank - rank0);
        float out[RANK_TASK];
        cpu__lora_rows(b, view, slice, rank0, ranks, slot->rows);
        for (uint32_t r = row; r < last; r++) {
            const uint8_t *x = (const uint8_t *)a->x + r * x_bytes;
            cpu__kernel(s)->dots(x, slot->rows, ranks, a->d_in, out);
            memcpy(a->hidden + (size_t)r * b->rank_max + rank0, out, ranks * sizeof(float));
        }
    }
}

// Tasks of a command with `split` tasks for the same rows.
static uint32_t tasks_count(struct cpu_stream *s, struct command *c, const struct lora_batch *b,
                            size_t split)
{
    size_t rows = b->row_begin[b->segments];
    size_t share = div_up(rows, (size_t)TASKS_THREAD * cpu__device(s)->info.threads);
    c->split = (uint32_t)split;
    c->parts = (uint32_t)min_size(share ? share : 1, ROWS_TASK);
    return (uint32_t)(div_up(rows, c->parts) * split);
}

static uint32_t shrink_prepare(struct cpu_stream *s, struct command *c)
{
    const struct lora_batch *b = c->a.shrink.batch;
    return tasks_count(s, c, b, div_up(b->rank_max, RANK_TASK));
}

static const struct operation shrink_operation = {.prepare = shrink_prepare, .task = shrink_task};

void cpu__lora_shrink(struct stream *s, const struct lora_shrink_args *a)
{
    CHECK(a->batch->rank_max <= RANK_MAX && a->module < LORA_MODULES_ALL);
    CHECK(a->module != LORA_EMBED);
    if (!a->batch->segments || !a->batch->rank_max)
        return;
    struct command *c = cpu__record(s, &shrink_operation, 0);
    c->a.shrink = *a;
    size_t rows = a->batch->rows; // row_begin is device memory: it may not be there yet
    size_t x_bytes = cpu__act_row_bytes(((struct cpu_device *)s->device)->dtype, a->d_in);
    cpu__reads(c, a->x, rows * x_bytes, 0, 1);
    cpu__writes(c, a->hidden, rows * a->batch->rank_max * sizeof(float), 0, 1);
    cpu__record_end(s, c);
}

void cpu__lora_add(struct cpu_stream *s, float *y, const float *from, float scale, size_t first,
                   size_t n, int half)
{
    if (half < 0)
        cpu__micro(s)->axpy(y + first, from, scale, n);
    else
        cpu__micro(s)->axpy_half(y + tile_interleaved_row(first, (size_t)half), from, scale, n);
}

void cpu__lora_expand_rows(struct cpu_stream *s, struct slot *slot, const struct expand_rows *e)
{
    size_t stride = round_up(e->cols, MIX_PAD), count = e->pair->b.rank;
    size_t columns = e->pair->b.row_bytes / cpu__element(s), block = e->first / columns;
    CHECK(e->rows * stride <= ARRAY_COUNT(slot->mixed) && count <= RANK_MAX);
    cpu__lora_rows(e->batch, e->view, &e->pair->b, (uint32_t)(block * count), (uint32_t)count,
                   slot->values);
    memset(slot->mixed, 0, e->rows * stride * sizeof(float));
    cpu__kernel(s)->mix(e->hidden, e->hidden_stride, slot->values, count,
                        e->first - block * columns, e->cols, slot->mixed, stride, e->rows);
    for (size_t r = 0; r < e->rows; r++)
        cpu__lora_add(s, e->y + r * e->y_stride, slot->mixed + r * stride, e->pair->scale, e->to,
                      e->cols, e->half);
}

static void expand_task(struct cpu_stream *s, struct slot *slot, struct command *c, uint32_t task)
{
    const struct lora_expand_args *a = &c->a.expand;
    const struct lora_batch *b = a->batch;
    uint32_t row = task / c->split * c->parts, last;
    size_t first = (size_t)(task % c->split) * COLUMNS_CHUNK;
    uint32_t end = (uint32_t)min_size(row + c->parts, b->row_begin[b->segments]);
    for (; row < end; row = last) {
        const struct lora_adapter_view *view = cpu__lora_view(b, row, &last);
        last = last < end ? last : end;
        if (c->split == 1)
            fetch_next(c, b, last, end, true, 0);
        const struct lora_pair *pair = view ? lora_pair_at(view, a->layer, a->module, 0) : NULL;
        if (!view || !pair->b.rank)
            continue;
        cpu__lora_expand_rows(
            s, slot,
            &(struct expand_rows){.batch = b,
                                  .view = view,
                                  .pair = pair,
                                  .hidden = a->hidden + (size_t)row * b->rank_max,
                                  .hidden_stride = b->rank_max,
                                  .rows = last - row,
                                  .first = first,
                                  .cols = min_size(COLUMNS_CHUNK, a->d_out - first),
                                  .y = a->y + row * a->y_stride,
                                  .y_stride = a->y_stride,
                                  .to = first,
                                  .half = a->interleave_half});
    }
}

static uint32_t expand_prepare(struct cpu_stream *s, struct command *c)
{
    return tasks_count(s, c, c->a.expand.batch, div_up(c->a.expand.d_out, COLUMNS_CHUNK));
}

static const struct operation expand_operation = {.prepare = expand_prepare, .task = expand_task};

void cpu__lora_expand(struct stream *s, const struct lora_expand_args *a)
{
    CHECK(a->batch->rank_max <= RANK_MAX && a->module < LORA_MODULES_ALL);
    if (!a->batch->segments || !a->batch->rank_max || !a->d_out)
        return;
    struct command *c = cpu__record(s, &expand_operation, 0);
    c->a.expand = *a;
    size_t rows = a->batch->rows; // row_begin is device memory: it may not be there yet
    size_t width = a->interleave_half < 0 ? a->d_out : tile_interleaved_rows(a->d_out);
    cpu__reads(c, a->hidden, rows * a->batch->rank_max * sizeof(float), 0, 1);
    cpu__writes(c, a->y, width * sizeof(float), a->y_stride * sizeof(float), rows);
    cpu__record_end(s, c);
}
