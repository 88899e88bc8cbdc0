// SPDX-License-Identifier: Apache-2.0
// Planning ahead on the CPU device: the answers are those of an engine that plans each step when
// the one before has given its results, whatever ends them, and what was computed for a sequence
// that had ended goes nowhere.
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

enum { REQUESTS = 40, PROMPT_MAX = 60, GENERATE_MAX = 40, VOCAB = 64, STOPS = 8 };

struct request {
    int32_t prompt[PROMPT_MAX], stop_token[STOPS];
    char stop[4];
    struct driver_ask ask;
    uint32_t cancel_at; // tokens after which the client cancels, 0: never
};

struct fixture {
    char model[64], state[64];
    struct request requests[REQUESTS];
};

// A token is one letter: stop strings of two letters are met now and then.
static size_t decode(void *context, uint8_t *state, int32_t token, char *out, size_t room)
{
    (void)context;
    (void)state;
    assert_true(room >= 1);
    out[0] = (char)('a' + token % 12);
    return 1;
}

static void make_request(struct fixture *f, struct rng *rng, uint32_t i)
{
    struct request *r = &f->requests[i];
    r->ask = (struct driver_ask){.prompt = r->prompt,
                                 .prompt_tokens = 1 + (uint32_t)rng_below(rng, PROMPT_MAX),
                                 .max_tokens = 1 + (uint32_t)rng_below(rng, GENERATE_MAX),
                                 .tenant = i % 4,
                                 .class = (uint32_t)rng_below(rng, 3),
                                 .temperature = i % 4 ? 30.0f : 0.0f, // its logits are far apart
                                 .top_p = 0.98f,
                                 .tops = i % 5 ? 0 : 3,
                                 .seed = i};
    for (uint32_t t = 0; t < r->ask.prompt_tokens; t++)
        r->prompt[t] = (int32_t)rng_below(rng, VOCAB);
    if (i % 3 == 0) {
        r->ask.stop_token = r->stop_token;
        r->ask.stop_tokens = STOPS;
        for (uint32_t t = 0; t < STOPS; t++)
            r->stop_token[t] = (int32_t)rng_below(rng, VOCAB);
    }
    if (i % 3 == 1) {
        r->stop[0] = (char)('a' + rng_below(rng, 12));
        r->stop[1] = i % 2 ? (char)('a' + rng_below(rng, 12)) : 0;
        r->ask.stop = r->stop;
    }
    if (i % 7 == 6)
        r->cancel_at = 1 + (uint32_t)rng_below(rng, 10);
}

static int make_fixture(void **state)
{
    static const char *const shape[] = {
        "hidden=64", "layers=3",  "heads=4", "kv_heads=2",          "head_dim=16",
        "vocab=64",  "experts=6", "top_k=2", "moe_intermediate=32", "max_positions=256"};
    struct fixture *f = calloc(1, sizeof *f);
    struct rng rng = {.seed = 23};
    driver_make_model(f->model, sizeof f->model, "tiny", shape, sizeof shape / sizeof *shape, 7);
    driver_make_directory(f->state, sizeof f->state);
    for (uint32_t i = 0; i < REQUESTS; i++)
        make_request(f, &rng, i);
    *state = f;
    return 0;
}

static int drop_fixture(void **state)
{
    struct fixture *f = *state;
    driver_remove(f->model);
    driver_remove(f->state);
    free(f);
    return 0;
}

static struct stack_options options_of(const struct fixture *f)
{
    return (struct stack_options){.model = f->model,
                                  .state_directory = f->state,
                                  .context_max = 128,
                                  .sequences_max = 16,
                                  .rows_max = 48,
                                  .queue_max = 64,
                                  .tenants_max = 4,
                                  .decoder = {.decode = decode}};
}

// All requests at once, those that cancel after their tokens; the answers by number of request.
static struct engine_counters run(const struct fixture *f, const struct stack_options *options,
                                  struct driver_answer *answers)
{
    struct driver *d = driver_create(options);
    uint64_t ids[REQUESTS];
    bool cancelled[REQUESTS] = {false};
    for (uint32_t i = 0; i < REQUESTS; i++)
        ids[i] = driver_submit(d, &f->requests[i].ask);
    while (d->open) {
        (void)driver_turn(d);
        for (uint32_t i = 0; i < REQUESTS; i++) {
            const struct request *r = &f->requests[i];
            if (!r->cancel_at || cancelled[i] || driver_answer_of(d, ids[i])->count < r->cancel_at)
                continue;
            driver_control(d, ENGINE_CANCEL, ids[i]);
            cancelled[i] = true;
        }
    }
    driver_finish(d);
    // Rows that nobody wants any more may still run; then nothing is left.
    while (driver_turn(d) != ENGINE_IDLE)
        continue;
    struct engine_counters c;
    engine_counters(stack_engine(d->stack), &c);
    for (uint32_t i = 0; i < REQUESTS; i++)
        answers[i] = *driver_answer_of(d, ids[i]);
    engine_check(stack_engine(d->stack));
    driver_destroy(d);
    return c;
}

static void compare(const struct driver_answer *got, const struct driver_answer *want, bool cancels)
{
    uint32_t count = got->count < want->count ? got->count : want->count;
    assert_true(got->done && want->done);
    assert_int_equal(got->generated, got->count);
    if (got->status && !cancels)
        (void)printf("%s\n", got->message);
    if (!cancels) { // when a cancel takes effect is a matter of time
        assert_int_equal(got->status, STATUS_OK);
        assert_int_equal(got->finish, want->finish);
        assert_int_equal(got->count, want->count);
        assert_int_equal(got->text_bytes, want->text_bytes);
        assert_memory_equal(got->text, want->text, want->text_bytes);
    }
    assert_memory_equal(got->token, want->token, count * sizeof *got->token);
    assert_memory_equal(got->logprob, want->logprob, count * sizeof *got->logprob);
}

static bool force(void *context, uint32_t step_class, uint32_t half)
{
    uint32_t *calls = context;
    (void)step_class;
    (void)half;
    return ++*calls % 3 == 0;
}

static void test_engine_ahead_gives_the_same_answers(void **state)
{
    const struct fixture *f = *state;
    static struct driver_answer want[REQUESTS], got[REQUESTS];
    struct stack_options o = options_of(f);
    o.no_plan_ahead = true;
    struct engine_counters c = run(f, &o, want);
    assert_int_equal(c.planned_ahead, 0);
    assert_int_equal(c.rows_surplus, 0);
    uint32_t calls = 0, stopped = 0;
    for (uint32_t variant = 0; variant < 4; variant++) {
        o = options_of(f);
        o.segment_halves_max = variant == 1 ? 2 : 12;
        o.rows_max = variant == 2 ? 17 : 48;
        o.force_leave = variant == 3 ? force : NULL;
        o.force_leave_context = &calls;
        c = run(f, &o, got);
        for (uint32_t i = 0; i < REQUESTS; i++) {
            compare(&got[i], &want[i], f->requests[i].cancel_at);
            stopped += got[i].finish == ENGINE_FINISH_STOP;
        }
        assert_true(c.planned_ahead > c.steps / 4);
        assert_true(c.rows_surplus > 0);
        (void)printf("%llu of %llu steps were planned ahead, %llu given up; %llu of %llu rows were "
                     "surplus\n",
                     (unsigned long long)c.planned_ahead, (unsigned long long)c.steps,
                     (unsigned long long)c.ahead_dropped, (unsigned long long)c.rows_surplus,
                     (unsigned long long)c.rows);
    }
    assert_true(stopped > 16);
}

// One sequence that ends by its length: nothing is surplus, and all but the first step and those
// of the prompt are planned ahead.
static void test_engine_ahead_knows_the_length(void **state)
{
    const struct fixture *f = *state;
    struct stack_options o = options_of(f);
    struct driver *d = driver_create(&o);
    struct driver_ask ask = {.prompt = f->requests[0].prompt, .prompt_tokens = 1, .max_tokens = 20};
    uint64_t id = driver_submit(d, &ask);
    driver_finish(d);
    struct engine_counters c;
    engine_counters(stack_engine(d->stack), &c);
    assert_int_equal(driver_answer_of(d, id)->count, 20);
    assert_int_equal(c.steps, 20);
    assert_int_equal(c.planned_ahead, 19);
    assert_int_equal(c.rows_surplus, 0);
    driver_destroy(d);
}

// A stop token: the row after it is computed once, and dropped.
static void test_engine_ahead_drops_surplus_tokens(void **state)
{
    const struct fixture *f = *state;
    struct stack_options o = options_of(f);
    struct driver *d = driver_create(&o);
    struct driver_ask ask = {.prompt = f->requests[1].prompt,
                             .prompt_tokens = 1,
                             .max_tokens = 30,
                             .temperature = 30.0f,
                             .seed = 5};
    uint64_t id = driver_submit(d, &ask);
    driver_finish(d);
    struct driver_answer whole = *driver_answer_of(d, id);
    uint32_t at = 0; // the first token that did not come before
    for (uint32_t t = 1; t < whole.count && !at; t++) {
        bool before = false;
        for (uint32_t i = 0; i < t; i++)
            before = before || whole.token[i] == whole.token[t];
        at = before ? 0 : t;
    }
    assert_true(at && at + 1 < whole.count);
    ask.stop_token = &whole.token[at];
    ask.stop_tokens = 1;
    id = driver_submit(d, &ask);
    driver_finish(d);
    while (driver_turn(d) != ENGINE_IDLE)
        continue;
    struct engine_counters c;
    engine_counters(stack_engine(d->stack), &c);
    assert_int_equal(driver_answer_of(d, id)->count, at + 1);
    assert_int_equal(driver_answer_of(d, id)->generated, at + 1);
    assert_int_equal(driver_answer_of(d, id)->finish, ENGINE_FINISH_STOP);
    assert_int_equal(c.rows_surplus, 1);
    assert_int_equal(c.generated_tokens, whole.count + at + 1);
    driver_destroy(d);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_engine_ahead_gives_the_same_answers),
        cmocka_unit_test(test_engine_ahead_knows_the_length),
        cmocka_unit_test(test_engine_ahead_drops_surplus_tokens),
    };
    return cmocka_run_group_tests(tests, make_fixture, drop_fixture);
}
