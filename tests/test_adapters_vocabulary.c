// SPDX-License-Identifier: Apache-2.0
// LoRA on embed_tokens and lm_head: how their rows lie in the store, what tied embeddings make of
// them, and the base's own matrices beside them. Numbers against PEFT: test_adapters_golden.c.
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <setjmp.h>
#include <cmocka.h>

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "adapters/peft.h"
#include "adapters/store.h"
#include "base/rng.h"
#include "base/safetensors.h"
#include "tests/test_adapters_tool.h"

enum { PAGE = 32768, VOCAB = 5000, HIDDEN = 64 };

#define EMBED "base_model.model.model.embed_tokens"
#define HEAD "base_model.model.lm_head"
#define BOTH "\"target_modules\": [\"embed_tokens\", \"lm_head\"]"

static char store_path[TOOL_PATH + 64];

static struct adapter_base base_of(enum dtype dtype)
{
    struct adapter_base base = tool_base(dtype);
    base.vocab = VOCAB;
    return base;
}

static void begin(struct tool_adapter *a, const char *scratch, const char *rest)
{
    tool_adapter_begin(a, scratch);
    a->count = 0;
    tool_config(a, rest);
}

static void embed_add(struct tool_adapter *a, uint64_t rank)
{
    tool_tensor_add(a, EMBED ".lora_embedding_A", 2, rank, VOCAB, 0);
    tool_tensor_add(a, EMBED ".lora_embedding_B", 2, HIDDEN, rank, 0);
}

static void head_add(struct tool_adapter *a, uint64_t rank)
{
    tool_tensor_add(a, HEAD ".lora_A.weight", 2, rank, HIDDEN, 0);
    tool_tensor_add(a, HEAD ".lora_B.weight", 2, VOCAB, rank, 0);
}

static void expect(const struct tool_adapter *a, const struct adapter_base *base, enum status want,
                   const char *text)
{
    struct adapter_report report;
    struct fault fault = {.text = ""};
    tool_adapter_write(a);
    enum status status = adapter_convert(a->directory, base, PAGE, store_path, &report, &fault);
    if (status != want || !strstr(status ? fault.text : report.ignored, text))
        fail_msg("%s: %s \"%s\" (%s), wanted %s \"%s\"", a->config, status_code(status), fault.text,
                 report.ignored, status_code(want), text);
}

// Element n of the file, as the store keeps it.
static float element(const struct tool_adapter *a, enum dtype dtype, size_t n)
{
    float value = rng_uniform(a->seed, 1, n) - 0.5f;
    return dtype == DTYPE_F32 ? value : bf16_to_f32(bf16_from_f32(value));
}

// A of the embeddings by token, B^T of lm_head in blocks of 4096 bytes.
static void rows_check(const struct tool_adapter *a, const struct tool_rig *rig,
                       const struct adapter_base *base, const struct lora_adapter_view *view)
{
    const struct lora_pair *embed = lora_pair_at(view, base->layers, LORA_EMBED, 0);
    const struct lora_pair *head = lora_pair_at(view, base->layers, LORA_HEAD, 0);
    uint32_t block = (uint32_t)(ADAPTER_CUT_BYTES / dtype_bytes(base->dtype));
    size_t b = 5 * VOCAB + HIDDEN * 5 + 4 * HIDDEN; // where lora_B of lm_head begins in the file
    assert_int_equal(embed->a.rank, 5);
    assert_int_equal(embed->a.row_bytes, base->dtype == DTYPE_F32 ? 32 : 16);
    assert_int_equal(head->b.row_bytes, ADAPTER_CUT_BYTES);
    assert_true(embed->scale > 1.59f && embed->scale < 1.61f && head->scale > 1.9f);
    for (uint32_t t = 0; t < VOCAB; t += t < 300 ? 1 : 37) {
        assert_true(tool_padding_is_zero(rig, base, view, &embed->a, t, 5));
        for (uint32_t j = 0; j < 5; j++)
            assert_true(tool_element(rig, base, view, &embed->a, t, j) ==
                        element(a, base->dtype, (size_t)j * VOCAB + t));
        for (uint32_t j = 0; j < 4; j++)
            assert_true(tool_element(rig, base, view, &head->b, t / block * 4 + j, t % block) ==
                        element(a, base->dtype, b + (size_t)t * 4 + j));
    }
    for (uint32_t j = 0; j < 4; j++)
        assert_true(
            tool_padding_is_zero(rig, base, view, &head->b, VOCAB / block * 4 + j, VOCAB % block));
}

static void test_adapters_vocabulary_rows(void **state)
{
    for (int i = 0; i < 2; i++) {
        struct adapter_base base = base_of(i ? DTYPE_F32 : DTYPE_BF16);
        struct tool_adapter a;
        struct adapter_report report;
        struct fault fault = {.text = ""};
        struct tool_rig rig;
        adapter_id id;
        begin(&a, *state, BOTH ", \"rank_pattern\": {\"embed_tokens\": 5}");
        embed_add(&a, 5);
        head_add(&a, 4);
        tool_adapter_write(&a);
        if (adapter_convert(a.directory, &base, PAGE, store_path, &report, &fault))
            fail_msg("%s", fault.text);
        assert_string_equal(report.layout, "embed, head");
        assert_int_equal(report.matrices_applied, 2);
        assert_int_equal(report.rank_max, 5);
        assert_int_equal(adapter_verify(store_path, &base, PAGE, &fault), STATUS_OK);
        char small[TOOL_PATH + 96]; // no row is longer than the smallest page
        (void)snprintf(small, sizeof small, "%s.small", store_path);
        assert_int_equal(adapter_convert(a.directory, &base, 4096, small, &report, &fault),
                         STATUS_OK);
        assert_int_equal(adapter_verify(small, &base, 4096, &fault), STATUS_OK);
        tool_rig_make(&rig, &base, PAGE, 32, 32, 2);
        assert_int_equal(adapter_register(rig.adapters, "v", store_path, 0, &id, &fault),
                         STATUS_OK);
        assert_true(adapter_has_module(rig.adapters, id, LORA_EMBED));
        assert_true(adapter_has_module(rig.adapters, id, LORA_HEAD));
        assert_false(adapter_has_module(rig.adapters, id, LORA_Q));
        assert_int_equal(adapter_fetch(rig.adapters, id, COPY_BATCH, COPY_PREFETCH), STATUS_OK);
        tool_rig_settle(&rig);
        rows_check(&a, &rig, &base,
                   &adapters_views(rig.adapters)[adapter_view_index(rig.adapters, id)]);
        tool_rig_clear(&rig);
        struct adapter_base other = base;
        other.vocab++;
        assert_int_equal(adapter_verify(store_path, &other, PAGE, &fault), STATUS_DENIED);
    }
}

// PEFT leaves the output layer out, and embeddings are no linear layer.
static void test_adapters_vocabulary_is_not_all_linear(void **state)
{
    static const char text[] = "{\"peft_type\": \"LORA\", \"r\": 4, \"lora_alpha\": 8, "
                               "\"target_modules\": \"all-linear\"}";
    struct peft_config config;
    (void)state;
    assert_int_equal(peft__config_parse(text, strlen(text), &config, NULL), STATUS_OK);
    assert_true(peft__config_targets(&config, "model.layers.0.self_attn.q_proj"));
    assert_false(peft__config_targets(&config, "lm_head"));
    assert_false(peft__config_targets(&config, "model.embed_tokens"));
    peft__config_clear(&config);
}

static void test_adapters_vocabulary_refused(void **state)
{
    struct adapter_base base = base_of(DTYPE_BF16);
    struct tool_adapter a;
    begin(&a, *state, BOTH);
    embed_add(&a, 4);
    expect(&a, &base, STATUS_INVALID, "targets lm_head, but the file has no LoRA for it");
    begin(&a, *state, "\"target_modules\": [\"embed_tokens\"]");
    embed_add(&a, 4);
    head_add(&a, 4);
    expect(&a, &base, STATUS_INVALID,
           "LoRA for lm_head, which adapter_config.json does not target");
    // A name's end belongs to the layers of layers_to_transform; lm_head is the whole name.
    begin(&a, *state, BOTH ", \"layers_to_transform\": [0]");
    head_add(&a, 4);
    expect(&a, &base, STATUS_OK, "");
    embed_add(&a, 4);
    expect(&a, &base, STATUS_INVALID, "LoRA for model.embed_tokens, which adapter_config.json");
    begin(&a, *state, BOTH);
    embed_add(&a, 4);
    head_add(&a, 4);
    a.tensors[0].shape[1]++; // a vocabulary that was resized
    expect(&a, &base, STATUS_INVALID,
           "lora_embedding_A\" has 5001 columns; the base model has 5000 there");
    a.tensors[0].shape[1]--;
    a.tensors[3].shape[0]--;
    expect(&a, &base, STATUS_INVALID, "lm_head.lora_B.weight\" has 4999 rows");
    a.tensors[3].shape[0]++;
    base.vocab = 0;
    expect(&a, &base, STATUS_UNSUPPORTED, "vocabulary is not known here");
}

static void test_adapters_vocabulary_tied(void **state)
{
    struct adapter_base base = base_of(DTYPE_BF16);
    struct tool_adapter a;
    struct adapter_report report;
    struct fault fault;
    struct tool_rig rig;
    adapter_id id;
    begin(&a, *state,
          "\"target_modules\": [\"embed_tokens\"], \"ensure_weight_tying\": true, "
          "\"alpha_pattern\": {\"lm_head\": 12}");
    embed_add(&a, 4);
    expect(&a, &base, STATUS_OK, "ensure_weight_tying, alpha_pattern:lm_head"); // no tied head
    base.tied = true;
    tool_adapter_write(&a);
    assert_int_equal(adapter_convert(a.directory, &base, PAGE, store_path, &report, &fault),
                     STATUS_OK);
    assert_string_equal(report.ignored, "");
    assert_string_equal(report.layout, "embed, head");
    assert_int_equal(report.matrices_applied, 2);
    tool_rig_make(&rig, &base, PAGE, 32, 32, 2);
    assert_int_equal(adapter_register(rig.adapters, "t", store_path, 0, &id, &fault), STATUS_OK);
    assert_int_equal(adapter_fetch(rig.adapters, id, COPY_BATCH, COPY_PREFETCH), STATUS_OK);
    tool_rig_settle(&rig);
    const struct lora_adapter_view *view = adapters_views(rig.adapters);
    const struct lora_pair *head = lora_pair_at(view, 2, LORA_HEAD, 0);
    assert_true(head->scale > 2.9f && head->scale < 3.1f);
    assert_true(tool_element(&rig, &base, view, &head->a, 3, 60) ==
                element(&a, DTYPE_BF16, 4 * VOCAB + 60 * 4 + 3));
    assert_true(tool_element(&rig, &base, view, &head->b, 2 * 4 + 1, 100) ==
                element(&a, DTYPE_BF16, VOCAB + 2 * 2048 + 100));
    tool_rig_clear(&rig);
    // lm_head's name stands for both: PEFT trains them as one
    begin(&a, *state, "\"target_modules\": [\"lm_head\"], \"ensure_weight_tying\": true");
    head_add(&a, 4);
    expect(&a, &base, STATUS_INVALID,
           "targets model.embed_tokens, but the file has no LoRA for it");
    embed_add(&a, 4);
    expect(&a, &base, STATUS_OK, "");
    begin(&a, *state, "\"target_modules\": [\"embed_tokens\"]"); // the default: each its own
    embed_add(&a, 4);
    tool_adapter_write(&a);
    assert_int_equal(adapter_convert(a.directory, &base, PAGE, store_path, &report, &fault),
                     STATUS_OK);
    assert_string_equal(report.layout, "embed");
}

// ---- the base's own matrices ----

static struct digest digest_in(const struct tool_adapter *a, const char *tensor, const char *name,
                               enum tensor_type type)
{
    struct reader *reader;
    struct safetensors *file;
    struct digest out;
    assert_int_equal(reader_open_in(a->directory, "adapter_model.safetensors", &reader, NULL),
                     STATUS_OK);
    assert_int_equal(safetensors_open(reader, "weights", &file, NULL), STATUS_OK);
    assert_int_equal(safetensors_digest(file, safetensors_find(file, tensor), name, type, NULL,
                                        NULL, &out, NULL),
                     STATUS_OK);
    safetensors_close(file);
    reader_close(reader);
    return out;
}

static void test_adapters_vocabulary_base_weights(void **state)
{
    static const char whole[] = "is a whole matrix that is not known to be the base model's own";
    struct adapter_base base = base_of(DTYPE_BF16);
    struct tool_adapter a;
    begin(&a, *state, BOTH);
    embed_add(&a, 4);
    head_add(&a, 4);
    tool_tensor_add(&a, EMBED ".base_layer.weight", 2, VOCAB, HIDDEN, 0);
    tool_tensor_add(&a, HEAD ".base_layer.weight", 2, VOCAB, HIDDEN, 0);
    expect(&a, &base, STATUS_UNSUPPORTED, whole); // the base's digests are not known
    base.embedding_weights =
        digest_in(&a, EMBED ".base_layer.weight", "model.embed_tokens.weight", TENSOR_F32);
    base.head_weights = digest_in(&a, HEAD ".base_layer.weight", "lm_head.weight", TENSOR_F32);
    expect(&a, &base, STATUS_OK,
           "tensor:model.embed_tokens.base_layer.weight, tensor:lm_head.base_layer.weight");
    base.tied = true; // lm_head is the embeddings then, and this is another matrix
    expect(&a, &base, STATUS_UNSUPPORTED, whole);
    base.tied = false;
    base.head_weights.bytes[7] ^= 1;
    expect(&a, &base, STATUS_UNSUPPORTED, "lm_head.base_layer.weight\" is a whole matrix");
    a.poison = 0.125f; // one trained value
    base.head_weights.bytes[7] ^= 1;
    expect(&a, &base, STATUS_UNSUPPORTED, "lm_head.base_layer.weight\" is a whole matrix");
}

// A base in bf16 that PEFT had in fp32: the values are the same.
static void test_adapters_vocabulary_widened_weights(void **state)
{
    struct adapter_base base = base_of(DTYPE_BF16);
    struct tool_adapter a;
    struct adapter_report report;
    struct fault fault = {.text = ""};
    char path[TOOL_PATH + 64];
    size_t bytes;
    begin(&a, *state, "\"target_modules\": [\"lm_head\"]");
    head_add(&a, 4);
    tool_tensor_add(&a, EMBED ".weight", 2, VOCAB, HIDDEN, 0); // as after a resizing
    tool_adapter_write(&a);
    (void)snprintf(path, sizeof path, "%s/adapter_model.safetensors", a.directory);
    uint8_t *file = tool_file_read(path, &bytes);
    uint64_t header;
    memcpy(&header, file, sizeof header);
    for (size_t i = 8 + header; i + 4 <= bytes; i += 4)
        file[i] = file[i + 1] = 0;
    tool_file_write(path, file, bytes);
    base.embedding_weights =
        digest_in(&a, EMBED ".weight", "model.embed_tokens.weight", TENSOR_BF16);
    assert_int_equal(adapter_convert(a.directory, &base, PAGE, store_path, &report, &fault),
                     STATUS_OK);
    assert_string_equal(report.ignored, "tensor:model.embed_tokens.weight");
    file[bytes - 4] = 1; // not a bf16 value
    tool_file_write(path, file, bytes);
    assert_int_equal(adapter_convert(a.directory, &base, PAGE, store_path, &report, &fault),
                     STATUS_UNSUPPORTED);
    free(file);
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
        cmocka_unit_test(test_adapters_vocabulary_rows),
        cmocka_unit_test(test_adapters_vocabulary_is_not_all_linear),
        cmocka_unit_test(test_adapters_vocabulary_refused),
        cmocka_unit_test(test_adapters_vocabulary_tied),
        cmocka_unit_test(test_adapters_vocabulary_base_weights),
        cmocka_unit_test(test_adapters_vocabulary_widened_weights),
    };
    return cmocka_run_group_tests_name("adapters_vocabulary", tests, setup, teardown);
}
