// SPDX-License-Identifier: Apache-2.0
// Numbers: integers arrive as msgpack positive or negative integers, never as floats; floats may
// arrive as integers. NaN and infinities fail every range check because the checks are written as
// "inside". Sentences quote at most 64 bytes of what the client sent; the reply code repairs a cut
// character.
#include "runtime/server/params.h"

#include <stdarg.h>
#include <stdio.h>
#include <string.h>

#include "base/arith.h"
#include "base/check.h"

bool params_refuse(struct params *params, const char *format, ...)
{
    va_list list;
    va_start(list, format);
    params->fault.status = STATUS_INVALID;
    (void)vsnprintf(params->fault.text, sizeof params->fault.text, format, list);
    va_end(list);
    return false;
}

bool params_open(struct params *params, const msgpack_object *value)
{
    *params = (struct params){0};
    if (value->type != MSGPACK_OBJECT_ARRAY || value->via.array.size > 1)
        return params_refuse(params, "the parameters must be an array with at most one map.");
    if (!value->via.array.size || value->via.array.ptr[0].type == MSGPACK_OBJECT_NIL)
        return true;
    const msgpack_object *map = &value->via.array.ptr[0];
    if (map->type == MSGPACK_OBJECT_ARRAY && !map->via.array.size)
        return true; // how some clients (Lua, Vim script) write an empty map
    if (map->type != MSGPACK_OBJECT_MAP)
        return params_refuse(params, "the parameters must be an array with at most one map.");
    params->pairs = map->via.map.ptr;
    params->count = map->via.map.size;
    return true;
}

static bool key_is(const msgpack_object *key, const char *name)
{
    return key->type == MSGPACK_OBJECT_STR && key->via.str.size == strlen(name) &&
           !memcmp(key->via.str.ptr, name, key->via.str.size);
}

bool params_known(struct params *params, const char *const *known, size_t count)
{
    for (uint32_t i = 0; i < params->count; i++) {
        const msgpack_object *key = &params->pairs[i].key;
        size_t k = 0;
        while (k < count && !key_is(key, known[k]))
            k++;
        if (k < count)
            continue;
        char list[240];
        size_t used = 0;
        list[0] = 0;
        for (k = 0; k < count && used < sizeof list - 1; k++)
            used +=
                (size_t)snprintf(list + used, sizeof list - used, "%s%s", k ? ", " : "", known[k]);
        int shown = key->type != MSGPACK_OBJECT_STR ? 0 : (int)min_size(key->via.str.size, 64);
        return params_refuse(params, "unknown field \"%.*s\"; known: %s.", shown,
                             shown ? key->via.str.ptr : "", list);
    }
    return true;
}

const msgpack_object *params_get(const struct params *params, const char *key)
{
    for (uint32_t i = 0; i < params->count; i++) {
        if (key_is(&params->pairs[i].key, key))
            return params->pairs[i].val.type == MSGPACK_OBJECT_NIL ? NULL : &params->pairs[i].val;
    }
    return NULL;
}

bool params_u64(struct params *params, const char *key, uint64_t min, uint64_t max, uint64_t *out)
{
    const msgpack_object *value = params_get(params, key);
    if (!value)
        return true;
    if (value->type == MSGPACK_OBJECT_POSITIVE_INTEGER && value->via.u64 >= min &&
        value->via.u64 <= max) {
        *out = value->via.u64;
        return true;
    }
    return params_refuse(params, "%s must be an integer from %llu to %llu.", key,
                         (unsigned long long)min, (unsigned long long)max);
}

bool params_u32(struct params *params, const char *key, uint32_t min, uint32_t max, uint32_t *out)
{
    uint64_t value = *out;
    if (!params_get(params, key))
        return true;
    if (!params_u64(params, key, min, max, &value))
        return false;
    *out = (uint32_t)value;
    return true;
}

bool params_float(struct params *params, const char *key, double min, double max, float *out)
{
    const msgpack_object *value = params_get(params, key);
    if (!value)
        return true;
    double number = min - 1;
    if (value->type == MSGPACK_OBJECT_FLOAT32 || value->type == MSGPACK_OBJECT_FLOAT64)
        number = value->via.f64;
    else if (value->type == MSGPACK_OBJECT_POSITIVE_INTEGER)
        number = (double)value->via.u64;
    else if (value->type == MSGPACK_OBJECT_NEGATIVE_INTEGER)
        number = (double)value->via.i64;
    if (!(number >= min && number <= max))
        return params_refuse(params, "%s must be a number from %g to %g.", key, min, max);
    *out = (float)number;
    return true;
}

bool params_bool(struct params *params, const char *key, bool *out)
{
    const msgpack_object *value = params_get(params, key);
    if (!value)
        return true;
    if (value->type != MSGPACK_OBJECT_BOOLEAN)
        return params_refuse(params, "%s must be true or false.", key);
    *out = value->via.boolean;
    return true;
}

bool params_text(struct params *params, const char *key, size_t bytes_max, struct text_view *out)
{
    const msgpack_object *value = params_get(params, key);
    if (!value)
        return true;
    if (value->type != MSGPACK_OBJECT_STR)
        return params_refuse(params, "%s must be a str.", key);
    if (value->via.str.size > bytes_max)
        return params_refuse(params, "%s has %u bytes; at most %zu are allowed.", key,
                             value->via.str.size, bytes_max);
    *out = (struct text_view){value->via.str.ptr, value->via.str.size};
    return true;
}

bool params_name(struct params *params, const char *key, size_t bytes, char *out)
{
    struct text_view view = {0};
    if (!params_text(params, key, bytes - 1, &view))
        return false;
    if (!view.text)
        return true;
    if (!view.bytes || memchr(view.text, 0, view.bytes))
        return params_refuse(params, "%s must have at least one character and no NUL.", key);
    memcpy(out, view.text, view.bytes);
    out[view.bytes] = 0;
    return true;
}

static bool tokens_from(struct params *params, const char *key, const msgpack_object *value,
                        uint32_t vocab, size_t max, int32_t *out, size_t *count)
{
    if (value->type != MSGPACK_OBJECT_ARRAY)
        return params_refuse(params, "%s must be an array of token ids.", key);
    if (value->via.array.size > max)
        return params_refuse(params, "%s has %u token ids; at most %zu are allowed.", key,
                             value->via.array.size, max);
    for (uint32_t i = 0; i < value->via.array.size; i++) {
        const msgpack_object *item = &value->via.array.ptr[i];
        if (item->type != MSGPACK_OBJECT_POSITIVE_INTEGER || item->via.u64 >= vocab)
            return params_refuse(params, "%s[%u] must be a token id from 0 to %u.", key, i,
                                 vocab - 1);
        out[i] = (int32_t)item->via.u64;
    }
    *count = value->via.array.size;
    return true;
}

bool params_tokens(struct params *params, const char *key, uint32_t vocab, size_t max, int32_t *out,
                   size_t *count)
{
    const msgpack_object *value = params_get(params, key);
    *count = 0;
    return !value || tokens_from(params, key, value, vocab, max, out, count);
}

// ---- generate ----------------------------------------------------------------------------------

static bool parse_prompt(struct params *params, size_t bytes_max, struct generate_params *out)
{
    const msgpack_object *value = params_get(params, "prompt");
    if (!value)
        return params_refuse(params, "prompt is missing.");
    if (value->type == MSGPACK_OBJECT_ARRAY) {
        out->prompt_tokens = value;
        return value->via.array.size ? true : params_refuse(params, "prompt is empty.");
    }
    if (value->type != MSGPACK_OBJECT_STR)
        return params_refuse(params, "prompt must be a str or an array of token ids.");
    if (!params_text(params, "prompt", bytes_max, &out->prompt))
        return false;
    return out->prompt.bytes ? true : params_refuse(params, "prompt is empty.");
}

static bool parse_one_stop(struct params *params, const msgpack_object *value,
                           struct generate_params *out)
{
    if (value->type != MSGPACK_OBJECT_STR)
        return params_refuse(params, "stop must be a str or an array of str.");
    if (!value->via.str.size || value->via.str.size > ENGINE_STOP_BYTES_MAX)
        return params_refuse(params, "a stop text must have 1 to %d bytes.", ENGINE_STOP_BYTES_MAX);
    out->stop[out->stops++] = (struct text_view){value->via.str.ptr, value->via.str.size};
    return true;
}

static bool parse_stop(struct params *params, const struct engine_limits *limits,
                       struct generate_params *out)
{
    const msgpack_object *value = params_get(params, "stop");
    size_t tokens = 0;
    if (!params_tokens(params, "stop_token_ids", limits->vocab, ENGINE_STOPS_MAX, out->stop_token,
                       &tokens))
        return false;
    out->stop_tokens = (uint32_t)tokens;
    if (!value)
        return true;
    if (value->type != MSGPACK_OBJECT_ARRAY)
        return parse_one_stop(params, value, out);
    if (value->via.array.size > ENGINE_STOPS_MAX)
        return params_refuse(params, "stop has %u texts; at most %d are allowed.",
                             value->via.array.size, ENGINE_STOPS_MAX);
    for (uint32_t i = 0; i < value->via.array.size; i++) {
        if (!parse_one_stop(params, &value->via.array.ptr[i], out))
            return false;
    }
    return true;
}

// logprobs: false or nil: none; true or 0: of the chosen token; 1..8: and of so many most likely
// ones.
static bool parse_logprobs(struct params *params, struct generate_params *out)
{
    const msgpack_object *value = params_get(params, "logprobs");
    if (!value)
        return true;
    out->logprobs = true;
    if (value->type == MSGPACK_OBJECT_BOOLEAN) {
        out->logprobs = value->via.boolean;
        return true;
    }
    return params_u32(params, "logprobs", 0, ENGINE_TOPS_MAX, &out->tops);
}

static bool parse_class(struct params *params, struct generate_params *out)
{
    static const char *const names[ENGINE_CLASSES] = {"interactive", "standard", "batch"};
    char name[32] = "";
    out->class = ENGINE_CLASSES;
    if (!params_name(params, "priority_class", sizeof name, name) || !name[0])
        return !name[0] && !params->fault.status;
    for (uint32_t i = 0; i < ENGINE_CLASSES; i++) {
        if (!strcmp(name, names[i]))
            out->class = i;
    }
    return out->class < ENGINE_CLASSES
               ? true
               : params_refuse(params, "priority_class must be interactive, standard or batch.");
}

static bool parse_sampling(struct params *params, const struct engine_limits *limits,
                           struct generate_params *out)
{
    out->has_seed = params_get(params, "seed");
    if (!params_float(params, "temperature", 0, 2, &out->temperature) ||
        !params_float(params, "top_p", 0, 1, &out->top_p) ||
        !params_u32(params, "top_k", 0, limits->vocab, &out->top_k) ||
        !params_u64(params, "seed", 0, UINT64_MAX, &out->seed))
        return false;
    if (out->top_p <= 0)
        return params_refuse(params, "top_p must be above 0 and at most 1.");
    return true;
}

bool generate_parse(struct params *params, const struct engine_limits *limits,
                    size_t prompt_bytes_max, struct generate_params *out)
{
    static const char *const known[] = {
        "model",    "prompt", "max_tokens", "temperature",    "top_p",
        "top_k",    "seed",   "stop",       "stop_token_ids", "n",
        "logprobs", "stream", "ignore_eos", "deadline_ms",    "priority_class"};
    *out = (struct generate_params){.temperature = 1, .top_p = 1, .choices = 1};
    out->has_max_tokens = params_get(params, "max_tokens");
    return params_known(params, known, ARRAY_COUNT(known)) &&
           params_name(params, "model", sizeof out->model, out->model) &&
           parse_prompt(params, prompt_bytes_max, out) &&
           params_u32(params, "max_tokens", 1, limits->context_tokens, &out->max_tokens) &&
           parse_sampling(params, limits, out) && parse_stop(params, limits, out) &&
           params_u32(params, "n", 1, GENERATE_CHOICES_MAX, &out->choices) &&
           parse_logprobs(params, out) && params_bool(params, "stream", &out->stream) &&
           params_bool(params, "ignore_eos", &out->ignore_eos) &&
           params_u64(params, "deadline_ms", 1, 86400000, &out->deadline_ms) &&
           parse_class(params, out);
}

bool generate_prompt_tokens(struct params *params, const struct generate_params *in, uint32_t vocab,
                            size_t max, int32_t *out, size_t *count)
{
    return tokens_from(params, "prompt", in->prompt_tokens, vocab, max, out, count);
}
