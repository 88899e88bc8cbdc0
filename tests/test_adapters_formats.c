// SPDX-License-Identifier: Apache-2.0
// The formats of PEFT field by field: what adapter_config.json may say and what comes of it
// (applied, ignored and listed, refused by name), how targets are written, the layouts and orders
// of experts, and what the report says. Numbers against PEFT: test_adapters_golden.c.
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <setjmp.h>
#include <cmocka.h>

#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "adapters/peft.h"
#include "base/rng.h"
#include "tests/test_adapters_tool.h"

enum { PAGE = 4096 };

static char store_path[TOOL_PATH + 64];

static enum status convert(const struct tool_adapter *adapter, const struct adapter_base *base,
                           struct adapter_report *report, struct fault *fault)
{
    *fault = (struct fault){.text = ""};
    tool_adapter_write(adapter);
    return adapter_convert(adapter->directory, base, PAGE, store_path, report, fault);
}

static void expect(const struct tool_adapter *adapter, const struct adapter_base *base,
                   enum status want, const char *text)
{
    struct adapter_report report;
    struct fault fault;
    enum status status = convert(adapter, base, &report, &fault);
    if (status != want || !strstr(fault.text, text))
        fail_msg("%s: %s \"%s\", wanted %s \"%s\"", adapter->config, status_code(status),
                 fault.text, status_code(want), text);
    assert_int_not_equal(access(store_path, F_OK), 0); // nothing was left behind
}

static void expect_good(const struct tool_adapter *adapter, const struct adapter_base *base,
                        const char *layout, const char *ignored, uint32_t applied)
{
    struct adapter_report report;
    struct fault fault;
    if (convert(adapter, base, &report, &fault))
        fail_msg("%s: %s", adapter->config, fault.text);
    assert_string_equal(report.layout, layout);
    assert_string_equal(report.ignored, ignored);
    assert_int_equal(report.matrices_applied, applied);
    assert_int_equal(unlink(store_path), 0);
}

// An adapter with this configuration and no tensor yet.
static void begin(struct tool_adapter *adapter, const char *scratch, const char *rest)
{
    tool_adapter_begin(adapter, scratch);
    adapter->count = 0;
    tool_config(adapter, rest);
}

// Both layers are mixtures: hidden 64, 24 units, 4 experts.
static struct adapter_base moe_base(void)
{
    static const uint8_t is_moe[2] = {1, 1};
    struct adapter_base base = tool_base(DTYPE_F32);
    base.is_moe = is_moe;
    return base;
}

// ---- the layout text ----

// Every combination fits the field of the store header, and no fact is lost at its end.
static void test_adapters_formats_layout_is_whole(void **state)
{
    size_t longest = 0;
    (void)state;
    for (unsigned bits = 0; bits < 512; bits++) {
        struct peft_reading reading = {.has_attention = bits & 1,
                                       .has_dense = (bits & 2) != 0,
                                       .has_single = (bits & 4) != 0,
                                       .has_stacked = (bits & 8) != 0,
                                       .has_fused = (bits & 16) != 0,
                                       .is_transposed = (bits & 32) != 0,
                                       .is_by_version = (bits & 64) != 0,
                                       .has_embed = (bits & 128) != 0,
                                       .has_head = (bits & 256) != 0};
        int layouts = reading.has_single + reading.has_stacked + reading.has_fused;
        const struct {
            bool there;
            const char *word;
        } facts[] = {{reading.has_attention, "attention"},
                     {reading.has_dense, "dense"},
                     {reading.has_single && layouts == 1, "per-expert"},
                     {reading.has_stacked && layouts == 1, "stacked"},
                     {reading.has_fused && layouts == 1, "fused"},
                     {layouts > 1, "mixed"},
                     {reading.has_embed, "embed"},
                     {reading.has_head, "head"},
                     {reading.is_transposed, "transposed"},
                     {reading.is_by_version, "by version"}};
        char text[ADAPTER_LAYOUT_BYTES], want[160] = "";
        // A store can hold by-version orders of fused experts only: stacked ones are proved.
        if (reading.is_by_version && !reading.has_fused)
            continue;
        for (size_t i = 0; i < sizeof facts / sizeof *facts; i++)
            if (facts[i].there)
                (void)snprintf(want + strlen(want), sizeof want - strlen(want), "%s%s",
                               *want ? ", " : "", facts[i].word);
        memset(text, 'x', sizeof text);
        peft__layout_text(&reading, text);
        assert_non_null(memchr(text, 0, sizeof text));
        assert_string_equal(text, want);
        longest = strlen(text) > longest ? strlen(text) : longest;
    }
    assert_true(longest <= ADAPTER_LAYOUT_BYTES - 1);
}

// The longest text on the way through a conversion: gate_up_proj is square (2I = H) and alone.
static void test_adapters_formats_longest_layout_is_stored(void **state)
{
    struct tool_adapter a;
    struct adapter_base base = tool_base(DTYPE_F32);
    base.moe_intermediate = 32;
    tool_adapter_begin(&a, *state);
    tool_config(&a, "\"target_modules\": [\"q_proj\", \"v_proj\", \"layers.0.mlp.up_proj\"], "
                    "\"target_parameters\": [\"gate_up_proj\"]");
    tool_pair_add(&a, "layers.0.mlp.up_proj", 4, 64, 96);
    tool_pair_add(&a, "layers.1.mlp.experts", 16, 64, 64);
    expect_good(&a, &base, "attention, dense, fused, transposed, by version", "", 5 + 8);
}

// ---- targets written as a text ----

static void test_adapters_formats_regex_text(void **state)
{
    static const char text[] = "\"target_modules\": \".*layers\\\\.0\\\\..*(q|up)_proj\"";
    struct adapter_base base = tool_base(DTYPE_F32);
    struct tool_adapter a;
    begin(&a, *state, text);
    tool_pair_add(&a, "layers.0.self_attn.q_proj", 4, 64, 64);
    expect(&a, &base, STATUS_INVALID,
           "targets model.layers.0.mlp.up_proj, but the file has no LoRA for it");
    tool_pair_add(&a, "layers.0.mlp.up_proj", 4, 64, 96);
    expect_good(&a, &base, "attention, dense", "", 2);
    tool_pair_add(&a, "layers.1.self_attn.q_proj", 4, 64, 64); // another layer
    expect(&a, &base, STATUS_INVALID,
           "LoRA for model.layers.1.self_attn.q_proj, which adapter_config.json does not target");
    begin(&a, *state, "\"target_modules\": \"q_proj\""); // a full match, so that it matches nothing
    tool_pair_add(&a, "layers.0.self_attn.q_proj", 4, 64, 64);
    expect(&a, &base, STATUS_INVALID,
           "LoRA for model.layers.0.self_attn.q_proj, which adapter_config.json does not target");
    begin(&a, *state, "\"target_modules\": \".*(q|v)_proj\", \"exclude_modules\": \".*v_proj\"");
    tool_pair_add(&a, "layers.0.self_attn.q_proj", 4, 64, 64);
    tool_pair_add(&a, "layers.1.self_attn.q_proj", 4, 64, 64);
    expect_good(&a, &base, "attention", "", 2);
}

// Every linear module of attention and dense MLPs, in any case of letters; experts when the file
// has them, because on transformers 5 they are no linear modules.
static void test_adapters_formats_all_linear_text(void **state)
{
    static const char *const texts[] = {"all-linear", "All-Linear"};
    struct adapter_base base = tool_base(DTYPE_F32);
    for (size_t i = 0; i < 2; i++) {
        struct tool_adapter a;
        char rest[80];
        (void)snprintf(rest, sizeof rest, "\"target_modules\": \"%s\"", texts[i]);
        tool_adapter_begin(&a, *state); // q_proj and v_proj of both layers
        tool_config(&a, rest);
        for (int layer = 0; layer < 2; layer++)
            for (int m = 0; m < 2; m++) {
                char module[64];
                (void)snprintf(module, sizeof module, "layers.%d.self_attn.%s_proj", layer,
                               m ? "o" : "k");
                tool_pair_add(&a, module, 4, 64, m ? 64 : 32);
            }
        tool_pair_add(&a, "layers.0.mlp.gate_proj", 4, 64, 96);
        tool_pair_add(&a, "layers.0.mlp.up_proj", 4, 64, 96);
        expect(&a, &base, STATUS_INVALID,
               "targets model.layers.0.mlp.down_proj, but the file has no LoRA for it");
        tool_pair_add(&a, "layers.0.mlp.down_proj", 4, 96, 64);
        expect_good(&a, &base, "attention, dense", "", 11);
        tool_pair_add(&a, "layers.1.mlp.experts.2.up_proj", 4, 64, 24); // one of four
        expect(&a, &base, STATUS_INVALID,
               "targets model.layers.1.mlp.experts.0.gate_proj, but the file has no LoRA");
    }
}

// ---- fields of adapter_config.json ----

// Each alone beside a good configuration: the adapter is converted, and the field is listed.
static void test_adapters_formats_ignored_fields(void **state)
{
    static const struct {
        const char *field, *listed;
    } fields[] = {
        {"\"lora_dropout\": 0.1", "lora_dropout"},
        {"\"task_type\": \"CAUSAL_LM\"", "task_type"},
        {"\"auto_mapping\": {\"a\": 1}", "auto_mapping"},
        {"\"megatron_config\": {\"a\": 1}", "megatron_config"},
        {"\"megatron_core\": \"megatron.core\"", "megatron_core"},
        {"\"loftq_config\": {\"loftq_bits\": 4}", "loftq_config"},
        {"\"eva_config\": {\"rho\": 2.0}", "eva_config"},
        {"\"corda_config\": {\"verbose\": true}", "corda_config"},
        {"\"lora_ga_config\": {\"scale\": \"stable\"}", "lora_ga_config"},
        {"\"velora_config\": {\"num_groups\": 32}", "velora_config"},
        {"\"runtime_config\": {\"ephemeral_gpu_offload\": true}", "runtime_config"},
        {"\"qalora_group_size\": 16", "qalora_group_size"},
        {"\"inference_mode\": true", "inference_mode"},
        {"\"revision\": \"main\"", "revision"},
        {"\"base_model_name_or_path\": \"x/y\"", "base_model_name_or_path"},
        {"\"rank_pattern\": {\"q_proj\": 4, \"up_proj\": 2}", "rank_pattern:up_proj"},
        {"\"alpha_pattern\": {\"layers.9.*\": 4}", "alpha_pattern:layers.9.*"},
        {"\"ensure_weight_tying\": true", "ensure_weight_tying"},
        {"\"fan_in_fan_out\": true", "fan_in_fan_out"},
        {"\"bias\": \"all\"", "bias"},
        {"\"bias\": \"lora_only\"", "bias"},
        {"\"init_lora_weights\": \"gaussian\"", "init_lora_weights"},
        {"\"init_lora_weights\": \"eva\"", "init_lora_weights"},
        {"\"init_lora_weights\": \"orthogonal\"", "init_lora_weights"},
        {"\"layers_to_transform\": [], \"layers_pattern\": \"layers\"", "layers_pattern"},
        {"\"target_parameters\": [\"gate.weight\"]", "target_parameters:gate.weight"},
        {"\"of_a_newer_peft\": [1]", "of_a_newer_peft"},
        // not set, or said otherwise: not listed
        {"\"fan_in_fan_out\": false", ""},
        {"\"bias\": \"none\"", ""},
        {"\"init_lora_weights\": true", ""},
        {"\"layers_to_transform\": null, \"layers_pattern\": []", ""},
        {"\"peft_version\": \"0.21.2\", \"inference_mode\": false, \"revision\": null", ""},
    };
    struct adapter_base base = tool_base(DTYPE_F32);
    for (size_t i = 0; i < sizeof fields / sizeof *fields; i++) {
        struct tool_adapter a;
        char rest[256];
        (void)snprintf(rest, sizeof rest, "\"target_modules\": [\"q_proj\", \"v_proj\"], %s",
                       fields[i].field);
        tool_adapter_begin(&a, *state);
        tool_config(&a, rest);
        expect_good(&a, &base, "attention", fields[i].listed, 4);
    }
}

// Each alone: refused with its name, and with what to do. Values and types: test_adapters.c.
static void test_adapters_formats_refused_fields(void **state)
{
    static const struct {
        const char *field, *name;
    } fields[] = {
        {"\"use_dora\": true", "use_dora"},
        {"\"modules_to_save\": [\"norm\"]", "modules_to_save"},
        {"\"lora_bias\": true", "lora_bias"},
        {"\"layer_replication\": [[0, 2]]", "layer_replication"},
        {"\"use_qalora\": true", "use_qalora"},
        {"\"alora_invocation_tokens\": [1]", "alora_invocation_tokens"},
        {"\"trainable_token_indices\": {\"embed_tokens\": [1]}", "trainable_token_indices"},
        {"\"use_bdlora\": {\"nblocks\": 2}", "use_bdlora"},
        {"\"arrow_config\": {\"top_k\": 2}", "arrow_config"},
        {"\"kasa_config\": {\"beta\": 1}", "kasa_config"},
        {"\"monteclora_config\": {\"num_samples\": 1}", "monteclora_config"},
    };
    struct adapter_base base = tool_base(DTYPE_F32);
    for (size_t i = 0; i < sizeof fields / sizeof *fields; i++) {
        struct tool_adapter a;
        char rest[256], text[80];
        (void)snprintf(rest, sizeof rest, "\"target_modules\": [\"q_proj\", \"v_proj\"], %s",
                       fields[i].field);
        tool_adapter_begin(&a, *state);
        tool_config(&a, rest);
        (void)snprintf(text, sizeof text, "adapter_config.json: %s is set: ", fields[i].name);
        expect(&a, &base, STATUS_UNSUPPORTED, text);
        expect(&a, &base, STATUS_UNSUPPORTED, "Train the adapter without it.");
    }
}

// bias "all" is harmless as long as the file has none; PEFT saves those that the base has.
static void test_adapters_formats_bias_in_file(void **state)
{
    struct adapter_base base = tool_base(DTYPE_F32);
    struct tool_adapter a;
    tool_adapter_begin(&a, *state);
    tool_config(&a, "\"target_modules\": [\"q_proj\", \"v_proj\"], \"bias\": \"all\"");
    tool_tensor_add(&a, "base_model.model.model.layers.0.self_attn.q_proj.base_layer.bias", 1, 64,
                    0, 0);
    expect(&a, &base, STATUS_UNSUPPORTED,
           "q_proj.base_layer.bias\": biases are not supported; train with bias=\"none\"");
}

// What layers_to_transform chooses: the layer, or before 0.20 and without layers_pattern the
// expert.
static void test_adapters_formats_layers(void **state)
{
    static const struct {
        const char *rest;
        bool chooses_expert;
    } cases[] = {
        {"", true}, // older than 0.18
        {", \"peft_version\": \"0.19.1\"", true},
        {", \"peft_version\": \"0.20.0\"", false},
        {", \"peft_version\": \"1.0.0\"", false},
        {", \"layers_pattern\": \"layers\"", false},
        {", \"layers_pattern\": [\"blocks\", \"layers\"]", false},
    };
    struct adapter_base base = moe_base();
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        struct tool_adapter a;
        char rest[200];
        (void)snprintf(
            rest, sizeof rest,
            "\"target_modules\": [\"up_proj\", \"q_proj\"], \"layers_to_transform\": 1%s",
            cases[i].rest);
        begin(&a, *state, rest);
        tool_pair_add(&a, "layers.1.self_attn.q_proj", 4, 64, 64);
        for (int n = 0; n < (cases[i].chooses_expert ? 2 : 4); n++) {
            char module[64];
            (void)snprintf(module, sizeof module, "layers.%d.mlp.experts.%d.up_proj",
                           cases[i].chooses_expert ? n : 1, cases[i].chooses_expert ? 1 : n);
            tool_pair_add(&a, module, 4, 64, 24);
        }
        expect_good(&a, &base, "attention, per-expert", "", cases[i].chooses_expert ? 3 : 5);
    }
    struct tool_adapter a; // it is of target_modules alone
    begin(&a, *state,
          "\"target_parameters\": [\"gate_up_proj\"], \"layers_to_transform\": [0], "
          "\"layers_pattern\": \"layers\"");
    tool_pair_add(&a, "layers.0.mlp.experts", 16, 64, 48);
    tool_pair_add(&a, "layers.1.mlp.experts", 16, 64, 48);
    expect_good(&a, &base, "fused", "layers_to_transform, layers_pattern", 16);
}

// ---- stacked experts ----

// lora_A and lora_B of layers.LAYER.mlp.experts.WORD, 3-D; the sides named in `transposed` stand
// the other way round.
static void stack_add(struct tool_adapter *adapter, int layer, const char *word, uint64_t rank,
                      uint64_t d_in, uint64_t d_out, const char *transposed)
{
    const uint64_t dims[2][2] = {{rank, d_in}, {d_out, rank}};
    for (int side = 0; side < 2; side++) {
        char name[160];
        bool turned = strchr(transposed, "AB"[side]) != NULL;
        (void)snprintf(name, sizeof name,
                       "base_model.model.model.layers.%d.mlp.experts.%s.lora_%c.weight", layer,
                       word, "AB"[side]);
        tool_tensor_add(adapter, name, 3, 4, dims[side][turned], dims[side][!turned]);
    }
}

// A stacked tensor in one layer excuses no other layer and no other module.
static void test_adapters_formats_stacked_missing_by_layer(void **state)
{
    static const char modules[] = "\"target_modules\": [\"gate_up_proj\", \"experts.down_proj\"]";
    static const char parameters[] =
        "\"target_parameters\": [\"gate_up_proj\", \"experts.down_proj\"]";
    struct adapter_base base = moe_base();
    struct tool_adapter a;
    for (int form = 0; form < 2; form++) {
        begin(&a, *state, form ? parameters : modules);
        stack_add(&a, 0, "gate_up_proj", 4, 64, 48, "");
        stack_add(&a, 0, "down_proj", 4, 24, 64, "");
        stack_add(&a, 1, "gate_up_proj", 4, 64, 48, "");
        expect(&a, &base, STATUS_INVALID,
               form ? "names model.layers.1.mlp.experts.down_proj, but the file has no LoRA for it"
                    : "targets model.layers.1.mlp.experts.down_proj, but the file has no LoRA");
        a.count -= 2; // no tensor of layer 1 is left
        expect(&a, &base, STATUS_INVALID,
               form ? "names model.layers.1.mlp.experts.gate_up_proj, but the file has no LoRA"
                    : "targets model.layers.1.mlp.experts.gate_up_proj, but the file has no LoRA");
        stack_add(&a, 1, "gate_up_proj", 4, 64, 48, "");
        stack_add(&a, 1, "down_proj", 4, 24, 64, "");
        expect_good(&a, &base, "stacked", "", 2 * 12);
    }
    // the words of experts one by one; layer 1 is not targeted
    begin(&a, *state,
          "\"target_modules\": [\"up_proj\", \"gate_proj\"], \"layers_to_transform\": 0, "
          "\"peft_version\": \"0.20.0\"");
    stack_add(&a, 0, "gate_proj", 4, 64, 24, "");
    expect(&a, &base, STATUS_INVALID,
           "targets model.layers.0.mlp.experts.up_proj, but the file has no LoRA for it");
    stack_add(&a, 0, "up_proj", 4, 64, 24, "");
    expect_good(&a, &base, "stacked", "", 8);
    // a stacked layer beside one with a matrix per expert, one of which is missing
    begin(&a, *state, "\"target_modules\": [\"up_proj\"]");
    stack_add(&a, 0, "up_proj", 4, 64, 24, "");
    for (int e = 0; e < 4; e++) {
        char module[64];
        if (e == 3)
            expect(&a, &base, STATUS_INVALID,
                   "targets model.layers.1.mlp.experts.3.up_proj, but the file has no LoRA");
        (void)snprintf(module, sizeof module, "layers.1.mlp.experts.%d.up_proj", e);
        tool_pair_add(&a, module, 4, 64, 24);
    }
    expect_good(&a, &base, "mixed", "", 8);
    // no expert at all: such names match nothing on transformers 5
    tool_adapter_begin(&a, *state);
    tool_config(&a,
                "\"target_modules\": [\"q_proj\", \"v_proj\", \"gate_up_proj\", \"down_proj\"]");
    expect_good(&a, &base, "attention",
                "target_modules:experts.down_proj, target_modules:experts.gate_up_proj", 4);
}

// Element (rank row, dimension) of one expert's A or B^T as the store has it.
static void stacked_compare(const struct tool_adapter *adapter, const struct adapter_base *base)
{
    struct adapter_report report;
    struct fault fault = {.text = ""};
    struct tool_rig rig;
    adapter_id id;
    tool_adapter_write(adapter);
    assert_int_equal(adapter_convert(adapter->directory, base, 32768, store_path, &report, &fault),
                     STATUS_OK);
    tool_rig_make(&rig, base, 32768, 8, 8, 2);
    assert_int_equal(adapter_register(rig.adapters, "s", store_path, 0, &id, &fault), STATUS_OK);
    tool_rig_bring(&rig, id);
    const struct lora_adapter_view *view =
        &adapters_views(rig.adapters)[adapter_view_index(rig.adapters, id)];
    const struct lora_pair *up = lora_pair_at(view, 0, LORA_UP, 3);
    const bool a_turned = adapter->tensors[0].shape[1] != 4,
               b_turned = adapter->tensors[1].shape[1] == 4;
    // The generator's element n is rng_uniform(seed, 1, n) - 0.5; up of expert 3 is 24.. of 48 out.
    for (uint32_t j = 0; j < 4; j++)
        for (uint32_t i = 0; i < 24; i++) {
            uint64_t in_a = a_turned ? i * 4 + j : j * 64 + i, out = 24 + i;
            uint64_t in_b = b_turned ? j * 48 + out : out * 4 + j;
            assert_true(tool_element(&rig, base, view, &up->a, j, i) ==
                        rng_uniform(adapter->seed, 1, 3 * 64 * 4 + in_a) - 0.5f);
            assert_true(tool_element(&rig, base, view, &up->b, j, i) ==
                        rng_uniform(adapter->seed, 1, 4 * 64 * 4 + 3 * 48 * 4 + in_b) - 0.5f);
        }
    tool_rig_clear(&rig);
    assert_int_equal(unlink(store_path), 0);
}

static void test_adapters_formats_stacked_orders(void **state)
{
    static const char *const turned[] = {"", "A", "B", "AB"};
    static const char gate_up[] =
        "\"target_modules\": [\"gate_up_proj\"], \"layers_to_transform\": [0]";
    struct adapter_base base = moe_base();
    struct tool_adapter a;
    for (size_t i = 0; i < 4; i++) {
        begin(&a, *state, gate_up);
        stack_add(&a, 0, "gate_up_proj", 4, 64, 48, turned[i]);
        expect_good(&a, &base, i ? "stacked, transposed" : "stacked", "", 8);
        stacked_compare(&a, &base);
    }
    begin(&a, *state, "\"target_modules\": [\"gate_up_proj\"]"); // two orders in one file
    stack_add(&a, 0, "gate_up_proj", 4, 64, 48, "AB");
    stack_add(&a, 1, "gate_up_proj", 4, 64, 48, "B");
    expect(&a, &base, STATUS_INVALID,
           "layers.1.mlp.experts.gate_up_proj.lora_A.weight\" stands in another order");
    // rank 48 = 2I: lora_B is square, and nothing else in the file has a lora_B
    begin(&a, *state,
          "\"target_modules\": [\"gate_up_proj\"], \"rank_pattern\": {\"gate_up_proj\": 48}");
    stack_add(&a, 0, "gate_up_proj", 48, 64, 48, "");
    stack_add(&a, 1, "gate_up_proj", 48, 64, 48, "");
    expect(&a, &base, STATUS_INVALID, "their shapes do not prove the order of lora_B");
    begin(&a, *state, // down_proj proves it
          "\"target_modules\": [\"gate_up_proj\", \"experts.down_proj\"], "
          "\"layers_to_transform\": 0, \"rank_pattern\": {\"gate_up_proj\": 48}");
    stack_add(&a, 0, "gate_up_proj", 48, 64, 48, "AB");
    stack_add(&a, 0, "down_proj", 4, 24, 64, "AB");
    expect_good(&a, &base, "stacked, transposed", "", 12);
    begin(&a, *state, gate_up); // neither order
    stack_add(&a, 0, "gate_up_proj", 4, 64, 40, "");
    expect(&a, &base, STATUS_INVALID,
           "is not [4, 4, 64] with a lora_B of [4, 48, 4], nor the transposed of these");
    begin(&a, *state, gate_up);
    stack_add(&a, 0, "gate_up_proj", 4, 64, 48, "");
    a.count--;
    expect(&a, &base, STATUS_INVALID, "experts.gate_up_proj has lora_A but no lora_B");
    begin(&a, *state, "\"target_modules\": [\"experts.down_proj\"]");
    stack_add(&a, 0, "gate_up_proj", 4, 64, 48, "");
    expect(&a, &base, STATUS_INVALID,
           "LoRA for model.layers.0.mlp.experts.gate_up_proj, which adapter_config.json does not");
}

// ---- what PEFT writes and the server refuses ----

#define REFUSED POLDER_SOURCE_DIR "/tests/golden/adapters_refused"

// Files of PEFT (tools/goldens/adapters.py). Where a field of the configuration is refused, the
// same file with that field under another name, so that the tensors themselves are refused too.
static const struct {
    const char *name, *text, *field, *text_of_tensor;
} written[] = {
    {"dora", "use_dora is set: DoRA is not supported", "use_dora",
     "lora_magnitude_vector\": DoRA is not supported; train with use_dora=False"},
    {"modules-to-save", "modules_to_save is set: whole modules", "modules_to_save",
     "lm_head.weight\" is a whole matrix that is not known"},
    {"lora-bias", "lora_bias is set: biases are not supported", "lora_bias",
     "lora_B.bias\": biases are not supported"},
    {"trained-tokens", "trainable_token_indices is set: trained tokens", "trainable_token_indices",
     "trainable_tokens_delta\": trained tokens are not supported"},
    {"embeddings-base", "embed_tokens.base_layer.weight\" is a whole matrix", NULL, NULL},
    {"embeddings-whole", " is a whole matrix that is not known", NULL, NULL},
    {"router", "LoRA on the router is not supported; train without mlp.gate", NULL, NULL},
    {"shared-experts", "this base model has no shared experts", NULL, NULL},
};

static void copy_with(const char *from, const char *to, const char *field)
{
    char path[TOOL_PATH + 320];
    size_t bytes;
    (void)snprintf(path, sizeof path, "%s/adapter_model.safetensors", from);
    void *weights = tool_file_read(path, &bytes);
    (void)snprintf(path, sizeof path, "%s/adapter_model.safetensors", to);
    tool_file_write(path, weights, bytes);
    free(weights);
    (void)snprintf(path, sizeof path, "%s/adapter_config.json", from);
    char *config = tool_file_read(path, &bytes);
    char *at = field ? memmem(config, bytes, field, strlen(field)) : NULL;
    assert_true(!field || at);
    if (at)
        *at = 'x'; // an unknown field
    (void)snprintf(path, sizeof path, "%s/adapter_config.json", to);
    tool_file_write(path, config, bytes);
    free(config);
}

static void test_adapters_formats_refused_files(void **state)
{
    static const uint8_t dense[3] = {0, 0, 0}, moe[3] = {1, 0, 1};
    for (size_t i = 0; i < sizeof written / sizeof *written; i++) {
        struct adapter_base base = tool_base(DTYPE_F32);
        char from[300];
        base.layers = 3;
        base.is_moe = strcmp(written[i].name, "router") == 0 ? moe : dense;
        (void)snprintf(from, sizeof from, "%s/%s", REFUSED, written[i].name);
        for (int renamed = 0; renamed <= (written[i].field != NULL); renamed++) {
            struct tool_adapter a;
            struct adapter_report report;
            struct fault fault = {.text = ""};
            const char *want = renamed ? written[i].text_of_tensor : written[i].text;
            tool_adapter_begin(&a, *state);
            copy_with(from, a.directory, renamed ? written[i].field : NULL);
            enum status status =
                adapter_convert(a.directory, &base, PAGE, store_path, &report, &fault);
            if (status != STATUS_UNSUPPORTED || !strstr(fault.text, want))
                fail_msg("%s: %s \"%s\", wanted \"%s\"", written[i].name, status_code(status),
                         fault.text, want);
            (void)printf("%-16s %s\n", written[i].name, fault.text);
        }
    }
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
        cmocka_unit_test(test_adapters_formats_layout_is_whole),
        cmocka_unit_test(test_adapters_formats_longest_layout_is_stored),
        cmocka_unit_test(test_adapters_formats_regex_text),
        cmocka_unit_test(test_adapters_formats_all_linear_text),
        cmocka_unit_test(test_adapters_formats_ignored_fields),
        cmocka_unit_test(test_adapters_formats_refused_fields),
        cmocka_unit_test(test_adapters_formats_bias_in_file),
        cmocka_unit_test(test_adapters_formats_layers),
        cmocka_unit_test(test_adapters_formats_stacked_missing_by_layer),
        cmocka_unit_test(test_adapters_formats_stacked_orders),
        cmocka_unit_test(test_adapters_formats_refused_files),
    };
    return cmocka_run_group_tests_name("adapters_formats", tests, setup, teardown);
}
