// SPDX-License-Identifier: Apache-2.0
// The engine against transformers and PEFT, on tiny random checkpoints of odd but legal shapes.
//
//   float32 path   logits within 1e-4 of transformers' float32, relative to the largest logit
//   as shipped     error at most twice that of transformers' own bfloat16
//   adapters       float32 path within 1e-4 of transformers + PEFT in float32, each alone and all
//   in one batch; those of the dense base also as shipped, on the device under test, within
//   AS_SHIPPED (a router that rounding turns would be right, and far off)
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <setjmp.h>
#include <cmocka.h>

#include <dirent.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "base/safetensors.h"
#include "engine_driver.h"
#include "golden_file.h"
#include "kernels/tile.h"

#define MODELS POLDER_SOURCE_DIR "/tests/golden/model"
#define ADAPTERS POLDER_SOURCE_DIR "/tests/golden/adapters"

enum { CASES_MAX = 64 };

#define AS_SHIPPED 0.15

static struct driver *open_model(const char *directory, const char *state, enum dtype dtype)
{
    struct stack_options o = {.model = directory,
                              .device = dtype == DTYPE_BF16 ? driver_device() : "cpu",
                              .state_directory = state,
                              .dtype = dtype,
                              .sequences_max = 32,
                              .rows_max = 128,
                              .adapters_max = CASES_MAX,
                              .rank_max = 64,
                              .no_prefix_sharing = true,
                              .pool_bytes = 24 << 20,
                              .host_bytes = 4 << 20};
    return driver_create(&o);
}

// Logits at the last of `tokens` positions, in the engine's buffer.
static const float *logits_after(struct driver *d, const int32_t *token, uint32_t tokens,
                                 const char *adapter)
{
    struct driver_ask ask = {
        .prompt = token, .prompt_tokens = tokens, .max_tokens = 1, .adapter = adapter};
    driver_reset(d);
    uint64_t id = driver_submit(d, &ask);
    driver_finish(d);
    const struct driver_answer *a = driver_answer_of(d, id);
    if (a->status)
        (void)fprintf(stderr, "%s\n", a->message);
    assert_int_equal(a->status, STATUS_OK);
    return engine_logits(stack_engine(d->stack), 0);
}

struct error {
    double worst, largest, theirs;
};

static void add_row(struct error *e, const float *ours, const float *want, const uint16_t *bf16,
                    uint32_t vocab)
{
    for (uint32_t v = 0; v < vocab; v++) {
        assert_true(isfinite(ours[v]));
        e->largest = fmax(e->largest, fabs((double)want[v]));
        e->worst = fmax(e->worst, fabs((double)ours[v] - (double)want[v]));
        if (bf16)
            e->theirs = fmax(e->theirs, fabs((double)bf16_to_f32(bf16[v]) - (double)want[v]));
    }
}

static struct error check_sequences(struct driver *d, const struct golden *g)
{
    struct error e = {0};
    for (uint32_t i = 0; i < g->count; i++) {
        const struct golden_sequence *s = &g->sequences[i];
        for (uint32_t r = 0; r < s->rows; r++)
            add_row(&e, logits_after(d, s->token, s->position[r] + 1, NULL),
                    s->logits + (size_t)r * g->vocab, s->logits_bf16 + (size_t)r * g->vocab,
                    g->vocab);
    }
    return e;
}

static void check_greedy(struct driver *d, const struct golden *g)
{
    for (uint32_t i = 0; i < g->count; i++) {
        const struct golden_sequence *s = &g->sequences[i];
        if (!s->greedy)
            continue;
        struct driver_ask ask = {
            .prompt = s->token, .prompt_tokens = s->tokens, .max_tokens = s->greedy};
        driver_reset(d);
        uint64_t id = driver_submit(d, &ask);
        driver_finish(d);
        assert_int_equal(driver_answer_of(d, id)->count, s->greedy);
        assert_memory_equal(driver_answer_of(d, id)->token, s->next, s->greedy * sizeof *s->next);
    }
}

static void check_model(const char *name)
{
    char directory[512], path[600], state[64];
    struct golden golden;
    (void)snprintf(directory, sizeof directory, "%s/%s", MODELS, name);
    (void)snprintf(path, sizeof path, "%s/golden.bin", directory);
    assert_true(golden_load(path, &golden));
    driver_make_directory(state, sizeof state);
    struct driver *d = open_model(directory, state, DTYPE_F32);
    struct error exact = check_sequences(d, &golden);
    check_greedy(d, &golden);
    driver_destroy(d);
    d = open_model(directory, state, DTYPE_BF16);
    struct error shipped = check_sequences(d, &golden);
    driver_destroy(d);
    (void)printf(
        "%-16s float32 %.1e of the largest; bf16 %.2e, transformers' own bf16 %.2e (%.2fx)\n", name,
        exact.worst / exact.largest, shipped.worst / shipped.largest,
        shipped.theirs / shipped.largest, shipped.worst / shipped.theirs);
    assert_true(exact.worst <= 1e-4 * exact.largest);
    assert_true(shipped.worst <= 2.0 * shipped.theirs);
    golden_clear(&golden);
    driver_remove(state);
}

static void test_goldens_models(void **state)
{
    (void)state;
    int count = 0;
    DIR *list = opendir(MODELS);
    assert_non_null(list);
    for (struct dirent *entry; (entry = readdir(list));) {
        if (entry->d_name[0] == '.')
            continue;
        check_model(entry->d_name);
        count++;
    }
    (void)closedir(list);
    assert_true(count >= 6);
}

// ---- adapters ----

struct adapter_case {
    char name[64], base[64];
    struct reader *reader;
    struct safetensors *golden;
};

static void open_case(struct adapter_case *c, const char *name)
{
    char directory[512];
    struct fault fault;
    (void)snprintf(directory, sizeof directory, "%s/%s", ADAPTERS, name);
    (void)snprintf(c->name, sizeof c->name, "%s", name);
    assert_int_equal(reader_open_in(directory, "golden.safetensors", &c->reader, &fault),
                     STATUS_OK);
    assert_int_equal(safetensors_open(c->reader, name, &c->golden, &fault), STATUS_OK);
    const char *base = safetensors_metadata(c->golden, "base");
    assert_non_null(base);
    (void)snprintf(c->base, sizeof c->base, "%s", base);
}

static void close_case(struct adapter_case *c)
{
    safetensors_close(c->golden);
    reader_close(c->reader);
}

static uint32_t read_tokens(const struct adapter_case *c, int which, int32_t *out, uint32_t room)
{
    char name[32];
    struct fault fault;
    (void)snprintf(name, sizeof name, "tokens.%d", which);
    const struct tensor *t = safetensors_find(c->golden, name);
    assert_non_null(t);
    assert_true(t->elements <= room);
    assert_int_equal(safetensors_read(c->golden, t, 0, out, t->bytes, &fault), STATUS_OK);
    return (uint32_t)t->elements;
}

static struct error check_case(struct driver *d, const struct adapter_case *c)
{
    struct error e = {0};
    for (int which = 0; which < 2; which++) {
        int32_t token[128];
        char name[32];
        struct fault fault;
        uint32_t tokens = read_tokens(c, which, token, 128);
        (void)snprintf(name, sizeof name, "logits.%d", which);
        const struct tensor *t = safetensors_find(c->golden, name);
        assert_non_null(t);
        uint32_t vocab = (uint32_t)(t->elements / tokens);
        float *want = malloc(t->elements * sizeof *want);
        assert_non_null(want);
        assert_int_equal(safetensors_read_f32(c->golden, t, 0, want, t->elements, &fault),
                         STATUS_OK);
        for (uint32_t i = 0; i < tokens; i++)
            add_row(&e, logits_after(d, token, i + 1, c->name), want + (size_t)i * vocab, NULL,
                    vocab);
        free(want);
    }
    return e;
}

// Every adapter of this base and the base itself in one batch: bit for bit what each gives alone.
static void check_mixed(struct driver *d, struct adapter_case *cases, const int *mine, int count)
{
    enum { STEPS = 12 };
    static struct driver_answer alone[CASES_MAX];
    int32_t token[128];
    uint64_t ids[CASES_MAX];
    uint32_t tokens = read_tokens(&cases[mine[0]], 0, token, 128);
    for (int i = 0; i <= count; i++) {
        const char *adapter = i < count ? cases[mine[i]].name : NULL;
        struct driver_ask ask = {
            .prompt = token, .prompt_tokens = tokens, .max_tokens = STEPS, .adapter = adapter};
        driver_reset(d);
        uint64_t id = driver_submit(d, &ask);
        driver_finish(d);
        alone[i] = *driver_answer_of(d, id);
    }
    driver_reset(d);
    for (int i = 0; i <= count; i++) {
        const char *adapter = i < count ? cases[mine[i]].name : NULL;
        struct driver_ask ask = {
            .prompt = token, .prompt_tokens = tokens, .max_tokens = STEPS, .adapter = adapter};
        ids[i] = driver_submit(d, &ask);
    }
    driver_finish(d);
    for (int i = 0; i <= count; i++) {
        const struct driver_answer *a = driver_answer_of(d, ids[i]);
        assert_int_equal(a->status, STATUS_OK);
        assert_int_equal(a->count, STEPS);
        assert_memory_equal(a->token, alone[i].token, STEPS * sizeof *a->token);
        assert_memory_equal(a->logprob, alone[i].logprob, STEPS * sizeof *a->logprob);
    }
}

static void check_base(struct adapter_case *cases, int count, const char *base, enum dtype dtype)
{
    char directory[512], path[600], state[64];
    double allowed = dtype == DTYPE_F32 ? 1e-4 : AS_SHIPPED;
    int mine[CASES_MAX], n = 0;
    (void)snprintf(directory, sizeof directory, "%s/%s", ADAPTERS, base);
    driver_make_directory(state, sizeof state);
    struct driver *d = open_model(directory, state, dtype);
    for (int i = 0; i < count; i++) {
        struct adapter_report report;
        struct fault fault = {.text = ""};
        if (strcmp(cases[i].base, base) != 0)
            continue;
        (void)snprintf(path, sizeof path, "%s/%s/adapter", ADAPTERS, cases[i].name);
        if (stack_add_adapter(d->stack, cases[i].name, path, &report, &fault))
            (void)fprintf(stderr, "%s: %s\n", cases[i].name, fault.text);
        assert_int_equal(fault.text[0], 0);
        struct error e = check_case(d, &cases[i]);
        (void)printf("%-24s on %-20s %s %.1e of the largest; %s, applied to %u of %u\n",
                     cases[i].name, base, dtype == DTYPE_F32 ? "f32 " : "bf16", e.worst / e.largest,
                     report.layout, report.matrices_applied, report.matrices_possible);
        assert_true(e.worst <= allowed * e.largest);
        mine[n++] = i;
    }
    if (n && dtype == DTYPE_F32)
        check_mixed(d, cases, mine, n);
    driver_destroy(d);
    driver_remove(state);
}

static void test_goldens_adapters(void **state)
{
    (void)state;
    static struct adapter_case cases[CASES_MAX];
    char bases[CASES_MAX][64];
    int count = 0, base_count = 0;
    DIR *list = opendir(ADAPTERS);
    assert_non_null(list);
    for (struct dirent *entry; (entry = readdir(list)) && count < CASES_MAX;) {
        if (!strncmp(entry->d_name, "base-", 5))
            (void)snprintf(bases[base_count++], sizeof bases[0], "%.60s", entry->d_name);
        else if (entry->d_name[0] != '.')
            open_case(&cases[count++], entry->d_name);
    }
    (void)closedir(list);
    for (int b = 0; b < base_count; b++)
        check_base(cases, count, bases[b], DTYPE_F32);
    check_base(cases, count, "base-dense", DTYPE_BF16);
    for (int i = 0; i < count; i++)
        close_case(&cases[i]);
    assert_true(count >= 10 && base_count >= 2);
}

int main(void)
{
    driver_skip_without_device();
    const struct CMUnitTest tests[] = {cmocka_unit_test(test_goldens_models),
                                       cmocka_unit_test(test_goldens_adapters)};
    return cmocka_run_group_tests(tests, NULL, NULL);
}
