// SPDX-License-Identifier: Apache-2.0
// The MoE map (pairs sorted by expert, residency test) and the combine in slot order.
//
// state[e]: 0 no pairs --map--> 1 resident | 2 missing;  2 --map again, resident now--> 1;
//           1 --moe_down complete--> 3 done (moe_gemm.c). A resumed map leaves 3 alone and does not
//           sort again. The map is one task (bound by nothing: rows * top_k steps) and a fence, so
//           that no later command can begin before the miss is known.
#include "kernels/cpu/cpu.h"

static void pairs_sort(struct cpu_stream *s, const struct moe_map_args *a)
{
    const struct moe_work *w = &a->work;
    uint32_t experts = a->view.experts, pairs = a->rows * a->top_k;
    for (uint32_t e = 0; e < experts; e++)
        s->cursor[e] = 0;
    for (uint32_t p = 0; p < pairs; p++) {
        CHECK(w->expert[p] < experts);
        s->cursor[w->expert[p]]++;
    }
    uint32_t begin = 0;
    for (uint32_t e = 0; e < experts; e++) {
        w->begin[e] = begin;
        begin += s->cursor[e];
        s->cursor[e] = w->begin[e];
        w->state[e] = 0;
    }
    w->begin[experts] = begin;
    for (uint32_t p = 0; p < pairs; p++)
        w->order[s->cursor[w->expert[p]]++] = p;
}

static bool expert_resident(const struct expert_view *view, uint32_t e)
{
    const uint32_t *pages = view->pages + (size_t)e * view->pages_per_expert;
    for (uint32_t i = 0; i < view->pages_per_expert; i++)
        if (pages[i] == PAGE_NONE)
            return false;
    return true;
}

// The part of (adapter, layer, expert): are all its pages there?
static bool part_resident(const struct moe_map_args *a, const struct lora_adapter_view *view,
                          uint32_t e)
{
    struct lora_part part = view->parts[(size_t)a->layer * view->experts + e];
    bool resident = true;
    for (uint32_t i = 0; i < part.count; i++) {
        uint32_t page = view->pages[part.first + i];
        if (page == PAGE_NONE)
            resident = false;
        else if (a->page_used)
            a->page_used[page] = 1;
    }
    return resident;
}

// Experts whose pairs want parts that are not there: state 2 too. mark: what the experts in state 2
// want.
static void parts_look(const struct moe_map_args *a, bool mark)
{
    const struct moe_work *w = &a->work;
    const struct lora_batch *b = a->lora;
    for (uint32_t row = 0, last; row < a->rows; row = last) {
        const struct lora_adapter_view *view = cpu__lora_view(b, row, &last);
        last = last < a->rows ? last : a->rows;
        if (!view || !view->parts)
            continue;
        size_t segment = cpu__lora_segment(b, row);
        for (uint32_t p = row * a->top_k; p < last * a->top_k; p++) {
            uint32_t e = w->expert[p];
            if (mark && w->state[e] == 2 && view->parts[a->layer * view->experts + e].count)
                a->part_wanted[segment * a->view.experts + e] = 1;
            else if (!mark && w->state[e] != 3 && w->state[e] && !part_resident(a, view, e))
                w->state[e] = 2;
        }
    }
}

static void map_task(struct cpu_stream *s, struct slot *slot, struct command *c, uint32_t task)
{
    (void)slot;
    (void)task;
    const struct moe_map_args *a = &c->a.map;
    const struct moe_work *w = &a->work;
    if (!a->resume)
        pairs_sort(s, a);
    for (uint32_t e = 0; e < a->view.experts; e++) {
        bool mine = expert_is_mine(&a->mine, e);
        uint32_t pairs = mine ? w->begin[e + 1] - w->begin[e] : 0;
        if (a->need)
            a->need[e] = pairs;
        if (pairs && w->state[e] != 3)
            w->state[e] = expert_resident(&a->view, e) ? 1 : 2;
    }
    if (a->lora && a->lora->segments)
        parts_look(a, false);
    for (uint32_t e = 0; e < a->view.experts; e++) {
        if (w->state[e] == 2) {
            s->missed = true;
            s->miss_layer = a->layer;
        }
        if (a->host_state)
            a->host_state[e] = w->state[e];
    }
    if (a->lora && a->lora->segments && s->missed)
        parts_look(a, true);
}

static const struct operation map_operation = {.task = map_task, .fence = true};

void cpu__moe_map(struct stream *s, const struct moe_map_args *a)
{
    CHECK(a->view.experts && a->view.experts <= EXPERTS_MAX);
    CHECK((uint64_t)a->rows * a->top_k < UINT32_MAX);
    CHECK(!a->lora || a->part_wanted);
    struct command *c = cpu__record(s, &map_operation, 1);
    c->a.map = *a;
    cpu__record_end(s, c);
}

static void combine_task(struct cpu_stream *s, struct slot *slot, struct command *c, uint32_t task)
{
    (void)slot;
    const struct moe_combine_args *a = &c->a.combine;
    size_t row = task / c->split, first = (size_t)(task % c->split) * COLUMNS_CHUNK;
    size_t cols = min_size(COLUMNS_CHUNK, a->dim - first);
    float *y = a->y + row * a->dim + first;
    for (size_t i = 0; a->replace && i < cols; i++)
        y[i] = 0;
    for (uint32_t k = 0; k < a->top_k; k++) {
        size_t pair = row * a->top_k + k;
        if (!expert_is_mine(&a->mine, a->work.expert[pair]))
            continue;
        cpu__micro(s)->axpy(y, a->work.out + pair * a->dim + first, a->work.gate[pair], cols);
    }
}

static const struct operation combine_operation = {.task = combine_task};

void cpu__moe_combine(struct stream *s, const struct moe_combine_args *a)
{
    if (!a->rows || !a->dim)
        return;
    uint32_t chunks = (uint32_t)div_up(a->dim, COLUMNS_CHUNK);
    struct command *c = cpu__record(s, &combine_operation, a->rows * chunks);
    c->a.combine = *a;
    c->split = chunks;
    size_t row_bytes = (size_t)a->dim * sizeof(float);
    cpu__reads(c, a->work.out, (size_t)a->rows * a->top_k * row_bytes, 0, 1);
    cpu__reads(c, a->work.gate, (size_t)a->rows * a->top_k * sizeof(float), 0, 1);
    cpu__reads(c, a->work.expert, (size_t)a->rows * a->top_k * sizeof(uint32_t), 0, 1);
    cpu__writes(c, a->y, a->rows * row_bytes, 0, 1);
    cpu__record_end(s, c);
}
