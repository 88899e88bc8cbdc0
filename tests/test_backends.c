// SPDX-License-Identifier: Apache-2.0
// Two backends on the demo model, teacher-forced: the reference generates greedily, the other one
// is given the reference's tokens and must choose the same at every position, for the base model,
// for every adapter, and for a random one of embed_tokens and lm_head. Where the choice differs the
// reference's own gap between the two tokens must be within twice the logit error measured at that
// position.
//
// The reference is the best CPU instruction set; the other is POLDER_TEST_DEVICE, or portable C
// when that is the CPU. POLDER_TEST_PROMPTS prompts per variant (default 1), 64 tokens of text
// each, from this repository's own files; 64 tokens are generated.
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

#include "base/rng.h"
#include "engine_driver.h"
#include "runtime/tokenizer/tokenizer.h"

#define MODEL POLDER_SOURCE_DIR "/models/demo"

enum { PROMPT = 64, GENERATE = 64, VARIANTS_MAX = 32, NAME_MAX_BYTES = 64, RANK = 6 };

#define VOCABULARY "vocabulary" // the adapter that is made here

static const char *const texts[] = {"/docs/protocol.md", "/runtime/engine/step.c",
                                    "/unified_pool/move.c", "/docs/formats.md",
                                    "/runtime/server/connection.c"};

struct fixture {
    char state[2][64], made[64];
    struct driver *reference, *other;
    char variant[VARIANTS_MAX][NAME_MAX_BYTES]; // "" is the base model
    uint32_t variants;
    uint32_t *ids;
    size_t id_count;
};

struct tally {
    uint64_t points, same, excused;
    double worst, largest;
};

static char *read_text(const char *name, size_t *bytes)
{
    char path[512];
    (void)snprintf(path, sizeof path, "%s%s", POLDER_SOURCE_DIR, name);
    FILE *file = fopen(path, "rb");
    assert_non_null(file);
    char *text = malloc(1 << 17);
    *bytes = fread(text, 1, 1 << 17, file);
    (void)fclose(file);
    return text;
}

static void make_prompts(struct fixture *f)
{
    struct tokenizer *tokenizer = NULL;
    struct token_scratch *scratch = NULL;
    struct token_list list = {0};
    struct fault fault = {.text = ""};
    assert_int_equal(tokenizer_load_in(MODEL, &tokenizer, &fault), STATUS_OK);
    assert_int_equal(token_scratch_create(&scratch), STATUS_OK);
    for (size_t i = 0; i < sizeof texts / sizeof *texts; i++) {
        size_t bytes;
        char *text = read_text(texts[i], &bytes);
        assert_int_equal(
            tokenizer_encode(tokenizer, scratch, text, bytes, 0, 1 << 20, &list, &fault),
            STATUS_OK);
        free(text);
    }
    token_scratch_destroy(scratch);
    tokenizer_free(tokenizer);
    f->ids = list.ids;
    f->id_count = list.count;
}

static FILE *open_made(const struct fixture *f, const char *name)
{
    char path[128];
    (void)snprintf(path, sizeof path, "%s/%s", f->made, name);
    FILE *file = fopen(path, "wb");
    assert_non_null(file);
    return file;
}

// lm_head's B of this vocabulary is longer than a block (kernels/lora.h).
static void make_vocabulary_adapter(const struct fixture *f)
{
    struct model_config c;
    struct fault fault;
    assert_int_equal(model_config_load(MODEL, &c, &fault), STATUS_OK);
    const struct {
        const char *name;
        uint32_t shape[2];
    } tensors[] = {{"model.embed_tokens.lora_embedding_A", {RANK, c.vocab}},
                   {"model.embed_tokens.lora_embedding_B", {c.hidden, RANK}},
                   {"lm_head.lora_A.weight", {RANK, c.hidden}},
                   {"lm_head.lora_B.weight", {c.vocab, RANK}}};
    char header[1024] = "{";
    size_t at = 0, used = 1;
    for (size_t i = 0; i < sizeof tensors / sizeof *tensors; i++) {
        size_t bytes = (size_t)2 * tensors[i].shape[0] * tensors[i].shape[1];
        used += (size_t)snprintf(header + used, sizeof header - used,
                                 "%s\"base_model.model.%s\":{\"dtype\":\"BF16\",\"shape\":[%u,%u],"
                                 "\"data_offsets\":[%zu,%zu]}",
                                 i ? "," : "", tensors[i].name, tensors[i].shape[0],
                                 tensors[i].shape[1], at, at + bytes);
        at += bytes;
    }
    header[used++] = '}';
    FILE *file = open_made(f, "adapter_model.safetensors");
    uint64_t length = used;
    assert_int_equal(fwrite(&length, sizeof length, 1, file), 1);
    assert_int_equal(fwrite(header, 1, used, file), used);
    for (uint64_t i = 0; i < at / 2; i++) {
        uint16_t value = bf16_from_f32(0.8f * (rng_uniform(7, 1, i) - 0.5f));
        assert_int_equal(fwrite(&value, sizeof value, 1, file), 1);
    }
    assert_int_equal(fclose(file), 0);
    file = open_made(f, "adapter_config.json");
    (void)fprintf(file,
                  "{\"peft_type\":\"LORA\",\"r\":%d,\"lora_alpha\":%d,"
                  "\"target_modules\":[\"embed_tokens\",\"lm_head\"]}",
                  RANK, RANK);
    assert_int_equal(fclose(file), 0);
    model_config_clear(&c);
}

static struct driver *open_stack(struct fixture *f, int which, const char *device, const char *isa)
{
    driver_make_directory(f->state[which], sizeof f->state[which]);
    struct stack_options o = {.model = MODEL,
                              .state_directory = f->state[which],
                              .device = device,
                              .instruction_set = isa,
                              .context_max = 256,
                              .sequences_max = 8,
                              .rows_max = 256,
                              .adapters_max = 64,
                              .rank_max = 64};
    struct driver *d = driver_create(&o);
    for (uint32_t i = 1; i < f->variants; i++) {
        char path[600];
        struct adapter_report report;
        struct fault fault = {.text = ""};
        (void)snprintf(path, sizeof path, "%s/adapters/%s", MODEL, f->variant[i]);
        if (strcmp(f->variant[i], VOCABULARY) == 0)
            (void)snprintf(path, sizeof path, "%s", f->made);
        assert_int_equal(stack_add_adapter(d->stack, f->variant[i], path, &report, &fault),
                         STATUS_OK);
    }
    return d;
}

static int make_fixture(void **state)
{
    struct fixture *f = calloc(1, sizeof *f);
    f->variants = 1;
    DIR *list = opendir(MODEL "/adapters");
    assert_non_null(list);
    for (struct dirent *entry; (entry = readdir(list)) && f->variants < VARIANTS_MAX;)
        if (entry->d_name[0] != '.')
            (void)snprintf(f->variant[f->variants++], NAME_MAX_BYTES, "%.60s", entry->d_name);
    (void)closedir(list);
    assert_true(f->variants < VARIANTS_MAX);
    (void)snprintf(f->variant[f->variants++], NAME_MAX_BYTES, VOCABULARY);
    driver_make_directory(f->made, sizeof f->made);
    make_vocabulary_adapter(f);
    make_prompts(f);
    f->reference = open_stack(f, 0, "cpu", NULL);
    bool gpu = strcmp(driver_device(), "cpu") != 0;
    f->other = open_stack(f, 1, driver_device(), gpu ? NULL : "portable");
    *state = f;
    return 0;
}

static int drop_fixture(void **state)
{
    struct fixture *f = *state;
    driver_destroy(f->reference);
    driver_destroy(f->other);
    driver_remove(f->state[0]);
    driver_remove(f->state[1]);
    driver_remove(f->made);
    free(f->ids);
    free(f);
    return 0;
}

// Logits after `tokens` tokens: all but the last few come from the prefix cache.
static const float *logits_after(struct driver *d, const int32_t *token, uint32_t tokens,
                                 const char *adapter)
{
    struct driver_ask ask = {.prompt = token,
                             .prompt_tokens = tokens,
                             .max_tokens = 1,
                             .adapter = *adapter ? adapter : NULL};
    driver_reset(d);
    uint64_t id = driver_submit(d, &ask);
    driver_finish(d);
    assert_int_equal(driver_answer_of(d, id)->status, STATUS_OK);
    return engine_logits(stack_engine(d->stack), 0);
}

static uint32_t argmax(const float *x, uint32_t n)
{
    uint32_t best = 0;
    for (uint32_t i = 1; i < n; i++)
        best = x[i] > x[best] ? i : best;
    return best;
}

static void check_point(struct fixture *f, const int32_t *token, uint32_t tokens,
                        const char *adapter, struct tally *t)
{
    uint32_t vocab = stack_model(f->reference->stack)->config.vocab;
    const float *want = logits_after(f->reference, token, tokens, adapter);
    const float *got = logits_after(f->other, token, tokens, adapter);
    double error = 0;
    for (uint32_t v = 0; v < vocab; v++) {
        assert_true(isfinite(got[v]));
        error = fmax(error, fabs((double)got[v] - (double)want[v]));
        t->largest = fmax(t->largest, fabs((double)want[v]));
    }
    t->worst = fmax(t->worst, error);
    uint32_t a = argmax(want, vocab), b = argmax(got, vocab);
    t->points++;
    t->same += a == b;
    if (a != b)
        t->excused += (double)want[a] - (double)want[b] <= 2 * error;
}

static void check_prompt(struct fixture *f, uint32_t number, const char *adapter, struct tally *t)
{
    int32_t token[PROMPT + GENERATE];
    size_t from = (size_t)number * 9973 % (f->id_count - PROMPT);
    for (uint32_t i = 0; i < PROMPT; i++)
        token[i] = (int32_t)f->ids[from + i];
    struct driver_ask ask = {.prompt = token,
                             .prompt_tokens = PROMPT,
                             .max_tokens = GENERATE,
                             .adapter = *adapter ? adapter : NULL};
    driver_reset(f->reference);
    uint64_t id = driver_submit(f->reference, &ask);
    driver_finish(f->reference);
    const struct driver_answer *answer = driver_answer_of(f->reference, id);
    uint32_t count = answer->count;
    assert_int_equal(answer->status, STATUS_OK);
    memcpy(token + PROMPT, answer->token, count * sizeof *token);
    for (uint32_t i = 0; i < count; i++)
        check_point(f, token, PROMPT + i, adapter, t);
}

static void test_backends_choose_the_same_tokens(void **state)
{
    struct fixture *f = *state;
    const char *given = getenv("POLDER_TEST_PROMPTS");
    uint32_t prompts = given ? (uint32_t)strtoul(given, NULL, 10) : 1;
    struct tally all = {0};
    for (uint32_t v = 0; v < f->variants; v++) {
        struct tally t = {0};
        for (uint32_t p = 0; p < prompts; p++)
            check_prompt(f, v * 131 + p, f->variant[v], &t);
        (void)printf("%-20s %6llu points, %.3f %% the same choice, %llu of %llu others within "
                     "twice the error; logit error %.3f of %.1f\n",
                     *f->variant[v] ? f->variant[v] : "base", (unsigned long long)t.points,
                     100.0 * (double)t.same / (double)t.points, (unsigned long long)t.excused,
                     (unsigned long long)(t.points - t.same), t.worst, t.largest);
        all.points += t.points;
        all.same += t.same;
        all.excused += t.excused;
    }
    (void)printf("all: %llu points, %.3f %% the same\n", (unsigned long long)all.points,
                 100.0 * (double)all.same / (double)all.points);
    assert_true(all.points >= (uint64_t)prompts * f->variants * GENERATE / 2);
    assert_true((double)all.same >= 0.995 * (double)all.points || all.points < 2000);
    assert_int_equal(all.same + all.excused, all.points);
}

int main(void)
{
    driver_skip_without_device();
    const struct CMUnitTest tests[] = {cmocka_unit_test(test_backends_choose_the_same_tokens)};
    return cmocka_run_group_tests(tests, make_fixture, drop_fixture);
}
