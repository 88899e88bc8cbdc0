// SPDX-License-Identifier: Apache-2.0
// A pattern of adapter_config.json that takes too many steps refuses its adapter, in whichever
// field it stands. What PEFT's own functions answer about patterns: test_adapters_golden.c.
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

#define Q_NAME "model.layers.0.self_attn.q_proj"

// In JSON, and as the faults quote it.
#define COSTLY_TEXT "(.+\\.)*(.+\\.)*(.+\\.)*(.+\\.)*"
#define COSTLY "(.+\\\\.)*(.+\\\\.)*(.+\\\\.)*(.+\\\\.)*"

// Beside rank 4 and alpha 8; the file has q_proj and v_proj of both layers. Before, an
// unknown answer was a "no", so that the first three were converted with a wrong scale or rank, or
// with matrices that are excluded.
static const struct {
    const char *config, *field, *pattern;
} costly[] = {
    {"\"target_modules\": [\"q_proj\", \"v_proj\"], \"alpha_pattern\": "
     "{\"" COSTLY "q_proj\": 1000}",
     "alpha_pattern", COSTLY_TEXT "q_proj"},
    {"\"target_modules\": [\"q_proj\", \"v_proj\"], \"rank_pattern\": {\"" COSTLY "x_proj\": 2}",
     "rank_pattern", COSTLY_TEXT "x_proj"},
    {"\"target_modules\": [\"q_proj\", \"v_proj\"], \"exclude_modules\": \"" COSTLY "x_proj\"",
     "exclude_modules", COSTLY_TEXT "x_proj"},
    {"\"target_modules\": \"" COSTLY "[qv]\\\\.proj\"", "target_modules",
     COSTLY_TEXT "[qv]\\.proj"},
    {"\"target_modules\": [\"q_proj\", \"v_proj\"], \"layers_to_transform\": [0, 1], "
     "\"layers_pattern\": [\"" COSTLY "x_proj\", \"layers\"]",
     "layers_pattern", COSTLY_TEXT "x_proj"},
};

static void test_adapters_patterns_too_many_steps_refuse(void **state)
{
    struct adapter_base base = tool_base(DTYPE_F32);
    struct tool_adapter adapter;
    char path[TOOL_PATH + 64];
    (void)snprintf(path, sizeof path, "%s/store.adapter", (char *)*state);
    tool_adapter_begin(&adapter, *state);
    for (size_t i = 0; i < sizeof costly / sizeof *costly; i++) {
        struct adapter_report report;
        struct fault fault = {.text = ""};
        char want[200];
        tool_config(&adapter, costly[i].config);
        tool_adapter_write(&adapter);
        (void)snprintf(want, sizeof want,
                       "adapter_config.json: %s: \"%s\" takes more than 4000 steps to match; write "
                       "it more simply.",
                       costly[i].field, costly[i].pattern);
        enum status status = adapter_convert(adapter.directory, &base, PAGE, path, &report, &fault);
        if (status != STATUS_LIMIT)
            fail_msg("%s: %s \"%s\"", costly[i].config, status_code(status), fault.text);
        assert_string_equal(fault.text, want);
        assert_int_not_equal(access(path, F_OK), 0); // nothing was left behind
    }
}

// After the first, the patterns beside it are not tried, not even one that would match at once.
static void test_adapters_patterns_nothing_after_unknown(void **state)
{
    static const char text[] =
        "{\"peft_type\": \"LORA\", \"r\": 4, \"lora_alpha\": 8, \"target_modules\": \".*q_proj\", "
        "\"rank_pattern\": {\"" COSTLY "x_proj\": 2, \"q_proj\": 3}}";
    struct peft_config config;
    (void)state;
    assert_int_equal(peft__config_parse(text, strlen(text), &config, NULL), STATUS_OK);
    assert_true(peft__config_targets(&config, Q_NAME));
    assert_int_equal(peft__config_check(&config, NULL), STATUS_OK);
    assert_int_equal(peft__config_rank(&config, Q_NAME), 4);
    assert_false(config.ranks[1].used);
    assert_int_equal(peft__config_check(&config, NULL), STATUS_LIMIT);
    assert_false(peft__config_targets(&config, Q_NAME));
    peft__config_clear(&config);
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
        cmocka_unit_test(test_adapters_patterns_too_many_steps_refuse),
        cmocka_unit_test(test_adapters_patterns_nothing_after_unknown),
    };
    return cmocka_run_group_tests_name("adapters_patterns", tests, setup, teardown);
}
