// SPDX-License-Identifier: Apache-2.0
// polder adapter add --upload: sends the two files of an adapter to a server that cannot read them.
#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "base/arith.h"
#include "base/check.h"
#include "base/reader.h"
#include "runtime/cli/adapter_upload.h"

enum { CONFIG, WEIGHTS, FILES };

static const char *const NAMES[FILES] = {"adapter_config.json", "adapter_model.safetensors"};

struct sender {
    struct polder_client *client;
    struct reader *files[FILES];
    uint64_t id, received;
    size_t chunk_bytes;
    msgpack_sbuffer params;
    msgpack_packer packer;
};

// The parameters of the next call: a map of `pairs` pairs, to be packed.
static void begin(struct sender *s, uint32_t pairs)
{
    msgpack_sbuffer_clear(&s->params);
    msgpack_packer_init(&s->packer, &s->params, msgpack_sbuffer_write);
    (void)msgpack_pack_map(&s->packer, pairs);
}

static void put_text(struct sender *s, const char *text)
{
    (void)msgpack_pack_str(&s->packer, strlen(text));
    (void)msgpack_pack_str_body(&s->packer, text, strlen(text));
}

static void put_number(struct sender *s, const char *key, uint64_t value)
{
    put_text(s, key);
    (void)msgpack_pack_uint64(&s->packer, value);
}

static uint64_t number_of(const msgpack_object *map, const char *key)
{
    const msgpack_object *value = polder_get(map, key);
    return value && value->type == MSGPACK_OBJECT_POSITIVE_INTEGER ? value->via.u64 : 0;
}

static int local_fault(struct polder_error *error, const struct fault *fault)
{
    *error = (struct polder_error){.type = 1};
    (void)snprintf(error->code, sizeof error->code, "%s", status_code(fault->status));
    (void)snprintf(error->message, sizeof error->message, "%s", fault->text);
    return -1;
}

static int announce(struct sender *s, const char *name, const struct digest *digest,
                    struct polder_error *error)
{
    const msgpack_object *result;
    char hex[2 * DIGEST_BYTES + 1];
    digest_hex(digest, hex);
    begin(s, 4);
    put_text(s, "name");
    put_text(s, name);
    put_number(s, "config_bytes", s->files[CONFIG]->size);
    put_number(s, "weights_bytes", s->files[WEIGHTS]->size);
    put_text(s, "digest");
    put_text(s, hex);
    if (polder_call(s->client, "adapters.upload", &s->params, NULL, NULL, &result, error))
        return -1;
    s->id = number_of(result, "upload");
    s->chunk_bytes = (size_t)number_of(result, "chunk_bytes_max");
    return 0;
}

static int send_chunk(struct sender *s, const void *data, size_t bytes, struct polder_error *error)
{
    const msgpack_object *result;
    begin(s, 3);
    put_number(s, "upload", s->id);
    put_number(s, "offset", s->received);
    put_text(s, "data");
    (void)msgpack_pack_bin(&s->packer, bytes);
    (void)msgpack_pack_bin_body(&s->packer, data, bytes);
    if (polder_call(s->client, "adapters.upload_chunk", &s->params, NULL, NULL, &result, error))
        return -1;
    s->received += bytes;
    return 0;
}

static int send_files(struct sender *s, struct polder_error *error)
{
    struct fault fault;
    size_t room = min_size(s->chunk_bytes ? s->chunk_bytes : 1, (size_t)4 << 20);
    uint8_t *data = malloc(room);
    int failed = 0;
    if (!data) {
        (void)fault_set(&fault, STATUS_NO_MEMORY, "out of memory.");
        return local_fault(error, &fault);
    }
    for (int i = 0; i < FILES && !failed; i++) {
        uint64_t size = s->files[i]->size;
        for (uint64_t at = 0; at < size && !failed;) {
            size_t bytes = min_size((size_t)(size - at), room);
            enum status status = reader_read(s->files[i], at, data, bytes);
            if (status) {
                (void)fault_set(&fault, status, "reading %s failed.", NAMES[i]);
                failed = local_fault(error, &fault);
            } else {
                failed = send_chunk(s, data, bytes, error);
            }
            at += bytes;
        }
    }
    free(data);
    return failed;
}

// An upload that failed half way must not hold up the next one on this connection.
static void give_up(struct sender *s)
{
    const msgpack_object *result;
    struct polder_error ignored;
    begin(s, 1);
    put_number(s, "upload", s->id);
    (void)polder_call(s->client, "adapters.upload_abort", &s->params, NULL, NULL, &result,
                      &ignored);
}

int adapter_upload(struct polder_client *client, const char *name, const char *directory,
                   uint64_t *upload, struct polder_error *error)
{
    struct fault fault = {.text = ""};
    struct sender s = {.client = client};
    struct digest digest;
    int failed = -1;
    msgpack_sbuffer_init(&s.params);
    enum status status = adapter_upload_digest(directory, &digest, &fault);
    for (int i = 0; i < FILES && !status; i++)
        status = reader_open_in(directory, NAMES[i], &s.files[i], &fault);
    if (status) {
        failed = local_fault(error, &fault);
    } else if (!announce(&s, name, &digest, error)) {
        failed = send_files(&s, error);
        if (failed && error->type != -1)
            give_up(&s);
    }
    *upload = s.id;
    reader_close(s.files[CONFIG]);
    reader_close(s.files[WEIGHTS]);
    msgpack_sbuffer_destroy(&s.params);
    return failed;
}
