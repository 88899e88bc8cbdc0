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
#include <string.h>
#include <unistd.h>

#include "adapters/peft.h"
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

// ---- the layout text ----

// Every combination fits the field of the store header, and no fact is lost at its end.
static void test_adapters_formats_layout_is_whole(void **state)
{
    size_t longest = 0;
    (void)state;
    for (unsigned bits = 0; bits < 128; bits++) {
        struct peft_reading reading = {.has_attention = bits & 1,
                                       .has_dense = (bits & 2) != 0,
                                       .has_single = (bits & 4) != 0,
                                       .has_stacked = (bits & 8) != 0,
                                       .has_fused = (bits & 16) != 0,
                                       .is_transposed = (bits & 32) != 0,
                                       .is_by_version = (bits & 64) != 0};
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
    assert_int_equal(longest, ADAPTER_LAYOUT_BYTES - 1);
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
        expect(&a, &base, STATUS_INVALID, "targets up_proj of experts that the file has no LoRA");
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
    };
    return cmocka_run_group_tests_name("adapters_formats", tests, setup, teardown);
}
