// SPDX-License-Identifier: Apache-2.0
// A stand-in for the engine behind the same port: it answers every request with the request's own
// prompt, token by token, over and over, with a delay per token. And a stand-in tokenizer: one
// token per byte, 256 is the end of text, 257..299 are spaces of growing width (for long answers).
#ifndef POLDER_TESTS_FAKE_ENGINE_H
#define POLDER_TESTS_FAKE_ENGINE_H

#include "runtime/engine/port.h"
#include "runtime/server/server.h"

enum { FAKE_VOCAB = 300, FAKE_EOS = 256, FAKE_CONTEXT = 2048, FAKE_QUEUE = 512 };

struct fake_engine;

struct fake_engine_options {
    struct engine_port *port;
    uint32_t delay_us;      // between two tokens of a request
    uint32_t tenants;       // larger owner numbers are the operator
    bool operator_adapters; // registers "acme-one", "bolt-one" and "shared" at start
    bool numbers; // lists say what the real engine says: all are pinned, each of 1000 bytes,
                  // by its owner too if that is a tenant
};

// Starts the engine's thread. fake_engine_stop waits for it; it ends after ENGINE_QUIT.
MUST_USE enum status fake_engine_start(const struct fake_engine_options *options,
                                       struct fake_engine **out);
void fake_engine_stop(struct fake_engine *engine);

struct engine_limits fake_engine_limits(void);
struct server_tokenizer fake_tokenizer(void);
struct server_converter fake_converter(void); // wants a file adapter_config.json in the
                                              // directory; with a file "slow" it takes 300 ms

#endif
