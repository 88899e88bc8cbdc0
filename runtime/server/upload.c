// SPDX-License-Identifier: Apache-2.0
// adapters.upload: the two files of an adapter come over the connection, in chunks, into a
// directory of their own below <state>/uploads; its commit goes on like adapters.register.
//
//   NONE --upload--> OPEN --upload_chunk...--> OPEN --upload_commit--> the request's, until it has
//     been converted
// An OPEN upload belongs to its connection, one at a time; it goes with the connection, when that
// becomes another tenant's, when no chunk comes for upload_timeout_ms, with upload_abort, and with
// everything that is wrong with what arrives. What a kill leaves is removed when the next server
// starts, or by polder adapter gc.
//
// Invariants: 1. the bytes of both files come in one order, configuration first, without gaps: what
// was received is one number. 2. server->upload_bytes is the sum of what open and committed uploads
// have announced, at most options.upload_bytes_max. 3. nothing is written under a name that came
// from a client. 4. one tenant has at most its share (server_share) of places and bytes.
//
// Directories are made, chunks written and files removed by the disk worker; while it does
// (`writing`), the upload is left alone.
#include <errno.h>
#include <fcntl.h>
#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include "adapters/registry.h"
#include "base/arith.h"
#include "base/check.h"
#include "base/files.h"
#include "runtime/server/internal.h"

// FRAME_REST: of a frame, what stands beside the data of a chunk.
enum { CONFIG, WEIGHTS, FILES };
enum { FRAME_REST = 256, UPLOADS_MAX = 16 };
enum { RETRY_MS = 5000 }; // an upload takes about that, or has stood still

static const char *const NAMES[FILES] = {"adapter_config.json", "adapter_model.safetensors"};

struct upload {
    struct server *server;
    uint32_t tenant;
    uint64_t id; // below 2^53, so that every client can hold it
    char name[ENGINE_ADAPTER_NAME];
    bool replace;
    uint64_t bytes[FILES], received; // announced; of both together
    struct digest digest;            // announced
    struct hash_stream stream;
    char folder[ENGINE_PATH];
    int directory, file; // file: the one being written, or -1
    bool writing; // it is with the disk worker, which alone touches received, stream, the files
    uint64_t active_us; // when its last chunk was asked for
    bool discharged;
    bool doomed; // freed when it has been written
};

static uint64_t bytes_of(const struct upload *upload)
{
    return upload->bytes[CONFIG] + upload->bytes[WEIGHTS];
}

// Any thread; it is nobody's any more.
static void remove_files(struct upload *upload)
{
    if (upload->file >= 0)
        (void)close(upload->file);
    for (int i = 0; upload->directory >= 0 && i < FILES; i++)
        (void)unlinkat(upload->directory, NAMES[i], 0);
    if (upload->directory >= 0)
        (void)close(upload->directory);
    (void)rmdir(upload->folder);
}

// Its share of the limits is free at once, whatever the disk does.
static void discharge(struct upload *upload)
{
    if (upload->discharged)
        return;
    upload->discharged = true;
    upload->server->upload_bytes -= bytes_of(upload);
    upload->server->uploads--;
}

static void remove_run(struct worker_job *job)
{
    remove_files(job->upload);
}

static void removed(struct server *server, struct worker_job *job)
{
    (void)server;
    free(job->upload);
}

void upload_free(struct upload *upload)
{
    if (!upload)
        return;
    discharge(upload);
    struct worker *disk = upload->server->disk; // NULL: the server is being undone
    if (disk && upload->writing) {
        upload->doomed = true;
        return;
    }
    struct worker_job *job = disk ? worker_job_new(0) : NULL;
    if (job) {
        job->run = remove_run;
        job->done = removed;
        job->upload = upload;
        if (!worker_put(disk, job))
            return;
        worker_job_free(job);
    }
    remove_files(upload);
    free(upload);
}

void upload_drop(struct connection *connection)
{
    upload_free(connection->upload);
    connection->upload = NULL;
}

// Closes the file that is complete and opens the next one. The digest takes each file's size first,
// as adapter_upload_digest does.
static bool next_file(struct upload *upload, int which)
{
    if (upload->file >= 0)
        (void)close(upload->file);
    upload->file = openat(upload->directory, NAMES[which],
                          O_WRONLY | O_CREAT | O_EXCL | O_NOFOLLOW | O_CLOEXEC, 0600);
    hash_update(&upload->stream, &upload->bytes[which], sizeof upload->bytes[which]);
    return upload->file >= 0;
}

static bool make_folder(struct upload *upload)
{
    char parent[ENGINE_PATH];
    const char *state = upload->server->options.state_dir;
    (void)snprintf(parent, sizeof parent, "%.900s/" REGISTRY_UPLOADS, state);
    (void)snprintf(upload->folder, sizeof upload->folder, "%.900s/" REGISTRY_UPLOADS "/%016" PRIx64,
                   state, upload->id);
    if (mkdir(parent, 0700) != 0 && errno != EEXIST)
        return false;
    if (mkdir(upload->folder, 0700) != 0)
        return false;
    upload->directory = open(upload->folder, O_RDONLY | O_DIRECTORY | O_NOFOLLOW | O_CLOEXEC);
    return upload->directory >= 0 && next_file(upload, CONFIG);
}

// ---- adapters.upload ---------------------------------------------------------------------------

// What the tenant has under way, on all its connections: open, or being converted.
static uint32_t count_own(const struct server *server, uint32_t tenant, uint64_t *bytes)
{
    uint32_t count = 0;
    *bytes = 0;
    for (uint32_t i = 0; i < server->limits.connections_max + server->limits.requests_max; i++) {
        const struct upload *upload =
            i < server->limits.connections_max
                ? server->connections[i].upload
                : server->requests[i - server->limits.connections_max].upload;
        if (!upload || upload->tenant != tenant)
            continue;
        count++;
        *bytes += bytes_of(upload);
    }
    return count;
}

static bool has_share(struct call *call, const struct upload *wanted)
{
    const struct server *server = call->connection->server;
    uint64_t own_bytes, most = server_share(server, server->options.upload_bytes_max);
    uint32_t own = count_own(server, wanted->tenant, &own_bytes);
    if (own >= server_share(server, UPLOADS_MAX))
        reply_later(call, STATUS_LIMIT, RETRY_MS,
                    "this tenant has %u uploads under way, and may have %u at a time", own,
                    (uint32_t)server_share(server, UPLOADS_MAX));
    else if (bytes_of(wanted) > most)
        reply_error(call, STATUS_LIMIT,
                    "the upload has %" PRIu64 " bytes; a tenant may have %" PRIu64
                    " under way (its share of --max-upload-bytes): ask the operator for more.",
                    bytes_of(wanted), most);
    else if (own_bytes + bytes_of(wanted) > most)
        reply_later(call, STATUS_LIMIT, RETRY_MS,
                    "this tenant has uploads of %" PRIu64 " bytes under way, and may have %" PRIu64
                    " (its share of --max-upload-bytes)",
                    own_bytes, most);
    else
        return true;
    return false;
}

static bool has_room(struct call *call, const struct upload *wanted)
{
    const struct server *server = call->connection->server;
    uint64_t left = server->options.upload_bytes_max - server->upload_bytes;
    if (call->connection->upload)
        reply_error(call, STATUS_BUSY,
                    "this connection has an upload open: commit it or abort it first.");
    else if (!has_share(call, wanted))
        return false;
    else if (server->uploads >= UPLOADS_MAX)
        reply_later(call, STATUS_LIMIT, RETRY_MS, "there are %u uploads under way",
                    server->uploads);
    else if (bytes_of(wanted) > left)
        reply_later(call, STATUS_LIMIT, RETRY_MS,
                    "the upload has %" PRIu64 " bytes; %" PRIu64 " of %" PRIu64
                    " are free (--max-upload-bytes)",
                    bytes_of(wanted), left, server->options.upload_bytes_max);
    else
        return true;
    return false;
}

static bool is_offered(struct call *call)
{
    const struct server *server = call->connection->server;
    if (!adapters_may_manage(call))
        return false;
    if (server->worker && server->options.upload_bytes_max)
        return true;
    reply_error(call, STATUS_UNSUPPORTED,
                "this server takes no uploads (--max-upload-bytes); use adapters.register.");
    return false;
}

static void begin_run(struct worker_job *job)
{
    if (!make_folder(job->upload))
        job->status = fault_set(&job->fault, STATUS_IO, "the server cannot store uploads: %s.",
                                strerror(errno));
}

static void answer_begun(struct request *request, const struct upload *upload)
{
    const struct server_limits *limits = &request->server->limits;
    size_t frame = min_size(limits->frame_bytes, limits->string_bytes);
    size_t chunk = frame > FRAME_REST ? min_size(frame - FRAME_REST, UPLOAD_CHUNK_BYTES_MAX) : 1;
    msgpack_packer *packer = reply_open_for(request);
    put_map(packer, 2);
    put_u64(packer, "upload", upload->id);
    put_u64(packer, "chunk_bytes_max", chunk);
    reply_send(request->connection);
}

// The worker has done something for an upload: its request is answered, and the upload goes when
// that failed or its connection went away meanwhile.
static void worked(struct server *server, struct worker_job *job,
                   void (*answer)(struct request *request, const struct upload *upload))
{
    struct upload *upload = job->upload;
    struct request *request = request_find(server, job->id);
    struct connection *connection = request ? request->connection : NULL;
    upload->writing = false;
    if (connection && job->status)
        reply_fault_for(request, &job->fault);
    else if (connection)
        answer(request, upload);
    if (request)
        request_free(request);
    if (upload->doomed)
        upload_free(upload);
    else if (job->status && connection)
        upload_drop(connection);
}

static void begun(struct server *server, struct worker_job *job)
{
    worked(server, job, answer_begun);
}

// Gives the upload and `bytes` bytes of data (may be none) to the worker. false: answered.
static bool put_work(struct call *call, enum request_kind kind, struct upload *upload,
                     const char *data, size_t bytes, void (*run)(struct worker_job *job),
                     void (*done)(struct server *server, struct worker_job *job))
{
    struct request *request = request_new(call, kind);
    if (!request)
        return false;
    struct worker_job *job = worker_job_new(request_id(request, 0));
    if (job) {
        job->run = run;
        job->done = done;
        job->upload = upload;
        job->bytes = bytes;
        job->data = bytes ? malloc(bytes) : NULL;
        if (job->data)
            memcpy(job->data, data, bytes);
    }
    if (job && (job->data || !bytes) && !worker_put(upload->server->disk, job)) {
        upload->writing = true;
        upload->active_us = server_now_us(upload->server);
        return true;
    }
    worker_job_free(job);
    request_free(request);
    if (upload->server->state == SERVER_LEAVING)
        reply_error(call, STATUS_SHUTTING_DOWN, "the server is shutting down.");
    else
        reply_error(call, STATUS_NO_MEMORY, "out of memory for the upload.");
    return false;
}

void method_adapters_upload(struct call *call)
{
    struct connection *connection = call->connection;
    struct server *server = connection->server;
    struct upload_params asked;
    if (!is_offered(call))
        return;
    if (!upload_parse(&call->params, server->options.upload_bytes_max, &asked)) {
        reply_fault(call, &call->params.fault);
        return;
    }
    struct upload wanted = {.server = server,
                            .tenant = connection->tenant,
                            .replace = asked.replace,
                            .bytes = {asked.config_bytes, asked.weights_bytes},
                            .digest = asked.digest,
                            .directory = -1,
                            .file = -1};
    memcpy(wanted.name, asked.name, sizeof wanted.name);
    if (!register_may_begin(call, wanted.name) || !has_room(call, &wanted))
        return;
    struct upload *upload = malloc(sizeof *upload);
    if (!upload) {
        reply_error(call, STATUS_NO_MEMORY, "out of memory.");
        return;
    }
    random_bytes(&wanted.id, sizeof wanted.id);
    wanted.id = wanted.id >> 11 | 1;
    *upload = wanted;
    hash_begin(&upload->stream, NULL);
    if (!put_work(call, REQUEST_UPLOAD, upload, NULL, 0, begin_run, begun)) {
        free(upload);
        return;
    }
    server->uploads++;
    server->upload_bytes += bytes_of(upload);
    connection->upload = upload;
}

void upload_tick(struct connection *connection, uint64_t now_us)
{
    const struct upload *upload = connection->upload;
    uint64_t most_us = (uint64_t)connection->server->limits.upload_timeout_ms * 1000;
    if (upload && !upload->writing && now_us > upload->active_us + most_us)
        upload_drop(connection);
}

// ---- its chunks --------------------------------------------------------------------------------

// The open upload that the parameter `upload` names; answered when there is none.
static struct upload *find(struct call *call)
{
    struct upload *upload = call->connection->upload;
    uint64_t id = 0;
    if (!is_offered(call))
        return NULL;
    if (!params_u64(&call->params, "upload", 1, UINT64_MAX, &id)) {
        reply_fault(call, &call->params.fault);
        return NULL;
    }
    if (upload && upload->id == id && upload->tenant == call->connection->tenant) {
        if (!upload->writing)
            return upload;
        reply_error(call, STATUS_BUSY, "the upload is being written to: wait for the answer.");
        return NULL;
    }
    reply_error(call, STATUS_NOT_FOUND, "this connection has no such upload open.");
    return NULL;
}

// May go over from the first file to the second.
static bool take(struct upload *upload, const char *data, size_t bytes)
{
    while (bytes) {
        size_t part = bytes;
        if (upload->received < upload->bytes[CONFIG]) {
            uint64_t left = upload->bytes[CONFIG] - upload->received;
            part = left < bytes ? (size_t)left : bytes;
        } else if (upload->received == upload->bytes[CONFIG] && !next_file(upload, WEIGHTS)) {
            return false;
        }
        if (!file_write(upload->file, data, part))
            return false;
        hash_update(&upload->stream, data, part);
        upload->received += part;
        data += part;
        bytes -= part;
    }
    return true;
}

static void chunk_run(struct worker_job *job)
{
    if (!take(job->upload, job->data, job->bytes))
        job->status = fault_set(&job->fault, STATUS_IO, "the server cannot store the upload: %s.",
                                strerror(errno));
}

static void answer_chunk(struct request *request, const struct upload *upload)
{
    msgpack_packer *packer = reply_open_for(request);
    put_map(packer, 1);
    put_u64(packer, "received", upload->received);
    reply_send(request->connection);
}

static void chunk_done(struct server *server, struct worker_job *job)
{
    worked(server, job, answer_chunk);
}

void method_adapters_upload_chunk(struct call *call)
{
    static const char *const names[] = {"upload", "offset", "data"};
    struct upload *upload = call_params_known(call, names, ARRAY_COUNT(names)) ? find(call) : NULL;
    struct text_view data;
    if (!upload)
        return;
    if (upload_chunk_parse(&call->params, upload->received, bytes_of(upload), &data))
        (void)put_work(call, REQUEST_UPLOAD_CHUNK, upload, data.text, data.bytes, chunk_run,
                       chunk_done);
    else
        reply_fault(call, &call->params.fault);
}

// ---- its end -----------------------------------------------------------------------------------

void method_adapters_upload_commit(struct call *call)
{
    static const char *const names[] = {"upload"};
    struct upload *upload = call_params_known(call, names, ARRAY_COUNT(names)) ? find(call) : NULL;
    if (!upload || !register_may_begin(call, upload->name))
        return;
    uint64_t total = bytes_of(upload);
    if (upload->received < total) {
        reply_error(call, STATUS_INVALID, "%" PRIu64 " of %" PRIu64 " bytes have not come yet.",
                    total - upload->received, total);
        return;
    }
    struct hash_stream stream = upload->stream; // a commit that finds no room may be tried again
    struct digest digest = hash_end(&stream);
    if (!digest_equal(&digest, &upload->digest)) {
        reply_error(call, STATUS_CORRUPT,
                    "what arrived has another digest than was announced; upload it again.");
        upload_drop(call->connection);
        return;
    }
    int directory = fcntl(upload->directory, F_DUPFD_CLOEXEC, 0);
    if (directory < 0)
        reply_error(call, STATUS_IO, "the upload cannot be opened: %s.", strerror(errno));
    else if (register_begin(call, upload->name, directory, "", upload->replace, upload))
        call->connection->upload = NULL; // the request's
    else
        (void)close(directory);
}

void method_adapters_upload_abort(struct call *call)
{
    static const char *const names[] = {"upload"};
    if (!call_params_known(call, names, ARRAY_COUNT(names)) || !find(call))
        return;
    upload_drop(call->connection);
    msgpack_packer *packer = reply_open(call);
    put_map(packer, 1);
    put_bool(packer, "aborted", true);
    reply_send(call->connection);
}
