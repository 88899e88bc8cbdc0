// SPDX-License-Identifier: Apache-2.0
// adapters.upload: the two files of an adapter come over the connection, in chunks, into a
// directory of their own below <state>/uploads; its commit goes on like adapters.add.
//
//   NONE --upload--> OPEN --upload_chunk...--> OPEN --upload_commit--> the request's, until it has
//     been converted
// An OPEN upload belongs to its connection, one at a time; it goes with the connection, with
// upload_abort, and with everything that is wrong with what arrives. What a kill leaves is removed
// when the next server starts, or by polder adapter gc.
//
// Invariants: 1. the bytes of both files come in one order, configuration first, without gaps: what
// was received is one number. 2. server->upload_bytes is the sum of what open and committed uploads
// have announced, at most options.upload_bytes_max. 3. nothing is written under a name that came
// from a client.
//
// Chunks are written, and files removed, by the disk worker; while it writes, the upload is left
// alone.
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
enum { CONFIG_BYTES_MAX = 4 << 20, CHUNK_BYTES_MAX = 1 << 20, FRAME_REST = 256, UPLOADS_MAX = 16 };

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
    bool writing; // a chunk is with the disk worker, which alone touches received, stream, file
    bool discharged;
    bool doomed; // freed when it has been written
};

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
    upload->server->upload_bytes -= upload->bytes[CONFIG] + upload->bytes[WEIGHTS];
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

static void drop(struct connection *connection)
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

static bool read_begin(struct call *call, struct upload *out)
{
    static const char *const names[] = {"name", "replace", "config_bytes", "weights_bytes",
                                        "digest"};
    struct params *params = &call->params;
    char hex[2 * DIGEST_BYTES + 1] = "";
    uint64_t max = call->connection->server->options.upload_bytes_max;
    bool good = params_known(params, names, ARRAY_COUNT(names)) &&
                params_name(params, "name", sizeof out->name, out->name) &&
                params_bool(params, "replace", &out->replace) &&
                params_u64(params, "config_bytes", 1, CONFIG_BYTES_MAX, &out->bytes[CONFIG]) &&
                params_u64(params, "weights_bytes", 1, max, &out->bytes[WEIGHTS]) &&
                params_name(params, "digest", sizeof hex, hex);
    if (good && (!out->name[0] || !out->bytes[CONFIG] || !out->bytes[WEIGHTS]))
        good = params_refuse(params, "name, config_bytes, weights_bytes and digest are needed.");
    if (good && !adapter_name_is_good(out->name))
        good = params_refuse(params, "a name is 1 to 63 letters, digits, '.', '_', '-', not "
                                     "starting with '.'.");
    if (good && !digest_from_hex(hex, &out->digest))
        good = params_refuse(params, "digest is 64 hexadecimal digits.");
    if (!good)
        reply_fault(call, &params->fault);
    return good;
}

static bool has_room(struct call *call, const struct upload *wanted)
{
    const struct server *server = call->connection->server;
    uint64_t bytes = wanted->bytes[CONFIG] + wanted->bytes[WEIGHTS];
    uint64_t left = server->options.upload_bytes_max - server->upload_bytes;
    if (call->connection->upload)
        reply_error(call, STATUS_BUSY,
                    "this connection has an upload open: commit it or abort it first.");
    else if (server->uploads >= UPLOADS_MAX)
        reply_error(call, STATUS_LIMIT, "there are %u uploads under way: try again later.",
                    server->uploads);
    else if (bytes > left)
        reply_error(call, STATUS_LIMIT,
                    "the upload has %" PRIu64 " bytes; %" PRIu64 " of %" PRIu64
                    " are free (--max-upload-bytes): %s.",
                    bytes, left, server->options.upload_bytes_max,
                    bytes > server->options.upload_bytes_max ? "ask the operator for more"
                                                             : "try again later");
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
                "this server takes no uploads (--max-upload-bytes); use adapters.add.");
    return false;
}

void method_adapters_upload(struct call *call)
{
    struct connection *connection = call->connection;
    struct server *server = connection->server;
    struct upload wanted = {.server = server,
                            .tenant = connection->tenant,
                            .replace = true,
                            .directory = -1,
                            .file = -1};
    if (!is_offered(call) || !read_begin(call, &wanted) || !adapters_may_add(call, wanted.name) ||
        !has_room(call, &wanted))
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
    server->uploads++;
    server->upload_bytes += upload->bytes[CONFIG] + upload->bytes[WEIGHTS];
    connection->upload = upload;
    if (!make_folder(upload)) {
        reply_error(call, STATUS_IO, "the server cannot store uploads: %s.", strerror(errno));
        drop(connection);
        return;
    }
    size_t frame = min_size(server->limits.frame_bytes, server->limits.string_bytes);
    size_t chunk = frame > FRAME_REST ? min_size(frame - FRAME_REST, CHUNK_BYTES_MAX) : 1;
    msgpack_packer *packer = reply_open(call);
    put_map(packer, 2);
    put_u64(packer, "upload", upload->id);
    put_u64(packer, "chunk_bytes_max", chunk);
    reply_send(connection);
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
        reply_error(call, STATUS_BUSY, "a chunk is being written: wait for its answer.");
        return NULL;
    }
    reply_error(call, STATUS_NOT_FOUND, "this connection has no such upload open.");
    return NULL;
}

static bool read_chunk(struct call *call, const struct upload *upload, const char **data,
                       size_t *bytes)
{
    struct params *params = &call->params;
    uint64_t total = upload->bytes[CONFIG] + upload->bytes[WEIGHTS], offset = UINT64_MAX;
    const msgpack_object *value = params_get(params, "data");
    bool good = params_u64(params, "offset", 0, total, &offset);
    if (good && (!value || value->type != MSGPACK_OBJECT_BIN || !value->via.bin.size))
        good = params_refuse(params, "data must be a bin of at least one byte.");
    if (good && value->via.bin.size > CHUNK_BYTES_MAX)
        good = params_refuse(params, "a chunk has at most %d bytes.", CHUNK_BYTES_MAX);
    if (good && offset != upload->received)
        good = params_refuse(params, "the next chunk begins at offset %llu.",
                             (unsigned long long)upload->received);
    if (good && value->via.bin.size > total - upload->received)
        good = params_refuse(params, "the chunk goes beyond the %llu bytes that were announced.",
                             (unsigned long long)total);
    if (!good) {
        reply_fault(call, &params->fault);
        return false;
    }
    *data = value->via.bin.ptr;
    *bytes = value->via.bin.size;
    return true;
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

static void chunk_done(struct server *server, struct worker_job *job)
{
    struct upload *upload = job->upload;
    struct request *request = request_find(server, job->id);
    struct connection *connection = request ? request->connection : NULL;
    upload->writing = false;
    if (connection && job->status) {
        reply_fault_for(request, &job->fault);
    } else if (connection) {
        msgpack_packer *packer = reply_open_for(request);
        put_map(packer, 1);
        put_u64(packer, "received", upload->received);
        reply_send(connection);
    }
    if (request)
        request_free(request);
    if (upload->doomed)
        upload_free(upload);
    else if (job->status && connection)
        drop(connection);
}

void method_adapters_upload_chunk(struct call *call)
{
    static const char *const names[] = {"upload", "offset", "data"};
    struct upload *upload = call_params_known(call, names, ARRAY_COUNT(names)) ? find(call) : NULL;
    const char *data;
    size_t bytes;
    if (!upload || !read_chunk(call, upload, &data, &bytes))
        return;
    struct request *request = request_new(call, REQUEST_UPLOAD_CHUNK);
    if (!request)
        return;
    struct worker_job *job = worker_job_new(request_id(request, 0));
    if (job) {
        job->run = chunk_run;
        job->done = chunk_done;
        job->upload = upload;
        job->bytes = bytes;
        job->data = malloc(bytes);
    }
    if (job && job->data) {
        memcpy(job->data, data, bytes);
        if (!worker_put(upload->server->disk, job)) {
            upload->writing = true;
            return;
        }
    }
    worker_job_free(job);
    request_free(request);
    reply_error(call, STATUS_NO_MEMORY, "out of memory for the chunk.");
}

// ---- its end -----------------------------------------------------------------------------------

void method_adapters_upload_commit(struct call *call)
{
    static const char *const names[] = {"upload"};
    struct upload *upload = call_params_known(call, names, ARRAY_COUNT(names)) ? find(call) : NULL;
    if (!upload || !adapters_may_add(call, upload->name))
        return;
    uint64_t total = upload->bytes[CONFIG] + upload->bytes[WEIGHTS];
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
        drop(call->connection);
        return;
    }
    int directory = fcntl(upload->directory, F_DUPFD_CLOEXEC, 0);
    if (directory < 0)
        reply_error(call, STATUS_IO, "the upload cannot be opened: %s.", strerror(errno));
    else if (adapters_start_job(call, upload->name, directory, upload->replace, upload))
        call->connection->upload = NULL; // the request's
}

void method_adapters_upload_abort(struct call *call)
{
    static const char *const names[] = {"upload"};
    if (!call_params_known(call, names, ARRAY_COUNT(names)) || !find(call))
        return;
    drop(call->connection);
    msgpack_packer *packer = reply_open(call);
    put_map(packer, 1);
    put_bool(packer, "aborted", true);
    reply_send(call->connection);
}
