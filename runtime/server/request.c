// SPDX-License-Identifier: Apache-2.0
// The table of requests that are answered later, and the controls (cancel, pause, resume) owed to
// the engine.
//
// Id on the port: generation (32 bits) | slot (24 bits) | choice (8 bits). A stale id finds
// nothing. Controls must not be lost when the command ring is full: they are flags on the request,
// and request_flush_controls sends what it can, now and at every tick. server.controls counts
// requests that owe.
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "base/check.h"
#include "runtime/server/internal.h"

uint64_t request_id(const struct request *request, uint32_t choice)
{
    return (uint64_t)request->generation << 32 | (uint64_t)request->slot << 8 | choice;
}

struct request *request_find(struct server *server, uint64_t id)
{
    uint32_t slot = (uint32_t)(id >> 8) & 0xffffff;
    if (!server->requests || slot >= server->limits.requests_max)
        return NULL;
    struct request *request = &server->requests[slot];
    return request->kind != REQUEST_FREE && request->generation == (uint32_t)(id >> 32) ? request
                                                                                        : NULL;
}

struct request *request_of(const struct connection *connection, uint32_t msgid)
{
    for (struct request *r = connection->requests; r; r = r->next) {
        if (r->msgid == msgid)
            return r;
    }
    return NULL;
}

struct request *request_new(struct call *call, enum request_kind kind)
{
    struct connection *connection = call->connection;
    struct server *server = connection->server;
    if (!call->request)
        return NULL; // a notification that would need an answer is ignored
    if (connection->request_count >= server->limits.requests_per_connection) {
        reply_error(call, STATUS_LIMIT, "this connection has %u unfinished requests already.",
                    connection->request_count);
        return NULL;
    }
    struct request *request = server->free_requests;
    if (!request) {
        reply_error(call, STATUS_BUSY, "the server has %u unfinished requests already.",
                    server->request_count);
        return NULL;
    }
    server->free_requests = request->next;
    uint32_t slot = request->slot, generation = request->generation + 1;
    memset(request, 0, sizeof *request);
    request->server = server;
    request->kind = kind;
    request->slot = slot;
    request->generation = generation;
    request->msgid = call->msgid;
    request->tenant = connection->tenant;
    request->connection = connection;
    request->created_us = server_now_us(server);
    request->next = connection->requests;
    if (request->next)
        request->next->previous = request;
    connection->requests = request;
    connection->request_count++;
    server->request_count++;
    return request;
}

void request_detach(struct request *request)
{
    struct connection *connection = request->connection;
    if (!connection)
        return;
    if (request->previous)
        request->previous->next = request->next;
    else
        connection->requests = request->next;
    if (request->next)
        request->next->previous = request->previous;
    request->next = request->previous = NULL;
    request->connection = NULL;
    connection->request_count--;
    connection->active_us = server_now_us(connection->server);
    request_cancel(request);
}

static void drop_controls(struct server *server, struct request *request)
{
    if (request->control)
        server->controls--;
    request->control = false;
}

void request_free_texts(struct request *request)
{
    for (uint32_t i = 0; i < request->choices; i++) {
        bytes_free(request->server, request->tenant, &request->choice[i].text);
        bytes_free(request->server, request->tenant, &request->choice[i].tokens);
        bytes_free(request->server, request->tenant, &request->choice[i].logprobs);
    }
}

void request_free(struct request *request)
{
    struct server *server = request->server;
    request->done = request->choices; // nothing left to cancel
    request_detach(request);
    drop_controls(server, request);
    request_free_texts(request);
    free(request->report);
    request->report = NULL;
    upload_free(request->upload);
    request->upload = NULL;
    listing_free(request->listing);
    request->listing = NULL;
    request->kind = REQUEST_FREE;
    request->next = server->free_requests;
    server->free_requests = request;
    server->request_count--;
}

// ---- controls ----------------------------------------------------------------------------------

static void owe_control(struct request *request)
{
    if (!request->control)
        request->server->controls++;
    request->control = true;
}

void request_cancel(struct request *request)
{
    if (request->kind != REQUEST_GENERATE)
        return;
    bool any = false;
    for (uint32_t i = 0; i < request->choices; i++) {
        struct choice *choice = &request->choice[i];
        if (choice->sent && !choice->done)
            any = choice->cancel = true;
    }
    if (!any)
        return;
    owe_control(request);
    request_flush_controls(request->server);
}

void request_pause(struct request *request, bool pause)
{
    if (request->kind != REQUEST_GENERATE || request->want_pause == pause)
        return;
    request->want_pause = pause;
    owe_control(request);
}

static bool send_control(struct server *server, uint32_t kind, uint64_t id)
{
    struct engine_control control = {.kind = kind, .id = id};
    return engine_send(server->options.port, &control, sizeof control) == STATUS_OK;
}

// false: the ring is full.
static bool send_controls_of(struct server *server, struct request *request)
{
    bool pause = request->want_pause != request->is_paused;
    for (uint32_t i = 0; i < request->choices; i++) {
        struct choice *choice = &request->choice[i];
        if (choice->cancel && !choice->done &&
            !send_control(server, ENGINE_CANCEL, request_id(request, i)))
            return false;
        choice->cancel = false;
        if (pause && choice->sent && !choice->done &&
            !send_control(server, request->want_pause ? ENGINE_PAUSE : ENGINE_RESUME,
                          request_id(request, i)))
            return false; // sent again from the first choice: pausing twice does no harm
    }
    request->is_paused = request->want_pause;
    return true;
}

void request_flush_controls(struct server *server)
{
    for (uint32_t i = 0; server->controls && i < server->limits.requests_max; i++) {
        struct request *request = &server->requests[i];
        if (request->kind == REQUEST_FREE || !request->control)
            continue;
        if (!send_controls_of(server, request))
            return;
        drop_controls(server, request);
    }
}

void request_fail(struct request *request, enum status status, const char *sentence)
{
    if (request->failed)
        return;
    request->failed = true;
    (void)fault_set(&request->fault, status, "%s", sentence);
}
