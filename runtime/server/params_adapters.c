// SPDX-License-Identifier: Apache-2.0
// The parameters of adapters.register, adapters.upload and adapters.upload_chunk: what can be said
// of them without the server's state.
#include <string.h>

#include "base/check.h"
#include "runtime/server/params.h"

bool adapter_name_is_good(const char *name)
{
    size_t length = strlen(name);
    return length && length < ENGINE_ADAPTER_NAME && *name != '.' &&
           strspn(name, "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789._-") ==
               length;
}

static bool check_name(struct params *params, const char *name)
{
    return adapter_name_is_good(name) ||
           params_refuse(params, "a name is 1 to 63 letters, digits, '.', '_', '-', not starting "
                                 "with '.'.");
}

bool register_parse(struct params *params, struct register_params *out)
{
    static const char *const names[] = {"name", "path", "replace"};
    *out = (struct register_params){.replace = true};
    if (!params_known(params, names, ARRAY_COUNT(names)) ||
        !params_name(params, "name", sizeof out->name, out->name) ||
        !params_name(params, "path", sizeof out->path, out->path) ||
        !params_bool(params, "replace", &out->replace))
        return false;
    if (!out->name[0] || !out->path[0])
        return params_refuse(params, "name and path are needed.");
    return check_name(params, out->name);
}

bool upload_parse(struct params *params, uint64_t bytes_max, struct upload_params *out)
{
    static const char *const names[] = {"name", "replace", "config_bytes", "weights_bytes",
                                        "digest"};
    char hex[2 * DIGEST_BYTES + 1] = "";
    *out = (struct upload_params){.replace = true};
    if (!params_known(params, names, ARRAY_COUNT(names)) ||
        !params_name(params, "name", sizeof out->name, out->name) ||
        !params_bool(params, "replace", &out->replace) ||
        !params_u64(params, "config_bytes", 1, UPLOAD_CONFIG_BYTES_MAX, &out->config_bytes) ||
        !params_u64(params, "weights_bytes", 1, bytes_max, &out->weights_bytes) ||
        !params_name(params, "digest", sizeof hex, hex))
        return false;
    if (!out->name[0] || !out->config_bytes || !out->weights_bytes)
        return params_refuse(params, "name, config_bytes, weights_bytes and digest are needed.");
    return check_name(params, out->name) &&
           (digest_from_hex(hex, &out->digest) ||
            params_refuse(params, "digest is 64 hexadecimal digits."));
}

bool upload_chunk_parse(struct params *params, uint64_t received, uint64_t total,
                        struct text_view *out)
{
    const msgpack_object *value = params_get(params, "data");
    uint64_t offset = UINT64_MAX;
    if (!params_u64(params, "offset", 0, total, &offset))
        return false;
    if (!value || value->type != MSGPACK_OBJECT_BIN || !value->via.bin.size)
        return params_refuse(params, "data must be a bin of at least one byte.");
    if (value->via.bin.size > UPLOAD_CHUNK_BYTES_MAX)
        return params_refuse(params, "a chunk has at most %d bytes.", UPLOAD_CHUNK_BYTES_MAX);
    if (offset != received)
        return params_refuse(params, "the next chunk begins at offset %llu.",
                             (unsigned long long)received);
    if (value->via.bin.size > total - received)
        return params_refuse(params, "the chunk goes beyond the %llu bytes that were announced.",
                             (unsigned long long)total);
    *out = (struct text_view){.text = value->via.bin.ptr, .bytes = value->via.bin.size};
    return true;
}
