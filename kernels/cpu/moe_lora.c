// SPDX-License-Identifier: Apache-2.0
// Expert LoRA. A command before each expert GEMM computes what LoRA adds to every pair,
// B^T (A x), and keeps it; the tasks of the GEMM add it, scaled, to what they multiplied.
//
//   adapter_added: [pair][stride]: struct pair_head, then, for gate+up, B^T (A x) of both
//   work.out:      B^T (A x) of down, in the row that its GEMM writes anyway
//
// At decode nearly every pair has slices of its own, so the bytes of A and B bound this. A task
// takes pairs that stand together in `order`, whatever their experts, and walks over their runs of
// one (expert, adapter); while a run is computed the slices of the next are fetched. Who fetches
// them reads them, whole and once.
//
// A prefill may have too many pairs for the rows to be kept: then their A x are, and the tasks of
// the GEMM expand them for their own columns; if not even these can be kept, those tasks compute
// A x, too, again and again. The bits are the same in all three.
#include <string.h>

#include "kernels/cpu/moe_gemm.h"

enum {
    PAIRS_TASK = 64,  // pairs of a task at most
    TASKS_THREAD = 8, // tasks per thread as long as they have a pair each
    PAIR_HEAD = 16,   // floats: a cache line
};

// What is kept of a pair before its rows.
struct pair_head {
    float scale[2]; // by module
    uint32_t has;   // bit m: module m has LoRA
};

enum keep { KEEP_ROW, KEEP_HIDDEN, KEEP_NOTHING };

// Pairs order[first .. first + count) of one expert whose rows use one adapter; view NULL: base.
struct run {
    const struct lora_adapter_view *view;
    uint32_t expert, first, count;
};

// What all functions below look at.
struct work {
    struct cpu_stream *s;
    struct slot *slot;
    const struct moe_gemm_args *a;
    const struct side *side;
    enum keep keep;
    size_t stride; // kept floats of a pair
};

static bool lora_wanted(const struct moe_gemm_args *a)
{
    return a->lora && a->lora->segments && a->lora->rank_max;
}

// ---- what is kept ----

static size_t hidden_stride(const struct moe_gemm_args *a)
{
    return round_up(a->lora->rank_max, MIX_PAD);
}

static struct work work_of(struct cpu_stream *s, struct slot *slot, const struct moe_gemm_args *a,
                           const struct side *side)
{
    size_t pairs = (size_t)a->rows * a->top_k;
    size_t row = PAIR_HEAD + (side->modules == 2 ? 2 * round_up(side->lora_out, MIX_PAD) : 0);
    size_t hidden = side->modules * hidden_stride(a);
    struct work w = {s, slot, a, side, KEEP_ROW, row};
    if (pairs * row > ADAPTER_ADDED) {
        w.keep = pairs * hidden <= ADAPTER_ADDED ? KEEP_HIDDEN : KEEP_NOTHING;
        w.stride = hidden;
    }
    return w;
}

static float *kept_at(const struct work *w, uint32_t pair)
{
    return w->s->adapter_added + pair * w->stride;
}

static float *kept_hidden(const struct work *w, uint32_t pair, uint32_t module)
{
    return kept_at(w, pair) + module * hidden_stride(w->a);
}

static struct pair_head *kept_head(const struct work *w, uint32_t pair)
{
    return (struct pair_head *)(void *)kept_at(w, pair);
}

static float *kept_row(const struct work *w, uint32_t pair, uint32_t module)
{
    if (w->side->modules == 1)
        return w->a->work.out + (size_t)pair * w->a->dim;
    return kept_at(w, pair) + PAIR_HEAD + module * round_up(w->side->lora_out, MIX_PAD);
}

// ---- runs ----

static const struct lora_pair *run_pair(const struct work *w, const struct run *run,
                                        uint32_t module)
{
    return lora_pair_at(run->view, w->a->layer, w->side->module + module, run->expert);
}

// The run that begins at `first`, before `end` and of this expert.
static struct run run_at(const struct moe_gemm_args *a, uint32_t expert, uint32_t first,
                         uint32_t end)
{
    const uint32_t *order = a->work.order;
    uint32_t last, n = 1;
    const struct lora_adapter_view *view = cpu__lora_view(a->lora, order[first] / a->top_k, &last);
    while (first + n < end && order[first + n] / a->top_k < last)
        n++;
    return (struct run){view, expert, first, n};
}

// The expert of the pair at `at` of order.
static uint32_t expert_of(const struct moe_gemm_args *a, uint32_t at)
{
    uint32_t low = 0, high = a->view.experts; // the last expert that begins at or before it
    while (high - low > 1) {
        uint32_t middle = low + (high - low) / 2;
        if (a->work.begin[middle] <= at)
            low = middle;
        else
            high = middle;
    }
    return low;
}

// Lists the runs of order[first .. end) that are to be computed now, at most PAIRS_TASK of them,
// and fetches what says where their slices are.
static uint32_t runs_list(const struct work *w, uint32_t first, uint32_t end, struct run *runs)
{
    const struct moe_work *m = &w->a->work;
    uint32_t count = 0;
    for (uint32_t e = expert_of(w->a, first); first < end; e++) {
        uint32_t last = (uint32_t)min_size(m->begin[e + 1], end);
        if (m->state[e] != 1)
            first = first < last ? last : first;
        for (; first < last; first += runs[count++].count) {
            runs[count] = run_at(w->a, e, first, last);
            for (uint32_t i = 0; runs[count].view && i < w->side->modules; i++)
                __builtin_prefetch(run_pair(w, &runs[count], i));
        }
    }
    return count;
}

// ---- computing ----

// slot->hidden[i] = A x for the pairs of a run.
static void run_shrink(const struct work *w, const struct run *run, const struct lora_slice *slice)
{
    const struct side *side = w->side;
    const struct micro_dtype *kernel = cpu__kernel(w->s);
    size_t x_bytes = cpu__act_row_bytes(cpu__device(w->s)->dtype, side->in);
    size_t stride = hidden_stride(w->a);
    cpu__lora_rows(w->a->lora, run->view, slice, 0, slice->rank, w->slot->rows);
    for (uint32_t i = 0; i < run->count; i++) {
        uint32_t pair = w->a->work.order[run->first + i];
        kernel->dots(side->x + pair / side->pairs_per_x * x_bytes, w->slot->rows, slice->rank,
                     side->in, w->slot->hidden + i * stride);
    }
}

// The rows of a run for one module, from slot->hidden and the rows of B^T in slot->values.
static void run_expand(const struct work *w, const struct run *run, const struct lora_pair *pair,
                       uint32_t module)
{
    const uint32_t *order = w->a->work.order + run->first;
    struct slot *slot = w->slot;
    size_t all = w->side->lora_out, cols;
    bool in_place = run->count == 1 && all % MIX_PAD == 0; // else the padding is another's
    size_t room = in_place ? all : ARRAY_COUNT(slot->mixed) / run->count / MIX_PAD * MIX_PAD;
    for (size_t first = 0; first < all; first += cols) {
        cols = min_size(room, all - first);
        size_t stride = round_up(cols, MIX_PAD);
        float *to = in_place ? kept_row(w, order[0], module) : slot->mixed;
        memset(to, 0, run->count * stride * sizeof(float));
        cpu__kernel(w->s)->mix(slot->hidden, hidden_stride(w->a), slot->values, pair->b.rank, first,
                               cols, to, stride, run->count);
        for (uint32_t i = 0; !in_place && i < run->count; i++)
            memcpy(kept_row(w, order[i], module) + first, slot->mixed + i * stride,
                   cols * sizeof(float));
    }
}

static void hidden_store(const struct work *w, const struct run *run, uint32_t module, size_t rank)
{
    for (uint32_t i = 0; i < run->count; i++)
        memcpy(kept_hidden(w, w->a->work.order[run->first + i], module),
               w->slot->hidden + i * hidden_stride(w->a), rank * sizeof(float));
}

static void hidden_load(const struct work *w, const struct run *run, uint32_t module, size_t rank)
{
    for (uint32_t i = 0; i < run->count; i++)
        memcpy(w->slot->hidden + i * hidden_stride(w->a),
               kept_hidden(w, w->a->work.order[run->first + i], module), rank * sizeof(float));
}

// ---- the command before the GEMM ----

static void run_fetch(const struct work *w, const struct run *run, uint32_t module, bool b)
{
    if (!run || !run->view)
        return;
    const struct lora_pair *pair = run_pair(w, run, module);
    if (!b || w->keep == KEEP_ROW)
        cpu__lora_fetch(w->a->lora, run->view, b ? &pair->b : &pair->a, 0, pair->a.rank);
}

static void heads_store(const struct work *w, const struct run *run)
{
    struct pair_head head = {.has = 0};
    for (uint32_t m = 0; run->view && m < w->side->modules; m++) {
        const struct lora_pair *pair = run_pair(w, run, m);
        head.scale[m] = pair->scale;
        head.has |= (uint32_t)(pair->a.rank > 0) << m;
    }
    for (uint32_t i = 0; i < run->count; i++)
        *kept_head(w, w->a->work.order[run->first + i]) = head;
}

// Computes a run, fetching the next one meanwhile (NULL: there is none).
static void run_compute(const struct work *w, const struct run *run, const struct run *next)
{
    if (w->keep == KEEP_ROW)
        heads_store(w, run);
    for (uint32_t m = 0; m < w->side->modules; m++) {
        const struct lora_pair *pair = run->view ? run_pair(w, run, m) : NULL;
        run_fetch(w, next, m, false);
        if (pair && pair->a.rank)
            run_shrink(w, run, &pair->a);
        run_fetch(w, next, m, true);
        if (!pair || !pair->a.rank)
            continue;
        if (w->keep == KEEP_HIDDEN) {
            hidden_store(w, run, m, pair->a.rank);
            continue;
        }
        cpu__lora_rows(w->a->lora, run->view, &pair->b, 0, pair->b.rank, w->slot->values);
        run_expand(w, run, pair, m);
    }
}

static void lora_task(struct cpu_stream *s, struct slot *slot, struct command *c, uint32_t task)
{
    const struct moe_gemm_args *a = &c->a.moe;
    struct side side = cpu__moe_side(a, c->split);
    struct work w = work_of(s, slot, a, &side);
    struct run runs[PAIRS_TASK];
    uint32_t first = task * c->parts, all = a->work.begin[a->view.experts];
    uint32_t count = runs_list(&w, first, (uint32_t)min_size(first + c->parts, all), runs);
    for (uint32_t m = 0; count && m < side.modules; m++) {
        run_fetch(&w, runs, m, false);
        run_fetch(&w, runs, m, true);
    }
    for (uint32_t i = 0; i < count; i++)
        run_compute(&w, &runs[i], i + 1 < count ? &runs[i + 1] : NULL);
}

static uint32_t lora_prepare(struct cpu_stream *s, struct command *c)
{
    const struct moe_gemm_args *a = &c->a.moe;
    size_t all = a->work.begin[a->view.experts];
    size_t size = div_up(all, (size_t)TASKS_THREAD * cpu__device(s)->info.threads);
    c->parts = (uint32_t)min_size(size ? size : 1, PAIRS_TASK);
    return (uint32_t)div_up(all, c->parts);
}

static const struct operation lora_operation = {
    .prepare = lora_prepare, .task = lora_task, .in_miss = true};

void cpu__moe_lora_record(struct stream *stream, const struct moe_gemm_args *a, bool down)
{
    struct cpu_stream *s = (struct cpu_stream *)stream;
    struct side side = cpu__moe_side(a, down);
    if (!lora_wanted(a))
        return;
    CHECK(a->lora->rank_max <= RANK_MAX);
    if (work_of(s, NULL, a, &side).keep == KEEP_NOTHING)
        return;
    struct command *c = cpu__record(stream, &lora_operation, 0);
    size_t pairs = (size_t)a->rows * a->top_k;
    size_t x_bytes = cpu__act_row_bytes(cpu__device(s)->dtype, side.in);
    c->a.moe = *a;
    c->split = down;
    c->miss_layer = a->layer;
    cpu__reads(c, side.x, pairs / side.pairs_per_x * x_bytes, 0, 1);
    cpu__writes(c, s->adapter_added, 1, 0, 1);
    if (down)
        cpu__writes(c, a->work.out, pairs * a->dim * sizeof(float), 0, 1);
    cpu__record_end(stream, c);
}

// ---- inside the GEMM ----

// What one module adds to the task's columns of a run.
static void add_expanded(const struct work *w, const struct expert_task *t, const struct run *run,
                         uint32_t module)
{
    const struct lora_pair *pair = run_pair(w, run, module);
    size_t units = w->side->modules == 2 ? UNITS : TILE_ROWS, first = t->block * units;
    if (!pair->a.rank)
        return;
    if (w->keep == KEEP_HIDDEN)
        hidden_load(w, run, module, pair->a.rank);
    else
        run_shrink(w, run, &pair->a);
    cpu__lora_expand_rows(
        w->s, w->slot,
        &(struct expand_rows){.batch = w->a->lora,
                              .view = run->view,
                              .pair = pair,
                              .hidden = w->slot->hidden,
                              .hidden_stride = hidden_stride(w->a),
                              .rows = run->count,
                              .first = first,
                              .cols = min_size(units, w->side->lora_out - first),
                              .y = w->slot->out + (run->first - t->first) * TILE_ROWS,
                              .y_stride = TILE_ROWS,
                              .to = 0,
                              .half = w->side->modules == 2 ? (int)module : -1});
}

static void add_kept(const struct work *w, const struct expert_task *t)
{
    const struct side *side = w->side;
    size_t units = side->modules == 2 ? UNITS : TILE_ROWS, first = t->block * units;
    for (uint32_t i = 0; i < t->count; i++) {
        uint32_t pair = w->a->work.order[t->first + i];
        const struct pair_head *head = kept_head(w, pair);
        for (uint32_t m = 0; m < side->modules; m++)
            if (head->has >> m & 1)
                cpu__lora_add(w->s, w->slot->out + i * TILE_ROWS, kept_row(w, pair, m) + first,
                              head->scale[m], 0, min_size(units, side->lora_out - first),
                              side->modules == 2 ? (int)m : -1);
    }
}

void cpu__moe_lora_add(struct cpu_stream *s, struct slot *slot, const struct moe_gemm_args *a,
                       const struct expert_task *t, const struct side *side)
{
    if (!lora_wanted(a))
        return;
    struct work w = work_of(s, slot, a, side);
    if (w.keep == KEEP_ROW) {
        add_kept(&w, t);
        return;
    }
    for (uint32_t at = t->first, end = at + t->count; at < end;) {
        struct run run = run_at(a, t->expert, at, end);
        for (uint32_t m = 0; run.view && m < side->modules; m++)
            add_expanded(&w, t, &run, m);
        at += run.count;
    }
}
