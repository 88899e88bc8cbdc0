// SPDX-License-Identifier: Apache-2.0
// adapters.register: a PEFT directory becomes a registered adapter, and adapters.remove its end.
//
//   asked --> converting (converter) --> ENGINE_ADAPTER_ADD --> kept: renamed (disk) --> answered
//   asked --> ENGINE_ADAPTER_REMOVE (adapters.c) --> forgotten: unlinked (disk) --> answered
//
// Reads below the operator's roots only: every step of the path is opened with O_NOFOLLOW, so
// neither ".." nor a symlink, now or changed meanwhile, leads out. The converter gets the directory
// as an open descriptor (/proc/self/fd/N), not as a name. Nothing here touches a disk on the I/O
// thread.
//
// A tenant has a share of the places (server_share), so that one alone cannot keep the others out.
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

enum { RETRY_MS = 1000 }; // a conversion takes about that

// ---- files -------------------------------------------------------------------------------------

static void discard_run(struct worker_job *job)
{
    (void)unlink(job->store_path);
}

static void discarded(struct server *server, struct worker_job *job)
{
    struct request *request = request_find(server, job->id);
    if (!request)
        return;
    reply_fault_for(request, &job->fault);
    request_free(request);
}

// A store file that nobody wants goes; then the request (may be NULL) is answered with the fault.
static void discard(struct server *server, const char *path, struct request *request,
                    const struct fault *fault)
{
    struct worker_job *job = worker_job_new(request ? request_id(request, 0) : 0);
    if (job) {
        job->run = discard_run;
        job->done = discarded;
        job->fault = *fault;
        (void)snprintf(job->store_path, sizeof job->store_path, "%s", path);
        if (!worker_put(server->disk, job))
            return;
        worker_job_free(job);
    }
    (void)unlink(path);
    if (request) {
        reply_fault_for(request, fault);
        request_free(request);
    }
}

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
static int open_adapter(const char *const *roots, const char *path)
{
    for (int i = 0; i < SERVER_ADAPTER_DIRS_MAX && roots[i]; i++) {
        const char *root = roots[i], *rest = path;
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

// ---- adapters.register -------------------------------------------------------------------------

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

bool register_may_begin(struct call *call, const char *name)
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

// How many adapters one tenant may have in conversion: others must find a place too.
static bool has_place(struct call *call)
{
    const struct server *server = call->connection->server;
    uint32_t mine = 0;
    for (uint32_t i = 0; i < server->limits.requests_max; i++)
        mine += server->requests[i].kind == REQUEST_ADAPTER_ADD &&
                server->requests[i].tenant == call->connection->tenant;
    uint32_t share = (uint32_t)server_share(server, SERVER_CONVERSIONS_MAX);
    if (mine < share)
        return true;
    reply_later(call, STATUS_BUSY, RETRY_MS,
                "%u adapters of this tenant are being registered, and it may have %u at a time",
                mine, share);
    return false;
}

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
    if (job->directory < 0)
        job->directory = open_adapter(job->roots, job->path);
    job->status = job->directory < 0
                      ? fault_set(&job->fault, STATUS_NOT_FOUND,
                                  "there is no such directory below the server's adapter "
                                  "directories.")
                      : find_old(job);
    if (job->status)
        return;
    (void)snprintf(directory, sizeof directory, "/proc/self/fd/%d", job->directory);
    job->report = calloc(1, REPORT_BYTES);
    if (!job->report)
        job->status = fault_set(&job->fault, STATUS_NO_MEMORY, "out of memory.");
    else
        job->status =
            job->converter->convert(job->converter->context, directory, job->old_path,
                                    job->store_path, job->report, REPORT_BYTES, &job->fault);
}

// The server ends: nobody will register what has been converted.
static void convert_drop(struct worker_job *job)
{
    (void)unlink(job->store_path);
}

void register_abandon(const struct request *request)
{
    (void)unlink(request->store_path);
}

static struct worker_job *convert_job(struct request *request, int directory, const char *path)
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
    job->drop = convert_drop;
    job->converter = &server->options.converter;
    job->directory = directory;
    job->roots = server->options.adapter_dirs;
    (void)snprintf(job->path, sizeof job->path, "%s", path);
    memcpy(job->store_path, request->store_path, sizeof job->store_path);
    job->state_dir = server->options.state_dir;
    (void)snprintf(job->entry.name, sizeof job->entry.name, "%.63s", request->model);
    (void)snprintf(job->entry.tenant, sizeof job->entry.tenant, "%s",
                   tenants_at(server->tenants, request->tenant)->name);
    return job;
}

// false: the descriptor is still the caller's.
static bool put_job(struct request *request, int directory, const char *path)
{
    struct worker_job *job = convert_job(request, directory, path);
    if (job && !worker_put(request->server->worker, job))
        return true;
    if (job)
        job->directory = -1;
    worker_job_free(job);
    return false;
}

bool register_begin(struct call *call, const char *name, int directory, const char *path,
                    bool replace, struct upload *upload)
{
    if (!has_place(call) || !adapters_may_change(call))
        return false;
    struct request *request = request_new(call, REQUEST_ADAPTER_ADD);
    if (!request)
        return false;
    (void)snprintf(request->model, sizeof request->model, "%s", name);
    request->replace = replace;
    if (put_job(request, directory, path)) {
        request->upload = upload;
        return true;
    }
    request_free(request);
    reply_later(call, STATUS_BUSY, RETRY_MS, "too many adapters are being converted");
    return false;
}

void method_adapters_register(struct call *call)
{
    const struct server *server = call->connection->server;
    struct register_params wanted;
    if (!adapters_may_manage(call))
        return;
    if (!register_parse(&call->params, &wanted))
        reply_fault(call, &call->params.fault);
    else if (!server->worker || !server->options.adapter_dirs[0])
        reply_error(call, STATUS_UNSUPPORTED, "this server takes no adapters at run time.");
    else if (register_may_begin(call, wanted.name))
        (void)register_begin(call, wanted.name, -1, wanted.path, wanted.replace, NULL);
}

static bool send_add(struct request *request)
{
    struct engine_adapter_command command = {.kind = ENGINE_ADAPTER_ADD,
                                             .owner = request->tenant,
                                             .id = request_id(request, 0),
                                             .replace = request->replace,
                                             .shared = server_share(request->server, 4) < 4};
    command.owned_bytes_max = tenants_at(request->server->tenants, request->tenant)->adapter_bytes;
    (void)snprintf(command.name, sizeof command.name, "%.63s", request->model);
    memcpy(command.store_path, request->store_path, sizeof command.store_path);
    return engine_send(request->server->options.port, &command, sizeof command) == STATUS_OK;
}

static void converted(struct server *server, struct worker_job *job)
{
    struct request *request = request_find(server, job->id);
    if (!request || request->kind != REQUEST_ADAPTER_ADD) {
        convert_drop(job); // the server ends, and has answered it
        return;
    }
    request->report = job->report;
    job->report = NULL;
    upload_free(request->upload); // what was uploaded has been read
    request->upload = NULL;
    if (!job->status && server->state == SERVER_LEAVING)
        job->status = fault_set(&job->fault, STATUS_SHUTTING_DOWN, "The server was shut down.");
    if (!job->status && send_add(request))
        return;
    if (!job->status)
        (void)fault_set(&job->fault, STATUS_BUSY, "the engine's queue is full.");
    discard(server, request->store_path, request, &job->fault);
}

// ---- the file of a registration ----------------------------------------------------------------
// The engine has said yes; the disk worker makes it last, then the client hears of it.

static void answer_kept(struct request *request);
static void answer_gone(struct request *request);

static void keep_run(struct worker_job *job)
{
    job->status =
        registry_commit(job->state_dir, job->store_path, &job->entry, &job->changed, &job->fault);
}

static void forget_run(struct worker_job *job)
{
    job->status = registry_remove(job->state_dir, &job->entry, &job->changed, &job->fault);
    if (job->status == STATUS_NOT_FOUND)
        job->status = STATUS_OK;
}

#define NOT_KEPT "It serves until the next restart, but was not kept"
#define NOT_REMOVED "It is gone until the next restart, but its file is not"

// The engine has done it, the disk has not.
static void answer_unkept(struct request *request, const struct fault *why, const char *what)
{
    struct fault fault;
    (void)fault_set(&fault, why->status, "%s: %.120s", what, why->text);
    reply_fault_for(request, &fault);
    request_free(request);
}

// A change that the directory has and no sync has written down outlasts this server, not the power.
static void warn_unkept(const struct worker_job *job, const char *restart, const char *power)
{
    if (job->status)
        log_line(LOG_WARN, "adapter %s %s: %s", job->entry.name, job->changed ? power : restart,
                 job->fault.text);
}

static void kept(struct server *server, struct worker_job *job)
{
    struct request *request = request_find(server, job->id);
    warn_unkept(job, "will be gone after a restart", "is registered, unless the power fails now");
    if (job->status && !job->changed)
        discard(server, job->store_path, NULL, &job->fault); // the engine has it open
    if (request && job->status)
        answer_unkept(request, &job->fault,
                      job->changed ? "It serves and its file is in its place, but may be lost if "
                                     "the power fails"
                                   : NOT_KEPT);
    else if (request)
        answer_kept(request);
}

static void forgotten(struct server *server, struct worker_job *job)
{
    struct request *request = request_find(server, job->id);
    warn_unkept(job, "will be back after a restart", "is removed, unless the power fails now");
    if (request && job->status)
        answer_unkept(request, &job->fault,
                      job->changed ? "It is gone and so is its file, but may be back if the power "
                                     "fails"
                                   : NOT_REMOVED);
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
bool register_added(struct request *request, const struct engine_reply *reply, const json_t *json)
{
    struct fault fault;
    if (reply->status) {
        (void)fault_set(&fault, (enum status)reply->status, "%.199s", reply->message);
        discard(request->server, request->store_path, request, &fault);
        return true;
    }
    request->operators = json_is_true(json_object_get(json, "operator"));
    broken_forget(request->server, request->model);
    if (put_registry_job(request, true))
        return true;
    (void)fault_set(&fault, STATUS_NO_MEMORY, "out of memory.");
    answer_unkept(request, &fault, NOT_KEPT);
    return true;
}

bool register_removed(struct request *request, const struct engine_reply *reply, const json_t *json)
{
    struct fault fault;
    // One that is broken has its file and nothing else.
    bool broken = reply->status == STATUS_NOT_FOUND && broken_is_own(request);
    if (reply->status && !broken) {
        // The operator's is not this tenant's to remove, so it is not there.
        if (reply->status == STATUS_NOT_FOUND || reply->status == STATUS_DENIED)
            (void)fault_set(&fault, STATUS_NOT_FOUND, "there is no model \"%.64s\".",
                            request->model);
        else
            (void)fault_set(&fault, (enum status)reply->status, "%.199s", reply->message);
        reply_fault_for(request, &fault);
        return false;
    }
    request->operators = json_is_true(json_object_get(json, "operator"));
    broken_forget(request->server, request->model);
    if (put_registry_job(request, false))
        return true;
    if (request->server->disk) {
        (void)fault_set(&fault, STATUS_NO_MEMORY, "out of memory.");
        answer_unkept(request, &fault, NOT_REMOVED);
    } else {
        answer_gone(request);
    }
    return true;
}

// The last word on adapters.register; the request is gone after it.
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

static void answer_gone(struct request *request)
{
    adapters_answer_name(request);
    request_free(request);
}
