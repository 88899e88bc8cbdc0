// SPDX-License-Identifier: Apache-2.0
// The two conversions. Bytes (bin) and NaN have no JSON form and become null; an unsigned integer
// above 2^63 - 1 becomes a real. Depth: jansson allows 2048 levels, the server 16; we stop at 64.
#include "polder_client_json.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <jansson.h>

enum { DEPTH_MAX = 64 };

static bool pack(msgpack_packer *packer, const json_t *value, int depth)
{
    const char *key;
    json_t *item;
    if (depth > DEPTH_MAX)
        return false;
    switch (json_typeof(value)) {
    case JSON_OBJECT:
        msgpack_pack_map(packer, json_object_size(value));
        json_object_foreach((json_t *)(uintptr_t)value, key, item)
        {
            msgpack_pack_str_with_body(packer, key, strlen(key));
            if (!pack(packer, item, depth + 1))
                return false;
        }
        return true;
    case JSON_ARRAY:
        msgpack_pack_array(packer, json_array_size(value));
        for (size_t i = 0; i < json_array_size(value); i++) {
            if (!pack(packer, json_array_get(value, i), depth + 1))
                return false;
        }
        return true;
    case JSON_STRING:
        msgpack_pack_str_with_body(packer, json_string_value(value), json_string_length(value));
        return true;
    case JSON_INTEGER:
        msgpack_pack_int64(packer, json_integer_value(value));
        return true;
    case JSON_REAL:
        msgpack_pack_double(packer, json_real_value(value));
        return true;
    case JSON_TRUE:
        msgpack_pack_true(packer);
        return true;
    case JSON_FALSE:
        msgpack_pack_false(packer);
        return true;
    default:
        msgpack_pack_nil(packer);
        return true;
    }
}

static json_t *unpack_container(const msgpack_object *value, int depth);

static json_t *unpack(const msgpack_object *value, int depth)
{
    json_t *out = NULL;
    if (depth > DEPTH_MAX)
        return json_null();
    switch (value->type) {
    case MSGPACK_OBJECT_BOOLEAN:
        return json_boolean(value->via.boolean);
    case MSGPACK_OBJECT_POSITIVE_INTEGER:
        return value->via.u64 <= INT64_MAX ? json_integer((json_int_t)value->via.u64)
                                           : json_real((double)value->via.u64);
    case MSGPACK_OBJECT_NEGATIVE_INTEGER:
        return json_integer(value->via.i64);
    case MSGPACK_OBJECT_FLOAT32:
    case MSGPACK_OBJECT_FLOAT64:
        return isfinite(value->via.f64) ? json_real(value->via.f64) : json_null();
    case MSGPACK_OBJECT_STR:
        out = json_stringn(value->via.str.ptr, value->via.str.size);
        return out ? out : json_null();
    case MSGPACK_OBJECT_ARRAY:
    case MSGPACK_OBJECT_MAP:
        return unpack_container(value, depth);
    default:
        return json_null();
    }
}

static json_t *unpack_container(const msgpack_object *value, int depth)
{
    if (value->type == MSGPACK_OBJECT_ARRAY) {
        json_t *list = json_array();
        for (uint32_t i = 0; i < value->via.array.size; i++)
            (void)json_array_append_new(list, unpack(&value->via.array.ptr[i], depth + 1));
        return list;
    }
    json_t *map = json_object();
    for (uint32_t i = 0; i < value->via.map.size; i++) {
        const msgpack_object_kv *pair = &value->via.map.ptr[i];
        char key[256] = "";
        if (pair->key.type != MSGPACK_OBJECT_STR || pair->key.via.str.size >= sizeof key)
            continue;
        memcpy(key, pair->key.via.str.ptr, pair->key.via.str.size);
        (void)json_object_set_new(map, key, unpack(&pair->val, depth + 1));
    }
    return map;
}

static int refuse(struct polder_error *error, const char *message)
{
    *error = (struct polder_error){.type = 1, .code = "invalid_argument"};
    (void)snprintf(error->message, sizeof error->message, "%s", message);
    return -1;
}

int polder_call_json(struct polder_client *client, const char *method, const char *params,
                     size_t indent, polder_on_token on_token, void *context, char **result,
                     struct polder_error *error)
{
    msgpack_sbuffer bytes;
    msgpack_packer packer;
    json_error_t where;
    const msgpack_object *answer = NULL;
    json_t *object = params ? json_loads(params, JSON_REJECT_DUPLICATES, &where) : NULL;
    if (params && !json_is_object(object)) {
        json_decref(object);
        return refuse(error, object ? "The parameters must be a JSON object." : where.text);
    }
    msgpack_sbuffer_init(&bytes);
    msgpack_packer_init(&packer, &bytes, msgpack_sbuffer_write);
    int rc =
        object && !pack(&packer, object, 0) ? refuse(error, "The JSON is nested too deeply.") : 0;
    if (!rc)
        rc = polder_call(client, method, object ? &bytes : NULL, on_token, context, &answer, error);
    msgpack_sbuffer_destroy(&bytes);
    json_decref(object);
    if (rc)
        return rc;
    json_t *tree = unpack(answer, 0);
    *result = json_dumps(tree, JSON_ENCODE_ANY | JSON_INDENT(indent));
    json_decref(tree);
    return *result ? 0 : refuse(error, "The answer has no JSON form.");
}
