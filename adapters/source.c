// SPDX-License-Identifier: Apache-2.0
// See source.h. Two digests of the same files:
//
//   source   config size and bytes, weights size, then of the header and of each tensor, in order
//            of data, the digest of its pieces. Fast, and made while converting; kept in the store
//            file, to know the same files again.
//   upload   size and bytes of both files in one stream: what a client of any language announces.
#include "adapters/source.h"

#include <stdlib.h>
#include <string.h>

#include "adapters/adapters.h"
#include "base/arith.h"
#include "base/check.h"

enum { CHUNK = 256 << 10 };

_Static_assert(CHUNK % HASH_PIECE == 0, "pieces do not straddle chunks");

#define PICKLE_NAME "adapter_model.bin"

static enum status weights_open(const char *directory, struct reader **out, struct fault *fault)
{
    enum status status = reader_open_in(directory, SOURCE_WEIGHTS, out, fault);
    struct reader *pickle = NULL;
    if (status != STATUS_NOT_FOUND || reader_open_in(directory, PICKLE_NAME, &pickle, NULL))
        return status;
    reader_close(pickle);
    return fault_set(fault, STATUS_UNSUPPORTED,
                     PICKLE_NAME " is a pickle file, which can run code when it is read; save the "
                                 "adapter with safe_serialization=True.");
}

static enum status read_through(struct reader *reader, uint64_t offset, void *out, size_t bytes)
{
    struct source *source = (struct source *)reader;
    enum status status = reader_read(source->file, offset, out, bytes);
    if (!status && source->hashing)
        hash_pieces(&source->stream, out, bytes);
    return status;
}

enum status source__open(const char *directory, struct source *out, struct fault *fault)
{
    *out = (struct source){.hashing = false};
    enum status status = weights_open(directory, &out->file, fault);
    if (status)
        return status;
    out->reader = (struct reader){.read_at = read_through, .size = out->file->size};
    status = safetensors_open(&out->reader, SOURCE_WEIGHTS, &out->container, fault);
    if (status)
        return status;
    size_t tensors = safetensors_count(out->container);
    out->digests = calloc(tensors + 1, sizeof *out->digests);
    out->known = calloc(tensors + 1, sizeof *out->known);
    return out->digests && out->known
               ? STATUS_OK
               : fault_set(fault, STATUS_NO_MEMORY, "out of memory while reading %s.",
                           SOURCE_WEIGHTS);
}

void source__close(struct source *source)
{
    safetensors_close(source->container);
    reader_close(source->file);
    free(source->digests);
    free(source->known);
    *source = (struct source){.hashing = false};
}

void source__tensor_begin(struct source *source)
{
    CHECK(!source->hashing);
    hash_begin(&source->stream, NULL);
    source->hashing = true;
}

void source__tensor_end(struct source *source, const struct tensor *tensor, bool good)
{
    size_t index = (size_t)(tensor - safetensors_at(source->container, 0));
    CHECK(source->hashing);
    source->hashing = false;
    source->digests[index] = hash_end(&source->stream);
    source->known[index] = good;
}

// Bytes [begin, end) of an open file go by, in chunks; pieces: through hash_pieces.
static enum status hash_range(struct reader *reader, uint64_t begin, uint64_t end, bool pieces,
                              struct hash_stream *stream)
{
    uint8_t *chunk = malloc(CHUNK);
    enum status status = chunk ? STATUS_OK : STATUS_NO_MEMORY;
    for (uint64_t at = begin; at < end && !status; at += CHUNK) {
        size_t bytes = min_size((size_t)(end - at), CHUNK);
        status = reader_read(reader, at, chunk, bytes);
        if (pieces)
            hash_pieces(stream, chunk, bytes);
        else
            hash_update(stream, chunk, bytes);
    }
    free(chunk);
    return status;
}

// The digest of what stands in [begin, end) of the weights.
static enum status hash_part(struct source *source, uint64_t begin, uint64_t end,
                             struct digest *out)
{
    struct hash_stream stream;
    hash_begin(&stream, NULL);
    enum status status = hash_range(source->file, begin, end, true, &stream);
    *out = hash_end(&stream);
    return status;
}

static enum status hash_config(const char *directory, struct hash_stream *stream,
                               struct fault *fault)
{
    struct reader *config = NULL;
    enum status status = reader_open_in(directory, SOURCE_CONFIG, &config, fault);
    if (status)
        return status;
    hash_update(stream, &config->size, sizeof config->size);
    status = hash_range(config, 0, config->size, false, stream);
    reader_close(config);
    return status ? fault_set(fault, status, "reading %s failed.", SOURCE_CONFIG) : STATUS_OK;
}

enum status source__digest(struct source *source, const char *directory, struct digest *out,
                           struct fault *fault)
{
    struct hash_stream stream;
    struct digest header;
    size_t tensors = safetensors_count(source->container);
    uint64_t data = tensors ? safetensors_at(source->container, 0)->offset : source->file->size;
    hash_begin(&stream, NULL);
    enum status status = hash_config(directory, &stream, fault);
    if (status)
        return status;
    hash_update(&stream, &source->file->size, sizeof source->file->size);
    status = hash_part(source, 0, data, &header);
    hash_update(&stream, &header, sizeof header);
    for (size_t i = 0; i < tensors && !status; i++) {
        const struct tensor *tensor = safetensors_at(source->container, i);
        if (!source->known[i])
            status = hash_part(source, tensor->offset, tensor->offset + tensor->bytes,
                               &source->digests[i]);
        source->known[i] = !status;
        hash_update(&stream, &source->digests[i], sizeof source->digests[i]);
    }
    *out = hash_end(&stream);
    return status ? fault_set(fault, status, "reading %s failed.", SOURCE_WEIGHTS) : STATUS_OK;
}

enum status adapter_source(const char *directory, struct digest *out, struct fault *fault)
{
    struct source source;
    enum status status = source__open(directory, &source, fault);
    if (!status)
        status = source__digest(&source, directory, out, fault);
    source__close(&source);
    return status;
}

enum status adapter_upload_digest(const char *directory, struct digest *out, struct fault *fault)
{
    struct hash_stream stream;
    struct reader *weights = NULL;
    hash_begin(&stream, NULL);
    enum status status = weights_open(directory, &weights, fault);
    if (!status)
        status = hash_config(directory, &stream, fault);
    if (!status) {
        hash_update(&stream, &weights->size, sizeof weights->size);
        status = hash_range(weights, 0, weights->size, false, &stream);
        if (status)
            status = fault_set(fault, status, "reading %s failed.", SOURCE_WEIGHTS);
    }
    reader_close(weights);
    *out = hash_end(&stream);
    return status;
}
