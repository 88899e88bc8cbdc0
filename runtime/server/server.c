// SPDX-License-Identifier: Apache-2.0
// The life of the server: start, signals, timer, draining, end; and the memory budget.
//
//   start -> RUNNING --SIGTERM--> DRAINING (hello, generate refused; running ones finish) -->
//   LEAVING
//               |                     |  all answered and flushed, or shutdown_timeout_ms, or 2nd
//               signal
//               +--- engine stopped --+------------------------------------------------------>
//               LEAVING
// LEAVING: ENGINE_QUIT is sent, its last events are taken (so that its thread never waits for us),
// sockets close.
//
// Invariants: 1. server.buffered = sum of rooms of all `struct bytes` + output_charged of all
// connections.
// 2. Events of the engine are taken in every state until ENGINE_STOPPED. 3. A reload swaps the
// tenant table only when the new one is good; tenant numbers, and so usage[], stay.
#include "runtime/server/internal.h"

#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "base/arith.h"
#include "base/check.h"
#include "base/log.h"

static const int stop_signals[] = {SIGTERM, SIGINT, SIGHUP};

enum { TICK_MS = 50, ENGINE_STOP_MS = 10000, ROOM_MIN = 512 };

// ---- memory budget -----------------------------------------------------------------------------

// Answers that are being collected may fill three quarters, so that what is needed to say anything
// at all to anybody (input, output) never finds the budget spent on them.
static size_t share(size_t limit, enum budget_use use)
{
    return use == BUDGET_ANSWERS ? limit / 4 * 3 : limit;
}

bool server_charge(struct server *server, uint32_t tenant, enum budget_use use, size_t bytes)
{
    if (server->buffered + bytes > share(server->limits.buffer_bytes, use))
        return false;
    if (tenant != UINT32_MAX) {
        struct tenant_usage *usage = &server->usage[tenant];
        if (usage->buffered + bytes > share(server->limits.buffer_bytes_per_tenant, use))
            return false;
        usage->buffered += bytes;
    }
    server->buffered += bytes;
    return true;
}

void server_discharge(struct server *server, uint32_t tenant, size_t bytes)
{
    CHECK(server->buffered >= bytes);
    server->buffered -= bytes;
    if (tenant != UINT32_MAX) {
        CHECK(server->usage[tenant].buffered >= bytes);
        server->usage[tenant].buffered -= bytes;
    }
}

bool bytes_add(struct server *server, uint32_t tenant, enum budget_use use, struct bytes *bytes,
               const void *data, size_t count)
{
    size_t need = bytes->count + count;
    if (need > bytes->room || !bytes->data) {
        size_t room = max_size(max_size(bytes->room * 2, ROOM_MIN), need);
        if (!server_charge(server, tenant, use, room - bytes->room))
            return false;
        char *grown = realloc(bytes->data, room);
        if (!grown) {
            server_discharge(server, tenant, room - bytes->room);
            return false;
        }
        bytes->data = grown;
        bytes->room = room;
    }
    if (data) {
        memcpy(bytes->data + bytes->count, data, count);
        bytes->count = need;
    }
    return true;
}

void bytes_free(struct server *server, uint32_t tenant, struct bytes *bytes)
{
    server_discharge(server, tenant, bytes->room);
    free(bytes->data);
    *bytes = (struct bytes){0};
}

uint64_t server_share(const struct server *server, uint64_t places)
{
    uint32_t managers = 0;
    for (uint32_t i = 0; i < tenants_count(server->tenants); i++) {
        const struct tenant *tenant = tenants_at(server->tenants, i);
        managers += tenant->active && tenant->manage_adapters;
    }
    return managers > 1 ? (places + 3) / 4 : places;
}

enum status server_decode(struct server *server, const int32_t *tokens, size_t count,
                          const char **text, size_t *bytes)
{
    const struct server_tokenizer *tokenizer = &server->options.tokenizer;
    size_t raw = 0;
    enum status status =
        tokenizer->decode(tokenizer->context, tokens, count, server->text, server->text_max, &raw);
    if (status)
        return status;
    *text = server->text + server->text_max;
    *bytes = utf8_lossy((const uint8_t *)server->text, raw, server->text + server->text_max);
    return STATUS_OK;
}

// ---- limits ------------------------------------------------------------------------------------

static void fill_u32(uint32_t *value, uint32_t fallback)
{
    if (!*value)
        *value = fallback;
}

static void fill_size(size_t *value, size_t fallback)
{
    if (!*value)
        *value = fallback;
}

struct server_limits server_limits_resolved(const struct server_options *options)
{
    struct server_limits limits = options->limits;
    size_t context = options->engine.context_tokens;
    fill_u32(&limits.connections_max, 1024);
    fill_u32(&limits.connections_per_tenant, 256);
    fill_u32(&limits.unauthenticated_max, 64);
    fill_u32(&limits.requests_max, 1024);
    fill_u32(&limits.requests_per_connection, 64);
    fill_size(&limits.prompt_bytes, 16 * context + 4096);
    fill_size(&limits.frame_bytes, max_size(1 << 20, limits.prompt_bytes + 16384));
    fill_size(&limits.string_bytes, limits.frame_bytes);
    fill_size(&limits.unauthenticated_frame_bytes, 4096);
    fill_size(&limits.output_high_bytes, 256 << 10);
    fill_size(&limits.output_max_bytes, 8 << 20);
    fill_size(&limits.buffer_bytes, 64 << 20);
    fill_size(&limits.buffer_bytes_per_tenant, 32 << 20);
    fill_u32(&limits.auth_timeout_ms, 10000);
    fill_u32(&limits.idle_timeout_ms, 600000);
    fill_u32(&limits.frame_timeout_ms, 30000);
    fill_u32(&limits.slow_reader_timeout_ms, 30000);
    fill_u32(&limits.upload_timeout_ms, 60000);
    fill_u32(&limits.shutdown_timeout_ms, 30000);
    return limits;
}

// ---- signals and reload ------------------------------------------------------------------------

static void leave(struct server *server, enum status status)
{
    if (server->state == SERVER_LEAVING)
        return;
    server->state = SERVER_LEAVING;
    server->status = status;
    (void)event_base_loopexit(server->base, NULL);
}

static void on_stop_signal(evutil_socket_t number, short what, void *context)
{
    (void)number;
    (void)what;
    struct server *server = context;
    if (server->state != SERVER_RUNNING) {
        log_line(LOG_INFO, "second signal: leaving now");
        leave(server, STATUS_OK);
        return;
    }
    log_line(LOG_INFO, "draining: %u requests may finish within %u ms", server->request_count,
             server->limits.shutdown_timeout_ms);
    server->state = SERVER_DRAINING;
    server->drain_us = server_now_us(server);
}

static void drop_revoked(struct server *server)
{
    for (uint32_t i = 0; i < server->limits.connections_max; i++) {
        struct connection *c = &server->connections[i];
        uint32_t number = 0;
        if (!c->events || !c->authenticated || c->closing || c->doomed)
            continue;
        if (tenants_find_digest(server->tenants, &c->key, &number) && number == c->tenant)
            continue;
        notify_error(c, STATUS_UNAUTHENTICATED, "the key is no longer valid.");
        connection_close_after_flush(c);
    }
}

static void on_reload_signal(evutil_socket_t number, short what, void *context)
{
    (void)number;
    (void)what;
    struct server *server = context;
    struct tenants *fresh = NULL;
    struct fault fault = {0};
    if (!server->options.tenants_path)
        return;
    if (tenants_load(server->options.tenants_path, server->tenants, &fresh, &fault)) {
        log_line(LOG_ERROR, "%s The old tenants stay in force.", fault.text);
        return;
    }
    tenants_free(server->tenants);
    server->tenants = fresh;
    drop_revoked(server);
    log_line(LOG_INFO, "tenants read again from %s", server->options.tenants_path);
}

// ---- timer -------------------------------------------------------------------------------------

static bool all_flushed(const struct server *server)
{
    for (uint32_t i = 0; i < server->limits.connections_max; i++) {
        if (server->connections[i].events && server->connections[i].output_charged)
            return false;
    }
    return true;
}

static void drain_progress(struct server *server)
{
    struct engine_control drain = {.kind = ENGINE_DRAIN};
    if (!server->drain_sent)
        server->drain_sent = engine_send(server->options.port, &drain, sizeof drain) == STATUS_OK;
    uint64_t spent_us = server_now_us(server) - server->drain_us;
    bool over = spent_us > (uint64_t)server->limits.shutdown_timeout_ms * 1000;
    if (over || (!server->request_count && all_flushed(server)))
        leave(server, STATUS_OK);
}

static void on_tick(evutil_socket_t number, short what, void *context)
{
    (void)number;
    (void)what;
    struct server *server = context;
    uint64_t now = server_now_us(server);
    for (uint32_t i = 0; i < server->limits.connections_max; i++) {
        if (server->connections[i].events)
            connection_tick(&server->connections[i], now);
    }
    request_flush_controls(server);
    if (server->listeners_off)
        listen_enable(server);
    if (server->state == SERVER_DRAINING)
        drain_progress(server);
}

static void on_reap(evutil_socket_t number, short what, void *context)
{
    (void)number;
    (void)what;
    connection_reap(context);
}

static void on_engine_events(evutil_socket_t descriptor, short what, void *context)
{
    (void)what;
    struct server *server = context;
    uint64_t count;
    (void)!read(descriptor, &count, sizeof count);
    events_drain(server);
    if (server->engine_stopped)
        leave(server, server->state == SERVER_DRAINING ? STATUS_OK : STATUS_DEVICE);
}

static void on_worker_result(evutil_socket_t descriptor, short what, void *context)
{
    (void)what;
    uint64_t count;
    (void)!read(descriptor, &count, sizeof count);
    struct server *server = context;
    worker_finish(descriptor == worker_descriptor(server->disk) ? server->disk : server->worker,
                  server);
}

// ---- start and end -----------------------------------------------------------------------------

static enum status allocate(struct server *server, struct fault *fault)
{
    const struct server_limits *limits = &server->limits;
    server->tokens_max = limits->frame_bytes + 16;
    server->command_max = sizeof(struct engine_request) +
                          4 * ((size_t)server->options.engine.context_tokens + ENGINE_STOPS_MAX) +
                          ENGINE_STOPS_MAX * (2 + ENGINE_STOP_BYTES_MAX);
    server->text_max = limits->frame_bytes;
    server->usage = calloc(TENANTS_MAX, sizeof *server->usage);
    server->connections = calloc(limits->connections_max, sizeof *server->connections);
    server->requests = calloc(limits->requests_max, sizeof *server->requests);
    server->tokens = calloc(server->tokens_max, sizeof *server->tokens);
    server->command = calloc(1, server->command_max);
    server->text = calloc(4, server->text_max);
    if (!server->usage || !server->connections || !server->requests || !server->tokens ||
        !server->command || !server->text)
        return fault_set(fault, STATUS_NO_MEMORY, "out of memory for the server's tables.");
    for (uint32_t i = limits->connections_max; i-- > 0;) {
        server->connections[i].slot = i;
        server->connections[i].next_free = server->free_connections;
        server->free_connections = &server->connections[i];
    }
    for (uint32_t i = limits->requests_max; i-- > 0;) {
        server->requests[i].slot = i;
        server->requests[i].next = server->free_requests;
        server->free_requests = &server->requests[i];
    }
    return STATUS_OK;
}

static enum status add_events(struct server *server, struct fault *fault)
{
    struct timeval tick = {.tv_usec = TICK_MS * 1000};
    for (size_t i = 0; i < ARRAY_COUNT(stop_signals); i++)
        (void)signal(stop_signals[i], SIG_IGN); // see release_signals
    server->on_term = evsignal_new(server->base, SIGTERM, on_stop_signal, server);
    server->on_int = evsignal_new(server->base, SIGINT, on_stop_signal, server);
    server->on_hup = evsignal_new(server->base, SIGHUP, on_reload_signal, server);
    server->on_events = event_new(server->base, server->options.port->event_wake,
                                  EV_READ | EV_PERSIST, on_engine_events, server);
    server->on_tick = event_new(server->base, -1, EV_PERSIST, on_tick, server);
    server->on_reap = event_new(server->base, -1, 0, on_reap, server);
    if (!server->on_term || !server->on_int || !server->on_hup || !server->on_events ||
        !server->on_tick || !server->on_reap || event_add(server->on_term, NULL) ||
        event_add(server->on_int, NULL) || event_add(server->on_hup, NULL) ||
        event_add(server->on_events, NULL) || event_add(server->on_tick, &tick))
        return fault_set(fault, STATUS_INTERNAL, "the event loop cannot be set up.");
    return STATUS_OK;
}

// The conversion of adapters and everything else that waits for a disk have a thread each: what is
// short must not wait for what is long.
static enum status start_worker(struct server *server, uint32_t jobs_max, bool finishes,
                                struct worker **worker, struct event **event, struct fault *fault)
{
    if (worker_create(jobs_max, finishes, worker))
        return fault_set(fault, STATUS_NO_MEMORY, "a worker thread could not be started.");
    *event = event_new(server->base, worker_descriptor(*worker), EV_READ | EV_PERSIST,
                       on_worker_result, server);
    return *event && !event_add(*event, NULL)
               ? STATUS_OK
               : fault_set(fault, STATUS_INTERNAL, "the event loop cannot be set up.");
}

static enum status start(struct server *server, struct fault *fault)
{
    const struct server_options *options = &server->options;
    if (!options->port || !options->tokenizer.encode || !options->tokenizer.decode ||
        (options->converter.convert && !options->state_dir))
        return fault_set(fault, STATUS_INVALID, "the server's options are incomplete.");
    if (!options->tenants_path == !options->open_access)
        return fault_set(fault, STATUS_INVALID,
                         "give a tenants file, or ask for open access, not both.");
    enum status status = options->open_access
                             ? tenants_open_access(&server->tenants, fault)
                             : tenants_load(options->tenants_path, NULL, &server->tenants, fault);
    if (!status)
        status = allocate(server, fault);
    if (!status)
        status = broken_take(server, fault);
    if (status)
        return status;
    server->base = event_base_new();
    if (!server->base)
        return fault_set(fault, STATUS_INTERNAL, "the event loop cannot be set up.");
    status = add_events(server, fault);
    if (!status && options->state_dir)
        status = start_worker(server, UINT32_MAX, true, &server->disk, &server->on_disk, fault);
    if (!status && options->converter.convert)
        status = start_worker(server, SERVER_CONVERSIONS_MAX, false, &server->worker,
                              &server->on_worker, fault);
    return status;
}

// The engine is told to quit and listened to until it has stopped.
static void stop_engine(struct server *server)
{
    struct engine_control quit = {.kind = ENGINE_QUIT};
    uint64_t began = server_now_us(server);
    while (!server->engine_stopped &&
           server_now_us(server) - began < (uint64_t)ENGINE_STOP_MS * 1000) {
        if (!server->quit_sent)
            server->quit_sent = engine_send(server->options.port, &quit, sizeof quit) == STATUS_OK;
        events_drain(server);
        if (!server->engine_stopped)
            (void)usleep(1000);
    }
    if (!server->engine_stopped)
        log_line(LOG_ERROR, "the engine did not stop within %d ms", ENGINE_STOP_MS);
}

// The engine's word goes before the server's: a device that fails while requests drain is a
// failure.
static enum status why_it_ended(const struct server *server, struct fault *fault)
{
    if (server->engine_status == STATUS_DEVICE)
        return fault_set(fault, STATUS_DEVICE,
                         "the device failed and every request was ended with device_error: look "
                         "for the cause in the log above, and start the server again.");
    if (server->status)
        return fault_set(fault, server->status,
                         "the engine stopped by itself: start the server again.");
    return STATUS_OK;
}

// What the engine has said yes to is made last and told, before the others hear that it is over.
static void finish_disk(struct server *server)
{
    worker_stop(server->disk);
    if (server->disk)
        worker_finish(server->disk, server);
}

// Requests that were sent when the engine had already taken its last command.
static void answer_the_rest(struct server *server)
{
    struct fault fault;
    if (server->engine_status == STATUS_DEVICE)
        (void)fault_set(&fault, STATUS_DEVICE,
                        "The device failed; the server has to be started anew.");
    else
        (void)fault_set(&fault, STATUS_SHUTTING_DOWN, "The server was shut down.");
    for (uint32_t i = 0; server->requests && i < server->limits.requests_max; i++) {
        struct request *request = &server->requests[i];
        if (request->kind == REQUEST_ADAPTER_ADD)
            register_abandon(request);
        if (request->kind == REQUEST_FREE || !request->connection)
            continue;
        reply_fault_for(request, &fault);
        request_free(request);
    }
}

// Answers written since the loop ended get one short chance to leave.
static void last_flush(struct server *server)
{
    uint64_t began = server_now_us(server);
    while (!all_flushed(server) && server_now_us(server) - began < 500000)
        (void)event_base_loop(server->base, EVLOOP_ONCE);
}

// libevent puts back what was before it: a signal more does not kill a process that is about to end
// by itself. An engine that does not stop may be killed.
static void release_signals(struct server *server)
{
    struct event *events[] = {server->on_term, server->on_int, server->on_hup};
    for (size_t i = 0; i < ARRAY_COUNT(events); i++) {
        if (events[i])
            event_free(events[i]);
        if (!server->engine_stopped)
            (void)signal(stop_signals[i], SIG_DFL);
    }
}

static void release(struct server *server)
{
    struct event *events[] = {server->on_events, server->on_tick, server->on_reap,
                              server->on_worker, server->on_disk};
    // Before what their jobs point at.
    worker_destroy(server->worker);
    worker_destroy(server->disk);
    server->worker = server->disk = NULL;
    connection_free_all(server);
    for (uint32_t i = 0; server->requests && i < server->limits.requests_max; i++) {
        if (server->requests[i].kind)
            request_free(&server->requests[i]);
    }
    release_signals(server);
    for (size_t i = 0; i < ARRAY_COUNT(events); i++) {
        if (events[i])
            event_free(events[i]);
    }
    if (server->base) {
        listen_close(server);
        event_base_free(server->base);
    }
    tenants_free(server->tenants);
    msgpack_sbuffer_destroy(&server->scratch);
    free(server->usage);
    free(server->broken);
    free(server->connections);
    free(server->requests);
    free(server->tokens);
    free(server->command);
    free(server->text);
    free(server);
}

enum status server_run(const struct server_options *options, struct fault *fault)
{
    struct server *server = calloc(1, sizeof *server);
    if (!server)
        return fault_set(fault, STATUS_NO_MEMORY, "out of memory for the server.");
    server->options = *options;
    server->limits = server_limits_resolved(options);
    msgpack_sbuffer_init(&server->scratch);
    (void)signal(SIGPIPE, SIG_IGN);
    (void)signal(SIGXFSZ, SIG_IGN); // a file beyond the process's limit is a failed write
    char addresses[512];
    enum status status = start(server, fault);
    if (!status)
        status = listen_open(server, addresses, sizeof addresses, fault);
    if (!status) {
        if (options->ready)
            options->ready(options->ready_context, addresses);
        (void)event_base_dispatch(server->base);
        listen_close(server);
    }
    if (options->port)
        stop_engine(server);
    if (!status)
        status = why_it_ended(server, fault);
    finish_disk(server);
    answer_the_rest(server);
    if (server->base)
        last_flush(server);
    release(server);
    return status;
}
