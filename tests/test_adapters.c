// SPDX-License-Identifier: Apache-2.0
// What adapter_convert accepts and refuses, each refusal with its sentence; what a store file may
// look like. Numbers are compared with PEFT's in test_adapters_golden.c, residency is in
// test_adapters_pool.c.
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <setjmp.h>
#include <cmocka.h>

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include "base/rng.h"
#include "tests/test_adapters_tool.h"

enum { PAGE = 4096 };

#define ATTENTION "\"target_modules\": [\"q_proj\", \"v_proj\"]"

static char store_path[TOOL_PATH + 64];

static enum status convert(const struct tool_adapter *adapter, enum dtype dtype,
                           struct adapter_report *report, struct fault *fault)
{
    struct adapter_base base = tool_base(dtype);
    *fault = (struct fault){.text = ""};
    return adapter_convert(adapter->directory, &base, PAGE, store_path, report, fault);
}

static void expect_text(enum status status, const struct fault *fault, enum status want,
                        const char *text, const char *what)
{
    if (status != want || !strstr(fault->text, text))
        fail_msg("%s: %s \"%s\", wanted %s \"%s\"", what, status_code(status), fault->text,
                 status_code(want), text);
    assert_int_not_equal(access(store_path, F_OK), 0); // nothing was left behind
}

static void expect(const struct tool_adapter *adapter, enum status want, const char *text)
{
    struct adapter_report report;
    struct fault fault;
    tool_adapter_write(adapter);
    enum status status = convert(adapter, DTYPE_BF16, &report, &fault);
    expect_text(status, &fault, want, text, adapter->config);
}

// ---- names ----

static void test_adapters_names(void **state)
{
    char name[ADAPTER_NAME_MAX + 1];
    (void)state;
    static const char *const good[] = {"a", "A.b-c_9", "0", "-", "sql.v2"};
    static const char *const bad[] = {"", ".a", "..", "a/b", "a b", "\xc3\xa4", "a\n", "a:b", "a*"};
    for (size_t i = 0; i < sizeof good / sizeof *good; i++)
        assert_true(adapter_name_is_valid(good[i]));
    for (size_t i = 0; i < sizeof bad / sizeof *bad; i++)
        assert_false(adapter_name_is_valid(bad[i]));
    memset(name, 'a', sizeof name);
    name[ADAPTER_NAME_MAX] = 0;
    assert_false(adapter_name_is_valid(name));
    name[ADAPTER_NAME_MAX - 1] = 0;
    assert_true(adapter_name_is_valid(name));
}

// ---- adapter_config.json ----

static const struct {
    const char *config; // whole text; "+..." stands for a good one with these fields added
    enum status status;
    const char *text;
} refusals[] = {
    {"", STATUS_INVALID, "adapter_config.json:"},
    {"[]", STATUS_INVALID, "must be an object"},
    {"{}", STATUS_INVALID, "peft_type"},
    {"{\"peft_type\": \"LOHA\", \"r\": 4}", STATUS_UNSUPPORTED, "peft_type is \"LOHA\""},
    {"{\"peft_type\": \"LORA\"}", STATUS_INVALID, "'r'"},
    {"{\"peft_type\": \"LORA\", \"r\": 4}", STATUS_INVALID, "lora_alpha"},
    {"{\"peft_type\": \"LORA\", \"r\": 0, \"lora_alpha\": 8, " ATTENTION "}", STATUS_LIMIT,
     "r is 0"},
    {"{\"peft_type\": \"LORA\", \"r\": 513, \"lora_alpha\": 8, " ATTENTION "}", STATUS_LIMIT,
     "r is 513; ranks of 1 to 512"},
    {"{\"peft_type\": \"LORA\", \"r\": \"4\", \"lora_alpha\": 8, " ATTENTION "}", STATUS_INVALID,
     "'r'"},
    {"{\"peft_type\": \"LORA\", \"r\": 4, \"lora_alpha\": 1e300, " ATTENTION "}", STATUS_INVALID,
     "lora_alpha is out of range"},
    {"{\"peft_type\": \"LORA\", \"r\": 4, \"lora_alpha\": 8}", STATUS_INVALID,
     "neither target_modules nor target_parameters"},
    {"{\"peft_type\": \"LORA\", \"r\": 4, \"r\": 4, \"lora_alpha\": 8, " ATTENTION "}",
     STATUS_INVALID, "duplicate"},
    {"+\"use_dora\": true", STATUS_UNSUPPORTED,
     "use_dora is set: DoRA is not supported. Train the adapter without it."},
    {"+\"modules_to_save\": [\"lm_head\"]", STATUS_UNSUPPORTED, "modules_to_save is set"},
    {"+\"lora_bias\": true", STATUS_UNSUPPORTED, "lora_bias is set"},
    {"+\"bias\": \"boft_only\"", STATUS_UNSUPPORTED, "bias is \"boft_only\"; PEFT knows none, all"},
    {"{\"peft_type\": \"LORA\", \"r\": 4, \"lora_alpha\": 8, \"fan_in_fan_out\": true, "
     "\"target_parameters\": [\"gate_up_proj\"]}",
     STATUS_UNSUPPORTED, "fan_in_fan_out is set, which goes with no target_parameters"},
    {"+\"layers_pattern\": \"layers\"", STATUS_INVALID,
     "layers_pattern is set without layers_to_transform"},
    {"+\"layer_replication\": [[0, 2]]", STATUS_UNSUPPORTED, "layer_replication is set"},
    {"+\"use_qalora\": true", STATUS_UNSUPPORTED, "use_qalora is set"},
    {"+\"alora_invocation_tokens\": [1]", STATUS_UNSUPPORTED, "alora_invocation_tokens is set"},
    {"+\"trainable_token_indices\": [1]", STATUS_UNSUPPORTED, "trainable_token_indices is set"},
    {"+\"use_bdlora\": {\"nblocks\": 2}", STATUS_UNSUPPORTED, "use_bdlora is set"},
    {"+\"arrow_config\": {\"top_k\": 2}", STATUS_UNSUPPORTED, "arrow_config is set"},
    {"+\"kasa_config\": {\"beta\": 1}", STATUS_UNSUPPORTED, "kasa_config is set"},
    {"+\"monteclora_config\": {\"n\": 1}", STATUS_UNSUPPORTED, "monteclora_config is set"},
    {"+\"use_magic\": true", STATUS_UNSUPPORTED,
     "use_magic is not known, and may change the maths; train the adapter without it"},
    {"+\"init_lora_weights\": \"pissa\"", STATUS_UNSUPPORTED, "\"pissa\" changes the base weights"},
    {"+\"init_lora_weights\": \"corda\"", STATUS_UNSUPPORTED, "\"corda\" changes the base weights"},
    {"+\"init_lora_weights\": 3", STATUS_INVALID, "init_lora_weights must be"},
    {"+\"rank_pattern\": [1]", STATUS_INVALID, "rank_pattern"},
    {"+\"rank_pattern\": {\"q_proj\": 513}", STATUS_INVALID, "a rank of 1 to 512"},
    {"+\"rank_pattern\": {\"q_proj\": 1.5}", STATUS_INVALID, "a rank of 1 to 512"},
    {"+\"alpha_pattern\": {\"q_proj\": \"x\"}", STATUS_INVALID, "must be a number"},
    {"+\"alpha_pattern\": {\"(q_proj\": 2}", STATUS_INVALID, "is no regular expression"},
    {"+\"target_parameters\": \"gate_up_proj\"", STATUS_INVALID,
     "target_parameters must be a list"},
    {"+\"target_parameters\": [7]", STATUS_INVALID, "target_parameters must be a list of names"},
    {"+\"exclude_modules\": 7", STATUS_INVALID, "exclude_modules must be a list"},
    {"+\"exclude_modules\": \"(\"", STATUS_INVALID,
     "exclude_modules: \"(\" is no regular expression"},
    {"+\"layers_to_transform\": [\"a\"]", STATUS_INVALID,
     "layers_to_transform must be layer numbers"},
    {"+\"layers_to_transform\": [0], \"layers_pattern\": [3]", STATUS_INVALID,
     "layers_pattern must be"},
    {"+\"use_rslora\": 1", STATUS_INVALID, "use_rslora"},
    {"{\"peft_type\": \"LORA\", \"r\": 4, \"lora_alpha\": 8, \"target_modules\": \"[\"}",
     STATUS_INVALID, "target_modules: \"[\" is no regular expression"},
    {"{\"peft_type\": \"LORA\", \"r\": 4, \"lora_alpha\": 8, \"target_modules\": \".*q_proj\", "
     "\"layers_to_transform\": [0]}",
     STATUS_INVALID, "layers_to_transform goes with a list"},
};

static void test_adapters_config_refused(void **state)
{
    struct tool_adapter adapter;
    tool_adapter_begin(&adapter, *state);
    for (size_t i = 0; i < sizeof refusals / sizeof *refusals; i++) {
        const char *config = refusals[i].config;
        char rest[4096];
        (void)snprintf(adapter.config, sizeof adapter.config, "%s", config);
        if (config[0] == '+') {
            (void)snprintf(rest, sizeof rest, ATTENTION ", %s", config + 1);
            tool_config(&adapter, rest);
        }
        expect(&adapter, refusals[i].status, refusals[i].text);
    }
}

static void test_adapters_config_ignored_is_listed(void **state)
{
    struct tool_adapter adapter;
    struct adapter_report report;
    struct fault fault;
    tool_adapter_begin(&adapter, *state);
    tool_config(&adapter,
                "\"target_modules\": [\"q_proj\", \"v_proj\", \"wqkv\"], \"task_type\": "
                "\"CAUSAL_LM\", \"auto_mapping\": null, \"loftq_config\": {}, "
                "\"megatron_core\": \"megatron.core\", \"init_lora_weights\": \"gaussian\", "
                "\"something_new\": {\"a\": 1}, \"use_dora\": false, \"use_magic\": false, "
                "\"revision\": \"main\", \"rank_pattern\": {\"k_proj\": 2, \"[qv]_proj\": 4, "
                "\".*self_attn.*\": 4}, \"alpha_pattern\": {\"lm_head\": 3, \"v_proj\": 2}");
    tool_adapter_write(&adapter);
    assert_int_equal(convert(&adapter, DTYPE_BF16, &report, &fault), STATUS_OK);
    // In file order; what is null, false or empty changes nothing and is not listed. Patterns that
    // decide for nothing: they match nothing of the file, or another comes first.
    assert_string_equal(report.ignored,
                        "init_lora_weights, task_type, megatron_core, something_new, revision, "
                        "target_modules:wqkv, rank_pattern:k_proj, rank_pattern:.*self_attn.*, "
                        "alpha_pattern:lm_head");
    assert_int_equal(report.matrices_applied, 4);
    assert_int_equal(report.matrices_possible, 4 + 3 + 4 + 3 * 4 + 2);
    assert_int_equal(report.rank_min, 4);
    assert_int_equal(report.rank_max, 4);
    assert_string_equal(report.layout, "attention");
    assert_int_equal(report.bytes, PAGE); // 4 x (4 rows of 128 + 4 of 128 or 64) bytes
    assert_int_equal(unlink(store_path), 0);
}

static void test_adapters_config_ignored_list_ends(void **state)
{
    struct tool_adapter adapter;
    struct adapter_report report;
    struct fault fault;
    char rest[4096] = ATTENTION;
    tool_adapter_begin(&adapter, *state);
    for (int i = 0; i < 60; i++)
        (void)snprintf(rest + strlen(rest), sizeof rest - strlen(rest), ", \"unknown_field_%d\": 1",
                       i);
    tool_config(&adapter, rest);
    tool_adapter_write(&adapter);
    assert_int_equal(convert(&adapter, DTYPE_BF16, &report, &fault), STATUS_OK);
    size_t length = strlen(report.ignored);
    assert_true(length < sizeof report.ignored && length > 400);
    assert_string_equal(report.ignored + length - 5, ", ...");
    assert_int_equal(unlink(store_path), 0);
}

// ---- names of tensors ----

static const struct {
    const char *name;
    enum status status;
    const char *text;
} keys[] = {
    {"model.layers.0.self_attn.q_proj.lora_magnitude_vector", STATUS_UNSUPPORTED,
     "DoRA is not supported; train with use_dora=False"},
    {"model.embed_tokens.lora_embedding_A", STATUS_INVALID,
     "model.embed_tokens has lora_A but no lora_B"},
    {"model.embed_tokens.lora_embedding_A.weight", STATUS_INVALID, "is not a LoRA matrix"},
    {"model.embed_tokens.lora_A.weight", STATUS_INVALID, "is not a LoRA matrix"},
    {"model.norm.lora_embedding_B", STATUS_INVALID, "is not a LoRA matrix"},
    {"model.embed_tokens.base_layer.weight",
     STATUS_UNSUPPORTED, // PEFT saves it beside the LoRA
     "embed_tokens.base_layer.weight\" is a whole matrix that is not known to be the base model's "
     "own: if it was not trained, save the adapter again with save_embedding_layers=False, else "
     "put it into the base model"},
    {"model.embed_tokens.weight", STATUS_UNSUPPORTED, // after the vocabulary was resized
     "model.embed_tokens.weight\" is a whole matrix that is not known to be"},
    {"model.embed_tokens.token_adapter.trainable_tokens_delta", STATUS_UNSUPPORTED,
     "trained tokens are not supported; train without trainable_token_indices"},
    {"lm_head.lora_B.weight", STATUS_INVALID, "lm_head has lora_B but no lora_A"},
    {"lm_head.lora_embedding_A", STATUS_INVALID, "is not a LoRA matrix"},
    {"lm_head.lora_B.bias", STATUS_UNSUPPORTED, "biases are not supported"},
    {"lm_head.base_layer.weight", STATUS_UNSUPPORTED,
     "lm_head.base_layer.weight\" is a whole matrix"},
    {"lm_head.weight", STATUS_UNSUPPORTED,
     "lm_head.weight\" is a whole matrix that is not known to be the base model's own"},
    {"model.layers.1.mlp.gate.lora_A.weight", STATUS_UNSUPPORTED,
     "LoRA on the router is not supported; train without mlp.gate"},
    {"model.layers.1.mlp.shared_expert.up_proj.lora_A.weight", STATUS_UNSUPPORTED,
     "no shared experts: this adapter was made for another base; train it on this one"},
    {"model.layers.1.mlp.shared_experts.down_proj.lora_B.weight", STATUS_UNSUPPORTED,
     "no shared experts"},
    {"model.layers.1.mlp.shared_expert_gate.lora_A.weight", STATUS_UNSUPPORTED,
     "no shared experts"},
    {"model.layers.0.self_attn.q_proj.lora_B.bias", STATUS_UNSUPPORTED,
     "biases are not supported; train with bias=\"none\" and lora_bias=False"},
    {"model.layers.0.self_attn.q_proj.base_layer.bias", STATUS_UNSUPPORTED,
     "biases are not supported"},
    {"model.layers.0.self_attn.q_proj.lora_diag", STATUS_UNSUPPORTED, "KaSA is not supported"},
    {"model.layers.0.self_attn.q_proj.base_layer.weight", STATUS_UNSUPPORTED,
     "weights of the base model do not belong in an adapter file; save the adapter again"},
    {"model.norm.modules_to_save.weight", STATUS_UNSUPPORTED,
     "whole modules are not supported; train without modules_to_save"},
    {"model.norm.original_module.weight", STATUS_UNSUPPORTED, "whole modules"},
    {"model.layers.0.self_attn.q_proj.lora_A.default.weight", STATUS_INVALID,
     "is not a LoRA matrix of this base model"},
    {"model.layers.00.self_attn.q_proj.lora_A.weight", STATUS_INVALID, "is not a LoRA matrix"},
    {"model.layers..self_attn.q_proj.lora_A.weight", STATUS_INVALID, "is not a LoRA matrix"},
    {"model.layers.99999999999.self_attn.q_proj.lora_A.weight", STATUS_INVALID,
     "is not a LoRA matrix"},
    {"model.layers.0.self_attn.q_norm.lora_A.weight", STATUS_INVALID, "is not a LoRA matrix"},
    {"model.layers.0.self_attn.q_proj.lora_A.weight.x", STATUS_INVALID, "is not a LoRA matrix"},
    {"model.layers.1.mlp.experts.base_layer.base_layer.lora_A.weight", STATUS_INVALID,
     "is not a LoRA matrix"},
    {"model.layers.2.self_attn.q_proj.lora_A.weight", STATUS_INVALID,
     "is for layer 2; the base model has 2 layers: this adapter was made for another base"},
    {"model.layers.1.mlp.experts.4.up_proj.lora_A.weight", STATUS_INVALID,
     "is for expert 4; the base model has 4"},
    {"model.layers.0.mlp.experts.0.up_proj.lora_A.weight", STATUS_INVALID,
     "layer 0 of the base model is dense"},
    {"model.layers.0.mlp.experts.lora_A.weight", STATUS_INVALID,
     "layer 0 of the base model is dense"},
    {"model.layers.1.mlp.up_proj.lora_A.weight", STATUS_INVALID,
     "layer 1 of the base model is a mixture of experts"},
};

static void test_adapters_keys_refused(void **state)
{
    for (size_t i = 0; i < sizeof keys / sizeof *keys; i++) {
        struct tool_adapter adapter;
        char name[160];
        tool_adapter_begin(&adapter, *state);
        (void)snprintf(name, sizeof name, "base_model.model.%s", keys[i].name);
        tool_tensor_add(&adapter, name, 2, 4, 64, 0);
        expect(&adapter, keys[i].status, keys[i].text);
    }
}

// ---- tensors against config and base ----

// One more pair, or a change to the four good ones.
static void test_adapters_mismatch_refused(void **state)
{
    struct tool_adapter a;
    tool_adapter_begin(&a, *state); // lora_B of the last pair is gone
    a.count--;
    expect(&a, STATUS_INVALID, "model.layers.1.self_attn.v_proj has lora_A but no lora_B");
    tool_adapter_begin(&a, *state); // both are gone
    a.count -= 2;
    expect(&a, STATUS_INVALID,
           "targets model.layers.1.self_attn.v_proj, but the file has no LoRA for it");
    tool_adapter_begin(&a, *state); // not targeted
    tool_pair_add(&a, "layers.0.self_attn.o_proj", 4, 64, 64);
    expect(&a, STATUS_INVALID,
           "LoRA for model.layers.0.self_attn.o_proj, which adapter_config.json does not target");
    tool_adapter_begin(&a, *state);
    a.tensors[0].shape[1] = 72;
    expect(&a, STATUS_INVALID,
           "q_proj.lora_A.weight\" has 72 columns; the base model has 64 there");
    tool_adapter_begin(&a, *state);
    a.tensors[3].shape[0] = 64;
    expect(&a, STATUS_INVALID,
           "v_proj.lora_B.weight\" has 64 rows; the base model has 32 there: this adapter was made "
           "for "
           "another base");
    tool_adapter_begin(&a, *state);
    a.tensors[0].shape[0] = a.tensors[1].shape[1] = 5;
    expect(&a, STATUS_INVALID, "has rank 5, its lora_B 5, adapter_config.json says 4");
    tool_adapter_begin(&a, *state);
    a.tensors[1].shape[1] = 3;
    expect(&a, STATUS_INVALID, "has rank 4, its lora_B 3");
    tool_adapter_begin(&a, *state);
    a.tensors[0].dims = 3;
    a.tensors[0].shape[2] = 1;
    expect(&a, STATUS_INVALID, "is not a matrix");
    tool_adapter_begin(&a, *state);
    a.count = 0;
    expect(&a, STATUS_INVALID, "holds no tensor");
}

static void test_adapters_values_refused(void **state)
{
    static const struct {
        const char *type;
        float poison;
        enum status status;
        const char *text;
    } values[] = {
        {"F32", NAN, STATUS_NUMERIC, "v_proj.lora_B"},
        {"BF16", NAN, STATUS_NUMERIC, "v_proj.lora_B"},
        {"BF16", -INFINITY, STATUS_NUMERIC, "v_proj.lora_B"},
        {"F32", 3.4e38f, STATUS_NUMERIC, "v_proj.lora_B"}, // rounds to infinity in bf16
        {"F64", 0, STATUS_UNSUPPORTED, "F64"},
    };
    for (size_t i = 0; i < sizeof values / sizeof *values; i++) {
        struct tool_adapter adapter;
        tool_adapter_begin(&adapter, *state);
        adapter.type = values[i].type;
        adapter.poison = values[i].poison;
        expect(&adapter, values[i].status, values[i].text);
    }
}

static void moe_begin(struct tool_adapter *adapter, const char *scratch, const char *rest)
{
    tool_adapter_begin(adapter, scratch);
    adapter->count = 0;
    tool_config(adapter, rest);
}

// Fused parameters of layer 1: hidden 64, 24 units, 4 experts, so that rank 4 makes 16.
static void test_adapters_fused_refused(void **state)
{
    static const char both[] =
        "\"target_modules\": [], \"target_parameters\": [\"gate_up_proj\", \"experts.down_proj\"]";
    static const char down[] =
        "\"target_modules\": [], \"target_parameters\": [\"experts.down_proj\"]";
    struct tool_adapter a;
    moe_begin(&a, *state, both);
    tool_pair_add(&a, "layers.1.mlp.experts", 16, 24, 64);
    expect(&a, STATUS_INVALID,
           "names model.layers.1.mlp.experts.gate_up_proj, but the file has no");
    moe_begin(&a, *state, both);
    tool_pair_add(&a, "layers.1.mlp.experts.base_layer", 16, 64, 48);
    expect(&a, STATUS_INVALID, "has mlp.experts.base_layer.lora_A but no mlp.experts.lora_A");
    moe_begin(&a, *state, both); // the same parameter twice
    tool_pair_add(&a, "layers.1.mlp.experts.base_layer", 16, 24, 64);
    tool_pair_add(&a, "layers.1.mlp.experts", 16, 24, 64);
    expect(&a, STATUS_INVALID, "LoRA for this matrix in two layouts");
    moe_begin(&a, *state, both); // one in today's order, one in the old
    tool_pair_add(&a, "layers.1.mlp.experts.base_layer", 16, 64, 48);
    tool_pair_add(&a, "layers.1.mlp.experts", 16, 64, 24);
    expect(&a, STATUS_INVALID, "stand in another order than those before it");
    moe_begin(&a, *state, down);
    tool_pair_add(&a, "layers.1.mlp.experts", 16, 32, 64);
    expect(&a, STATUS_INVALID, "fit neither gate_up_proj nor down_proj of the base model");
    moe_begin(&a, *state, down);
    tool_pair_add(&a, "layers.1.mlp.experts", 12, 24, 64);
    expect(&a, STATUS_INVALID, "rank 4 for 4 experts makes 16");
    moe_begin(&a, *state, down);
    tool_pair_add(&a, "layers.1.mlp.experts", 16, 24, 64);
    a.count--;
    expect(&a, STATUS_INVALID, "model.layers.1.mlp.experts has lora_A but no lora_B");
    moe_begin(&a, *state, ATTENTION); // not a target parameter
    tool_pair_add(&a, "layers.1.mlp.experts", 16, 24, 64);
    tool_pair_add(&a, "layers.0.self_attn.q_proj", 4, 64, 64);
    tool_pair_add(&a, "layers.1.self_attn.q_proj", 4, 64, 64);
    tool_pair_add(&a, "layers.0.self_attn.v_proj", 4, 64, 32);
    tool_pair_add(&a, "layers.1.self_attn.v_proj", 4, 64, 32);
    expect(&a, STATUS_INVALID,
           "LoRA for model.layers.1.mlp.experts.down_proj, which target_parameters does not name");
}

// gate_up_proj is square (2I = H) and alone: the writer's version decides, and the report says so.
static void test_adapters_fused_order_by_version(void **state)
{
    static const struct {
        const char *version;
        bool is_transposed;
    } writers[] = {
        {"", true}, // PEFT 0.17 did not write one
        {", \"peft_version\": \"0.18.1\"", true},
        {", \"peft_version\": \"0.19.0\"", true},
        {", \"peft_version\": \"0.19.1\"", false},
        {", \"peft_version\": \"0.19.1.dev0@UNKNOWN\"", false},
        {", \"peft_version\": \"0.20.0\"", false},
        {", \"peft_version\": \"1.0.0\"", false},
        {", \"peft_version\": \"main\"", true},
        {", \"peft_version\": 7", true},
    };
    struct adapter_base base = tool_base(DTYPE_BF16);
    base.moe_intermediate = 32;
    for (size_t i = 0; i < sizeof writers / sizeof *writers; i++) {
        struct tool_adapter a;
        struct adapter_report report;
        char rest[256];
        (void)snprintf(rest, sizeof rest, "\"target_parameters\": [\"gate_up_proj\"]%s",
                       writers[i].version);
        moe_begin(&a, *state, rest);
        tool_pair_add(&a, "layers.1.mlp.experts", 16, 64, 64);
        tool_adapter_write(&a);
        assert_int_equal(adapter_convert(a.directory, &base, PAGE, store_path, &report, NULL),
                         STATUS_OK);
        assert_string_equal(report.layout, writers[i].is_transposed
                                               ? "fused, transposed, by version"
                                               : "fused, by version");
        assert_int_equal(unlink(store_path), 0);
    }
}

static void test_adapters_experts_partly_missing(void **state)
{
    struct tool_adapter a;
    struct adapter_report report;
    struct fault fault;
    moe_begin(&a, *state, "\"target_modules\": [\"experts.0.up_proj\", \"experts.2.up_proj\"]");
    tool_pair_add(&a, "layers.1.mlp.experts.0.up_proj", 4, 64, 24);
    expect(&a, STATUS_INVALID,
           "targets model.layers.1.mlp.experts.2.up_proj, but the file has no LoRA for it");
    tool_adapter_begin(&a, *state); // names of experts that transformers 5 did not match: reported
    tool_config(&a, "\"target_modules\": \".*(q_proj|v_proj|experts\\\\..*\\\\.up_proj)\"");
    tool_adapter_write(&a);
    assert_int_equal(convert(&a, DTYPE_BF16, &report, &fault), STATUS_OK);
    assert_string_equal(report.ignored, "target_modules:experts.up_proj");
    assert_int_equal(unlink(store_path), 0);
}

// 3-D tensors [experts, rank, in] and [experts, out, rank]. Orders: test_adapters_formats.c.
static void test_adapters_stacked(void **state)
{
    struct tool_adapter a;
    struct adapter_report report;
    struct fault fault;
    const char *prefix = "base_model.model.model.layers.1.mlp.experts.";
    char name[160];
    moe_begin(&a, *state, "\"target_modules\": [\"gate_up_proj\", \"experts.down_proj\"]");
    static const uint64_t shapes[4][3] = {{4, 4, 64}, {4, 48, 4}, {4, 4, 24}, {4, 64, 4}};
    static const char *const words[4] = {"gate_up_proj.lora_A", "gate_up_proj.lora_B",
                                         "down_proj.lora_A", "down_proj.lora_B"};
    for (int i = 0; i < 4; i++) {
        (void)snprintf(name, sizeof name, "%s%s.weight", prefix, words[i]);
        tool_tensor_add(&a, name, 3, shapes[i][0], shapes[i][1], shapes[i][2]);
    }
    tool_adapter_write(&a);
    if (convert(&a, DTYPE_F32, &report, &fault))
        fail_msg("%s", fault.text);
    assert_string_equal(report.layout, "stacked");
    assert_int_equal(report.matrices_applied, 12);
    struct adapter_base base = tool_base(DTYPE_F32);
    struct tool_rig rig;
    adapter_id id;
    tool_adapter_write(&a);
    assert_int_equal(adapter_convert(a.directory, &base, 32768, store_path, &report, &fault),
                     STATUS_OK);
    tool_rig_make(&rig, &base, 32768, 8, 8, 2);
    assert_int_equal(adapter_register(rig.adapters, "s", store_path, 0, &id, &fault), STATUS_OK);
    tool_rig_bring(&rig, id);
    const struct lora_adapter_view *view = adapters_views(rig.adapters);
    const struct lora_pair *up = lora_pair_at(view, 1, LORA_UP, 3);
    // The generator's element n is rng_uniform(seed, 1, n) - 0.5: up of expert 3 is rows 24.. of B.
    size_t b_begin = 4 * 4 * 64 + 3 * 48 * 4;
    assert_true(tool_element(&rig, &base, view, &up->b, 2, 5) ==
                rng_uniform(a.seed, 1, b_begin + (24 + 5) * 4 + 2) - 0.5f);
    assert_true(tool_element(&rig, &base, view, &up->a, 1, 63) ==
                rng_uniform(a.seed, 1, 3 * 4 * 64 + 1 * 64 + 63) - 0.5f);
    // stored once
    assert_memory_equal(&up->a, &lora_pair_at(view, 1, LORA_GATE, 3)->a, sizeof up->a);
    assert_int_equal(lora_pair_at(view, 0, LORA_UP, 0)->a.rank, 0);
    tool_rig_clear(&rig);
    assert_int_equal(unlink(store_path), 0);
    a.tensors[1].shape[1] = 40;
    expect(&a, STATUS_INVALID, "is not [4, 4, 64] with a lora_B of [4, 48, 4]");
}

// ---- files ----

static void expect_files(const struct tool_adapter *adapter, enum status want, const char *text)
{
    struct adapter_report report;
    struct fault fault;
    enum status status = convert(adapter, DTYPE_BF16, &report, &fault);
    expect_text(status, &fault, want, text, adapter->directory);
}

static void test_adapters_files_refused(void **state)
{
    struct tool_adapter a;
    char config[TOOL_PATH + 64], weights[TOOL_PATH + 64], other[TOOL_PATH + 64];
    size_t bytes;
    tool_adapter_begin(&a, *state);
    (void)snprintf(config, sizeof config, "%s/adapter_config.json", a.directory);
    (void)snprintf(weights, sizeof weights, "%s/adapter_model.safetensors", a.directory);
    expect_files(&a, STATUS_NOT_FOUND, "adapter_config.json");
    tool_adapter_write(&a);
    uint8_t *whole = tool_file_read(weights, &bytes);
    for (size_t i = 0; i < bytes; i += i < 900 ? 1 : 997) { // cut short anywhere
        tool_file_write(weights, whole, i);
        expect_files(&a, STATUS_CORRUPT, "adapter_model.safetensors");
    }
    (void)snprintf(other, sizeof other, "%s/outside.safetensors", (char *)*state);
    tool_file_write(other, whole, bytes);
    free(whole);
    assert_int_equal(unlink(weights), 0);
    expect_files(&a, STATUS_NOT_FOUND, "adapter_model.safetensors");
    assert_int_equal(symlink(other, weights), 0); // nothing outside the directory is read
    expect_files(&a, STATUS_INVALID, "adapter_model.safetensors");
    assert_int_equal(unlink(weights), 0);
    (void)snprintf(other, sizeof other, "%s/adapter_model.bin", a.directory);
    tool_file_write(other, "\x80\x02", 2);
    expect_files(&a, STATUS_UNSUPPORTED, "adapter_model.bin is a pickle file");
}

static void test_adapters_store_cannot_be_written(void **state)
{
    struct tool_adapter a;
    struct adapter_report report;
    struct fault fault;
    struct adapter_base base = tool_base(DTYPE_BF16);
    char path[TOOL_PATH + 64];
    tool_adapter_begin(&a, *state);
    tool_adapter_write(&a);
    (void)snprintf(path, sizeof path, "%s/none/x.adapter", a.directory);
    assert_int_equal(adapter_convert(a.directory, &base, PAGE, path, &report, &fault), STATUS_IO);
    assert_non_null(strstr(fault.text, "creating"));
    (void)snprintf(path, sizeof path, "%s/directory", a.directory);
    (void)snprintf(store_path, sizeof store_path, "%s/directory/occupied", a.directory);
    assert_int_equal(mkdir(path, 0700), 0);
    tool_file_write(store_path, "", 0);
    assert_int_equal(adapter_convert(a.directory, &base, PAGE, path, &report, &fault), STATUS_IO);
    assert_non_null(strstr(fault.text, "renaming"));
    base.hidden = 65536; // rows of 128 KiB
    tool_adapter_begin(&a, *state);
    a.count = 0;
    tool_config(&a, "\"target_modules\": [\"layers.0.self_attn.q_proj\"]");
    tool_pair_add(&a, "layers.0.self_attn.q_proj", 4, 65536, 64);
    tool_adapter_write(&a);
    assert_int_equal(adapter_convert(a.directory, &base, PAGE, path, &report, &fault),
                     STATUS_UNSUPPORTED);
    assert_non_null(strstr(fault.text, "a row of 131072 bytes does not fit a page of 4096"));
    (void)snprintf(store_path, sizeof store_path, "%s/store.adapter", (char *)*state);
}

static int setup(void **state)
{
    *state = tool_scratch();
    (void)snprintf(store_path, sizeof store_path, "%s/store.adapter", (char *)*state);
    return 0;
}

static int teardown(void **state)
{
    tool_scratch_remove(*state);
    return 0;
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_adapters_names),
        cmocka_unit_test(test_adapters_config_refused),
        cmocka_unit_test(test_adapters_config_ignored_is_listed),
        cmocka_unit_test(test_adapters_config_ignored_list_ends),
        cmocka_unit_test(test_adapters_keys_refused),
        cmocka_unit_test(test_adapters_mismatch_refused),
        cmocka_unit_test(test_adapters_values_refused),
        cmocka_unit_test(test_adapters_fused_refused),
        cmocka_unit_test(test_adapters_fused_order_by_version),
        cmocka_unit_test(test_adapters_experts_partly_missing),
        cmocka_unit_test(test_adapters_stacked),
        cmocka_unit_test(test_adapters_files_refused),
        cmocka_unit_test(test_adapters_store_cannot_be_written),
    };
    return cmocka_run_group_tests_name("adapters", tests, setup, teardown);
}
