// SPDX-License-Identifier: Apache-2.0
// Reading a PEFT LoRA directory (folder-internal): adapter_config.json, the names of tensors, and
// the plan that says where every row of every matrix comes from. Formats and traps:
// docs/formats.md, and the essays of peft_config.c, peft_keys.c, peft_experts.c. Any thread.
#ifndef POLDER_ADAPTERS_PEFT_H
#define POLDER_ADAPTERS_PEFT_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "adapters/adapters.h"
#include "base/safetensors.h"
#include "base/status.h"

// ---- patterns: Python's re for the uses PEFT makes of it (peft_pattern.c) ----

struct peft_pattern;
enum peft_match {
    PEFT_MATCH_FULL,   // re.fullmatch(P, name)
    PEFT_MATCH_SUFFIX, // re.match(rf"(.*\.)?({P})$", name): get_pattern_key
    PEFT_MATCH_LAYER   // re.match(rf"(?:^|.*?\.){P}\.(?P<idx>\d+)\.", name): layers_pattern
};
// INVALID when the text is no regular expression, UNSUPPORTED when it has what means something else
// here than in Python, LIMIT when it is too long. `what` names it in faults, and outlives it.
MUST_USE enum status peft__pattern_create(const char *text, enum peft_match match, const char *what,
                                          struct peft_pattern **out, struct fault *fault);
void peft__pattern_destroy(struct peft_pattern *pattern);
enum peft_found {
    PEFT_FOUND_NOT,
    PEFT_FOUND,        // for PEFT_MATCH_LAYER *layer is the number found
    PEFT_FOUND_UNKNOWN // the match takes too many steps: the adapter must be refused
};
MUST_USE enum peft_found peft__pattern_matches(struct peft_pattern *pattern, const char *name,
                                               uint32_t *layer);
// LIMIT, with the sentence for a match that is unknown.
MUST_USE enum status peft__pattern_unknown(const struct peft_pattern *pattern, struct fault *fault);

// ---- adapter_config.json (peft_config.c) ----

enum peft_targets { PEFT_TARGETS_NONE, PEFT_TARGETS_NAMES, PEFT_TARGETS_REGEX, PEFT_TARGETS_ALL };

struct peft_names {
    char **names;
    uint32_t count;
};

struct peft_rule { // one entry of rank_pattern or alpha_pattern
    struct peft_pattern *pattern;
    char *key;
    double value;
    bool used; // it has decided for some matrix
};

struct peft_config {
    uint32_t rank;
    double alpha;
    bool use_rslora;
    enum peft_targets targets_form;
    struct peft_names targets, excludes, parameters;
    struct peft_pattern *targets_pattern, *excludes_pattern;
    bool has_layers; // layers_to_transform was given
    uint32_t *layers, layers_count;
    struct peft_pattern **layer_patterns;
    uint32_t layer_patterns_count;
    struct peft_rule *ranks, *alphas;
    uint32_t ranks_count, alphas_count;
    bool ties; // ensure_weight_tying: the LoRA of tied embeddings is lm_head's too
    bool has_version;
    uint32_t version[3];                // peft_version, written by PEFT >= 0.18
    char ignored[512];                  // names, comma separated
    const struct peft_pattern *unknown; // the one whose match took too many steps
};

MUST_USE enum status peft__config_parse(const char *text, size_t bytes, struct peft_config *out,
                                        struct fault *fault);
void peft__config_clear(struct peft_config *config); // also after a failed parse
void peft__config_ignore(struct peft_config *config, const char *what, const char *detail);
// Does PEFT put LoRA on the module of this name ("model.layers.0.self_attn.q_proj")?
bool peft__config_targets(struct peft_config *config, const char *name);
// ... on the parameter of this name ("model.layers.0.mlp.experts.gate_up_proj")?
bool peft__config_targets_parameter(const struct peft_config *config, const char *name);
uint32_t peft__config_rank(struct peft_config *config, const char *name);
// lora_alpha / rank, or / sqrt(rank).
float peft__config_scale(struct peft_config *config, const char *name, uint32_t rank);
// LIMIT when a pattern took too many steps in a question above: from then on nothing is matched,
// all answers are void, and the adapter must be refused. To be asked after the last question.
MUST_USE enum status peft__config_check(const struct peft_config *config, struct fault *fault);
// Lists the patterns that decided for nothing, after all ranks and scales were asked for.
void peft__config_ignore_rules(struct peft_config *config);
// Was the file written by a PEFT that reads a 3-D parameter as (experts, out, in)? (>= 0.19.1)
bool peft__config_is_linear_order(const struct peft_config *config);

// ---- names of tensors (peft_keys.c) ----

enum peft_form {
    PEFT_PLAIN,       // a matrix of its own: attention, dense MLP, or one expert
    PEFT_FUSED_OUTER, // mlp.experts.lora_*: the parameter that was wrapped last
    PEFT_FUSED_INNER, // mlp.experts.base_layer.lora_*: the parameter that was wrapped first
    PEFT_STACKED,     // mlp.experts.{gate_proj,up_proj,down_proj}.lora_*: 3-D over the experts
    PEFT_STACKED_GATE_UP,
    PEFT_BASE_WEIGHTS // embed_tokens or lm_head as the base model has it
};

struct peft_key {
    enum peft_form form;
    uint32_t layer, expert;  // layer: not of LORA_EMBED and LORA_HEAD
    enum lora_module module; // PEFT_PLAIN, PEFT_STACKED, PEFT_BASE_WEIGHTS
    bool is_expert;          // PEFT_PLAIN: mlp.experts.E.
    bool is_b;
};

// UNSUPPORTED with a sentence for what is known and refused, INVALID for what is not known.
MUST_USE enum status peft__key_parse(const char *name, struct peft_key *out, struct fault *fault);

enum { PEFT_NAME_MAX = 128 };
// "model.layers.3.mlp.experts.7.gate_proj", "lm_head"; expert < 0: no expert part.
void peft__module_name(uint32_t layer, enum lora_module module, int64_t expert,
                       char out[PEFT_NAME_MAX]);
// "model.layers.3.mlp.experts.gate_up_proj" or "...down_proj"
void peft__parameter_name(uint32_t layer, bool is_down, char out[PEFT_NAME_MAX]);
const char *peft__module_word(enum lora_module module); // "q_proj"

// ---- the plan (peft_weights.c, peft_experts.c) ----

// Element (rank row j, dimension i) of one A or B^T is element first + j * rank_step + i * dim_step
// of tensor.
struct peft_source {
    const struct tensor *tensor;
    uint64_t first, rank_step, dim_step;
};

struct peft_pair {
    struct peft_source a, b;
    uint32_t rank; // 0: absent
    uint32_t d_in, d_out;
    float scale;
    bool shares_a; // up of a fused gate_up: A is that of the gate before it
};

struct peft_plan {
    uint32_t experts;        // slots per module: base->experts, at least 1
    struct peft_pair *pairs; // [lora_pair_rows(layers)][experts]
    uint32_t applied;
    char layout[ADAPTER_LAYOUT_BYTES];
};

MUST_USE enum status peft__plan(const struct safetensors *file, const struct adapter_base *base,
                                struct peft_config *config, struct peft_plan *out,
                                struct fault *fault);
void peft__plan_clear(struct peft_plan *plan); // also after a failed peft__plan

static inline struct peft_pair *peft__pair_at(const struct peft_plan *plan, uint32_t layer,
                                              enum lora_module module, uint32_t expert)
{
    return &plan->pairs[lora_pair_row(layer, module) * plan->experts + expert];
}

// ---- inside the plan ----

enum { PEFT_STACKS = 4 }; // gate_up, gate, up, down
bool peft__stack_has(uint32_t stack, enum lora_module module);
// "model.layers.3.mlp.experts.gate_up_proj"
void peft__stack_name(uint32_t layer, uint32_t stack, char out[PEFT_NAME_MAX]);

// Tensors [A, B] as the file has them, before they are understood.
struct peft_tensors {
    const struct tensor *(*plain)[2];   // [lora_pair_rows(layers)][experts]
    const struct tensor *(*fused)[2];   // [layers][inner, outer]
    const struct tensor *(*stacked)[2]; // [layers][PEFT_STACKS]
};

struct peft_reading {
    const struct adapter_base *base;
    struct peft_config *config;
    struct peft_tensors tensors;
    struct peft_plan *plan;
    bool has_attention, has_dense, has_single, has_fused, has_stacked; // for the layout text
    bool has_embed, has_head;
    bool is_transposed, is_by_version;
};

// What the report says of the file: kinds of matrices, then the layout of the experts ("mixed" for
// more than one), then their order and whether it was only believed. The longest text fills `out`.
void peft__layout_text(const struct peft_reading *reading, char out[ADAPTER_LAYOUT_BYTES]);

// Fills the pairs of the fused and stacked layouts.
MUST_USE enum status peft__plan_experts(struct peft_reading *reading, struct fault *fault);
// Puts a pair into the plan; refuses a second one for the same matrix.
MUST_USE enum status peft__plan_put(struct peft_reading *reading, uint32_t layer,
                                    enum lora_module module, uint32_t expert,
                                    const struct peft_pair *pair, struct fault *fault);

#endif
