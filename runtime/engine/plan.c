// SPDX-License-Identifier: Apache-2.0
// Policy of the step: pure functions over numbers, see plan.h. The order within a step is (class,
// arrival); weights within a class come with quotas.
//
// Why decode rows go first: a decode row costs one row of budget and ends a wait that a customer
// sees; a prefill chunk can be cut to what is left. Sarathi-Serve (OSDI'24) calls this stall-free
// batching. But decode rows of less urgent classes never crowd out the prefill of the most urgent
// one.
#include "runtime/engine/plan.h"

#include <stdio.h>

#include "base/sort.h"

static int compare_candidates(const void *a, const void *b)
{
    const struct plan_candidate *x = a, *y = b;
    if (x->class != y->class)
        return x->class < y->class ? -1 : 1;
    if (x->arrival != y->arrival)
        return x->arrival < y->arrival ? -1 : 1;
    return 0;
}

static struct plan_run run_of(const struct plan_candidate *c, uint32_t count)
{
    return (struct plan_run){.slot = c->slot,
                             .class = c->class,
                             .tenant = c->tenant,
                             .adapter = c->adapter,
                             .position = c->position,
                             .count = count,
                             .samples = count == c->pending};
}

// What the prefills of the most urgent class must find left over by decode rows of less urgent
// ones: a run each, and rows up to half of the budget.
struct kept {
    uint32_t runs, rows;
};

static struct kept keep_for_prefill(const struct plan_candidate *candidates, uint32_t count,
                                    uint32_t class, uint32_t rows_max)
{
    struct kept kept = {0};
    uint32_t half = (rows_max + 1) / 2;
    for (uint32_t i = 0; i < count && candidates[i].class <= class; i++) {
        uint32_t pending = candidates[i].pending;
        if (pending < 2)
            continue;
        kept.runs++;
        kept.rows = pending < half - kept.rows ? kept.rows + pending : half;
    }
    return kept;
}

static uint32_t most_urgent(const struct plan_candidate *candidates, uint32_t count)
{
    for (uint32_t i = 0; i < count; i++) {
        if (candidates[i].pending)
            return candidates[i].class;
    }
    return UINT32_MAX;
}

uint32_t plan_choose(struct plan_candidate *candidates, uint32_t count,
                     const struct plan_limits *limits, struct plan_run *out)
{
    if (!count)
        return 0;
    sort_in_place(candidates, count, sizeof *candidates, compare_candidates);
    uint32_t runs = 0, left = limits->rows_max, class = most_urgent(candidates, count);
    struct kept kept = keep_for_prefill(candidates, count, class, limits->rows_max);
    for (uint32_t i = 0; i < count && runs < limits->runs_max && left; i++) {
        const struct plan_candidate *c = &candidates[i];
        if (c->class >= limits->class_below || c->pending != 1)
            continue;
        if (c->class > class && (runs + kept.runs >= limits->runs_max || left <= kept.rows))
            break;
        out[runs++] = run_of(c, 1);
        left--;
    }
    uint32_t less_urgent = limits->less_urgent_prefill_max;
    for (uint32_t i = 0; i < count && runs < limits->runs_max && left; i++) {
        const struct plan_candidate *c = &candidates[i];
        if (c->class >= limits->class_below || c->pending < 2)
            continue;
        uint32_t room = c->class > class && less_urgent < left ? less_urgent : left;
        uint32_t chunk = c->pending < room ? c->pending : room;
        if (!chunk)
            continue;
        out[runs++] = run_of(c, chunk);
        left -= chunk;
        if (c->class > class)
            less_urgent -= chunk;
    }
    return runs;
}

static int compare_adapters(const void *a, const void *b)
{
    const struct plan_run *x = a, *y = b;
    if (x->adapter != y->adapter)
        return x->adapter < y->adapter ? -1 : 1;
    return x->row < y->row ? -1 : x->row > y->row;
}

void plan_layout(struct plan_run *runs, uint32_t count, struct step_plan *plan)
{
    for (uint32_t i = 0; i < count; i++)
        runs[i].row = i; // breaks ties: the order of choice is kept
    if (count)
        sort_in_place(runs, count, sizeof *runs, compare_adapters);
    plan->runs = count;
    plan->rows = plan->samples = plan->lora_segments = 0;
    plan->class = UINT32_MAX;
    for (uint32_t i = 0; i < count; i++) {
        runs[i].row = plan->rows;
        plan->rows += runs[i].count;
        plan->samples += runs[i].samples;
        plan->lora_segments += i == 0 || runs[i].adapter != runs[i - 1].adapter;
        if (runs[i].class < plan->class)
            plan->class = runs[i].class;
    }
}

bool plan_should_leave(const struct plan_leave_inputs *inputs)
{
    return inputs->forced || inputs->waiting_class < inputs->step_class;
}

size_t plan_print(const struct step_plan *plan, const struct plan_run *runs, char *out, size_t room)
{
    size_t n = 0;
    n += (size_t)snprintf(out, room, "step %llu class %u rows %u runs %u samples %u adapters %u",
                          (unsigned long long)plan->step, plan->class, plan->rows, plan->runs,
                          plan->samples, plan->lora_segments);
    for (uint32_t i = 0; i < plan->runs; i++) {
        const struct plan_run *r = &runs[i];
        n += (size_t)snprintf(n < room ? out + n : NULL, n < room ? room - n : 0,
                              " | slot %u tenant %u class %u adapter %d pos %u+%u%s", r->slot,
                              r->tenant, r->class,
                              r->adapter == PLAN_NO_ADAPTER ? -1 : (int)r->adapter, r->position,
                              r->count, r->samples ? " sample" : "");
    }
    return n;
}
