// SPDX-License-Identifier: Apache-2.0
// models, adapters.list and adapters.stats: what there is, as far as this tenant may know.
//
// The engine is asked for one page of adapters after another, so that neither it nor the I/O thread
// is held up by thousands of them, and what an answer holds is bounded. The engine's pages hold
// everybody's adapters; what is shown is counted here:
//
//   asked --> page: [adapters of others are passed over] --> enough shown, or the last page
//               ^                                       |        --> answered
//               +--- neither -- ENGINE_ADAPTER_LIST ----+
//
// Both go by name; adapters that are broken (broken.c) are merged in. Without `after` and `limit`
// the answer is the plain list; of more than WHOLE_MAX it is a refusal, never a part.
//
// The operator's adapters are everybody's, and how one is used says what the other tenants do. So
// of an adapter that is not its own a tenant reads what describes it, and its own claim; its use
// only with see_tenants. Sums are made of what may be read, after it was cut down.
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <jansson.h>

#include "base/check.h"
#include "runtime/server/internal.h"

enum { PAGE = 256, LIMIT_MAX = 1000, WHOLE_MAX = 4096 };

static const char *const sums[] = {"users", "device_bytes", "host_bytes", "file_bytes",
                                   "hits",  "misses",       "loads",      "load_us"};

enum { SUMS = ARRAY_COUNT(sums) };

// What an adapter is, whoever uses it. All else that the engine says is use, and so is what it
// will say one day.
static const char *const described[] = {"name",     "pages",   "file_bytes", "rank_min",
                                        "rank_max", "bytes",   "applied",    "possible",
                                        "layout",   "version", "digest",     "source"};

struct listing {
    char after[ENGINE_ADAPTER_NAME]; // the last name that was looked at
    bool paged, more;                // more: of what may be shown
    bool first;                      // of models: the base model stands before the first page
    uint32_t limit;
    json_t *shown;
    size_t broken_at;
    // adapters.stats:
    uint64_t sum[SUMS], visible, own, resident, pinned, pinned_bytes;
};

void listing_free(struct listing *listing)
{
    if (listing)
        json_decref(listing->shown);
    free(listing);
}

// ---- asking ------------------------------------------------------------------------------------

static bool ask_page(struct request *request)
{
    struct engine_list command = {.kind = ENGINE_ADAPTER_LIST,
                                  .limit = PAGE,
                                  .id = request_id(request, 0),
                                  .tenant = request->tenant};
    memcpy(command.after, request->listing->after, sizeof command.after);
    return !engine_send(request->server->options.port, &command, sizeof command);
}

static void ask(struct call *call, enum request_kind kind, struct listing *wanted)
{
    struct request *request = adapters_question(call, kind);
    if (!request)
        return;
    wanted->first = !wanted->after[0];
    request->listing = malloc(sizeof *wanted);
    wanted->shown = json_array();
    if (request->listing)
        *request->listing = *wanted;
    if (request->listing && wanted->shown && ask_page(request))
        return;
    if (!request->listing)
        json_decref(wanted->shown);
    request_free(request);
    reply_error(call, STATUS_BUSY, "the engine's queue is full.");
}

static void ask_pages(struct call *call, enum request_kind kind)
{
    static const char *const names[] = {"after", "limit"};
    struct params *params = &call->params;
    struct listing wanted = {.limit = WHOLE_MAX};
    if (!call_params_known(call, names, ARRAY_COUNT(names)))
        return;
    wanted.paged = params_get(params, "after") || params_get(params, "limit");
    if (wanted.paged)
        wanted.limit = LIMIT_MAX;
    if (params_name(params, "after", sizeof wanted.after, wanted.after) &&
        params_u32(params, "limit", 1, LIMIT_MAX, &wanted.limit))
        ask(call, kind, &wanted);
    else
        reply_fault(call, &params->fault);
}

void method_models(struct call *call)
{
    ask_pages(call, REQUEST_MODELS);
}

void method_adapters_list(struct call *call)
{
    ask_pages(call, REQUEST_ADAPTER_LIST);
}

void method_adapters_stats(struct call *call)
{
    struct listing wanted = {.limit = 0};
    if (call_params_known(call, NULL, 0))
        ask(call, REQUEST_ADAPTER_STATS, &wanted);
}

// ---- one page ----------------------------------------------------------------------------------

static uint64_t number(const json_t *adapter, const char *key)
{
    return (uint64_t)json_integer_value(json_object_get(adapter, key));
}

static bool is_own(const struct request *request, const json_t *adapter)
{
    return number(adapter, "owner") == request->tenant;
}

// Its own and the operator's, of the names it is allowed.
static bool may_see(const struct request *request, const json_t *adapter, const char *name)
{
    const struct server *server = request->server;
    bool operators = server->options.open_access || number(adapter, "owner") >= TENANTS_MAX;
    return (operators || is_own(request, adapter)) &&
           tenants_allow_adapter(server->tenants, request->tenant, name);
}

static void cut_down(json_t *adapter)
{
    json_t *kept = json_object();
    for (size_t i = 0; i < ARRAY_COUNT(described); i++)
        (void)json_object_set(kept, described[i], json_object_get(adapter, described[i]));
    (void)json_object_clear(adapter);
    (void)json_object_update(adapter, kept);
    json_decref(kept);
}

// Leaves what may be read of it. Numbers of tenants are nobody's business: a client reads whether
// it is its own, and whether it has pinned it itself (who sees all tenants: whether anybody has).
static void make_public(const struct request *request, json_t *adapter)
{
    const struct tenant *tenant = tenants_at(request->server->tenants, request->tenant);
    bool own = is_own(request, adapter), sees = tenant && tenant->see_tenants;
    json_t *claimed = json_incref(json_object_get(adapter, "claimed"));
    if (!own && !sees)
        cut_down(adapter);
    if (claimed && !sees)
        (void)json_object_set(adapter, "pinned", claimed);
    (void)json_object_del(adapter, "owner");
    (void)json_object_del(adapter, "claimed");
    (void)json_object_set_new(adapter, "own", json_boolean(own));
    json_decref(claimed);
}

static void add_up(struct listing *listing, const json_t *adapter)
{
    listing->visible++;
    listing->own += json_is_true(json_object_get(adapter, "own"));
    listing->resident += json_is_true(json_object_get(adapter, "resident"));
    listing->pinned += json_is_true(json_object_get(adapter, "pinned"));
    for (size_t k = 0; k < SUMS; k++)
        listing->sum[k] += number(adapter, sums[k]);
}

// false: there are as many as were asked for.
static bool show(struct listing *listing, json_t *adapter)
{
    listing->more = json_array_size(listing->shown) >= listing->limit;
    return !listing->more && !json_array_append(listing->shown, adapter);
}

// The broken ones whose names stand between what was looked at and `name` (NULL: the end).
static bool show_broken(struct request *request, const char *name)
{
    struct listing *listing = request->listing;
    const struct server_broken *entry;
    size_t at = listing->broken_at;
    while ((entry = broken_at(request->server, request->tenant, &at)) &&
           (!name || strcmp(entry->name, name) < 0)) {
        listing->broken_at = at;
        if (strcmp(entry->name, listing->after) <= 0)
            continue;
        json_t *shown = json_pack("{s:s, s:b, s:s}", "name", entry->name, "own",
                                  entry->tenant[0] != 0, "broken", entry->why);
        bool good = shown && show(listing, shown);
        json_decref(shown);
        if (!good)
            return false;
    }
    return true;
}

// false: nothing after this one is needed.
static bool take_adapter(struct request *request, json_t *adapter)
{
    struct listing *listing = request->listing;
    char name[ENGINE_ADAPTER_NAME] = "";
    json_t *named = json_object_get(adapter, "name");
    if (!json_is_string(named))
        return true;
    (void)snprintf(name, sizeof name, "%s", json_string_value(named));
    bool visible = may_see(request, adapter, name), good = true;
    // What is pinned counts whatever a reload forbids now.
    if (json_is_true(json_object_get(adapter, "claimed")))
        listing->pinned_bytes += number(adapter, "file_bytes");
    if (visible)
        make_public(request, adapter);
    if (request->kind == REQUEST_ADAPTER_LIST)
        good = show_broken(request, name);
    if (visible && request->kind == REQUEST_ADAPTER_STATS)
        add_up(listing, adapter);
    else if (visible && good)
        good = show(listing, adapter);
    if (good)
        (void)snprintf(listing->after, sizeof listing->after, "%s", name);
    return good;
}

// ---- the answer --------------------------------------------------------------------------------

static void pack_model(msgpack_packer *packer, const struct server *server, const json_t *adapter)
{
    put_map(packer, 3);
    put_text(packer, "id", json_string_value(json_object_get(adapter, "name")));
    put_text(packer, "kind", "adapter");
    put_text(packer, "parent", server->options.engine.model_name);
}

static void answer_list(struct request *request)
{
    const struct listing *listing = request->listing;
    const struct engine_limits *engine = &request->server->options.engine;
    bool models = request->kind == REQUEST_MODELS, base = models && listing->first;
    msgpack_packer *packer = reply_open_for(request);
    if (listing->paged) {
        put_map(packer, 2);
        put_bool(packer, "more", listing->more);
        put_key(packer, models ? "models" : "adapters");
    }
    (void)msgpack_pack_array(packer, json_array_size(listing->shown) + base);
    if (base) {
        put_map(packer, 4);
        put_text(packer, "id", engine->model_name);
        put_text(packer, "kind", "base");
        put_u64(packer, "context_tokens", engine->context_tokens);
        put_u64(packer, "vocab", engine->vocab);
    }
    for (size_t i = 0; i < json_array_size(listing->shown); i++) {
        const json_t *adapter = json_array_get(listing->shown, i);
        if (models)
            pack_model(packer, request->server, adapter);
        else
            json_to_msgpack(packer, adapter);
    }
    reply_send(request->connection);
}

static void answer_sums(struct request *request)
{
    const struct listing *listing = request->listing;
    const struct tenant *tenant = tenants_at(request->server->tenants, request->tenant);
    msgpack_packer *packer = reply_open_for(request);
    put_map(packer, 6 + SUMS);
    put_u64(packer, "registered", listing->visible);
    put_u64(packer, "own", listing->own);
    put_u64(packer, "resident", listing->resident);
    put_u64(packer, "pinned", listing->pinned);
    put_u64(packer, "pinned_bytes", listing->pinned_bytes);
    put_u64(packer, "pinned_bytes_max", tenant->pinned_adapter_bytes);
    for (size_t k = 0; k < SUMS; k++)
        put_u64(packer, sums[k], listing->sum[k]);
    reply_send(request->connection);
}

bool list_page(struct request *request, struct json_t *json)
{
    struct listing *listing = request->listing;
    json_t *adapters = json_object_get(json, "adapters");
    bool good = true;
    struct fault fault;
    if (!request->connection)
        return false;
    listing->broken_at = 0; // some may have been mended since the last page
    for (size_t i = 0; good && i < json_array_size(adapters); i++)
        good = take_adapter(request, json_array_get(adapters, i));
    if (good && json_is_true(json_object_get(json, "more"))) {
        if (ask_page(request))
            return true;
        (void)fault_set(&fault, STATUS_BUSY, "the engine's queue is full.");
        reply_fault_for(request, &fault);
        return false;
    }
    if (good && request->kind == REQUEST_ADAPTER_LIST)
        (void)show_broken(request, NULL);
    if (listing->more && !listing->paged) {
        (void)fault_set(&fault, STATUS_LIMIT,
                        "there are more than %d: ask for them in pages, with limit and after.",
                        WHOLE_MAX);
        reply_fault_for(request, &fault);
    } else if (request->kind == REQUEST_ADAPTER_STATS) {
        answer_sums(request);
    } else {
        answer_list(request);
    }
    return false;
}
