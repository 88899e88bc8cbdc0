// SPDX-License-Identifier: Apache-2.0
// stats: numbers of the tenant that asks; of the server and the engine as a whole for who manages
// adapters; of the other tenants, with their names, only for who may see them (see_tenants).
#include <jansson.h>

#include "runtime/server/internal.h"

void method_stats(struct call *call)
{
    struct request *request =
        call_params_known(call, NULL, 0) ? adapters_question(call, REQUEST_STATS) : NULL;
    if (!request)
        return;
    struct engine_control control = {.kind = ENGINE_STATS, .id = request_id(request, 0)};
    if (!engine_send(request->server->options.port, &control, sizeof control))
        return;
    request_free(request);
    reply_error(call, STATUS_BUSY, "the engine's queue is full.");
}

static void pack_tenant(msgpack_packer *packer, const struct server *server, uint32_t number)
{
    const struct tenant_usage *usage = &server->usage[number];
    const struct tenant *tenant = tenants_at(server->tenants, number);
    put_map(packer, 15);
    put_text(packer, "name", tenant->name);
    put_text(packer, "priority_class", tenant_class_name(tenant->class));
    put_u64(packer, "connections", usage->connections);
    put_u64(packer, "requests", usage->requests);
    put_u64(packer, "finished", usage->finished);
    put_u64(packer, "failed", usage->failed);
    put_u64(packer, "cancelled", usage->cancelled);
    put_u64(packer, "refused", usage->counters.refused);
    put_u64(packer, "parallel", usage->counters.parallel);
    put_u64(packer, "waiting", usage->counters.waiting);
    put_u64(packer, "prompt_tokens", usage->prompt_tokens);
    put_u64(packer, "cached_tokens", usage->cached_tokens);
    put_u64(packer, "completion_tokens", usage->completion_tokens);
    put_u64(packer, "adapter_wait_us", usage->adapter_wait_us);
    put_u64(packer, "buffered_bytes", usage->buffered);
}

static void pack_server(msgpack_packer *packer, const struct server *server)
{
    put_map(packer, 8);
    put_u64(packer, "connections", server->connection_count);
    put_u64(packer, "unauthenticated", server->unauthenticated_count);
    put_u64(packer, "accepted", server->accepted);
    put_u64(packer, "requests", server->request_count);
    put_u64(packer, "messages", server->messages);
    put_u64(packer, "protocol_errors", server->protocol_errors);
    put_u64(packer, "dropped_slow", server->dropped_slow);
    put_u64(packer, "buffered_bytes", server->buffered);
}

void stats_answer(struct request *request, const json_t *engine)
{
    const struct server *server = request->server;
    const struct tenant *tenant = tenants_at(server->tenants, request->tenant);
    if (!request->connection)
        return;
    bool manages = tenant && tenant->manage_adapters, sees = tenant && tenant->see_tenants;
    msgpack_packer *packer = reply_open_for(request);
    put_map(packer, 1u + sees + 2u * (manages || sees));
    put_key(packer, "tenant");
    pack_tenant(packer, server, request->tenant);
    if (sees) {
        put_key(packer, "tenants");
        (void)msgpack_pack_array(packer, tenants_count(server->tenants));
        for (uint32_t i = 0; i < tenants_count(server->tenants); i++)
            pack_tenant(packer, server, i);
    }
    if (manages || sees) {
        put_key(packer, "server");
        pack_server(packer, server);
        put_key(packer, "engine");
        json_to_msgpack(packer, engine);
    }
    reply_send(request->connection);
}
