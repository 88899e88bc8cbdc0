// SPDX-License-Identifier: Apache-2.0
// Adapters whose store file could not be registered when the server started: damaged, cut short,
// made for another base. Their owner is told why when it asks for one, and can register it anew or
// remove it; to everybody else they do not exist. Few, so a list is enough.
#include <stdlib.h>
#include <string.h>

#include "runtime/server/internal.h"

enum status broken_take(struct server *server, struct fault *fault)
{
    size_t count = server->options.broken_count;
    server->broken = calloc(count + 1, sizeof *server->broken);
    if (!server->broken)
        return fault_set(fault, STATUS_NO_MEMORY, "out of memory for the broken adapters.");
    if (count)
        memcpy(server->broken, server->options.broken, count * sizeof *server->broken);
    server->broken_count = count;
    return STATUS_OK;
}

static bool is_seen(const struct server *server, uint32_t tenant, const struct server_broken *entry)
{
    return tenants_allow_adapter(server->tenants, tenant, entry->name) &&
           (!entry->tenant[0] || !strcmp(entry->tenant, tenants_at(server->tenants, tenant)->name));
}

const struct server_broken *broken_at(const struct server *server, uint32_t tenant, size_t *at)
{
    while (*at < server->broken_count) {
        const struct server_broken *entry = &server->broken[(*at)++];
        if (is_seen(server, tenant, entry))
            return entry;
    }
    return NULL;
}

const char *broken_why(const struct server *server, uint32_t tenant, const char *name)
{
    const struct server_broken *entry;
    for (size_t at = 0; (entry = broken_at(server, tenant, &at));)
        if (!strcmp(entry->name, name))
            return entry->why;
    return NULL;
}

bool broken_is_own(const struct request *request)
{
    const struct server *server = request->server;
    const char *tenant = tenants_at(server->tenants, request->tenant)->name;
    for (size_t i = 0; i < server->broken_count; i++)
        if (!strcmp(server->broken[i].name, request->model) &&
            !strcmp(server->broken[i].tenant, tenant))
            return true;
    return false;
}

void broken_forget(struct server *server, const char *name)
{
    size_t kept = 0;
    for (size_t i = 0; i < server->broken_count; i++)
        if (strcmp(server->broken[i].name, name) != 0)
            server->broken[kept++] = server->broken[i];
    server->broken_count = kept;
}
