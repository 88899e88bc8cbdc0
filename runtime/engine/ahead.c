// SPDX-License-Identifier: Apache-2.0
// Planning ahead: while step N runs its last segment, step N+1 is planned, so that the device has
// work again as soon as N retires, before the host has looked at what N sampled.
//
// N+1 is planned by the same function as every step (step_plan), with N's sequences standing where
// they will stand after N: positions are known, and so is whether an answer ends by length; the id
// of a sampled token is not. Its row is filled on the device: N's tokens lie in the result set that
// N wrote, and N+1's first segment begins with a scatter from there into its own token array,
// token[follow[i]] = sampled[i]. Samples that nobody follows go to a spare word behind the array.
//
//   N    |---- last segment ----|
//   host      plan N+1          | submit N+1, then N's text, events, ends | plan N+2 ...
//   N+1                         |---- first segment ----|
//
// A sequence that N's token ends (a stop, a NaN), or that was cancelled or is late by then, has
// surplus rows in N+1: they are computed and dropped, and its slot, KV and adapter are held until
// N+1 has retired; when N+1 has no other rows it is left at its next preemption point. What it
// would have cost to know before is a device that waits after every step.
//
// Not planned ahead, or given up before it was submitted:
//   - when somebody finds no room for its KV or its adapter: the way out is to send another
//     sequence out, which N holds. Nothing is sent out here; the plan after N does it.
//   - when N meets a miss: its experts get the pages first.
//   - when a request came meanwhile that can start at once or is more urgent.
#include "base/check.h"
#include "runtime/engine/internal.h"

// Where the sequences of the running step stand after it.
static void look_ahead(struct engine *e, const struct step *running)
{
    uint32_t samples = 0;
    uint64_t now = clock_now_us(&e->options.clock);
    for (uint32_t i = 0; i < running->plan.runs; i++) {
        const struct plan_run *run = &running->runs[i];
        struct sequence *s = &e->sequences[run->slot];
        s->ahead = (struct sequence_ahead){.computed = run->position + run->count,
                                           .samples = run->samples,
                                           .sample = run->samples ? samples++ : 0};
        bool ends = run->samples && s->generated + 1 >= s->max_tokens;
        s->ahead.goes_on =
            s->state == SEQUENCE_RUNNING && !ends && !s->paused && !sequence_is_over(s, now);
    }
}

void ahead_plan(struct engine *engine, struct step *running)
{
    CHECK(running == engine->current && running->state == STEP_FLIGHT);
    CHECK(engine->next.state == STEP_NONE && !engine->results.waiting);
    running->ahead_tried = true;
    if (engine->options.no_plan_ahead || engine->quit || engine->short_of_room)
        return;
    look_ahead(engine, running);
    engine->plans_ahead = true;
    bool planned = step_plan(engine);
    engine->plans_ahead = false;
    for (uint32_t i = 0; i < running->plan.runs; i++)
        engine->sequences[running->runs[i].slot].ahead.goes_on = false;
    if (planned && engine->short_of_room)
        ahead_drop(engine);
    engine->next_queued = engine->lists[SEQUENCE_QUEUED].count;
}

// A step whose rows are all surplus is not run to its end. True when it was given up.
bool ahead_give_up_surplus(struct engine *engine, struct step *step)
{
    for (uint32_t i = 0; i < step->plan.runs; i++) {
        if (engine->sequences[step->runs[i].slot].state == SEQUENCE_RUNNING)
            return false;
    }
    engine->counters.rows_surplus += step->plan.rows;
    step_release_rows(engine, step);
    return true;
}

void ahead_drop(struct engine *engine)
{
    struct step *next = &engine->next;
    if (next->state == STEP_NONE)
        return;
    step_release_runs(engine, next->runs, next->plan.runs);
    next->state = STEP_NONE;
    engine->counters.ahead_dropped++;
}

bool ahead_is_wanted(const struct engine *engine)
{
    const struct step *next = &engine->next;
    if (next->state == STEP_NONE)
        return false;
    bool came = !engine->next_queued && engine->lists[SEQUENCE_QUEUED].count;
    return !came && sequence_waiting_class(engine) >= next->plan.class;
}
