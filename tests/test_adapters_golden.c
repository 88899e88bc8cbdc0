// SPDX-License-Identifier: Apache-2.0
// Adapters as PEFT wrote them (tests/golden/adapters, made by tools/goldens/adapters.py):
// converted, registered, fetched through the pool, and read back by lora_row_at as the kernels do.
// scale * B A must be the change of the weight that PEFT itself computes, for every layout, order,
// pattern and writer.
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <setjmp.h>
#include <cmocka.h>

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "adapters/peft.h"
#include "base/json.h"
#include "base/safetensors.h"
#include "tests/test_adapters_tool.h"

#define GOLDEN POLDER_SOURCE_DIR "/tests/golden/adapters"

// name, and the layout that the report must state
static const struct {
    const char *name, *layout;
} cases[] = {
    {"attention", "attention"},
    {"rank-1", "attention"},
    {"dense-all-linear", "attention, dense"},
    {"patterns", "attention, dense"},
    {"rslora", "attention, dense"},
    {"regex", "attention"},
    {"layers", "attention, dense"},
    {"exclude", "attention, dense"},
    {"fused", "attention, fused"},
    {"fused-reversed", "fused"},
    {"fused-ranks", "attention, fused"},
    {"fused-gate-up", "fused"},
    {"fused-down", "fused"},
    {"fused-square-gate-up", "fused, by version"},
    {"fused-square-both", "attention, fused"},
    {"fused-square-down", "fused, by version"},
    {"converted", "attention, fused"},
    {"old-fused", "attention, fused, transposed"},
    {"old-fused-down", "fused, transposed"},
    {"old-fused-square-gate-up", "fused, transposed, by version"},
    {"old-fused-square-both", "fused, transposed"},
    {"old-fused-square-down", "fused, transposed, by version"},
    {"per-expert", "attention, dense, per-expert"},
    {"per-expert-ranks", "dense, per-expert"},
    {"regex-text", "attention, dense"},
    {"old-regex-text", "attention"},
    {"regex-per-expert", "attention, per-expert"},
    {"all-linear-text", "attention, dense"},
    {"stacked", "attention, stacked"},
    {"stacked-transposed", "stacked, transposed"},
    {"stacked-words", "stacked"},
    {"layers-plain", "attention, dense"},
    {"layers-per-expert", "dense, per-expert"},
    {"no-effect", "attention"},
    {"embed", "attention, embed"},
    {"head", "head"},
    {"embed-head-text", "attention, embed, head"},
    {"tied", "attention, embed, head"},
    {"tied-embed", "embed"},
    {"tied-both-head", "embed, head"},
    {"embed-head-base", "dense, embed, head"},
    {"tied-both", "attention, embed, head"},
};

struct golden {
    struct adapter_base base;
    uint8_t is_moe[16];
    char writer[100];
    uint32_t applied;
    struct reader *reader;
    struct safetensors *file;
};

static bool flag(const struct json *root, const char *key)
{
    bool value = false;
    (void)json_as_bool(json_find(root, key), &value);
    return value;
}

static uint32_t field(const struct json *root, const char *key)
{
    uint32_t value = 0;
    (void)json_as_u32(json_find(root, key), &value);
    return value;
}

static struct digest weights_digest(const char *directory, const char *name)
{
    struct reader *reader;
    struct safetensors *file;
    struct digest out = {.bytes = {0}};
    assert_int_equal(reader_open_in(directory, "model.safetensors", &reader, NULL), STATUS_OK);
    assert_int_equal(safetensors_open(reader, directory, &file, NULL), STATUS_OK);
    const struct tensor *tensor = safetensors_find(file, name);
    if (tensor)
        assert_int_equal(
            safetensors_digest(file, tensor, name, tensor->type, NULL, NULL, &out, NULL),
            STATUS_OK);
    safetensors_close(file);
    reader_close(reader);
    return out;
}

static void base_read(struct golden *golden, const char *name, enum dtype dtype)
{
    char directory[512], *text;
    size_t bytes;
    struct json *root;
    (void)snprintf(directory, sizeof directory, "%s/%s", GOLDEN, name);
    assert_int_equal(reader_slurp_in(directory, "config.json", 1 << 20, &text, &bytes, NULL),
                     STATUS_OK);
    assert_int_equal(json_parse("config.json", text, bytes, NULL, &root, NULL), STATUS_OK);
    golden->base = (struct adapter_base){.layers = field(root, "num_hidden_layers"),
                                         .hidden = field(root, "hidden_size"),
                                         .heads = field(root, "num_attention_heads"),
                                         .kv_heads = field(root, "num_key_value_heads"),
                                         .head_dim = field(root, "head_dim"),
                                         .intermediate = field(root, "intermediate_size"),
                                         .experts = field(root, "num_local_experts"),
                                         .moe_intermediate = field(root, "moe_intermediate_size"),
                                         .vocab = field(root, "vocab_size"),
                                         .tied = flag(root, "tie_word_embeddings"),
                                         .is_moe = golden->is_moe,
                                         .dtype = dtype};
    memset(golden->is_moe, golden->base.experts != 0, sizeof golden->is_moe);
    const struct json *dense = json_find(root, "mlp_only_layers");
    for (size_t i = 0; i < json_count(dense); i++) {
        uint32_t layer;
        assert_true(json_as_u32(json_at(dense, i), &layer) && layer < 16);
        golden->is_moe[layer] = 0;
    }
    json_free(root);
    free(text);
    golden->base.embedding_weights = weights_digest(directory, "model.embed_tokens.weight");
    golden->base.head_weights = weights_digest(directory, "lm_head.weight");
}

static void golden_open(struct golden *golden, const char *name, enum dtype dtype)
{
    char path[512];
    struct fault fault;
    (void)snprintf(path, sizeof path, "%s/%s/golden.safetensors", GOLDEN, name);
    assert_int_equal(reader_open(path, &golden->reader, &fault), STATUS_OK);
    assert_int_equal(safetensors_open(golden->reader, path, &golden->file, &fault), STATUS_OK);
    const struct tensor *applied = safetensors_find(golden->file, "applied");
    const struct tensor *writer = safetensors_find(golden->file, "writer");
    assert_true(applied && applied->bytes == 4 && writer && writer->bytes < sizeof golden->writer);
    assert_int_equal(safetensors_read(golden->file, applied, 0, &golden->applied, 4, &fault),
                     STATUS_OK);
    assert_int_equal(
        safetensors_read(golden->file, writer, 0, golden->writer, writer->bytes, &fault),
        STATUS_OK);
    golden->writer[writer->bytes] = 0;
    base_read(golden, safetensors_metadata(golden->file, "base"), dtype);
}

static void golden_close(struct golden *golden)
{
    safetensors_close(golden->file);
    reader_close(golden->reader);
}

// "delta:model.layers.2.mlp.experts.3.gate_proj", "delta:lm_head"
static const struct lora_pair *pair_named(const struct lora_adapter_view *view, uint32_t layers,
                                          const char *name)
{
    static const char *const words[] = {"q_proj",    "k_proj",  "v_proj",   "o_proj",
                                        "gate_proj", "up_proj", "down_proj"};
    unsigned layer, expert = 0;
    if (strcmp(name, "delta:model.embed_tokens") == 0)
        return lora_pair_at(view, layers, LORA_EMBED, 0);
    if (strcmp(name, "delta:lm_head") == 0)
        return lora_pair_at(view, layers, LORA_HEAD, 0);
    const char *word = strrchr(name, '.') + 1, *experts = strstr(name, ".experts.");
    assert_int_equal(sscanf(name, "delta:model.layers.%u", &layer), 1);
    if (experts)
        assert_int_equal(sscanf(experts, ".experts.%u", &expert), 1);
    for (int m = 0; m < LORA_MODULES; m++)
        if (strcmp(word, words[m]) == 0)
            return lora_pair_at(view, layer, (enum lora_module)m, expert);
    fail_msg("no module in %s", name);
    return NULL;
}

// Largest |scale * B A - golden| over what rounding allows.
static double delta_compare(const struct tool_rig *rig, const struct golden *golden,
                            const struct lora_adapter_view *view, const struct tensor *tensor)
{
    const struct lora_pair *pair = pair_named(view, golden->base.layers, tensor->name);
    bool by_token = strcmp(tensor->name, "delta:model.embed_tokens") == 0;
    float *want = malloc(tensor->elements * sizeof *want);
    // two roundings to 8 bits
    double worst = 0, unit = golden->base.dtype == DTYPE_F32 ? 1e-6 : 1.01 / 128;
    assert_non_null(want);
    assert_int_equal(safetensors_read_f32(golden->file, tensor, 0, want, tensor->elements, NULL),
                     STATUS_OK);
    assert_true(pair->a.rank && pair->a.rank == pair->b.rank);
    uint32_t d_out = (uint32_t)tensor->shape[0], d_in = (uint32_t)tensor->shape[1];
    for (uint32_t i = 0; by_token && i < d_in; i++)
        assert_true(tool_padding_is_zero(rig, &golden->base, view, &pair->a, i, pair->a.rank));
    for (uint32_t j = 0; j < pair->a.rank; j++) {
        assert_true(by_token || tool_padding_is_zero(rig, &golden->base, view, &pair->a, j, d_in));
        assert_true(tool_padding_is_zero(rig, &golden->base, view, &pair->b, j, d_out));
    }
    for (uint32_t o = 0; o < d_out; o++)
        for (uint32_t i = 0; i < d_in; i++) {
            double sum = 0, size = 0;
            for (uint32_t j = 0; j < pair->a.rank; j++) {
                double a = tool_element(rig, &golden->base, view, &pair->a, by_token ? i : j,
                                        by_token ? j : i);
                double b = tool_element(rig, &golden->base, view, &pair->b, j, o);
                sum += a * b;
                size += fabs(a * b);
            }
            double off = fabs((double)pair->scale * sum - (double)want[o * d_in + i]);
            double allowed = unit * fabs((double)pair->scale) * size + 1e-7;
            assert_true(off == off);
            worst = fmax(worst, off / allowed);
        }
    free(want);
    return worst;
}

static void case_run(const char *name, const char *layout, enum dtype dtype, const char *scratch)
{
    struct golden golden = {.file = NULL};
    struct adapter_report report;
    struct fault fault = {.text = ""};
    struct tool_rig rig;
    char directory[512], store[512];
    double worst = 0;
    uint32_t deltas = 0;
    adapter_id id;
    golden_open(&golden, name, dtype);
    (void)snprintf(directory, sizeof directory, "%s/%s/adapter", GOLDEN, name);
    (void)snprintf(store, sizeof store, "%s/%s.adapter", scratch, name);
    if (adapter_convert(directory, &golden.base, 32768, store, &report, &fault))
        fail_msg("%s: %s", name, fault.text);
    assert_string_equal(report.layout, layout);
    assert_int_equal(report.matrices_applied, golden.applied);
    assert_int_equal(adapter_verify(store, &golden.base, 32768, &fault), STATUS_OK);
    tool_rig_make(&rig, &golden.base, 32768, 64, 64, 4);
    if (adapter_register(rig.adapters, name, store, 1, &id, &fault))
        fail_msg("%s: %s", name, fault.text);
    tool_rig_bring(&rig, id);
    assert_true(adapter_is_resident(rig.adapters, id));
    const struct lora_adapter_view *view =
        &adapters_views(rig.adapters)[adapter_view_index(rig.adapters, id)];
    for (size_t i = 0; i < safetensors_count(golden.file); i++) {
        const struct tensor *tensor = safetensors_at(golden.file, i);
        if (strncmp(tensor->name, "delta:", 6) != 0)
            continue;
        double off = delta_compare(&rig, &golden, view, tensor);
        if (off > 1)
            fail_msg("%s, %s: off by %.3g of what rounding allows", name, tensor->name, off);
        worst = fmax(worst, off);
        deltas++;
    }
    (void)printf("%-26s %s %3u of %3u matrices, %u compared, worst %.2f of the bound; %s; %s\n",
                 name, dtype == DTYPE_F32 ? "f32 " : "bf16", report.matrices_applied,
                 report.matrices_possible, deltas, worst, report.layout, golden.writer);
    assert_true(deltas > 0);
    tool_rig_clear(&rig);
    golden_close(&golden);
}

static void test_adapters_golden_f32(void **state)
{
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++)
        case_run(cases[i].name, cases[i].layout, DTYPE_F32, *state);
}

static void test_adapters_golden_bf16(void **state)
{
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++)
        case_run(cases[i].name, cases[i].layout, DTYPE_BF16, *state);
}

// What PEFT's own functions answer about names, in a file of `configurations` times `names`
// questions.
static void matching_run(const char *file, size_t configurations, size_t names)
{
    char *text;
    size_t bytes, asked = 0;
    struct json *root;
    struct fault fault;
    assert_int_equal(reader_slurp_in(GOLDEN "/..", file, 1 << 20, &text, &bytes, NULL), STATUS_OK);
    assert_int_equal(json_parse(file, text, bytes, NULL, &root, &fault), STATUS_OK);
    for (size_t i = 0; i < json_count(root); i++) {
        const struct json *answers = json_find(json_at(root, i), "answers");
        const char *settings;
        struct peft_config config;
        assert_true(json_as_string(json_find(json_at(root, i), "config"), &settings));
        if (peft__config_parse(settings, strlen(settings), &config, &fault))
            fail_msg("%s: %s", settings, fault.text);
        for (size_t n = 0; n < json_count(answers); n++, asked++) {
            const struct json *answer = json_at(answers, n);
            const char *name;
            bool targeted;
            uint32_t rank;
            double scale;
            assert_true(json_as_string(json_at(answer, 0), &name));
            assert_true(json_as_bool(json_at(answer, 1), &targeted));
            assert_true(json_as_u32(json_at(answer, 2), &rank));
            assert_true(json_as_double(json_at(answer, 3), &scale));
            bool is_parameter = strstr(name, "gate_up_proj") || strstr(name, "experts.down_proj");
            if ((is_parameter ? peft__config_targets_parameter(&config, name)
                              : peft__config_targets(&config, name)) != targeted)
                fail_msg("%s: %s", settings, name);
            assert_int_equal(peft__config_rank(&config, name), rank);
            assert_true(peft__config_scale(&config, name, rank) == (float)scale);
        }
        peft__config_clear(&config);
    }
    assert_int_equal(asked, configurations * names);
    json_free(root);
    free(text);
}

static void test_adapters_golden_matching(void **state)
{
    (void)state;
    matching_run("adapters_names.json", 36, 86);
    matching_run("adapters_names_old.json", 4, 84); // by PEFT 0.18
}

static int setup(void **state)
{
    *state = tool_scratch();
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
        cmocka_unit_test(test_adapters_golden_f32),
        cmocka_unit_test(test_adapters_golden_bf16),
        cmocka_unit_test(test_adapters_golden_matching),
    };
    return cmocka_run_group_tests_name("adapters_golden", tests, setup, teardown);
}
