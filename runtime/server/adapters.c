// SPDX-License-Identifier: Apache-2.0
// adapters.*, models, stats: the methods that ask the engine one question.
//
// A tenant sees exactly the adapter names that its patterns allow; adding and removing need
// manage_adapters as well. A name outside is answered like an unknown one. Owners: a tenant number,
// or anything else for the operator. A tenant may remove its own adapters and the operator's, never
// another tenant's.
//
// adapters.add reads below the operator's roots only: every step of the path is opened with
// O_NOFOLLOW, so neither ".." nor a symlink, now or changed meanwhile, leads out. The worker gets
// the directory as an open descriptor (/proc/self/fd/N), not as a name.
#include <errno.h>
#include <fcntl.h>
#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include <jansson.h>

#include "adapters/registry.h"
#include "base/check.h"
#include "base/log.h"
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
                  r->kind == REQUEST_ADAPTER_STATS || r->kind == REQUEST_ADAPTER_OWNER ||
                  r->kind == REQUEST_STATS);
    }
    if (asked < QUESTIONS_MAX)
        return false;
    reply_error(call, STATUS_BUSY, "%u such questions are unanswered: wait for one.", asked);
    return true;
}

static struct request *ask_engine(struct call *call, enum request_kind kind, uint32_t command)
{
    if (asks_too_much(call))
        return NULL;
    struct request *request = request_new(call, kind);
    if (!request)
        return NULL;
    struct engine_control control = {.kind = command, .id = request_id(request, 0)};
    if (engine_send(request->server->options.port, &control, sizeof control)) {
        request_free(request);
        reply_error(call, STATUS_BUSY, "the engine's queue is full.");
        return NULL;
    }
    return request;
}

void method_models(struct call *call)
{
    if (call_params_known(call, NULL, 0))
        (void)ask_engine(call, REQUEST_MODELS, ENGINE_ADAPTER_LIST);
}

void method_adapters_list(struct call *call)
{
    if (call_params_known(call, NULL, 0))
        (void)ask_engine(call, REQUEST_ADAPTER_LIST, ENGINE_ADAPTER_LIST);
}

void method_stats(struct call *call)
{
    if (call_params_known(call, NULL, 0))
        (void)ask_engine(call, REQUEST_STATS, ENGINE_STATS);
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

// load, unload, pin, unpin: the engine knows whose it is.
static void ask_resident(struct call *call, enum engine_command_kind kind)
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
    struct request *request = request_new(call, REQUEST_ADAPTER_RESIDENT);
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
    ask_resident(call, ENGINE_ADAPTER_LOAD);
}

void method_adapters_unload(struct call *call)
{
    ask_resident(call, ENGINE_ADAPTER_UNLOAD);
}

void method_adapters_pin(struct call *call)
{
    ask_resident(call, ENGINE_ADAPTER_PIN);
}

void method_adapters_unpin(struct call *call)
{
    ask_resident(call, ENGINE_ADAPTER_UNPIN);
}

void method_adapters_stats(struct call *call)
{
    if (call_params_known(call, NULL, 0))
        (void)ask_engine(call, REQUEST_ADAPTER_STATS, ENGINE_ADAPTER_LIST);
}

void method_adapters_remove(struct call *call)
{
    char name[ENGINE_ADAPTER_NAME];
    if (!read_name(call, name))
        return;
    struct request *request = ask_engine(call, REQUEST_ADAPTER_OWNER, ENGINE_ADAPTER_LIST);
    if (request)
        (void)snprintf(request->model, sizeof request->model, "%s", name);
}

// ---- adapters.add ------------------------------------------------------------------------------

// Opens root/path one component at a time, never following a symlink. -1 with errno.
static int open_below(const char *root, const char *path)
{
    int at = open(root, O_RDONLY | O_DIRECTORY | O_CLOEXEC);
    while (at >= 0 && *path) {
        const char *slash = strchrnul(path, '/');
        size_t length = (size_t)(slash - path);
        char part[256];
        int next = -1;
        errno = EINVAL;
        if (length && length < sizeof part && !(length == 1 && path[0] == '.') &&
            !(length == 2 && path[0] == '.' && path[1] == '.')) {
            memcpy(part, path, length);
            part[length] = 0;
            next = openat(at, part, O_RDONLY | O_DIRECTORY | O_NOFOLLOW | O_CLOEXEC);
        }
        int error = errno;
        (void)close(at);
        errno = error;
        at = next;
        path = *slash ? slash + 1 : slash;
    }
    return at;
}

// An absolute path must begin with one of the roots; a relative one is looked for below each of
// them.
static int open_adapter(const struct server *server, const char *path)
{
    for (int i = 0; i < SERVER_ADAPTER_DIRS_MAX && server->options.adapter_dirs[i]; i++) {
        const char *root = server->options.adapter_dirs[i], *rest = path;
        size_t length = strlen(root);
        while (length > 1 && root[length - 1] == '/')
            length--;
        if (*path == '/') {
            if (strncmp(path, root, length) != 0 || path[length] != '/')
                continue;
            rest = path + length + 1;
        }
        int descriptor = open_below(root, rest);
        if (descriptor >= 0)
            return descriptor;
    }
    return -1;
}

static bool read_add(struct call *call, char name[ENGINE_ADAPTER_NAME], char path[ENGINE_PATH],
                     bool *replace)
{
    static const char *const names[] = {"name", "path", "replace"};
    struct params *params = &call->params;
    bool good = params_known(params, names, ARRAY_COUNT(names)) &&
                params_name(params, "name", ENGINE_ADAPTER_NAME, name) &&
                params_name(params, "path", ENGINE_PATH, path) &&
                params_bool(params, "replace", replace);
    if (good && (!*name || !*path))
        good = params_refuse(params, "name and path are needed.");
    if (good && !adapter_name_is_good(name))
        good = params_refuse(params,
                             "a name is 1 to 63 letters, digits, '.', '_', '-', not starting with "
                             "'.'.");
    if (!good)
        reply_fault(call, &params->fault);
    return good;
}

// Two registrations of one name at once would take the same version.
static bool is_being_added(const struct server *server, const char *name)
{
    for (uint32_t i = 0; i < server->limits.requests_max; i++) {
        const struct request *request = &server->requests[i];
        if (request->kind == REQUEST_ADAPTER_ADD && !strcmp(request->model, name))
            return true;
    }
    return false;
}

bool adapters_may_add(struct call *call, const char *name)
{
    const struct connection *connection = call->connection;
    const struct server *server = connection->server;
    if (server->state != SERVER_RUNNING)
        reply_error(call, STATUS_SHUTTING_DOWN, "the server is shutting down.");
    else if (!tenants_allow_adapter(server->tenants, connection->tenant, name) ||
             !strcmp(name, server->options.engine.model_name))
        reply_error(call, STATUS_DENIED,
                    "the name \"%.63s\" is not among the adapters allowed to this tenant.", name);
    else if (is_being_added(server, name))
        reply_error(call, STATUS_BUSY,
                    "the adapter \"%.63s\" is being registered already; try again when that is "
                    "answered.",
                    name);
    else
        return true;
    return false;
}

static void converted(struct server *server, struct worker_job *job);

// Where the name's store file stands, for its version: the tenant's own or the operator's (who may
// replace that, the engine says). Another tenant's is taken, also while that one is not in the
// tenants file.
static enum status find_old(struct worker_job *job)
{
    struct registry_entry found;
    if (!registry_find(job->state_dir, job->entry.name, job->entry.tenant, &found)) {
        if (found.tenant[0] && strcmp(found.tenant, job->entry.tenant) != 0)
            return fault_set(&job->fault, STATUS_EXISTS,
                             "the name \"%.63s\" is taken: register it under another one.",
                             found.name);
        job->entry = found;
    }
    if (registry_path(job->state_dir, &job->entry, job->old_path, NULL))
        job->old_path[0] = 0;
    return STATUS_OK;
}

static void convert_run(struct worker_job *job)
{
    enum { REPORT_BYTES = 4096 };
    char directory[64];
    (void)snprintf(directory, sizeof directory, "/proc/self/fd/%d", job->directory);
    job->status = find_old(job);
    if (job->status)
        return;
    job->report = calloc(1, REPORT_BYTES);
    if (!job->report)
        job->status = fault_set(&job->fault, STATUS_NO_MEMORY, "out of memory.");
    else
        job->status =
            job->converter->convert(job->converter->context, directory, job->old_path,
                                    job->store_path, job->report, REPORT_BYTES, &job->fault);
}

static struct worker_job *convert_job(struct request *request, int directory)
{
    struct server *server = request->server;
    struct worker_job *job = worker_job_new(request_id(request, 0));
    uint64_t unique;
    if (!job)
        return NULL;
    random_bytes(&unique, sizeof unique);
    (void)snprintf(request->store_path, sizeof request->store_path,
                   "%.850s/adapters/%s-%016" PRIx64 ".adapter.new", server->options.state_dir,
                   request->model, unique);
    job->run = convert_run;
    job->done = converted;
    job->converter = &server->options.converter;
    job->directory = directory;
    memcpy(job->store_path, request->store_path, sizeof job->store_path);
    job->state_dir = server->options.state_dir;
    (void)snprintf(job->entry.name, sizeof job->entry.name, "%.63s", request->model);
    (void)snprintf(job->entry.tenant, sizeof job->entry.tenant, "%s",
                   tenants_at(server->tenants, request->tenant)->name);
    return job;
}

bool adapters_start_job(struct call *call, const char *name, int directory, bool replace,
                        struct upload *upload)
{
    struct request *request = request_new(call, REQUEST_ADAPTER_ADD);
    if (!request) {
        (void)close(directory);
        return false;
    }
    struct server *server = request->server;
    (void)snprintf(request->model, sizeof request->model, "%s", name);
    request->replace = replace;
    struct worker_job *job = convert_job(request, directory);
    if (job && !worker_put(server->worker, job)) {
        request->upload = upload;
        return true;
    }
    if (job)
        worker_job_free(job);
    else
        (void)close(directory);
    request_free(request);
    reply_error(call, STATUS_BUSY, "too many adapters are being converted; try again later.");
    return false;
}

void method_adapters_add(struct call *call)
{
    const struct server *server = call->connection->server;
    char name[ENGINE_ADAPTER_NAME] = "", path[ENGINE_PATH] = "";
    bool replace = true;
    if (!adapters_may_manage(call) || !read_add(call, name, path, &replace))
        return;
    if (!server->worker || !server->options.adapter_dirs[0]) {
        reply_error(call, STATUS_UNSUPPORTED, "this server takes no adapters at run time.");
        return;
    }
    if (!adapters_may_add(call, name))
        return;
    int directory = open_adapter(server, path);
    if (directory < 0) {
        reply_error(call, STATUS_NOT_FOUND,
                    "there is no such directory below the server's adapter directories.");
        return;
    }
    (void)adapters_start_job(call, name, directory, replace, NULL);
}

static bool send_add(struct request *request)
{
    struct engine_adapter_command command = {.kind = ENGINE_ADAPTER_ADD,
                                             .owner = request->tenant,
                                             .id = request_id(request, 0),
                                             .replace = request->replace};
    command.owned_bytes_max = tenants_at(request->server->tenants, request->tenant)->adapter_bytes;
    (void)snprintf(command.name, sizeof command.name, "%.63s", request->model);
    memcpy(command.store_path, request->store_path, sizeof command.store_path);
    return engine_send(request->server->options.port, &command, sizeof command) == STATUS_OK;
}

static void converted(struct server *server, struct worker_job *job)
{
    struct request *request = request_find(server, job->id);
    if (!request || request->kind != REQUEST_ADAPTER_ADD)
        return;
    request->report = job->report;
    job->report = NULL;
    upload_free(request->upload); // what was uploaded has been read
    request->upload = NULL;
    if (!job->status && send_add(request))
        return;
    if (!job->status)
        (void)fault_set(&job->fault, STATUS_BUSY, "the engine's queue is full.");
    (void)unlink(request->store_path);
    reply_fault_for(request, &job->fault);
    request_free(request);
}

// ---- answers -----------------------------------------------------------------------------------

static bool may_see(const struct request *request, const json_t *adapter)
{
    const char *name = json_string_value(json_object_get(adapter, "name"));
    return name && tenants_allow_adapter(request->server->tenants, request->tenant, name);
}

static void pack_list(msgpack_packer *packer, const struct request *request, const json_t *list)
{
    size_t visible = 0;
    for (size_t i = 0; i < json_array_size(list); i++)
        visible += may_see(request, json_array_get(list, i));
    (void)msgpack_pack_array(packer, visible + (request->kind == REQUEST_MODELS));
    if (request->kind == REQUEST_MODELS) {
        const struct engine_limits *engine = &request->server->options.engine;
        put_map(packer, 4);
        put_text(packer, "id", engine->model_name);
        put_text(packer, "kind", "base");
        put_u64(packer, "context_tokens", engine->context_tokens);
        put_u64(packer, "vocab", engine->vocab);
    }
    for (size_t i = 0; i < json_array_size(list); i++) {
        const json_t *adapter = json_array_get(list, i);
        if (!may_see(request, adapter))
            continue;
        if (request->kind == REQUEST_ADAPTER_LIST) {
            json_to_msgpack(packer, adapter);
            continue;
        }
        put_map(packer, 3);
        put_text(packer, "id", json_string_value(json_object_get(adapter, "name")));
        put_text(packer, "kind", "adapter");
        put_text(packer, "parent", request->server->options.engine.model_name);
    }
}

static void answer_list(struct request *request, const json_t *list)
{
    // The owner's number is nobody's business: a client reads whether the adapter is its own.
    for (size_t i = 0; i < json_array_size(list); i++) {
        json_t *adapter = json_array_get(list, i);
        bool own =
            json_integer_value(json_object_get(adapter, "owner")) == (json_int_t)request->tenant;
        json_t *keeper = json_object_get(adapter, "keeper");
        if (keeper)
            (void)json_object_set_new(adapter, "pinned",
                                      json_boolean(json_integer_value(keeper) >= 0));
        (void)json_object_del(adapter, "keeper");
        (void)json_object_del(adapter, "owner");
        (void)json_object_set_new(adapter, "own", json_boolean(own));
    }
    msgpack_packer *packer = reply_open_for(request);
    pack_list(packer, request, list);
    reply_send(request->connection);
}

static uint64_t number(const json_t *adapter, const char *key)
{
    return (uint64_t)json_integer_value(json_object_get(adapter, key));
}

// Sums over the adapters this tenant may use.
static void answer_adapter_stats(struct request *request, const json_t *list)
{
    static const char *const sums[] = {"users", "device_bytes", "host_bytes", "file_bytes",
                                       "hits",  "misses",       "loads",      "load_us"};
    const struct tenant *tenant = tenants_at(request->server->tenants, request->tenant);
    uint64_t sum[ARRAY_COUNT(sums)] = {0}, visible = 0, own = 0, resident = 0, pinned = 0,
             pinned_bytes = 0;
    for (size_t i = 0; i < json_array_size(list); i++) {
        const json_t *adapter = json_array_get(list, i);
        const json_t *keeper = json_object_get(adapter, "keeper");
        bool mine = keeper && json_integer_value(keeper) == (json_int_t)request->tenant;
        pinned_bytes += mine ? number(adapter, "file_bytes") : 0; // whatever a reload forbids now
        if (!may_see(request, adapter))
            continue;
        visible++;
        own += number(adapter, "owner") == request->tenant;
        resident += json_is_true(json_object_get(adapter, "resident"));
        pinned += keeper && json_integer_value(keeper) >= 0;
        for (size_t k = 0; k < ARRAY_COUNT(sums); k++)
            sum[k] += number(adapter, sums[k]);
    }
    msgpack_packer *packer = reply_open_for(request);
    put_map(packer, 6 + ARRAY_COUNT(sums));
    put_u64(packer, "registered", visible);
    put_u64(packer, "own", own);
    put_u64(packer, "resident", resident);
    put_u64(packer, "pinned", pinned);
    put_u64(packer, "pinned_bytes", pinned_bytes);
    put_u64(packer, "pinned_bytes_max", tenant->pinned_adapter_bytes);
    for (size_t k = 0; k < ARRAY_COUNT(sums); k++)
        put_u64(packer, sums[k], sum[k]);
    reply_send(request->connection);
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

static void answer_stats(struct request *request, const json_t *engine)
{
    const struct server *server = request->server;
    const struct tenant *tenant = tenants_at(server->tenants, request->tenant);
    bool all = tenant && tenant->manage_adapters;
    msgpack_packer *packer = reply_open_for(request);
    put_map(packer, all ? 4 : 1);
    put_key(packer, "tenant");
    pack_tenant(packer, server, request->tenant);
    if (all) {
        put_key(packer, "tenants");
        (void)msgpack_pack_array(packer, tenants_count(server->tenants));
        for (uint32_t i = 0; i < tenants_count(server->tenants); i++)
            pack_tenant(packer, server, i);
        put_key(packer, "server");
        pack_server(packer, server);
        put_key(packer, "engine");
        json_to_msgpack(packer, engine);
    }
    reply_send(request->connection);
}

// ---- the file of a registration ----------------------------------------------------------------
// The engine has said yes; the disk worker makes it last, then the client hears of it.

static void answer_kept(struct request *request);
static void answer_gone(struct request *request);

static void keep_run(struct worker_job *job)
{
    job->status = registry_commit(job->state_dir, job->store_path, &job->entry, &job->fault);
}

static void forget_run(struct worker_job *job)
{
    job->status = registry_remove(job->state_dir, &job->entry, &job->fault);
    if (job->status == STATUS_NOT_FOUND)
        job->status = STATUS_OK;
}

// The engine has done it, the disk has not.
static void answer_unkept(struct request *request, const struct fault *why, const char *what)
{
    struct fault fault;
    (void)fault_set(&fault, why->status, "%s: %.120s", what, why->text);
    reply_fault_for(request, &fault);
    request_free(request);
}

static void kept(struct server *server, struct worker_job *job)
{
    struct request *request = request_find(server, job->id);
    if (job->status) {
        log_line(LOG_WARN, "adapter %s will be gone after a restart: %s", job->entry.name,
                 job->fault.text);
        (void)unlink(job->store_path); // the engine has it open
    }
    if (request && job->status)
        answer_unkept(request, &job->fault, "It serves until the next restart, but was not kept");
    else if (request)
        answer_kept(request);
}

static void forgotten(struct server *server, struct worker_job *job)
{
    struct request *request = request_find(server, job->id);
    if (job->status)
        log_line(LOG_WARN, "adapter %s will be back after a restart: %s", job->entry.name,
                 job->fault.text);
    if (request && job->status)
        answer_unkept(request, &job->fault,
                      "It is gone until the next restart, but its file is not");
    else if (request)
        answer_gone(request);
}

// false: there is no memory for it, and no state directory to do it in.
static bool put_registry_job(struct request *request, bool keep)
{
    struct server *server = request->server;
    struct worker_job *job = server->disk ? worker_job_new(request_id(request, 0)) : NULL;
    const char *tenant = tenants_at(server->tenants, request->tenant)->name;
    if (!job)
        return false;
    job->run = keep ? keep_run : forget_run;
    job->done = keep ? kept : forgotten;
    job->state_dir = server->options.state_dir;
    memcpy(job->store_path, request->store_path, sizeof job->store_path);
    (void)snprintf(job->entry.name, sizeof job->entry.name, "%.63s", request->model);
    (void)snprintf(job->entry.tenant, sizeof job->entry.tenant, "%s",
                   request->operators ? "" : tenant);
    if (!worker_put(server->disk, job))
        return true;
    worker_job_free(job);
    return false;
}

// true: the request waits on.
static bool engine_added(struct request *request, const struct engine_reply *reply,
                         const json_t *json)
{
    struct fault fault;
    if (reply->status) {
        (void)unlink(request->store_path);
        (void)fault_set(&fault, (enum status)reply->status, "%.199s", reply->message);
        reply_fault_for(request, &fault);
        return false;
    }
    request->operators = json_is_true(json_object_get(json, "operator"));
    if (put_registry_job(request, true))
        return true;
    (void)fault_set(&fault, STATUS_NO_MEMORY, "out of memory.");
    answer_unkept(request, &fault, "It serves until the next restart, but was not kept");
    return true;
}

static bool engine_removed(struct request *request, const struct engine_reply *reply)
{
    struct fault fault;
    if (reply->status) {
        (void)fault_set(&fault, (enum status)reply->status, "%.199s", reply->message);
        reply_fault_for(request, &fault);
        return false;
    }
    if (!put_registry_job(request, false))
        answer_gone(request);
    return true;
}

// The last word on adapters.add; the request is gone after it.
static void answer_kept(struct request *request)
{
    if (request->connection) {
        json_t *report =
            request->report && *request->report ? json_loads(request->report, 0, NULL) : NULL;
        msgpack_packer *packer = reply_open_for(request);
        put_map(packer, 1 + (report != NULL));
        put_text(packer, "name", request->model);
        if (report) {
            put_key(packer, "report");
            json_to_msgpack(packer, report);
        }
        json_decref(report);
        reply_send(request->connection);
    }
    request_free(request);
}

static void put_name(struct request *request)
{
    if (!request->connection)
        return;
    msgpack_packer *packer = reply_open_for(request);
    put_map(packer, 1);
    put_text(packer, "name", request->model);
    reply_send(request->connection);
}

static void answer_gone(struct request *request)
{
    put_name(request);
    request_free(request);
}

// {"name": NAME}, or why not.
static void answer_name(struct request *request, const struct engine_reply *reply)
{
    struct fault fault;
    if (reply->status == STATUS_NOT_FOUND)
        (void)fault_set(&fault, STATUS_NOT_FOUND, "there is no model \"%.64s\".", request->model);
    else if (reply->status)
        (void)fault_set(&fault, (enum status)reply->status, "%.199s", reply->message);
    if (reply->status)
        reply_fault_for(request, &fault);
    else
        put_name(request);
}

// The list is there: if this tenant may remove the adapter, the second command goes out. true: it
// did.
static bool go_on_removing(struct request *request, const json_t *list)
{
    const struct server *server = request->server;
    const json_t *found = NULL;
    for (size_t i = 0; i < json_array_size(list) && !found; i++) {
        const json_t *adapter = json_array_get(list, i);
        json_int_t owner = json_integer_value(json_object_get(adapter, "owner"));
        bool mine = owner == (json_int_t)request->tenant || server->options.open_access;
        const char *name = json_string_value(json_object_get(adapter, "name"));
        if (mine && name && !strcmp(name, request->model) && may_see(request, adapter)) {
            found = adapter;
            request->operators = owner != (json_int_t)request->tenant;
        }
    }
    struct fault fault;
    struct engine_adapter_command command = {
        .kind = ENGINE_ADAPTER_REMOVE, .owner = request->tenant, .id = request_id(request, 0)};
    (void)snprintf(command.name, sizeof command.name, "%.63s", request->model);
    request->kind = REQUEST_ADAPTER_REMOVE;
    if (!found)
        (void)fault_set(&fault, STATUS_NOT_FOUND, "there is no model \"%.64s\".", request->model);
    else if (engine_send(server->options.port, &command, sizeof command))
        (void)fault_set(&fault, STATUS_BUSY, "the engine's queue is full.");
    else
        return true;
    reply_fault_for(request, &fault);
    return false;
}

void adapters_on_reply(struct request *request, const struct engine_reply *reply, const char *text)
{
    bool is_asked = request->connection || request->kind == REQUEST_ADAPTER_ADD; // for its owner
    json_t *json = reply->bytes && is_asked
                       ? json_loadb(text, reply->bytes, JSON_REJECT_DUPLICATES, NULL)
                       : NULL;
    bool waits = false;
    if (request->kind == REQUEST_ADAPTER_ADD) {
        waits = engine_added(request, reply, json);
    } else if (request->kind == REQUEST_ADAPTER_REMOVE) {
        waits = engine_removed(request, reply);
    } else if (request->kind == REQUEST_ADAPTER_RESIDENT) {
        answer_name(request, reply);
    } else if (reply->status || !json) {
        struct fault fault;
        (void)fault_set(&fault, reply->status ? (enum status)reply->status : STATUS_INTERNAL,
                        "the engine could not answer.");
        reply_fault_for(request, &fault);
    } else if (request->kind == REQUEST_ADAPTER_OWNER) {
        waits = request->connection && go_on_removing(request, json);
    } else if (request->connection) {
        if (request->kind == REQUEST_STATS)
            answer_stats(request, json);
        else if (request->kind == REQUEST_ADAPTER_STATS)
            answer_adapter_stats(request, json);
        else
            answer_list(request, json);
    }
    json_decref(json);
    if (!waits)
        request_free(request);
}
