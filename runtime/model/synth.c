// SPDX-License-Identifier: Apache-2.0
// Random checkpoints on disk: shards, index, config.json last. What they hold is synth_list.c's.
#include "runtime/model/synth.h"

#include <errno.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>

#include "base/arith.h"
#include "base/check.h"
#include "base/reader.h"
#include "base/rng.h"
#include "runtime/model/synth_list.h"

enum {
    PATH_BYTES = 4096,
    NAME_BYTES = SYNTH_NAME_BYTES,
    CHUNK_ELEMENTS = 1 << 16,
    TOKENIZER_BYTES_MAX = 64 << 20,
};

struct synth {
    struct synth_list list;
    const struct synth_options *options;
    uint64_t done;
};

// ---- files ----

static enum status open_file(const char *directory, const char *name, FILE **out,
                             struct fault *fault)
{
    char path[PATH_BYTES];
    if (snprintf(path, sizeof path, "%s/%s", directory, name) >= PATH_BYTES)
        return fault_set(fault, STATUS_INVALID, "the path of the directory is too long.");
    *out = fopen(path, "wbx");
    if (*out)
        return STATUS_OK;
    return errno == EEXIST
               ? fault_set(fault, STATUS_EXISTS, "%.200s exists; give an empty directory.", path)
               : fault_set(fault, STATUS_IO, "cannot write %.200s: %s.", path, strerror(errno));
}

static enum status close_file(FILE *file, const char *name, struct fault *fault)
{
    bool failed = ferror(file);
    failed = fclose(file) != 0 || failed;
    return failed ? fault_set(fault, STATUS_IO, "writing %s failed: %s.", name, strerror(errno))
                  : STATUS_OK;
}

static void shard_name(const struct synth *synth, uint32_t shard, char out[NAME_BYTES])
{
    if (synth->list.shards == 1)
        (void)snprintf(out, NAME_BYTES, "model.safetensors");
    else
        (void)snprintf(out, NAME_BYTES, "model-%05u-of-%05u.safetensors", shard + 1,
                       synth->list.shards);
}

static void write_tensor(struct synth *synth, size_t index, uint16_t *chunk, FILE *file)
{
    const struct synth_entry *entry = &synth->list.entries[index];
    uint64_t elements = synth__elements(entry), key = rng_at(synth->options->seed, 1, index);
    for (uint64_t at = 0; at < elements; at += CHUNK_ELEMENTS) {
        size_t n = min_size((size_t)(elements - at), CHUNK_ELEMENTS);
        synth__fill(entry->sd, key, at / 4, chunk, n);
        (void)fwrite(chunk, 2, n, file);
        synth->done += 2 * n;
        if (synth->options->progress)
            synth->options->progress(synth->options->progress_context, synth->done,
                                     synth->list.total);
    }
}

static enum status write_shard(struct synth *synth, uint32_t shard, uint16_t *chunk,
                               struct fault *fault)
{
    char name[NAME_BYTES], *header = NULL;
    size_t header_bytes = 0;
    FILE *file = NULL, *text = open_memstream(&header, &header_bytes);
    if (!text)
        return fault_set(fault, STATUS_NO_MEMORY, "out of memory for a safetensors header.");
    synth__print_header(&synth->list, shard, text);
    shard_name(synth, shard, name);
    enum status status = close_file(text, "a header", fault);
    if (!status)
        status = open_file(synth->options->directory, name, &file, fault);
    if (!status) {
        uint64_t padded = round_up(header_bytes, 8); // little-endian hosts only, as everything here
        (void)fwrite(&padded, sizeof padded, 1, file);
        (void)fwrite(header, 1, header_bytes, file);
        (void)fprintf(file, "%*s", (int)(padded - header_bytes), "");
        for (size_t i = 0; i < synth->list.count && !ferror(file); i++)
            if (synth->list.entries[i].shard == shard)
                write_tensor(synth, i, chunk, file);
        status = close_file(file, name, fault);
    }
    free(header);
    return status;
}

static enum status write_index(const struct synth *synth, struct fault *fault)
{
    static const char index_name[] = "model.safetensors.index.json";
    FILE *file = NULL;
    enum status status = open_file(synth->options->directory, index_name, &file, fault);
    if (status)
        return status;
    (void)fprintf(file, "{\n  \"metadata\": {\"total_size\": %llu},\n  \"weight_map\": {",
                  (unsigned long long)synth->list.total);
    for (size_t i = 0; i < synth->list.count; i++) {
        char shard[NAME_BYTES];
        shard_name(synth, synth->list.entries[i].shard, shard);
        (void)fprintf(file, "%s\n    \"%s\": \"%s\"", i ? "," : "", synth->list.entries[i].name,
                      shard);
    }
    (void)fputs("\n  }\n}\n", file);
    return close_file(file, index_name, fault);
}

static enum status copy_tokenizer(const struct synth_options *options, struct fault *fault)
{
    static const char name[] = "tokenizer.json";
    char *text = NULL;
    size_t bytes = 0;
    FILE *file = NULL;
    enum status status = reader_slurp_in(options->tokenizer_directory, name, TOKENIZER_BYTES_MAX,
                                         &text, &bytes, fault);
    if (!status)
        status = open_file(options->directory, name, &file, fault);
    if (!status) {
        (void)fwrite(text, 1, bytes, file);
        status = close_file(file, name, fault);
    }
    free(text);
    return status;
}

static enum status check_directory(const char *directory, struct fault *fault)
{
    static const char *const taken[] = {"config.json", "model.safetensors",
                                        "model.safetensors.index.json"};
    if (mkdir(directory, 0777) != 0 && errno != EEXIST)
        return fault_set(fault, STATUS_IO, "cannot create %.200s: %s.", directory, strerror(errno));
    for (size_t i = 0; i < ARRAY_COUNT(taken); i++) {
        struct reader *reader = NULL;
        enum status status = reader_open_in(directory, taken[i], &reader, fault);
        reader_close(reader);
        if (status != STATUS_NOT_FOUND)
            return status ? status
                          : fault_set(fault, STATUS_EXISTS,
                                      "%.200s holds a %s already; give an empty directory.",
                                      directory, taken[i]);
    }
    return STATUS_OK;
}

static enum status write_all(struct synth *synth, const char *config_text, struct fault *fault)
{
    const struct synth_options *options = synth->options;
    uint16_t *chunk = malloc(CHUNK_ELEMENTS * sizeof *chunk);
    if (!chunk)
        return fault_set(fault, STATUS_NO_MEMORY, "out of memory for a chunk of weights.");
    enum status status = check_directory(options->directory, fault);
    for (uint32_t shard = 0; !status && shard < synth->list.shards; shard++)
        status = write_shard(synth, shard, chunk, fault);
    free(chunk);
    if (!status && synth->list.shards > 1)
        status = write_index(synth, fault);
    if (!status && options->tokenizer_directory)
        status = copy_tokenizer(options, fault);
    FILE *file = NULL;
    if (!status)
        status = open_file(options->directory, "config.json", &file, fault);
    if (status)
        return status;
    (void)fputs(config_text, file);
    return close_file(file, "config.json", fault);
}

enum status synth_write(const struct synth_options *options, struct fault *fault)
{
    struct synth synth = {.options = options};
    struct model_config config = {0};
    char text[SYNTH_CONFIG_BYTES];
    enum status status = synth__shape(options->shape, options->overrides, options->override_count,
                                      &synth.list.shape, fault);
    if (status)
        return status;
    status = synth__config(&synth.list.shape, text, &config, fault);
    if (!status)
        status = synth__list(&synth.list, &config, true, fault);
    if (!status)
        status = write_all(&synth, text, fault);
    model_config_clear(&config);
    free(synth.list.entries);
    return status;
}
