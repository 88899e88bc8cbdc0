// SPDX-License-Identifier: Apache-2.0
// Strict JSON (RFC 8259) as a read-only tree: a thin face over jansson. Refused with a sentence
// that begins "label:line:column: ": duplicate keys, broken UTF-8, lone surrogates, NaN and
// Infinity, numbers that do not fit 64 bits, anything after the value, nesting deeper than
// depth_max, more than bytes_max.
//
// A `struct json` is one value. It belongs to the tree it came from and lives until json_free of
// the root; nothing is reference counted by callers. A finished tree may be read by any number of
// threads.
//
// Getters: `json_get_x` requires the key, `json_get_x_or` takes a fallback for a key that is
// missing or null. A value of another type or out of range is STATUS_INVALID; nothing is ever
// converted: 1.0 and "1" are not integers (an integer is a good double). Sentences name the key
// ("'r' must be ..., not a string"); json_fault_within puts the file's name in front.
#ifndef POLDER_BASE_JSON_H
#define POLDER_BASE_JSON_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "base/status.h"

enum json_kind {
    JSON_KIND_NULL,
    JSON_KIND_BOOL,
    JSON_KIND_INTEGER,
    JSON_KIND_REAL,
    JSON_KIND_STRING,
    JSON_KIND_ARRAY,
    JSON_KIND_OBJECT
};

struct json;

struct json_limits {
    size_t bytes_max;   // of the text; 0: 64 MiB
    uint32_t depth_max; // nesting of arrays and objects; 0: 64; at most 1024
};

// `label` names the text in sentences. The text is not kept. limits may be NULL.
// INVALID (not JSON), LIMIT, NO_MEMORY. The caller frees *out with json_free.
MUST_USE enum status json_parse(const char *label, const char *text, size_t bytes,
                                const struct json_limits *limits, struct json **out,
                                struct fault *fault);
void json_free(struct json *root); // NULL is fine

enum json_kind json_kind_of(const struct json *value); // NULL counts as null
const char *json_kind_name(const struct json *value);  // "an object", "a string", "null" ...
size_t json_count(const struct json *value);           // items or pairs; 0 for anything else
const struct json *json_at(const struct json *array, size_t index);       // NULL beyond the end
const struct json *json_find(const struct json *object, const char *key); // NULL when missing
const struct json *json_find_bytes(const struct json *object, const char *key, size_t key_bytes);

// Pairs of an object in file order. Begin with a zeroed iterator; false after the last pair.
//     for (struct json_pair p = {0}; json_next(object, &p);) use(p.key, p.value);
struct json_pair {
    const char *key; // NUL-terminated, without NUL inside
    size_t key_bytes;
    const struct json *value;
    void *position; // private
};
bool json_next(const struct json *object, struct json_pair *pair);

// The first key of the object that is not in `known`, NULL when all are known.
const char *json_unknown_key(const struct json *object, const char *const *known, size_t count);

// One value as a C type; false when it is of another kind (or does not fit).
bool json_as_u64(const struct json *value, uint64_t *out);
bool json_as_i64(const struct json *value, int64_t *out);
bool json_as_u32(const struct json *value, uint32_t *out);
bool json_as_double(const struct json *value, double *out); // integer or real, always finite
bool json_as_bool(const struct json *value, bool *out);
// The bytes of a string, NUL-terminated; they may contain NUL as well: look at *bytes.
bool json_as_bytes(const struct json *value, const char **out, size_t *bytes);
// The same for a string without NUL inside.
bool json_as_string(const struct json *value, const char **out);

#define JSON_GETTERS(X)                                                                            \
    X(u32, uint32_t)                                                                               \
    X(u64, uint64_t)                                                                               \
    X(i64, int64_t)                                                                                \
    X(double, double)                                                                              \
    X(bool, bool)                                                                                  \
    X(string, const char *)

// json_get_u32(object, "key", &out, fault); json_get_u32_or(object, "key", 7, &out, fault); and so
// on.
#define X(name, type)                                                                              \
    MUST_USE enum status json_get_##name(const struct json *object, const char *key, type *out,    \
                                         struct fault *fault);                                     \
    MUST_USE enum status json_get_##name##_or(const struct json *object, const char *key,          \
                                              type fallback, type *out, struct fault *fault);
JSON_GETTERS(X)
#undef X

// A value of one kind; `_or_null` gives NULL for a key that is missing or null.
MUST_USE enum status json_get_object(const struct json *object, const char *key,
                                     const struct json **out, struct fault *fault);
MUST_USE enum status json_get_object_or_null(const struct json *object, const char *key,
                                             const struct json **out, struct fault *fault);
MUST_USE enum status json_get_array(const struct json *object, const char *key,
                                    const struct json **out, struct fault *fault);
MUST_USE enum status json_get_array_or_null(const struct json *object, const char *key,
                                            const struct json **out, struct fault *fault);

// Puts "label: " in front of the sentence of a failure; returns `status`, so it wraps a call.
enum status json_fault_within(struct fault *fault, const char *label, enum status status);

#endif
