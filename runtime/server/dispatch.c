// SPDX-License-Identifier: Apache-2.0
// From a scanned message to its method: msgpack-c decodes it, the table says who may call what.
// Deny by default: a method needs a key unless the table says otherwise.
//
// Answered with an error: everything that has a msgid and makes sense as a request. Ends the
// connection: a message that cannot be answered (no msgid, a response nobody asked for).
#include <string.h>

#include "base/check.h"
#include "runtime/server/internal.h"

struct method {
    const char *name;
    void (*handle)(struct call *call);
    bool open;   // needs no key
    bool notify; // may come as a notification
};

static const struct method methods[] = {
    {"hello", method_hello, true, false},
    {"auth", method_auth, true, false},
    {"ping", method_ping, true, false},
    {"generate", method_generate, false, false},
    {"cancel", method_cancel, false, true},
    {"tokenize", method_tokenize, false, false},
    {"detokenize", method_detokenize, false, false},
    {"models", method_models, false, false},
    {"adapters.list", method_adapters_list, false, false},
    {"adapters.register", method_adapters_register, false, false},
    {"adapters.add", method_adapters_register, false, false}, // its name of before
    {"adapters.remove", method_adapters_remove, false, false},
    {"adapters.load", method_adapters_load, false, false},
    {"adapters.unload", method_adapters_unload, false, false},
    {"adapters.pin", method_adapters_pin, false, false},
    {"adapters.unpin", method_adapters_unpin, false, false},
    {"adapters.upload", method_adapters_upload, false, false},
    {"adapters.upload_chunk", method_adapters_upload_chunk, false, false},
    {"adapters.upload_commit", method_adapters_upload_commit, false, false},
    {"adapters.upload_abort", method_adapters_upload_abort, false, false},
    {"adapters.stats", method_adapters_stats, false, false},
    {"stats", method_stats, false, false},
};

static const struct method *find_method(const msgpack_object *name)
{
    if (name->type != MSGPACK_OBJECT_STR)
        return NULL;
    for (size_t i = 0; i < ARRAY_COUNT(methods); i++) {
        if (strlen(methods[i].name) == name->via.str.size &&
            !memcmp(methods[i].name, name->via.str.ptr, name->via.str.size))
            return &methods[i];
    }
    return NULL;
}

static void run_method(struct call *call, const msgpack_object *name, const msgpack_object *params)
{
    const struct method *method = find_method(name);
    if (!call->request && (!method || !method->notify))
        return; // notifications we do not know are ignored, as the specification wants
    if (!call->connection->authenticated && (!method || !method->open)) {
        reply_error(call, STATUS_UNAUTHENTICATED, "call auth with a key first.");
        return;
    }
    if (!method) {
        reply_error(call, STATUS_NOT_FOUND, "there is no such method.");
        return;
    }
    if (!params_open(&call->params, params)) {
        reply_fault(call, &call->params.fault);
        return;
    }
    method->handle(call);
}

static void refuse_message(struct connection *connection, const char *sentence)
{
    connection->server->protocol_errors++;
    notify_error(connection, STATUS_INVALID, sentence);
    connection_close_after_flush(connection);
}

static void handle(struct connection *connection, const msgpack_object *message)
{
    const msgpack_object *part = message->via.array.ptr;
    struct call call = {.connection = connection, .request = part[0].via.u64 == 0};
    if (part[0].via.u64 == 1) {
        refuse_message(connection, "the server asks nothing, so it takes no responses.");
        return;
    }
    if (!call.request) {
        run_method(&call, &part[1], &part[2]);
        return;
    }
    if (part[1].type != MSGPACK_OBJECT_POSITIVE_INTEGER || part[1].via.u64 > UINT32_MAX) {
        refuse_message(connection, "a msgid must be an integer from 0 to 4294967295.");
        return;
    }
    call.msgid = (uint32_t)part[1].via.u64;
    if (request_of(connection, call.msgid)) {
        refuse_message(connection, "the msgid is in use by an unfinished request.");
        return;
    }
    run_method(&call, &part[2], &part[3]);
}

void dispatch_message(struct connection *connection, const uint8_t *frame, size_t bytes)
{
    msgpack_unpacked message;
    size_t used = 0;
    connection->server->messages++;
    msgpack_unpacked_init(&message);
    msgpack_unpack_return result = msgpack_unpack_next(&message, (const char *)frame, bytes, &used);
    if ((result == MSGPACK_UNPACK_SUCCESS || result == MSGPACK_UNPACK_EXTRA_BYTES) && used == bytes)
        handle(connection, &message.data);
    else
        refuse_message(connection, "the message cannot be decoded.");
    msgpack_unpacked_destroy(&message);
}
