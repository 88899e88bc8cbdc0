// SPDX-License-Identifier: Apache-2.0
// Shared inside runtime/server only: the state of the I/O thread.
//
// Files: server.c (life, signals, timers, draining), listen.c (addresses, accepting), connection.c
// (bytes in and out, limits, closing), dispatch.c (message -> method), methods.c (the simple
// methods), generate.c (parameters -> engine requests), events.c (engine events -> answers),
// request.c (the request table), adapters.c (who may; load, pin and the like), list.c (models,
// adapters.list), stats.c, register.c, upload.c, broken.c (store files that are no good), worker.c
// (threads that wait for disks), reply.c (packing), json.c.
//
//   bytes -> connection.in -> scan -> msgpack-c -> dispatch -> method --+--> reply
//                                                                       +--> request --> engine
//                                                                       port
//   engine port --> events --> request --> reply --> connection's output buffer
#ifndef POLDER_RUNTIME_SERVER_INTERNAL_H
#define POLDER_RUNTIME_SERVER_INTERNAL_H

#include <event2/bufferevent.h>
#include <event2/event.h>
#include <event2/listener.h>
#include <msgpack.h>

#include "adapters/registry.h"
#include "base/hash.h"
#include "runtime/server/params.h"
#include "runtime/server/scan.h"
#include "runtime/server/server.h"
#include "tenants/tenants.h"

struct server;
struct connection;

// Grows up to what the server's buffer budget allows.
struct bytes {
    char *data;
    size_t count, room;
};

// ---- requests: everything that is answered later -----------------------------------------------
//
//   FREE -> GENERATE: choices sent -> [text events] -> all choices done -> answered -> FREE
//   FREE -> the others: command sent -> ENGINE_REPLY -> answered (or a second command) -> FREE
// A request whose connection went away stays until the engine or a worker has said its last word.

enum request_kind {
    REQUEST_FREE,
    REQUEST_GENERATE,
    REQUEST_MODELS,
    REQUEST_ADAPTER_LIST,
    REQUEST_ADAPTER_ADD,      // converting, then ENGINE_ADAPTER_ADD
    REQUEST_ADAPTER_REMOVE,   // ENGINE_ADAPTER_REMOVE, then its file
    REQUEST_ADAPTER_RESIDENT, // load, unload, pin, unpin
    REQUEST_ADAPTER_STATS,    // the list, for its sums
    REQUEST_UPLOAD,           // its directory is being made
    REQUEST_UPLOAD_CHUNK,     // being written
    REQUEST_STATS
};

struct choice {
    bool sent, started, done, cancel;    // cancel: ENGINE_CANCEL is still to be sent
    struct bytes text, tokens, logprobs; // tokens, logprobs: packed values without array header
    uint32_t generated;                  // text events with a token
    uint32_t packed;                     // values in tokens and in logprobs
    enum engine_finish finish;
    struct engine_done end;
};

struct request {
    enum request_kind kind;
    uint32_t slot, generation, msgid, tenant;
    struct server *server;
    struct connection *connection;   // NULL: it went away
    struct request *next, *previous; // of the connection; next also links the free list
    uint64_t created_us, seed;
    uint32_t choices, done;
    bool replace;                  // adapters.register
    bool operators;                // the adapter is the operator's: adapters.register, remove
    bool stream, logprobs, hidden; // hidden: a model this tenant may not use
    bool want_pause, is_paused;    // by a slow reader; sent with the next flush
    bool control;                  // has controls to send
    bool failed;
    struct fault fault;                  // the first failure, when failed
    char model[ENGINE_ADAPTER_NAME * 2]; // or adapter name
    char store_path[ENGINE_PATH];        // adapters.register
    char *report;                        // adapters.register: JSON from the converter
    struct upload *upload;               // adapters.upload_commit: until it is converted, or NULL
    struct listing *listing;             // models, adapters.list, adapters.stats; or NULL
    struct choice choice[GENERATE_CHOICES_MAX];
};

struct connection {
    struct server *server;
    struct bufferevent *events; // NULL: the slot is free
    uint32_t slot;
    bool authenticated, structured;
    bool slow;    // too much output waits: not reading, its requests are paused
    bool closing; // close when the output is flushed
    bool doomed;  // freed by the reaper
    uint32_t tenant, auth_failures;
    struct digest key; // of the key it used, looked up again after a reload
    uint64_t opened_us, active_us, frame_us, slow_us, closing_us;
    struct bytes in; // an unfinished message from its first byte, or several
    struct scanner scanner;
    bool scanning; // scanner is at work on in.data
    size_t output_charged;
    struct request *requests;
    uint32_t request_count;
    struct upload *upload; // the one that is open, or NULL
    char peer[64];
    struct connection *next_free;
};

enum server_state { SERVER_RUNNING, SERVER_DRAINING, SERVER_LEAVING };

struct tenant_usage {
    struct tenant_counters counters;
    size_t buffered;
    uint32_t connections;
    uint64_t requests, finished, failed, cancelled;
    uint64_t prompt_tokens, cached_tokens, completion_tokens;
    uint64_t adapter_wait_us; // choices that could go on but for their adapter
};

struct worker;
struct upload;
struct listing;

struct server {
    struct server_options options;
    struct server_limits limits;
    enum server_state state;
    uint64_t drain_us;
    struct event_base *base;
    struct evconnlistener *listeners[SERVER_LISTEN_MAX];
    bool listeners_off; // accept failed (no descriptors); tried again at the next tick
    char unix_paths[SERVER_LISTEN_MAX][108];
    struct event *on_term, *on_int, *on_hup, *on_events, *on_tick, *on_reap, *on_worker, *on_disk;
    struct tenants *tenants;
    struct tenant_usage *usage; // [TENANTS_MAX]
    struct connection *connections, *free_connections;
    uint32_t connection_count, unauthenticated_count;
    struct request *requests, *free_requests;
    uint32_t request_count, controls;
    size_t buffered;
    msgpack_sbuffer scratch; // the message being packed
    bool scratch_failed;
    msgpack_packer packer;
    int32_t *tokens; // scratch for encode
    size_t tokens_max;
    uint8_t *command; // scratch for one ENGINE_REQUEST
    size_t command_max;
    char *text; // scratch for decode: text_max raw bytes, then 3 * text_max made valid
    size_t text_max;
    struct worker *worker; // converts; NULL: no adapters at run time
    struct worker *disk;   // everything else that waits for a disk; NULL: no state directory
    uint32_t uploads;      // open, or being converted
    uint64_t upload_bytes; // announced by these
    struct server_broken *broken;
    size_t broken_count;
    bool engine_stopped, quit_sent, drain_sent;
    enum status engine_status; // what it stopped with
    uint64_t accepted, refused_connections, protocol_errors, dropped_slow, messages;
    enum status status; // what server_run returns
};

// One message being handled.
struct call {
    struct connection *connection;
    bool request; // false: a notification, which gets no answer
    uint32_t msgid;
    struct params params;
};

static inline uint64_t server_now_us(const struct server *server)
{
    return clock_now_us(&server->options.clock);
}

// ---- server.c
enum { SERVER_CONVERSIONS_MAX = 8 };
// tenant UINT32_MAX: nobody's. false: the budget has no room.
enum budget_use { BUDGET_CONNECTIONS, BUDGET_ANSWERS };
bool server_charge(struct server *server, uint32_t tenant, enum budget_use use, size_t bytes);
void server_discharge(struct server *server, uint32_t tenant, size_t bytes);
// data NULL: only makes room. false: the budget or the memory has no room; nothing changed.
bool bytes_add(struct server *server, uint32_t tenant, enum budget_use use, struct bytes *bytes,
               const void *data, size_t count);
void bytes_free(struct server *server, uint32_t tenant, struct bytes *bytes);

// Of `places` (or bytes) that all tenants use, what one may have at a time: a quarter, or all when
// no other manages adapters.
uint64_t server_share(const struct server *server, uint64_t places);

// Decodes ids into scratch, as valid UTF-8; *text is good until the next call.
MUST_USE enum status server_decode(struct server *server, const int32_t *tokens, size_t count,
                                   const char **text, size_t *bytes);

// ---- listen.c
MUST_USE enum status listen_open(struct server *server, char *addresses, size_t bytes,
                                 struct fault *fault);
void listen_close(struct server *server);
void listen_enable(struct server *server);

// ---- connection.c
void connection_accepted(struct server *server, int descriptor, const char *peer);
void connection_send(struct connection *connection, const void *data, size_t bytes);
void connection_close_after_flush(struct connection *connection);           // nothing more is read
void connection_set_tenant(struct connection *connection, uint32_t tenant); // moves its charges
void connection_doom(struct connection *connection); // gone at the end of this turn of the loop
void connection_reap(struct server *server);
void connection_tick(struct connection *connection, uint64_t now_us);
void connection_free_all(struct server *server);
uint32_t connection_owner(const struct connection *connection); // tenant, or UINT32_MAX

// ---- dispatch.c
void dispatch_message(struct connection *connection, const uint8_t *frame, size_t bytes);

// ---- one function per method, in the file of its subject
void method_hello(struct call *call);
void method_auth(struct call *call);
void method_ping(struct call *call);
void method_tokenize(struct call *call);
void method_detokenize(struct call *call);
void method_cancel(struct call *call);
void method_generate(struct call *call);
void method_models(struct call *call);
void method_stats(struct call *call);
void method_adapters_list(struct call *call);
void method_adapters_register(struct call *call);
void method_adapters_remove(struct call *call);
void method_adapters_load(struct call *call);
void method_adapters_unload(struct call *call);
void method_adapters_pin(struct call *call);
void method_adapters_unpin(struct call *call);
void method_adapters_stats(struct call *call);

// ---- request.c
struct request *request_new(struct call *call,
                            enum request_kind kind); // NULL: refused and answered
struct request *request_find(struct server *server, uint64_t id);
uint64_t request_id(const struct request *request, uint32_t choice);
struct request *request_of(const struct connection *connection, uint32_t msgid);
void request_free(struct request *request);
void request_free_texts(struct request *request); // gives its buffers back early
void request_detach(struct request *request);     // its connection goes away
void request_cancel(struct request *request);
void request_pause(struct request *request, bool pause);
void request_flush_controls(struct server *server);
void request_fail(struct request *request, enum status status,
                  const char *sentence); // first one counts

// ---- events.c
void events_drain(struct server *server);
void generate_finish(struct request *request);

// ---- adapters.c
void adapters_on_reply(struct request *request, const struct engine_reply *reply, const char *json);
bool adapters_may_manage(struct call *call); // false: answered
bool adapters_may_change(struct call *call); // counts it; false: answered
// A request for what costs the I/O thread time; a tenant may have two. NULL: answered.
struct request *adapters_question(struct call *call, enum request_kind kind);
void adapters_answer_name(struct request *request);

// ---- list.c, stats.c
struct json_t;
bool list_page(struct request *request, struct json_t *json); // true: it waits for the next one
void listing_free(struct listing *listing);                   // NULL is fine
void stats_answer(struct request *request, const struct json_t *engine);

// ---- register.c
// May this tenant register the name now? false: answered.
bool register_may_begin(struct call *call, const char *name);
// Begins: with an open directory, or (-1) with a path. true: the descriptor, and the upload (may be
// NULL), are taken. false: answered.
bool register_begin(struct call *call, const char *name, int directory, const char *path,
                    bool replace, struct upload *upload);
// The engine's word. true: the request waits on.
bool register_added(struct request *request, const struct engine_reply *reply,
                    const struct json_t *json);
bool register_removed(struct request *request, const struct engine_reply *reply,
                      const struct json_t *json);
// The server ends, and the engine will not say anything about it.
void register_abandon(const struct request *request);

// ---- broken.c
MUST_USE enum status broken_take(struct server *server, struct fault *fault);
// The next one that this tenant may know of, by name; NULL: no more.
const struct server_broken *broken_at(const struct server *server, uint32_t tenant, size_t *at);
const char *broken_why(const struct server *server, uint32_t tenant, const char *name); // or NULL
bool broken_is_own(const struct request *request); // request->model: this tenant's
void broken_forget(struct server *server, const char *name);

// ---- upload.c
void method_adapters_upload(struct call *call);
void method_adapters_upload_chunk(struct call *call);
void method_adapters_upload_commit(struct call *call);
void method_adapters_upload_abort(struct call *call);
void upload_free(struct upload *upload); // and its files; NULL is fine
void upload_drop(struct connection *connection);
void upload_tick(struct connection *connection, uint64_t now_us); // drops one that stands still

// ---- worker.c: a thread and its queue of jobs
struct worker_job {
    uint64_t id; // of the request that waits for it; 0: none does
    // run: on the worker's thread, fills status and fault. done: on the I/O thread, then it is
    // freed.
    void (*run)(struct worker_job *job);
    void (*done)(struct server *server, struct worker_job *job);
    void (*drop)(struct worker_job *job); // or NULL. In place of done, when the worker is destroyed
    enum status status;
    struct fault fault;
    struct worker_job *next;
    // What run needs, by kind of job; freed with it:
    const struct server_converter *converter;
    int directory; // or -1: to be opened
    const char *const *roots;
    char path[ENGINE_PATH]; // below one of the roots
    char old_path[ENGINE_PATH], store_path[ENGINE_PATH];
    char *report; // JSON or NULL
    const char *state_dir;
    struct registry_entry entry;
    bool changed;          // the directory says it, whatever the status
    struct upload *upload; // not freed
    char *data;
    size_t bytes;
};
struct worker_job *worker_job_new(uint64_t id); // NULL: no memory
void worker_job_free(struct worker_job *job);
MUST_USE enum status worker_create(uint32_t jobs_max, bool finishes, struct worker **out);
void worker_stop(struct worker *worker);    // no job runs after it, none is taken; NULL is fine
void worker_destroy(struct worker *worker); // stops it first; NULL is fine
int worker_descriptor(const struct worker *worker);
MUST_USE enum status worker_put(struct worker *worker, struct worker_job *job); // FULL
void worker_finish(struct worker *worker, struct server *server); // calls done of what is done

// ---- reply.c
// Opens [1, msgid, nil, ...]: the caller packs exactly one value, then reply_send.
msgpack_packer *reply_open(struct call *call);
msgpack_packer *reply_open_for(struct request *request);
msgpack_packer *notify_open(struct server *server, const char *method); // one map must follow
void reply_send(struct connection *connection);
void reply_fault(struct call *call, const struct fault *fault);
// params_known of a call; false: it has been refused.
bool call_params_known(struct call *call, const char *const *names, size_t count);
void reply_fault_for(struct request *request, const struct fault *fault);
void reply_refusal(struct call *call, const struct tenant_refusal *refusal);
void reply_error(struct call *call, enum status status, const char *format, ...) PRINTF_LIKE(3, 4);
// The same with "; try again in N s", and retry_after_ms in the structured form.
void reply_later(struct call *call, enum status status, uint64_t retry_after_ms, const char *format,
                 ...) PRINTF_LIKE(4, 5);
void notify_error(struct connection *connection, enum status status, const char *sentence);
void put_map(msgpack_packer *packer, uint32_t pairs);
void put_key(msgpack_packer *packer, const char *key);
void put_text(msgpack_packer *packer, const char *key, const char *text);
void put_text_bytes(msgpack_packer *packer, const char *key, const char *text, size_t bytes);
void put_u64(msgpack_packer *packer, const char *key, uint64_t value);
void put_real(msgpack_packer *packer, const char *key, double value);
void put_bool(msgpack_packer *packer, const char *key, bool value);
// The last defence: a text with anything that is not UTF-8 in it becomes ASCII with '?', in place.
void text_repair(char *text, size_t bytes);

// ---- json.c
struct json_t;
void json_to_msgpack(msgpack_packer *packer, const struct json_t *value);

#endif
