// SPDX-License-Identifier: Apache-2.0
// One call at a time: write the request, read messages until its response comes, hand token
// notifications to the callback on the way. Messages of other ids (a cancelled call's late tokens)
// are dropped.
//
// The server is trusted not to send more than REPLY_BYTES_MAX in one message; msgpack-c has no
// limit of its own, so the unpacker's buffer is bounded here.
#include "polder_client.h"

#include <errno.h>
#include <netdb.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/time.h>
#include <sys/un.h>
#include <unistd.h>

enum { READ_BYTES = 64 * 1024, REPLY_BYTES_MAX = 256 << 20 };

struct polder_client {
    int socket;
    uint32_t next_id;
    bool broken;
    msgpack_unpacker unpacker;
    msgpack_unpacked message; // of the last call; results point into it
    size_t unread;            // bytes in the unpacker that make no message yet
};

static int fail(struct polder_client *client, struct polder_error *error, const char *format, ...)
    __attribute__((format(printf, 3, 4)));

static int fail(struct polder_client *client, struct polder_error *error, const char *format, ...)
{
    va_list list;
    *error = (struct polder_error){.type = -1, .code = "connection"};
    va_start(list, format);
    (void)vsnprintf(error->message, sizeof error->message, format, list);
    va_end(list);
    if (client)
        client->broken = true;
    return -1;
}

// ---- connecting --------------------------------------------------------------------------------

static void set_timeouts(int descriptor, uint32_t timeout_ms)
{
    struct timeval wait = {.tv_sec = timeout_ms / 1000, .tv_usec = (timeout_ms % 1000) * 1000};
    int one = 1;
    if (timeout_ms) {
        (void)setsockopt(descriptor, SOL_SOCKET, SO_RCVTIMEO, &wait, sizeof wait);
        (void)setsockopt(descriptor, SOL_SOCKET, SO_SNDTIMEO, &wait, sizeof wait);
    }
    (void)setsockopt(descriptor, IPPROTO_TCP, TCP_NODELAY, &one, sizeof one);
}

static int dial(int family, const struct sockaddr *address, socklen_t bytes, uint32_t timeout_ms)
{
    int descriptor = socket(family, SOCK_STREAM | SOCK_CLOEXEC, 0);
    if (descriptor < 0)
        return -1;
    set_timeouts(descriptor, timeout_ms);
    if (connect(descriptor, address, bytes) == 0)
        return descriptor;
    int cause = errno;
    (void)close(descriptor);
    errno = cause;
    return -1;
}

static int dial_unix(const char *path, uint32_t timeout_ms)
{
    struct sockaddr_un address = {.sun_family = AF_UNIX};
    if (strlen(path) >= sizeof address.sun_path) {
        errno = ENAMETOOLONG;
        return -1;
    }
    memcpy(address.sun_path, path, strlen(path));
    return dial(AF_UNIX, (struct sockaddr *)&address, sizeof address, timeout_ms);
}

static int dial_tcp(const char *text, uint32_t timeout_ms)
{
    char host[256];
    const char *colon = strrchr(text, ':');
    size_t length = colon ? (size_t)(colon - text) : 0;
    if (!colon || length >= sizeof host) {
        errno = EINVAL;
        return -1;
    }
    memcpy(host, text, length);
    host[length] = 0;
    char *name = host;
    if (length >= 2 && host[0] == '[' && host[length - 1] == ']') {
        host[length - 1] = 0;
        name++;
    }
    struct addrinfo hints = {.ai_socktype = SOCK_STREAM}, *all = NULL;
    if (getaddrinfo(*name ? name : "127.0.0.1", colon + 1, &hints, &all)) {
        errno = EADDRNOTAVAIL;
        return -1;
    }
    int descriptor = -1;
    for (struct addrinfo *one = all; one && descriptor < 0; one = one->ai_next)
        descriptor = dial(one->ai_family, one->ai_addr, one->ai_addrlen, timeout_ms);
    int cause = errno;
    freeaddrinfo(all);
    errno = cause;
    return descriptor;
}

static int greet(struct polder_client *client, const char *key, struct polder_error *error)
{
    msgpack_sbuffer params;
    msgpack_packer packer;
    const msgpack_object *result;
    msgpack_sbuffer_init(&params);
    msgpack_packer_init(&packer, &params, msgpack_sbuffer_write);
    msgpack_pack_map(&packer, 2);
    msgpack_pack_str_with_body(&packer, "client", 6);
    msgpack_pack_str_with_body(&packer, "polder_client.c", 15);
    msgpack_pack_str_with_body(&packer, "structured_errors", 17);
    msgpack_pack_true(&packer);
    int rc = polder_call(client, "hello", &params, NULL, NULL, &result, error);
    if (!rc && key) {
        msgpack_sbuffer_clear(&params);
        msgpack_pack_map(&packer, 1);
        msgpack_pack_str_with_body(&packer, "key", 3);
        msgpack_pack_str_with_body(&packer, key, strlen(key));
        rc = polder_call(client, "auth", &params, NULL, NULL, &result, error);
    }
    msgpack_sbuffer_destroy(&params);
    return rc;
}

struct polder_client *polder_open(const char *address, const char *key, uint32_t timeout_ms,
                                  struct polder_error *error)
{
    bool local = !strncmp(address, "unix:", 5);
    int descriptor = local ? dial_unix(address + 5, timeout_ms) : dial_tcp(address, timeout_ms);
    if (descriptor < 0) {
        (void)fail(NULL, error, "cannot connect to %s: %s.", address, strerror(errno));
        return NULL;
    }
    struct polder_client *client = calloc(1, sizeof *client);
    if (!client || !msgpack_unpacker_init(&client->unpacker, READ_BYTES)) {
        (void)close(descriptor);
        free(client);
        (void)fail(NULL, error, "out of memory.");
        return NULL;
    }
    client->socket = descriptor;
    msgpack_unpacked_init(&client->message);
    if (greet(client, key, error)) {
        polder_close(client);
        return NULL;
    }
    return client;
}

void polder_close(struct polder_client *client)
{
    if (!client)
        return;
    (void)close(client->socket);
    msgpack_unpacked_destroy(&client->message);
    msgpack_unpacker_destroy(&client->unpacker);
    free(client);
}

// ---- messages ----------------------------------------------------------------------------------

static int send_all(struct polder_client *client, const msgpack_sbuffer *bytes,
                    struct polder_error *error)
{
    size_t at = 0;
    while (at < bytes->size) {
        ssize_t n = send(client->socket, bytes->data + at, bytes->size - at, MSG_NOSIGNAL);
        if (n < 0 && errno == EINTR)
            continue;
        if (n <= 0)
            return fail(client, error, "sending failed: %s.", strerror(errno));
        at += (size_t)n;
    }
    return 0;
}

static int receive_some(struct polder_client *client, struct polder_error *error)
{
    if (client->unread > REPLY_BYTES_MAX ||
        !msgpack_unpacker_reserve_buffer(&client->unpacker, READ_BYTES))
        return fail(client, error, "the answer is too large.");
    for (;;) {
        ssize_t n = recv(client->socket, msgpack_unpacker_buffer(&client->unpacker), READ_BYTES, 0);
        if (n < 0 && errno == EINTR)
            continue;
        if (n < 0)
            return fail(client, error, "receiving failed: %s.",
                        errno == EAGAIN ? "the server did not answer in time" : strerror(errno));
        if (n == 0)
            return fail(client, error, "the server closed the connection.");
        msgpack_unpacker_buffer_consumed(&client->unpacker, (size_t)n);
        client->unread += (size_t)n;
        return 0;
    }
}

// The next whole message is in client->message; a message is an array of 3 or 4.
static int receive_message(struct polder_client *client, struct polder_error *error)
{
    for (;;) {
        msgpack_unpack_return got = msgpack_unpacker_next(&client->unpacker, &client->message);
        if (got == MSGPACK_UNPACK_SUCCESS) {
            const msgpack_object *data = &client->message.data;
            client->unread = 0;
            if (data->type == MSGPACK_OBJECT_ARRAY && data->via.array.size >= 3)
                return 0;
            return fail(client, error, "the server sent something that is no message.");
        }
        if (got != MSGPACK_UNPACK_CONTINUE)
            return fail(client, error, "the server's bytes cannot be decoded.");
        if (receive_some(client, error))
            return -1;
    }
}

const msgpack_object *polder_get(const msgpack_object *map, const char *key)
{
    if (!map || map->type != MSGPACK_OBJECT_MAP)
        return NULL;
    for (uint32_t i = 0; i < map->via.map.size; i++) {
        const msgpack_object_kv *pair = &map->via.map.ptr[i];
        if (pair->key.type == MSGPACK_OBJECT_STR && pair->key.via.str.size == strlen(key) &&
            !memcmp(pair->key.via.str.ptr, key, pair->key.via.str.size))
            return &pair->val;
    }
    return NULL;
}

static void copy_text(const msgpack_object *value, char *out, size_t room)
{
    size_t bytes = 0;
    if (value && value->type == MSGPACK_OBJECT_STR) {
        bytes = value->via.str.size < room - 1 ? value->via.str.size : room - 1;
        memcpy(out, value->via.str.ptr, bytes);
    }
    out[bytes] = 0;
}

static uint64_t as_u64(const msgpack_object *value)
{
    return value && value->type == MSGPACK_OBJECT_POSITIVE_INTEGER ? value->via.u64 : 0;
}

static double as_double(const msgpack_object *value)
{
    if (value && (value->type == MSGPACK_OBJECT_FLOAT32 || value->type == MSGPACK_OBJECT_FLOAT64))
        return value->via.f64;
    return (double)as_u64(value);
}

static void read_error(const msgpack_object *value, struct polder_error *error)
{
    *error = (struct polder_error){.type = 0};
    error->type = (int)as_u64(polder_get(value, "type"));
    copy_text(polder_get(value, "code"), error->code, sizeof error->code);
    copy_text(polder_get(value, "message"), error->message, sizeof error->message);
    error->retry_after_ms = as_u64(polder_get(value, "retry_after_ms"));
    if (error->code[0])
        return;
    (void)snprintf(error->code, sizeof error->code, "unknown");
    if (value->type == MSGPACK_OBJECT_ARRAY && value->via.array.size == 2)
        copy_text(&value->via.array.ptr[1], error->message, sizeof error->message);
    else
        copy_text(value, error->message, sizeof error->message);
}

static int send_cancel(struct polder_client *client, uint32_t id, struct polder_error *error)
{
    msgpack_sbuffer bytes;
    msgpack_packer packer;
    msgpack_sbuffer_init(&bytes);
    msgpack_packer_init(&packer, &bytes, msgpack_sbuffer_write);
    msgpack_pack_array(&packer, 3);
    msgpack_pack_int(&packer, 2);
    msgpack_pack_str_with_body(&packer, "cancel", 6);
    msgpack_pack_array(&packer, 1);
    msgpack_pack_map(&packer, 1);
    msgpack_pack_str_with_body(&packer, "id", 2);
    msgpack_pack_uint32(&packer, id);
    int rc = send_all(client, &bytes, error);
    msgpack_sbuffer_destroy(&bytes);
    return rc;
}

static bool give_token(const msgpack_object *params, uint32_t id, polder_on_token on_token,
                       void *context)
{
    if (params->type != MSGPACK_OBJECT_ARRAY || params->via.array.size != 1 || !on_token)
        return true;
    const msgpack_object *map = &params->via.array.ptr[0];
    const msgpack_object *text = polder_get(map, "text"), *value = polder_get(map, "token");
    struct polder_token token = {.id = (uint32_t)as_u64(polder_get(map, "id")), .token = -1};
    if (token.id != id || !text || text->type != MSGPACK_OBJECT_STR)
        return true;
    token.index = (uint32_t)as_u64(polder_get(map, "index"));
    token.text = text->via.str.ptr;
    token.text_bytes = text->via.str.size;
    if (value && value->type == MSGPACK_OBJECT_POSITIVE_INTEGER)
        token.token = (int64_t)value->via.u64;
    const msgpack_object *logprob = polder_get(map, "logprob");
    token.has_logprob = logprob != NULL;
    if (logprob)
        token.logprob = logprob->via.f64;
    return on_token(context, &token);
}

// Reads until the response to `id`; notifications on the way.
static int wait_for(struct polder_client *client, uint32_t id, polder_on_token on_token,
                    void *context, const msgpack_object **result, struct polder_error *error)
{
    for (bool cancelled = false;;) {
        if (receive_message(client, error))
            return -1;
        const msgpack_object *part = client->message.data.via.array.ptr;
        if (part[0].via.u64 == 1 && client->message.data.via.array.size == 4) {
            if (as_u64(&part[1]) != id)
                continue;
            *result = &part[3];
            if (part[2].type == MSGPACK_OBJECT_NIL)
                return 0;
            read_error(&part[2], error);
            return -1;
        }
        char method[16];
        copy_text(&part[1], method, sizeof method);
        if (!strcmp(method, "error") && part[2].type == MSGPACK_OBJECT_ARRAY &&
            part[2].via.array.size == 1) {
            read_error(&part[2].via.array.ptr[0], error);
            error->type = -1;
            client->broken = true;
            return -1;
        }
        if (!strcmp(method, "token") && !give_token(&part[2], id, on_token, context) &&
            !cancelled) {
            cancelled = true;
            if (send_cancel(client, id, error))
                return -1;
        }
    }
}

int polder_call(struct polder_client *client, const char *method, const msgpack_sbuffer *params,
                polder_on_token on_token, void *context, const msgpack_object **result,
                struct polder_error *error)
{
    msgpack_sbuffer bytes;
    msgpack_packer packer;
    if (client->broken)
        return fail(client, error, "the connection is unusable after an earlier failure.");
    uint32_t id = client->next_id++;
    msgpack_sbuffer_init(&bytes);
    msgpack_packer_init(&packer, &bytes, msgpack_sbuffer_write);
    msgpack_pack_array(&packer, 4);
    msgpack_pack_int(&packer, 0);
    msgpack_pack_uint32(&packer, id);
    msgpack_pack_str_with_body(&packer, method, strlen(method));
    msgpack_pack_array(&packer, params != NULL);
    if (params)
        msgpack_sbuffer_write(&bytes, params->data, params->size);
    int rc = send_all(client, &bytes, error);
    msgpack_sbuffer_destroy(&bytes);
    return rc ? rc : wait_for(client, id, on_token, context, result, error);
}

// ---- generate ----------------------------------------------------------------------------------

static void pack_text(msgpack_packer *packer, const char *text)
{
    msgpack_pack_str_with_body(packer, text, strlen(text));
}

static void pack_prompt(msgpack_packer *packer, const struct polder_generate *ask)
{
    pack_text(packer, "prompt");
    if (ask->prompt) {
        pack_text(packer, ask->prompt);
        return;
    }
    msgpack_pack_array(packer, ask->prompt_token_count);
    for (size_t i = 0; i < ask->prompt_token_count; i++)
        msgpack_pack_int32(packer, ask->prompt_tokens[i]);
}

static void pack_u64(msgpack_packer *packer, const char *key, bool given, uint64_t value)
{
    pack_text(packer, key);
    (void)(given ? msgpack_pack_uint64(packer, value) : msgpack_pack_nil(packer));
}

static void pack_double(msgpack_packer *packer, const char *key, bool given, double value)
{
    pack_text(packer, key);
    (void)(given ? msgpack_pack_double(packer, value) : msgpack_pack_nil(packer));
}

// nil stands for the server's default, so every field is always sent.
static void pack_generate(msgpack_packer *packer, const struct polder_generate *ask, bool stream)
{
    msgpack_pack_map(packer, 11);
    pack_prompt(packer, ask);
    pack_text(packer, "model");
    if (ask->model)
        pack_text(packer, ask->model);
    else
        msgpack_pack_nil(packer);
    pack_u64(packer, "max_tokens", ask->max_tokens, ask->max_tokens);
    pack_double(packer, "temperature", ask->temperature >= 0, ask->temperature);
    pack_double(packer, "top_p", ask->top_p > 0, ask->top_p);
    pack_u64(packer, "top_k", ask->top_k, ask->top_k);
    pack_u64(packer, "seed", ask->has_seed, ask->seed);
    pack_u64(packer, "deadline_ms", ask->deadline_ms, ask->deadline_ms);
    pack_text(packer, "ignore_eos");
    (void)(ask->ignore_eos ? msgpack_pack_true(packer) : msgpack_pack_false(packer));
    pack_text(packer, "stream");
    (void)(stream ? msgpack_pack_true(packer) : msgpack_pack_false(packer));
    pack_text(packer, "stop");
    msgpack_pack_array(packer, ask->stop_count);
    for (size_t i = 0; i < ask->stop_count; i++)
        pack_text(packer, ask->stop[i]);
}

static int read_result(struct polder_client *client, const msgpack_object *map,
                       struct polder_result *out, struct polder_error *error)
{
    const msgpack_object *text = polder_get(map, "text"), *usage = polder_get(map, "usage");
    if (!text || text->type != MSGPACK_OBJECT_STR || !usage)
        return fail(client, error, "the server's answer has no text.");
    *out = (struct polder_result){.text = malloc((size_t)text->via.str.size + 1),
                                  .text_bytes = text->via.str.size};
    if (!out->text)
        return fail(client, error, "out of memory.");
    memcpy(out->text, text->via.str.ptr, out->text_bytes);
    out->text[out->text_bytes] = 0;
    copy_text(polder_get(map, "finish_reason"), out->finish_reason, sizeof out->finish_reason);
    out->seed = as_u64(polder_get(map, "seed"));
    out->prompt_tokens = as_u64(polder_get(usage, "prompt_tokens"));
    out->cached_tokens = as_u64(polder_get(usage, "cached_tokens"));
    out->completion_tokens = as_u64(polder_get(usage, "completion_tokens"));
    out->queue_ms = as_double(polder_get(usage, "queue_ms"));
    out->ttft_ms = as_double(polder_get(usage, "ttft_ms"));
    out->total_ms = as_double(polder_get(usage, "total_ms"));
    return 0;
}

int polder_generate(struct polder_client *client, const struct polder_generate *ask,
                    polder_on_token on_token, void *context, struct polder_result *result,
                    struct polder_error *error)
{
    msgpack_sbuffer params;
    msgpack_packer packer;
    const msgpack_object *map;
    msgpack_sbuffer_init(&params);
    msgpack_packer_init(&packer, &params, msgpack_sbuffer_write);
    pack_generate(&packer, ask, on_token != NULL);
    int rc = polder_call(client, "generate", &params, on_token, context, &map, error);
    msgpack_sbuffer_destroy(&params);
    return rc ? rc : read_result(client, map, result, error);
}

void polder_result_free(struct polder_result *result)
{
    free(result->text);
    *result = (struct polder_result){0};
}
