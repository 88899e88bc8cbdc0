// SPDX-License-Identifier: Apache-2.0
// Packing of everything the server sends. A message is packed into the server's scratch buffer and
// handed over whole, so that a connection never sees half of one. One message at a time: open,
// pack, send.
#include <stdarg.h>
#include <stdio.h>
#include <string.h>

#include "runtime/server/internal.h"

enum { SCRATCH_KEEP = 1 << 20 };

void put_map(msgpack_packer *packer, uint32_t pairs)
{
    (void)msgpack_pack_map(packer, pairs);
}

void put_key(msgpack_packer *packer, const char *key)
{
    (void)msgpack_pack_str_with_body(packer, key, strlen(key));
}

void put_text_bytes(msgpack_packer *packer, const char *key, const char *text, size_t bytes)
{
    put_key(packer, key);
    (void)msgpack_pack_str_with_body(packer, text, bytes);
}

void put_text(msgpack_packer *packer, const char *key, const char *text)
{
    put_text_bytes(packer, key, text, strlen(text));
}

void put_u64(msgpack_packer *packer, const char *key, uint64_t value)
{
    put_key(packer, key);
    (void)msgpack_pack_uint64(packer, value);
}

void put_real(msgpack_packer *packer, const char *key, double value)
{
    put_key(packer, key);
    (void)msgpack_pack_double(packer, value);
}

void put_bool(msgpack_packer *packer, const char *key, bool value)
{
    put_key(packer, key);
    (void)(value ? msgpack_pack_true(packer) : msgpack_pack_false(packer));
}

void text_repair(char *text, size_t bytes)
{
    if (utf8_is_valid((const uint8_t *)text, bytes))
        return;
    for (size_t i = 0; i < bytes; i++)
        text[i] = (uint8_t)text[i] < 0x80 ? text[i] : '?';
}

static int scratch_write(void *context, const char *data, size_t bytes)
{
    struct server *server = context;
    if (msgpack_sbuffer_write(&server->scratch, data, bytes) < 0)
        server->scratch_failed = true;
    return server->scratch_failed ? -1 : 0;
}

static msgpack_packer *open_scratch(struct server *server)
{
    if (server->scratch.alloc > SCRATCH_KEEP) {
        msgpack_sbuffer_destroy(&server->scratch);
        msgpack_sbuffer_init(&server->scratch);
    }
    msgpack_sbuffer_clear(&server->scratch);
    server->scratch_failed = false;
    msgpack_packer_init(&server->packer, server, scratch_write);
    return &server->packer;
}

static msgpack_packer *open_response(struct server *server, uint32_t msgid)
{
    msgpack_packer *packer = open_scratch(server);
    (void)msgpack_pack_array(packer, 4);
    (void)msgpack_pack_int(packer, 1);
    (void)msgpack_pack_uint32(packer, msgid);
    return packer;
}

msgpack_packer *reply_open(struct call *call)
{
    msgpack_packer *packer = open_response(call->connection->server, call->msgid);
    (void)msgpack_pack_nil(packer);
    return packer;
}

msgpack_packer *reply_open_for(struct request *request)
{
    msgpack_packer *packer = open_response(request->connection->server, request->msgid);
    (void)msgpack_pack_nil(packer);
    return packer;
}

msgpack_packer *notify_open(struct server *server, const char *method)
{
    msgpack_packer *packer = open_scratch(server);
    (void)msgpack_pack_array(packer, 3);
    (void)msgpack_pack_int(packer, 2);
    put_key(packer, method);
    (void)msgpack_pack_array(packer, 1);
    return packer;
}

void reply_send(struct connection *connection)
{
    const msgpack_sbuffer *scratch = &connection->server->scratch;
    if (connection->server->scratch_failed) {
        connection_doom(connection); // out of memory: half a message must not leave
        return;
    }
    connection_send(connection, scratch->data, scratch->size);
}

// ---- errors ------------------------------------------------------------------------------------

// [0|1, "code: message"], or a map once hello asked for it. refusal may be NULL; of kind NONE it
// only says when to try again.
static void pack_error(msgpack_packer *packer, bool structured, const struct fault *fault,
                       const struct tenant_refusal *refusal)
{
    char text[3 * sizeof fault->text]; // what was quoted may be cut in the middle of a character
    text[utf8_lossy((const uint8_t *)fault->text, strlen(fault->text), text)] = 0;
    int kind = fault->status == STATUS_INVALID;
    if (!structured) {
        char line[sizeof text + 40];
        (void)snprintf(line, sizeof line, "%s: %s", status_code(fault->status), text);
        (void)msgpack_pack_array(packer, 2);
        (void)msgpack_pack_int(packer, kind);
        (void)msgpack_pack_str_with_body(packer, line, strlen(line));
        return;
    }
    bool of_tenant = refusal && refusal->kind != TENANT_LIMIT_NONE;
    put_map(packer, of_tenant ? 8 : refusal ? 4 : 3);
    put_u64(packer, "type", (uint64_t)kind);
    put_text(packer, "code", status_code(fault->status));
    put_text(packer, "message", text);
    if (refusal)
        put_u64(packer, "retry_after_ms", refusal->retry_after_ms);
    if (!of_tenant)
        return;
    put_text(packer, "kind", tenant_limit_name(refusal->kind));
    put_u64(packer, "limit", refusal->limit);
    put_u64(packer, "remaining", refusal->remaining);
    put_bool(packer, "billed", refusal->billed);
}

static void send_error(struct connection *connection, uint32_t msgid, const struct fault *fault,
                       const struct tenant_refusal *refusal)
{
    msgpack_packer *packer = open_response(connection->server, msgid);
    pack_error(packer, connection->structured, fault, refusal);
    (void)msgpack_pack_nil(packer);
    reply_send(connection);
}

void reply_fault(struct call *call, const struct fault *fault)
{
    if (call->request)
        send_error(call->connection, call->msgid, fault, NULL);
}

bool call_params_known(struct call *call, const char *const *names, size_t count)
{
    if (params_known(&call->params, names, count))
        return true;
    reply_fault(call, &call->params.fault);
    return false;
}

void reply_fault_for(struct request *request, const struct fault *fault)
{
    if (request->connection)
        send_error(request->connection, request->msgid, fault, NULL);
}

void reply_error(struct call *call, enum status status, const char *format, ...)
{
    struct fault fault = {.status = status};
    va_list list;
    va_start(list, format);
    (void)vsnprintf(fault.text, sizeof fault.text, format, list);
    va_end(list);
    reply_fault(call, &fault);
}

void reply_later(struct call *call, enum status status, uint64_t retry_after_ms, const char *format,
                 ...)
{
    struct tenant_refusal refusal = {.retry_after_ms = retry_after_ms};
    struct fault fault = {.status = status};
    va_list list;
    va_start(list, format);
    (void)vsnprintf(fault.text, sizeof fault.text, format, list);
    va_end(list);
    size_t used = strlen(fault.text);
    (void)snprintf(fault.text + used, sizeof fault.text - used, "; retry after %llu ms.",
                   (unsigned long long)retry_after_ms);
    if (call->request)
        send_error(call->connection, call->msgid, &fault, &refusal);
}

void reply_refusal(struct call *call, const struct tenant_refusal *refusal)
{
    struct fault fault;
    (void)fault_set(&fault, STATUS_LIMIT, "%s is %llu, %llu remaining%s",
                    tenant_limit_name(refusal->kind), (unsigned long long)refusal->limit,
                    (unsigned long long)refusal->remaining, refusal->retry_after_ms ? "; " : ".");
    size_t used = strlen(fault.text);
    if (refusal->retry_after_ms)
        (void)snprintf(fault.text + used, sizeof fault.text - used, "retry after %llu ms.",
                       (unsigned long long)refusal->retry_after_ms);
    if (call->request)
        send_error(call->connection, call->msgid, &fault, refusal);
}

// For what cannot be answered: a message that is no message, a connection that must go.
void notify_error(struct connection *connection, enum status status, const char *sentence)
{
    msgpack_packer *packer = notify_open(connection->server, "error");
    put_map(packer, 2);
    put_text(packer, "code", status_code(status));
    put_text(packer, "message", sentence);
    reply_send(connection);
}
