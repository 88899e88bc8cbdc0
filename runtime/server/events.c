// SPDX-License-Identifier: Apache-2.0
// From the engine's events to what clients read: token notifications and the one response of
// generate.
//
// Per choice the text is collected (charged to the tenant), whether streamed or not, so that the
// response always carries the whole of it. A choice whose text does not fit the budget fails with
// resource_exhausted and is cancelled. Events of requests that are gone are dropped: the engine may
// be a few events ahead.
#include <stdio.h>
#include <string.h>

#include "base/arith.h"
#include "base/check.h"
#include "base/log.h"
#include "runtime/server/internal.h"

enum { EVENTS_PER_TURN = 512 };

static const char *finish_name(enum engine_finish finish)
{
    switch (finish) {
    case ENGINE_FINISH_STOP:
        return "stop";
    case ENGINE_FINISH_LENGTH:
        return "length";
    case ENGINE_FINISH_CANCELLED:
        return "cancelled";
    default:
        return "error";
    }
}

// ---- one token ---------------------------------------------------------------------------------

// [[token, logprob, text], ...], most likely first, as the engine sends them.
static void pack_tops(struct server *server, msgpack_packer *packer,
                      const struct engine_text *event)
{
    uint32_t tops = event->tops < ENGINE_TOPS_MAX ? event->tops : ENGINE_TOPS_MAX;
    put_key(packer, "top");
    (void)msgpack_pack_array(packer, tops);
    for (uint32_t i = 0; i < tops; i++) {
        const char *text = "";
        size_t bytes = 0;
        if (server_decode(server, &event->top_token[i], 1, &text, &bytes))
            bytes = 0;
        (void)msgpack_pack_array(packer, 3);
        (void)msgpack_pack_int32(packer, event->top_token[i]);
        (void)msgpack_pack_double(packer, (double)event->top_logprob[i]);
        (void)msgpack_pack_str_with_body(packer, text, bytes);
    }
}

// event NULL: text that became final without a token.
static void stream_token(struct request *request, uint32_t choice, const struct engine_text *event,
                         const char *text, size_t bytes)
{
    struct server *server = request->server;
    msgpack_packer *packer = notify_open(server, "token");
    bool tops = event && event->tops;
    put_map(packer, 4 + (uint32_t)(event && request->logprobs) + tops);
    put_u64(packer, "id", request->msgid);
    put_u64(packer, "index", choice);
    put_key(packer, "token");
    (void)(event ? msgpack_pack_int32(packer, event->token) : msgpack_pack_nil(packer));
    put_text_bytes(packer, "text", text, bytes);
    if (event && request->logprobs)
        put_real(packer, "logprob", (double)event->logprob);
    if (tops)
        pack_tops(server, packer, event);
    reply_send(request->connection);
}

struct sink {
    struct request *request;
    struct bytes *out;
    bool failed;
};

static int append_packed(void *context, const char *data, size_t count)
{
    struct sink *sink = context;
    struct request *request = sink->request;
    if (!sink->failed)
        sink->failed =
            !bytes_add(request->server, request->tenant, BUDGET_ANSWERS, sink->out, data, count);
    return sink->failed ? -1 : 0;
}

// For an answer that is not streamed: the token, and its probabilities, already packed.
static bool collect_token(struct request *request, struct choice *choice,
                          const struct engine_text *event)
{
    struct sink sink = {.request = request, .out = &choice->tokens};
    msgpack_packer packer;
    msgpack_packer_init(&packer, &sink, append_packed);
    (void)msgpack_pack_int32(&packer, event->token);
    if (request->logprobs) {
        sink.out = &choice->logprobs;
        put_map(&packer, 2 + (event->tops > 0));
        put_key(&packer, "token");
        (void)msgpack_pack_int32(&packer, event->token);
        put_real(&packer, "logprob", (double)event->logprob);
        if (event->tops)
            pack_tops(request->server, &packer, event);
    }
    choice->packed++;
    return !sink.failed;
}

// Adds to the choice's text; *added is where it went. Whatever the engine sent, a client gets valid
// UTF-8.
static bool add_text(struct request *request, struct choice *choice, const char *text, size_t bytes,
                     const char **added)
{
    size_t at = choice->text.count;
    if (!bytes_add(request->server, request->tenant, BUDGET_ANSWERS, &choice->text, text, bytes))
        return false;
    text_repair(choice->text.data + at, bytes);
    *added = choice->text.data + at;
    return true;
}

static void fail_choice(struct request *request)
{
    request_fail(request, STATUS_LIMIT, "the answer does not fit the server's buffers.");
    request_cancel(request);
}

static void on_text(struct request *request, uint32_t index, const struct engine_text *event,
                    const char *text)
{
    struct server *server = request->server;
    struct choice *choice = &request->choice[index];
    if (!choice->started) {
        choice->started = true;
        tenant_sequence_started(&server->usage[request->tenant].counters);
    }
    choice->generated++;
    if (request->hidden) { // cannot be: the engine has no adapter of an impossible name
        request_fail(request, STATUS_NOT_FOUND, "");
        request_cancel(request);
    }
    if (!request->connection || request->failed)
        return;
    if (!add_text(request, choice, text, event->text_bytes, &text)) {
        fail_choice(request);
        return;
    }
    if (request->stream)
        stream_token(request, index, event, text, event->text_bytes);
    else if (!collect_token(request, choice, event))
        fail_choice(request);
}

// ---- the end -----------------------------------------------------------------------------------

static void put_usage(msgpack_packer *packer, const struct request *request)
{
    uint64_t completion = 0, queue_us = UINT64_MAX, first_us = UINT64_MAX, total_us = 0;
    for (uint32_t i = 0; i < request->choices; i++) {
        const struct engine_done *end = &request->choice[i].end;
        completion += end->generated_tokens;
        queue_us = end->queue_us < queue_us ? end->queue_us : queue_us;
        first_us = end->first_token_us < first_us ? end->first_token_us : first_us;
        total_us = end->total_us > total_us ? end->total_us : total_us;
    }
    put_key(packer, "usage");
    put_map(packer, 6);
    put_u64(packer, "prompt_tokens", request->choice[0].end.prompt_tokens);
    put_u64(packer, "cached_tokens", request->choice[0].end.cached_tokens);
    put_u64(packer, "completion_tokens", completion);
    put_real(packer, "queue_ms", (double)queue_us / 1000);
    put_real(packer, "ttft_ms", (double)first_us / 1000);
    put_real(packer, "total_ms", (double)total_us / 1000);
}

static void put_packed(msgpack_packer *packer, const char *key, const struct choice *choice,
                       const struct bytes *packed)
{
    put_key(packer, key);
    (void)msgpack_pack_array(packer, choice->packed);
    if (packed->count)
        (void)packer->callback(packer->data, packed->data, packed->count);
}

static uint32_t choice_pairs(const struct request *request)
{
    return 2 + (uint32_t)!request->stream + (uint32_t)(!request->stream && request->logprobs);
}

// text, finish_reason and, when not streamed, tokens and logprobs.
static void put_choice(msgpack_packer *packer, const struct request *request,
                       const struct choice *choice)
{
    put_text_bytes(packer, "text", choice->text.count ? choice->text.data : "", choice->text.count);
    put_text(packer, "finish_reason", finish_name(choice->finish));
    if (request->stream)
        return;
    put_packed(packer, "tokens", choice, &choice->tokens);
    if (request->logprobs)
        put_packed(packer, "logprobs", choice, &choice->logprobs);
}

static void send_result(struct request *request)
{
    msgpack_packer *packer = reply_open_for(request);
    bool many = request->choices > 1;
    put_map(packer, 3 + (many ? 1 : choice_pairs(request)));
    put_text(packer, "model", request->model);
    put_u64(packer, "seed", request->seed);
    if (many) {
        put_key(packer, "choices");
        (void)msgpack_pack_array(packer, request->choices);
        for (uint32_t i = 0; i < request->choices; i++) {
            put_map(packer, 1 + choice_pairs(request));
            put_u64(packer, "index", i);
            put_choice(packer, request, &request->choice[i]);
        }
    } else {
        put_choice(packer, request, &request->choice[0]);
    }
    put_usage(packer, request);
    request_free_texts(request); // packed: they need not be paid for twice
    reply_send(request->connection);
}

static void count_usage(struct request *request)
{
    struct tenant_usage *usage = &request->server->usage[request->tenant];
    bool cancelled = false;
    for (uint32_t i = 0; i < request->choices; i++) {
        const struct engine_done *end = &request->choice[i].end;
        usage->prompt_tokens += end->prompt_tokens;
        usage->cached_tokens += end->cached_tokens;
        usage->completion_tokens += end->generated_tokens;
        usage->adapter_wait_us += end->adapter_us;
        cancelled |= request->choice[i].finish == ENGINE_FINISH_CANCELLED;
    }
    if (request->failed)
        usage->failed++;
    else if (cancelled)
        usage->cancelled++;
    else
        usage->finished++;
}

// Every choice is done: answer and forget.
void generate_finish(struct request *request)
{
    count_usage(request);
    if (request->failed && request->fault.status == STATUS_NOT_FOUND) {
        const char *why = broken_why(request->server, request->tenant, request->model);
        if (why && !request->hidden)
            (void)fault_set(&request->fault, STATUS_CORRUPT,
                            "the stored adapter \"%.64s\" cannot be served: %s Register it anew.",
                            request->model, why);
        else
            (void)fault_set(&request->fault, STATUS_NOT_FOUND, "there is no model \"%.64s\".",
                            request->model);
    }
    if (request->connection && request->failed)
        reply_fault_for(request, &request->fault);
    else if (request->connection)
        send_result(request);
    request_free(request);
}

static void on_done(struct request *request, uint32_t index, const struct engine_done *end,
                    const char *text)
{
    struct server *server = request->server;
    struct choice *choice = &request->choice[index];
    if (choice->done)
        return;
    choice->done = true;
    choice->end = *end;
    choice->finish = (enum engine_finish)end->finish;
    request->done++;
    tenant_sequence_ended(&server->usage[request->tenant].counters, choice->started);
    bool cancelled = end->finish == ENGINE_FINISH_CANCELLED &&
                     (end->status == STATUS_OK || end->status == STATUS_CANCELLED);
    if (end->status && !cancelled) {
        struct fault fault;
        (void)fault_set(&fault, (enum status)end->status, "%.199s",
                        *end->message ? end->message : status_sentence((enum status)end->status));
        request_fail(request, fault.status, fault.text);
        request_cancel(request); // the other choices
    } else if (end->text_bytes && request->connection && !request->failed) {
        if (!add_text(request, choice, text, end->text_bytes, &text))
            fail_choice(request);
        else if (request->stream)
            stream_token(request, index, NULL, text, end->text_bytes);
    }
    if (request->done == request->choices)
        generate_finish(request);
}

// ---- the ring ----------------------------------------------------------------------------------

// The text that follows a record of fixed size; a record that lies about it is a bug of the engine.
static const char *tail(const void *record, size_t bytes, size_t fixed, uint32_t claimed)
{
    CHECK(bytes >= fixed && bytes - fixed >= claimed);
    return (const char *)record + fixed;
}

static void on_event(struct server *server, const void *record, size_t bytes)
{
    const struct engine_text *text = record;
    const struct engine_done *done = record;
    const struct engine_reply *reply = record;
    const struct engine_control *control = record;
    CHECK(bytes >= sizeof(struct engine_control));
    if (text->kind == ENGINE_STOPPED) {
        server->engine_stopped = true;
        server->engine_status = (enum status)control->status;
        return;
    }
    struct request *request = request_find(server, text->id);
    uint32_t index = (uint32_t)(text->id & 0xff);
    if (!request)
        return;
    bool generates = request->kind == REQUEST_GENERATE && index < request->choices;
    if (text->kind == ENGINE_TEXT && generates)
        on_text(request, index, text, tail(record, bytes, sizeof *text, text->text_bytes));
    else if (text->kind == ENGINE_DONE && generates)
        on_done(request, index, done, tail(record, bytes, sizeof *done, done->text_bytes));
    else if (text->kind == ENGINE_REPLY && request->kind != REQUEST_GENERATE)
        adapters_on_reply(request, reply, tail(record, bytes, sizeof *reply, reply->bytes));
}

_Static_assert(offsetof(struct engine_text, id) == offsetof(struct engine_done, id) &&
                   offsetof(struct engine_text, id) == offsetof(struct engine_reply, id),
               "every event has its id in the same place");

void events_drain(struct server *server)
{
    const void *record;
    size_t bytes;
    int handled = 0;
    while (!server->engine_stopped && handled < EVENTS_PER_TURN &&
           ring_peek(server->options.port->events, &record, &bytes)) {
        on_event(server, record, bytes);
        ring_pop(server->options.port->events);
        handled++;
    }
    if (handled == EVENTS_PER_TURN && server->on_events)
        event_active(server->on_events, EV_READ, 0); // the sockets have a turn first
    if (server->controls)
        request_flush_controls(server);
}
