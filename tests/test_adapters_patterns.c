// SPDX-License-Identifier: Apache-2.0
// Patterns of adapter_config.json mean what they mean to Python, or are refused by name; one that
// takes too many steps refuses its adapter, in whichever field it stands. What PEFT's own functions
// answer about whole configurations: test_adapters_golden.c.
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
#define V_NAME "model.layers.1.self_attn.v_proj"
#define DOWN_NAME "model.layers.12.mlp.experts.3.down_proj"

// ---- the dialect ----

// The last two columns are not our opinion: Python 3.11's re gave them, by the three expressions
// beside enum peft_match.
static const struct {
    enum peft_match match;
    const char *pattern, *name;
    bool found;
    uint32_t layer;
} answers[] = {
    {PEFT_MATCH_FULL, ".*\\.[qk]_proj", Q_NAME, true, 0},
    {PEFT_MATCH_FULL, ".*\\.[qk]_proj", V_NAME, false, 0},
    {PEFT_MATCH_FULL, "model\\.layers\\.\\d{,1}\\..*", Q_NAME, true, 0},
    {PEFT_MATCH_FULL, "model\\.layers\\.\\d{,1}\\..*", DOWN_NAME, false, 0},
    {PEFT_MATCH_FULL, "model\\.layers\\.\\d{,}\\..*", Q_NAME, true, 0},
    {PEFT_MATCH_FULL, "model\\.layers\\.\\d{,}\\..*", DOWN_NAME, true, 0},
    {PEFT_MATCH_FULL, "model\\.layers\\.\\d{,2}?\\..*", DOWN_NAME, true, 0},
    {PEFT_MATCH_FULL, "model\\.layers\\.\\d{2,}\\..*", Q_NAME, false, 0},
    {PEFT_MATCH_FULL, "model\\.layers\\.\\d{2,}\\..*", DOWN_NAME, true, 0},
    {PEFT_MATCH_FULL, "model\\.layers\\.\\d{1}\\..*", Q_NAME, true, 0},
    {PEFT_MATCH_FULL, "model\\.layers\\.\\d{1}\\..*", DOWN_NAME, false, 0},
    {PEFT_MATCH_FULL, "(?:a{,2}b)+", "aabab", true, 0},
    {PEFT_MATCH_FULL, "(?:a{,2}b)+", "aaab", false, 0},
    {PEFT_MATCH_FULL, "a{}", "a", false, 0},
    {PEFT_MATCH_FULL, "a{}", "aa", false, 0},
    {PEFT_MATCH_FULL, "a{x}", "a", false, 0},
    {PEFT_MATCH_FULL, "a{1,x}?", "a", false, 0},
    {PEFT_MATCH_FULL, "a{ 1,2 }", "aa", false, 0},
    {PEFT_MATCH_FULL, "a{ ,2}", "aa", false, 0},
    {PEFT_MATCH_FULL, "(?:a|{,2b)", "a", true, 0},
    {PEFT_MATCH_FULL, "(?:a|{,2b)", "b", false, 0},
    {PEFT_MATCH_FULL, "a\\{,2}", "aa", false, 0},
    {PEFT_MATCH_FULL, "[a{,2}]+", "aa", true, 0},
    {PEFT_MATCH_FULL, "[a{,2}]+", "a2", true, 0},
    {PEFT_MATCH_FULL, "[a{,2}]+", "a0", false, 0},
    {PEFT_MATCH_FULL, ".*\\.(?:q|v)_proj", Q_NAME, true, 0},
    {PEFT_MATCH_FULL, ".*\\.(?:q|v)_proj", DOWN_NAME, false, 0},
    {PEFT_MATCH_FULL, "(?!.*v_proj).*_proj", Q_NAME, true, 0},
    {PEFT_MATCH_FULL, "(?!.*v_proj).*_proj", V_NAME, false, 0},
    {PEFT_MATCH_FULL, ".*(?<=\\.)q_proj", Q_NAME, true, 0},
    {PEFT_MATCH_FULL, ".*(?<=\\.)q_proj", V_NAME, false, 0},
    {PEFT_MATCH_FULL, ".*(?<!self_attn\\.)\\w+_proj", Q_NAME, false, 0},
    {PEFT_MATCH_FULL, "(?i).*\\.Q_PROJ", Q_NAME, true, 0},
    {PEFT_MATCH_FULL, "(?i).*\\.Q_PROJ", V_NAME, false, 0},
    {PEFT_MATCH_FULL, ".*\\.(?i:Q)_proj", Q_NAME, true, 0},
    {PEFT_MATCH_FULL, ".*\\.(?i:Q)_proj", V_NAME, false, 0},
    {PEFT_MATCH_FULL, "(?i:.*\\.(?-i:Q)_PROJ)", Q_NAME, false, 0},
    {PEFT_MATCH_FULL, "(?P<head>lm)_head", "lm_head", true, 0},
    {PEFT_MATCH_FULL, "(?P<head>lm)_head", "lm", false, 0},
    {PEFT_MATCH_FULL, "(?>a*)ab", "aab", false, 0},
    {PEFT_MATCH_FULL, "a*+ab", "aab", false, 0},
    {PEFT_MATCH_FULL, "a{,2}+b", "aab", true, 0},
    {PEFT_MATCH_FULL, "a{,2}+b", "aaab", false, 0},
    {PEFT_MATCH_FULL, "[]a]+", "aa", true, 0},
    {PEFT_MATCH_FULL, "[]a]+", "b", false, 0},
    {PEFT_MATCH_FULL, "[^]a]+", "b", true, 0},
    {PEFT_MATCH_FULL, "[^]a]+", "a", false, 0},
    {PEFT_MATCH_FULL, "[[a]+", "a", true, 0},
    {PEFT_MATCH_FULL, "[[a]+", "b", false, 0},
    {PEFT_MATCH_FULL, "[\\w.]+", Q_NAME, true, 0},
    {PEFT_MATCH_FULL, "[^\\W\\d]+", "lm_head", true, 0},
    {PEFT_MATCH_FULL, "[^\\W\\d]+", "a1", false, 0},
    {PEFT_MATCH_FULL, "[\\x61-c]+", "abc", true, 0},
    {PEFT_MATCH_FULL, "[\\x61-c]+", "d", false, 0},
    {PEFT_MATCH_FULL, "[a\\-c]+", "ac", true, 0},
    {PEFT_MATCH_FULL, "[a\\-c]+", "b", false, 0},
    {PEFT_MATCH_FULL, "\\blm_head\\Z", "lm_head", true, 0},
    {PEFT_MATCH_FULL, "\\Blm_head", "lm_head", false, 0},
    {PEFT_MATCH_FULL, "(?:|a)+b", "aab", true, 0},
    {PEFT_MATCH_FULL, "(?:a?)*?b", "aab", true, 0},
    {PEFT_MATCH_FULL, "(?:a?)*?b", "b", true, 0},
    {PEFT_MATCH_FULL, "(?:a|ab)(?:c|bcd)?", "abcd", true, 0},
    {PEFT_MATCH_FULL, "(?:a|ab)(?:c|bcd)?", "abc", true, 0},
    {PEFT_MATCH_FULL, "q_proj|v_proj", "v_proj", true, 0},
    {PEFT_MATCH_FULL, "q_proj|v_proj", V_NAME, false, 0},
    {PEFT_MATCH_FULL, "(?m)^a$", "a", true, 0},
    {PEFT_MATCH_FULL, "(?m)^a$", "b", false, 0},
    {PEFT_MATCH_FULL, "(?=a).*(?i:a)", "a", true, 0},
    {PEFT_MATCH_FULL, "\\w*?\\.*(?:a?|b){,2}+\\.", "ab.", true, 0},
    {PEFT_MATCH_FULL, "(a|b)\\1", "bb", true, 0},
    {PEFT_MATCH_FULL, "(a|b)\\1", "ab", false, 0},
    {PEFT_MATCH_FULL, "(?P<n>a|b).(?P=n)", "b.b", true, 0},
    {PEFT_MATCH_FULL, "(?P<n>a|b).(?P=n)", "b.a", false, 0},
    {PEFT_MATCH_FULL, "(a)?\\1b", "b", false, 0},
    {PEFT_MATCH_SUFFIX, "a\\1b", "x.ax.b", true, 0},
    {PEFT_MATCH_SUFFIX, "(.)\\3", "aa", true, 0},
    {PEFT_MATCH_SUFFIX, "[qk]_proj", Q_NAME, true, 0},
    {PEFT_MATCH_SUFFIX, "[qk]_proj", V_NAME, false, 0},
    {PEFT_MATCH_SUFFIX, "layers\\.\\d{,1}\\..*q_proj", Q_NAME, true, 0},
    {PEFT_MATCH_SUFFIX, "layers\\.\\d{,1}\\..*q_proj", DOWN_NAME, false, 0},
    {PEFT_MATCH_SUFFIX, "self_attn\\.(q|k)_proj", Q_NAME, true, 0},
    {PEFT_MATCH_SUFFIX, "self_attn\\.(q|k)_proj", V_NAME, false, 0},
    {PEFT_MATCH_SUFFIX, "?:q_proj", Q_NAME, true, 0},
    {PEFT_MATCH_SUFFIX, "?:q_proj", V_NAME, false, 0},
    {PEFT_MATCH_SUFFIX, "attn\\.(q)_proj", Q_NAME, false, 0},
    {PEFT_MATCH_SUFFIX, "a|b)|(.*q_proj", Q_NAME, true, 0},
    {PEFT_MATCH_SUFFIX, "a|b)|(.*q_proj", V_NAME, false, 0},
    {PEFT_MATCH_SUFFIX, "^lm_head", "lm_head", true, 0},
    {PEFT_MATCH_SUFFIX, "^lm_head", "a.lm_head", false, 0},
    {PEFT_MATCH_SUFFIX, "(?:mlp|experts.{,2})\\.down_proj", DOWN_NAME, true, 0},
    {PEFT_MATCH_SUFFIX, "", "a.", true, 0},
    {PEFT_MATCH_SUFFIX, "", "a", false, 0},
    {PEFT_MATCH_LAYER, "layers", Q_NAME, true, 0},
    {PEFT_MATCH_LAYER, "layers", DOWN_NAME, true, 12},
    {PEFT_MATCH_LAYER, "(?:h|layers)", DOWN_NAME, true, 12},
    {PEFT_MATCH_LAYER, "(?:h|layers)", "lm_head", false, 0},
    {PEFT_MATCH_LAYER, "experts", DOWN_NAME, true, 3},
    {PEFT_MATCH_LAYER, "experts", Q_NAME, false, 0},
    {PEFT_MATCH_LAYER, "l.{,5}s", DOWN_NAME, true, 12},
    {PEFT_MATCH_LAYER, "l.{,5}s", Q_NAME, true, 0},
    {PEFT_MATCH_LAYER, "l.{,3}s", Q_NAME, false, 0},
    {PEFT_MATCH_LAYER, "[[l]ayers", Q_NAME, true, 0},
};

static void test_adapters_patterns_mean_what_python_means(void **state)
{
    (void)state;
    for (size_t i = 0; i < sizeof answers / sizeof *answers; i++) {
        struct peft_pattern *pattern;
        struct fault fault;
        uint32_t layer = 0;
        if (peft__pattern_create(answers[i].pattern, answers[i].match, "x", &pattern, &fault))
            fail_msg("%s: %s", answers[i].pattern, fault.text);
        enum peft_found found = peft__pattern_matches(pattern, answers[i].name, &layer);
        if (found != (answers[i].found ? PEFT_FOUND : PEFT_FOUND_NOT) || layer != answers[i].layer)
            fail_msg("%s, %s: %d, layer %u", answers[i].pattern, answers[i].name, (int)found,
                     layer);
        peft__pattern_destroy(pattern);
    }
}

// Each means something else to PCRE2 than to Python, or only one of them knows it.
static const struct {
    const char *pattern, *named;
} refused[] = {
    {"[[:alpha:]]_proj", "[:"},
    {"[[.a.]]", "[."},
    {"[a[=b=]]", "[="},
    {"(*ACCEPT)q_proj", "(*"},
    {"(*UCP)a", "(*"},
    {"*F)(", "(*"}, // "(" stands before a key
    {"\\Qq.proj\\E", "\\Q"},
    {"a\\E", "\\E"},
    {"a\\Kb", "\\K"},
    {"\\Ga", "\\G"},
    {"a\\Rb", "\\R"},
    {"\\Xa", "\\X"},
    {"a\\h", "\\h"},
    {"\\H+", "\\H"},
    {"\\N+", "\\N"},
    {"\\C", "\\C"},
    {"\\V+", "\\V"},
    {"\\ea", "\\e"},
    {"\\cA", "\\c"},
    {"\\p{L}+", "\\p"},
    {"\\P{L}+", "\\P"},
    {"\\o{161}", "\\o"},
    {"\\u0071", "\\u"},
    {"\\U00000071", "\\U"},
    {"\\x{71}", "\\x"},
    {"\\x7", "\\x"},
    {"[\\x{71}]", "\\x"},
    {"\\161", "\\1"},
    {"\\0", "\\0"},
    {"(a)\\10", "\\1"},
    {"\\g1", "\\g"},
    {"\\k<n>", "\\k"},
    {"a\\z", "\\z"},
    {"[\\Qa\\E]", "\\Q"},
    {"[\\A]", "\\A"},
    {"[\\1]", "\\1"},
    {"(a)?(?(1)b|c)", "(?("},
    {"(?P>n)", "(?P"},
    {"(?R)", "(?R"},
    {"(?1)", "(?1"},
    {"(?&n)", "(?&"},
    {"(?|a|b)", "(?|"},
    {"(?<n>a)", "(?<"},
    {"(?'n'a)", "(?'"},
    {"(?C1)a", "(?C"},
    {"(?#a)", "(?#"},
    {"(?x)a b", "(?x"},
    {"(?x:a b)", "(?x"},
    {"(?U)a+", "(?U"},
    {"(?J)a", "(?J"},
    {"(?^i)a", "(?^"},
    {"a(?i)b", "(?i"},
    {"(?i)(?i)a", "(?i"},
    {"(?-i)a", "(?-"},
    {"(?i)\xc4\xb1", "\xc4\xb1"},
};

static void test_adapters_patterns_refused_by_name(void **state)
{
    (void)state;
    for (size_t i = 0; i < sizeof refused / sizeof *refused; i++) {
        struct peft_pattern *pattern;
        struct fault fault = {.text = ""};
        char want[200];
        (void)snprintf(want, sizeof want,
                       "x: \"%s\" has \"%s\", which is not supported in a pattern; write it "
                       "without.",
                       refused[i].pattern, refused[i].named);
        if (peft__pattern_create(refused[i].pattern, PEFT_MATCH_SUFFIX, "x", &pattern, &fault) !=
            STATUS_UNSUPPORTED)
            fail_msg("%s: \"%s\"", refused[i].pattern, fault.text);
        assert_string_equal(fault.text, want);
    }
}

// It would be of the group that stands before a layers_pattern.
static void test_adapters_patterns_layer_repeat_refused(void **state)
{
    static const char *const texts[] = {"{,2}\\w{,}", "*a", "?layers", "+a"};
    (void)state;
    for (size_t i = 0; i < sizeof texts / sizeof *texts; i++) {
        struct peft_pattern *pattern;
        struct fault fault = {.text = ""};
        char want[16];
        (void)snprintf(want, sizeof want, "has \"%c\"", texts[i][0]);
        assert_int_equal(peft__pattern_create(texts[i], PEFT_MATCH_LAYER, "x", &pattern, &fault),
                         STATUS_UNSUPPORTED);
        assert_non_null(strstr(fault.text, want));
    }
}

// A pattern of the most bytes whose every byte is rewritten to two.
static void test_adapters_patterns_longest_is_rewritten(void **state)
{
    char text[4096 + 1];
    struct peft_pattern *pattern;
    (void)state;
    memset(text, '{', sizeof text - 1);
    text[sizeof text - 1] = 0;
    assert_int_equal(peft__pattern_create(text, PEFT_MATCH_SUFFIX, "x", &pattern, NULL), STATUS_OK);
    assert_int_equal(peft__pattern_matches(pattern, Q_NAME, NULL), PEFT_FOUND_NOT);
    peft__pattern_destroy(pattern);
}

// ---- too many steps ----

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
        cmocka_unit_test(test_adapters_patterns_mean_what_python_means),
        cmocka_unit_test(test_adapters_patterns_refused_by_name),
        cmocka_unit_test(test_adapters_patterns_layer_repeat_refused),
        cmocka_unit_test(test_adapters_patterns_longest_is_rewritten),
        cmocka_unit_test(test_adapters_patterns_too_many_steps_refuse),
        cmocka_unit_test(test_adapters_patterns_nothing_after_unknown),
    };
    return cmocka_run_group_tests_name("adapters_patterns", tests, setup, teardown);
}
