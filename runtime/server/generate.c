// SPDX-License-Identifier: Apache-2.0
// generate: from parameters to engine requests. Order of the checks: parameters, prompt, context,
// tenant's limits, room. What is refused before the tenant's limits are asked costs nothing of
// them.
//
// A tenant may use the base model and the adapters its patterns allow. A model that it may not use
// goes to the engine all the same, under a name that cannot exist, so that the answer to an unknown
// adapter and the answer to another tenant's adapter have the same bytes and take the same way.
#include <stdio.h>
#include <string.h>

#include "base/arith.h"
#include "base/check.h"
#include "runtime/server/internal.h"

_Static_assert((int)TENANT_CLASSES == (int)ENGINE_CLASSES &&
                   (int)TENANT_INTERACTIVE == (int)ENGINE_INTERACTIVE &&
                   (int)TENANT_BATCH == (int)ENGINE_BATCH,
               "the classes of tenants and engine are the same");

// A generate call on its way.
struct intake {
    struct generate_params in;
    size_t prompt_tokens;
    uint32_t max_tokens, class;
    bool hidden;
};

// The prompt as token ids in server->tokens.
static bool read_prompt(struct call *call, struct intake *intake)
{
    struct server *server = call->connection->server;
    const struct server_tokenizer *tokenizer = &server->options.tokenizer;
    if (intake->in.prompt_tokens)
        return generate_prompt_tokens(&call->params, &intake->in, server->options.engine.vocab,
                                      server->tokens_max, server->tokens, &intake->prompt_tokens);
    enum status status =
        tokenizer->encode(tokenizer->context, intake->in.prompt.text, intake->in.prompt.bytes,
                          server->tokens, server->tokens_max, &intake->prompt_tokens);
    if (status)
        (void)fault_set(&call->params.fault, status, "the prompt cannot be encoded.");
    else if (!intake->prompt_tokens)
        return params_refuse(&call->params, "prompt is empty.");
    return !status;
}

static bool check_context(struct call *call, struct intake *intake, const struct tenant *tenant)
{
    uint32_t context = call->connection->server->options.engine.context_tokens;
    if (intake->prompt_tokens >= context)
        return params_refuse(&call->params,
                             "the prompt has %zu tokens; the context of %u tokens must "
                             "hold it and at least one more.",
                             intake->prompt_tokens, context);
    size_t room = context - intake->prompt_tokens;
    intake->max_tokens = intake->in.max_tokens;
    if (!intake->in.has_max_tokens) {
        size_t most = min_size(GENERATE_MAX_TOKENS_DEFAULT, room);
        intake->max_tokens =
            (uint32_t)(tenant->max_tokens ? min_size(most, tenant->max_tokens) : most);
    }
    if (intake->max_tokens > room)
        return params_refuse(&call->params,
                             "the prompt has %zu tokens and max_tokens is %u; together they "
                             "exceed the context of %u tokens.",
                             intake->prompt_tokens, intake->max_tokens, context);
    intake->class =
        (uint32_t)tenant->class; // a request may be less urgent than its tenant, never more
    if (intake->in.class != ENGINE_CLASSES && intake->in.class > intake->class)
        intake->class = intake->in.class;
    return true;
}

static bool read_intake(struct call *call, struct intake *intake, const struct tenant *tenant)
{
    struct server *server = call->connection->server;
    return generate_parse(&call->params, &server->options.engine, server->limits.prompt_bytes,
                          &intake->in) &&
           read_prompt(call, intake) && check_context(call, intake, tenant);
}

// ---- the record for the engine -----------------------------------------------------------------

static void set_model(struct server *server, uint32_t tenant, struct intake *intake,
                      struct engine_request *record)
{
    const char *model = intake->in.model;
    if (!*model || !strcmp(model, server->options.engine.model_name))
        return;
    intake->hidden =
        !adapter_name_is_good(model) || !tenants_allow_adapter(server->tenants, tenant, model);
    (void)snprintf(record->adapter, sizeof record->adapter, "%s", intake->hidden ? "?" : model);
}

static size_t build_record(struct server *server, uint32_t tenant, struct intake *intake)
{
    struct engine_request *record = (struct engine_request *)(void *)server->command;
    const struct generate_params *in = &intake->in;
    *record = (struct engine_request){.kind = ENGINE_REQUEST,
                                      .tenant = tenant,
                                      .class = intake->class,
                                      .prompt_tokens = (uint32_t)intake->prompt_tokens,
                                      .max_tokens = intake->max_tokens,
                                      .stop_tokens = in->stop_tokens,
                                      .stop_strings = in->stops,
                                      .temperature = in->temperature,
                                      .top_p = in->top_p,
                                      .top_k = in->top_k,
                                      .tops = in->tops,
                                      .want_logprob = in->logprobs,
                                      .ignore_eos = in->ignore_eos};
    if (in->deadline_ms)
        record->deadline_us = server_now_us(server) + in->deadline_ms * 1000;
    set_model(server, tenant, intake, record);
    uint8_t *at = server->command + sizeof *record;
    memcpy(at, server->tokens, intake->prompt_tokens * sizeof(int32_t));
    at += intake->prompt_tokens * sizeof(int32_t);
    memcpy(at, in->stop_token, in->stop_tokens * sizeof(int32_t));
    at += in->stop_tokens * sizeof(int32_t);
    for (uint32_t i = 0; i < in->stops; i++) {
        uint16_t bytes = (uint16_t)in->stop[i].bytes;
        memcpy(at, &bytes, sizeof bytes);
        memcpy(at + sizeof bytes, in->stop[i].text, bytes);
        at += sizeof bytes + bytes;
    }
    CHECK((size_t)(at - server->command) <= server->command_max);
    return (size_t)(at - server->command);
}

// Sends one engine request per choice. What cannot be sent counts as done and fails the request.
static void submit(struct server *server, struct request *request, size_t bytes)
{
    struct engine_request *record = (struct engine_request *)(void *)server->command;
    for (uint32_t i = 0; i < request->choices; i++) {
        struct choice *choice = &request->choice[i];
        record->id = request_id(request, i);
        record->seed = request->seed + i;
        enum status status =
            request->failed ? STATUS_BUSY : engine_send(server->options.port, record, bytes);
        choice->sent = !status;
        if (!status)
            continue;
        choice->done = true;
        request->done++;
        tenant_sequence_ended(&server->usage[request->tenant].counters, false);
        request_fail(request, STATUS_BUSY, "the engine's queue is full.");
    }
    if (!request->failed)
        return;
    request_cancel(request);
    if (request->done == request->choices)
        generate_finish(request);
}

static uint64_t random_seed(void)
{
    uint64_t seed;
    random_bytes(&seed, sizeof seed);
    return seed >> 11; // 53 bits, so that it survives JSON and doubles on its way back
}

static void start_request(struct call *call, struct intake *intake)
{
    struct connection *connection = call->connection;
    struct server *server = connection->server;
    struct tenant_usage *usage = &server->usage[connection->tenant];
    struct tenant_refusal refusal;
    struct tenant_ask ask = {.sequences = intake->in.choices,
                             .prompt_tokens = (uint32_t)intake->prompt_tokens,
                             .max_tokens = intake->max_tokens};
    struct request *request = request_new(call, REQUEST_GENERATE);
    if (!request)
        return;
    if (!tenants_admit(tenants_at(server->tenants, connection->tenant), &usage->counters, &ask,
                       server_now_us(server), &refusal)) {
        request_free(request);
        reply_refusal(call, &refusal);
        return;
    }
    usage->requests++;
    request->choices = intake->in.choices;
    request->stream = intake->in.stream;
    request->logprobs = intake->in.logprobs;
    request->seed = intake->in.has_seed ? intake->in.seed : random_seed();
    size_t bytes = build_record(server, connection->tenant, intake);
    request->hidden = intake->hidden;
    (void)snprintf(request->model, sizeof request->model, "%s",
                   *intake->in.model ? intake->in.model : server->options.engine.model_name);
    submit(server, request, bytes);
}

void method_generate(struct call *call)
{
    struct server *server = call->connection->server;
    const struct tenant *tenant = tenants_at(server->tenants, call->connection->tenant);
    if (server->state != SERVER_RUNNING) {
        reply_error(call, STATUS_SHUTTING_DOWN, "the server is shutting down.");
        return;
    }
    if (!tenant || !tenant->active) {
        reply_error(call, STATUS_UNAUTHENTICATED, "the key is no longer valid.");
        return;
    }
    struct intake intake = {0};
    if (!read_intake(call, &intake, tenant)) {
        reply_fault(call, &call->params.fault);
        return;
    }
    start_request(call, &intake);
}
