// SPDX-License-Identifier: Apache-2.0
// Random checkpoints. Owns the named shapes, the list of tensors of the two architectures in the
// order of the file, and the numbers in them.
//
// Numbers: uniform with the standard deviation `sd` of the tensor, four from each 64-bit word of a
// counter-based generator, rounded to bf16. sd = 1 / sqrt(inputs), and smaller by 2 * sqrt(2 *
// layers) for what is added to the residual, so that activations stay near 1 at any depth; norms
// are 1 +- 0.1. Embeddings have 4 / sqrt(hidden): a row's own token then outweighs what attention
// averages over all rows, and routers spread the rows over the experts (with 1 / sqrt(hidden) some
// experts took every row; benchmarks count distinct experts).
#include "runtime/model/synth.h"

#include <errno.h>
#include <math.h>
#include <stdarg.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>

#include "base/arith.h"
#include "base/check.h"
#include "base/reader.h"
#include "base/rng.h"
#include "kernels/tile.h"
#include "runtime/model/model.h"

enum {
    PATH_BYTES = 4096,
    NAME_BYTES = 96,
    CHUNK_ELEMENTS = 1 << 16,
    SHARD_MIB = 1024,
    TOKENIZER_BYTES_MAX = 64 << 20,
};

#define SHAPE_FIELDS(X)                                                                            \
    X(hidden)                                                                                      \
    X(layers)                                                                                      \
    X(heads)                                                                                       \
    X(kv_heads)                                                                                    \
    X(head_dim) X(vocab) X(max_positions) X(intermediate) X(experts) X(top_k) X(moe_intermediate)  \
        X(sparse_step) X(tied) X(rope_theta) X(shard_mib)

struct shape {
    const char *name;
#define X(field) uint32_t field;
    SHAPE_FIELDS(X)
#undef X
};

static const struct shape shapes[] = {
    {"tiny", 64, 2, 4, 2, 16, 512, 2048, 96, 8, 2, 32, 1, 1, 10000, SHARD_MIB},
    // The bundled model's shape.
    {"demo", 256, 8, 4, 2, 64, 8192, 4096, 512, 32, 4, 64, 1, 1, 10000, SHARD_MIB},
    // 1.7 GiB of routed experts: the benchmark model of one small machine. An untied head, since a
    // random tied one answers with the token that was put in.
    {"qwen3-moe-2g", 1024, 12, 16, 4, 64, 32768, 32768, 3072, 64, 8, 384, 1, 0, 1000000, SHARD_MIB},
};

struct entry {
    char name[NAME_BYTES];
    uint64_t rows, cols; // cols 0: a vector
    float sd;            // 0: a norm
    uint32_t shard;
};

struct synth {
    const struct synth_options *options;
    struct shape shape;
    struct entry *entries; // in the order of the files
    size_t count, capacity;
    uint32_t shards;
    uint64_t done, total;
};

static uint64_t entry_elements(const struct entry *entry)
{
    return entry->rows * (entry->cols ? entry->cols : 1);
}

// ---- the shape ----

static enum status apply_override(struct shape *shape, const char *text, struct fault *fault)
{
    static const struct {
        const char *name;
        size_t offset;
    } fields[] = {
#define X(field) {#field, offsetof(struct shape, field)},
        SHAPE_FIELDS(X)
#undef X
    };
    const char *equals = strchr(text, '=');
    size_t length = equals ? (size_t)(equals - text) : 0;
    for (size_t i = 0; equals && i < ARRAY_COUNT(fields); i++) {
        if (strlen(fields[i].name) != length || strncmp(text, fields[i].name, length) != 0)
            continue;
        char *end = NULL;
        errno = 0;
        unsigned long value = strtoul(equals + 1, &end, 10);
        if (errno || end == equals + 1 || *end || equals[1] == '-' || value > INT32_MAX)
            return fault_set(fault, STATUS_INVALID, "\"%.60s\": the value is not a whole number.",
                             text);
        uint32_t number = (uint32_t)value;
        memcpy((char *)shape + fields[i].offset, &number, sizeof number);
        return STATUS_OK;
    }
    return fault_set(fault, STATUS_INVALID, "\"%.60s\" is not a field of a model's shape.", text);
}

static enum status choose_shape(const struct synth_options *options, struct shape *out,
                                struct fault *fault)
{
    const char *name = options->shape ? options->shape : "tiny";
    size_t i = 0;
    while (i < ARRAY_COUNT(shapes) && strcmp(shapes[i].name, name) != 0)
        i++;
    if (i == ARRAY_COUNT(shapes))
        return fault_set(fault, STATUS_INVALID,
                         "there is no shape \"%.40s\"; known are tiny, demo and qwen3-moe-2g.",
                         name);
    *out = shapes[i];
    enum status status = STATUS_OK;
    for (size_t k = 0; !status && k < options->override_count; k++)
        status = apply_override(out, options->overrides[k], fault);
    if (!status && (out->shard_mib < 1 || out->shard_mib > 2047))
        status = fault_set(fault, STATUS_INVALID, "shard_mib must be from 1 to 2047.");
    return status;
}

static int print_config(const struct shape *shape, char *out, size_t bytes)
{
    bool moe = shape->experts > 0;
    char experts[256] = "";
    if (moe)
        (void)snprintf(experts, sizeof experts,
                       "  \"num_experts\": %u,\n  \"num_experts_per_tok\": %u,\n"
                       "  \"moe_intermediate_size\": %u,\n  \"norm_topk_prob\": true,\n"
                       "  \"decoder_sparse_step\": %u,\n  \"mlp_only_layers\": [],\n",
                       shape->experts, shape->top_k, shape->moe_intermediate, shape->sparse_step);
    return snprintf(out, bytes,
                    "{\n  \"architectures\": [\"%s\"],\n  \"model_type\": \"%s\",\n"
                    "  \"hidden_size\": %u,\n  \"num_hidden_layers\": %u,\n"
                    "  \"num_attention_heads\": %u,\n  \"num_key_value_heads\": %u,\n"
                    "  \"head_dim\": %u,\n  \"vocab_size\": %u,\n"
                    "  \"max_position_embeddings\": %u,\n  \"intermediate_size\": %u,\n%s"
                    "  \"tie_word_embeddings\": %s,\n  \"rope_theta\": %u.0,\n"
                    "  \"rms_norm_eps\": 1e-06,\n  \"hidden_act\": \"silu\",\n"
                    "  \"attention_bias\": false,\n  \"torch_dtype\": \"bfloat16\"\n}\n",
                    moe ? "Qwen3MoeForCausalLM" : "Qwen3ForCausalLM", moe ? "qwen3_moe" : "qwen3",
                    shape->hidden, shape->layers, shape->heads, shape->kv_heads, shape->head_dim,
                    shape->vocab, shape->max_positions, shape->intermediate, experts,
                    shape->tied ? "true" : "false", shape->rope_theta);
}

// ---- the tensors ----

static bool add(struct synth *synth, uint64_t rows, uint64_t cols, double sd, const char *format,
                ...) PRINTF_LIKE(5, 6);
static bool add(struct synth *synth, uint64_t rows, uint64_t cols, double sd, const char *format,
                ...)
{
    if (synth->count == synth->capacity) {
        size_t capacity = synth->capacity ? 2 * synth->capacity : 256;
        struct entry *entries = realloc(synth->entries, capacity * sizeof *entries);
        if (!entries)
            return false;
        synth->entries = entries;
        synth->capacity = capacity;
    }
    struct entry *entry = &synth->entries[synth->count++];
    *entry = (struct entry){.rows = rows, .cols = cols, .sd = (float)sd};
    va_list list;
    va_start(list, format);
    (void)vsnprintf(entry->name, sizeof entry->name, format, list);
    va_end(list);
    synth->total += 2 * entry_elements(entry);
    return true;
}

static bool add_mlp(struct synth *synth, uint32_t layer, const char *within, uint32_t units)
{
    uint64_t hidden = synth->shape.hidden;
    double in = 1 / sqrt((double)hidden), out = 0.5 / sqrt(2.0 * synth->shape.layers * units);
    const char *base = "model.layers";
    return add(synth, units, hidden, in, "%s.%u.mlp.%sgate_proj.weight", base, layer, within) &&
           add(synth, units, hidden, in, "%s.%u.mlp.%sup_proj.weight", base, layer, within) &&
           add(synth, hidden, units, out, "%s.%u.mlp.%sdown_proj.weight", base, layer, within);
}

static bool add_layer(struct synth *synth, uint32_t layer, bool moe)
{
    const struct shape *shape = &synth->shape;
    uint64_t hidden = shape->hidden, q = (uint64_t)shape->heads * shape->head_dim;
    uint64_t kv = (uint64_t)shape->kv_heads * shape->head_dim;
    double in = 1 / sqrt((double)hidden), out = 0.5 / sqrt(2.0 * shape->layers * (double)q);
    const char *base = "model.layers";
    bool ok = add(synth, hidden, 0, 0, "%s.%u.input_layernorm.weight", base, layer) &&
              add(synth, q, hidden, in, "%s.%u.self_attn.q_proj.weight", base, layer) &&
              add(synth, kv, hidden, in, "%s.%u.self_attn.k_proj.weight", base, layer) &&
              add(synth, kv, hidden, in, "%s.%u.self_attn.v_proj.weight", base, layer) &&
              add(synth, hidden, q, out, "%s.%u.self_attn.o_proj.weight", base, layer) &&
              add(synth, shape->head_dim, 0, 0, "%s.%u.self_attn.q_norm.weight", base, layer) &&
              add(synth, shape->head_dim, 0, 0, "%s.%u.self_attn.k_norm.weight", base, layer) &&
              add(synth, hidden, 0, 0, "%s.%u.post_attention_layernorm.weight", base, layer);
    if (!moe)
        return ok && add_mlp(synth, layer, "", shape->intermediate);
    ok = ok && add(synth, shape->experts, hidden, in, "%s.%u.mlp.gate.weight", base, layer);
    for (uint32_t e = 0; ok && e < shape->experts; e++) {
        char within[32];
        (void)snprintf(within, sizeof within, "experts.%u.", e);
        ok = add_mlp(synth, layer, within, shape->moe_intermediate);
    }
    return ok;
}

// Lists the tensors and deals them out to shards.
static enum status list_tensors(struct synth *synth, const struct model_config *config,
                                struct fault *fault)
{
    const struct shape *shape = &synth->shape;
    double sd = 4 / sqrt((double)shape->hidden);
    bool ok = add(synth, shape->vocab, shape->hidden, sd, "model.embed_tokens.weight");
    for (uint32_t layer = 0; ok && layer < shape->layers; layer++)
        ok = add_layer(synth, layer, config->is_moe[layer]);
    ok = ok && add(synth, shape->hidden, 0, 0, "model.norm.weight");
    if (!shape->tied)
        ok = ok && add(synth, shape->vocab, shape->hidden, sd, "lm_head.weight");
    if (!ok)
        return fault_set(fault, STATUS_NO_MEMORY, "out of memory for the list of tensors.");
    uint64_t limit = (uint64_t)shape->shard_mib << 20, in_shard = 0;
    for (size_t i = 0; i < synth->count; i++) {
        uint64_t bytes = 2 * entry_elements(&synth->entries[i]);
        if (in_shard && in_shard + bytes > limit) {
            synth->shards++;
            in_shard = 0;
        }
        synth->entries[i].shard = synth->shards;
        in_shard += bytes;
    }
    synth->shards++;
    return STATUS_OK;
}

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
    if (synth->shards == 1)
        (void)snprintf(out, NAME_BYTES, "model.safetensors");
    else
        (void)snprintf(out, NAME_BYTES, "model-%05u-of-%05u.safetensors", shard + 1, synth->shards);
}

static void print_header(const struct synth *synth, uint32_t shard, FILE *out)
{
    uint64_t at = 0;
    (void)fputs("{\"__metadata__\":{\"format\":\"pt\"}", out);
    for (size_t i = 0; i < synth->count; i++) {
        const struct entry *entry = &synth->entries[i];
        if (entry->shard != shard)
            continue;
        uint64_t end = at + 2 * entry_elements(entry);
        (void)fprintf(out, ",\"%s\":{\"dtype\":\"BF16\",\"shape\":[%llu", entry->name,
                      (unsigned long long)entry->rows);
        if (entry->cols)
            (void)fprintf(out, ",%llu", (unsigned long long)entry->cols);
        (void)fprintf(out, "],\"data_offsets\":[%llu,%llu]}", (unsigned long long)at,
                      (unsigned long long)end);
        at = end;
    }
    (void)fputc('}', out);
}

// `count` values; `word` is the generator's counter at the first of them, in words of four values.
static void fill(const struct entry *entry, uint64_t key, uint64_t word, uint16_t *out,
                 size_t count)
{
    // A uniform number on (-1, 1) has the standard deviation 1 / sqrt(3).
    float scale = (entry->sd > 0 ? entry->sd * 1.7320508f : 0.1f) / 32768.0f;
    float centre = entry->sd > 0 ? 0.0f : 1.0f;
    for (size_t i = 0; i < count; word++) {
        uint64_t bits = rng_mix(key + word * 0x9e3779b97f4a7c15u);
        for (int k = 0; k < 4 && i < count; k++, i++, bits >>= 16)
            out[i] = bf16_from_f32(centre + scale * ((float)(bits & 0xffffu) - 32767.5f));
    }
}

static void write_tensor(struct synth *synth, size_t index, uint16_t *chunk, FILE *file)
{
    const struct entry *entry = &synth->entries[index];
    uint64_t elements = entry_elements(entry), key = rng_at(synth->options->seed, 1, index);
    for (uint64_t at = 0; at < elements; at += CHUNK_ELEMENTS) {
        size_t n = min_size((size_t)(elements - at), CHUNK_ELEMENTS);
        fill(entry, key, at / 4, chunk, n);
        (void)fwrite(chunk, 2, n, file);
        synth->done += 2 * n;
        if (synth->options->progress)
            synth->options->progress(synth->options->progress_context, synth->done, synth->total);
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
    print_header(synth, shard, text);
    shard_name(synth, shard, name);
    enum status status = close_file(text, "a header", fault);
    if (!status)
        status = open_file(synth->options->directory, name, &file, fault);
    if (!status) {
        uint64_t padded = round_up(header_bytes, 8); // little-endian hosts only, as everything here
        (void)fwrite(&padded, sizeof padded, 1, file);
        (void)fwrite(header, 1, header_bytes, file);
        (void)fprintf(file, "%*s", (int)(padded - header_bytes), "");
        for (size_t i = 0; i < synth->count && !ferror(file); i++)
            if (synth->entries[i].shard == shard)
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
                  (unsigned long long)synth->total);
    for (size_t i = 0; i < synth->count; i++) {
        char shard[NAME_BYTES];
        shard_name(synth, synth->entries[i].shard, shard);
        (void)fprintf(file, "%s\n    \"%s\": \"%s\"", i ? "," : "", synth->entries[i].name, shard);
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
    for (uint32_t shard = 0; !status && shard < synth->shards; shard++)
        status = write_shard(synth, shard, chunk, fault);
    free(chunk);
    if (!status && synth->shards > 1)
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
    char text[2048];
    enum status status = choose_shape(options, &synth.shape, fault);
    if (status)
        return status;
    // The one judge of shapes is the loader's own parser.
    int length = print_config(&synth.shape, text, sizeof text);
    CHECK(length > 0 && (size_t)length < sizeof text);
    status = model_config_parse(text, (size_t)length, &config, fault);
    if (!status)
        status = list_tensors(&synth, &config, fault);
    if (!status)
        status = write_all(&synth, text, fault);
    model_config_clear(&config);
    free(synth.entries);
    return status;
}
