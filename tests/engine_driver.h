// SPDX-License-Identifier: Apache-2.0
// Drives a stack without its thread: submit requests, turn the engine, collect what came out.
#ifndef POLDER_TESTS_ENGINE_DRIVER_H
#define POLDER_TESTS_ENGINE_DRIVER_H

#include "runtime/engine/stack.h"

enum { DRIVER_TOKENS_MAX = 4096, DRIVER_REQUESTS_MAX = 512, DRIVER_TEXT_MAX = 512 };

struct driver_ask {
    const int32_t *prompt;
    uint32_t prompt_tokens, max_tokens, tenant, class;
    const char *adapter;      // NULL: base
    float temperature, top_p; // top_p 0 means 1
    uint32_t top_k;
    uint64_t seed;
    uint32_t tops;
    const int32_t *stop_token;
    uint32_t stop_tokens;
    const char *stop; // a stop string, or NULL
};

struct driver_answer {
    bool done;
    uint32_t status, finish, count, cached, generated;
    int32_t token[DRIVER_TOKENS_MAX];
    float logprob[DRIVER_TOKENS_MAX];
    char text[DRIVER_TEXT_MAX]; // its beginning, when the stack has a decoder
    uint32_t text_bytes;
    char message[200];
};

struct driver {
    struct stack *stack;
    struct driver_answer *answers; // by request id
    uint64_t next_id;
    uint32_t open;
};

// POLDER_TEST_DEVICE, or "cpu". A test that honours it calls driver_skip_without_device first:
// where that device cannot be had it prints a skip and ends with the code that ctest counts as one.
const char *driver_device(void);
void driver_skip_without_device(void);
enum { DRIVER_SKIP = 77 };

struct driver *driver_create(const struct stack_options *options); // fails the test when it cannot
void driver_destroy(struct driver *driver);
uint64_t driver_submit(struct driver *driver, const struct driver_ask *ask);
void driver_control(struct driver *driver, uint32_t kind, uint64_t id);
// Turns until every submitted request is done; fails the test after seconds_max.
void driver_finish(struct driver *driver);
// One turn, events collected.
enum engine_turn driver_turn(struct driver *driver);
const struct driver_answer *driver_answer_of(const struct driver *driver, uint64_t id);
// Forgets all answers, so that ids start again.
void driver_reset(struct driver *driver);

// A random checkpoint in a fresh directory below /tmp; the caller removes it with driver_remove.
void driver_make_model(char *directory, size_t room, const char *shape,
                       const char *const *overrides, size_t override_count, uint64_t seed);
void driver_make_directory(char *directory, size_t room);
void driver_remove(const char *directory);

#endif
