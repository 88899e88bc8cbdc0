// SPDX-License-Identifier: Apache-2.0
// Outside bytes as the server reads them: scanner, msgpack-c, parameter reading. Claims: (1) the
// scanner reads no byte it was not given, (2) in pieces or at once it says the same, (3) what it
// lets through msgpack-c decodes to the same length, within the limits, (4) parsed parameters are
// inside their ranges. With -DPOLDER_PLANT_BUG the scanner reads a header one byte too early: claim
// 1 fails.
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#include <msgpack.h>

#include "base/check.h"
#include "runtime/server/params.h"
#include "runtime/server/scan.h"

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

enum { VOCAB = 1000, CONTEXT = 512, PROMPT_BYTES = 4096 };

static const struct scan_limits limits = {.frame_bytes = 8192, .string_bytes = 4096, .items = 1000};

// The same bytes in growing pieces, each in an allocation of its own so that any read beyond is
// seen.
static void check_pieces(const uint8_t *data, size_t size, enum scan_result expected,
                         const struct scanner *whole)
{
    struct scanner scanner;
    enum scan_result result = SCAN_MORE;
    scan_begin(&scanner, &limits);
    size_t step = size / 9 + 1;
    for (size_t count = 1; result == SCAN_MORE; count += step) {
        count = count < size ? count : size;
        uint8_t *piece = malloc(count ? count : 1);
        CHECK(piece);
        memcpy(piece, data, count);
        result = scan_run(&scanner, piece, count);
        free(piece);
        if (count == size)
            break;
    }
    CHECK(result == expected && scanner.at == whole->at);
    CHECK(result != SCAN_BAD || !strcmp(scanner.reason, whole->reason));
}

static int depth_of(const msgpack_object *object, uint32_t *items)
{
    int deepest = 0;
    ++*items;
    if (object->type == MSGPACK_OBJECT_ARRAY) {
        for (uint32_t i = 0; i < object->via.array.size; i++) {
            int depth = depth_of(&object->via.array.ptr[i], items);
            deepest = depth > deepest ? depth : deepest;
        }
        return deepest + 1;
    }
    if (object->type == MSGPACK_OBJECT_MAP) {
        for (uint32_t i = 0; i < object->via.map.size; i++) {
            const msgpack_object_kv *pair = &object->via.map.ptr[i];
            CHECK(pair->key.type == MSGPACK_OBJECT_STR);
            ++*items;
            int depth = depth_of(&pair->val, items);
            deepest = depth > deepest ? depth : deepest;
        }
        return deepest + 1;
    }
    return 0;
}

static void check_generate(const msgpack_object *value)
{
    static const struct engine_limits engine = {.vocab = VOCAB, .context_tokens = CONTEXT};
    struct params params;
    struct generate_params out;
    int32_t tokens[8192];
    size_t count = 0;
    if (!params_open(&params, value))
        return;
    if (!generate_parse(&params, &engine, PROMPT_BYTES, &out)) {
        CHECK(params.fault.status == STATUS_INVALID && params.fault.text[0]);
        return;
    }
    CHECK(out.temperature >= 0 && out.temperature <= 2 && out.top_p > 0 && out.top_p <= 1);
    CHECK(out.top_k <= VOCAB && out.choices >= 1 && out.choices <= GENERATE_CHOICES_MAX);
    CHECK(out.tops <= ENGINE_TOPS_MAX && out.stops <= ENGINE_STOPS_MAX &&
          out.max_tokens <= CONTEXT);
    CHECK(!out.has_max_tokens || out.max_tokens >= 1);
    CHECK(out.class <= ENGINE_CLASSES && strlen(out.model) < sizeof out.model);
    CHECK((out.prompt.text && out.prompt.bytes && out.prompt.bytes <= PROMPT_BYTES) ||
          out.prompt_tokens);
    for (uint32_t i = 0; i < out.stop_tokens; i++)
        CHECK(out.stop_token[i] >= 0 && out.stop_token[i] < VOCAB);
    if (!out.prompt_tokens || !generate_prompt_tokens(&params, &out, VOCAB, 8192, tokens, &count))
        return;
    for (size_t i = 0; i < count; i++)
        CHECK(tokens[i] >= 0 && tokens[i] < VOCAB);
}

static void check_adapters(const msgpack_object *value)
{
    enum { TOTAL = 1000, RECEIVED = 300 };
    struct params params;
    struct register_params registered;
    struct upload_params upload;
    struct text_view data;
    if (params_open(&params, value) && register_parse(&params, &registered))
        CHECK(adapter_name_is_good(registered.name) && registered.path[0] &&
              strlen(registered.path) < sizeof registered.path);
    if (params_open(&params, value) && upload_parse(&params, TOTAL, &upload))
        CHECK(adapter_name_is_good(upload.name) && upload.config_bytes >= 1 &&
              upload.config_bytes <= UPLOAD_CONFIG_BYTES_MAX && upload.weights_bytes >= 1 &&
              upload.weights_bytes <= TOTAL);
    if (params_open(&params, value) && upload_chunk_parse(&params, RECEIVED, TOTAL, &data))
        CHECK(data.text && data.bytes >= 1 && data.bytes <= TOTAL - RECEIVED);
    else
        CHECK(params.fault.status == STATUS_INVALID && params.fault.text[0]);
}

static void check_lossy(const uint8_t *data, size_t size)
{
    char *out = malloc(3 * size + 1);
    CHECK(out);
    size_t length = utf8_lossy(data, size, out);
    CHECK(length <= 3 * size && utf8_is_valid((const uint8_t *)out, length));
    CHECK(!utf8_is_valid(data, size) || (length == size && (!size || !memcmp(out, data, size))));
    free(out);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    struct scanner scanner;
    scan_begin(&scanner, &limits);
    enum scan_result result = scan_run(&scanner, data, size);
    CHECK(scanner.at <= size && scanner.at <= limits.frame_bytes);
    check_pieces(data, size, result, &scanner);
    check_lossy(data, size);
    if (result != SCAN_COMPLETE)
        return 0;
    msgpack_unpacked message;
    size_t used = 0;
    uint32_t items = 0;
    msgpack_unpacked_init(&message);
    CHECK(msgpack_unpack_next(&message, (const char *)data, scanner.at, &used) ==
          MSGPACK_UNPACK_SUCCESS);
    CHECK(used == scanner.at);
    CHECK(depth_of(&message.data, &items) <= SCAN_DEPTH_MAX);
    CHECK(items == scanner.items && items <= limits.items);
    check_generate(&message.data.via.array.ptr[message.data.via.array.size - 1]);
    check_adapters(&message.data.via.array.ptr[message.data.via.array.size - 1]);
    msgpack_unpacked_destroy(&message);
    return 0;
}
