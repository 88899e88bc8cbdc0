// SPDX-License-Identifier: Apache-2.0
// The whole engine on the CPU device with a small random MoE: the same tokens, bit for bit,
// whatever happens to the step: neighbours, chunks, forced leaving, a tiny pool, swapping, shared
// prefixes.
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <setjmp.h>
#include <cmocka.h>

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "base/rng.h"
#include "engine_driver.h"

enum { REQUESTS = 12, PROMPT_MAX = 90, GENERATE = 24, VOCAB = 500 };

struct fixture {
    char model[64], state[64];
    int32_t prompt[REQUESTS][PROMPT_MAX];
    uint32_t prompt_tokens[REQUESTS];
    struct driver_answer *truth; // each request alone, default options
};

static struct stack_options base_options(const struct fixture *f)
{
    return (struct stack_options){.model = f->model,
                                  .state_directory = f->state,
                                  .device = driver_device(),
                                  .batch_invariant = true,
                                  .context_max = 256,
                                  .sequences_max = 16,
                                  .rows_max = 64,
                                  .queue_max = 64,
                                  .tenants_max = 4,
                                  .adapters_max = 8,
                                  .rank_max = 16,
                                  .no_prefix_sharing = true};
}

static struct driver_ask ask_of(const struct fixture *f, int i)
{
    // Half of them greedy, half sampled.
    return (struct driver_ask){.prompt = f->prompt[i],
                               .prompt_tokens = f->prompt_tokens[i],
                               .max_tokens = GENERATE,
                               .tenant = (uint32_t)i % 4,
                               .class = (uint32_t)i % 3,
                               .temperature = i % 2 ? 0.9f : 0.0f,
                               .top_p = 0.95f,
                               .top_k = i % 3 ? 0 : 50,
                               .seed = (uint64_t)i};
}

static void compare(const struct driver_answer *got, const struct driver_answer *want)
{
    assert_true(got->done);
    assert_int_equal(got->status, STATUS_OK);
    assert_int_equal(got->count, want->count);
    assert_memory_equal(got->token, want->token, want->count * sizeof *want->token);
    assert_memory_equal(got->logprob, want->logprob, want->count * sizeof *want->logprob);
}

static int make_fixture(void **state)
{
    static const char *const shape[] = {
        "hidden=96", "layers=4",   "heads=4", "kv_heads=2",          "head_dim=16",
        "vocab=500", "experts=12", "top_k=3", "moe_intermediate=40", "max_positions=512"};
    struct fixture *f = calloc(1, sizeof *f);
    struct rng rng = {.seed = 11};
    driver_make_model(f->model, sizeof f->model, "tiny", shape, sizeof shape / sizeof *shape, 5);
    driver_make_directory(f->state, sizeof f->state);
    for (int i = 0; i < REQUESTS; i++) {
        f->prompt_tokens[i] = 1 + (uint32_t)rng_below(&rng, PROMPT_MAX);
        for (uint32_t t = 0; t < f->prompt_tokens[i]; t++)
            f->prompt[i][t] = (int32_t)rng_below(&rng, VOCAB);
    }
    f->truth = calloc(REQUESTS, sizeof *f->truth);
    struct stack_options o = base_options(f);
    struct driver *d = driver_create(&o);
    for (int i = 0; i < REQUESTS; i++) {
        driver_reset(d);
        struct driver_ask ask = ask_of(f, i);
        uint64_t id = driver_submit(d, &ask);
        driver_finish(d);
        f->truth[i] = *driver_answer_of(d, id);
        assert_int_equal(f->truth[i].status, STATUS_OK);
        assert_int_equal(f->truth[i].count, GENERATE);
    }
    driver_destroy(d);
    *state = f;
    return 0;
}

static int drop_fixture(void **state)
{
    struct fixture *f = *state;
    driver_remove(f->model);
    driver_remove(f->state);
    free(f->truth);
    free(f);
    return 0;
}

// All requests at once under the given options; every answer must be the truth.
static struct engine_counters check_all(const struct fixture *f,
                                        const struct stack_options *options)
{
    struct driver *d = driver_create(options);
    uint64_t ids[REQUESTS];
    for (int i = 0; i < REQUESTS; i++) {
        struct driver_ask ask = ask_of(f, i);
        ids[i] = driver_submit(d, &ask);
    }
    driver_finish(d);
    for (int i = 0; i < REQUESTS; i++)
        compare(driver_answer_of(d, ids[i]), &f->truth[i]);
    struct engine_counters c;
    engine_counters(stack_engine(d->stack), &c);
    driver_destroy(d);
    return c;
}

static void test_engine_neighbours_change_nothing(void **state)
{
    struct stack_options o = base_options(*state);
    struct engine_counters c = check_all(*state, &o);
    assert_true(c.rows > c.steps); // they were really batched
    assert_int_equal(c.rows_recomputed, 0);
    assert_int_equal(c.half_rows_run, c.half_rows_due);
}

static void test_engine_chunking_changes_nothing(void **state)
{
    static const uint32_t budgets[] = {16, 17, 33, 512};
    for (size_t i = 0; i < sizeof budgets / sizeof *budgets; i++) {
        struct stack_options o = base_options(*state);
        o.rows_max = budgets[i];
        (void)check_all(*state, &o);
    }
}

static void test_engine_threads_and_segments_change_nothing(void **state)
{
    for (uint32_t threads = 1; threads <= 3; threads++) {
        struct stack_options o = base_options(*state);
        o.threads = threads;
        o.segment_halves_max = threads;
        (void)check_all(*state, &o);
    }
}

struct forcing {
    uint32_t calls, every;
};

static bool force(void *context, uint32_t step_class, uint32_t half)
{
    struct forcing *f = context;
    (void)step_class;
    (void)half;
    return f->calls++ % f->every == 0;
}

static void test_engine_leaving_at_every_preemption_point_changes_nothing(void **state)
{
    for (uint32_t every = 1; every <= 3; every++) {
        struct forcing forcing = {.every = every};
        struct stack_options o = base_options(*state);
        o.force_leave = force;
        o.force_leave_context = &forcing;
        struct engine_counters c = check_all(*state, &o);
        assert_true(c.pauses > 50);
        assert_int_equal(c.rows_recomputed, 0);
        assert_int_equal(c.half_rows_run, c.half_rows_due);
        (void)printf("left %llu times at preemption points, %llu half-layer rows run, %llu due, "
                     "0 recomputed\n",
                     (unsigned long long)c.pauses, (unsigned long long)c.half_rows_run,
                     (unsigned long long)c.half_rows_due);
    }
}

static void test_engine_tiny_pool_changes_nothing(void **state)
{
    const struct fixture *f = *state;
    struct stack_options o = base_options(f);
    struct stack_fit fit;
    struct fault fault;
    assert_int_equal(stack_fit(&o, 0, &fit, &fault), STATUS_OK);
    // Room for one context, one token's experts and little else: far less than all experts.
    uint64_t experts = fit.expert_pages;
    model_config_clear(&fit.model.config);
    o.context_max = 128;
    o.page_bytes = 32768;
    o.pool_bytes = (128 / 8 * 2 + experts / 4) * 32768;
    o.host_bytes = 64 * 32768;
    struct engine_counters c = check_all(f, &o);
    assert_true(c.gate_misses > 0);
    (void)printf(
        "pool of %llu pages for %llu pages of experts: %llu gate misses, %llu swaps out, %llu "
        "drops\n",
        (unsigned long long)(o.pool_bytes / 32768), (unsigned long long)experts,
        (unsigned long long)c.gate_misses, (unsigned long long)c.swaps_out,
        (unsigned long long)c.drops);
}

static void test_engine_shared_prefixes_change_nothing(void **state)
{
    const struct fixture *f = *state;
    struct stack_options o = base_options(f);
    o.no_prefix_sharing = false;
    struct driver *d = driver_create(&o);
    for (int round = 0; round < 3; round++) {
        driver_reset(d);
        uint64_t ids[REQUESTS];
        for (int i = 0; i < REQUESTS; i++) {
            struct driver_ask ask = ask_of(f, i);
            ids[i] = driver_submit(d, &ask);
        }
        driver_finish(d);
        uint32_t cached = 0;
        for (int i = 0; i < REQUESTS; i++) {
            compare(driver_answer_of(d, ids[i]), &f->truth[i]);
            cached += driver_answer_of(d, ids[i])->cached;
        }
        assert_true(round == 0 || cached > 100);
    }
    driver_destroy(d);
}

static void test_engine_cancel_and_pause(void **state)
{
    const struct fixture *f = *state;
    struct stack_options o = base_options(f);
    struct driver *d = driver_create(&o);
    uint64_t ids[REQUESTS];
    for (int i = 0; i < REQUESTS; i++) {
        struct driver_ask ask = ask_of(f, i);
        ids[i] = driver_submit(d, &ask);
    }
    for (int i = 0; i < 20; i++)
        (void)driver_turn(d);
    driver_control(d, ENGINE_PAUSE, ids[0]);
    driver_control(d, ENGINE_CANCEL, ids[1]);
    for (int i = 0; i < 20; i++)
        (void)driver_turn(d);
    uint32_t stood = driver_answer_of(d, ids[0])->count;
    for (int i = 0; i < 200; i++)
        (void)driver_turn(d);
    assert_int_equal(driver_answer_of(d, ids[0])->count, stood); // a paused request stands still
    assert_true(stood < GENERATE);
    driver_control(d, ENGINE_RESUME, ids[0]);
    driver_control(d, ENGINE_CANCEL, 9999);
    driver_finish(d);
    for (int i = 0; i < REQUESTS; i++) {
        if (i != 1)
            compare(driver_answer_of(d, ids[i]), &f->truth[i]);
    }
    const struct driver_answer *a = driver_answer_of(d, ids[1]);
    assert_int_equal(a->status, STATUS_CANCELLED);
    assert_true(a->count < GENERATE);
    driver_destroy(d);
}

static bool leave_batch(void *context, uint32_t step_class, uint32_t half)
{
    (void)context;
    (void)half;
    return step_class == 2;
}

// A batch request whose step was left, and a stream of interactive ones that keep it waiting.
static void test_engine_ends_a_paused_request_at_once(void **state)
{
    const struct fixture *f = *state;
    struct stack_options o = base_options(f);
    o.force_leave = leave_batch;
    struct driver *d = driver_create(&o);
    struct driver_ask batch = ask_of(f, 2), urgent = ask_of(f, 0);
    batch.class = 2;
    urgent.class = 0;
    urgent.max_tokens = 100;
    uint64_t slow = driver_submit(d, &batch);
    struct engine_counters c = {0};
    while (!c.pauses) {
        (void)driver_turn(d);
        engine_counters(stack_engine(d->stack), &c);
    }
    uint64_t quick = driver_submit(d, &urgent);
    for (int i = 0; i < 40; i++)
        (void)driver_turn(d);
    assert_false(driver_answer_of(d, slow)->done);
    assert_false(driver_answer_of(d, quick)->done);
    driver_control(d, ENGINE_CANCEL, slow);
    for (int i = 0; i < 3; i++)
        (void)driver_turn(d);
    assert_true(driver_answer_of(d, slow)->done);
    assert_int_equal(driver_answer_of(d, slow)->status, STATUS_CANCELLED);
    assert_false(driver_answer_of(d, quick)->done);
    driver_finish(d);
    assert_int_equal(driver_answer_of(d, quick)->status, STATUS_OK);
    driver_destroy(d);
}

static void test_engine_refuses_bad_requests(void **state)
{
    const struct fixture *f = *state;
    struct stack_options o = base_options(f);
    struct driver *d = driver_create(&o);
    int32_t bad[4] = {1, 2, VOCAB, 3}, good[4] = {1, 2, 3, 4};
    struct driver_ask asks[] = {
        {.prompt = good, .prompt_tokens = 0, .max_tokens = 4},
        {.prompt = good, .prompt_tokens = 4, .max_tokens = 0},
        {.prompt = good, .prompt_tokens = 4, .max_tokens = 300},
        {.prompt = bad, .prompt_tokens = 4, .max_tokens = 4},
        {.prompt = good, .prompt_tokens = 4, .max_tokens = 4, .tenant = 4},
        {.prompt = good, .prompt_tokens = 4, .max_tokens = 4, .temperature = -1.0f},
        {.prompt = good, .prompt_tokens = 4, .max_tokens = 4, .adapter = "nobody"},
    };
    for (size_t i = 0; i < sizeof asks / sizeof *asks; i++) {
        uint64_t id = driver_submit(d, &asks[i]);
        driver_finish(d);
        const struct driver_answer *a = driver_answer_of(d, id);
        assert_int_equal(a->status, i == 6 ? STATUS_NOT_FOUND : STATUS_INVALID);
        assert_true(strlen(a->message) > 10);
    }
    driver_destroy(d);
}

// A sentence at start, and not a stop when the first step is recorded.
static void test_engine_refuses_what_the_device_cannot_take(void **state)
{
    static const char *const shape[] = {
        "hidden=64", "layers=1",  "heads=1", "kv_heads=1",          "head_dim=640",
        "vocab=100", "experts=2", "top_k=1", "moe_intermediate=16", "max_positions=256"};
    const struct fixture *f = *state;
    struct stack_options o = base_options(f);
    struct stack *stack = NULL;
    struct fault fault = {.text = ""};
    char model[64];
    driver_make_model(model, sizeof model, "tiny", shape, sizeof shape / sizeof *shape, 5);
    o.model = model;
    assert_int_equal(stack_create(&o, &stack, &fault), STATUS_LIMIT);
    assert_non_null(strstr(fault.text, "head_dim is 640"));
    driver_remove(model);
}

int main(void)
{
    driver_skip_without_device();
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_engine_neighbours_change_nothing),
        cmocka_unit_test(test_engine_chunking_changes_nothing),
        cmocka_unit_test(test_engine_threads_and_segments_change_nothing),
        cmocka_unit_test(test_engine_leaving_at_every_preemption_point_changes_nothing),
        cmocka_unit_test(test_engine_tiny_pool_changes_nothing),
        cmocka_unit_test(test_engine_shared_prefixes_change_nothing),
        cmocka_unit_test(test_engine_cancel_and_pause),
        cmocka_unit_test(test_engine_ends_a_paused_request_at_once),
        cmocka_unit_test(test_engine_refuses_bad_requests),
        cmocka_unit_test(test_engine_refuses_what_the_device_cannot_take),
    };
    return cmocka_run_group_tests(tests, make_fixture, drop_fixture);
}
