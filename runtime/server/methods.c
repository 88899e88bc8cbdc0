// SPDX-License-Identifier: Apache-2.0
// The methods that are answered at once: hello, auth, ping, tokenize, detokenize, cancel.
#include <string.h>

#include "base/check.h"
#include "base/log.h"
#include "runtime/server/internal.h"

enum { AUTH_FAILURES_MAX = 3, LIMITS_SHOWN = 9 };

static void put_limits(msgpack_packer *packer, const struct server *server)
{
    const struct server_limits *limits = &server->limits;
    put_key(packer, "limits");
    put_map(packer, LIMITS_SHOWN);
    put_u64(packer, "frame_bytes", limits->frame_bytes);
    put_u64(packer, "unauthenticated_frame_bytes", limits->unauthenticated_frame_bytes);
    put_u64(packer, "depth", SCAN_DEPTH_MAX);
    put_u64(packer, "map_keys", SCAN_KEYS_MAX);
    put_u64(packer, "requests_per_connection", limits->requests_per_connection);
    put_u64(packer, "prompt_bytes", limits->prompt_bytes);
    put_u64(packer, "context_tokens", server->options.engine.context_tokens);
    put_u64(packer, "n", GENERATE_CHOICES_MAX);
    put_u64(packer, "logprobs", ENGINE_TOPS_MAX);
}

// What a client may ask of this server, apart from hello, auth and ping.
static void put_capabilities(msgpack_packer *packer, const struct server *server)
{
    static const char *const always[] = {
        "generate",        "stream",       "cancel",         "tokenize",         "logprobs",
        "stats",           "models",       "adapters.list",  "adapters.stats",   "adapters.load",
        "adapters.unload", "adapters.pin", "adapters.unpin", "structured_errors"};
    bool registers = server->worker && server->options.adapter_dirs[0];
    bool uploads = server->worker && server->options.upload_bytes_max;
    put_key(packer, "capabilities");
    (void)msgpack_pack_array(packer, ARRAY_COUNT(always) + 2u * registers + uploads +
                                         (server->worker != NULL));
    for (size_t i = 0; i < ARRAY_COUNT(always); i++)
        put_key(packer, always[i]);
    if (server->worker)
        put_key(packer, "adapters.remove");
    if (registers) {
        put_key(packer, "adapters.register");
        put_key(packer, "adapters.add");
    }
    if (uploads)
        put_key(packer, "adapters.upload");
}

void method_hello(struct call *call)
{
    static const char *const names[] = {"client", "version", "protocol", "structured_errors"};
    struct server *server = call->connection->server;
    struct text_view client = {0}, version = {0};
    uint64_t protocol = SERVER_PROTOCOL;
    bool structured = call->connection->structured;
    if (!call_params_known(call, names, ARRAY_COUNT(names)))
        return;
    if (!params_text(&call->params, "client", 128, &client) ||
        !params_text(&call->params, "version", 128, &version) ||
        !params_u64(&call->params, "protocol", SERVER_PROTOCOL, SERVER_PROTOCOL, &protocol) ||
        !params_bool(&call->params, "structured_errors", &structured)) {
        reply_fault(call, &call->params.fault);
        return;
    }
    if (server->state != SERVER_RUNNING) {
        reply_error(call, STATUS_SHUTTING_DOWN, "the server is shutting down.");
        return;
    }
    call->connection->structured = structured;
    msgpack_packer *packer = reply_open(call);
    put_map(packer, 5);
    put_u64(packer, "protocol", SERVER_PROTOCOL);
    put_text(packer, "server", "polder " POLDER_VERSION);
    put_bool(packer, "authenticated", call->connection->authenticated);
    put_capabilities(packer, server);
    put_limits(packer, server);
    reply_send(call->connection);
}

static void auth_failed(struct call *call)
{
    reply_error(call, STATUS_UNAUTHENTICATED, "the key is wrong.");
    log_line(LOG_WARN, "wrong key from %s", call->connection->peer);
    if (++call->connection->auth_failures >= AUTH_FAILURES_MAX)
        connection_close_after_flush(call->connection);
}

void method_auth(struct call *call)
{
    static const char *const names[] = {"key"};
    struct connection *connection = call->connection;
    struct server *server = connection->server;
    struct text_view key = {0};
    uint32_t number = 0;
    if (!call_params_known(call, names, ARRAY_COUNT(names)))
        return;
    if (!params_text(&call->params, "key", TENANT_KEY_BYTES_MAX, &key) || !key.text) {
        (void)(key.text || params_refuse(&call->params, "key must be a str of 1 to %d bytes.",
                                         TENANT_KEY_BYTES_MAX));
        reply_fault(call, &call->params.fault);
        return;
    }
    if (server->state != SERVER_RUNNING) {
        reply_error(call, STATUS_SHUTTING_DOWN, "the server is shutting down.");
        return;
    }
    if (server->options.open_access)
        number = 0;
    else if (!tenants_find_key(server->tenants, key.text, key.bytes, &number)) {
        auth_failed(call);
        return;
    }
    if (connection->requests) {
        reply_error(call, STATUS_BUSY, "auth while requests are running is not possible.");
        return;
    }
    bool same = connection->authenticated && connection->tenant == number;
    if (!same && server->usage[number].connections >= server->limits.connections_per_tenant) {
        reply_error(call, STATUS_LIMIT, "this tenant has %u connections already.",
                    server->usage[number].connections);
        return;
    }
    connection->key = hash_bytes(NULL, key.text, key.bytes);
    connection_set_tenant(connection, number);
    msgpack_packer *packer = reply_open(call);
    put_map(packer, 2);
    put_text(packer, "tenant", tenants_at(server->tenants, number)->name);
    put_text(packer, "model", server->options.engine.model_name);
    reply_send(connection);
}

void method_ping(struct call *call)
{
    msgpack_packer *packer = reply_open(call);
    put_key(packer, "pong");
    reply_send(call->connection);
}

void method_tokenize(struct call *call)
{
    static const char *const names[] = {"text", "model"};
    struct server *server = call->connection->server;
    struct text_view text = {0};
    size_t count = 0;
    if (!call_params_known(call, names, ARRAY_COUNT(names)))
        return;
    if (!params_text(&call->params, "text", server->limits.prompt_bytes, &text) || !text.text) {
        (void)(text.text || call->params.fault.status ||
               params_refuse(&call->params, "text must be a str."));
        reply_fault(call, &call->params.fault);
        return;
    }
    enum status status =
        server->options.tokenizer.encode(server->options.tokenizer.context, text.text, text.bytes,
                                         server->tokens, server->tokens_max, &count);
    if (status) {
        reply_error(call, status, "the text cannot be encoded.");
        return;
    }
    msgpack_packer *packer = reply_open(call);
    put_map(packer, 2);
    put_u64(packer, "count", count);
    put_key(packer, "tokens");
    (void)msgpack_pack_array(packer, count);
    for (size_t i = 0; i < count; i++)
        (void)msgpack_pack_int32(packer, server->tokens[i]);
    reply_send(call->connection);
}

void method_detokenize(struct call *call)
{
    static const char *const names[] = {"tokens", "model"};
    struct server *server = call->connection->server;
    size_t count = 0, bytes = 0;
    if (!call_params_known(call, names, ARRAY_COUNT(names)))
        return;
    if (!params_get(&call->params, "tokens") ||
        !params_tokens(&call->params, "tokens", server->options.engine.vocab, server->tokens_max,
                       server->tokens, &count)) {
        (void)(call->params.fault.status || params_refuse(&call->params, "tokens is missing."));
        reply_fault(call, &call->params.fault);
        return;
    }
    const char *text = NULL;
    enum status status = server_decode(server, server->tokens, count, &text, &bytes);
    if (status) {
        reply_error(call, status, "the tokens cannot be decoded.");
        return;
    }
    msgpack_packer *packer = reply_open(call);
    put_map(packer, 1);
    put_text_bytes(packer, "text", text, bytes);
    reply_send(call->connection);
}

// Cancelling what does not exist (any more) is no error: the answer says whether something was
// found.
void method_cancel(struct call *call)
{
    static const char *const names[] = {"id"};
    uint32_t id = 0;
    if (!call_params_known(call, names, ARRAY_COUNT(names)))
        return;
    if (!params_get(&call->params, "id") || !params_u32(&call->params, "id", 0, UINT32_MAX, &id)) {
        (void)(call->params.fault.status || params_refuse(&call->params, "id is missing."));
        reply_fault(call, &call->params.fault);
        return;
    }
    struct request *request = request_of(call->connection, id);
    bool found = request && request->kind == REQUEST_GENERATE;
    if (found)
        request_cancel(request);
    if (!call->request)
        return;
    msgpack_packer *packer = reply_open(call);
    put_map(packer, 1);
    put_bool(packer, "found", found);
    reply_send(call->connection);
}
