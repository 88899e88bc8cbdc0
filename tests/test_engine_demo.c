// SPDX-License-Identifier: Apache-2.0
// The bundled model with all its adapters: mixed batches, a pool in which KV, adapters and experts
// push one another out, swapping. The truth is each request alone in a pool where everything fits.
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <setjmp.h>
#include <cmocka.h>

#include <dirent.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "base/rng.h"
#include "engine_driver.h"

#define MODEL POLDER_SOURCE_DIR "/models/demo"

enum { ADAPTERS_MAX = 32, REQUESTS = 40, GENERATE = 24, PAGE = 32768 };

struct fixture {
    char state[64];
    char adapter[ADAPTERS_MAX][64];
    int adapters;
    int32_t prompt[REQUESTS][512];
    uint32_t prompt_tokens[REQUESTS];
    struct driver_answer *truth;
};

static struct stack_options options_of(const struct fixture *f)
{
    return (struct stack_options){.model = MODEL,
                                  .state_directory = f->state,
                                  .device = driver_device(),
                                  .batch_invariant = true,
                                  .context_max = 768,
                                  .sequences_max = 32,
                                  .rows_max = 256,
                                  .queue_max = 128,
                                  .tenants_max = 4,
                                  .adapters_max = 64,
                                  .rank_max = 64,
                                  .page_bytes = PAGE,
                                  .no_prefix_sharing = true};
}

static struct driver *open_demo(const struct fixture *f, const struct stack_options *o)
{
    struct driver *d = driver_create(o);
    for (int i = 0; i < f->adapters; i++) {
        char path[600];
        struct adapter_report report;
        struct fault fault = {.text = ""};
        (void)snprintf(path, sizeof path, "%s/adapters/%s", MODEL, f->adapter[i]);
        if (stack_add_adapter(d->stack, f->adapter[i], path, &report, &fault))
            (void)fprintf(stderr, "%s\n", fault.text);
        assert_int_equal(fault.text[0], 0);
    }
    return d;
}

static struct driver_ask ask_of(const struct fixture *f, int i)
{
    int which = i % (f->adapters + 1);
    return (struct driver_ask){.prompt = f->prompt[i],
                               .prompt_tokens = f->prompt_tokens[i],
                               .max_tokens = GENERATE,
                               .tenant = (uint32_t)i % 4,
                               .class = (uint32_t)i % 3,
                               .adapter = which < f->adapters ? f->adapter[which] : NULL,
                               .temperature = i % 2 ? 0.7f : 0.0f,
                               .top_p = 0.95f,
                               .seed = (uint64_t)i};
}

static int make_fixture(void **state)
{
    struct fixture *f = calloc(1, sizeof *f);
    struct rng rng = {.seed = 21};
    DIR *list = opendir(MODEL "/adapters");
    assert_non_null(list);
    for (struct dirent *entry; (entry = readdir(list)) && f->adapters < ADAPTERS_MAX;) {
        if (entry->d_name[0] != '.')
            (void)snprintf(f->adapter[f->adapters++], 64, "%.60s", entry->d_name);
    }
    (void)closedir(list);
    assert_true(f->adapters >= 8);
    driver_make_directory(f->state, sizeof f->state);
    for (int i = 0; i < REQUESTS; i++) {
        f->prompt_tokens[i] = 64 + (uint32_t)rng_below(&rng, 385); // 64 to 448
        for (uint32_t t = 0; t < f->prompt_tokens[i]; t++)
            f->prompt[i][t] = 300 + (int32_t)rng_below(&rng, 7000);
    }
    f->truth = calloc(REQUESTS, sizeof *f->truth);
    struct stack_options o = options_of(f);
    struct driver *d = open_demo(f, &o);
    for (int i = 0; i < REQUESTS; i++) {
        struct driver_ask ask = ask_of(f, i);
        driver_reset(d);
        uint64_t id = driver_submit(d, &ask);
        driver_finish(d);
        f->truth[i] = *driver_answer_of(d, id);
        assert_int_equal(f->truth[i].status, STATUS_OK);
    }
    driver_destroy(d);
    *state = f;
    return 0;
}

static int drop_fixture(void **state)
{
    struct fixture *f = *state;
    driver_remove(f->state);
    free(f->truth);
    free(f);
    return 0;
}

static void run_all(struct driver *d, const struct fixture *f)
{
    uint64_t ids[REQUESTS];
    driver_reset(d);
    for (int i = 0; i < REQUESTS; i++) {
        struct driver_ask ask = ask_of(f, i);
        ids[i] = driver_submit(d, &ask);
    }
    driver_finish(d);
    for (int i = 0; i < REQUESTS; i++) {
        const struct driver_answer *a = driver_answer_of(d, ids[i]);
        if (a->status)
            (void)fprintf(stderr, "request %d: %s\n", i, a->message);
        assert_int_equal(a->status, STATUS_OK);
        assert_int_equal(a->count, GENERATE);
        assert_memory_equal(a->token, f->truth[i].token, GENERATE * sizeof *a->token);
        assert_memory_equal(a->logprob, f->truth[i].logprob, GENERATE * sizeof *a->logprob);
    }
}

static void test_engine_demo_all_adapters_in_one_batch(void **state)
{
    struct stack_options o = options_of(*state);
    struct driver *d = open_demo(*state, &o);
    run_all(d, *state);
    driver_destroy(d);
}

static void print_trade(const struct pool_stats *p)
{
    static const char *const kinds[PAGE_KINDS] = {"KV", "adapter", "expert"};
    for (int to = 0; to < PAGE_KINDS; to++) {
        for (int from = 0; from < PAGE_KINDS; from++) {
            if (to != from)
                (void)printf("%s took %llu pages from %s\n", kinds[to],
                             (unsigned long long)p->taken_from[to][from], kinds[from]);
        }
    }
}

// 768 pages of experts, about 600 of adapters, up to 2,000 of KV wanted: far more than the pool.
// The same load again and again; what it computed must be the truth each time, and every kind takes
// pages from every other. (KV seldom from adapters: those of all that run keep their place.)
static void test_engine_demo_kinds_trade_pages(void **state)
{
    struct stack_options o = options_of(*state);
    o.pool_bytes = 640ull * PAGE;
    o.host_bytes = 512ull * PAGE;
    o.no_prefix_sharing = false; // unused KV stays in the index, so that there is some to take
    struct driver *d = open_demo(*state, &o);
    struct pool_stats p;
    bool enough = false;
    for (int round = 0; round < 12 && !enough; round++) {
        run_all(d, *state);
        pool_stats(stack_pool(d->stack), &p);
        enough = true;
        for (int to = 0; to < PAGE_KINDS; to++) {
            for (int from = 0; from < PAGE_KINDS; from++)
                enough = enough && (to == from || p.taken_from[to][from] >= 20);
        }
    }
    print_trade(&p);
    struct engine_counters c;
    engine_counters(stack_engine(d->stack), &c);
    (void)printf("%llu swaps out, %llu in, %llu drops, %llu gate misses\n",
                 (unsigned long long)c.swaps_out, (unsigned long long)c.swaps_in,
                 (unsigned long long)c.drops, (unsigned long long)c.gate_misses);
    assert_true(enough);
    driver_destroy(d);
}

enum { KV_LIMIT = 150 };

static void test_engine_demo_swapping_changes_nothing(void **state)
{
    struct stack_options o = options_of(*state);
    o.pool_bytes = 900ull * PAGE;
    o.host_bytes = 2048ull * PAGE;
    struct driver *d = open_demo(*state, &o);
    struct engine_counters c = {.steps = 0};
    // Room for what many of them begin with, not for what they grow to: at any speed of the device.
    pool_set_limit(stack_pool(d->stack), PAGE_KV, KV_LIMIT);
    for (int round = 0; round < 6 && !c.swaps_in; round++) {
        run_all(d, *state);
        engine_counters(stack_engine(d->stack), &c);
    }
    (void)printf("%llu swaps out, %llu in, %llu drops, %llu rows recomputed\n",
                 (unsigned long long)c.swaps_out, (unsigned long long)c.swaps_in,
                 (unsigned long long)c.drops, (unsigned long long)c.rows_recomputed);
    assert_true(c.swaps_out > 0 && c.swaps_in > 0);
    assert_true(c.drops > 0 || c.rows_recomputed == 0);
    driver_destroy(d);
}

// Reserved minus used, page rounding included, while 64 sequences of 64 to 448 tokens are there.
static void test_engine_demo_kv_waste_is_under_4_percent(void **state)
{
    enum { SEQUENCES = 64 };
    const struct fixture *f = *state;
    struct stack_options o = options_of(f);
    o.sequences_max = SEQUENCES;
    struct driver *d = driver_create(&o);
    struct rng rng = {.seed = 4};
    uint64_t prompts = 0;
    driver_reset(d);
    for (int i = 0; i < SEQUENCES; i++) {
        struct driver_ask ask = {.prompt = f->prompt[i % REQUESTS],
                                 .prompt_tokens = 64 + (uint32_t)rng_below(&rng, 385),
                                 .max_tokens = 200};
        (void)driver_submit(d, &ask);
        prompts += ask.prompt_tokens;
    }
    // Until every prompt is done: what a chunk in flight is about to use is not waste.
    struct engine_counters c;
    do {
        (void)driver_turn(d);
        engine_counters(stack_engine(d->stack), &c);
    } while (c.prompt_tokens < prompts || c.generated_tokens < 2 * SEQUENCES || c.waiting);
    struct kv_stats kv;
    kv_stats(stack_kv(d->stack), &kv);
    double waste = 1.0 - (double)kv.used_bytes / (double)kv.reserved_bytes;
    (void)printf("%llu sequences, %llu KiB reserved, %llu KiB used: waste %.2f %%\n",
                 (unsigned long long)kv.sequences, (unsigned long long)(kv.reserved_bytes >> 10),
                 (unsigned long long)(kv.used_bytes >> 10), 100 * waste);
    assert_int_equal(kv.sequences, SEQUENCES);
    assert_true(waste < 0.04);
    for (uint64_t id = 1; id <= SEQUENCES; id++)
        driver_control(d, ENGINE_CANCEL, id);
    driver_finish(d);
    driver_destroy(d);
}

int main(void)
{
    driver_skip_without_device();
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_engine_demo_all_adapters_in_one_batch),
        cmocka_unit_test(test_engine_demo_kinds_trade_pages),
        cmocka_unit_test(test_engine_demo_swapping_changes_nothing),
        cmocka_unit_test(test_engine_demo_kv_waste_is_under_4_percent),
    };
    return cmocka_run_group_tests(tests, make_fixture, drop_fixture);
}
