// SPDX-License-Identifier: Apache-2.0
// Adapters: who may do what with which of them, the methods that are one question to the engine
// (load, unload, pin, unpin, remove), and the way of the engine's answers to whoever asked.
//
// A tenant sees the adapter names that its patterns allow, and of these its own and the operator's;
// changing anything needs manage_adapters as well, and no more than adapter_rpm_limit changes a
// minute: every load evicts something of somebody. A name outside is answered like an unknown one.
// Owners: a tenant number, or anything else for the operator. A tenant may remove its own adapters,
// never another tenant's; the operator's it may use.
//
// list.c answers what is a list, register.c makes new ones, upload.c receives their files.
#include <stdio.h>
#include <string.h>

#include <jansson.h>

#include "base/check.h"
#include "runtime/server/internal.h"

// ---- questions ---------------------------------------------------------------------------------

// A list of thousands of adapters takes tens of milliseconds of the one I/O thread.
enum { QUESTIONS_MAX = 2 }; // of one tenant at once

static bool asks_too_much(struct call *call)
{
    const struct connection *connection = call->connection;
    const struct server *server = connection->server;
    uint32_t asked = 0;
    for (uint32_t i = 0; i < server->limits.requests_max; i++) {
        const struct request *r = &server->requests[i];
        asked += r->tenant == connection->tenant &&
                 (r->kind == REQUEST_MODELS || r->kind == REQUEST_ADAPTER_LIST ||
                  r->kind == REQUEST_ADAPTER_STATS || r->kind == REQUEST_STATS);
    }
    if (asked < QUESTIONS_MAX)
        return false;
    reply_error(call, STATUS_BUSY, "%u such questions are unanswered: wait for one.", asked);
    return true;
}

struct request *adapters_question(struct call *call, enum request_kind kind)
{
    return asks_too_much(call) ? NULL : request_new(call, kind);
}

bool adapters_may_manage(struct call *call)
{
    const struct connection *connection = call->connection;
    const struct tenant *tenant = tenants_at(connection->server->tenants, connection->tenant);
    if (tenant && tenant->active && tenant->manage_adapters)
        return true;
    reply_error(call, STATUS_DENIED, "this tenant may not manage adapters.");
    return false;
}

bool adapters_may_change(struct call *call)
{
    const struct connection *connection = call->connection;
    struct server *server = connection->server;
    struct tenant_refusal refusal = {0};
    if (tenants_admit_change(tenants_at(server->tenants, connection->tenant),
                             &server->usage[connection->tenant].counters, server_now_us(server),
                             &refusal))
        return true;
    reply_refusal(call, &refusal);
    return false;
}

// The one parameter `name`, of a tenant that may manage. false: answered.
static bool read_name(struct call *call, char name[ENGINE_ADAPTER_NAME])
{
    static const char *const names[] = {"name"};
    name[0] = 0;
    if (!call_params_known(call, names, ARRAY_COUNT(names)) || !adapters_may_manage(call))
        return false;
    if (!params_name(&call->params, "name", ENGINE_ADAPTER_NAME, name) || !name[0]) {
        (void)(call->params.fault.status || params_refuse(&call->params, "name is missing."));
        reply_fault(call, &call->params.fault);
        return false;
    }
    return true;
}

// load, unload, pin, unpin, remove: the engine knows whose it is.
static void ask_about(struct call *call, enum request_kind of, enum engine_command_kind kind)
{
    const struct connection *connection = call->connection;
    const struct server *server = connection->server;
    char name[ENGINE_ADAPTER_NAME];
    if (!read_name(call, name))
        return;
    if (!tenants_allow_adapter(server->tenants, connection->tenant, name)) {
        reply_error(call, STATUS_NOT_FOUND, "there is no model \"%.64s\".", name);
        return;
    }
    if (!adapters_may_change(call))
        return;
    struct request *request = request_new(call, of);
    if (!request)
        return;
    struct engine_adapter_command command = {
        .kind = kind,
        .owner = connection->tenant,
        .id = request_id(request, 0),
        .pinned_bytes_max = tenants_at(server->tenants, connection->tenant)->pinned_adapter_bytes};
    (void)snprintf(command.name, sizeof command.name, "%s", name);
    (void)snprintf(request->model, sizeof request->model, "%s", name);
    if (!engine_send(server->options.port, &command, sizeof command))
        return;
    request_free(request);
    reply_error(call, STATUS_BUSY, "the engine's queue is full.");
}

void method_adapters_load(struct call *call)
{
    ask_about(call, REQUEST_ADAPTER_RESIDENT, ENGINE_ADAPTER_LOAD);
}

void method_adapters_unload(struct call *call)
{
    ask_about(call, REQUEST_ADAPTER_RESIDENT, ENGINE_ADAPTER_UNLOAD);
}

void method_adapters_pin(struct call *call)
{
    ask_about(call, REQUEST_ADAPTER_RESIDENT, ENGINE_ADAPTER_PIN);
}

void method_adapters_unpin(struct call *call)
{
    ask_about(call, REQUEST_ADAPTER_RESIDENT, ENGINE_ADAPTER_UNPIN);
}

void method_adapters_remove(struct call *call)
{
    ask_about(call, REQUEST_ADAPTER_REMOVE, ENGINE_ADAPTER_REMOVE);
}

// ---- answers -----------------------------------------------------------------------------------

void adapters_answer_name(struct request *request)
{
    if (!request->connection)
        return;
    msgpack_packer *packer = reply_open_for(request);
    put_map(packer, 1);
    put_text(packer, "name", request->model);
    reply_send(request->connection);
}

// {"name": NAME}, or why not.
static void answer_resident(struct request *request, const struct engine_reply *reply)
{
    struct fault fault;
    if (reply->status == STATUS_NOT_FOUND)
        (void)fault_set(&fault, STATUS_NOT_FOUND, "there is no model \"%.64s\".", request->model);
    else if (reply->status)
        (void)fault_set(&fault, (enum status)reply->status, "%.199s", reply->message);
    if (reply->status)
        reply_fault_for(request, &fault);
    else
        adapters_answer_name(request);
}

void adapters_on_reply(struct request *request, const struct engine_reply *reply, const char *text)
{
    // For its owner; one that changes something is carried to its end in any case.
    bool changes = request->kind == REQUEST_ADAPTER_ADD || request->kind == REQUEST_ADAPTER_REMOVE;
    json_t *json = reply->bytes && (request->connection || changes)
                       ? json_loadb(text, reply->bytes, JSON_REJECT_DUPLICATES, NULL)
                       : NULL;
    bool waits = false;
    if (request->kind == REQUEST_ADAPTER_ADD) {
        waits = register_added(request, reply, json);
    } else if (request->kind == REQUEST_ADAPTER_REMOVE) {
        waits = register_removed(request, reply, json);
    } else if (request->kind == REQUEST_ADAPTER_RESIDENT) {
        answer_resident(request, reply);
    } else if (reply->status || !json) {
        struct fault fault;
        (void)fault_set(&fault, reply->status ? (enum status)reply->status : STATUS_INTERNAL,
                        "the engine could not answer.");
        reply_fault_for(request, &fault);
    } else if (request->kind == REQUEST_STATS) {
        stats_answer(request, json);
    } else {
        waits = list_page(request, json);
    }
    json_decref(json);
    if (!waits)
        request_free(request);
}
