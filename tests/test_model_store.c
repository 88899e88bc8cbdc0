// SPDX-License-Identifier: Apache-2.0
// Around loading: the expert store's life, the digest, progress, what model_fit says, synthetic
// checkpoints.
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <setjmp.h>
#include <cmocka.h>

#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include "runtime/model/model.h"
#include "runtime/model/synth.h"
#include "test_model_files.h"

struct place {
    char root[64], model[80], state[80];
};

static void place_open(struct place *place)
{
    files_scratch(place->root);
    (void)snprintf(place->model, sizeof place->model, "%s/model", place->root);
    (void)snprintf(place->state, sizeof place->state, "%s/state", place->root);
}

// Three layers, the second dense; odd widths everywhere.
static void synth_odd(const char *directory, const char *more)
{
    const char *overrides[] = {"hidden=40",           "layers=3",    "heads=3",
                               "kv_heads=1",          "head_dim=24", "vocab=131",
                               "intermediate=56",     "experts=5",   "top_k=3",
                               "moe_intermediate=24", "tied=0",      more};
    struct synth_options options = {.directory = directory,
                                    .overrides = overrides,
                                    .override_count = sizeof overrides / sizeof *overrides,
                                    .seed = 3};
    struct fault fault = {0};
    if (synth_write(&options, &fault))
        fail_msg("%s", fault.text);
}

static struct device *make_device(enum dtype dtype)
{
    struct device *device = NULL;
    assert_int_equal(
        device_create_cpu(&(struct cpu_options){.threads = 1, .dtype = dtype}, &device, NULL),
        STATUS_OK);
    return device;
}

static enum status try_load(const struct place *place, enum dtype dtype, struct fault *fault)
{
    struct device *device = make_device(dtype);
    struct model *model = NULL;
    struct model_options options = {.directory = place->model, .state_directory = place->state};
    enum status status = model_load(device, &options, &model, fault);
    model_destroy(status ? NULL : model);
    device->table->destroy(device);
    return status;
}

// ---- the store's life ----

static void store_name(const struct place *place, char *out, size_t bytes)
{
    FILE *list = NULL;
    char command[160];
    (void)snprintf(command, sizeof command, "ls %s/*", place->state);
    list = popen(command, "r");
    assert_non_null(list);
    assert_non_null(fgets(out, (int)bytes, list));
    out[strcspn(out, "\n")] = 0;
    assert_null(fgets(command, sizeof command, list)); // exactly one, no temporary file left
    (void)pclose(list);
}

static void test_model_store_is_made_once_and_again_when_damaged(void **state)
{
    (void)state;
    struct place place;
    struct stat first, second, third;
    char path[256];
    place_open(&place);
    synth_odd(place.model, "tied=0");
    assert_int_equal(try_load(&place, DTYPE_BF16, NULL), STATUS_OK);
    store_name(&place, path, sizeof path);
    assert_non_null(strstr(path, "-bf16-32k.store"));
    assert_int_equal(stat(path, &first), 0);
    assert_int_equal(try_load(&place, DTYPE_BF16, NULL), STATUS_OK);
    assert_int_equal(stat(path, &second), 0);
    assert_int_equal(first.st_ino, second.st_ino);
    assert_int_equal(truncate(path, first.st_size - 1), 0);
    assert_int_equal(try_load(&place, DTYPE_BF16, NULL), STATUS_OK);
    assert_int_equal(stat(path, &third), 0);
    assert_int_equal(third.st_size, first.st_size);
    // Other weights, another store.
    struct files files;
    files_read(place.model, &files);
    files_find(&files, "model.norm.weight")->data[0] ^= 1;
    files_write(place.model, "model.safetensors", &files);
    files_clear(&files);
    assert_int_equal(unlink(path), 0);
    assert_int_equal(try_load(&place, DTYPE_BF16, NULL), STATUS_OK);
    char other[256];
    store_name(&place, other, sizeof other);
    assert_string_not_equal(path, other);
    files_remove(place.root);
}

static void test_model_digest_does_not_depend_on_shards(void **state)
{
    (void)state;
    struct digest digests[3];
    static const char *const variants[] = {"shard_mib=1024", "shard_mib=1", "vocab=132"};
    for (size_t i = 0; i < 3; i++) {
        struct place place;
        struct device *device = make_device(DTYPE_BF16);
        struct model *model = NULL;
        place_open(&place);
        const char *overrides[] = {"vocab=131", "moe_intermediate=512", variants[i]};
        struct synth_options synth = {
            .directory = place.model, .overrides = overrides, .override_count = 3, .seed = 3};
        assert_int_equal(synth_write(&synth, NULL), STATUS_OK);
        struct model_options options = {.directory = place.model, .state_directory = place.state};
        struct fault fault = {0};
        if (model_load(device, &options, &model, &fault))
            fail_msg("%s", fault.text);
        digests[i] = model->digests.model;
        model_destroy(model);
        device->table->destroy(device);
        files_remove(place.root);
    }
    assert_true(digest_equal(&digests[0], &digests[1]));
    assert_false(digest_equal(&digests[0], &digests[2]));
}

// ---- progress, fit, pages ----

struct seen {
    uint64_t done, total, calls;
};

static void see(void *context, uint64_t done, uint64_t total)
{
    struct seen *seen = context;
    assert_true(done >= seen->done && done <= total);
    assert_true(!seen->calls || total == seen->total);
    *seen = (struct seen){done, total, seen->calls + 1};
}

static void test_model_progress_reaches_its_total(void **state)
{
    (void)state;
    struct place place;
    place_open(&place);
    struct seen seen = {0};
    struct synth_options synth = {
        .directory = place.model, .seed = 1, .progress = see, .progress_context = &seen};
    assert_int_equal(synth_write(&synth, NULL), STATUS_OK);
    assert_true(seen.calls > 10 && seen.done == seen.total);
    for (int i = 0; i < 2; i++) {
        struct device *device = make_device(DTYPE_BF16);
        struct model *model = NULL;
        seen = (struct seen){0};
        struct model_options options = {.directory = place.model,
                                        .state_directory = place.state,
                                        .progress = see,
                                        .progress_context = &seen};
        assert_int_equal(model_load(device, &options, &model, NULL), STATUS_OK);
        assert_true(seen.calls > 10 && seen.done == seen.total);
        model_destroy(model);
        device->table->destroy(device);
    }
    files_remove(place.root);
}

static void test_model_fit_of_the_demo_shape(void **state)
{
    (void)state;
    struct place place;
    place_open(&place);
    struct synth_options synth = {.directory = place.model, .shape = "demo", .seed = 1};
    assert_int_equal(synth_write(&synth, NULL), STATUS_OK);
    struct model_fit fit;
    assert_int_equal(model_fit(place.model, DTYPE_BF16, 0, &fit, NULL), STATUS_OK);
    assert_int_equal(fit.page_bytes, 32 << 10);
    assert_int_equal(fit.expert_bytes, 8 * 32 * (96 << 10));
    assert_int_equal(fit.kv_bytes_per_token, 4096);
    assert_int_equal(fit.config.layers, 8);
    model_config_clear(&fit.config);
    assert_int_equal(model_fit(place.model, DTYPE_BF16, 64 << 10, &fit, NULL), STATUS_OK);
    assert_int_equal(fit.expert_bytes, 8 * 32 * (128 << 10));
    model_config_clear(&fit.config);
    static const size_t bad[] = {1, 16 << 10, 48 << 10, 4 << 20};
    for (size_t i = 0; i < sizeof bad / sizeof *bad; i++)
        assert_int_equal(model_fit(place.model, DTYPE_BF16, bad[i], &fit, NULL), STATUS_INVALID);
    files_remove(place.root);
}

// ---- a model of 57 GiB that is a hole ----

static void print_entry(FILE *out, const char *name, const char *shape, uint64_t elements,
                        uint64_t *at)
{
    (void)fprintf(out, "%s\"%s\":{\"dtype\":\"BF16\",\"shape\":[%s],\"data_offsets\":[%llu,%llu]}",
                  *at ? "," : "{", name, shape, (unsigned long long)*at,
                  (unsigned long long)(*at + 2 * elements));
    *at += 2 * elements;
}

// The header of Qwen3-30B-A3B; its size in bytes of data comes back.
static uint64_t print_30b(FILE *out)
{
    static const struct {
        const char *name, *shape;
        uint64_t elements;
    } parts[] = {
        {"input_layernorm.weight", "2048", 2048},
        {"post_attention_layernorm.weight", "2048", 2048},
        {"self_attn.q_norm.weight", "128", 128},
        {"self_attn.k_norm.weight", "128", 128},
        {"self_attn.q_proj.weight", "4096,2048", 4096 * 2048},
        {"self_attn.k_proj.weight", "512,2048", 512 * 2048},
        {"self_attn.v_proj.weight", "512,2048", 512 * 2048},
        {"self_attn.o_proj.weight", "2048,4096", 2048 * 4096},
        {"mlp.gate.weight", "128,2048", 128 * 2048},
        {"mlp.experts.gate_up_proj", "128,1536,2048", 128ull * 1536 * 2048},
        {"mlp.experts.down_proj", "128,2048,768", 128ull * 2048 * 768},
    };
    uint64_t at = 0;
    print_entry(out, "model.embed_tokens.weight", "151936,2048", 151936ull * 2048, &at);
    print_entry(out, "lm_head.weight", "151936,2048", 151936ull * 2048, &at);
    print_entry(out, "model.norm.weight", "2048", 2048, &at);
    for (unsigned layer = 0; layer < 48; layer++)
        for (size_t p = 0; p < sizeof parts / sizeof *parts; p++) {
            char name[96];
            (void)snprintf(name, sizeof name, "model.layers.%u.%s", layer, parts[p].name);
            print_entry(out, name, parts[p].shape, parts[p].elements, &at);
        }
    (void)fputc('}', out);
    return at;
}

static const char CONFIG_30B[] =
    "{\"architectures\":[\"Qwen3MoeForCausalLM\"],\"hidden_size\":2048,\"num_hidden_layers\":48,"
    "\"num_attention_heads\":32,\"num_key_value_heads\":4,\"head_dim\":128,\"vocab_size\":151936,"
    "\"max_position_embeddings\":40960,\"intermediate_size\":6144,\"moe_intermediate_size\":768,"
    "\"num_experts\":128,\"num_experts_per_tok\":8,\"norm_topk_prob\":true,\"rope_theta\":1000000."
    "0}";

static void test_model_fit_reads_headers_only(void **state)
{
    (void)state;
    struct place place;
    place_open(&place);
    assert_int_equal(mkdir(place.model, 0700), 0);
    files_write_text(place.model, "config.json", CONFIG_30B);
    char path[128], *header = NULL;
    size_t bytes = 0;
    FILE *text = open_memstream(&header, &bytes);
    uint64_t data = print_30b(text);
    assert_int_equal(fclose(text), 0);
    (void)snprintf(path, sizeof path, "%s/model.safetensors", place.model);
    FILE *file = fopen(path, "wb");
    assert_non_null(file);
    uint64_t length = bytes;
    assert_int_equal(fwrite(&length, sizeof length, 1, file), 1);
    assert_int_equal(fwrite(header, 1, bytes, file), bytes);
    assert_int_equal(fclose(file), 0);
    assert_int_equal(truncate(path, (off_t)(8 + length + data)), 0);
    struct model_fit fit;
    struct fault fault = {0};
    if (model_fit(place.model, DTYPE_BF16, 0, &fit, &fault))
        fail_msg("%s", fault.text);
    assert_int_equal(fit.page_bytes, 512 << 10);
    assert_int_equal(fit.expert_bytes, 48ull * 128 * 9 << 20);
    assert_int_equal(fit.kv_bytes_per_token, 98304);
    // Embedding and head 1187 MiB, attention 1728 MiB, routers in fp32 48 MiB, norms and padding.
    assert_true(fit.static_bytes > 2950ull << 20 && fit.static_bytes < 2980ull << 20);
    model_config_clear(&fit.config);
    free(header);
    files_remove(place.root);
}

// ---- synthetic checkpoints ----

static void test_model_synth_repeats_itself_and_overwrites_nothing(void **state)
{
    (void)state;
    struct place a, b;
    struct files first, second;
    place_open(&a);
    place_open(&b);
    struct synth_options options = {.directory = a.model, .seed = 4};
    struct fault fault = {0};
    assert_int_equal(synth_write(&options, NULL), STATUS_OK);
    assert_int_equal(synth_write(&options, &fault), STATUS_EXISTS);
    assert_non_null(strstr(fault.text, "config.json"));
    options.directory = b.model;
    assert_int_equal(synth_write(&options, NULL), STATUS_OK);
    files_read(a.model, &first);
    files_read(b.model, &second);
    assert_int_equal(first.count, second.count);
    for (size_t i = 0; i < first.count; i++)
        assert_memory_equal(first.items[i].data, second.items[i].data, first.items[i].bytes);
    files_clear(&second);
    files_remove(b.root);
    place_open(&b);
    options = (struct synth_options){.directory = b.model, .seed = 5};
    assert_int_equal(synth_write(&options, NULL), STATUS_OK);
    files_read(b.model, &second);
    const struct files_item *x = files_find(&first, "model.embed_tokens.weight");
    const struct files_item *y = files_find(&second, "model.embed_tokens.weight");
    assert_memory_not_equal(x->data, y->data, x->bytes);
    files_clear(&first);
    files_clear(&second);
    files_remove(a.root);
    files_remove(b.root);
}

static void test_model_synth_refuses_by_name(void **state)
{
    (void)state;
    static const struct {
        const char *shape, *override, *says;
    } cases[] = {
        {"huge", "layers=1", "huge"},       {"tiny", "colour=1", "colour"},
        {"tiny", "layers", "layers"},       {"tiny", "layers=", "layers"},
        {"tiny", "layers=-1", "layers"},    {"tiny", "layers=1x", "layers"},
        {"tiny", "layers=0", "num_hidden"}, {"tiny", "heads=3", "multiple"},
        {"tiny", "top_k=9", "num_experts"}, {"tiny", "shard_mib=4096", "shard_mib"},
    };
    struct place place;
    place_open(&place);
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        struct synth_options options = {.directory = place.model,
                                        .shape = cases[i].shape,
                                        .overrides = &cases[i].override,
                                        .override_count = 1};
        struct fault fault = {0};
        enum status status = synth_write(&options, &fault);
        if (status != STATUS_INVALID || !strstr(fault.text, cases[i].says))
            fail_msg("%s: %s \"%s\"", cases[i].override, status_code(status), fault.text);
        assert_int_equal(access(place.model, F_OK), -1); // nothing was written
    }
    files_remove(place.root);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_model_store_is_made_once_and_again_when_damaged),
        cmocka_unit_test(test_model_digest_does_not_depend_on_shards),
        cmocka_unit_test(test_model_progress_reaches_its_total),
        cmocka_unit_test(test_model_fit_of_the_demo_shape),
        cmocka_unit_test(test_model_fit_reads_headers_only),
        cmocka_unit_test(test_model_synth_repeats_itself_and_overwrites_nothing),
        cmocka_unit_test(test_model_synth_refuses_by_name),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
