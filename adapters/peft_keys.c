// SPDX-License-Identifier: Apache-2.0
// The names of tensors in adapter_model.safetensors, read by a fixed grammar: what is not in it is
// refused, with the reason when we know one, so that no part of an adapter is ever left out in
// silence.
//
//   base_model.model.model.layers.N.self_attn.{q,k,v,o}_proj.lora_{A,B}.weight
//   base_model.model.model.layers.N.mlp.{gate,up,down}_proj.lora_{A,B}.weight          dense layers
//   base_model.model.model.layers.N.mlp.experts.E.{gate,up,down}_proj.lora_{A,B}.weight
//   base_model.model.model.layers.N.mlp.experts[.base_layer].lora_{A,B}.weight
//     target_parameters
//   base_model.model.model.layers.N.mlp.experts.{gate,up,down,gate_up}_proj.lora_{A,B}.weight   3-D
//   base_model.model.model.embed_tokens.lora_embedding_{A,B}
//   base_model.model.lm_head.lora_{A,B}.weight
//   base_model.model.{model.embed_tokens,lm_head}[.base_layer].weight
//     the base model's own, which PEFT saves beside their LoRA unless it is told not to
//
// Numbers have no leading zeros, so that no two names mean the same matrix. Whether a tensor fits
// the base is peft_weights.c's question.
#include <stdio.h>
#include <string.h>

#include "adapters/peft.h"
#include "base/check.h"

static const char *const words[LORA_MODULES_ALL] = {"q_proj",    "k_proj",       "v_proj",
                                                    "o_proj",    "gate_proj",    "up_proj",
                                                    "down_proj", "embed_tokens", "lm_head"};

// Parts of names that are known and refused, with the reason and what to do; the first that is
// found counts.
static const struct {
    const char *part, *reason;
} refused[] = {
    {"lora_magnitude_vector", "DoRA is not supported; train with use_dora=False"},
    {"trainable_tokens", "trained tokens are not supported; train without trainable_token_indices"},
    {"modules_to_save", "whole modules are not supported; train without modules_to_save"},
    {"original_module", "whole modules are not supported; train without modules_to_save"},
    {".bias", "biases are not supported; train with bias=\"none\" and lora_bias=False"},
    {".mlp.gate.",
     "LoRA on the router is not supported; train without mlp.gate in target_modules and "
     "target_parameters"},
    {"shared_expert",
     "this base model has no shared experts: this adapter was made for another base; train it on "
     "this one"},
    {"lora_diag", "KaSA is not supported; train without kasa_config"},
    {"base_layer.weight",
     "weights of the base model do not belong in an adapter file; save the adapter again with "
     "PEFT's save_pretrained"},
};

const char *peft__module_word(enum lora_module module)
{
    return words[module];
}

void peft__module_name(uint32_t layer, enum lora_module module, int64_t expert,
                       char out[PEFT_NAME_MAX])
{
    char part[32] = "";
    if (module >= LORA_MODULES) {
        (void)snprintf(out, PEFT_NAME_MAX, "%s%s", module == LORA_EMBED ? "model." : "",
                       words[module]);
        return;
    }
    if (expert >= 0)
        (void)snprintf(part, sizeof part, "experts.%u.", (unsigned)expert);
    (void)snprintf(out, PEFT_NAME_MAX, "model.layers.%u.%s.%s%s", layer,
                   module < LORA_GATE ? "self_attn" : "mlp", part, words[module]);
}

void peft__parameter_name(uint32_t layer, bool is_down, char out[PEFT_NAME_MAX])
{
    (void)snprintf(out, PEFT_NAME_MAX, "model.layers.%u.mlp.experts.%s", layer,
                   is_down ? "down_proj" : "gate_up_proj");
}

// Moves *at past `text` when it stands there.
static bool skip(const char **at, const char *text)
{
    size_t length = strlen(text);
    if (strncmp(*at, text, length) != 0)
        return false;
    *at += length;
    return true;
}

static bool number(const char **at, uint32_t *out)
{
    const char *begin = *at;
    uint32_t value = 0;
    while (**at >= '0' && **at <= '9' && *at - begin < 7)
        value = value * 10 + (uint32_t)(*(*at)++ - '0');
    *out = value;
    return *at > begin && (*begin != '0' || *at - begin == 1);
}

static bool module_word(const char **at, enum lora_module first, enum lora_module last,
                        enum lora_module *out)
{
    for (int module = (int)first; module <= (int)last; module++)
        if (skip(at, words[module])) {
            *out = (enum lora_module)module;
            return true;
        }
    return false;
}

// What follows "mlp.experts".
static bool experts_parse(const char **at, struct peft_key *out)
{
    if (skip(at, ".base_layer")) {
        out->form = PEFT_FUSED_INNER;
        return true;
    }
    if (strncmp(*at, ".lora_", 6) == 0) {
        out->form = PEFT_FUSED_OUTER;
        return true;
    }
    if (!skip(at, "."))
        return false;
    if (skip(at, "gate_up_proj")) {
        out->form = PEFT_STACKED_GATE_UP;
        return true;
    }
    if (module_word(at, LORA_GATE, LORA_DOWN, &out->module)) {
        out->form = PEFT_STACKED;
        return true;
    }
    out->is_expert = true;
    return number(at, &out->expert) && skip(at, ".") &&
           module_word(at, LORA_GATE, LORA_DOWN, &out->module);
}

// What follows "embed_tokens" or "lm_head". lora_embedding_ is a parameter of its own, without
// ".weight".
static bool model_module_parse(const char *at, struct peft_key *out)
{
    bool is_whole = strcmp(at, ".weight") == 0 || strcmp(at, ".base_layer.weight") == 0;
    out->form = is_whole ? PEFT_BASE_WEIGHTS : PEFT_PLAIN;
    if (is_whole)
        return true;
    const char *a = ".lora_embedding_A", *b = ".lora_embedding_B";
    if (out->module == LORA_HEAD) {
        a = ".lora_A.weight";
        b = ".lora_B.weight";
    }
    out->is_b = strcmp(at, b) == 0;
    return out->is_b || strcmp(at, a) == 0;
}

static bool grammar(const char *name, struct peft_key *out)
{
    const char *at = name;
    bool is_embed = skip(&at, "base_model.model.model.embed_tokens");
    if (is_embed || skip(&at, "base_model.model.lm_head")) {
        out->module = is_embed ? LORA_EMBED : LORA_HEAD;
        return model_module_parse(at, out);
    }
    if (!skip(&at, "base_model.model.model.layers.") || !number(&at, &out->layer))
        return false;
    if (skip(&at, ".self_attn.")) {
        if (!module_word(&at, LORA_Q, LORA_O, &out->module))
            return false;
    } else if (skip(&at, ".mlp.experts")) {
        if (!experts_parse(&at, out))
            return false;
    } else if (!skip(&at, ".mlp.") || !module_word(&at, LORA_GATE, LORA_DOWN, &out->module)) {
        return false;
    }
    if (skip(&at, ".lora_B"))
        out->is_b = true;
    else if (!skip(&at, ".lora_A"))
        return false;
    return strcmp(at, ".weight") == 0;
}

enum status peft__key_parse(const char *name, struct peft_key *out, struct fault *fault)
{
    *out = (struct peft_key){.form = PEFT_PLAIN};
    if (grammar(name, out))
        return STATUS_OK;
    for (size_t i = 0; i < ARRAY_COUNT(refused); i++)
        if (strstr(name, refused[i].part))
            return fault_set(fault, STATUS_UNSUPPORTED, "the tensor \"%.150s\": %s.", name,
                             refused[i].reason);
    return fault_set(fault, STATUS_INVALID,
                     "the tensor \"%.150s\" is not a LoRA matrix of this base model.", name);
}
