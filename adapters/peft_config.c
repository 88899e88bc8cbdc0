// SPDX-License-Identifier: Apache-2.0
// adapter_config.json: what is understood, what is refused by name, what is listed as ignored.
//
// Every field falls into one class of the table below. `read` fields are used. `refused` fields
// change the maths in a way that is not built: when they are set (not null, false, 0 or empty) the
// adapter is refused with the reason. `ignored` fields do not matter for inference, and are listed
// in the report when set. A field that is not in the table comes from a newer PEFT: it is listed as
// ignored, except "use_..." set to true, which in PEFT has always changed the maths, and is
// refused. Four depend on the rest: `bias` matters only when the file has bias tensors, which
// peft_keys.c refuses; `fan_in_fan_out` PEFT sets to false at an nn.Linear, and this base has no
// others, but it refuses it for a parameter; `layers_pattern` is nothing without
// layers_to_transform; `ensure_weight_tying` is nothing unless the base's lm_head is its embeddings
// (peft_weights.c).
//
// Matching of names is PEFT's, to the letter:
//   target_modules list    the name, or its end after a "."; layers_to_transform applies to the
//     latter. Without layers_pattern the layer is the first number in the name, before 0.20 it was
//     the last, so that layers_to_transform chose experts
//   target_modules string  re.fullmatch, or "all-linear"
//   exclude_modules        the same two forms, before everything else
//   rank_pattern, alpha_pattern   get_pattern_key: the first key, in file order, for which
//                          re.match(rf"(.*\.)?({key})$", name) is true
//   target_parameters      the name, or its end after a "."
// (peft 0.21: tuners/tuners_utils.py check_target_module_exists, _inject_parameters;
// utils/other.py.)
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <strings.h>

#include "adapters/peft.h"
#include "adapters/store.h"
#include "base/check.h"
#include "base/json.h"

enum { NAMES_MAX = 65536, RULES_MAX = 1024, LAYERS_MAX = 4096 };

#define LABEL "adapter_config.json"

enum field_class { FIELD_READ, FIELD_IGNORED, FIELD_REFUSED };

static const struct {
    const char *name;
    enum field_class class;
    const char *reason;
} fields[] = {
    {"peft_type", FIELD_READ, NULL},
    {"r", FIELD_READ, NULL},
    {"lora_alpha", FIELD_READ, NULL},
    {"use_rslora", FIELD_READ, NULL},
    {"target_modules", FIELD_READ, NULL},
    {"target_parameters", FIELD_READ, NULL},
    {"exclude_modules", FIELD_READ, NULL},
    {"rank_pattern", FIELD_READ, NULL},
    {"alpha_pattern", FIELD_READ, NULL},
    {"layers_to_transform", FIELD_READ, NULL},
    {"layers_pattern", FIELD_READ, NULL},
    {"bias", FIELD_READ, NULL},
    {"init_lora_weights", FIELD_READ, NULL},
    {"peft_version", FIELD_READ, NULL},
    {"ensure_weight_tying", FIELD_READ, NULL},
    {"use_dora", FIELD_REFUSED, "DoRA is not supported"},
    {"modules_to_save", FIELD_REFUSED, "whole modules in an adapter are not supported"},
    {"lora_bias", FIELD_REFUSED, "biases are not supported"},
    {"layer_replication", FIELD_REFUSED, "it changes the layers of the base model"},
    {"use_qalora", FIELD_REFUSED, "QALoRA is not supported"},
    {"alora_invocation_tokens", FIELD_REFUSED, "activated LoRA is not supported"},
    {"trainable_token_indices", FIELD_REFUSED, "trained tokens are not supported"},
    {"use_bdlora", FIELD_REFUSED, "block-diagonal LoRA is not supported"},
    {"arrow_config", FIELD_REFUSED, "Arrow routing is not supported"},
    {"kasa_config", FIELD_REFUSED, "KaSA is not supported"},
    {"monteclora_config", FIELD_REFUSED, "MonteCLoRA is not supported"},
    // a name proves nothing: shapes and digest decide
    {"base_model_name_or_path", FIELD_IGNORED, NULL},
    {"revision", FIELD_IGNORED, NULL},
    {"inference_mode", FIELD_IGNORED, NULL},
    {"fan_in_fan_out", FIELD_IGNORED, NULL},
    {"lora_dropout", FIELD_IGNORED, NULL},
    {"task_type", FIELD_IGNORED, NULL},
    {"auto_mapping", FIELD_IGNORED, NULL},
    {"megatron_config", FIELD_IGNORED, NULL},
    {"megatron_core", FIELD_IGNORED, NULL},
    {"loftq_config", FIELD_IGNORED, NULL},
    {"eva_config", FIELD_IGNORED, NULL},
    {"corda_config", FIELD_IGNORED, NULL},
    {"lora_ga_config", FIELD_IGNORED, NULL},
    {"velora_config", FIELD_IGNORED, NULL}, // the backward pass only
    {"runtime_config", FIELD_IGNORED, NULL},
    {"qalora_group_size", FIELD_IGNORED, NULL},
};

// Ways to initialise that leave the base model as it is; the others subtract from it (or we do not
// know).
static const char *const harmless_starts[] = {"gaussian", "eva", "orthogonal"};

void peft__config_ignore(struct peft_config *config, const char *what, const char *detail)
{
    size_t used = strlen(config->ignored), room = sizeof config->ignored;
    size_t length = strlen(what) + strlen(detail) + (used ? 2 : 0);
    if (used + length + sizeof ", ..." > room) {
        if (used >= 3 && strcmp(config->ignored + used - 3, "...") != 0)
            (void)snprintf(config->ignored + used, room - used, ", ...");
        return;
    }
    (void)snprintf(config->ignored + used, room - used, "%s%s%s", used ? ", " : "", what, detail);
}

static bool is_set(const struct json *value)
{
    bool flag;
    double number;
    const char *bytes;
    size_t length;
    switch (json_kind_of(value)) {
    case JSON_KIND_NULL:
        return false;
    case JSON_KIND_BOOL:
        return json_as_bool(value, &flag) && flag;
    case JSON_KIND_INTEGER:
    case JSON_KIND_REAL:
        return json_as_double(value, &number) && number != 0;
    case JSON_KIND_STRING:
        return json_as_bytes(value, &bytes, &length) && length;
    default:
        return json_count(value) != 0;
    }
}

static enum status classes_check(const struct json *root, struct peft_config *config,
                                 struct fault *fault)
{
    for (struct json_pair pair = {0}; json_next(root, &pair);) {
        size_t i = 0;
        bool flag = false;
        if (!is_set(pair.value))
            continue;
        while (i < ARRAY_COUNT(fields) && strcmp(fields[i].name, pair.key) != 0)
            i++;
        if (i < ARRAY_COUNT(fields) && fields[i].class == FIELD_REFUSED)
            return fault_set(fault, STATUS_UNSUPPORTED,
                             LABEL ": %s is set: %s. Train the adapter without it.", pair.key,
                             fields[i].reason);
        if (i == ARRAY_COUNT(fields) && strncmp(pair.key, "use_", 4) == 0 &&
            json_as_bool(pair.value, &flag) && flag)
            return fault_set(fault, STATUS_UNSUPPORTED,
                             LABEL
                             ": %.60s is not known, and may change the maths; train the adapter "
                             "without it.",
                             pair.key);
        if (i == ARRAY_COUNT(fields) || fields[i].class == FIELD_IGNORED)
            peft__config_ignore(config, pair.key, "");
    }
    return STATUS_OK;
}

static enum status start_check(const struct json *init, struct peft_config *config,
                               struct fault *fault)
{
    const char *start;
    if (json_kind_of(init) == JSON_KIND_NULL || json_kind_of(init) == JSON_KIND_BOOL)
        return STATUS_OK;
    if (!json_as_string(init, &start))
        return fault_set(fault, STATUS_INVALID,
                         LABEL ": init_lora_weights must be a bool or a name.");
    for (size_t i = 0; i < ARRAY_COUNT(harmless_starts); i++)
        if (strcmp(start, harmless_starts[i]) == 0) {
            peft__config_ignore(config, "init_lora_weights", "");
            return STATUS_OK;
        }
    return fault_set(fault, STATUS_UNSUPPORTED,
                     LABEL
                     ": init_lora_weights \"%.60s\" changes the base weights; save the adapter "
                     "with path_initial_model_for_weight_conversion.",
                     start);
}

static enum status plain_lora_check(const struct json *root, struct peft_config *config,
                                    struct fault *fault)
{
    const char *type, *bias;
    enum status status = json_get_string(root, "peft_type", &type, fault);
    if (!status)
        status = json_get_string_or(root, "bias", "none", &bias, fault);
    if (status)
        return json_fault_within(fault, LABEL, status);
    if (strcmp(type, "LORA") != 0)
        return fault_set(fault, STATUS_UNSUPPORTED,
                         LABEL ": peft_type is \"%.60s\"; only LORA is "
                               "supported.",
                         type);
    if (strcmp(bias, "all") == 0 || strcmp(bias, "lora_only") == 0)
        peft__config_ignore(config, "bias", "");
    else if (strcmp(bias, "none") != 0)
        return fault_set(fault, STATUS_UNSUPPORTED,
                         LABEL ": bias is \"%.60s\"; PEFT knows none, all and lora_only.", bias);
    return start_check(json_find(root, "init_lora_weights"), config, fault);
}

// ---- lists of names ----

static int name_order(const void *a, const void *b)
{
    return strcmp(*(char *const *)a, *(char *const *)b);
}

// A list of strings, or null.
static enum status names_parse(const struct json *value, const char *key, struct peft_names *out,
                               struct fault *fault)
{
    size_t count = json_count(value);
    if (json_kind_of(value) == JSON_KIND_NULL)
        return STATUS_OK;
    if (json_kind_of(value) != JSON_KIND_ARRAY)
        return fault_set(fault, STATUS_INVALID, LABEL ": %s must be a list of names.", key);
    if (count > NAMES_MAX)
        return fault_set(fault, STATUS_LIMIT, LABEL ": %s has more than %d names.", key, NAMES_MAX);
    out->names = calloc(count ? count : 1, sizeof *out->names);
    if (!out->names)
        return fault_set(fault, STATUS_NO_MEMORY, "out of memory for %s.", key);
    for (size_t i = 0; i < count; i++) {
        const char *name;
        if (!json_as_string(json_at(value, i), &name) || !*name)
            return fault_set(fault, STATUS_INVALID, LABEL ": %s must be a list of names.", key);
        out->names[out->count] = strdup(name);
        if (!out->names[out->count])
            return fault_set(fault, STATUS_NO_MEMORY, "out of memory for %s.", key);
        out->count++;
    }
    qsort(out->names, out->count, sizeof *out->names, name_order);
    return STATUS_OK;
}

static bool names_have(const struct peft_names *names, const char *name)
{
    return names->count &&
           bsearch(&name, names->names, names->count, sizeof *names->names, name_order);
}

// Is an end of the name, after a ".", in the list?
static bool names_have_end(const struct peft_names *names, const char *name)
{
    for (const char *dot = strchr(name, '.'); dot; dot = strchr(dot + 1, '.'))
        if (names_have(names, dot + 1))
            return true;
    return false;
}

static void names_clear(struct peft_names *names)
{
    for (uint32_t i = 0; i < names->count; i++)
        free(names->names[i]);
    free(names->names);
}

// A name whose last word no module, or no parameter, of the base has: PEFT matches nothing with it.
static void names_report(const struct peft_names *names, const char *field,
                         struct peft_config *config)
{
    bool are_parameters = names == &config->parameters;
    int first = are_parameters ? LORA_DOWN : LORA_Q;
    int end = are_parameters ? LORA_MODULES : LORA_MODULES_ALL;
    for (uint32_t i = 0; i < names->count; i++) {
        const char *dot = strrchr(names->names[i], '.'), *word = dot ? dot + 1 : names->names[i];
        bool known = strcmp(word, "gate_up_proj") == 0;
        for (int m = first; m < end && !known; m++)
            known = strcmp(word, peft__module_word((enum lora_module)m)) == 0;
        if (!known)
            peft__config_ignore(config, field, names->names[i]);
    }
}

// ---- targets ----

static enum status pattern_parse(const char *text, enum peft_match match, const char *key,
                                 struct peft_pattern **out, struct fault *fault)
{
    enum status status = peft__pattern_create(text, match, key, out, fault);
    return status ? json_fault_within(fault, LABEL, status) : STATUS_OK;
}

static enum status targets_parse(const struct json *root, struct peft_config *config,
                                 struct fault *fault)
{
    const struct json *targets = json_find(root, "target_modules");
    const struct json *excludes = json_find(root, "exclude_modules");
    const char *text;
    enum status status = names_parse(json_find(root, "target_parameters"), "target_parameters",
                                     &config->parameters, fault);
    if (status)
        return status;
    if (json_as_string(targets, &text)) {
        config->targets_form =
            strcasecmp(text, "all-linear") == 0 ? PEFT_TARGETS_ALL : PEFT_TARGETS_REGEX;
        if (config->targets_form == PEFT_TARGETS_REGEX)
            status = pattern_parse(text, PEFT_MATCH_FULL, "target_modules",
                                   &config->targets_pattern, fault);
    } else {
        status = names_parse(targets, "target_modules", &config->targets, fault);
        config->targets_form = config->targets.count ? PEFT_TARGETS_NAMES : PEFT_TARGETS_NONE;
        names_report(&config->targets, "target_modules:", config);
    }
    names_report(&config->parameters, "target_parameters:", config);
    if (status)
        return status;
    if (config->targets_form == PEFT_TARGETS_NONE && !config->parameters.count)
        return fault_set(fault, STATUS_INVALID,
                         LABEL ": neither target_modules nor target_parameters names anything.");
    if (config->targets_form == PEFT_TARGETS_NONE && is_set(json_find(root, "fan_in_fan_out")))
        return fault_set(fault, STATUS_UNSUPPORTED,
                         LABEL ": fan_in_fan_out is set, which goes with no target_parameters; set "
                               "it to false.");
    if (json_as_string(excludes, &text))
        return *text ? pattern_parse(text, PEFT_MATCH_FULL, "exclude_modules",
                                     &config->excludes_pattern, fault)
                     : STATUS_OK;
    return names_parse(excludes, "exclude_modules", &config->excludes, fault);
}

static enum status layer_numbers_parse(const struct json *value, struct peft_config *config,
                                       struct fault *fault)
{
    bool is_list = json_kind_of(value) == JSON_KIND_ARRAY;
    size_t count = is_list ? json_count(value) : 1;
    if (json_kind_of(value) == JSON_KIND_NULL || !count)
        return STATUS_OK;
    if (count > LAYERS_MAX)
        return fault_set(fault, STATUS_LIMIT,
                         LABEL ": layers_to_transform has more than %d numbers.", LAYERS_MAX);
    config->layers = calloc(count, sizeof *config->layers);
    if (!config->layers)
        return fault_set(fault, STATUS_NO_MEMORY, "out of memory for layers_to_transform.");
    for (size_t i = 0; i < count; i++)
        if (!json_as_u32(is_list ? json_at(value, i) : value, &config->layers[i]))
            return fault_set(fault, STATUS_INVALID,
                             LABEL ": layers_to_transform must be layer numbers.");
    config->layers_count = (uint32_t)count;
    config->has_layers = true;
    return STATUS_OK;
}

static enum status layers_parse(const struct json *root, struct peft_config *config,
                                struct fault *fault)
{
    const struct json *pattern = json_find(root, "layers_pattern");
    bool is_list = json_kind_of(pattern) == JSON_KIND_ARRAY;
    enum status status = layer_numbers_parse(json_find(root, "layers_to_transform"), config, fault);
    if (status)
        return status;
    if (config->has_layers && config->targets_form != PEFT_TARGETS_NAMES &&
        config->targets_form != PEFT_TARGETS_NONE)
        return fault_set(fault, STATUS_INVALID,
                         LABEL ": layers_to_transform goes with a list of target_modules only.");
    if (is_set(pattern) && json_kind_of(json_find(root, "layers_to_transform")) == JSON_KIND_NULL)
        return fault_set(fault, STATUS_INVALID,
                         LABEL ": layers_pattern is set without layers_to_transform; give both or "
                               "neither.");
    if (config->has_layers && config->targets_form == PEFT_TARGETS_NONE)
        peft__config_ignore(config, "layers_to_transform", ""); // of target_modules alone
    if (is_set(pattern) && (!config->has_layers || config->targets_form == PEFT_TARGETS_NONE))
        peft__config_ignore(config, "layers_pattern", "");
    if (!config->has_layers || !is_set(pattern))
        return STATUS_OK;
    size_t count = is_list ? json_count(pattern) : 1;
    if (count > RULES_MAX)
        return fault_set(fault, STATUS_LIMIT, LABEL ": layers_pattern has more than %d entries.",
                         RULES_MAX);
    config->layer_patterns = calloc(count, sizeof *config->layer_patterns);
    if (!config->layer_patterns)
        return fault_set(fault, STATUS_NO_MEMORY, "out of memory for layers_pattern.");
    for (size_t i = 0; i < count && !status; i++) {
        const char *text;
        if (!json_as_string(is_list ? json_at(pattern, i) : pattern, &text))
            return fault_set(fault, STATUS_INVALID, LABEL ": layers_pattern must be names.");
        status = pattern_parse(text, PEFT_MATCH_LAYER, "layers_pattern", &config->layer_patterns[i],
                               fault);
        config->layer_patterns_count += !status;
    }
    return status;
}

// ---- rank and alpha ----

// The scale must be a finite float.
static bool alpha_is_good(double alpha)
{
    return isfinite((float)alpha);
}

static bool rank_is_good(double rank)
{
    return rank >= 1 && rank <= ADAPTER_RANK_MAX && rank == floor(rank);
}

static enum status rules_parse(const struct json *root, const char *key, bool is_rank,
                               struct peft_rule **rules, uint32_t *count, struct fault *fault)
{
    const struct json *object;
    enum status status = json_get_object_or_null(root, key, &object, fault);
    if (status || !object)
        return json_fault_within(fault, LABEL, status);
    if (json_count(object) > RULES_MAX)
        return fault_set(fault, STATUS_LIMIT, LABEL ": %s has more than %d entries.", key,
                         RULES_MAX);
    *rules = calloc(json_count(object) + 1, sizeof **rules);
    if (!*rules)
        return fault_set(fault, STATUS_NO_MEMORY, "out of memory for %s.", key);
    for (struct json_pair pair = {0}; json_next(object, &pair);) {
        struct peft_rule *rule = &(*rules)[*count];
        uint32_t rank = 0;
        bool good = is_rank
                        ? json_as_u32(pair.value, &rank) && rank_is_good(rank)
                        : json_as_double(pair.value, &rule->value) && alpha_is_good(rule->value);
        if (!good)
            return fault_set(fault, STATUS_INVALID,
                             LABEL ": %s: the value of \"%.100s\" must be %s.", key, pair.key,
                             is_rank ? "a rank of 1 to 512" : "a number");
        if (is_rank)
            rule->value = rank;
        rule->key = strdup(pair.key);
        if (!rule->key)
            return fault_set(fault, STATUS_NO_MEMORY, "out of memory for %s.", key);
        (*count)++; // from here on rules_clear knows of it
        status = pattern_parse(pair.key, PEFT_MATCH_SUFFIX, key, &rule->pattern, fault);
        if (status)
            return status;
    }
    return STATUS_OK;
}

static void version_parse(const struct json *root, struct peft_config *config)
{
    const char *text;
    unsigned major, minor, patch;
    if (!json_as_string(json_find(root, "peft_version"), &text) ||
        sscanf(text, "%9u.%9u.%9u", &major, &minor, &patch) != 3)
        return;
    config->has_version = true;
    config->version[0] = major;
    config->version[1] = minor;
    config->version[2] = patch;
}

static enum status numbers_parse(const struct json *root, struct peft_config *config,
                                 struct fault *fault)
{
    enum status status = json_get_u32(root, "r", &config->rank, fault);
    if (!status)
        status = json_get_double(root, "lora_alpha", &config->alpha, fault);
    if (!status)
        status = json_get_bool_or(root, "use_rslora", false, &config->use_rslora, fault);
    if (!status)
        status = json_get_bool_or(root, "ensure_weight_tying", false, &config->ties, fault);
    if (status)
        return json_fault_within(fault, LABEL, status);
    if (!alpha_is_good(config->alpha))
        return fault_set(fault, STATUS_INVALID, LABEL ": lora_alpha is out of range.");
    if (!rank_is_good(config->rank))
        return fault_set(fault, STATUS_LIMIT, LABEL ": r is %u; ranks of 1 to %d are served.",
                         config->rank, ADAPTER_RANK_MAX);
    status = rules_parse(root, "rank_pattern", true, &config->ranks, &config->ranks_count, fault);
    if (!status)
        status = rules_parse(root, "alpha_pattern", false, &config->alphas, &config->alphas_count,
                             fault);
    version_parse(root, config);
    return status;
}

enum status peft__config_parse(const char *text, size_t bytes, struct peft_config *out,
                               struct fault *fault)
{
    struct json *root = NULL;
    *out = (struct peft_config){.rank = 0};
    enum status status = json_parse(LABEL, text, bytes, NULL, &root, fault);
    if (status)
        return status;
    if (json_kind_of(root) != JSON_KIND_OBJECT)
        status = fault_set(fault, STATUS_INVALID, LABEL ": must be an object.");
    if (!status)
        status = plain_lora_check(root, out, fault);
    if (!status)
        status = classes_check(root, out, fault);
    if (!status)
        status = numbers_parse(root, out, fault);
    if (!status)
        status = targets_parse(root, out, fault);
    if (!status)
        status = layers_parse(root, out, fault);
    json_free(root);
    return status;
}

static void rules_clear(struct peft_rule *rules, uint32_t count)
{
    for (uint32_t i = 0; i < count; i++) {
        peft__pattern_destroy(rules[i].pattern);
        free(rules[i].key);
    }
    free(rules);
}

void peft__config_clear(struct peft_config *config)
{
    names_clear(&config->targets);
    names_clear(&config->excludes);
    names_clear(&config->parameters);
    peft__pattern_destroy(config->targets_pattern);
    peft__pattern_destroy(config->excludes_pattern);
    free(config->layers);
    for (uint32_t i = 0; i < config->layer_patterns_count; i++)
        peft__pattern_destroy(config->layer_patterns[i]);
    free((void *)config->layer_patterns);
    rules_clear(config->ranks, config->ranks_count);
    rules_clear(config->alphas, config->alphas_count);
    *config = (struct peft_config){.rank = 0};
}

// ---- questions ----

// Written by this PEFT or a newer one? A file that does not say is older than 0.18.
static bool version_is(const struct peft_config *config, uint32_t major, uint32_t minor,
                       uint32_t patch)
{
    const uint32_t *version = config->version;
    if (!config->has_version)
        return false;
    if (version[0] != major)
        return version[0] > major;
    return version[1] != minor ? version[1] > minor : version[2] >= patch;
}

static bool matches(struct peft_config *config, struct peft_pattern *pattern, const char *name,
                    uint32_t *layer)
{
    if (config->unknown)
        return false;
    enum peft_found found = peft__pattern_matches(pattern, name, layer);
    if (found == PEFT_FOUND_UNKNOWN)
        config->unknown = pattern;
    return found == PEFT_FOUND;
}

enum status peft__config_check(const struct peft_config *config, struct fault *fault)
{
    if (!config->unknown)
        return STATUS_OK;
    return json_fault_within(fault, LABEL, peft__pattern_unknown(config->unknown, fault));
}

static bool layer_is_chosen(struct peft_config *config, const char *name)
{
    uint32_t layer = 0;
    bool found = false;
    if (!config->has_layers)
        return true;
    for (uint32_t i = 0; i < config->layer_patterns_count && !found; i++)
        found = matches(config, config->layer_patterns[i], name, &layer);
    // Without layers_pattern: the first number after a word, which in this base is the layer;
    // before 0.20 the last one, which is the expert where there is one.
    if (!config->layer_patterns_count) {
        const char *experts = strstr(name, ".experts.");
        found = (experts && !version_is(config, 0, 20, 0) &&
                 sscanf(experts, ".experts.%9u.", &layer) == 1) ||
                sscanf(name, "model.layers.%9u.", &layer) == 1;
    }
    for (uint32_t i = 0; i < config->layers_count && found; i++)
        if (config->layers[i] == layer)
            return true;
    return false;
}

bool peft__config_targets(struct peft_config *config, const char *name)
{
    if (config->excludes_pattern && matches(config, config->excludes_pattern, name, NULL))
        return false;
    if (names_have(&config->excludes, name) || names_have_end(&config->excludes, name))
        return false;
    switch (config->targets_form) {
    case PEFT_TARGETS_NONE:
        return false;
    case PEFT_TARGETS_ALL: // PEFT leaves out the output layer, and embeddings are not linear
        return strncmp(name, "model.layers.", strlen("model.layers.")) == 0;
    case PEFT_TARGETS_REGEX:
        return matches(config, config->targets_pattern, name, NULL);
    case PEFT_TARGETS_NAMES:
        break;
    }
    return names_have(&config->targets, name) ||
           (names_have_end(&config->targets, name) && layer_is_chosen(config, name));
}

bool peft__config_targets_parameter(const struct peft_config *config, const char *name)
{
    return names_have(&config->parameters, name) || names_have_end(&config->parameters, name);
}

static double rule_value(struct peft_config *config, struct peft_rule *rules, uint32_t count,
                         const char *name, double otherwise)
{
    for (uint32_t i = 0; i < count; i++)
        if (matches(config, rules[i].pattern, name, NULL)) {
            rules[i].used = true;
            return rules[i].value;
        }
    return otherwise;
}

void peft__config_ignore_rules(struct peft_config *config)
{
    for (uint32_t i = 0; i < config->ranks_count; i++)
        if (!config->ranks[i].used)
            peft__config_ignore(config, "rank_pattern:", config->ranks[i].key);
    for (uint32_t i = 0; i < config->alphas_count; i++)
        if (!config->alphas[i].used)
            peft__config_ignore(config, "alpha_pattern:", config->alphas[i].key);
}

uint32_t peft__config_rank(struct peft_config *config, const char *name)
{
    return (uint32_t)rule_value(config, config->ranks, config->ranks_count, name, config->rank);
}

float peft__config_scale(struct peft_config *config, const char *name, uint32_t rank)
{
    double alpha = rule_value(config, config->alphas, config->alphas_count, name, config->alpha);
    return (float)(alpha / (config->use_rslora ? sqrt(rank) : rank));
}

bool peft__config_is_linear_order(const struct peft_config *config)
{
    return version_is(config, 0, 19, 1);
}
