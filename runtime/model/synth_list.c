// SPDX-License-Identifier: Apache-2.0
// Random models: what they are made of. Owns the named shapes, the list of tensors of the two
// architectures in the order of the file, and the numbers in them.
//
// Numbers: uniform with the standard deviation `sd` of the tensor, four from each 64-bit word of a
// counter-based generator, rounded to bf16. sd = 1 / sqrt(inputs), and smaller by 2 * sqrt(2 *
// layers) for what is added to the residual, so that activations stay near 1 at any depth; norms
// are 1 +- 0.1. Embeddings have 4 / sqrt(hidden): a row's own token then outweighs what attention
// averages over all rows, and routers spread the rows over the experts (with 1 / sqrt(hidden) some
// experts took every row; benchmarks count distinct experts).
#include "runtime/model/synth_list.h"

#include <errno.h>
#include <math.h>
#include <stdarg.h>
#include <stdlib.h>
#include <string.h>

#include "base/arith.h"
#include "base/check.h"
#include "base/rng.h"
#include "kernels/tile.h"

enum { SHARD_MIB = 1024 };

static const struct synth_shape shapes[] = {
    {"tiny", 64, 2, 4, 2, 16, 512, 2048, 96, 8, 2, 32, 1, 1, 10000, SHARD_MIB},
    // The bundled model's shape.
    {"demo", 256, 8, 4, 2, 64, 8192, 4096, 512, 32, 4, 64, 1, 1, 10000, SHARD_MIB},
    // 1.7 GiB of routed experts: the benchmark model of one small machine. An untied head, since a
    // random tied one answers with the token that was put in.
    {"qwen3-moe-2g", 1024, 12, 16, 4, 64, 32768, 32768, 3072, 64, 8, 384, 1, 0, 1000000, SHARD_MIB},
    // Shapes of published models. Where the architecture is another one, the Qwen3 form of the
    // shape stands in (its norms of q and k, renormalised weights of the chosen experts).
    {"olmoe-1b-7b", 2048, 16, 16, 16, 128, 50304, 4096, 1024, 64, 8, 1024, 1, 0, 10000, SHARD_MIB},
    {"qwen3-30b-a3b", 2048, 48, 32, 4, 128, 151936, 40960, 6144, 128, 8, 768, 1, 0, 1000000,
     SHARD_MIB},
    {"llama-3-8b", 4096, 32, 32, 8, 128, 128256, 8192, 14336, 0, 0, 0, 1, 0, 500000, SHARD_MIB},
    {"mixtral-8x7b", 4096, 32, 32, 8, 128, 32000, 32768, 14336, 8, 2, 14336, 1, 0, 1000000,
     SHARD_MIB},
};

uint64_t synth__elements(const struct synth_entry *entry)
{
    return entry->rows * (entry->cols ? entry->cols : 1);
}

// ---- the shape ----

static enum status apply_override(struct synth_shape *shape, const char *text, struct fault *fault)
{
    static const struct {
        const char *name;
        size_t offset;
    } fields[] = {
#define X(field) {#field, offsetof(struct synth_shape, field)},
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

enum status synth__shape(const char *name, const char *const *overrides, size_t count,
                         struct synth_shape *out, struct fault *fault)
{
    name = name ? name : "tiny";
    size_t i = 0;
    while (i < ARRAY_COUNT(shapes) && strcmp(shapes[i].name, name) != 0)
        i++;
    if (i == ARRAY_COUNT(shapes))
        return fault_set(fault, STATUS_INVALID,
                         "there is no shape \"%.40s\"; known are tiny, demo, qwen3-moe-2g, "
                         "olmoe-1b-7b, qwen3-30b-a3b, llama-3-8b and mixtral-8x7b.",
                         name);
    *out = shapes[i];
    enum status status = STATUS_OK;
    for (size_t k = 0; !status && k < count; k++)
        status = apply_override(out, overrides[k], fault);
    if (!status && (out->shard_mib < 1 || out->shard_mib > 2047))
        status = fault_set(fault, STATUS_INVALID, "shard_mib must be from 1 to 2047.");
    return status;
}

static int print_config(const struct synth_shape *shape, char *out, size_t bytes)
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

enum status synth__config(const struct synth_shape *shape, char out[SYNTH_CONFIG_BYTES],
                          struct model_config *config, struct fault *fault)
{
    int length = print_config(shape, out, SYNTH_CONFIG_BYTES);
    CHECK(length > 0 && length < SYNTH_CONFIG_BYTES);
    return model_config_parse(out, (size_t)length, config, fault);
}

// ---- the tensors ----

double synth__sd_in(const struct synth_shape *shape)
{
    return 1 / sqrt((double)shape->hidden);
}

double synth__sd_out(const struct synth_shape *shape, uint64_t inputs)
{
    return 0.5 / sqrt(2.0 * shape->layers * (double)inputs);
}

static bool add(struct synth_list *list, uint64_t rows, uint64_t cols, double sd,
                const char *format, ...) PRINTF_LIKE(5, 6);
static bool add(struct synth_list *list, uint64_t rows, uint64_t cols, double sd,
                const char *format, ...)
{
    if (list->count == list->capacity) {
        size_t capacity = list->capacity ? 2 * list->capacity : 256;
        struct synth_entry *entries = realloc(list->entries, capacity * sizeof *entries);
        if (!entries)
            return false;
        list->entries = entries;
        list->capacity = capacity;
    }
    struct synth_entry *entry = &list->entries[list->count++];
    *entry = (struct synth_entry){.rows = rows, .cols = cols, .sd = (float)sd};
    va_list values;
    va_start(values, format);
    (void)vsnprintf(entry->name, sizeof entry->name, format, values);
    va_end(values);
    list->total += 2 * synth__elements(entry);
    return true;
}

static bool add_mlp(struct synth_list *list, uint32_t layer, const char *within, uint32_t units)
{
    uint64_t hidden = list->shape.hidden;
    double in = synth__sd_in(&list->shape), out = synth__sd_out(&list->shape, units);
    const char *base = "model.layers";
    return add(list, units, hidden, in, "%s.%u.mlp.%sgate_proj.weight", base, layer, within) &&
           add(list, units, hidden, in, "%s.%u.mlp.%sup_proj.weight", base, layer, within) &&
           add(list, hidden, units, out, "%s.%u.mlp.%sdown_proj.weight", base, layer, within);
}

static bool add_layer(struct synth_list *list, uint32_t layer, bool moe, bool experts)
{
    const struct synth_shape *shape = &list->shape;
    uint64_t hidden = shape->hidden, q = (uint64_t)shape->heads * shape->head_dim;
    uint64_t kv = (uint64_t)shape->kv_heads * shape->head_dim;
    double in = synth__sd_in(shape), out = synth__sd_out(shape, q);
    const char *base = "model.layers";
    bool ok = add(list, hidden, 0, 0, "%s.%u.input_layernorm.weight", base, layer) &&
              add(list, q, hidden, in, "%s.%u.self_attn.q_proj.weight", base, layer) &&
              add(list, kv, hidden, in, "%s.%u.self_attn.k_proj.weight", base, layer) &&
              add(list, kv, hidden, in, "%s.%u.self_attn.v_proj.weight", base, layer) &&
              add(list, hidden, q, out, "%s.%u.self_attn.o_proj.weight", base, layer) &&
              add(list, shape->head_dim, 0, 0, "%s.%u.self_attn.q_norm.weight", base, layer) &&
              add(list, shape->head_dim, 0, 0, "%s.%u.self_attn.k_norm.weight", base, layer) &&
              add(list, hidden, 0, 0, "%s.%u.post_attention_layernorm.weight", base, layer);
    if (!moe)
        return ok && add_mlp(list, layer, "", shape->intermediate);
    ok = ok && add(list, shape->experts, hidden, in, "%s.%u.mlp.gate.weight", base, layer);
    for (uint32_t e = 0; ok && experts && e < shape->experts; e++) {
        char within[32];
        (void)snprintf(within, sizeof within, "experts.%u.", e);
        ok = add_mlp(list, layer, within, shape->moe_intermediate);
    }
    return ok;
}

enum status synth__list(struct synth_list *list, const struct model_config *config, bool experts,
                        struct fault *fault)
{
    const struct synth_shape *shape = &list->shape;
    double sd = 4 / sqrt((double)shape->hidden);
    bool ok = add(list, shape->vocab, shape->hidden, sd, "model.embed_tokens.weight");
    for (uint32_t layer = 0; ok && layer < shape->layers; layer++)
        ok = add_layer(list, layer, config->is_moe[layer], experts);
    ok = ok && add(list, shape->hidden, 0, 0, "model.norm.weight");
    if (!shape->tied)
        ok = ok && add(list, shape->vocab, shape->hidden, sd, "lm_head.weight");
    if (!ok)
        return fault_set(fault, STATUS_NO_MEMORY, "out of memory for the list of tensors.");
    uint64_t limit = (uint64_t)shape->shard_mib << 20, in_shard = 0;
    for (size_t i = 0; i < list->count; i++) {
        uint64_t bytes = 2 * synth__elements(&list->entries[i]);
        if (in_shard && in_shard + bytes > limit) {
            list->shards++;
            in_shard = 0;
        }
        list->entries[i].shard = list->shards;
        in_shard += bytes;
    }
    list->shards++;
    return STATUS_OK;
}

void synth__print_header(const struct synth_list *list, uint32_t shard, FILE *out)
{
    uint64_t at = 0;
    (void)fputs("{\"__metadata__\":{\"format\":\"pt\"}", out);
    for (size_t i = 0; i < list->count; i++) {
        const struct synth_entry *entry = &list->entries[i];
        if (entry->shard != shard)
            continue;
        uint64_t end = at + 2 * synth__elements(entry);
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

void synth__fill(float sd, uint64_t key, uint64_t word, uint16_t *out, size_t count)
{
    // A uniform number on (-1, 1) has the standard deviation 1 / sqrt(3).
    float scale = (sd > 0 ? sd * 1.7320508f : 0.1f) / 32768.0f;
    float centre = sd > 0 ? 0.0f : 1.0f;
    for (size_t i = 0; i < count; word++) {
        uint64_t bits = rng_mix(key + word * 0x9e3779b97f4a7c15u);
        for (int k = 0; k < 4 && i < count; k++, i++, bits >>= 16)
            out[i] = bf16_from_f32(centre + scale * ((float)(bits & 0xffffu) - 32767.5f));
    }
}
