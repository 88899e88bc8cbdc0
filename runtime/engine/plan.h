// SPDX-License-Identifier: Apache-2.0
// The step plan: what one step will do, as a plain printable struct without pointers, and the pure
// function that chooses it (DESIGN.md 6). No state, no clock: the same numbers give the same plan.
#ifndef POLDER_RUNTIME_ENGINE_PLAN_H
#define POLDER_RUNTIME_ENGINE_PLAN_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

enum { PLAN_NO_ADAPTER = 0xffffffff };

// A sequence that could have rows in the next step.
struct plan_candidate {
    uint32_t slot;    // sequence slot
    uint32_t class;   // 0 most urgent
    uint64_t arrival; // order of arrival, smaller first
    uint32_t tenant;
    uint32_t position; // first position to compute
    uint32_t pending;  // tokens known but not computed; 1: a decode row
    uint32_t adapter;  // view index or PLAN_NO_ADAPTER
};

// One run of consecutive positions of one sequence.
struct plan_run {
    uint32_t slot, class, tenant, adapter;
    uint32_t position, count;
    uint32_t row; // first row in the step
    bool samples; // its last row is the last known token: sample after it
};

struct plan_limits {
    uint32_t rows_max;    // token budget of a step
    uint32_t runs_max;    // sequences in a step
    uint32_t class_below; // only classes < class_below may run (a paused step holds the others)
    uint32_t
        less_urgent_prefill_max; // prefill rows of a class less urgent than the step's, together
};

struct step_plan {
    uint64_t step;
    uint32_t class; // the most urgent class among its rows
    uint32_t rows, runs, samples;
    uint32_t lora_segments; // runs of rows of one adapter, base included
};

// Sorts candidates by (class, arrival) in place, then picks decode rows in that order, then prefill
// chunks in that order until the budget is spent. Decode rows of less urgent classes leave the
// prefills of the most urgent one a run each and up to half of the budget. Writes at most
// limits->runs_max runs; row numbers are not assigned yet. Returns the number of runs.
uint32_t plan_choose(struct plan_candidate *candidates, uint32_t count,
                     const struct plan_limits *limits, struct plan_run *out);

// Orders runs by adapter (stable), assigns rows and fills the totals of *plan.
void plan_layout(struct plan_run *runs, uint32_t count, struct step_plan *plan);

// At a preemption point: leave the running step? Inputs are logged by the caller.
struct plan_leave_inputs {
    uint32_t step_class;
    uint32_t waiting_class; // most urgent class with runnable work outside the step, or UINT32_MAX
    bool forced;            // test hook
};
bool plan_should_leave(const struct plan_leave_inputs *inputs);

// Text form for --trace-plan; returns the length that was needed.
size_t plan_print(const struct step_plan *plan, const struct plan_run *runs, char *out,
                  size_t room);

#endif
