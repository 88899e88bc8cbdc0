// SPDX-License-Identifier: Apache-2.0
// Typed, ranged reading of a method's parameters. Every message of this protocol has at most one
// parameter, a map; nil stands for a missing value. Pure: no connection, no server. Objects point
// into the frame.
#ifndef POLDER_RUNTIME_SERVER_PARAMS_H
#define POLDER_RUNTIME_SERVER_PARAMS_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include <msgpack.h>

#include "base/hash.h"
#include "base/status.h"
#include "runtime/engine/port.h"

struct params {
    const msgpack_object_kv *pairs;
    uint32_t count;
    struct fault fault; // of the first thing that was wrong
};

struct text_view {
    const char *text; // NULL: missing
    size_t bytes;
};

// From the params value of a request: [] or [{...}] or [nil]. false: fault set.
bool params_open(struct params *params, const msgpack_object *value);
// Every key is one of the known ones; the sentence names the stranger and lists them.
bool params_known(struct params *params, const char *const *known, size_t count);
const msgpack_object *params_get(const struct params *params,
                                 const char *key); // NULL: missing or nil
bool params_refuse(struct params *params, const char *format, ...) PRINTF_LIKE(2, 3); // false

// A missing value leaves *out as it was. false: fault set.
bool params_u64(struct params *params, const char *key, uint64_t min, uint64_t max, uint64_t *out);
bool params_u32(struct params *params, const char *key, uint32_t min, uint32_t max, uint32_t *out);
bool params_float(struct params *params, const char *key, double min, double max, float *out);
bool params_bool(struct params *params, const char *key, bool *out);
bool params_text(struct params *params, const char *key, size_t bytes_max, struct text_view *out);
// A text of 1..bytes - 1 bytes without NUL, copied and terminated.
bool params_name(struct params *params, const char *key, size_t bytes, char *out);
// An array of token ids below vocab; *count is 0 when missing.
bool params_tokens(struct params *params, const char *key, uint32_t vocab, size_t max, int32_t *out,
                   size_t *count);

// ---- generate ----------------------------------------------------------------------------------

enum { GENERATE_CHOICES_MAX = 8, GENERATE_MAX_TOKENS_DEFAULT = 256 };

struct generate_params {
    char model[ENGINE_ADAPTER_NAME * 2]; // "" : the base model
    struct text_view prompt;             // or, when text is NULL, token ids:
    const msgpack_object *prompt_tokens; // an array; the ids are not checked yet
    bool has_max_tokens, has_seed, stream, ignore_eos, logprobs;
    uint32_t max_tokens, top_k, choices, tops;
    float temperature, top_p;
    uint64_t seed, deadline_ms;
    uint32_t stops, stop_tokens;
    struct text_view stop[ENGINE_STOPS_MAX];
    int32_t stop_token[ENGINE_STOPS_MAX];
    uint32_t class; // ENGINE_CLASSES: the tenant's
};

// Reads and checks everything that can be checked without the tokenizer. false: params->fault.
bool generate_parse(struct params *params, const struct engine_limits *limits,
                    size_t prompt_bytes_max, struct generate_params *out);
// Copies checked prompt ids. false: params->fault.
bool generate_prompt_tokens(struct params *params, const struct generate_params *in, uint32_t vocab,
                            size_t max, int32_t *out, size_t *count);

// ---- adapters ----------------------------------------------------------------------------------

enum { UPLOAD_CONFIG_BYTES_MAX = 4 << 20, UPLOAD_CHUNK_BYTES_MAX = 1 << 20 };

bool adapter_name_is_good(const char *name);

struct register_params {
    char name[ENGINE_ADAPTER_NAME], path[ENGINE_PATH];
    bool replace;
};
bool register_parse(struct params *params, struct register_params *out);

struct upload_params {
    char name[ENGINE_ADAPTER_NAME];
    bool replace;
    uint64_t config_bytes, weights_bytes;
    struct digest digest;
};
bool upload_parse(struct params *params, uint64_t bytes_max, struct upload_params *out);
// The next bytes of an upload that has received some of a total.
bool upload_chunk_parse(struct params *params, uint64_t received, uint64_t total,
                        struct text_view *out);

#endif
