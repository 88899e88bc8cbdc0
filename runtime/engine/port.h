// SPDX-License-Identifier: Apache-2.0
// The port: how front ends (server, command line) talk to the engine. Two bounded rings of plain
// records without pointers, one in each direction, each with an eventfd; so the engine can later
// live in another process. One front-end thread owns the front side, the engine thread the other.
//
// Promises of the engine: every ENGINE_REQUEST it takes ends with exactly one ENGINE_DONE (also
// after cancel, refusal, drain or failure); texts of one request arrive in order; the engine never
// waits for the front end: when the event ring has no room it stops making events until there is.
// The front end drains events promptly; to hold back a slow reader it sends ENGINE_PAUSE for that
// request.
#ifndef POLDER_RUNTIME_ENGINE_PORT_H
#define POLDER_RUNTIME_ENGINE_PORT_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "base/ring.h"
#include "base/status.h"

enum {
    ENGINE_ADAPTER_NAME = 64,
    ENGINE_PATH = 1024,
    ENGINE_STOPS_MAX = 8,        // stop strings, and stop tokens
    ENGINE_STOP_BYTES_MAX = 128, // of one stop string
    ENGINE_TOPS_MAX = 8
};

enum engine_command_kind {
    ENGINE_REQUEST = 1,
    ENGINE_CANCEL, // struct engine_control, id of the request; unknown ids are ignored
    ENGINE_PAUSE,  // stop working on this request until ENGINE_RESUME
    ENGINE_RESUME,
    ENGINE_ADAPTER_ADD,    // struct engine_adapter_command; answered by ENGINE_REPLY
    ENGINE_ADAPTER_REMOVE, // likewise, as the next four
    ENGINE_ADAPTER_LOAD,   // begin to bring it to the device
    ENGINE_ADAPTER_UNLOAD, // give its device pages back
    ENGINE_ADAPTER_PIN,    // keep it there, for the tenant `owner`
    ENGINE_ADAPTER_UNPIN,
    ENGINE_ADAPTER_LIST, // struct engine_list, id = reply id
    ENGINE_STATS,        // struct engine_control, id = reply id
    ENGINE_DRAIN,        // finish what is running, refuse what is new (SHUTTING_DOWN)
    ENGINE_QUIT          // end everything now with SHUTTING_DOWN, then stop
};

enum engine_class { ENGINE_INTERACTIVE, ENGINE_STANDARD, ENGINE_BATCH, ENGINE_CLASSES };

// Followed by: int32 prompt[prompt_tokens]; int32 stop_token[stop_tokens]; then stop_strings times
// { uint16 bytes; char text[bytes] } without padding.
struct engine_request {
    uint32_t kind; // ENGINE_REQUEST
    uint32_t tenant;
    uint64_t id; // chosen by the front end, unique while the request lives
    uint32_t class;
    uint32_t prompt_tokens, max_tokens;
    uint32_t stop_tokens, stop_strings;
    float temperature, top_p;
    uint32_t top_k;
    uint32_t tops;         // top_logprobs wanted with each token, 0..ENGINE_TOPS_MAX
    uint32_t want_logprob; // 0 or 1
    uint32_t ignore_eos;
    uint64_t seed;
    uint64_t deadline_us;              // on the monotonic clock; 0: none
    char adapter[ENGINE_ADAPTER_NAME]; // "" : the base model
};

struct engine_control {
    uint32_t kind;
    uint32_t status; // of ENGINE_STOPPED: enum status, DEVICE when the device failed; else 0
    uint64_t id;
};

// ENGINE_ADAPTER_LIST: adapters by name, the first after `after`, at most `limit`, and of each
// whether it is pinned, and whether `tenant` has a claim on it. Begins like engine_control.
struct engine_list {
    uint32_t kind, limit;
    uint64_t id;
    uint32_t tenant;
    char after[ENGINE_ADAPTER_NAME];
};

struct engine_adapter_command {
    uint32_t kind, owner;
    uint64_t id;      // reply id
    uint32_t replace; // ADD: the name may be taken by the owner or the operator, then this is its
                      // next version
    uint32_t shared;  // ADD: other tenants register as well, and are left half of the places
    uint64_t owned_bytes_max;  // ADD: of all that this tenant has registered; 0: no limit
    uint64_t pinned_bytes_max; // PIN: of all that this tenant may have pinned
    char name[ENGINE_ADAPTER_NAME];
    char store_path[ENGINE_PATH]; // of a store file made by adapter_convert; ADD only
};

enum engine_event_kind { ENGINE_TEXT = 1, ENGINE_DONE, ENGINE_REPLY, ENGINE_STOPPED };
enum engine_finish {
    ENGINE_FINISH_STOP = 1,
    ENGINE_FINISH_LENGTH,
    ENGINE_FINISH_CANCELLED,
    ENGINE_FINISH_ERROR
};

// One generated token. text: the complete UTF-8 characters that became final with it (may be empty;
// text that could be the start of a stop string is held back). Followed by text_bytes bytes.
struct engine_text {
    uint32_t kind;
    int32_t token;
    uint64_t id;
    uint32_t index; // 0 for the first generated token
    float logprob;
    uint32_t tops;
    int32_t top_token[ENGINE_TOPS_MAX];
    float top_logprob[ENGINE_TOPS_MAX];
    uint32_t text_bytes;
};

// The end of a request. Followed by text_bytes bytes: text that was held back (finish length or
// stop by token), or nothing.
struct engine_done {
    uint32_t kind;
    uint32_t status; // enum status
    uint64_t id;
    uint32_t finish; // enum engine_finish
    uint32_t prompt_tokens, cached_tokens, generated_tokens;
    uint64_t queue_us, first_token_us, total_us; // from arrival at the engine
    uint64_t adapter_us; // of that: it could have gone on but for its adapter
    char message[200];   // a sentence, when status is not 0
    uint32_t text_bytes;
};

// Answer to a command with a reply id. Followed by bytes: JSON text (stats; a list, {"adapters":
// [...], "more": BOOL}; {"operator":true} when an adapter that was registered or removed is the
// operator's), or nothing.
struct engine_reply {
    uint32_t kind;
    uint32_t status;
    uint64_t id;
    char message[200];
    uint32_t bytes;
};

struct engine_port {
    struct ring *commands, *events;
    int command_wake, event_wake; // eventfds: written by the sender after a push
};

MUST_USE enum status engine_port_create(size_t command_bytes, size_t event_bytes,
                                        struct engine_port *out);
void engine_port_destroy(struct engine_port *port);

// Front end: push a command and wake the engine. FULL: try again after draining events.
MUST_USE enum status engine_send(struct engine_port *port, const void *record, size_t bytes);

// What a front end must know about the engine before it can check requests.
struct engine_limits {
    uint32_t vocab, context_tokens; // prompt + max_tokens <= context_tokens
    uint32_t queue_max;
    uint32_t eos_count, eos[8];
    char model_name[128];
};

#endif
