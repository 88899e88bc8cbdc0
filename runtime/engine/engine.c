// SPDX-License-Identifier: Apache-2.0
// Life of the engine and its turn. Memory is sized and taken here, once: the same function walks
// the areas for every step, and nothing is allocated afterwards.
#include "runtime/engine/engine.h"

#include <poll.h>
#include <sched.h>
#include <stdlib.h>
#include <string.h>
#include <sys/prctl.h>
#include <unistd.h>

#include "base/check.h"
#include "base/log.h"
#include "runtime/engine/internal.h"

uint32_t engine_expert_floor(const struct expert_shape *shape, uint32_t top_k)
{
    // One token's experts at once, so that a gate rarely goes round; at least two, so that one can
    // be copied while another is computed.
    uint32_t experts = top_k < 2 ? 2 : top_k;
    return shape->experts ? experts * shape->pages_per_expert : 0;
}

// ---- memory ----

static enum status device_area(struct engine *e, void *out, size_t bytes)
{
    void *memory = NULL;
    enum status status = e->table->alloc(e->options.device, bytes ? bytes : 64, &memory);
    e->refused_bytes = status ? bytes : 0;
    if (!status)
        memcpy(out, &memory, sizeof memory);
    return status;
}

// Memory that the host reads too: what a step tells it.
static enum status host_area(struct engine *e, void *out, size_t bytes)
{
    void *memory = NULL;
    enum status status = e->table->alloc_host(e->options.device, bytes ? bytes : 64, &memory);
    if (!status)
        memcpy(out, &memory, sizeof memory);
    return status;
}

static enum status act_area(struct engine *e, void **out, size_t rows, size_t cols)
{
    return device_area(e, out, e->table->act_bytes(e->options.device, rows, cols));
}

static enum status make_moe_scratch(struct engine *e)
{
    const struct model_config *c = &e->options.model->config;
    size_t rows = row_bucket(e->options.rows_max), pairs = rows * c->top_k, f = sizeof(float);
    struct moe_work *w = &e->scratch.moe;
    size_t moe_layers = e->options.model->expert_shape.layers;
    if (device_area(e, &w->expert, pairs * sizeof(uint32_t)) ||
        device_area(e, &w->gate, pairs * f) ||
        device_area(e, &w->begin, (c->experts + 1u) * sizeof(uint32_t)) ||
        device_area(e, &w->order, pairs * sizeof(uint32_t)) ||
        device_area(e, &w->state, c->experts) ||
        act_area(e, &w->hidden, pairs, c->moe_intermediate) ||
        device_area(e, &w->out, pairs * c->hidden * f) ||
        host_area(e, &e->scratch.need, moe_layers * c->experts * sizeof(uint32_t)) ||
        host_area(e, &e->scratch.expert_state, c->experts) ||
        host_area(e, &e->scratch.part_wanted, (size_t)e->options.sequences_max * c->experts))
        return STATUS_NO_MEMORY;
    e->scratch.gate_state = calloc(c->experts, 1);
    return e->scratch.gate_state ? STATUS_OK : STATUS_NO_MEMORY;
}

static enum status make_results(struct engine *e, struct result_set *set)
{
    size_t samples = row_bucket(e->options.sequences_max), tops = samples * ENGINE_TOPS_MAX;
    if (host_area(e, &set->token, samples * sizeof(int32_t)) ||
        host_area(e, &set->logprob, samples * sizeof(float)) ||
        host_area(e, &set->top_token, tops * sizeof(int32_t)) ||
        host_area(e, &set->top_logprob, tops * sizeof(float)))
        return STATUS_NO_MEMORY;
    return STATUS_OK;
}

static enum status make_scratch(struct engine *e)
{
    const struct model_config *c = &e->options.model->config;
    struct scratch *s = &e->scratch;
    size_t rows = row_bucket(e->options.rows_max), f = sizeof(float);
    size_t samples = row_bucket(e->options.sequences_max);
    size_t q = (size_t)c->heads * c->head_dim, qkv = q + 2 * (size_t)c->kv_heads * c->head_dim;
    size_t gate_up = c->intermediate ? tile_interleaved_rows(c->intermediate) : 0;
    size_t partial = e->options.model->share.rank ? rows * c->hidden * f : 0;
    if (device_area(e, &s->partial, partial) || act_area(e, &s->act, rows, c->hidden) ||
        act_area(e, &s->attention, rows, q) || device_area(e, &s->normed, rows * c->hidden * f) ||
        device_area(e, &s->qkv, rows * qkv * f) ||
        device_area(e, &s->gate_up, rows * gate_up * f) ||
        act_area(e, &s->mid, gate_up ? rows : 1, c->intermediate ? c->intermediate : 1) ||
        device_area(e, &s->last, samples * c->hidden * f) ||
        act_area(e, &s->last_act, samples, c->hidden) ||
        device_area(e, &s->logits, samples * c->vocab * f) || make_results(e, &s->results[0]) ||
        make_results(e, &s->results[1]))
        return STATUS_NO_MEMORY;
    for (int i = 0; i < 3; i++) {
        if (device_area(e, &s->lora_hidden[i], rows * e->options.rank_max * f))
            return STATUS_NO_MEMORY;
    }
    return c->experts ? make_moe_scratch(e) : STATUS_OK;
}

// Counts (base NULL) or places the arrays of a step's block; returns its bytes.
static size_t place_arrays(const struct engine_options *o, uint8_t *base, struct step_arrays *out)
{
    size_t at = 0, rows = o->rows_max, runs = o->sequences_max;
    size_t blocks = div_up(o->context_max, o->kv_shape.block_tokens);
#define PLACE(field, count)                                                                        \
    do {                                                                                           \
        out->field = base ? (void *)(base + at) : NULL;                                            \
        at = round_up(at + (count) * sizeof *out->field, 64);                                      \
    } while (0)
    PLACE(token, rows + 1); // and the word for samples that nobody follows
    PLACE(position, rows);
    PLACE(sequence, rows);
    PLACE(lora_row, runs + 1);
    PLACE(lora_adapter, runs);
    PLACE(lora_sample, runs + 1);
    PLACE(gather, runs);
    PLACE(follow, runs);
    PLACE(sample, runs);
    PLACE(pages, runs * blocks * o->kv_shape.pages_per_block);
#undef PLACE
    return at;
}

// What a step has on the host: the planned one has no more.
static enum status make_plan(struct engine *e, struct step *step)
{
    const struct engine_options *o = &e->options;
    step->block.bytes = place_arrays(o, NULL, &step->host);
    step->runs = calloc(o->sequences_max, sizeof *step->runs);
    if (!step->runs || host_area(e, &step->block.host, step->block.bytes))
        return STATUS_NO_MEMORY;
    (void)place_arrays(o, step->block.host, &step->host);
    return STATUS_OK;
}

static enum status make_step(struct engine *e, struct step *step)
{
    const struct engine_options *o = &e->options;
    size_t row = o->model->config.hidden * sizeof(float);
    enum status status = make_plan(e, step);
    if (!status)
        status = device_area(e, &step->block.device, step->block.bytes);
    if (!status)
        status = device_area(e, &step->x, row_bucket(o->rows_max) * row);
    if (!status)
        (void)place_arrays(o, step->block.device, &step->device);
    return status;
}

static enum status make_steps(struct engine *e)
{
    const struct engine_options *o = &e->options;
    struct block_copies *c = &e->copies;
    enum status status = make_plan(e, &e->next);
    for (int class = 0; class < ENGINE_CLASSES && !status; class ++)
        status = make_step(e, &e->steps[class]);
    c->room = o->sequences_max * o->kv_shape.pages_per_block; // one shared block each, at most
    c->list = calloc(c->room, sizeof *c->list);
    e->results.runs = calloc(o->sequences_max, sizeof *e->results.runs);
    return c->list && e->results.runs ? status : STATUS_NO_MEMORY;
}

static enum status make_sequences(struct engine *e)
{
    const struct engine_options *o = &e->options;
    e->sequence_slots = o->sequences_max + o->queue_max;
    e->sequences = calloc(e->sequence_slots, sizeof *e->sequences);
    e->tokens = calloc((size_t)e->sequence_slots * o->context_max, sizeof *e->tokens);
    e->candidates = calloc(e->sequence_slots, sizeof *e->candidates);
    e->runs = calloc(o->sequences_max, sizeof *e->runs);
    if (!e->sequences || !e->tokens || !e->candidates || !e->runs)
        return STATUS_NO_MEMORY;
    for (size_t i = 0; i < ARRAY_COUNT(e->lists); i++)
        e->lists[i].head = e->lists[i].tail = NO_SLOT;
    struct sequence_list *list = &e->lists[SEQUENCE_FREE];
    for (uint32_t slot = 0; slot < e->sequence_slots; slot++) {
        struct sequence *s = &e->sequences[slot];
        s->tokens = e->tokens + (size_t)slot * o->context_max;
        s->previous = slot ? slot - 1 : NO_SLOT;
        s->next = slot + 1 < e->sequence_slots ? slot + 1 : NO_SLOT;
    }
    *list = (struct sequence_list){
        .head = 0, .tail = e->sequence_slots - 1, .count = e->sequence_slots};
    return STATUS_OK;
}

static enum status make_tables(struct engine *e)
{
    const struct engine_options *o = &e->options;
    const struct model_config *c = &o->model->config;
    e->moe_index = calloc(c->layers, sizeof *e->moe_index);
    e->salts = calloc(o->tenants_max, sizeof *e->salts);
    // The longest reply, a page of adapters: 256 of them and more, if the ring takes such a record.
    e->line_bytes = min_size((size_t)1 << 19, ring_room(o->port->events) / 2 - 2048);
    e->line = malloc(e->line_bytes);
    e->record = malloc(e->line_bytes + sizeof(struct engine_reply) + sizeof(struct engine_text));
    if (!e->moe_index || !e->salts || !e->line || !e->record)
        return STATUS_NO_MEMORY;
    uint32_t moe = 0;
    for (uint32_t layer = 0; layer < c->layers; layer++)
        e->moe_index[layer] = c->is_moe[layer] ? moe++ : NO_SLOT;
    for (uint32_t tenant = 0; tenant < o->tenants_max; tenant++)
        e->salts[tenant] = hash_bytes(&o->secret, &tenant, sizeof tenant);
    return STATUS_OK;
}

static enum status check_options(const struct engine_options *o, struct fault *fault)
{
    if (!o->sequences_max || !o->rows_max || !o->context_max || !o->queue_max || !o->tenants_max)
        return fault_set(
            fault, STATUS_INVALID,
            "the engine needs at least one sequence, row, position, queue place and tenant.");
    if (o->rows_max < o->sequences_max)
        return fault_set(fault, STATUS_INVALID,
                         "--max-num-batched-tokens (%u) must be at least --max-num-seqs (%u).",
                         o->rows_max, o->sequences_max);
    struct pool_stats pool;
    pool_stats(o->pool, &pool);
    uint64_t kv = div_up(o->context_max, o->kv_shape.block_tokens) * o->kv_shape.pages_per_block;
    uint64_t floor = engine_expert_floor(&o->model->expert_shape, o->model->config.top_k);
    if (kv + floor > pool.device_total)
        return fault_set(fault, STATUS_LIMIT,
                         "the pool has %u pages, but one sequence of %u tokens needs %llu and one "
                         "token's experts %llu: raise --pool-bytes or lower --max-model-len.",
                         pool.device_total, o->context_max, (unsigned long long)kv,
                         (unsigned long long)floor);
    if (ring_free(o->port->events) < output_room_needed(NULL, o->sequences_max))
        return fault_set(fault, STATUS_INVALID,
                         "the event ring is too small for %u sequences at once.", o->sequences_max);
    return STATUS_OK;
}

// Of the steps and the model on this device.
static enum status check_device(const struct engine_options *o, const struct device_info *info,
                                struct fault *fault)
{
    const struct model_config *c = &o->model->config;
    const struct {
        const char *what;
        uint32_t asked, most;
    } limits[] = {{"--max-num-batched-tokens", o->rows_max, info->rows_max},
                  {"hidden_size", c->hidden, info->hidden_max},
                  {"moe_intermediate_size", c->moe_intermediate, info->hidden_max},
                  {"head_dim", c->head_dim, info->head_dim_max},
                  {"num_experts", c->experts, info->experts_max},
                  {"num_experts_per_tok", c->top_k, info->top_k_max}};
    for (size_t i = 0; i < ARRAY_COUNT(limits); i++)
        if (limits[i].most && limits[i].asked > limits[i].most)
            return fault_set(fault, STATUS_LIMIT, "%s is %u, and the device %s takes at most %u.",
                             limits[i].what, limits[i].asked, info->name, limits[i].most);
    return STATUS_OK;
}

static enum status no_room(const struct engine *e, enum status status, struct fault *fault)
{
    size_t available = e->table->free_bytes(e->options.device), asked = e->refused_bytes;
    if (status == STATUS_DEVICE)
        return fault_set(fault, status, "the device failed while the engine was made.");
    if (!asked || available == SIZE_MAX)
        return fault_set(fault, status,
                         "there is not enough memory for the engine's work areas: lower "
                         "--max-num-batched-tokens, --max-num-seqs or --max-model-len.");
    return fault_set(fault, status,
                     "for a work area of the engine %zu MiB was asked for and the device has %zu "
                     "MiB free: lower --pool-bytes, --max-num-batched-tokens or --max-num-seqs.",
                     (asked + (1u << 20) - 1) >> 20, available >> 20);
}

enum status engine_create(const struct engine_options *options, struct engine **out,
                          struct fault *fault)
{
    struct device_info info = {0};
    options->device->table->info(options->device, &info);
    enum status status = check_options(options, fault);
    if (!status)
        status = check_device(options, &info, fault);
    if (status)
        return status;
    struct engine *e = calloc(1, sizeof *e);
    if (!e)
        return fault_set(fault, STATUS_NO_MEMORY, "out of memory while making the engine.");
    e->options = *options;
    if (options->adapters)
        adapters_limit_rank(options->adapters, options->rank_max);
    e->table = options->device->table;
    e->want.slot = e->want_next.slot = NO_SLOT;
    uint32_t commands = options->model->config.layers * 32 + 64 +
                        options->sequences_max * options->kv_shape.pages_per_block;
    status = e->table->stream_create(options->device, commands, &e->stream);
    if (!status)
        status = make_tables(e);
    if (!status)
        status = make_sequences(e);
    if (!status)
        status = make_scratch(e);
    if (!status && !info.host_access)
        status = host_area(e, &e->logits, options->model->config.vocab * sizeof(float));
    if (!status)
        status = make_steps(e);
    if (status) {
        (void)no_room(e, status, fault);
        engine_destroy(e);
        return status;
    }
    *out = e;
    return STATUS_OK;
}

static void release_scratch(struct engine *e)
{
    struct scratch *s = &e->scratch;
    void *areas[] = {s->act,
                     s->partial,
                     s->attention,
                     s->mid,
                     s->normed,
                     s->qkv,
                     s->gate_up,
                     s->last,
                     s->last_act,
                     s->logits,
                     s->moe.expert,
                     s->moe.gate,
                     s->moe.begin,
                     s->moe.order,
                     s->moe.state,
                     s->moe.hidden,
                     s->moe.out,
                     s->lora_hidden[0],
                     s->lora_hidden[1],
                     s->lora_hidden[2]};
    for (size_t i = 0; i < ARRAY_COUNT(areas); i++) {
        if (areas[i])
            e->table->release(e->options.device, areas[i]);
    }
    const struct result_set *a = &s->results[0], *b = &s->results[1];
    void *host[] = {a->token, a->logprob,      a->top_token,   a->top_logprob,
                    b->token, b->logprob,      b->top_token,   b->top_logprob,
                    s->need,  s->expert_state, s->part_wanted, e->logits};
    for (size_t i = 0; i < ARRAY_COUNT(host); i++) {
        if (host[i])
            e->table->release_host(e->options.device, host[i]);
    }
}

static void release_plan(struct engine *e, struct step *step)
{
    if (step->block.host)
        e->table->release_host(e->options.device, step->block.host);
    free(step->runs);
}

void engine_destroy(struct engine *engine)
{
    if (!engine)
        return;
    for (int class = 0; class < ENGINE_CLASSES; class ++) {
        struct step *step = &engine->steps[class];
        if (step->block.device)
            engine->table->release(engine->options.device, step->block.device);
        if (step->x)
            engine->table->release(engine->options.device, step->x);
        release_plan(engine, step);
    }
    release_plan(engine, &engine->next);
    free(engine->results.runs);
    free(engine->copies.list);
    release_scratch(engine);
    if (engine->stream)
        engine->table->stream_destroy(engine->stream);
    free(engine->moe_index);
    free(engine->scratch.gate_state);
    free(engine->salts);
    free(engine->line);
    free(engine->record);
    free(engine->runs);
    free(engine->candidates);
    free(engine->tokens);
    free(engine->sequences);
    free(engine);
}

// ---- the turn ----

// Ends every request that no running step holds; a step in flight is waited for first. Results that
// have not gone out are lost.
static void end_everything(struct engine *e, enum status status, const char *message)
{
    ahead_drop(e);
    output_drop(e);
    for (int class = 0; class < ENGINE_CLASSES; class ++) {
        struct step *step = &e->steps[class];
        if (step->state == STEP_NONE || step->state == STEP_FLIGHT)
            continue;
        if (step->state == STEP_GATE)
            experts_gate_done(e->options.experts, e->moe_index[step->half / 2]);
        step_release_rows(e, step);
    }
    if (!e->current && !e->broken)
        step_run_copies(e);
    for (int state = SEQUENCE_QUEUED; state <= SEQUENCE_OUT; state++) {
        for (uint32_t slot = e->lists[state].head; slot != NO_SLOT;) {
            uint32_t next = e->sequences[slot].next;
            if (!e->sequences[slot].in_steps)
                sequence_end(e, slot, status, ENGINE_FINISH_ERROR, message);
            slot = next;
        }
    }
}

static bool nothing_lives(const struct engine *e)
{
    return e->lists[SEQUENCE_FREE].count == e->sequence_slots;
}

// Nothing to run: bring likely experts in while free pages last, unless somebody waits for pages.
static enum engine_turn rest(struct engine *e)
{
    bool waits = e->want_next.slot != NO_SLOT || step_paused_most_urgent(e);
    if (e->options.experts && !e->current && !waits && experts_prefetch(e->options.experts, 8))
        return ENGINE_WAITING;
    if (nothing_lives(e))
        return copy_is_idle(e->options.copies) ? ENGINE_IDLE : ENGINE_WAITING;
    return ENGINE_WAITING;
}

enum engine_turn engine_turn(struct engine *engine)
{
    if (engine->halted)
        return ENGINE_HALTED;
    pool_poll(engine->options.pool);
    if (copy_device_failed(engine->options.copies)) // maybe no step runs that would find it out
        engine->broken = engine->quit = engine->draining = true;
    bool worked = commands_take(engine);
    if (engine->options.adapters && !engine->broken) {
        adapters_fetch_kept(engine->options.adapters);
        sequence_continue_parts(engine);
    }
    sequence_expire(engine);
    sequence_flush_ended(engine);
    if (engine->broken)
        end_everything(engine, STATUS_DEVICE, ENGINE_BROKEN);
    else if (engine->quit)
        end_everything(engine, STATUS_SHUTTING_DOWN, "The server was shut down.");
    if (step_advance(engine))
        worked = true;
    sequence_flush_ended(engine);
    if (engine->draining && nothing_lives(engine)) {
        struct engine_control stopped = {.kind = ENGINE_STOPPED,
                                         .status = engine->broken ? STATUS_DEVICE : STATUS_OK};
        if (!output_event(engine, &stopped, sizeof stopped))
            return ENGINE_WAITING;
        engine->halted = true;
        return ENGINE_HALTED;
    }
    return worked ? ENGINE_BUSY : rest(engine);
}

static void sleep_on(int descriptor, int timeout_ms)
{
    struct pollfd wake = {.fd = descriptor, .events = POLLIN};
    uint64_t count;
    if (poll(&wake, 1, timeout_ms) > 0) {
        ssize_t ignored = read(descriptor, &count, sizeof count);
        (void)ignored;
    }
}

static uint64_t bytes_moved(const struct engine *e)
{
    struct copy_stats stats;
    uint64_t bytes = 0;
    copy_stats(e->options.copies, &stats);
    for (int r = 0; r < COPY_RESOURCES; r++)
        bytes += stats.bytes[r];
    return bytes;
}

void engine_run(struct engine *engine)
{
    uint64_t moved = 0;
    (void)prctl(PR_SET_TIMERSLACK, 1); // the default of 50 us is longer than most pages take
    for (uint32_t waits = 0;;) {
        enum engine_turn turn = engine_turn(engine);
        if (turn == ENGINE_HALTED)
            return;
        if (turn == ENGINE_BUSY) {
            waits = 0;
        } else if (engine->current && engine->current->state == STEP_FLIGHT) {
            (void)sched_yield(); // a device that computes by itself: its end is looked for
        } else if (turn == ENGINE_WAITING) {
            // A copy ends within microseconds to milliseconds, and the next one begins here: while
            // something moves, short sleeps.
            uint64_t now = bytes_moved(engine);
            waits = now == moved ? waits + 1 : 0;
            moved = now;
            if (waits < 200)
                usleep(20);
            else
                sleep_on(engine->options.port->command_wake, 1);
        } else {
            sleep_on(engine->options.port->command_wake, 1000);
        }
    }
}

const float *engine_logits(const struct engine *engine, uint32_t index)
{
    CHECK(index < engine->options.sequences_max);
    size_t vocab = engine->options.model->config.vocab;
    const float *logits = engine->scratch.logits + (size_t)index * vocab;
    if (!engine->logits) // the host can read them where they are
        return logits;
    CHECK(!engine->table->download(engine->options.device, engine->logits, logits,
                                   vocab * sizeof(float)));
    return engine->logits;
}

const uint32_t *engine_need(const struct engine *engine)
{
    return engine->scratch.need;
}

void engine_counters(const struct engine *engine, struct engine_counters *out)
{
    *out = engine->counters;
    out->running = engine->lists[SEQUENCE_RUNNING].count + engine->lists[SEQUENCE_OUT].count;
    for (uint32_t slot = engine->lists[SEQUENCE_ENDED].head; slot != NO_SLOT;
         slot = engine->sequences[slot].next)
        out->running += engine->sequences[slot].in_steps > 0; // surplus rows: they hold pages
    out->waiting = engine->lists[SEQUENCE_QUEUED].count;
    out->captures = engine->table->captures(engine->stream);
}

void engine_check(const struct engine *engine)
{
    uint32_t total = 0, in_steps = 0;
    for (size_t state = 0; state < ARRAY_COUNT(engine->lists); state++) {
        uint32_t count = 0;
        for (uint32_t slot = engine->lists[state].head; slot != NO_SLOT;
             slot = engine->sequences[slot].next) {
            const struct sequence *s = &engine->sequences[slot];
            CHECK(s->state == (enum sequence_state)state);
            CHECK(s->computed <= s->length || state == SEQUENCE_FREE || state == SEQUENCE_ENDED);
            CHECK(!s->in_steps || state == SEQUENCE_RUNNING || state == SEQUENCE_ENDED);
            CHECK(!s->ahead.goes_on);
            in_steps += s->in_steps;
            count++;
        }
        CHECK(count == engine->lists[state].count);
        total += count;
    }
    CHECK(total == engine->sequence_slots);
    uint32_t runs = engine->results.waiting ? engine->results.plan.runs : 0, current = 0;
    runs += engine->next.state == STEP_NONE ? 0 : engine->next.plan.runs;
    for (int class = 0; class < ENGINE_CLASSES; class ++) {
        const struct step *step = &engine->steps[class];
        runs += step->state == STEP_NONE ? 0 : step->plan.runs;
        current += step->state != STEP_NONE && step->state != STEP_PAUSED;
    }
    CHECK(runs == in_steps && current <= 1);
    pool_check(engine->options.pool);
    kv_check(engine->options.kv);
}
