// SPDX-License-Identifier: Apache-2.0
// The shards of a checkpoint. Owns the open files and the sorted list of their tensors; it does not
// know what a model is made of (weights.c).
//
// Invariants after checkpoint_open: 1. weights[] is sorted by name and names are unique over all
// shards.
// 2. with an index: a tensor is in the shard that the index names, and the index names nothing
// else.
#include "runtime/model/checkpoint.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "base/arith.h"
#include "base/check.h"
#include "runtime/model/fields.h"

// The largest published index (over 90,000 tensors) has 10 MB; one file descriptor per shard.
enum { INDEX_BYTES_MAX = 64 << 20, SHARDS_MAX = 512 };

static const char SINGLE_NAME[] = "model.safetensors";
static const char INDEX_NAME[] = "model.safetensors.index.json";

struct shard {
    char *name;
    struct reader *reader;
    struct safetensors *file;
};

struct checkpoint {
    struct shard shards[SHARDS_MAX];
    uint32_t shard_count;
    struct weight *weights; // sorted by name
    size_t count;
    uint64_t bytes;
};

static int compare_weight(const void *a, const void *b)
{
    const struct weight *x = a, *y = b;
    return strcmp(x->tensor->name, y->tensor->name);
}

static struct weight *find(const struct checkpoint *checkpoint, const char *name)
{
    const struct tensor tensor = {.name = name};
    const struct weight key = {.tensor = &tensor};
    return bsearch(&key, checkpoint->weights, checkpoint->count, sizeof key, compare_weight);
}

static enum status open_shard(struct checkpoint *checkpoint, const char *directory,
                              const char *name, struct fault *fault)
{
    for (uint32_t i = 0; i < checkpoint->shard_count; i++)
        if (!strcmp(checkpoint->shards[i].name, name))
            return STATUS_OK;
    if (checkpoint->shard_count == SHARDS_MAX)
        return fault_set(fault, STATUS_LIMIT, "the checkpoint has more than %d files.", SHARDS_MAX);
    struct shard *shard = &checkpoint->shards[checkpoint->shard_count];
    shard->name = strdup(name);
    if (!shard->name)
        return fault_set(fault, STATUS_NO_MEMORY, "out of memory while opening the checkpoint.");
    checkpoint->shard_count++; // from here on checkpoint_close cleans it up
    enum status status = reader_open_in(directory, name, &shard->reader, fault);
    if (status)
        return status;
    return safetensors_open(shard->reader, name, &shard->file, fault);
}

// ---- the index file ----

static enum status index_fault(const char *what, struct fault *fault)
{
    return fault_set(fault, STATUS_CORRUPT, "%s: %s.", INDEX_NAME, what);
}

static enum status open_indexed(struct checkpoint *checkpoint, const char *directory,
                                const struct json *map, struct fault *fault)
{
    if (json_kind_of(map) != JSON_KIND_OBJECT || json_count(map) == 0)
        return index_fault("there is no \"weight_map\" with tensors in it", fault);
    for (struct json_pair pair = {0}; json_next(map, &pair);) {
        const char *file = NULL;
        if (!json_as_string(pair.value, &file))
            return index_fault("a value of \"weight_map\" is not a file name", fault);
        enum status status = open_shard(checkpoint, directory, file, fault);
        if (status)
            return status;
    }
    return STATUS_OK;
}

// Invariant 2.
static enum status check_index(const struct checkpoint *checkpoint, const struct json *map,
                               struct fault *fault)
{
    size_t seen = 0;
    for (uint32_t i = 0; i < checkpoint->shard_count; i++) {
        const struct shard *shard = &checkpoint->shards[i];
        for (size_t t = 0; t < safetensors_count(shard->file); t++, seen++) {
            const char *name = safetensors_at(shard->file, t)->name;
            const char *listed = NULL;
            if (!json_as_string(json_find(map, name), &listed) || strcmp(listed, shard->name))
                return fault_set(
                    fault, STATUS_CORRUPT,
                    "%s holds tensor \"%.100s\", which the index does not place there.",
                    shard->name, name);
        }
    }
    if (seen == json_count(map))
        return STATUS_OK;
    for (struct json_pair pair = {0}; json_next(map, &pair);) {
        const char *file = NULL;
        for (uint32_t i = 0; i < checkpoint->shard_count; i++)
            if (json_as_string(pair.value, &file) && !strcmp(checkpoint->shards[i].name, file) &&
                !safetensors_find(checkpoint->shards[i].file, pair.key))
                return fault_set(fault, STATUS_CORRUPT,
                                 "the index places tensor \"%.100s\" in %.100s, where it is not.",
                                 pair.key, file);
    }
    return index_fault("it does not fit the files", fault);
}

static enum status open_shards(struct checkpoint *checkpoint, const char *directory,
                               struct fault *fault)
{
    char *text = NULL;
    size_t bytes = 0;
    enum status status =
        reader_slurp_in(directory, INDEX_NAME, INDEX_BYTES_MAX, &text, &bytes, fault);
    if (status == STATUS_NOT_FOUND) {
        status = open_shard(checkpoint, directory, SINGLE_NAME, fault);
        return status == STATUS_NOT_FOUND ? fault_set(fault, status, "%s has neither %s nor %s.",
                                                      directory, SINGLE_NAME, INDEX_NAME)
                                          : status;
    }
    if (status)
        return status;
    struct json *index = NULL;
    status = fields_parse(INDEX_NAME, text, bytes, &index, fault);
    free(text);
    if (status)
        return status;
    const struct json *map = json_find(index, "weight_map");
    status = open_indexed(checkpoint, directory, map, fault);
    if (!status)
        status = check_index(checkpoint, map, fault);
    json_free(index);
    return status;
}

// ---- life ----

// Invariant 1.
static enum status sort_weights(struct checkpoint *checkpoint, struct fault *fault)
{
    size_t count = 0;
    for (uint32_t i = 0; i < checkpoint->shard_count; i++)
        count += safetensors_count(checkpoint->shards[i].file);
    checkpoint->weights = calloc(count + 1, sizeof *checkpoint->weights);
    if (!checkpoint->weights)
        return fault_set(fault, STATUS_NO_MEMORY, "out of memory while opening the checkpoint.");
    for (uint32_t i = 0; i < checkpoint->shard_count; i++) {
        const struct safetensors *file = checkpoint->shards[i].file;
        for (size_t t = 0; t < safetensors_count(file); t++) {
            const struct tensor *tensor = safetensors_at(file, t);
            checkpoint->weights[checkpoint->count++] = (struct weight){file, tensor, false};
            checkpoint->bytes += tensor->bytes;
        }
    }
    qsort(checkpoint->weights, count, sizeof *checkpoint->weights, compare_weight);
    for (size_t i = 1; i < count; i++)
        if (!compare_weight(&checkpoint->weights[i - 1], &checkpoint->weights[i]))
            return fault_set(fault, STATUS_CORRUPT, "tensor \"%.100s\" is in two files.",
                             checkpoint->weights[i].tensor->name);
    return STATUS_OK;
}

enum status checkpoint_open(const char *directory, struct checkpoint **out, struct fault *fault)
{
    struct checkpoint *checkpoint = calloc(1, sizeof *checkpoint);
    if (!checkpoint)
        return fault_set(fault, STATUS_NO_MEMORY, "out of memory while opening the checkpoint.");
    enum status status = open_shards(checkpoint, directory, fault);
    if (!status)
        status = sort_weights(checkpoint, fault);
    if (status) {
        checkpoint_close(checkpoint);
        return status;
    }
    *out = checkpoint;
    return STATUS_OK;
}

enum status checkpoint_open_reader(struct reader *reader, struct checkpoint **out,
                                   struct fault *fault)
{
    struct checkpoint *checkpoint = calloc(1, sizeof *checkpoint);
    char *name = strdup(SINGLE_NAME);
    if (!checkpoint || !name) {
        free(checkpoint);
        free(name);
        reader_close(reader);
        return fault_set(fault, STATUS_NO_MEMORY, "out of memory while opening the checkpoint.");
    }
    struct shard *shard = &checkpoint->shards[checkpoint->shard_count++];
    *shard = (struct shard){.name = name, .reader = reader};
    enum status status = safetensors_open(reader, name, &shard->file, fault);
    if (!status)
        status = sort_weights(checkpoint, fault);
    if (status) {
        checkpoint_close(checkpoint);
        return status;
    }
    *out = checkpoint;
    return STATUS_OK;
}

void checkpoint_close(struct checkpoint *checkpoint)
{
    if (!checkpoint)
        return;
    for (uint32_t i = 0; i < checkpoint->shard_count; i++) {
        safetensors_close(checkpoint->shards[i].file);
        reader_close(checkpoint->shards[i].reader);
        free(checkpoint->shards[i].name);
    }
    free(checkpoint->weights);
    free(checkpoint);
}

uint64_t checkpoint_bytes(const struct checkpoint *checkpoint)
{
    return checkpoint->bytes;
}

// ---- tensors ----

bool checkpoint_has(const struct checkpoint *checkpoint, const char *name)
{
    return find(checkpoint, name) != NULL;
}

const struct tensor *checkpoint_look(const struct checkpoint *checkpoint, const char *name)
{
    const struct weight *weight = find(checkpoint, name);
    return weight ? weight->tensor : NULL;
}

static void print_shape(const uint64_t *shape, uint32_t dims, char *out, size_t bytes)
{
    size_t at = (size_t)snprintf(out, bytes, "[");
    for (uint32_t i = 0; i < dims && at < bytes; i++)
        at += (size_t)snprintf(out + at, bytes - at, "%s%llu", i ? ", " : "",
                               (unsigned long long)shape[i]);
    if (at < bytes)
        (void)snprintf(out + at, bytes - at, "]");
}

enum status checkpoint_claim(struct checkpoint *checkpoint, const char *name, const uint64_t *shape,
                             uint32_t dims, const struct weight **out, struct fault *fault)
{
    struct weight *weight = find(checkpoint, name);
    if (!weight)
        return fault_set(fault, STATUS_CORRUPT, "the checkpoint has no tensor \"%s\".", name);
    const struct tensor *tensor = weight->tensor;
    if (tensor->dims != dims || memcmp(tensor->shape, shape, dims * sizeof *shape) != 0) {
        char has[80], needs[80];
        print_shape(tensor->shape, tensor->dims, has, sizeof has);
        print_shape(shape, dims, needs, sizeof needs);
        return fault_set(fault, STATUS_CORRUPT,
                         "tensor \"%s\" has the shape %s; config.json asks for %s.", name, has,
                         needs);
    }
    if (tensor->type != TENSOR_F32 && tensor->type != TENSOR_F16 && tensor->type != TENSOR_BF16)
        return fault_set(fault, STATUS_UNSUPPORTED,
                         "tensor \"%s\" has dtype %s; weights are read from F32, F16 and BF16 "
                         "(quantised checkpoints are not supported).",
                         name, tensor_type_name(tensor->type));
    weight->claimed = true;
    *out = weight;
    return STATUS_OK;
}

// Buffers that old transformers versions saved; they follow from config.json.
static bool is_ignored(const char *name, bool tied)
{
    static const char suffix[] = ".rotary_emb.inv_freq";
    size_t length = strlen(name), tail = sizeof suffix - 1;
    return (length >= tail && !strcmp(name + length - tail, suffix)) ||
           (tied && !strcmp(name, "lm_head.weight"));
}

enum status checkpoint_finish(const struct checkpoint *checkpoint, bool tied, struct fault *fault)
{
    const char *first = NULL;
    size_t extra = 0;
    for (size_t i = 0; i < checkpoint->count; i++) {
        const struct weight *weight = &checkpoint->weights[i];
        if (weight->claimed || is_ignored(weight->tensor->name, tied))
            continue;
        first = first ? first : weight->tensor->name;
        extra++;
    }
    if (!extra)
        return STATUS_OK;
    return fault_set(fault, STATUS_UNSUPPORTED,
                     "the checkpoint holds %zu tensor%s that config.json does not explain, the "
                     "first being \"%.100s\"; serving without it would give other answers.",
                     extra, extra == 1 ? "" : "s", first);
}

enum status weight_read(const struct weight *weight, enum dtype dtype, uint64_t first, void *out,
                        size_t count, struct fault *fault)
{
    return dtype == DTYPE_F32
               ? safetensors_read_f32(weight->file, weight->tensor, first, out, count, fault)
               : safetensors_read_bf16(weight->file, weight->tensor, first, out, count, fault);
}

// Every tensor has a digest of its own, so that they can be computed in any order.
enum status checkpoint_hash(const struct checkpoint *checkpoint, struct hash_stream *stream,
                            struct checkpoint_digest *wanted, uint32_t wanted_count,
                            void (*progress)(void *context, uint64_t bytes), void *context,
                            struct fault *fault)
{
    enum status status = STATUS_OK;
    for (size_t i = 0; !status && i < checkpoint->count; i++) {
        const struct weight *weight = &checkpoint->weights[i];
        const struct tensor *tensor = weight->tensor;
        struct digest digest;
        status = safetensors_digest(weight->file, tensor, tensor->name, tensor->type, progress,
                                    context, &digest, fault);
        if (!status)
            hash_update(stream, digest.bytes, sizeof digest.bytes);
        for (uint32_t w = 0; !status && w < wanted_count; w++)
            if (strcmp(wanted[w].name, tensor->name) == 0)
                wanted[w].digest = digest;
    }
    return status;
}
