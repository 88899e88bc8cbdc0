// SPDX-License-Identifier: Apache-2.0
// A small blocking C client for docs/protocol.md: one socket, one call at a time, msgpack-c and
// libc only.
//
//   struct polder_error error;
//   struct polder_client *client = polder_open("127.0.0.1:7077", key, 30000, &error);
//   struct polder_generate ask = {.prompt = "Once upon a time", .max_tokens = 64};
//   struct polder_result result;
//   if (!polder_generate(client, &ask, on_token, context, &result, &error)) ...
//   polder_result_free(&result);
//   polder_close(client);
//
// Functions return 0, or -1 with *error filled in. A client belongs to one thread.
#ifndef POLDER_CLIENT_H
#define POLDER_CLIENT_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include <msgpack.h>

struct polder_client;

struct polder_error {
    int type;                // 0 exception, 1 the request was wrong; -1 the connection is unusable
    char code[40];           // "not_found", "resource_exhausted", ...; "connection" for -1
    char message[400];       // a sentence
    uint64_t retry_after_ms; // 0: unknown, or waiting does not help
};

// address: "host:port", "[v6]:port" or "unix:/path". Says hello and, when key is not NULL, auth.
// timeout_ms: of connecting and of every wait for the server; 0: none.
struct polder_client *polder_open(const char *address, const char *key, uint32_t timeout_ms,
                                  struct polder_error *error); // NULL: failed
void polder_close(struct polder_client *client);

// One streamed token. token -1: text that became final without a token of its own.
struct polder_token {
    uint32_t id, index; // of the request; of the choice
    int64_t token;
    const char *text; // not terminated
    size_t text_bytes;
    bool has_logprob;
    double logprob;
};
// false: cancel the request; its result still comes, with finish_reason "cancelled".
typedef bool (*polder_on_token)(void *context, const struct polder_token *token);

// Any method. params: a packed map, or NULL. *result is valid until the next call. on_token may be
// NULL.
int polder_call(struct polder_client *client, const char *method, const msgpack_sbuffer *params,
                polder_on_token on_token, void *context, const msgpack_object **result,
                struct polder_error *error);

struct polder_generate {
    const char *model;  // NULL: the base model
    const char *prompt; // a text, or NULL and:
    const int32_t *prompt_tokens;
    size_t prompt_token_count;
    uint32_t max_tokens;       // 0: the server's default
    double temperature, top_p; // below 0 and 0: the server's default
    uint32_t top_k;
    bool has_seed, ignore_eos;
    uint64_t seed, deadline_ms; // deadline_ms 0: none
    const char *const *stop;
    size_t stop_count;
};

struct polder_result {
    char *text; // terminated, owned by the result
    size_t text_bytes;
    char finish_reason[16];
    uint64_t seed, prompt_tokens, cached_tokens, completion_tokens;
    double queue_ms, ttft_ms, total_ms;
};

// Streams when on_token is given. Frees nothing: call polder_result_free after success.
int polder_generate(struct polder_client *client, const struct polder_generate *ask,
                    polder_on_token on_token, void *context, struct polder_result *result,
                    struct polder_error *error);
void polder_result_free(struct polder_result *result);

// The value of a key in a map, or NULL: for reading results of polder_call.
const msgpack_object *polder_get(const msgpack_object *map, const char *key);

#endif
