// SPDX-License-Identifier: Apache-2.0
// Random models in memory: they run without a file, the same for the same seed and in any pool;
// experts' popularity follows router_skew; names that make no sense are refused.
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <setjmp.h>
#include <cmocka.h>

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "base/rng.h"
#include "runtime/engine/stack.h"
#include "runtime/model/synth.h"

enum { PROMPT = 256, ANSWER = 8, EXPERTS = 32 };

#define SHAPE "synth:tiny,hidden=256,experts=32,top_k=4,layers=3,vocab=2048,tied=0"

struct outcome {
    int32_t tokens[ANSWER];
    uint32_t count;
    double entropy; // of the experts' use in the prompt's step, in bits, mean over layers
};

static double entropy_of(const uint32_t *need, uint32_t experts)
{
    double all = 0, sum = 0;
    for (uint32_t e = 0; e < experts; e++)
        all += need[e];
    for (uint32_t e = 0; e < experts; e++)
        if (need[e])
            sum -= need[e] / all * log2(need[e] / all);
    return sum;
}

static void send(struct stack *stack, const struct model_config *config)
{
    struct {
        struct engine_request r;
        int32_t prompt[PROMPT];
    } record;
    memset(&record, 0, sizeof record);
    record.r = (struct engine_request){.kind = ENGINE_REQUEST,
                                       .id = 1,
                                       .prompt_tokens = PROMPT,
                                       .max_tokens = ANSWER,
                                       .top_p = 1.0f,
                                       .ignore_eos = 1};
    for (uint32_t i = 0; i < PROMPT; i++)
        record.prompt[i] = (int32_t)(rng_at(5, 0, i) % config->vocab);
    assert_int_equal(engine_send(stack_port(stack), &record, sizeof record), STATUS_OK);
}

static struct outcome run_model(const char *name, uint64_t pool_bytes)
{
    char state[] = "/tmp/polder-synth-XXXXXX", path[64];
    struct outcome out = {.count = 0};
    struct fault fault = {.text = ""};
    struct stack *stack = NULL;
    assert_non_null(mkdtemp(state));
    struct stack_options o = {.model = name,
                              .state_directory = state,
                              .context_max = 512,
                              .sequences_max = 2,
                              .rows_max = PROMPT,
                              .pool_bytes = pool_bytes,
                              .no_plan_ahead = true, // engine_need is that of the step that ended
                              .no_prefix_sharing = true};
    if (stack_create(&o, &stack, &fault))
        fail_msg("%s", fault.text);
    send(stack, &stack_model(stack)->config);
    for (bool done = false, measured = false; !done;) {
        const void *record;
        size_t bytes;
        (void)engine_turn(stack_engine(stack));
        const uint32_t *need = engine_need(stack_engine(stack));
        struct engine_counters c;
        engine_counters(stack_engine(stack), &c);
        if (!measured && c.rows == PROMPT && need) {
            for (uint32_t l = 0; l < 3; l++)
                out.entropy += entropy_of(need + (size_t)l * EXPERTS, EXPERTS) / 3;
            measured = true;
        }
        while (ring_peek(stack_port(stack)->events, &record, &bytes)) {
            uint32_t kind;
            memcpy(&kind, record, sizeof kind);
            if (kind == ENGINE_DONE) {
                assert_int_equal(((const struct engine_done *)record)->status, STATUS_OK);
                done = true;
            } else if (kind == ENGINE_TEXT && out.count < ANSWER) {
                out.tokens[out.count++] = ((const struct engine_text *)record)->token;
            }
            ring_pop(stack_port(stack)->events);
        }
    }
    stack_destroy(stack);
    (void)snprintf(path, sizeof path, "%s/adapters", state);
    (void)rmdir(path);
    assert_int_equal(rmdir(state), 0); // nothing was written
    return out;
}

static void test_synth_skew_narrows_the_use_of_experts(void **state)
{
    (void)state;
    double even = run_model(SHAPE, 0).entropy;
    double zipf = run_model(SHAPE ",router_skew=1", 0).entropy;
    double steep = run_model(SHAPE ",router_skew=2", 0).entropy;
    (void)printf("bits of expert use: skew 0 %.2f, 1 %.2f, 2 %.2f of %.2f\n", even, zipf, steep,
                 log2(EXPERTS));
    assert_true(even > 0.9 * log2(EXPERTS));
    assert_true(zipf < even - 0.2);
    assert_true(steep < zipf - 0.2);
}

static void test_synth_answers_depend_on_the_name_alone(void **state)
{
    (void)state;
    struct outcome a = run_model(SHAPE ",seed=7", 0), b = run_model(SHAPE ",seed=7", 6 << 20);
    struct outcome c = run_model(SHAPE ",seed=8", 0);
    assert_int_equal(a.count, ANSWER);
    assert_memory_equal(a.tokens, b.tokens, sizeof a.tokens);
    assert_memory_not_equal(a.tokens, c.tokens, sizeof a.tokens);
    uint32_t same = 0;
    for (uint32_t i = 1; i < ANSWER; i++)
        same += a.tokens[i] == a.tokens[0];
    assert_true(same < ANSWER - 1); // not one token for ever
}

static void test_synth_refuses_names(void **state)
{
    static const char *const bad[] = {"synth:",
                                      "synth:huge",
                                      "synth:tiny,layers",
                                      "synth:tiny,a=1",
                                      "synth:tiny,router_skew=-1",
                                      "synth:tiny,seed=x"};
    (void)state;
    for (size_t i = 0; i < sizeof bad / sizeof *bad; i++) {
        struct model_fit fit;
        struct fault fault = {.text = ""};
        assert_int_equal(model_fit(bad[i], DTYPE_BF16, 0, &fit, &fault), STATUS_INVALID);
        assert_int_not_equal(fault.text[0], 0);
    }
}

static void test_synth_shapes_of_published_models(void **state)
{
    static const struct {
        const char *name;
        double gib; // of all weights in bf16
    } known[] = {{"synth:olmoe-1b-7b", 12.9},
                 {"synth:qwen3-30b-a3b", 56.9},
                 {"synth:llama-3-8b", 15.0},
                 {"synth:mixtral-8x7b", 87.0}};
    (void)state;
    for (size_t i = 0; i < sizeof known / sizeof *known; i++) {
        struct model_fit fit;
        struct fault fault = {.text = ""};
        if (model_fit(known[i].name, DTYPE_BF16, 0, &fit, &fault))
            fail_msg("%s", fault.text);
        double gib = (double)(fit.static_bytes + fit.expert_bytes) / 1073741824.0;
        (void)printf("%s: %.1f GiB\n", known[i].name, gib);
        assert_true(fabs(gib - known[i].gib) < 0.05 * known[i].gib);
        model_config_clear(&fit.config);
    }
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_synth_skew_narrows_the_use_of_experts),
        cmocka_unit_test(test_synth_answers_depend_on_the_name_alone),
        cmocka_unit_test(test_synth_refuses_names),
        cmocka_unit_test(test_synth_shapes_of_published_models),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
