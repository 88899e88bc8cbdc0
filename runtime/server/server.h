// SPDX-License-Identifier: Apache-2.0
// The msgpack-RPC server of docs/protocol.md: connections, identities, limits and the translation
// between messages and the engine's port. One I/O thread (the caller of server_run) does
// everything but what waits for a disk: one thread converts adapters, one does the short file
// operations. The server decides nothing about scheduling.
//
// Promises: every accepted request gets exactly one response, or its connection is closed; nothing
// a client sends makes memory grow beyond the limits below; a slow, silent or hostile client costs
// the others nothing; a client that goes away frees what its requests hold (ENGINE_CANCEL).
#ifndef POLDER_RUNTIME_SERVER_SERVER_H
#define POLDER_RUNTIME_SERVER_SERVER_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "base/clock.h"
#include "base/status.h"
#include "runtime/engine/port.h"

enum { SERVER_PROTOCOL = 1, SERVER_LISTEN_MAX = 8, SERVER_ADAPTER_DIRS_MAX = 8 };

// Owner number of adapters that the operator gave on the command line.
enum { SERVER_OWNER_OPERATOR = 0x7fffffff };

// All limits; 0 means the default in brackets.
struct server_limits {
    uint32_t connections_max;           // [1024] together
    uint32_t unauthenticated_max;       // [64] a new one beyond this closes the oldest of them
    uint32_t connections_per_tenant;    // [256]
    uint32_t requests_max;              // [1024] unfinished requests of all connections
    uint32_t requests_per_connection;   // [64]
    size_t frame_bytes;                 // [1 MiB, more if a prompt of the whole context needs it]
    size_t string_bytes;                // [frame_bytes]
    size_t unauthenticated_frame_bytes; // [4096]
    size_t prompt_bytes;                // [16 per token of the context + 4096] of a text prompt
    size_t output_high_bytes;           // [256 KiB] waiting output that makes a reader "slow"
    size_t output_max_bytes;            // [8 MiB] waiting output that closes a connection at once
    size_t buffer_bytes;                // [64 MiB] all input, output and answer buffers together
    size_t buffer_bytes_per_tenant;     // [32 MiB]
    uint32_t auth_timeout_ms;           // [10 000] from connect to a good auth
    uint32_t idle_timeout_ms;  // [600 000] without a message and without an unfinished request
    uint32_t frame_timeout_ms; // [30 000] from the first to the last byte of a message
    uint32_t slow_reader_timeout_ms; // [30 000] of being slow
    uint32_t upload_timeout_ms;      // [60 000] between two chunks of an upload
    uint32_t shutdown_timeout_ms;    // [30 000] for running requests after SIGTERM
};

// All functions are called on the I/O thread.
struct server_tokenizer {
    void *context;
    // Writes at most `max` ids (max >= bytes + 16, so it always fits) and their number. Text is
    // valid UTF-8.
    enum status (*encode)(void *context, const char *text, size_t bytes, int32_t *out, size_t max,
                          size_t *count);
    // Ids are below engine.vocab. Writes at most `max` bytes, of any content; *bytes how many.
    // STATUS_LIMIT when `max` is too small.
    enum status (*decode)(void *context, const int32_t *tokens, size_t count, char *out, size_t max,
                          size_t *bytes);
};

// Called on the worker thread. Checks the PEFT adapter in `directory` (a path that stays valid
// during the call) and writes a store file at `store_path`, the next version after the store file
// at `old_path` (there may be none). `report`: a JSON object for the client, or "".
struct server_converter {
    void *context;
    enum status (*convert)(void *context, const char *directory, const char *old_path,
                           const char *store_path, char *report, size_t report_bytes,
                           struct fault *fault);
};

// An adapter whose store file could not be registered: its owner is told why.
struct server_broken {
    char name[ENGINE_ADAPTER_NAME], tenant[ENGINE_ADAPTER_NAME]; // tenant "": the operator's
    char why[160];                                               // a sentence
};

struct server_options {
    // "127.0.0.1:7077", "[::1]:7077", ":7077" (all interfaces), "host:0" (any port), "unix:/path".
    const char *listen[SERVER_LISTEN_MAX];
    struct engine_port *port; // the front side is the server's until server_run returns
    struct engine_limits engine;
    struct server_tokenizer tokenizer;
    struct server_converter converter;                 // convert NULL: no adapter can be added
    const char *adapter_dirs[SERVER_ADAPTER_DIRS_MAX]; // roots of what adapters.register may read
    const char *state_dir; // its adapters/ gets converted adapters; needed with convert
    const struct server_broken *broken; // [broken_count], by name; copied
    size_t broken_count;
    uint64_t upload_bytes_max; // of all adapters being uploaded together; 0: not offered
    const char *tenants_path;  // tenants.yaml, read again at SIGHUP
    bool open_access;          // instead of tenants_path: no keys; refused unless loopback or Unix
    struct clock clock;        // monotonic, the engine's
    struct server_limits limits;
    // Called once when all listeners stand; `addresses`: what they are bound to, space separated.
    // Or NULL.
    void (*ready)(void *context, const char *addresses);
    void *ready_context;
};

// The engine's thread must be running. Serves until SIGTERM or SIGINT (drains: new requests are
// refused with "unavailable", running ones finish within shutdown_timeout_ms; a second signal ends
// at once), or until the engine stops. On return the engine was told to quit and was listened to
// until ENGINE_STOPPED (10 s at most): its thread can be joined. STATUS_OK after a signal;
// STATUS_DEVICE when the engine stopped by itself; else a fault at start.
MUST_USE enum status server_run(const struct server_options *options, struct fault *fault);

// The limits that will be in force (defaults filled in), for --dry-run and hello.
struct server_limits server_limits_resolved(const struct server_options *options);

#endif
