// SPDX-License-Identifier: Apache-2.0
// Commands from the port. A record that lies about its own length is a bug of the front end, which
// has checked everything a client sent; it is still refused, never trusted.
#include <stdio.h>
#include <string.h>

#include "base/check.h"
#include "base/log.h"
#include "runtime/engine/internal.h"

// Refuses a request that never got a slot. False when the event ring has no room: the command stays
// queued.
static bool refuse(struct engine *e, uint64_t id, enum status status, const char *message)
{
    struct engine_done done = {
        .kind = ENGINE_DONE, .status = (uint32_t)status, .id = id, .finish = ENGINE_FINISH_ERROR};
    (void)snprintf(done.message, sizeof done.message, "%s", message);
    if (!output_event(e, &done, sizeof done))
        return false;
    e->counters.failed++;
    return true;
}

static bool reply(struct engine *e, uint64_t id, enum status status, const char *message,
                  const char *text, size_t bytes)
{
    struct engine_reply r = {.kind = ENGINE_REPLY, .status = (uint32_t)status, .id = id};
    (void)snprintf(r.message, sizeof r.message, "%s", message);
    r.bytes = (uint32_t)bytes;
    memcpy(e->record, &r, sizeof r);
    if (bytes)
        memcpy(e->record + sizeof r, text, bytes);
    return output_event(e, e->record, sizeof r + bytes);
}

// Checks what follows the fixed part; returns the stop strings' place or NULL.
static const uint8_t *check_tail(const struct engine_request *r, size_t bytes)
{
    size_t at = sizeof *r + ((size_t)r->prompt_tokens + r->stop_tokens) * sizeof(int32_t);
    if (r->stop_tokens > ENGINE_STOPS_MAX || r->stop_strings > ENGINE_STOPS_MAX || at > bytes)
        return NULL;
    const uint8_t *stops = (const uint8_t *)r + at;
    for (uint32_t i = 0; i < r->stop_strings; i++) {
        uint16_t length;
        if (at + sizeof length > bytes)
            return NULL;
        memcpy(&length, (const uint8_t *)r + at, sizeof length);
        at += sizeof length + length;
        if (at > bytes || !length || length > ENGINE_STOP_BYTES_MAX)
            return NULL;
    }
    return stops;
}

static const char *check_request(const struct engine *e, const struct engine_request *r)
{
    uint32_t vocab = e->options.model->config.vocab;
    const int32_t *tokens = (const int32_t *)(const void *)(r + 1);
    if (!r->prompt_tokens)
        return "The prompt is empty; send at least one token.";
    if (!r->max_tokens)
        return "max_tokens is 0; ask for at least one token.";
    if ((uint64_t)r->prompt_tokens + r->max_tokens > e->options.context_max)
        return "The prompt and max_tokens together are longer than the context.";
    if (r->tenant >= e->options.tenants_max || r->class >= ENGINE_CLASSES ||
        r->tops > ENGINE_TOPS_MAX)
        return "The tenant, class or logprobs of the request are out of range.";
    if (!(r->temperature >= 0 && r->temperature <= 100) || !(r->top_p > 0 && r->top_p <= 1))
        return "temperature must be 0..100 and top_p above 0, at most 1.";
    for (uint32_t i = 0; i < r->prompt_tokens; i++) {
        if (tokens[i] < 0 || (uint32_t)tokens[i] >= vocab)
            return "A token id of the prompt is outside the vocabulary.";
    }
    if (strnlen(r->adapter, sizeof r->adapter) == sizeof r->adapter)
        return "The adapter name is too long.";
    return NULL;
}

static void copy_stops(struct sequence *s, const struct engine_request *r, const uint8_t *stops)
{
    const int32_t *tokens = (const int32_t *)(const void *)(r + 1);
    s->stop_tokens = r->stop_tokens;
    memcpy(s->stop_token, tokens + r->prompt_tokens, r->stop_tokens * sizeof(int32_t));
    memset(&s->text, 0, sizeof s->text);
    s->text.stops = r->stop_strings;
    for (uint32_t i = 0; i < r->stop_strings; i++) {
        memcpy(&s->text.stop_bytes[i], stops, sizeof(uint16_t));
        memcpy(s->text.stop[i], stops + sizeof(uint16_t), s->text.stop_bytes[i]);
        stops += sizeof(uint16_t) + s->text.stop_bytes[i];
    }
}

static void fill_sequence(struct engine *e, uint32_t slot, const struct engine_request *r,
                          adapter_id adapter)
{
    struct sequence *s = &e->sequences[slot];
    int32_t *tokens = s->tokens;
    uint32_t next = s->next, previous = s->previous;
    memset(s, 0, sizeof *s);
    s->tokens = tokens;
    s->next = next;
    s->previous = previous;
    s->id = r->id;
    s->arrival = e->arrivals++;
    s->tenant = r->tenant;
    s->class = r->class;
    s->prompt = s->length = r->prompt_tokens;
    s->max_tokens = r->max_tokens;
    memcpy(tokens, r + 1, r->prompt_tokens * sizeof(int32_t));
    s->sampling = (struct sample_params){
        .temperature = r->temperature, .top_p = r->top_p, .top_k = r->top_k, .seed = r->seed};
    s->tops = r->tops;
    s->want_logprob = r->want_logprob;
    s->ignore_eos = r->ignore_eos;
    s->deadline_us = r->deadline_us;
    s->arrived_us = clock_now_us(&e->options.clock);
    if (r->adapter[0]) {
        s->adapter = adapter;
        s->has_adapter = true;
        adapter_acquire(e->options.adapters, adapter);
    }
}

// Could it run if it were alone?
static bool fits_pool(const struct engine *e, const struct engine_request *r, adapter_id adapter)
{
    struct pool_stats pool;
    pool_stats(e->options.pool, &pool);
    uint32_t pages =
        sequence_pages_needed(e, r->prompt_tokens + r->max_tokens, r->adapter[0], adapter);
    uint64_t kept = e->options.adapters ? adapters_kept_pages(e->options.adapters) : 0;
    const struct model *model = e->options.model;
    uint32_t adapter_pages = sequence_adapter_pages(e, r->adapter[0], adapter);
    if (adapter_pages + kept > pool_limit(e->options.pool, PAGE_ADAPTER) ||
        pages - adapter_pages > pool_limit(e->options.pool, PAGE_KV))
        return false;
    return pages + kept + engine_expert_floor(&model->expert_shape, model->config.top_k) <=
           pool.device_total;
}

static bool take_request(struct engine *e, const struct engine_request *r, size_t bytes)
{
    if (bytes < sizeof *r)
        return refuse(e, 0, STATUS_INVALID, "The request record is too short.");
    const uint8_t *stops = check_tail(r, bytes);
    const char *wrong = stops ? check_request(e, r) : "The request record is malformed.";
    if (wrong)
        return refuse(e, r->id, STATUS_INVALID, wrong);
    if (e->broken)
        return refuse(e, r->id, STATUS_DEVICE, ENGINE_BROKEN);
    if (e->draining)
        return refuse(e, r->id, STATUS_SHUTTING_DOWN,
                      "The server is shutting down; try another one.");
    uint32_t waiting = e->lists[SEQUENCE_QUEUED].count;
    uint32_t slot = e->lists[SEQUENCE_FREE].head;
    if (waiting >= e->options.queue_max || slot == NO_SLOT)
        return refuse(e, r->id, STATUS_LIMIT, "The queue is full; try again later.");
    adapter_id adapter = {0};
    if (r->adapter[0] &&
        (!e->options.adapters || residents_find(e, r->adapter, r->tenant, &adapter) != STATUS_OK))
        return refuse(e, r->id, STATUS_NOT_FOUND, "There is no model of that name.");
    if (!fits_pool(e, r, adapter))
        return refuse(
            e, r->id, STATUS_LIMIT,
            "The request and its adapter are larger than the pool; ask for fewer tokens.");
    fill_sequence(e, slot, r, adapter);
    copy_stops(&e->sequences[slot], r, stops);
    sequence_move(e, slot, SEQUENCE_QUEUED);
    e->counters.requests++;
    return true;
}

static bool is_operators(const struct engine *e, const char *name)
{
    adapter_id id;
    return adapter_find(e->options.adapters, name, &id) == STATUS_OK &&
           adapter_owner(e->options.adapters, id) >= e->options.tenants_max;
}

static bool take_adapter(struct engine *e, const struct engine_adapter_command *c, size_t bytes)
{
    struct fault fault = {.text = ""};
    enum status status = STATUS_INVALID;
    if (bytes < sizeof *c)
        return true;
    if (ring_room(e->options.port->events) < sizeof(struct engine_reply) + 64)
        return false;
    bool of_operator = e->options.adapters && is_operators(e, c->name); // before it is removed
    if (!e->options.adapters)
        status = fault_set(&fault, STATUS_UNSUPPORTED, "This server was started without adapters.");
    else
        status = residents_command(e, c, &fault);
    if (!status && c->kind != ENGINE_ADAPTER_REMOVE)
        of_operator = is_operators(e, c->name);
    if (status == STATUS_NOT_FOUND)
        (void)fault_set(&fault, status, "There is no adapter named \"%.63s\".", c->name);
    const char *text = !status && of_operator ? "{\"operator\":true}" : "";
    return reply(e, c->id, status, status ? fault.text : "", text, strlen(text));
}

static bool take_list(struct engine *e, const struct engine_list *c, size_t bytes)
{
    if (bytes < sizeof *c)
        return true;
    struct engine_list list = *c;
    list.after[sizeof list.after - 1] = 0;
    size_t length = report_adapters(e, &list, e->line, e->line_bytes);
    return reply(e, c->id, STATUS_OK, "", e->line, length);
}

static bool take_control(struct engine *e, const struct engine_control *c)
{
    uint32_t slot = sequence_find(e, c->id);
    size_t bytes;
    switch (c->kind) {
    case ENGINE_CANCEL:
        if (slot != NO_SLOT)
            e->sequences[slot].cancelled = true;
        return true;
    case ENGINE_PAUSE:
    case ENGINE_RESUME:
        if (slot != NO_SLOT)
            e->sequences[slot].paused = c->kind == ENGINE_PAUSE;
        return true;
    case ENGINE_STATS:
        bytes = report_stats(e, e->line, e->line_bytes);
        return reply(e, c->id, STATUS_OK, "", e->line, bytes);
    case ENGINE_DRAIN:
        e->draining = true;
        return true;
    case ENGINE_QUIT:
        e->draining = e->quit = true;
        return true;
    default:
        log_line(LOG_WARN, "a command of unknown kind %u was dropped", c->kind);
        return true;
    }
}

bool commands_take(struct engine *engine)
{
    const void *record;
    size_t bytes;
    bool any = false;
    while (ring_peek(engine->options.port->commands, &record, &bytes)) {
        uint32_t kind = 0;
        memcpy(&kind, record, bytes < sizeof kind ? bytes : sizeof kind);
        bool taken = true;
        if (kind == ENGINE_REQUEST)
            taken = take_request(engine, record, bytes);
        else if (kind >= ENGINE_ADAPTER_ADD && kind <= ENGINE_ADAPTER_UNPIN)
            taken = take_adapter(engine, record, bytes);
        else if (kind == ENGINE_ADAPTER_LIST)
            taken = take_list(engine, record, bytes);
        else if (bytes >= sizeof(struct engine_control))
            taken = take_control(engine, record);
        if (!taken)
            return any; // no room for the answer: the command waits
        ring_pop(engine->options.port->commands);
        any = true;
    }
    return any;
}
