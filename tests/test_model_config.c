// SPDX-License-Identifier: Apache-2.0
// config.json: both spellings, defaults, and a sentence for everything that is refused.
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <setjmp.h>
#include <cmocka.h>

#include <stdlib.h>
#include <string.h>

#include "runtime/model/model.h"
#include "test_model_files.h"

static const char MOE[] =
    "{\"architectures\":[\"Qwen3MoeForCausalLM\"],\"model_type\":\"qwen3_moe\",\"hidden_size\":72,"
    "\"num_hidden_layers\":4,\"num_attention_heads\":6,\"num_key_value_heads\":2,\"head_dim\":16,"
    "\"vocab_size\":199,\"max_position_embeddings\":512,\"intermediate_size\":96,"
    "\"moe_intermediate_size\":24,\"num_experts\":5,\"num_experts_per_tok\":2,"
    "\"norm_topk_prob\":true,\"rope_theta\":10000.0,\"rms_norm_eps\":1e-05,"
    "\"tie_word_embeddings\":true,\"hidden_act\":\"silu\",\"eos_token_id\":7,"
    "\"rope_scaling\":null,\"torch_dtype\":\"bfloat16\"}";

static const char DENSE[] =
    "{\"architectures\":[\"Qwen3ForCausalLM\"],\"hidden_size\":40,\"num_hidden_layers\":2,"
    "\"num_attention_heads\":5,\"num_key_value_heads\":1,\"vocab_size\":150,"
    "\"max_position_embeddings\":64,\"intermediate_size\":88,\"rope_theta\":10000}";

// The text with the first `from` replaced by `to`; from NULL: `to` is put behind the first brace.
static char *edit(const char *text, const char *from, const char *to)
{
    const char *at = from ? strstr(text, from) : text + 1;
    assert_non_null(at);
    size_t skip = from ? strlen(from) : 0, before = (size_t)(at - text);
    char *out = malloc(strlen(text) + strlen(to) + 1);
    assert_non_null(out);
    memcpy(out, text, before);
    strcpy(out + before, to);
    strcat(out, at + skip);
    return out;
}

static enum status parse(const char *text, const char *from, const char *to,
                         struct model_config *config, struct fault *fault)
{
    char *changed = edit(text, from, to);
    enum status status = model_config_parse(changed, strlen(changed), config, fault);
    free(changed);
    return status;
}

static void test_model_config_reads_both_spellings(void **state)
{
    (void)state;
    struct model_config a, b;
    assert_int_equal(model_config_parse(MOE, strlen(MOE), &a, NULL), STATUS_OK);
    assert_string_equal(a.architecture, "Qwen3MoeForCausalLM");
    assert_int_equal(a.hidden, 72);
    assert_int_equal(a.kv_heads, 2);
    assert_int_equal(a.head_dim, 16);
    assert_int_equal(a.experts, 5);
    assert_int_equal(a.top_k, 2);
    assert_int_equal(a.moe_intermediate, 24);
    assert_int_equal(a.intermediate, 0); // no layer is dense
    assert_true(a.normalize_top_k && a.tied_embeddings);
    assert_true(a.rms_epsilon == 1e-5f && a.rope_theta == 10000.0);
    assert_int_equal(a.eos_count, 1);
    assert_int_equal(a.eos[0], 7);
    char *five = edit(MOE, "\"num_experts\"", "\"num_local_experts\"");
    char *rope = edit(five, "\"rope_theta\":10000.0",
                      "\"rope_parameters\":{\"rope_type\":\"default\",\"rope_theta\":10000.0}");
    assert_int_equal(parse(rope, "torch_dtype", "dtype", &b, NULL), STATUS_OK);
    assert_memory_equal(a.is_moe, b.is_moe, a.layers);
    free(a.is_moe);
    free(b.is_moe);
    a.is_moe = b.is_moe = NULL;
    assert_memory_equal(&a, &b, sizeof a);
    free(five);
    free(rope);
}

static void test_model_config_takes_the_defaults_of_transformers(void **state)
{
    (void)state;
    struct model_config c;
    assert_int_equal(model_config_parse(DENSE, strlen(DENSE), &c, NULL), STATUS_OK);
    assert_int_equal(c.head_dim, 128); // not hidden / heads: Qwen3Config
    assert_int_equal(c.intermediate, 88);
    assert_int_equal(c.experts, 0);
    assert_int_equal(c.eos_count, 0);
    assert_true(!c.tied_embeddings && c.rms_epsilon == 1e-6f);
    assert_false(c.is_moe[0] || c.is_moe[1]);
    model_config_clear(&c);
    assert_int_equal(parse(MOE, "\"head_dim\":16,", "", &c, NULL), STATUS_OK);
    assert_int_equal(c.head_dim, 12); // Qwen3MoeConfig has no head_dim of its own
    model_config_clear(&c);
    assert_int_equal(
        parse(MOE, "\"num_key_value_heads\":2", "\"num_key_value_heads\":null", &c, NULL),
        STATUS_OK);
    assert_int_equal(c.kv_heads, 6);
    model_config_clear(&c);
}

static void test_model_config_mixes_dense_layers(void **state)
{
    (void)state;
    struct model_config c;
    assert_int_equal(parse(MOE, NULL, "\"mlp_only_layers\":[1,3],", &c, NULL), STATUS_OK);
    assert_memory_equal(c.is_moe, ((uint8_t[]){1, 0, 1, 0}), 4);
    assert_int_equal(c.intermediate, 96);
    model_config_clear(&c);
    assert_int_equal(
        parse(MOE, NULL, "\"decoder_sparse_step\":3,\"mlp_only_layers\":null,", &c, NULL),
        STATUS_OK);
    assert_memory_equal(c.is_moe, ((uint8_t[]){0, 0, 1, 0}), 4);
    model_config_clear(&c);
    assert_int_equal(parse(MOE, NULL, "\"decoder_sparse_step\":9,", &c, NULL), STATUS_OK);
    assert_int_equal(c.experts, 0); // a Qwen3-MoE without experts is a dense model
    assert_int_equal(c.top_k, 0);
    model_config_clear(&c);
    assert_int_equal(parse(MOE, "\"num_experts\":5", "\"num_experts\":0", &c, NULL), STATUS_OK);
    assert_int_equal(c.intermediate, 96);
    model_config_clear(&c);
}

static void test_model_config_merges_end_tokens(void **state)
{
    (void)state;
    struct model_config c;
    char directory[64];
    files_scratch(directory);
    char *text = edit(MOE, "\"eos_token_id\":7", "\"eos_token_id\":[7,198,7]");
    files_write_text(directory, "config.json", text);
    assert_int_equal(model_config_load(directory, &c, NULL), STATUS_OK);
    assert_int_equal(c.eos_count, 2);
    model_config_clear(&c);
    files_write_text(directory, "generation_config.json",
                     "{\"eos_token_id\":[198,3],\"top_k\":20}");
    assert_int_equal(model_config_load(directory, &c, NULL), STATUS_OK);
    assert_int_equal(c.eos_count, 3);
    assert_int_equal(c.eos[2], 3);
    model_config_clear(&c);
    struct fault fault;
    files_write_text(directory, "generation_config.json", "{\"eos_token_id\":[199]}");
    assert_int_equal(model_config_load(directory, &c, &fault), STATUS_INVALID);
    assert_non_null(strstr(fault.text, "generation_config.json"));
    files_write_text(directory, "generation_config.json", "{");
    assert_int_equal(model_config_load(directory, &c, &fault), STATUS_INVALID);
    files_remove(directory);
    free(text);
}

static const struct refusal {
    const char *from, *to;
    enum status status;
    const char *says;
} REFUSALS[] = {
    {"Qwen3MoeForCausalLM", "MixtralForCausalLM", STATUS_UNSUPPORTED, "MixtralForCausalLM"},
    {"[\"Qwen3MoeForCausalLM\"]", "[]", STATUS_INVALID, "architectures"},
    {"[\"Qwen3MoeForCausalLM\"]", "7", STATUS_INVALID, "architectures"},
    {"\"qwen3_moe\"", "\"qwen3\"", STATUS_INVALID, "model_type"},
    {"\"silu\"", "\"gelu\"", STATUS_UNSUPPORTED, "hidden_act"},
    {"\"silu\"", "3", STATUS_INVALID, "hidden_act"},
    {"\"bfloat16\"", "\"float8_e4m3fn\"", STATUS_UNSUPPORTED, "torch_dtype"},
    {NULL, "\"dtype\":\"int8\",", STATUS_UNSUPPORTED, "dtype"},
    {NULL, "\"use_sliding_window\":true,\"sliding_window\":64,", STATUS_UNSUPPORTED,
     "use_sliding_window"},
    {NULL, "\"layer_types\":[\"full_attention\",\"sliding_attention\"],", STATUS_UNSUPPORTED,
     "layer_types"},
    {NULL, "\"layer_types\":7,", STATUS_INVALID, "layer_types"},
    {NULL, "\"attention_bias\":true,", STATUS_UNSUPPORTED, "attention_bias"},
    {NULL, "\"attention_bias\":1,", STATUS_INVALID, "attention_bias"},
    {NULL, "\"quantization_config\":{\"quant_method\":\"gptq\"},", STATUS_UNSUPPORTED,
     "quantization_config"},
    {"\"rope_scaling\":null", "\"rope_scaling\":{\"rope_type\":\"yarn\"}", STATUS_UNSUPPORTED,
     "yarn"},
    {"\"rope_scaling\":null", "\"rope_scaling\":{\"type\":\"linear\"}", STATUS_UNSUPPORTED,
     "linear"},
    {"\"rope_scaling\":null", "\"rope_scaling\":[1]", STATUS_INVALID, "rope_scaling"},
    {NULL, "\"rope_parameters\":{\"full_attention\":{\"rope_theta\":1.0}},", STATUS_UNSUPPORTED,
     "full_attention"},
    {NULL, "\"rope_parameters\":{\"partial_rotary_factor\":0.5},", STATUS_UNSUPPORTED,
     "partial_rotary_factor"},
    {NULL, "\"rope_parameters\":{\"rope_theta\":5000.0},", STATUS_INVALID, "differ"},
    {"\"rope_theta\":10000.0,", "", STATUS_INVALID, "rope_theta"},
    {"10000.0", "0.5", STATUS_INVALID, "rope_theta"},
    {"10000.0", "1e300", STATUS_INVALID, "rope_theta"},
    {"\"hidden_size\":72", "\"hidden_size\":0", STATUS_INVALID, "hidden_size"},
    {"\"hidden_size\":72", "\"hidden_size\":-72", STATUS_INVALID, "hidden_size"},
    {"\"hidden_size\":72", "\"hidden_size\":72.0", STATUS_INVALID, "hidden_size"},
    {"\"hidden_size\":72", "\"hidden_size\":4294967368", STATUS_INVALID, "hidden_size"},
    {"\"hidden_size\":72", "\"hidden_size\":\"72\"", STATUS_INVALID, "hidden_size"},
    {"\"hidden_size\":72,", "", STATUS_INVALID, "hidden_size"},
    {"\"num_hidden_layers\":4", "\"num_hidden_layers\":100000", STATUS_INVALID,
     "num_hidden_layers"},
    {"\"num_attention_heads\":6", "\"num_attention_heads\":0", STATUS_INVALID,
     "num_attention_heads"},
    {"\"num_attention_heads\":6", "\"num_attention_heads\":7", STATUS_INVALID, "multiple"},
    {"\"num_key_value_heads\":2", "\"num_key_value_heads\":0", STATUS_INVALID,
     "num_key_value_heads"},
    {"\"head_dim\":16", "\"head_dim\":15", STATUS_INVALID, "head_dim"},
    {"\"head_dim\":16", "\"head_dim\":1026", STATUS_INVALID, "head_dim"},
    {"\"vocab_size\":199", "\"vocab_size\":0", STATUS_INVALID, "vocab_size"},
    {"\"num_experts\":5", "\"num_experts\":5000", STATUS_INVALID, "num_experts"},
    {"\"num_experts\":5", "\"num_experts\":5,\"num_local_experts\":6", STATUS_INVALID, "differ"},
    {"\"num_experts\":5,", "", STATUS_INVALID, "num_experts"},
    {"\"num_experts_per_tok\":2", "\"num_experts_per_tok\":6", STATUS_INVALID,
     "num_experts_per_tok"},
    {"\"num_experts_per_tok\":2", "\"num_experts_per_tok\":0", STATUS_INVALID,
     "num_experts_per_tok"},
    {"\"moe_intermediate_size\":24", "\"moe_intermediate_size\":0", STATUS_INVALID,
     "moe_intermediate_size"},
    {NULL, "\"mlp_only_layers\":[4],", STATUS_INVALID, "mlp_only_layers"},
    {NULL, "\"mlp_only_layers\":[-1],", STATUS_INVALID, "mlp_only_layers"},
    {NULL, "\"decoder_sparse_step\":0,", STATUS_INVALID, "decoder_sparse_step"},
    {"1e-05", "0", STATUS_INVALID, "rms_norm_eps"},
    {"1e-05", "1e400", STATUS_INVALID, "config.json"},
    {"\"eos_token_id\":7", "\"eos_token_id\":199", STATUS_INVALID, "eos_token_id"},
    {"\"eos_token_id\":7", "\"eos_token_id\":[1,2,3,4,5,6,7,8,9]", STATUS_LIMIT, "eos_token_id"},
    {"\"eos_token_id\":7", "\"eos_token_id\":\"</s>\"", STATUS_INVALID, "eos_token_id"},
    {"\"eos_token_id\":7", "\"eos_token_id\":7,\"eos_token_id\":8", STATUS_INVALID, "duplicate"},
};

static void test_model_config_refuses_by_name(void **state)
{
    (void)state;
    for (size_t i = 0; i < sizeof REFUSALS / sizeof *REFUSALS; i++) {
        const struct refusal *r = &REFUSALS[i];
        struct model_config c;
        struct fault fault = {0};
        enum status status = parse(MOE, r->from, r->to, &c, &fault);
        if (status != r->status || !strstr(fault.text, r->says) || c.is_moe)
            fail_msg("%s: status %s, \"%s\"", r->to, status_code(status), fault.text);
    }
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_model_config_reads_both_spellings),
        cmocka_unit_test(test_model_config_takes_the_defaults_of_transformers),
        cmocka_unit_test(test_model_config_mixes_dense_layers),
        cmocka_unit_test(test_model_config_merges_end_tokens),
        cmocka_unit_test(test_model_config_refuses_by_name),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
