// SPDX-License-Identifier: Apache-2.0
// From tensors and configuration to a plan: for every matrix of the base, which elements of which
// tensors are the rows of A and of B transposed, at what rank and scale.
//
// What the file holds decides what is applied; adapter_config.json gives rank and alpha. Where the
// two contradict each other the adapter is refused by the name of the matrix:
//   tensors there, not targeted   refused: PEFT would not apply them either
//   targeted, A or B missing      refused
//   targeted, both missing        refused, layer by layer. Only experts named by target_modules may
//                                 be missing, when the file has no expert in that layout at all (on
//                                 transformers 5 such names match nothing): reported
// and shapes are compared with the base matrix by matrix: an adapter for another base stops there.
//
// Steps: collect (tensor by key) -> plain matrices -> fused and stacked experts (peft_experts.c) ->
// missing. embed_tokens and lm_head are plain matrices of layer base->layers.
#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "adapters/peft.h"
#include "adapters/store.h"
#include "base/arith.h"
#include "base/check.h"

static size_t plain_index(const struct peft_reading *reading, uint32_t layer,
                          enum lora_module module, uint32_t expert)
{
    return lora_pair_row(layer, module) * reading->plan->experts + expert;
}

static enum status tensors_allocate(struct peft_reading *reading, struct fault *fault)
{
    size_t layers = reading->base->layers;
    struct peft_tensors *tensors = &reading->tensors;
    struct peft_plan *plan = reading->plan;
    size_t matrices = lora_pair_rows((uint32_t)layers) * plan->experts;
    plan->pairs = calloc(matrices, sizeof *plan->pairs);
    tensors->plain = calloc(matrices, sizeof *tensors->plain);
    tensors->fused = calloc(layers * 2, sizeof *tensors->fused);
    tensors->stacked = calloc(layers * PEFT_STACKS, sizeof *tensors->stacked);
    if (!plan->pairs || !tensors->plain || !tensors->fused || !tensors->stacked)
        return fault_set(fault, STATUS_NO_MEMORY, "out of memory while reading an adapter.");
    return STATUS_OK;
}

// Does the base have the matrix that the key names?
static enum status key_check(const struct adapter_base *base, const struct peft_key *key,
                             const char *name, struct fault *fault)
{
    if (key->form == PEFT_PLAIN && key->module >= LORA_MODULES)
        return base->vocab ? STATUS_OK
                           : fault_set(fault, STATUS_UNSUPPORTED,
                                       "\"%.150s\": the shape of the base model's vocabulary is "
                                       "not known here.",
                                       name);
    if (key->layer >= base->layers)
        return fault_set(
            fault, STATUS_INVALID,
            "\"%.150s\" is for layer %u; the base model has %u layers: this adapter was "
            "made for another base.",
            name, key->layer, base->layers);
    bool is_expert = key->form != PEFT_PLAIN || key->is_expert;
    bool is_mlp = is_expert || key->module >= LORA_GATE;
    if (is_mlp && is_expert != (base->is_moe[key->layer] != 0))
        return fault_set(fault, STATUS_INVALID,
                         "\"%.150s\": layer %u of the base model is %s: this adapter was made for "
                         "another base.",
                         name, key->layer, is_expert ? "dense" : "a mixture of experts");
    if (key->is_expert && key->expert >= base->experts)
        return fault_set(
            fault, STATUS_INVALID,
            "\"%.150s\" is for expert %u; the base model has %u: this adapter was made "
            "for another base.",
            name, key->expert, base->experts);
    return STATUS_OK;
}

static bool is_zero(const struct digest *digest)
{
    static const struct digest zero = {.bytes = {0}};
    return digest_equal(digest, &zero);
}

// embed_tokens or lm_head beside its LoRA: served when it is what this base has, bit for bit (also
// bf16 that was widened). Another would change the model for everybody.
static enum status base_weights_check(const struct peft_reading *reading,
                                      const struct safetensors *file, const struct tensor *tensor,
                                      enum lora_module module, struct fault *fault)
{
    const struct adapter_base *base = reading->base;
    bool is_head = module == LORA_HEAD && !base->tied;
    const struct digest *want = is_head ? &base->head_weights : &base->embedding_weights;
    const char *name = is_head ? "lm_head.weight" : "model.embed_tokens.weight";
    struct digest got = {.bytes = {0}};
    enum status status = STATUS_OK;
    if (!is_zero(want))
        status = safetensors_digest(file, tensor, name, tensor->type, NULL, NULL, &got, fault);
    if (!status && !digest_equal(want, &got) && tensor->type == TENSOR_F32)
        status = safetensors_digest(file, tensor, name, TENSOR_BF16, NULL, NULL, &got, fault);
    if (status && status != STATUS_INVALID)
        return status;
    if (status || is_zero(want) || !digest_equal(want, &got))
        return fault_set(fault, STATUS_UNSUPPORTED,
                         "the tensor \"%.150s\" is a whole matrix that is not known to be the base "
                         "model's own: if it was not trained, save the adapter again with "
                         "save_embedding_layers=False, else put it into the base model.",
                         tensor->name);
    peft__config_ignore(reading->config, "tensor:", tensor->name + strlen("base_model.model."));
    return STATUS_OK;
}

static enum status collect(struct peft_reading *reading, const struct safetensors *file,
                           struct fault *fault)
{
    struct peft_tensors *tensors = &reading->tensors;
    if (!safetensors_count(file))
        return fault_set(fault, STATUS_INVALID, "adapter_model.safetensors holds no tensor.");
    for (size_t i = 0; i < safetensors_count(file); i++) {
        const struct tensor *tensor = safetensors_at(file, i);
        struct peft_key key;
        enum status status = peft__key_parse(tensor->name, &key, fault);
        if (!status && key.form == PEFT_BASE_WEIGHTS)
            status = base_weights_check(reading, file, tensor, key.module, fault);
        else if (!status)
            status = key_check(reading->base, &key, tensor->name, fault);
        if (status)
            return status;
        if (key.form == PEFT_BASE_WEIGHTS)
            continue;
        const struct tensor *(*pair)[2];
        if (key.form == PEFT_PLAIN && key.module >= LORA_MODULES)
            key.layer = reading->base->layers;
        uint32_t stack = key.form == PEFT_STACKED_GATE_UP ? 0 : 1 + key.module - LORA_GATE;
        if (key.form == PEFT_PLAIN)
            pair = &tensors->plain[plain_index(reading, key.layer, key.module, key.expert)];
        else if (key.form == PEFT_FUSED_INNER || key.form == PEFT_FUSED_OUTER)
            pair = &tensors->fused[key.layer * 2 + (key.form == PEFT_FUSED_OUTER)];
        else
            pair = &tensors->stacked[key.layer * PEFT_STACKS + stack];
        // the container has no name twice, and no two names mean one matrix
        CHECK(!(*pair)[key.is_b]);
        (*pair)[key.is_b] = tensor;
    }
    return STATUS_OK;
}

enum status peft__plan_put(struct peft_reading *reading, uint32_t layer, enum lora_module module,
                           uint32_t expert, const struct peft_pair *pair, struct fault *fault)
{
    struct peft_pair *slot = peft__pair_at(reading->plan, layer, module, expert);
    if (slot->rank)
        return fault_set(
            fault, STATUS_INVALID,
            "layer %u, expert %u, %s: the file holds LoRA for this matrix in two layouts.", layer,
            expert, peft__module_word(module));
    *slot = *pair;
    reading->plan->applied++;
    return STATUS_OK;
}

static bool is_moe_mlp(const struct peft_reading *reading, uint32_t layer, enum lora_module module)
{
    return module >= LORA_GATE && module < LORA_MODULES && reading->base->is_moe[layer];
}

// With ensure_weight_tying on a base whose lm_head is its embeddings PEFT trains one LoRA for both,
// whichever is named.
static bool is_tied(const struct peft_reading *reading)
{
    return reading->config->ties && reading->base->tied;
}

static bool is_targeted(const struct peft_reading *reading, enum lora_module module,
                        const char *name)
{
    if (peft__config_targets(reading->config, name))
        return true;
    return module >= LORA_MODULES && is_tied(reading) &&
           peft__config_targets(reading->config,
                                module == LORA_HEAD ? "model.embed_tokens" : "lm_head");
}

static enum status plain_shape(const struct tensor *a, const struct tensor *b, uint32_t d_in,
                               uint32_t d_out, uint32_t rank, struct fault *fault)
{
    if (a->dims != 2 || b->dims != 2)
        return fault_set(fault, STATUS_INVALID, "\"%.150s\" or its lora_B is not a matrix.",
                         a->name);
    if (a->shape[1] != d_in)
        return fault_set(fault, STATUS_INVALID,
                         "\"%.150s\" has %" PRIu64 " columns; the base model has %u there: this "
                         "adapter was made for another base.",
                         a->name, a->shape[1], d_in);
    if (b->shape[0] != d_out)
        return fault_set(fault, STATUS_INVALID,
                         "\"%.150s\" has %" PRIu64
                         " rows; the base model has %u there: this adapter "
                         "was made for another base.",
                         b->name, b->shape[0], d_out);
    if (a->shape[0] != b->shape[1] || a->shape[0] != rank)
        return fault_set(fault, STATUS_INVALID,
                         "\"%.150s\" has rank %" PRIu64 ", its lora_B %" PRIu64
                         ", adapter_config.json says %u.",
                         a->name, a->shape[0], b->shape[1], rank);
    return STATUS_OK;
}

// One matrix of its own; *present tells whether the file has it.
static enum status plain_pair(struct peft_reading *reading, uint32_t layer, enum lora_module module,
                              uint32_t expert, bool *present, struct fault *fault)
{
    const struct tensor *const *pair =
        reading->tensors.plain[plain_index(reading, layer, module, expert)];
    const struct tensor *a = pair[0], *b = pair[1];
    char name[PEFT_NAME_MAX];
    *present = a || b;
    if (!a && !b)
        return STATUS_OK;
    bool is_expert = is_moe_mlp(reading, layer, module);
    peft__module_name(layer, module, is_expert ? (int64_t)expert : -1, name);
    if (!a || !b)
        return fault_set(fault, STATUS_INVALID, "%s has %s but no %s.", name,
                         a ? "lora_A" : "lora_B", a ? "lora_B" : "lora_A");
    if (!is_targeted(reading, module, name))
        return fault_set(fault, STATUS_INVALID,
                         "the file has LoRA for %s, which adapter_config.json does not target.",
                         name);
    struct peft_pair out = {.rank = peft__config_rank(reading->config, name)};
    (void)adapter__module_dims(reading->base, layer, module, &out.d_in, &out.d_out);
    enum status status = plain_shape(a, b, out.d_in, out.d_out, out.rank, fault);
    if (status)
        return status;
    out.scale = peft__config_scale(reading->config, name, out.rank);
    out.a = (struct peft_source){.tensor = a, .rank_step = out.d_in, .dim_step = 1};
    out.b = (struct peft_source){.tensor = b, .rank_step = 1, .dim_step = out.rank};
    reading->has_attention |= module < LORA_GATE;
    reading->has_dense |= module >= LORA_GATE && module < LORA_MODULES && !is_expert;
    reading->has_single |= is_expert;
    reading->has_embed |= module == LORA_EMBED;
    reading->has_head |= module == LORA_HEAD;
    return peft__plan_put(reading, layer, module, expert, &out, fault);
}

static enum status missing_fault(const char *name, struct fault *fault)
{
    return fault_set(fault, STATUS_INVALID,
                     "adapter_config.json targets %s, but the file has no LoRA for it.", name);
}

// The plain matrices of one module, and what target_modules asks for outside the experts and the
// file does not have.
static enum status module_pairs(struct peft_reading *reading, uint32_t layer,
                                enum lora_module module, struct fault *fault)
{
    uint32_t count = adapter__module_count(reading->base, layer, module);
    for (uint32_t expert = 0; expert < count; expert++) {
        bool present;
        char name[PEFT_NAME_MAX];
        enum status status = plain_pair(reading, layer, module, expert, &present, fault);
        if (status)
            return status;
        if (present || is_moe_mlp(reading, layer, module))
            continue;
        peft__module_name(layer, module, -1, name);
        if (is_targeted(reading, module, name))
            return missing_fault(name, fault);
    }
    return STATUS_OK;
}

// lm_head's LoRA where the file has that of the tied embeddings alone: E + s B A (as columns of
// tokens) is the change of both, so that A and B change roles.
static enum status tied_pair(struct peft_reading *reading, struct fault *fault)
{
    uint32_t layer = reading->base->layers;
    const struct peft_pair *embed = peft__pair_at(reading->plan, layer, LORA_EMBED, 0);
    const struct tensor *const *head =
        reading->tensors.plain[plain_index(reading, layer, LORA_HEAD, 0)];
    if (head[0] || head[1] || !embed->rank || !is_tied(reading))
        return module_pairs(reading, layer, LORA_HEAD, fault);
    struct peft_pair pair = {.a = embed->b,
                             .b = embed->a,
                             .rank = embed->rank,
                             .d_in = embed->d_out,
                             .d_out = embed->d_in,
                             .scale = peft__config_scale(reading->config, "lm_head", embed->rank)};
    reading->has_head = true;
    return peft__plan_put(reading, layer, LORA_HEAD, 0, &pair, fault);
}

static enum status plain_pairs(struct peft_reading *reading, struct fault *fault)
{
    uint32_t layers = reading->base->layers;
    for (uint32_t layer = 0; layer < layers; layer++)
        for (int m = 0; m < LORA_MODULES; m++) {
            enum status status = module_pairs(reading, layer, (enum lora_module)m, fault);
            if (status)
                return status;
        }
    if (!reading->base->vocab)
        return STATUS_OK;
    enum status status = module_pairs(reading, layers, LORA_EMBED, fault);
    if (!status)
        status = tied_pair(reading, fault);
    if (reading->config->ties && !(is_tied(reading) && reading->has_embed))
        peft__config_ignore(reading->config, "ensure_weight_tying", "");
    return status;
}

// The experts of one module in one layer, after all layouts were read: a matrix that is targeted
// and absent is missing when the file has experts in the layout of that target. *unmatched: a
// target that stands for nothing in the file.
static enum status experts_missing_in(const struct peft_reading *reading, uint32_t layer,
                                      enum lora_module module, bool *unmatched,
                                      bool *unmatched_stack, struct fault *fault)
{
    bool absent = false;
    char name[PEFT_NAME_MAX];
    for (uint32_t expert = 0; expert < reading->base->experts; expert++) {
        if (peft__pair_at(reading->plan, layer, module, expert)->rank)
            continue;
        absent = true;
        peft__module_name(layer, module, expert, name);
        if (!peft__config_targets(reading->config, name))
            continue;
        if (reading->has_single)
            return missing_fault(name, fault);
        *unmatched = true;
    }
    for (uint32_t stack = 0; stack < PEFT_STACKS && absent; stack++) {
        if (!peft__stack_has(stack, module))
            continue;
        peft__stack_name(layer, stack, name);
        if (!peft__config_targets(reading->config, name))
            continue;
        if (reading->has_stacked)
            return missing_fault(name, fault);
        *unmatched_stack = true;
    }
    return STATUS_OK;
}

static enum status experts_missing(struct peft_reading *reading, struct fault *fault)
{
    bool unmatched[LORA_MODULES] = {false}, stack[LORA_MODULES] = {false};
    for (uint32_t layer = 0; layer < reading->base->layers; layer++)
        for (int m = LORA_GATE; m < LORA_MODULES && reading->base->is_moe[layer]; m++) {
            enum status status = experts_missing_in(reading, layer, (enum lora_module)m,
                                                    &unmatched[m], &stack[m], fault);
            if (status)
                return status;
        }
    if (reading->config->targets_form == PEFT_TARGETS_ALL)
        return STATUS_OK;
    for (int m = LORA_GATE; m < LORA_MODULES; m++)
        if (unmatched[m] || (m == LORA_DOWN && stack[m]))
            peft__config_ignore(reading->config, "target_modules:experts.",
                                peft__module_word((enum lora_module)m));
    if (stack[LORA_GATE] && !unmatched[LORA_GATE] && !unmatched[LORA_UP])
        peft__config_ignore(reading->config, "target_modules:experts.", "gate_up_proj");
    return STATUS_OK;
}

void peft__layout_text(const struct peft_reading *reading, char out[ADAPTER_LAYOUT_BYTES])
{
    int layouts = reading->has_single + reading->has_stacked + reading->has_fused;
    const struct {
        bool there;
        const char *text;
    } parts[] = {
        {reading->has_attention, "attention"},
        {reading->has_dense, "dense"},
        {layouts == 1 && reading->has_single, "per-expert"},
        {layouts == 1 && reading->has_stacked, "stacked"},
        {layouts == 1 && reading->has_fused, "fused"},
        {layouts > 1, "mixed"},
        {reading->has_embed, "embed"},
        {reading->has_head, "head"},
        {reading->is_transposed, "transposed"},
        {reading->is_by_version, "by version"},
    };
    size_t used = 0;
    out[0] = 0;
    for (size_t i = 0; i < ARRAY_COUNT(parts); i++)
        if (parts[i].there) {
            used += (size_t)snprintf(out + used, ADAPTER_LAYOUT_BYTES - used, "%s%s",
                                     used ? ", " : "", parts[i].text);
            CHECK(used < ADAPTER_LAYOUT_BYTES);
        }
}

enum status peft__plan(const struct safetensors *file, const struct adapter_base *base,
                       struct peft_config *config, struct peft_plan *out, struct fault *fault)
{
    *out = (struct peft_plan){.experts = base->experts ? base->experts : 1};
    struct peft_reading reading = {.base = base, .config = config, .plan = out};
    enum status status = tensors_allocate(&reading, fault);
    if (!status)
        status = collect(&reading, file, fault);
    if (!status)
        status = plain_pairs(&reading, fault);
    if (!status)
        status = peft__plan_experts(&reading, fault);
    if (!status)
        status = experts_missing(&reading, fault);
    // before all other faults: they can come of an answer that is unknown
    enum status checked = peft__config_check(config, fault);
    if (checked)
        status = checked;
    if (!status)
        peft__config_ignore_rules(config);
    if (!status)
        peft__layout_text(&reading, out->layout);
    free((void *)reading.tensors.plain);
    free((void *)reading.tensors.fused);
    free((void *)reading.tensors.stacked);
    return status;
}

void peft__plan_clear(struct peft_plan *plan)
{
    free(plan->pairs);
    plan->pairs = NULL;
}
