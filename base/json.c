// SPDX-License-Identifier: Apache-2.0
// Owns the meeting with jansson: no other file outside base sees a json_t. A `struct json` is a
// json_t under another name (never defined), so the tree costs nothing on top.
//
// Invariants:
//   1. The depth is bounded before jansson recurses: measure_depth walks the bytes first.
//   2. Values are only ever read; the tree is frozen once json_parse returns.
//   3. jansson refuses NaN, Infinity, broken UTF-8 and lone surrogates itself; keys cannot hold
//   NUL.
#include "base/json.h"

#include <jansson.h>
#include <stdio.h>
#include <string.h>

#include "base/arith.h"

enum { DEPTH_DEFAULT = 64, DEPTH_LIMIT = 1024 };
static const size_t bytes_default = (size_t)64 << 20;

static const json_t *inside(const struct json *value)
{
    return (const json_t *)(const void *)value;
}

static const struct json *outside(const json_t *value)
{
    return (const struct json *)(const void *)value;
}

// The deepest nesting of brackets outside strings. Text that is not JSON gives some number: it is
// refused by the parser afterwards.
static size_t measure_depth(const char *text, size_t bytes)
{
    size_t depth = 0, deepest = 0;
    bool string = false;
    for (size_t i = 0; i < bytes; i++) {
        char c = text[i];
        if (string) {
            if (c == '\\')
                i++;
            else if (c == '"')
                string = false;
        } else if (c == '"') {
            string = true;
        } else if (c == '[' || c == '{') {
            deepest = max_size(deepest, ++depth);
        } else if ((c == ']' || c == '}') && depth) {
            depth--;
        }
    }
    return deepest;
}

enum status json_parse(const char *label, const char *text, size_t bytes,
                       const struct json_limits *limits, struct json **out, struct fault *fault)
{
    size_t bytes_max = limits && limits->bytes_max ? limits->bytes_max : bytes_default;
    size_t depth_max = limits && limits->depth_max ? limits->depth_max : DEPTH_DEFAULT;
    depth_max = min_size(depth_max, DEPTH_LIMIT);
    *out = NULL;
    if (bytes > bytes_max)
        return fault_set(fault, STATUS_LIMIT, "%s: %zu bytes of JSON, at most %zu are read", label,
                         bytes, bytes_max);
    if (measure_depth(text, bytes) > depth_max)
        return fault_set(fault, STATUS_LIMIT, "%s: JSON is nested deeper than %zu", label,
                         depth_max);
    json_error_t error;
    json_t *root =
        json_loadb(text, bytes, JSON_REJECT_DUPLICATES | JSON_ALLOW_NUL | JSON_DECODE_ANY, &error);
    if (root) {
        *out = (struct json *)(void *)root;
        return STATUS_OK;
    }
    if (json_error_code(&error) == json_error_out_of_memory)
        return fault_set(fault, STATUS_NO_MEMORY, "%s: out of memory while reading JSON", label);
    return fault_set(fault, STATUS_INVALID, "%s:%d:%d: %s", label, error.line, error.column,
                     error.text);
}

void json_free(struct json *root)
{
    json_decref((json_t *)(void *)root);
}

enum json_kind json_kind_of(const struct json *value)
{
    if (!value)
        return JSON_KIND_NULL;
    switch (json_typeof(inside(value))) {
    case JSON_OBJECT:
        return JSON_KIND_OBJECT;
    case JSON_ARRAY:
        return JSON_KIND_ARRAY;
    case JSON_STRING:
        return JSON_KIND_STRING;
    case JSON_INTEGER:
        return JSON_KIND_INTEGER;
    case JSON_REAL:
        return JSON_KIND_REAL;
    case JSON_TRUE:
    case JSON_FALSE:
        return JSON_KIND_BOOL;
    case JSON_NULL:
        break;
    }
    return JSON_KIND_NULL;
}

static const char *kind_name(enum json_kind kind)
{
    static const char *const names[] = {
        [JSON_KIND_NULL] = "null",          [JSON_KIND_BOOL] = "true or false",
        [JSON_KIND_INTEGER] = "an integer", [JSON_KIND_REAL] = "a number",
        [JSON_KIND_STRING] = "a string",    [JSON_KIND_ARRAY] = "an array",
        [JSON_KIND_OBJECT] = "an object",
    };
    return names[kind];
}

const char *json_kind_name(const struct json *value)
{
    return kind_name(json_kind_of(value));
}

size_t json_count(const struct json *value)
{
    const json_t *v = inside(value);
    return json_is_array(v) ? json_array_size(v) : json_object_size(v);
}

const struct json *json_at(const struct json *array, size_t index)
{
    return outside(json_array_get(inside(array), index));
}

const struct json *json_find(const struct json *object, const char *key)
{
    return outside(json_object_get(inside(object), key));
}

const struct json *json_find_bytes(const struct json *object, const char *key, size_t key_bytes)
{
    return outside(json_object_getn(inside(object), key, key_bytes));
}

bool json_next(const struct json *object, struct json_pair *pair)
{
    // jansson's iterator functions take the object without const but change nothing.
    json_t *map = (json_t *)(void *)(uintptr_t)object;
    pair->position =
        pair->position ? json_object_iter_next(map, pair->position) : json_object_iter(map);
    if (!pair->position)
        return false;
    pair->key = json_object_iter_key(pair->position);
    pair->key_bytes = json_object_iter_key_len(pair->position);
    pair->value = outside(json_object_iter_value(pair->position));
    return true;
}

const char *json_unknown_key(const struct json *object, const char *const *known, size_t count)
{
    for (struct json_pair pair = {0}; json_next(object, &pair);) {
        size_t i = 0;
        while (i < count && strcmp(pair.key, known[i]) != 0)
            i++;
        if (i == count)
            return pair.key;
    }
    return NULL;
}

bool json_as_i64(const struct json *value, int64_t *out)
{
    if (!json_is_integer(inside(value)))
        return false;
    *out = json_integer_value(inside(value));
    return true;
}

bool json_as_u64(const struct json *value, uint64_t *out)
{
    int64_t wide = 0;
    if (!json_as_i64(value, &wide) || wide < 0)
        return false;
    *out = (uint64_t)wide;
    return true;
}

bool json_as_u32(const struct json *value, uint32_t *out)
{
    uint64_t wide = 0;
    if (!json_as_u64(value, &wide) || wide > UINT32_MAX)
        return false;
    *out = (uint32_t)wide;
    return true;
}

bool json_as_double(const struct json *value, double *out)
{
    if (!json_is_number(inside(value)))
        return false;
    *out = json_number_value(inside(value));
    return true;
}

bool json_as_bool(const struct json *value, bool *out)
{
    if (!json_is_boolean(inside(value)))
        return false;
    *out = json_is_true(inside(value));
    return true;
}

bool json_as_bytes(const struct json *value, const char **out, size_t *bytes)
{
    if (!json_is_string(inside(value)))
        return false;
    *out = json_string_value(inside(value));
    *bytes = json_string_length(inside(value));
    return true;
}

bool json_as_string(const struct json *value, const char **out)
{
    const char *text;
    size_t bytes;
    if (!json_as_bytes(value, &text, &bytes) || strlen(text) != bytes)
        return false;
    *out = text;
    return true;
}

static enum status missing(const char *key, struct fault *fault)
{
    return fault_set(fault, STATUS_INVALID, "'%s' is missing", key);
}

static enum status wrong(const char *key, const char *wanted, const struct json *value,
                         struct fault *fault)
{
    return fault_set(fault, STATUS_INVALID, "'%s' must be %s, not %s", key, wanted,
                     json_kind_name(value));
}

static const char *const wanted_u32 = "an integer from 0 to 4294967295";
static const char *const wanted_u64 = "an integer from 0 to 2^63-1";
static const char *const wanted_i64 = "an integer";
static const char *const wanted_double = "a number";
static const char *const wanted_bool = "true or false";
static const char *const wanted_string = "a string without NUL";

#define X(name, type)                                                                              \
    enum status json_get_##name(const struct json *object, const char *key, type *out,             \
                                struct fault *fault)                                               \
    {                                                                                              \
        const struct json *value = json_find(object, key);                                         \
        if (!value)                                                                                \
            return missing(key, fault);                                                            \
        if (!json_as_##name(value, out))                                                           \
            return wrong(key, wanted_##name, value, fault);                                        \
        return STATUS_OK;                                                                          \
    }                                                                                              \
    enum status json_get_##name##_or(const struct json *object, const char *key, type fallback,    \
                                     type *out, struct fault *fault)                               \
    {                                                                                              \
        *out = fallback;                                                                           \
        if (json_kind_of(json_find(object, key)) == JSON_KIND_NULL)                                \
            return STATUS_OK;                                                                      \
        return json_get_##name(object, key, out, fault);                                           \
    }
JSON_GETTERS(X)
#undef X

static enum status get_kind(const struct json *object, const char *key, enum json_kind kind,
                            bool required, const struct json **out, struct fault *fault)
{
    const struct json *value = json_find(object, key);
    *out = NULL;
    if (!required && json_kind_of(value) == JSON_KIND_NULL)
        return STATUS_OK;
    if (!value)
        return missing(key, fault);
    if (json_kind_of(value) != kind)
        return wrong(key, kind_name(kind), value, fault);
    *out = value;
    return STATUS_OK;
}

enum status json_get_object(const struct json *object, const char *key, const struct json **out,
                            struct fault *fault)
{
    return get_kind(object, key, JSON_KIND_OBJECT, true, out, fault);
}

enum status json_get_object_or_null(const struct json *object, const char *key,
                                    const struct json **out, struct fault *fault)
{
    return get_kind(object, key, JSON_KIND_OBJECT, false, out, fault);
}

enum status json_get_array(const struct json *object, const char *key, const struct json **out,
                           struct fault *fault)
{
    return get_kind(object, key, JSON_KIND_ARRAY, true, out, fault);
}

enum status json_get_array_or_null(const struct json *object, const char *key,
                                   const struct json **out, struct fault *fault)
{
    return get_kind(object, key, JSON_KIND_ARRAY, false, out, fault);
}

enum status json_fault_within(struct fault *fault, const char *label, enum status status)
{
    if (fault && status != STATUS_OK) {
        char sentence[sizeof fault->text];
        (void)snprintf(sentence, sizeof sentence, "%s", fault->text);
        (void)fault_set(fault, status, "%s: %s", label, sentence);
    }
    return status;
}
