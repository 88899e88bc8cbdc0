// SPDX-License-Identifier: Apache-2.0
// The gate: a segment stopped at a MoE layer because experts were missing, or parts of adapters
// that its rows need for them; they are brought, then the segment is entered again there.
//
// The map says in expert_state which experts wait (2) and in part_wanted which adapters of the step
// have a part that one of them needs, there or not: all of these are held at once. An expert can be
// computed when its pages and all those parts are there. So parts are brought expert by expert, as
// far as they find room, and after them the experts whose parts are complete; the others wait for
// the next round. Where the parts of many leave no room for an expert they are let go and the first
// expert comes alone: what the plan keeps free for a step (its experts' floor, adapter_page_count
// of its adapters) suffices for one.
//
// Invariants: 1. what a gate holds is let go before the next gate of that layer and when the layer
// is done. 2. part_wanted is clear except between a miss and gate_bring.
#include <string.h>

#include "base/check.h"
#include "runtime/engine/internal.h"

void gate_let_go(struct engine *engine, uint32_t moe)
{
    experts_gate_done(engine->options.experts, moe);
    if (engine->options.adapters)
        adapters_gate_done(engine->options.adapters);
}

void gate_done(struct engine *engine, uint32_t from, uint32_t to)
{
    const struct model_config *c = &engine->options.model->config;
    for (uint32_t half = from | 1; half < to; half += 2) {
        uint32_t moe = engine->moe_index[half / 2];
        if (moe == NO_SLOT)
            continue;
        gate_let_go(engine, moe);
        experts_used(engine->options.experts, moe, engine->scratch.need + (size_t)moe * c->experts);
    }
}

// The sequences of a segment whose adapter was not there wait for it.
static void count_waits(struct engine *e, const struct step *step, uint32_t adapter)
{
    for (uint32_t i = 0; i < step->plan.runs; i++)
        if (step->runs[i].adapter == adapter)
            sequence_adapter_lacks(e, &e->sequences[step->runs[i].slot]);
}

// The parts of the step's adapters that one expert needs.
static enum status bring_parts(struct engine *e, const struct step *step, uint32_t expert)
{
    uint32_t experts = e->options.model->config.experts;
    for (uint32_t i = 0; i < step->lora.segments; i++) {
        uint32_t adapter = step->host.lora_adapter[i], started = 0;
        if (!e->scratch.part_wanted[(size_t)i * experts + expert])
            continue;
        enum status status =
            adapters_gate_bring(e->options.adapters, adapter, step->half / 2, expert,
                                (enum copy_class)step->plan.class, &started);
        if (started)
            count_waits(e, step, adapter);
        if (status)
            return status;
    }
    return STATUS_OK;
}

// In `state`: 2 for the missing experts, at most `most`, whose parts are complete or on their way.
static enum status bring_all_parts(struct engine *e, const struct step *step, uint32_t most,
                                   uint8_t *state)
{
    enum status status = STATUS_OK;
    uint32_t complete = 0;
    for (uint32_t x = 0; x < e->options.model->config.experts; x++) {
        bool waits = e->scratch.expert_state[x] == 2;
        if (waits && !status && complete < most)
            status = step->has_parts ? bring_parts(e, step, x) : STATUS_OK;
        state[x] = waits && !status && complete < most ? 2 : 0;
        complete += state[x] == 2;
    }
    return complete && status == STATUS_FULL ? STATUS_OK : status;
}

static enum status bring(struct engine *e, const struct step *step, uint32_t *started)
{
    uint32_t moe = e->moe_index[step->half / 2];
    uint8_t *state = e->scratch.gate_state;
    enum status status = bring_all_parts(e, step, e->gate_alone ? 1 : UINT32_MAX, state);
    if (!status)
        status = experts_gate_bring(e->options.experts, moe, state,
                                    (enum copy_class)step->plan.class, started);
    e->gate_alone = step->has_parts && status == STATUS_FULL && !*started;
    if (e->gate_alone)
        gate_let_go(e, moe);
    return status;
}

void gate_bring(struct engine *engine, struct step *step)
{
    uint32_t started = 0;
    bool was_alone = engine->gate_alone;
    enum status status = bring(engine, step, &started);
    if (step->has_parts)
        memset(engine->scratch.part_wanted, 0,
               (size_t)step->lora.segments * engine->options.model->config.experts);
    bool may_come = started || !copy_is_idle(engine->options.copies) ||
                    (step->has_parts && !was_alone); // then alone
    if (!status || (status == STATUS_FULL && may_come))
        return;
    gate_let_go(engine, engine->moe_index[step->half / 2]);
    if (status == STATUS_FULL)
        step_fail(engine, step, status,
                  "No pool pages are left for an expert; raise --pool-bytes.");
    else
        step_fail(engine, step, status, "An expert could not be brought in.");
}

// Adapters of which a page could not be read: their rows go on as rows of the base model. What
// comes of them is thrown away (output.c), nobody else's rows change.
static void leave_broken(struct engine *e, struct step *step)
{
    for (uint32_t i = 0; i < step->lora.segments; i++) {
        uint32_t *adapter = &step->host.lora_adapter[i];
        if (*adapter == PLAN_NO_ADAPTER || !adapters_view_is_broken(e->options.adapters, *adapter))
            continue;
        *adapter = PLAN_NO_ADAPTER;
        step->places_changed = true;
    }
}

bool gate_advance(struct engine *engine, struct step *step)
{
    uint32_t moe = engine->moe_index[step->half / 2];
    enum status status = STATUS_OK, parts = STATUS_OK;
    if (!experts_gate_ready(engine->options.experts, moe, &status))
        return false;
    if (step->has_parts && !adapters_gate_ready(engine->options.adapters, &parts))
        return false;
    for (uint32_t i = 0; step->has_parts && i < step->plan.runs; i++)
        sequence_adapter_came(engine, &engine->sequences[step->runs[i].slot]);
    if (status || parts) {
        gate_let_go(engine, moe);
        step_fail(engine, step, status ? status : parts,
                  status ? "Reading an expert from its store failed."
                         : "No host pages are left for an adapter; raise --host-bytes.");
        return true;
    }
    if (step->has_parts)
        leave_broken(engine, step);
    step->resume_gate = true;
    step->state = STEP_READY;
    return true;
}
