// SPDX-License-Identifier: Apache-2.0
// Several ranks in one process, each a whole stack with its engine turned by a thread of its own:
// shared attention heads, experts and MLP units give the greedy tokens of one rank. Requests are
// all submitted before the engines turn, in the same order to every rank, so all plan the same.
//
// The sum of a half-layer is taken in another order than on one rank, so logprobs agree within a
// tolerance and the ranks among themselves bit for bit.
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <setjmp.h>
#include <cmocka.h>

#include <math.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "base/rng.h"
#include "engine_driver.h"

#define DEMO POLDER_SOURCE_DIR "/models/demo"

enum { WORLD_MAX = 3, REQUESTS = 6, PROMPT_MAX = 60, GENERATE = 64 };

struct rank {
    struct driver *driver;
    pthread_t thread;
};

struct load {
    int32_t prompt[REQUESTS][PROMPT_MAX];
    uint32_t prompt_tokens[REQUESTS];
    bool one_by_one; // each request alone
};

struct setting {
    const char *model;
    char state[WORLD_MAX + 1][64]; // of each rank, and of the one that is alone
    struct comm *comms[WORLD_MAX];
    struct rank ranks[WORLD_MAX];
    struct stack_options options;
    struct load load;
    uint32_t world;
};

static void make_load(struct load *load, uint32_t first, uint32_t vocab)
{
    struct rng rng = {.seed = 33};
    for (int i = 0; i < REQUESTS; i++) {
        load->prompt_tokens[i] = 1 + (uint32_t)rng_below(&rng, PROMPT_MAX);
        for (uint32_t t = 0; t < load->prompt_tokens[i]; t++)
            load->prompt[i][t] = (int32_t)(first + rng_below(&rng, vocab - first));
    }
}

static struct setting *setting_new(const char *model, enum dtype dtype, uint32_t world)
{
    struct setting *s = calloc(1, sizeof *s);
    struct fault fault = {.text = ""};
    assert_non_null(s);
    s->model = model;
    s->world = world;
    s->options = (struct stack_options){.model = model,
                                        .dtype = dtype,
                                        .threads = 1,
                                        .context_max = 256,
                                        .sequences_max = 8,
                                        .rows_max = 48,
                                        .queue_max = 16,
                                        .tenants_max = 1,
                                        .adapters_max = 8,
                                        .rank_max = 16,
                                        .no_prefix_sharing = true};
    assert_int_equal(comm_create_local(world, s->comms, &fault), STATUS_OK);
    for (uint32_t r = 0; r <= world; r++)
        driver_make_directory(s->state[r], sizeof s->state[r]);
    return s;
}

static void setting_drop(struct setting *s)
{
    for (uint32_t r = 0; r <= s->world; r++)
        driver_remove(s->state[r]);
    for (uint32_t r = 0; r < s->world; r++)
        s->comms[r]->table->destroy(s->comms[r]);
    free(s);
}

static struct driver *open_rank(const struct setting *s, uint32_t rank)
{
    struct stack_options o = s->options;
    o.state_directory = s->state[rank];
    o.comm = rank < s->world ? s->comms[rank] : NULL;
    return driver_create(&o);
}

static void submit(struct driver *d, const struct load *load, int i)
{
    struct driver_ask ask = {
        .prompt = load->prompt[i], .prompt_tokens = load->prompt_tokens[i], .max_tokens = GENERATE};
    assert_int_equal(driver_submit(d, &ask), i + 1);
}

static void *finish(void *context)
{
    driver_finish(((struct rank *)context)->driver);
    return NULL;
}

static void finish_all(struct setting *s)
{
    for (uint32_t r = 0; r < s->world; r++)
        assert_int_equal(pthread_create(&s->ranks[r].thread, NULL, finish, &s->ranks[r]), 0);
    for (uint32_t r = 0; r < s->world; r++)
        assert_int_equal(pthread_join(s->ranks[r].thread, NULL), 0);
}

static void run_ranks(struct setting *s)
{
    for (uint32_t r = 0; r < s->world; r++)
        s->ranks[r].driver = open_rank(s, r);
    for (int i = 0; i < REQUESTS; i++) {
        for (uint32_t r = 0; r < s->world; r++)
            submit(s->ranks[r].driver, &s->load, i);
        if (s->load.one_by_one || i + 1 == REQUESTS)
            finish_all(s);
    }
}

static void compare(struct setting *s, struct driver *alone, double tolerance)
{
    double worst = 0;
    for (uint64_t id = 1; id <= REQUESTS; id++) {
        const struct driver_answer *want = driver_answer_of(alone, id);
        const struct driver_answer *first = driver_answer_of(s->ranks[0].driver, id);
        for (uint32_t r = 0; r < s->world; r++) {
            const struct driver_answer *got = driver_answer_of(s->ranks[r].driver, id);
            assert_int_equal(got->status, STATUS_OK);
            assert_int_equal(got->count, GENERATE);
            assert_memory_equal(got->token, want->token, GENERATE * sizeof *got->token);
            assert_memory_equal(got->logprob, first->logprob, GENERATE * sizeof *got->logprob);
        }
        for (int i = 0; i < GENERATE; i++)
            worst = fmax(worst, fabs((double)first->logprob[i] - (double)want->logprob[i]));
    }
    (void)printf("%u ranks: logprobs differ from one rank's by %.2g at most\n", s->world, worst);
    assert_true(worst <= tolerance);
}

// The same load on one rank and on all; leaves the ranks' stacks for a look.
static void check(struct setting *s, double tolerance)
{
    struct driver *alone = open_rank(s, s->world);
    for (int i = 0; i < REQUESTS; i++)
        submit(alone, &s->load, i);
    driver_finish(alone);
    run_ranks(s);
    compare(s, alone, tolerance);
    driver_destroy(alone);
}

static void close_ranks(struct setting *s)
{
    for (uint32_t r = 0; r < s->world; r++)
        driver_destroy(s->ranks[r].driver);
}

static void check_synthetic(const char *const *shape, size_t count, enum dtype dtype,
                            uint32_t world, double tolerance)
{
    char model[64];
    driver_make_model(model, sizeof model, "tiny", shape, count, 5);
    struct setting *s = setting_new(model, dtype, world);
    make_load(&s->load, 0, 500);
    check(s, tolerance);
    close_ranks(s);
    setting_drop(s);
    driver_remove(model);
}

static const char *const moe_shape[] = {"hidden=96",         "layers=4",    "heads=4",
                                        "kv_heads=2",        "head_dim=16", "vocab=500",
                                        "experts=12",        "top_k=3",     "moe_intermediate=40",
                                        "max_positions=512", "tied=0"};
enum { MOE_FIELDS = sizeof moe_shape / sizeof *moe_shape };

static void test_parallel_two_ranks_share_heads_and_experts(void **state)
{
    (void)state;
    check_synthetic(moe_shape, MOE_FIELDS, DTYPE_F32, 2, 1e-4);
}

static void test_parallel_three_ranks_of_odd_shape(void **state)
{
    static const char *const shape[] = {"hidden=100",        "layers=3",    "heads=6",
                                        "kv_heads=3",        "head_dim=10", "vocab=500",
                                        "experts=9",         "top_k=4",     "moe_intermediate=24",
                                        "max_positions=512", "tied=0"};
    (void)state;
    check_synthetic(shape, sizeof shape / sizeof *shape, DTYPE_F32, 3, 1e-4);
}

// 22 units a rank: not a whole number of blocks of 8.
static void test_parallel_two_ranks_share_a_dense_mlp(void **state)
{
    static const char *const shape[] = {
        "hidden=96", "layers=3",  "heads=4",         "kv_heads=2",        "head_dim=16",
        "vocab=500", "experts=0", "intermediate=44", "max_positions=512", "tied=0"};
    (void)state;
    check_synthetic(shape, sizeof shape / sizeof *shape, DTYPE_F32, 2, 1e-4);
}

static void test_parallel_two_ranks_of_the_demo_model(void **state)
{
    (void)state;
    struct setting *s = setting_new(DEMO, DTYPE_F32, 2);
    make_load(&s->load, 300, 7000);
    check(s, 1e-3);
    close_ranks(s);
    setting_drop(s);
}

// A pool that cannot hold a rank's experts: gates fire on the ranks at different times, and the
// other rank waits in its sum.
static void test_parallel_ranks_wait_for_each_others_misses(void **state)
{
    char model[64];
    (void)state;
    driver_make_model(model, sizeof model, "tiny", moe_shape, MOE_FIELDS, 5);
    struct setting *s = setting_new(model, DTYPE_F32, 2);
    make_load(&s->load, 0, 500);
    s->load.one_by_one = true;
    s->options.page_bytes = 32768;
    s->options.pool_bytes = 40ull * 32768;
    check(s, 1e-4);
    for (uint32_t r = 0; r < 2; r++) {
        struct engine_counters c;
        engine_counters(stack_engine(s->ranks[r].driver->stack), &c);
        (void)printf("rank %u: %llu gate misses\n", r, (unsigned long long)c.gate_misses);
        assert_true(c.gate_misses > 0);
    }
    close_ranks(s);
    setting_drop(s);
    driver_remove(model);
}

static void test_parallel_a_rank_that_goes_hangs_nobody(void **state)
{
    char model[64];
    (void)state;
    driver_make_model(model, sizeof model, "tiny", moe_shape, MOE_FIELDS, 5);
    struct setting *s = setting_new(model, DTYPE_F32, 2);
    make_load(&s->load, 0, 500);
    for (uint32_t r = 0; r < 2; r++)
        s->ranks[r].driver = open_rank(s, r);
    submit(s->ranks[0].driver, &s->load, 0);
    submit(s->ranks[0].driver, &s->load, 1);
    assert_int_equal(pthread_create(&s->ranks[0].thread, NULL, finish, &s->ranks[0]), 0);
    driver_destroy(s->ranks[1].driver); // it never took a step
    assert_int_equal(pthread_join(s->ranks[0].thread, NULL), 0);
    assert_int_equal(driver_answer_of(s->ranks[0].driver, 1)->status, STATUS_DEVICE);
    assert_int_equal(driver_answer_of(s->ranks[0].driver, 2)->status, STATUS_DEVICE);
    driver_destroy(s->ranks[0].driver);
    setting_drop(s);
    driver_remove(model);
}

static void test_parallel_refuses_what_cannot_be_shared(void **state)
{
    char model[64], store[800];
    (void)state;
    driver_make_model(model, sizeof model, "tiny", moe_shape, MOE_FIELDS, 5);
    struct setting *s = setting_new(model, DTYPE_F32, 3); // 4 heads, 2 KV heads
    struct fault fault = {.text = ""};
    struct stack *stack = NULL;
    s->options.state_directory = s->state[0];
    s->options.comm = s->comms[0];
    assert_int_equal(stack_create(&s->options, &stack, &fault), STATUS_UNSUPPORTED);
    assert_non_null(strstr(fault.text, "3 ranks"));
    setting_drop(s);
    s = setting_new(model, DTYPE_F32, 2);
    s->ranks[0].driver = open_rank(s, 0);
    (void)snprintf(store, sizeof store, "%s/adapters/a.adapter", s->state[0]);
    assert_int_equal(
        engine_register_adapter(stack_engine(s->ranks[0].driver->stack), "a", store, 0, &fault),
        STATUS_UNSUPPORTED);
    assert_non_null(strstr(fault.text, "several ranks"));
    driver_destroy(s->ranks[0].driver);
    setting_drop(s);
    driver_remove(model);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_parallel_two_ranks_share_heads_and_experts),
        cmocka_unit_test(test_parallel_three_ranks_of_odd_shape),
        cmocka_unit_test(test_parallel_two_ranks_share_a_dense_mlp),
        cmocka_unit_test(test_parallel_two_ranks_of_the_demo_model),
        cmocka_unit_test(test_parallel_ranks_wait_for_each_others_misses),
        cmocka_unit_test(test_parallel_a_rank_that_goes_hangs_nobody),
        cmocka_unit_test(test_parallel_refuses_what_cannot_be_shared),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
