// SPDX-License-Identifier: Apache-2.0
// config.json of Qwen3-MoE and dense Qwen3, in the spellings of transformers 4 and 5. Owns what is
// supported and the sentence for everything that is not; it does not look at tensors (weights.c).
//
// Rules: 1. a value that shapes the model must be there and in range; a default is taken only where
// the transformers class has the same default. 2. an option that changes the maths and is not built
// here is refused by name. 3. other fields are ignored, as transformers ignores them for these two
// classes.
#include "runtime/model/model.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "base/check.h"
#include "runtime/model/fields.h"
#include "runtime/model/synth.h"

enum {
    CONFIG_BYTES_MAX = 4 << 20,
    // Far above any published model, low enough that no product of two of them overflows 64 bits.
    HIDDEN_MAX = 1 << 16,
    LAYERS_MAX = 1024,
    HEADS_MAX = 1024,
    HEAD_DIM_MAX = 1024,
    VOCAB_MAX = 1 << 24,
    POSITIONS_MAX = 1 << 24,
    INTERMEDIATE_MAX = 1 << 20,
    EXPERTS_MAX = 4096,
};

static const char CONFIG_NAME[] = "config.json";
static const char GENERATION_NAME[] = "generation_config.json";

static enum status unsupported(const char *option, const char *supported, struct fault *fault)
{
    return fault_set(fault, STATUS_UNSUPPORTED, "config.json: \"%.60s\" is not supported here; %s.",
                     option, supported);
}

// ---- which model ----

static enum status parse_architecture(const struct fields *fields, struct model_config *out,
                                      struct fault *fault)
{
    static const struct {
        const char *architecture, *model_type;
    } known[] = {{"Qwen3MoeForCausalLM", "qwen3_moe"}, {"Qwen3ForCausalLM", "qwen3"}};
    const struct json *list = json_find(fields->object, "architectures");
    const char *name = NULL, *type = NULL;
    if (json_count(list) != 1 || !json_as_string(json_at(list, 0), &name))
        return fault_set(fault, STATUS_INVALID,
                         "config.json: \"architectures\" must name one architecture.");
    enum status status = fields_string(fields, "model_type", &type, fault);
    if (status)
        return status;
    for (size_t i = 0; i < ARRAY_COUNT(known); i++) {
        if (strcmp(name, known[i].architecture) != 0)
            continue;
        if (type && strcmp(type, known[i].model_type) != 0)
            return fault_set(fault, STATUS_INVALID,
                             "config.json: architecture %s does not go with model_type \"%.60s\".",
                             name, type);
        (void)snprintf(out->architecture, sizeof out->architecture, "%s", name);
        return STATUS_OK;
    }
    return fault_set(
        fault, STATUS_UNSUPPORTED,
        "architecture \"%.60s\" is not supported; supported are Qwen3MoeForCausalLM and "
        "Qwen3ForCausalLM.",
        name);
}

// ---- what is refused by name ----

static enum status refuse_dtype(const struct fields *fields, const char *name, struct fault *fault)
{
    static const char *const known[] = {"bfloat16", "float16", "float32"};
    const char *value = NULL;
    enum status status = fields_string(fields, name, &value, fault);
    for (size_t i = 0; !status && i < ARRAY_COUNT(known); i++)
        if (!value || !strcmp(value, known[i]))
            return STATUS_OK;
    return status ? status : unsupported(name, "weights are bfloat16, float16 or float32", fault);
}

static enum status refuse_layer_types(const struct fields *fields, struct fault *fault)
{
    const struct json *types = NULL;
    enum status status = json_get_array_or_null(fields->object, "layer_types", &types, fault);
    if (status)
        return json_fault_within(fault, fields->file, status);
    for (size_t i = 0; i < json_count(types); i++) {
        const char *type = NULL;
        if (!json_as_string(json_at(types, i), &type) || strcmp(type, "full_attention") != 0)
            return unsupported("layer_types", "every layer is \"full_attention\"", fault);
    }
    return STATUS_OK;
}

static enum status refuse_unsupported(const struct fields *fields, struct fault *fault)
{
    static const struct {
        const char *name, *supported;
    } switches[] = {
        {"use_sliding_window", "attention is over the whole context"},
        {"attention_bias", "the projections have no bias"},
        {"mlp_bias", "the projections have no bias"},
    };
    for (size_t i = 0; i < ARRAY_COUNT(switches); i++) {
        bool on = false;
        enum status status = fields_bool(fields, switches[i].name, &on, fault);
        if (status)
            return status;
        if (on)
            return unsupported(switches[i].name, switches[i].supported, fault);
    }
    if (fields_has(fields, "quantization_config"))
        return unsupported("quantization_config", "weights are bfloat16, float16 or float32",
                           fault);
    const char *act = "silu";
    enum status status = fields_string(fields, "hidden_act", &act, fault);
    if (!status && strcmp(act, "silu") != 0)
        status = unsupported("hidden_act", "the activation is \"silu\"", fault);
    if (!status)
        status = refuse_dtype(fields, "torch_dtype", fault);
    if (!status)
        status = refuse_dtype(fields, "dtype", fault);
    return status ? status : refuse_layer_types(fields, fault);
}

// ---- rope ----

// One object that may scale the positions: rope_parameters (5.x) or rope_scaling (4.x).
static enum status refuse_scaling(const struct fields *fields, const char *name,
                                  struct fault *fault)
{
    static const char *const keys[] = {"rope_type", "type"};
    double partial = 1.0;
    const struct json *object = NULL;
    enum status status = json_get_object_or_null(fields->object, name, &object, fault);
    if (status || !object)
        return json_fault_within(fault, fields->file, status);
    const struct fields inner = {name, object};
    for (size_t i = 0; i < ARRAY_COUNT(keys); i++) {
        const char *type = "default";
        status = fields_string(&inner, keys[i], &type, fault);
        if (status)
            return status;
        if (strcmp(type, "default") != 0)
            return fault_set(fault, STATUS_UNSUPPORTED,
                             "config.json: rope scaling of type \"%.40s\" is not supported; "
                             "supported is \"default\".",
                             type);
    }
    for (struct json_pair pair = {0}; json_next(object, &pair);)
        if (json_kind_of(pair.value) == JSON_KIND_OBJECT)
            return unsupported(pair.key, "all layers share one set of rope parameters", fault);
    status = fields_number(&inner, "partial_rotary_factor", 0, 1, &partial, fault);
    if (!status && partial != 1.0)
        status = unsupported("partial_rotary_factor", "whole heads are rotated", fault);
    return status;
}

static enum status parse_rope(const struct fields *fields, struct model_config *out,
                              struct fault *fault)
{
    enum status status = refuse_scaling(fields, "rope_scaling", fault);
    if (!status)
        status = refuse_scaling(fields, "rope_parameters", fault);
    if (status)
        return status;
    const struct fields inner = {"rope_parameters", json_find(fields->object, "rope_parameters")};
    double old_theta = 0, new_theta = 0;
    status = fields_number(fields, "rope_theta", 1, 1e12, &old_theta, fault);
    if (!status)
        status = fields_number(&inner, "rope_theta", 1, 1e12, &new_theta, fault);
    if (status)
        return status;
    if (old_theta != 0 && new_theta != 0 && old_theta != new_theta)
        return fault_set(fault, STATUS_INVALID,
                         "config.json: rope_theta and rope_parameters.rope_theta differ.");
    out->rope_theta = new_theta != 0 ? new_theta : old_theta;
    if (out->rope_theta == 0)
        return fault_set(fault, STATUS_INVALID, "config.json: \"rope_theta\" is missing.");
    return STATUS_OK;
}

// ---- shapes ----

static enum status parse_attention(const struct fields *fields, bool moe, struct model_config *out,
                                   struct fault *fault)
{
    enum status status =
        fields_u32(fields, "num_attention_heads", true, 1, HEADS_MAX, &out->heads, fault);
    if (status)
        return status;
    out->kv_heads = out->heads;
    status = fields_u32(fields, "num_key_value_heads", false, 1, HEADS_MAX, &out->kv_heads, fault);
    if (status)
        return status;
    if (out->heads % out->kv_heads)
        return fault_set(
            fault, STATUS_INVALID,
            "config.json: %u attention heads are not a multiple of %u key-value heads.", out->heads,
            out->kv_heads);
    // The defaults of the two transformers classes differ.
    out->head_dim = moe ? out->hidden / out->heads : 128;
    status = fields_u32(fields, "head_dim", false, 2, HEAD_DIM_MAX, &out->head_dim, fault);
    if (status)
        return status;
    if (out->head_dim < 2 || out->head_dim > HEAD_DIM_MAX || out->head_dim % 2)
        return fault_set(fault, STATUS_INVALID,
                         "config.json: head_dim %u; it must be even, from 2 to %d.", out->head_dim,
                         HEAD_DIM_MAX);
    return STATUS_OK;
}

static enum status parse_experts(const struct fields *fields, struct model_config *out,
                                 struct fault *fault)
{
    uint32_t old_name = UINT32_MAX, new_name = UINT32_MAX;
    enum status status = fields_u32(fields, "num_experts", false, 0, EXPERTS_MAX, &old_name, fault);
    if (!status)
        status = fields_u32(fields, "num_local_experts", false, 0, EXPERTS_MAX, &new_name, fault);
    if (status)
        return status;
    if (old_name == UINT32_MAX && new_name == UINT32_MAX)
        return fault_set(fault, STATUS_INVALID, "config.json: \"num_experts\" is missing.");
    if (old_name != UINT32_MAX && new_name != UINT32_MAX && old_name != new_name)
        return fault_set(fault, STATUS_INVALID,
                         "config.json: num_experts and num_local_experts differ.");
    out->experts = old_name != UINT32_MAX ? old_name : new_name;
    if (out->experts == 0)
        return STATUS_OK;
    status = fields_u32(fields, "num_experts_per_tok", true, 1, out->experts, &out->top_k, fault);
    if (!status)
        status = fields_u32(fields, "moe_intermediate_size", true, 1, HIDDEN_MAX,
                            &out->moe_intermediate, fault);
    if (!status)
        status = fields_bool(fields, "norm_topk_prob", &out->normalize_top_k, fault);
    return status;
}

// Which layers have experts: transformers' rule.
static enum status parse_layer_kinds(const struct fields *fields, struct model_config *out,
                                     struct fault *fault)
{
    uint32_t step = 1;
    enum status status =
        fields_u32(fields, "decoder_sparse_step", false, 1, LAYERS_MAX, &step, fault);
    if (status)
        return status;
    for (uint32_t layer = 0; layer < out->layers; layer++)
        out->is_moe[layer] = out->experts > 0 && (layer + 1) % step == 0;
    const struct json *dense = NULL;
    status = json_get_array_or_null(fields->object, "mlp_only_layers", &dense, fault);
    if (status)
        return json_fault_within(fault, fields->file, status);
    for (size_t i = 0; i < json_count(dense); i++) {
        uint32_t layer = 0;
        bool is_there = json_as_u32(json_at(dense, i), &layer);
#ifndef POLDER_PLANT_BUG
        is_there = is_there && layer < out->layers;
#endif
        if (!is_there)
            return fault_set(fault, STATUS_INVALID,
                             "config.json: \"mlp_only_layers\" names a layer that is not there.");
        out->is_moe[layer] = 0;
    }
    return STATUS_OK;
}

static enum status parse_mlp(const struct fields *fields, bool moe, struct model_config *out,
                             struct fault *fault)
{
    enum status status = moe ? parse_experts(fields, out, fault) : STATUS_OK;
    if (!status && moe)
        status = parse_layer_kinds(fields, out, fault);
    if (status)
        return status;
    uint32_t moe_layers = 0;
    for (uint32_t layer = 0; layer < out->layers; layer++)
        moe_layers += out->is_moe[layer];
    if (moe_layers < out->layers)
        status = fields_u32(fields, "intermediate_size", true, 1, INTERMEDIATE_MAX,
                            &out->intermediate, fault);
    if (moe_layers == 0) {
        out->experts = out->top_k = out->moe_intermediate = 0;
        out->normalize_top_k = false;
    }
    return status;
}

// ---- end of sequence ----

static enum status add_eos(const char *file, const struct json *value, struct model_config *out,
                           struct fault *fault)
{
    uint32_t id = 0;
    if (!json_as_u32(value, &id) || id >= out->vocab)
        return fault_set(fault, STATUS_INVALID,
                         "%s: \"eos_token_id\" must be a token id below %u, or a list of them.",
                         file, out->vocab);
    for (uint32_t i = 0; i < out->eos_count; i++)
        if (out->eos[i] == id)
            return STATUS_OK;
    if (out->eos_count == MODEL_EOS_MAX)
        return fault_set(fault, STATUS_LIMIT, "%s: more than %d different \"eos_token_id\".", file,
                         MODEL_EOS_MAX);
    out->eos[out->eos_count++] = id;
    return STATUS_OK;
}

static enum status parse_eos(const struct fields *fields, struct model_config *out,
                             struct fault *fault)
{
    const struct json *value = json_find(fields->object, "eos_token_id");
    if (!fields_has(fields, "eos_token_id"))
        return STATUS_OK;
    if (json_kind_of(value) != JSON_KIND_ARRAY)
        return add_eos(fields->file, value, out, fault);
    enum status status = STATUS_OK;
    for (size_t i = 0; !status && i < json_count(value); i++)
        status = add_eos(fields->file, json_at(value, i), out, fault);
    return status;
}

// ---- whole files ----

static enum status parse_shapes(const struct fields *fields, struct model_config *out,
                                struct fault *fault)
{
    bool moe = !strcmp(out->architecture, "Qwen3MoeForCausalLM");
    double epsilon = 1e-6;
    enum status status =
        fields_u32(fields, "hidden_size", true, 1, HIDDEN_MAX, &out->hidden, fault);
    if (!status)
        status = fields_u32(fields, "num_hidden_layers", true, 1, LAYERS_MAX, &out->layers, fault);
    if (!status)
        status = fields_u32(fields, "vocab_size", true, 1, VOCAB_MAX, &out->vocab, fault);
    if (!status)
        status = fields_u32(fields, "max_position_embeddings", true, 1, POSITIONS_MAX,
                            &out->max_positions, fault);
    if (!status)
        status = fields_number(fields, "rms_norm_eps", 1e-30, 1, &epsilon, fault);
    if (!status)
        status = fields_bool(fields, "tie_word_embeddings", &out->tied_embeddings, fault);
    if (!status)
        status = parse_attention(fields, moe, out, fault);
    if (status)
        return status;
    out->rms_epsilon = (float)epsilon;
    out->is_moe = calloc(out->layers, 1);
    if (!out->is_moe)
        return fault_set(fault, STATUS_NO_MEMORY, "out of memory while reading config.json.");
    return parse_mlp(fields, moe, out, fault);
}

enum status model_config_parse(const char *text, size_t bytes, struct model_config *out,
                               struct fault *fault)
{
    *out = (struct model_config){0};
    struct json *root = NULL;
    enum status status = fields_parse(CONFIG_NAME, text, bytes, &root, fault);
    if (status)
        return status;
    const struct fields fields = {CONFIG_NAME, root};
    status = parse_architecture(&fields, out, fault);
    if (!status)
        status = refuse_unsupported(&fields, fault);
    if (!status)
        status = parse_shapes(&fields, out, fault);
    if (!status)
        status = parse_rope(&fields, out, fault);
    if (!status)
        status = parse_eos(&fields, out, fault);
    json_free(root);
    if (status)
        model_config_clear(out);
    return status;
}

// generation_config.json matters for its end-of-sequence ids only: sampling defaults are the
// client's.
static enum status merge_generation(const char *directory, struct model_config *out,
                                    struct fault *fault)
{
    char *text = NULL;
    size_t bytes = 0;
    enum status status =
        reader_slurp_in(directory, GENERATION_NAME, CONFIG_BYTES_MAX, &text, &bytes, fault);
    if (status == STATUS_NOT_FOUND)
        return STATUS_OK;
    if (status)
        return status;
    struct json *root = NULL;
    status = fields_parse(GENERATION_NAME, text, bytes, &root, fault);
    free(text);
    if (status)
        return status;
    status = parse_eos(&(struct fields){GENERATION_NAME, root}, out, fault);
    json_free(root);
    return status;
}

enum status model_config_load(const char *directory, struct model_config *out, struct fault *fault)
{
    if (synth_is_name(directory)) {
        struct synth_source *source = NULL;
        enum status named = synth_open(directory, &source, out, fault);
        synth_close(source);
        return named;
    }
    *out = (struct model_config){0};
    char *text = NULL;
    size_t bytes = 0;
    enum status status =
        reader_slurp_in(directory, CONFIG_NAME, CONFIG_BYTES_MAX, &text, &bytes, fault);
    if (status)
        return status;
    status = model_config_parse(text, bytes, out, fault);
    free(text);
    if (!status)
        status = merge_generation(directory, out, fault);
    if (status)
        model_config_clear(out);
    return status;
}

void model_config_clear(struct model_config *config)
{
    free(config->is_moe);
    *config = (struct model_config){0};
}
