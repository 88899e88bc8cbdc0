// SPDX-License-Identifier: Apache-2.0
// Steps: planning the next one, and the state machine that runs it.
//
//   NONE -planned in engine->next, entered-> READY -submit-> FLIGHT -retired-> READY (more halves)
//   | PAUSED (left at a preemption point) | GATE (experts are missing) | NONE (all halves done:
//   what it sampled stands in engine->results until it has gone out) GATE -experts there-> READY
//   (re-enters at the gate);  PAUSED -resume-> READY
//
// A step is planned between two steps or, as a rule, while the one before runs its last segment
// (ahead.c); then it is submitted as soon as that has retired, before the results go out.
//
// Invariants: 1. at most one step is current; a paused one is of a less urgent class than every
// step that runs meanwhile. 2. a segment in flight holds one pool epoch; copies of KV blocks that
// wait for the next segment hold another. 3. a step that is not PAUSED pins the KV and the adapters
// of its rows, and so do waiting results; a paused one pins the KV, and adapters from when they
// arrive for its resuming. 4. a half-layer is computed once. 5. while results wait, at most the
// first segment of the step after is submitted.
#include <string.h>

#include "base/check.h"
#include "base/log.h"
#include "runtime/engine/internal.h"

enum { SEGMENT_TARGET_US = 1500 };

struct step *step_paused_most_urgent(struct engine *engine)
{
    for (int class = 0; class < ENGINE_CLASSES; class ++) {
        if (engine->steps[class].state == STEP_PAUSED)
            return &engine->steps[class];
    }
    return NULL;
}

// ---- planning ----

static void unpin_adapter(struct engine *e, struct sequence *s)
{
    if (s->adapter_pinned)
        adapter_unpin(e->options.adapters, s->adapter);
    s->adapter_pinned = false;
}

// What the runs secured so far hold: they stand in engine->runs[0 .. kept).
struct secured {
    uint32_t kept, adapter_pages; // of distinct adapters
    uint32_t awaited;             // what runs before wait for: nobody behind them may take it
    uint32_t beside;              // of the running step's adapters
    bool lacking;                 // some run lacks something (bring_adapters)
};

static bool holds_adapter(const struct engine *e, const struct secured *held, adapter_id adapter)
{
    for (uint32_t i = 0; i < held->kept; i++) {
        const struct sequence *s = &e->sequences[e->runs[i].slot];
        if (s->has_adapter && s->adapter.bits == adapter.bits)
            return true;
    }
    return false;
}

// Does a sequence before this one wait for the same adapter in this plan?
static bool is_awaited(const struct engine *e, uint32_t slot)
{
    const struct sequence *s = &e->sequences[slot];
    for (uint32_t i = s->previous; i != NO_SLOT; i = e->sequences[i].previous) {
        const struct sequence *before = &e->sequences[i];
        if (before->lacks == LACKS_ADAPTER && before->adapter.bits == s->adapter.bits)
            return true;
    }
    return false;
}

// The adapter is fetched when all runs of the plan have pinned theirs (bring_adapters), so that it
// does not push out one that a run behind is about to use.
static void await_adapter(struct engine *e, struct secured *held, uint32_t slot, uint32_t more)
{
    struct sequence *s = &e->sequences[slot];
    if (adapter_fetch_status(e->options.adapters, s->adapter) == STATUS_IO) {
        sequence_end(e, slot, STATUS_IO, ENGINE_FINISH_ERROR,
                     "Reading the adapter from its store failed; ask the operator.");
        return;
    }
    sequence_adapter_lacks(e, s);
    sequence_want(e, slot, more + e->options.kv_shape.pages_per_block);
    held->awaited += is_awaited(e, slot) ? 0 : more;
    s->lacks = LACKS_ADAPTER;
    held->lacking = true;
}

// Of what this run adds, what the running step holds already (it stands in held->beside).
static uint32_t held_beside(const struct engine *e, const struct sequence *s, uint32_t more)
{
    if (!more || !e->plans_ahead)
        return 0;
    if (s->in_steps) // as most are: in the running step itself
        return more;
    for (uint32_t i = 0; i < e->current->plan.runs; i++) {
        const struct sequence *other = &e->sequences[e->current->runs[i].slot];
        if (other->has_adapter && other->adapter_pinned && other->adapter.bits == s->adapter.bits)
            return more;
    }
    return 0;
}

// *more: the pages that the adapter adds to the step.
static bool pin_adapter(struct engine *e, struct secured *held, uint32_t slot, uint32_t *more)
{
    struct sequence *s = &e->sequences[slot];
    struct adapters *adapters = e->options.adapters;
    if (!holds_adapter(e, held, s->adapter))
        *more = sequence_adapter_pages(e, true, s->adapter);
    uint32_t pages = held->beside + held->adapter_pages + *more - held_beside(e, s, *more);
    if (!sequence_pages_allow(e, pages)) {
        (void)sequence_make_room(e, slot, *more + e->options.kv_shape.pages_per_block);
        return false;
    }
    pages += held->awaited;
    if (!sequence_adapters_allow(e, pages) || !sequence_pages_allow(e, pages))
        return false; // a later step has room for it
    if (!s->adapter_pinned && !adapter_is_resident(adapters, s->adapter)) {
        await_adapter(e, held, slot, *more);
        return false;
    }
    sequence_adapter_came(e, s);
    if (!s->adapter_pinned) // by the running step
        adapter_pin(adapters, s->adapter);
    s->adapter_pinned = true;
    adapter_used(adapters, s->adapter);
    return true;
}

// See struct block_copies.
static void copy_block(void *context, void *to, const void *from, size_t bytes)
{
    struct engine *e = context;
    struct block_copies *c = &e->copies;
    CHECK(c->count < c->room);
    if (!c->count)
        c->epoch = pool_epoch_open(e->options.pool);
    c->list[c->count++] = (struct block_copy){to, from, bytes};
}

static void record_copies(struct engine *e)
{
    struct block_copies *c = &e->copies;
    CHECK(!c->in_flight);
    for (uint32_t i = 0; i < c->count; i++)
        e->table->copy(e->stream, c->list[i].to, c->list[i].from, c->list[i].bytes);
    c->in_flight = c->count;
    c->flight_epoch = c->epoch;
    c->count = 0;
}

static void copies_retired(struct engine *e)
{
    if (e->copies.in_flight)
        pool_epoch_retire(e->options.pool, e->copies.flight_epoch);
    e->copies.in_flight = false;
}

void step_run_copies(struct engine *engine)
{
    struct segment_result result;
    if (!engine->copies.count)
        return;
    record_copies(engine);
    enum status status = engine->table->submit(engine->stream);
    if (!status)
        status = engine->table->wait(engine->stream, &result);
    copies_retired(engine);
    if (status) {
        log_line(LOG_ERROR, "copying KV blocks failed: %s", status_sentence(status));
        engine->broken = engine->quit = engine->draining = true; // see device_failed
    }
}

// Device pages that positions [0, tokens) need beyond what the sequence has.
static uint32_t more_pages(const struct engine *e, const struct sequence *s, uint32_t tokens)
{
    const struct kv_shape *shape = &e->options.kv_shape;
    uint32_t known = s->reserved > s->computed ? s->reserved : s->computed;
    if (tokens <= known)
        return 0;
    return (uint32_t)(div_up(tokens, shape->block_tokens) - div_up(known, shape->block_tokens)) *
           shape->pages_per_block;
}

// Pages and pins for one run; false leaves nothing pinned.
static bool secure(struct engine *e, const struct plan_run *run, struct secured *held)
{
    struct sequence *s = &e->sequences[run->slot];
    uint32_t adapter_pages = 0, tokens = run->position + run->count;
    if (s->state != SEQUENCE_RUNNING) // it has just made room for a run before it
        return false;
    if (s->has_adapter && !pin_adapter(e, held, run->slot, &adapter_pages))
        return false;
    uint32_t twice = s->has_adapter ? held_beside(e, s, adapter_pages) : 0;
    adapter_pages += held->adapter_pages;
    uint32_t beside = held->beside - twice + adapter_pages;
    uint32_t spare = e->plans_ahead ? e->options.kv_shape.pages_per_block : 0; // see below
    struct kv_copier copier = {.copy = copy_block, .context = e};
    enum status status = STATUS_FULL;
    if (sequence_pages_allow(e, beside + spare + more_pages(e, s, tokens)))
        status = kv_reserve(e->options.kv, s->kv, tokens, &copier);
    if (!status)
        s->reserved = tokens;
    // Copy-on-write may have taken a block more than was counted; while a step runs nobody could be
    // sent out for it.
    if (status || !sequence_pages_allow(e, beside)) {
        if (!s->in_steps && s->has_adapter) { // pinned until those behind it have fetched theirs
            held->awaited += adapter_pages - held->adapter_pages;
            s->lacks = LACKS_ROOM;
            held->lacking = true;
        }
        held->awaited += more_pages(e, s, tokens);
        if (!e->plans_ahead) // it may have to leave before the next segment, with what they bring
            step_run_copies(e);
        (void)sequence_make_room(e, run->slot, adapter_pages + more_pages(e, s, tokens));
        return false;
    }
    kv_pin(e->options.kv, s->kv);
    s->in_steps++;
    held->adapter_pages = adapter_pages;
    held->beside -= twice;
    held->kept++;
    return true;
}

static void fill_rows(struct engine *e, struct step *step, const struct plan_run *run,
                      uint32_t index, uint32_t *samples)
{
    struct sequence *s = &e->sequences[run->slot];
    uint32_t sampled = s->ahead.goes_on && s->ahead.samples; // one more than the host knows
    for (uint32_t i = 0; i < run->count; i++) {
        uint32_t at = run->position + i, row = run->row + i;
        step->host.position[row] = at;
        step->host.sequence[row] = index;
        step->host.token[row] = at < s->length ? s->tokens[at] : 0;
        if (at >= s->length)
            step->host.follow[s->ahead.sample] = row;
    }
    if (run->samples) {
        step->host.gather[*samples] = run->row + run->count - 1;
        step->host.sample[*samples] = s->sampling;
        step->host.sample[*samples].counter = s->generated + sampled;
        step->tops = s->tops > step->tops ? s->tops : step->tops;
        (*samples)++;
    }
}

// The arrays that name pages and adapters: looked up again each time the step is entered.
static void fill_places(struct engine *e, struct step *step)
{
    const struct engine_options *o = &e->options;
    uint32_t blocks = (uint32_t)div_up(o->context_max, o->kv_shape.block_tokens), segment = 0;
    uint32_t modules = 0, rank_max = 0, samples = 0;
    step->has_parts = false;
    for (uint32_t i = 0; i < step->plan.runs; i++) {
        const struct plan_run *run = &step->runs[i];
        const struct sequence *s = &e->sequences[run->slot];
        kv_fill_pages(o->kv, s->kv,
                      step->host.pages + (size_t)i * blocks * o->kv_shape.pages_per_block, blocks);
        samples += run->samples;
        if (i && run->adapter == step->runs[i - 1].adapter)
            continue;
        step->host.lora_row[segment] = run->row;
        step->host.lora_sample[segment] = samples - run->samples;
        step->host.lora_adapter[segment++] = run->adapter;
        if (!s->has_adapter)
            continue;
        for (uint32_t m = 0; m < LORA_MODULES_ALL; m++)
            modules |= (uint32_t)adapter_has_module(o->adapters, s->adapter, m) << m;
        step->has_parts |= adapter_has_parts(o->adapters, s->adapter);
        uint32_t rank = adapter_rank_max(o->adapters, s->adapter);
        rank_max = rank > rank_max ? rank : rank_max;
    }
    step->host.lora_row[segment] = step->plan.rows;
    step->host.lora_sample[segment] = samples;
    step->places_changed = true;
    step->lora_modules = modules;
    step->lora = (struct lora_batch){.arena = o->arena,
                                     .page_bytes = o->page_bytes,
                                     .segments = segment,
                                     .rows = step->plan.rows,
                                     .row_begin = step->device.lora_row,
                                     .adapter = step->device.lora_adapter,
                                     .adapters = o->adapters ? adapters_views(o->adapters) : NULL,
                                     .rank_max = rank_max};
    // The same segments; those without a sample are empty.
    step->lora_head = step->lora;
    step->lora_head.rows = samples;
    step->lora_head.row_begin = step->device.lora_sample;
}

static void fill_step(struct engine *e, struct step *step)
{
    uint32_t samples = 0;
    step->tops = 0;
    step->followed = e->plans_ahead ? e->current->plan.samples : 0;
    for (uint32_t i = 0; i < step->followed; i++)
        step->host.follow[i] = e->options.rows_max; // to nobody
    for (uint32_t i = 0; i < step->plan.runs; i++)
        fill_rows(e, step, &step->runs[i], i, &samples);
    CHECK(samples == step->plan.samples);
    step->half = 0;
    step->halves_run = 0;
    step->resume_gate = step->segment_head = step->ahead_tried = false;
    step->state = STEP_READY;
}

// After the pins: the adapters that runs lack are fetched, and what was pinned for those that found
// no room is let go.
static void bring_adapters(struct engine *e)
{
    struct adapters *adapters = e->options.adapters;
    for (uint32_t slot = e->lists[SEQUENCE_RUNNING].head; slot != NO_SLOT;
         slot = e->sequences[slot].next) {
        struct sequence *s = &e->sequences[slot];
        if (s->lacks == LACKS_ADAPTER &&
            adapter_fetch(adapters, s->adapter, (enum copy_class)s->class, COPY_ADAPTER))
            break; // no room: those behind it have to leave it theirs, until the next plan
    }
    for (uint32_t slot = 0; slot < e->sequence_slots; slot++) {
        struct sequence *s = &e->sequences[slot];
        if (s->lacks == LACKS_ROOM && !s->in_steps)
            unpin_adapter(e, s);
        s->lacks = LACKS_NOTHING;
    }
}

// The pages and pins of what was chosen; false when nobody can run.
static bool secure_runs(struct engine *e, struct plan_run *runs, uint32_t chosen,
                        struct secured *held)
{
    for (uint32_t i = 0; i < chosen && !(e->plans_ahead && e->short_of_room); i++) {
        struct plan_run run = runs[i];
        if (secure(e, &run, held))
            runs[held->kept - 1] = run;
    }
    if (held->lacking)
        bring_adapters(e);
    return held->kept;
}

bool step_plan(struct engine *engine)
{
    const struct step *paused = step_paused_most_urgent(engine);
    struct step *step = &engine->next;
    engine->want = engine->want_next;
    engine->want_next.slot = NO_SLOT;
    engine->short_of_room = false;
    sequence_bring_back(engine);
    sequence_admit(engine);
    uint32_t count = sequence_candidates(engine);
    struct plan_limits limits = {.rows_max = engine->options.rows_max,
                                 .runs_max = engine->options.sequences_max,
                                 .class_below = paused ? paused->plan.class : ENGINE_CLASSES,
                                 .less_urgent_prefill_max = (engine->options.rows_max + 3) / 4};
    uint32_t chosen = plan_choose(engine->candidates, count, &limits, engine->runs);
    struct secured held = {.beside = engine->plans_ahead ? engine->current->adapter_pages : 0};
    if (!secure_runs(engine, engine->runs, chosen, &held))
        return false;
    plan_layout(engine->runs, held.kept, &step->plan);
    const struct step *place = &engine->steps[step->plan.class];
    step->device = place->device;
    step->block.device = place->block.device;
    step->x = place->x;
    step->adapter_pages = held.adapter_pages;
    memcpy(step->runs, engine->runs, held.kept * sizeof *step->runs);
    fill_step(engine, step);
    fill_places(engine, step);
    return true;
}

static void trace(struct engine *e, const struct step *step)
{
    if (!e->options.trace)
        return;
    (void)plan_print(&step->plan, step->runs, e->line, e->line_bytes);
    e->options.trace(e->options.trace_context, e->line);
}

void step_enter(struct engine *engine)
{
    struct step *step = &engine->steps[engine->next.plan.class], unused = *step;
    CHECK(step->state == STEP_NONE && engine->next.state == STEP_READY && !engine->current);
    *step = engine->next;
    engine->next = unused;
    step->plan.step = engine->steps_made++;
    step->result_set = engine->results.waiting ? 1 - engine->results.set : 0;
    step->started_us = clock_now_us(&engine->options.clock);
    for (uint32_t i = 0; i < step->plan.runs; i++) {
        const struct plan_run *run = &step->runs[i];
        const struct sequence *s = &engine->sequences[run->slot];
        for (uint32_t p = run->position; p < run->position + run->count; p++)
            engine->counters.rows_recomputed += p < s->high_water;
    }
    trace(engine, step);
    engine->current = step;
    engine->counters.steps++;
}

// ---- pins ----

static void unpin_adapters(struct engine *e, struct step *step)
{
    for (uint32_t i = 0; i < step->plan.runs; i++)
        unpin_adapter(e, &e->sequences[step->runs[i].slot]);
}

void step_release_runs(struct engine *engine, const struct plan_run *runs, uint32_t count)
{
    for (uint32_t i = 0; i < count; i++) {
        struct sequence *s = &engine->sequences[runs[i].slot];
        kv_unpin(engine->options.kv, s->kv);
        CHECK(s->in_steps);
        s->in_steps--;
        if (!s->in_steps)
            unpin_adapter(engine, s);
        sequence_leave_step(engine, runs[i].slot);
    }
}

void step_release_rows(struct engine *engine, struct step *step)
{
    if (engine->options.adapters && engine->current == step)
        adapters_gate_done(engine->options.adapters);
    step_release_runs(engine, step->runs, step->plan.runs);
    step->state = STEP_NONE;
    if (engine->current == step)
        engine->current = NULL;
}

void step_fail(struct engine *e, struct step *step, enum status status, const char *message)
{
    log_line(LOG_ERROR, "step %llu failed: %s", (unsigned long long)step->plan.step, message);
    ahead_drop(e);
    step_release_rows(e, step);
    for (uint32_t i = 0; i < step->plan.runs; i++) {
        uint32_t slot = step->runs[i].slot;
        if (e->sequences[slot].state == SEQUENCE_RUNNING) // others ended before: surplus rows
            sequence_end(e, slot, status, ENGINE_FINISH_ERROR, message);
    }
}

// Nothing on the device can be relied on any more, page tables and cached KV included: the engine
// ends all requests and stops; a new process heals.
static void device_failed(struct engine *e, struct step *step, enum status status,
                          const char *message)
{
    step_fail(e, step, status, message);
    e->broken = e->quit = e->draining = true;
}

static void pause(struct engine *e, struct step *step)
{
    unpin_adapters(e, step);
    step->state = STEP_PAUSED;
    e->current = NULL;
    e->counters.pauses++;
}

// Enters a paused step again when its adapters are there; those that are wait for the others.
static bool resume(struct engine *e, struct step *step)
{
    struct adapters *adapters = e->options.adapters;
    bool ready = true;
    for (uint32_t i = 0; i < step->plan.runs; i++) {
        struct sequence *s = &e->sequences[step->runs[i].slot];
        if (!s->has_adapter || s->adapter_pinned)
            continue;
        if (adapter_is_resident(adapters, s->adapter)) {
            adapter_pin(adapters, s->adapter);
            s->adapter_pinned = true;
            step->runs[i].adapter = adapter_view_index(adapters, s->adapter);
            continue;
        }
        ready = false;
        if (adapter_fetch_status(adapters, s->adapter) == STATUS_IO) {
            step_fail(e, step, STATUS_IO, "Reading an adapter from its store failed.");
            return true;
        }
        if (adapter_fetch(adapters, s->adapter, (enum copy_class)step->plan.class, COPY_GATE))
            return false;
    }
    if (!ready)
        return false;
    fill_places(e, step);
    step->state = STEP_READY;
    e->current = step;
    return true;
}

// ---- running ----

// All experts and all parts of the step's adapters are on the device: no gate will fire, so that
// several units may be sent at once.
static bool nothing_can_miss(const struct engine *e, const struct step *step)
{
    struct expert_stats stats = {0};
    for (uint32_t i = 0; step->has_parts && i < step->plan.runs; i++) {
        const struct sequence *s = &e->sequences[step->runs[i].slot];
        if (s->has_adapter && !adapter_is_whole(e->options.adapters, s->adapter))
            return false;
    }
    if (e->options.experts)
        experts_stats(e->options.experts, &stats);
    return stats.resident == stats.total;
}

static uint32_t segment_length(const struct engine *e, const struct step *step)
{
    if (e->options.force_leave)
        return 1;
    if (step->plan.class == ENGINE_INTERACTIVE) // nobody may overtake it
        return nothing_can_miss(e, step) ? 2 * e->options.model->config.layers
                                         : e->options.segment_halves_max;
    if (sequence_waiting_class(e) < step->plan.class)
        return 1; // it is left at the next preemption point
    float half_us = e->half_us_per_row * (float)step->plan.rows;
    float halves = half_us > 0 ? (float)SEGMENT_TARGET_US / half_us : 1.0f;
    uint32_t n = halves >= (float)e->options.segment_halves_max ? e->options.segment_halves_max
                                                                : (uint32_t)halves;
    return n ? n : 1;
}

// Half-layers of the unit that begins at `half`: whole units begin at multiples of the longest
// segment, so that few different ones are ever captured; what lies between is taken one by one.
static uint32_t unit_length(const struct engine *e, uint32_t half, uint32_t end)
{
    uint32_t whole = e->options.segment_halves_max, all = 2 * e->options.model->config.layers;
    if (half % whole == 0 && (half + whole <= end || end == all))
        return whole;
    return 1;
}

static enum status submit(struct engine *e, struct step *step)
{
    uint32_t halves = 2 * e->options.model->config.layers;
    uint32_t end = step->half + segment_length(e, step);
    step->segment_end = end < halves ? end : halves;
    record_copies(e);
    if (e->options.experts)
        experts_flush(e->options.experts, e->stream);
    if (e->options.adapters)
        adapters_flush(e->options.adapters, e->stream);
    if (step->has_parts && step->half == 0 && !step->resume_gate)
        adapters_record_used(e->options.adapters, e->stream);
    forward_begin(e, step);
    for (uint32_t h = step->half, unit_end = h; h < step->segment_end; h++) {
        if (h == unit_end) {
            if (h != step->half)
                e->table->unit(e->stream);
            unit_end = h + unit_length(e, h, step->segment_end);
        }
        forward_half(e, step, h, h == step->half && step->resume_gate);
    }
    step->segment_head = step->segment_end == halves && step->plan.samples;
    if (step->segment_head) {
        e->table->unit(e->stream);
        forward_head(e, step);
    }
    step->epoch = pool_epoch_open(e->options.pool);
    e->submitted_us = clock_now_us(&e->options.clock);
    step->state = STEP_FLIGHT;
    step->ahead_tried = step->segment_end < halves;
    e->counters.segments++;
    enum status status = e->table->submit(e->stream);
    e->counters.submit_us += clock_now_us(&e->options.clock) - e->submitted_us;
    return status;
}

void step_submit(struct engine *engine, struct step *step)
{
    if (!submit(engine, step))
        return;
    pool_epoch_retire(engine->options.pool, step->epoch);
    copies_retired(engine);
    if (engine->results.waiting)
        (void)output_results(engine); // the step before was sound
    device_failed(engine, step, STATUS_DEVICE, "The device refused a segment.");
}

static void at_preemption_point(struct engine *e, struct step *step)
{
    if (ahead_give_up_surplus(e, step))
        return;
    sequence_fetch_ahead(e, step->plan.class);
    struct plan_leave_inputs in = {.step_class = step->plan.class,
                                   .waiting_class = sequence_waiting_class(e)};
    if (e->options.force_leave)
        in.forced =
            e->options.force_leave(e->options.force_leave_context, step->plan.class, step->half);
    if (plan_should_leave(&in)) {
        log_line(LOG_DEBUG, "step %llu left at half %u: class %u, waiting %u%s",
                 (unsigned long long)step->plan.step, step->half, in.step_class, in.waiting_class,
                 in.forced ? ", forced" : "");
        pause(e, step);
    } else {
        step->state = STEP_READY;
    }
}

static void measure(struct engine *e, const struct step *step)
{
    uint64_t us = clock_now_us(&e->options.clock) - e->submitted_us;
    e->counters.flight_us += us;
    uint32_t halves = step->segment_end - step->half;
    float per = (float)us / (float)(halves * step->plan.rows);
    e->half_us_per_row = e->half_us_per_row > 0 ? 0.8f * e->half_us_per_row + 0.2f * per : per;
    // What a cached token costs to compute again, for the price of KV.
    kv_set_recompute(e->options.kv,
                     e->half_us_per_row * 2 * (float)e->options.model->config.layers);
}

// All halves are done: what was sampled waits to go out, and the next step, if it was planned
// ahead, starts first.
static void finished(struct engine *e, struct step *step)
{
    struct plan_run *runs = e->results.runs;
    CHECK(!e->results.waiting);
    if (e->options.adapters)
        adapters_step(e->options.adapters);
    e->results = (struct results){.waiting = true,
                                  .plan = step->plan,
                                  .runs = step->runs,
                                  .tops = step->tops,
                                  .halves_run = step->halves_run,
                                  .set = step->result_set};
    step->runs = runs;
    step->state = STEP_NONE;
    e->current = NULL;
    if (!ahead_is_wanted(e)) {
        ahead_drop(e);
        return;
    }
    step_enter(e);
    e->counters.planned_ahead++;
    step_submit(e, e->current);
}

static void retired(struct engine *e, struct step *step, const struct segment_result *result)
{
    pool_epoch_retire(e->options.pool, step->epoch);
    copies_retired(e);
    if (e->options.adapters)
        adapters_take_used(e->options.adapters);
    if (result->missed) {
        uint32_t half = 2 * result->miss_layer + 1;
        gate_done(e, step->half, half);
        step->halves_run += half - step->half;
        gate_let_go(e, e->moe_index[result->miss_layer]);
        step->half = half;
        step->state = STEP_GATE;
        e->counters.gate_misses++;
        ahead_drop(e); // experts come first, and copies hold pages back
        step_run_copies(e);
        gate_bring(e, step);
        return;
    }
    if (!step->resume_gate)
        measure(e, step);
    gate_done(e, step->half, step->segment_end);
    step->halves_run += step->segment_end - step->half;
    step->half = step->segment_end;
    step->resume_gate = false;
    if (step->half < 2 * e->options.model->config.layers)
        at_preemption_point(e, step);
    else
        finished(e, step);
}

static bool advance_flight(struct engine *e, struct step *step)
{
    struct segment_result result = {0};
    enum status status = STATUS_OK;
    if (e->options.may_block)
        status = e->table->wait(e->stream, &result);
    else if (!e->table->poll(e->stream, &result))
        return false;
    if (!status)
        status = result.status;
    if (status) {
        pool_epoch_retire(e->options.pool, step->epoch);
        copies_retired(e);
        device_failed(e, step, status, "The device failed while running a step.");
        return true;
    }
    retired(e, step, &result);
    return true;
}

static bool advance_nothing(struct engine *e)
{
    if (e->copies.count) { // of a step that was planned ahead and given up
        step_run_copies(e);
        return true;
    }
    if (step_plan(e)) {
        step_enter(e);
        return true;
    }
    struct step *paused = step_paused_most_urgent(e);
    return paused && resume(e, paused);
}

bool step_advance(struct engine *engine)
{
    struct step *step = engine->current;
    if (engine->results.waiting)
        return output_results(engine);
    if (!step)
        return advance_nothing(engine);
    switch (step->state) {
    case STEP_READY:
        step_submit(engine, step);
        return true;
    case STEP_FLIGHT:
        if (!step->ahead_tried)
            ahead_plan(engine, step);
        return advance_flight(engine, step);
    case STEP_GATE:
        return gate_advance(engine, step);
    default:
        CHECK(false);
    }
    return false;
}
