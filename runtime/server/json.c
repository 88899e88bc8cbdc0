// SPDX-License-Identifier: Apache-2.0
// JSON (from the engine and from the converter: our own, checked by jansson) to msgpack. The depth
// of what jansson parsed is at most 2048 and ours is below 8, so recursion is safe.
#include <jansson.h>

#include "runtime/server/internal.h"

static void pack_object(msgpack_packer *packer, const json_t *value)
{
    put_map(packer, (uint32_t)json_object_size(value));
    const char *key;
    json_t *item;
    json_object_foreach((json_t *)(uintptr_t)value, key, item)
    {
        put_key(packer, key);
        json_to_msgpack(packer, item);
    }
}

void json_to_msgpack(msgpack_packer *packer, const json_t *value)
{
    switch (json_typeof(value)) {
    case JSON_OBJECT:
        pack_object(packer, value);
        break;
    case JSON_ARRAY:
        (void)msgpack_pack_array(packer, json_array_size(value));
        for (size_t i = 0; i < json_array_size(value); i++)
            json_to_msgpack(packer, json_array_get(value, i));
        break;
    case JSON_STRING:
        (void)msgpack_pack_str_with_body(packer, json_string_value(value),
                                         json_string_length(value));
        break;
    case JSON_INTEGER:
        (void)msgpack_pack_int64(packer, json_integer_value(value));
        break;
    case JSON_REAL:
        (void)msgpack_pack_double(packer, json_real_value(value));
        break;
    case JSON_TRUE:
        (void)msgpack_pack_true(packer);
        break;
    case JSON_FALSE:
        (void)msgpack_pack_false(packer);
        break;
    default:
        (void)msgpack_pack_nil(packer);
    }
}
