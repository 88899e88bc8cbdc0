// SPDX-License-Identifier: Apache-2.0
// One connection: bytes in, bytes out, its limits, its end.
//
//   accepted -> reading <-> slow (output above the high mark: not reading, requests paused)
//                  |           |  for slow_reader_timeout_ms, or output above output_max_bytes
//                  v           v
//   closing (flush, then go) -> doomed -> reaped (slot free)
//
// Invariants: 1. A connection is freed by the reaper alone, at the end of a turn of the event loop:
// no callback ever sees its connection vanish. 2. `in` holds at most one unfinished message and
// what came with it; it is charged to the tenant. 3. What waits in the output buffer is charged
// too: see charge_output.
// 4. A slow connection is not read, so it cannot ask for more.
#include <errno.h>
#include <stdio.h>
#include <string.h>
#include <sys/socket.h>
#include <unistd.h>

#include <event2/buffer.h>

#include "base/arith.h"
#include "base/check.h"
#include "base/log.h"
#include "runtime/server/internal.h"

enum {
    READ_CHUNK = 64 * 1024,
    FRAMES_PER_TURN = 32, // of one connection before the others have a turn
    CLOSING_MS = 2000,    // to flush the last words
    IN_KEEP = 16 * 1024   // an idle connection keeps this much input buffer
};

uint32_t connection_owner(const struct connection *connection)
{
    return connection->authenticated ? connection->tenant : UINT32_MAX;
}

void connection_doom(struct connection *connection)
{
    if (!connection->events || connection->doomed)
        return;
    connection->doomed = true;
    (void)bufferevent_disable(connection->events, EV_READ | EV_WRITE);
    event_active(connection->server->on_reap, 0, 0);
}

// Closing with unread input would make the kernel send RST, which may destroy our last words on
// their way. So: say that we are done, and read into nothing until the peer closes or CLOSING_MS
// pass.
static void half_close(struct connection *connection)
{
    if (shutdown(bufferevent_getfd(connection->events), SHUT_WR))
        connection_doom(connection);
}

void connection_close_after_flush(struct connection *connection)
{
    if (connection->closing || connection->doomed)
        return;
    connection->closing = true;
    connection->closing_us = server_now_us(connection->server);
    (void)bufferevent_enable(connection->events, EV_READ); // to throw away: see half_close
    if (!evbuffer_get_length(bufferevent_get_output(connection->events)))
        half_close(connection);
}

// A client that breaks the protocol is told why and loses the connection.
static void protocol_error(struct connection *connection, const char *sentence)
{
    connection->server->protocol_errors++;
    notify_error(connection, STATUS_INVALID, sentence);
    connection_close_after_flush(connection);
}

void connection_set_tenant(struct connection *connection, uint32_t tenant)
{
    struct server *server = connection->server;
    size_t held = connection->in.room + connection->output_charged;
    if (connection->authenticated && connection->tenant != tenant)
        upload_drop(connection); // it was the other one's
    server_discharge(server, connection_owner(connection), held);
    if (connection->authenticated)
        server->usage[connection->tenant].connections--;
    else
        server->unauthenticated_count--;
    connection->authenticated = true;
    connection->tenant = tenant;
    server->usage[tenant].connections++;
    if (!server_charge(server, tenant, BUDGET_CONNECTIONS, held)) {
        connection->in.room = connection->output_charged = 0;
        connection_doom(connection);
    }
}

// ---- output ------------------------------------------------------------------------------------

static void set_slow(struct connection *connection, bool slow)
{
    if (connection->slow == slow)
        return;
    connection->slow = slow;
    connection->slow_us = server_now_us(connection->server);
    for (struct request *r = connection->requests; r; r = r->next)
        request_pause(r, slow);
    request_flush_controls(connection->server);
    if (slow) {
        (void)bufferevent_disable(connection->events, EV_READ);
    } else if (!connection->closing) {
        connection->frame_us = connection->frame_us ? connection->slow_us : 0;
        (void)bufferevent_enable(connection->events, EV_READ);
        bufferevent_trigger(connection->events, EV_READ,
                            BEV_TRIG_IGNORE_WATERMARKS | BEV_TRIG_DEFER_CALLBACKS);
    }
}

static void charge_output(struct connection *connection)
{
    struct server *server = connection->server;
    size_t waiting = evbuffer_get_length(bufferevent_get_output(connection->events));
    uint32_t owner = connection_owner(connection);
    if (waiting < connection->output_charged) {
        server_discharge(server, owner, connection->output_charged - waiting);
        connection->output_charged = waiting;
    } else if (waiting > connection->output_charged) {
        if (server_charge(server, owner, BUDGET_CONNECTIONS, waiting - connection->output_charged))
            connection->output_charged = waiting;
        else
            connection_doom(connection);
    }
    if (waiting > server->limits.output_max_bytes) {
        server->dropped_slow++;
        log_line(LOG_WARN, "%s does not read its answers: closed", connection->peer);
        connection_doom(connection);
    } else if (waiting > server->limits.output_high_bytes) {
        set_slow(connection, true);
    } else if (waiting <= server->limits.output_high_bytes / 2) {
        set_slow(connection, false);
    }
}

void connection_send(struct connection *connection, const void *data, size_t bytes)
{
    if (connection->doomed || connection->closing)
        return;
    if (bufferevent_write(connection->events, data, bytes))
        connection_doom(connection);
    else
        charge_output(connection);
}

static void on_write(struct bufferevent *events, void *context)
{
    (void)events;
    struct connection *connection = context;
    if (connection->doomed)
        return;
    charge_output(connection);
    if (connection->closing && !evbuffer_get_length(bufferevent_get_output(connection->events)))
        half_close(connection);
}

// ---- input -------------------------------------------------------------------------------------

static struct scan_limits limits_of(const struct connection *connection)
{
    const struct server_limits *limits = &connection->server->limits;
    if (!connection->authenticated)
        return (struct scan_limits){.frame_bytes = limits->unauthenticated_frame_bytes,
                                    .string_bytes = limits->unauthenticated_frame_bytes,
                                    .items = 64};
    return (struct scan_limits){.frame_bytes = limits->frame_bytes,
                                .string_bytes = limits->string_bytes,
                                .items = connection->server->options.engine.context_tokens + 16384};
}

static bool pull_input(struct connection *connection)
{
    struct evbuffer *input = bufferevent_get_input(connection->events);
    size_t waiting = min_size(evbuffer_get_length(input), READ_CHUNK);
    struct bytes *in = &connection->in;
    if (!waiting)
        return true;
    size_t at = in->count;
    if (!bytes_add(connection->server, connection_owner(connection), BUDGET_CONNECTIONS, in, NULL,
                   waiting)) {
        notify_error(connection, STATUS_LIMIT, "the server has no room for this message now.");
        connection_close_after_flush(connection);
        return false;
    }
    int n = evbuffer_remove(input, in->data + at, waiting);
    in->count = at + (n > 0 ? (size_t)n : 0);
    return true;
}

// Handles complete messages at the start of `in`. true: it stopped although more may be complete.
static bool handle_messages(struct connection *connection)
{
    struct bytes *in = &connection->in;
    size_t from = 0;
    int handled = 0;
    while (from < in->count && !connection->slow && !connection->closing && !connection->doomed &&
           handled < FRAMES_PER_TURN) {
        if (!connection->scanning) {
            struct scan_limits limits = limits_of(connection);
            scan_begin(&connection->scanner, &limits);
            connection->scanning = true;
        }
        const uint8_t *frame = (const uint8_t *)in->data + from;
        enum scan_result result = scan_run(&connection->scanner, frame, in->count - from);
        if (result == SCAN_MORE)
            break;
        connection->scanning = false;
        if (result == SCAN_BAD) {
            char sentence[160];
            (void)snprintf(sentence, sizeof sentence, "bad message at byte %zu: %s.",
                           connection->scanner.at, connection->scanner.reason);
            protocol_error(connection, sentence);
            break;
        }
        handled++;
        dispatch_message(connection, frame, connection->scanner.at);
        from += connection->scanner.at;
    }
    if (from) {
        memmove(in->data, in->data + from, in->count - from);
        in->count -= from;
        connection->active_us = server_now_us(connection->server);
    }
    return handled == FRAMES_PER_TURN;
}

static void after_input(struct connection *connection, uint64_t had)
{
    struct bytes *in = &connection->in;
    if (!in->count)
        connection->frame_us = 0;
    else if (!connection->frame_us || connection->active_us >= had)
        connection->frame_us = server_now_us(connection->server);
    if (!in->count && in->room > IN_KEEP)
        bytes_free(connection->server, connection_owner(connection), in);
}

static void on_read(struct bufferevent *events, void *context)
{
    struct connection *connection = context;
    if (connection->closing) {
        struct evbuffer *input = bufferevent_get_input(events);
        (void)evbuffer_drain(input, evbuffer_get_length(input));
    }
    if (connection->doomed || connection->closing || connection->slow)
        return;
    uint64_t now = server_now_us(connection->server);
    bool more = handle_messages(connection); // what the last turn left
    if (!more && !connection->slow && !connection->closing && pull_input(connection))
        more = handle_messages(connection);
    if (connection->doomed || connection->closing)
        return;
    after_input(connection, now);
    if (!connection->slow && (more || evbuffer_get_length(bufferevent_get_input(events))))
        bufferevent_trigger(events, EV_READ, BEV_TRIG_IGNORE_WATERMARKS | BEV_TRIG_DEFER_CALLBACKS);
}

static void on_other(struct bufferevent *events, short what, void *context)
{
    (void)events;
    if (what & (BEV_EVENT_EOF | BEV_EVENT_ERROR))
        connection_doom(context);
}

// ---- life --------------------------------------------------------------------------------------

static void make_room_among_strangers(struct server *server)
{
    struct connection *oldest = NULL;
    if (server->unauthenticated_count < server->limits.unauthenticated_max)
        return;
    for (uint32_t i = 0; i < server->limits.connections_max; i++) {
        struct connection *c = &server->connections[i];
        if (c->events && !c->authenticated && !c->doomed &&
            (!oldest || c->opened_us < oldest->opened_us))
            oldest = c;
    }
    if (oldest)
        connection_doom(oldest);
}

void connection_accepted(struct server *server, int descriptor, const char *peer)
{
    struct connection *connection = server->free_connections;
    struct bufferevent *events =
        connection ? bufferevent_socket_new(server->base, descriptor, BEV_OPT_CLOSE_ON_FREE) : NULL;
    server->accepted++;
    if (!events) {
        server->refused_connections++;
        (void)close(descriptor);
        return;
    }
    make_room_among_strangers(server);
    server->free_connections = connection->next_free;
    uint32_t slot = connection->slot;
    uint64_t now = server_now_us(server);
    *connection = (struct connection){
        .server = server, .slot = slot, .events = events, .opened_us = now, .active_us = now};
    (void)snprintf(connection->peer, sizeof connection->peer, "%s", peer);
    server->connection_count++;
    server->unauthenticated_count++;
    if (server->options.open_access)
        connection_set_tenant(connection, 0);
    bufferevent_setcb(events, on_read, on_write, on_other, connection);
    bufferevent_setwatermark(events, EV_READ, 0, READ_CHUNK);
    bufferevent_setwatermark(events, EV_WRITE, server->limits.output_high_bytes / 2, 0);
    (void)bufferevent_enable(events, EV_READ | EV_WRITE);
}

static void connection_free(struct connection *connection)
{
    struct server *server = connection->server;
    uint32_t owner = connection_owner(connection);
    while (connection->requests)
        request_detach(connection->requests);
    upload_drop(connection);
    bytes_free(server, owner, &connection->in);
    server_discharge(server, owner, connection->output_charged);
    bufferevent_free(connection->events);
    connection->events = NULL;
    server->connection_count--;
    if (connection->authenticated)
        server->usage[owner].connections--;
    else
        server->unauthenticated_count--;
    connection->next_free = server->free_connections;
    server->free_connections = connection;
}

void connection_reap(struct server *server)
{
    for (uint32_t i = 0; i < server->limits.connections_max; i++) {
        if (server->connections[i].events && server->connections[i].doomed)
            connection_free(&server->connections[i]);
    }
}

void connection_free_all(struct server *server)
{
    for (uint32_t i = 0; server->connections && i < server->limits.connections_max; i++) {
        if (server->connections[i].events)
            connection_free(&server->connections[i]);
    }
}

static bool over(uint64_t now_us, uint64_t since_us, uint32_t limit_ms)
{
    return now_us > since_us && now_us - since_us > (uint64_t)limit_ms * 1000;
}

static void expire(struct connection *connection, const char *sentence)
{
    notify_error(connection, STATUS_DEADLINE, sentence);
    connection_close_after_flush(connection);
}

void connection_tick(struct connection *connection, uint64_t now_us)
{
    struct server *server = connection->server;
    const struct server_limits *limits = &server->limits;
    if (connection->doomed)
        return;
    upload_tick(connection, now_us);
    if (connection->closing) {
        if (over(now_us, connection->closing_us, CLOSING_MS))
            connection_doom(connection);
    } else if (connection->slow) {
        if (over(now_us, connection->slow_us, limits->slow_reader_timeout_ms)) {
            server->dropped_slow++;
            log_line(LOG_WARN, "%s reads its answers too slowly: closed", connection->peer);
            connection_doom(connection);
        }
    } else if (!connection->authenticated &&
               over(now_us, connection->opened_us, limits->auth_timeout_ms)) {
        expire(connection, "no valid auth came in time.");
    } else if (connection->frame_us &&
               over(now_us, connection->frame_us, limits->frame_timeout_ms)) {
        expire(connection, "the message did not come to its end in time.");
    } else if (!connection->requests &&
               over(now_us, connection->active_us, limits->idle_timeout_ms)) {
        expire(connection, "the connection was idle for too long.");
    }
}
