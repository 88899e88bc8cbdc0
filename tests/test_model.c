// SPDX-License-Identifier: Apache-2.0
// Loading: placement of every weight, the three forms of expert tensors, checkpoints that lie. The
// numbers a loaded model computes are compared with transformers elsewhere, on tests/golden/model.
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

#include "base/check.h"
#include "base/safetensors.h"
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

// ---- placement ----

struct view {
    struct model *model;
    struct device *device;
    struct files files;
};

static void view_open(const struct place *place, enum dtype dtype, struct view *view)
{
    view->device = make_device(dtype);
    struct model_options options = {.directory = place->model, .state_directory = place->state};
    struct fault fault = {0};
    if (model_load(view->device, &options, &view->model, &fault))
        fail_msg("%s", fault.text);
    files_read(place->model, &view->files);
}

static void view_close(struct view *view)
{
    files_clear(&view->files);
    model_destroy(view->model);
    view->device->table->destroy(view->device);
}

// Element i of a bf16 tensor of the file.
static float source(struct view *view, const char *name, size_t i)
{
    const struct files_item *item = files_find(&view->files, name);
    uint16_t bits;
    CHECK(2 * i + 2 <= item->bytes);
    memcpy(&bits, item->data + 2 * i, 2);
    return bf16_to_f32(bits);
}

static float element(enum dtype dtype, const void *at)
{
    uint16_t bits;
    float value;
    memcpy(&bits, at, 2);
    if (dtype == DTYPE_BF16)
        return bf16_to_f32(bits);
    memcpy(&value, at, 4);
    return value;
}

// Row r of the tensor stands at row first + r of the tiles (half < 0), or interleaved.
static void expect_tiles(struct view *view, const char *name, size_t rows, size_t cols, int half,
                         size_t first, const void *tiles)
{
    enum dtype dtype = view->model->dtype;
    for (size_t r = 0; r < rows; r++)
        for (size_t c = 0; c < cols; c++) {
            size_t row = half < 0 ? first + r : tile_interleaved_row(r, (size_t)half);
            const uint8_t *at = (const uint8_t *)tiles + tile_offset(dtype, cols, row, c);
            if (element(dtype, at) != source(view, name, r * cols + c))
                fail_msg("%s row %zu column %zu", name, r, c);
        }
}

static void expect_f32(struct view *view, const char *name, size_t count, const float *values)
{
    for (size_t i = 0; i < count; i++)
        assert_true(values[i] == source(view, name, i));
}

static void expect_layer(struct view *view, uint32_t layer)
{
    const struct model_config *c = &view->model->config;
    const struct model_layer *l = &view->model->layers[layer];
    char name[96];
    size_t q = (size_t)c->heads * c->head_dim, kv = (size_t)c->kv_heads * c->head_dim;
#define NAME(what) (snprintf(name, sizeof name, "model.layers.%u." what ".weight", layer), name)
    expect_f32(view, NAME("input_layernorm"), c->hidden, l->attention_norm);
    expect_f32(view, NAME("post_attention_layernorm"), c->hidden, l->mlp_norm);
    expect_f32(view, NAME("self_attn.q_norm"), c->head_dim, l->q_norm);
    expect_f32(view, NAME("self_attn.k_norm"), c->head_dim, l->k_norm);
    expect_tiles(view, NAME("self_attn.q_proj"), q, c->hidden, -1, 0, l->qkv);
    expect_tiles(view, NAME("self_attn.k_proj"), kv, c->hidden, -1, q, l->qkv);
    expect_tiles(view, NAME("self_attn.v_proj"), kv, c->hidden, -1, q + kv, l->qkv);
    expect_tiles(view, NAME("self_attn.o_proj"), c->hidden, q, -1, 0, l->o);
    if (c->is_moe[layer]) {
        assert_null(l->gate_up);
        expect_f32(view, NAME("mlp.gate"), (size_t)c->experts * c->hidden, l->router);
        return;
    }
    assert_null(l->router);
    expect_tiles(view, NAME("mlp.gate_proj"), c->intermediate, c->hidden, 0, 0, l->gate_up);
    expect_tiles(view, NAME("mlp.up_proj"), c->intermediate, c->hidden, 1, 0, l->gate_up);
    expect_tiles(view, NAME("mlp.down_proj"), c->hidden, c->intermediate, -1, 0, l->down);
#undef NAME
}

static void expect_experts(struct view *view)
{
    const struct model_config *c = &view->model->config;
    const struct expert_shape *s = &view->model->expert_shape;
    size_t bytes = s->pages_per_expert * s->page_bytes;
    uint8_t *record = malloc(bytes);
    assert_non_null(record);
    for (uint32_t layer = 0, moe = 0; layer < c->layers; layer++) {
        if (!c->is_moe[layer])
            continue;
        for (uint32_t e = 0; e < c->experts; e++) {
            uint64_t offset = s->page_bytes + ((uint64_t)moe * c->experts + e) * bytes;
            assert_int_equal(reader_read(view->model->expert_store, offset, record, bytes),
                             STATUS_OK);
            char name[96];
#define NAME(what)                                                                                 \
    (snprintf(name, sizeof name, "model.layers.%u.mlp.experts.%u." what ".weight", layer, e), name)
            expect_tiles(view, NAME("gate_proj"), s->intermediate, s->hidden, 0, 0, record);
            expect_tiles(view, NAME("up_proj"), s->intermediate, s->hidden, 1, 0, record);
            expect_tiles(view, NAME("down_proj"), s->hidden, s->intermediate, -1, 0,
                         record + s->down_tile * TILE_BYTES);
#undef NAME
        }
        moe++;
    }
    free(record);
}

static void test_model_places_every_weight(void **state)
{
    (void)state;
    static const char *const variants[] = {"sparse_step=2", "tied=1", "experts=0", "vocab=64"};
    for (size_t i = 0; i < 2 * sizeof variants / sizeof *variants; i++) {
        enum dtype dtype = i % 2 ? DTYPE_F32 : DTYPE_BF16;
        struct place place;
        struct view view;
        place_open(&place);
        synth_odd(place.model, variants[i / 2]);
        view_open(&place, dtype, &view);
        const struct model_config *c = &view.model->config;
        const char *head = c->tied_embeddings ? "model.embed_tokens.weight" : "lm_head.weight";
        const uint8_t *embedding = view.model->embedding;
        for (size_t k = 0; k < (size_t)c->vocab * c->hidden; k++)
            assert_true(element(dtype, embedding + k * dtype_bytes(dtype)) ==
                        source(&view, "model.embed_tokens.weight", k));
        expect_tiles(&view, head, c->vocab, c->hidden, -1, 0, view.model->head);
        expect_f32(&view, "model.norm.weight", c->hidden, view.model->final_norm);
        assert_true(view.model->inv_freq[0] == 1.0f);
        for (uint32_t layer = 0; layer < c->layers; layer++)
            expect_layer(&view, layer);
        expect_experts(&view);
        assert_int_equal(view.model->expert_store == NULL, c->experts == 0);
        view_close(&view);
        files_remove(place.root);
    }
}

// Matrices of more than one staging chunk (4 MiB), whose parts meet inside a chunk.
static void test_model_places_large_matrices(void **state)
{
    (void)state;
    struct place place;
    struct view view;
    place_open(&place);
    const char *overrides[] = {"hidden=1000", "layers=1",          "heads=29",  "kv_heads=29",
                               "head_dim=24", "intermediate=2500", "experts=0", "vocab=2500"};
    struct synth_options options = {
        .directory = place.model, .overrides = overrides, .override_count = 8, .seed = 9};
    assert_int_equal(synth_write(&options, NULL), STATUS_OK);
    view_open(&place, DTYPE_F32, &view);
    expect_layer(&view, 0);
    expect_tiles(&view, "model.embed_tokens.weight", 2500, 1000, -1, 0, view.model->head);
    view_close(&view);
    files_remove(place.root);
}

// ---- fused experts ----

// Replaces the per-expert tensors by the fused ones.
static void fuse(struct files *files, uint32_t layer, uint32_t experts, uint64_t hidden,
                 uint64_t units, bool transposed)
{
    char name[96];
    (void)snprintf(name, sizeof name, "model.layers.%u.mlp.experts.gate_up_proj", layer);
    uint64_t gate_up_shape[3] = {experts, transposed ? hidden : 2 * units,
                                 transposed ? 2 * units : hidden};
    struct files_item *gate_up = files_add(files, name, "BF16", gate_up_shape);
    (void)snprintf(name, sizeof name, "model.layers.%u.mlp.experts.down_proj", layer);
    uint64_t down_shape[3] = {experts, transposed ? units : hidden, transposed ? hidden : units};
    struct files_item *down = files_add(files, name, "BF16", down_shape);
    uint16_t *gu = (uint16_t *)(void *)gate_up->data, *d = (uint16_t *)(void *)down->data;
    static const char *const which[] = {"gate", "up", "down"};
    for (uint32_t e = 0; e < experts; e++)
        for (size_t w = 0; w < 3; w++) {
            (void)snprintf(name, sizeof name, "model.layers.%u.mlp.experts.%u.%s_proj.weight",
                           layer, e, which[w]);
            const struct files_item *item = files_find(files, name);
            for (size_t r = 0; r < item->shape[0]; r++)
                for (size_t c = 0; c < item->shape[1]; c++) {
                    size_t row = w == 1 ? r + units : r; // up rows below gate rows
                    size_t rows = w == 2 ? hidden : 2 * units, cols = w == 2 ? units : hidden;
                    size_t at = e * rows * cols + (transposed ? c * rows + row : row * cols + c);
                    memcpy((w == 2 ? d : gu) + at, item->data + 2 * (r * item->shape[1] + c), 2);
                }
            files_drop(files, name);
            // files_drop moves what stands behind: the two fused tensors as well, their data stays.
        }
}

static void read_store(const struct place *place, uint8_t **out, size_t *bytes)
{
    struct view view;
    view_open(place, DTYPE_BF16, &view);
    const struct expert_shape *s = &view.model->expert_shape;
    *bytes = (size_t)s->layers * s->experts * s->pages_per_expert * s->page_bytes;
    *out = malloc(*bytes);
    assert_non_null(*out);
    assert_int_equal(reader_read(view.model->expert_store, s->page_bytes, *out, *bytes), STATUS_OK);
    view_close(&view);
}

static void test_model_reads_three_forms_of_experts(void **state)
{
    (void)state;
    // 2I = H and I = H make one of the two fused shapes ambiguous; together they never are.
    static const uint64_t units[] = {24, 20, 40};
    for (size_t i = 0; i < 3; i++) {
        struct place place;
        place_open(&place);
        char override[40];
        (void)snprintf(override, sizeof override, "moe_intermediate=%u", (unsigned)units[i]);
        synth_odd(place.model, override);
        uint8_t *expected, *found;
        size_t bytes, again;
        read_store(&place, &expected, &bytes);
        struct files original, files;
        files_read(place.model, &original);
        for (int transposed = 0; transposed < 2; transposed++) {
            files_write(place.model, "model.safetensors", &original);
            files_read(place.model, &files);
            for (uint32_t layer = 0; layer < 3; layer++)
                fuse(&files, layer, 5, 40, units[i], transposed);
            files_write(place.model, "model.safetensors", &files);
            read_store(&place, &found, &again);
            assert_int_equal(bytes, again);
            assert_memory_equal(expected, found, bytes);
            files_clear(&files);
            free(found);
        }
        files_clear(&original);
        free(expected);
        files_remove(place.root);
    }
}

// ---- checkpoints that lie ----

static void expect_refusal(const struct place *place, enum status expected, const char *says)
{
    struct fault fault = {0};
    enum status status = try_load(place, DTYPE_BF16, &fault);
    if (status != expected || !strstr(fault.text, says))
        fail_msg("expected %s with \"%s\", got %s: \"%s\"", status_code(expected), says,
                 status_code(status), fault.text);
}

static void test_model_refuses_tensors_by_name(void **state)
{
    (void)state;
    static const char Q[] = "model.layers.1.self_attn.q_proj.weight";
    static const char EXPERT[] = "model.layers.2.mlp.experts.4.down_proj.weight";
    struct place place;
    struct files files;
    place_open(&place);
    synth_odd(place.model, "tied=0");
    for (int i = 0; i < 9; i++) {
        static const char *const dropped[] = {Q, EXPERT, "lm_head.weight", "model.norm.weight"};
        files_read(place.model, &files);
        char *original = place.model;
        if (i < 4)
            files_drop(&files, dropped[i]);
        else if (i == 4)
            files_find(&files, Q)->shape[0] -= 24, files_find(&files, Q)->bytes -= 2 * 24 * 40;
        else if (i == 5)
            (void)files_add(&files, "model.layers.1.self_attn.q_proj.bias", "BF16",
                            (const uint64_t[3]){72});
        else if (i == 6)
            (void)files_add(&files, "model.layers.3.mlp.gate.weight", "U8", (const uint64_t[3]){1});
        else if (i == 7)
            memcpy(files_find(&files, Q)->data + 100, (const uint8_t[]){0xc0, 0x7f}, 2);
        else
            memcpy(files_find(&files, EXPERT)->data, (const uint8_t[]){0x80, 0xff}, 2);
        struct place changed;
        place_open(&changed);
        assert_int_equal(mkdir(changed.model, 0700), 0);
        files_write(changed.model, "model.safetensors", &files);
        char *config = NULL;
        size_t bytes = 0;
        assert_int_equal(reader_slurp_in(original, "config.json", 1 << 20, &config, &bytes, NULL),
                         STATUS_OK);
        files_write_text(changed.model, "config.json", config);
        free(config);
        enum status expected = i < 5 ? STATUS_CORRUPT : i < 7 ? STATUS_UNSUPPORTED : STATUS_NUMERIC;
        expect_refusal(&changed, expected,
                       i < 4    ? dropped[i]
                       : i == 5 ? "q_proj.bias"
                       : i == 6 ? "layers.3.mlp"
                       : i == 8 ? EXPERT
                                : Q);
        files_clear(&files);
        files_remove(changed.root);
    }
    // Buffers that follow from config.json are no weights.
    files_read(place.model, &files);
    (void)files_add(&files, "model.layers.0.self_attn.rotary_emb.inv_freq", "F32",
                    (const uint64_t[3]){12});
    files_write(place.model, "model.safetensors", &files);
    files_clear(&files);
    assert_int_equal(try_load(&place, DTYPE_BF16, NULL), STATUS_OK);
    files_remove(place.root);
}

static void test_model_refuses_tricks_in_the_index(void **state)
{
    (void)state;
    static const struct {
        const char *index;
        enum status status;
        const char *says;
    } cases[] = {
        {"{\"weight_map\":{\"a\":\"../model.safetensors\"}}", STATUS_INVALID, "leaves"},
        {"{\"weight_map\":{\"a\":\"/etc/passwd\"}}", STATUS_INVALID, "leaves"},
        {"{\"weight_map\":{\"a\":\"x/../../model.safetensors\"}}", STATUS_INVALID, "leaves"},
        {"{\"weight_map\":{\"a\":\"\"}}", STATUS_INVALID, "leaves"},
        {"{\"weight_map\":{\"a\":\"link\"}}", STATUS_INVALID, "link"},
        {"{\"weight_map\":{\"a\":\".\"}}", STATUS_INVALID, "regular"},
        {"{\"weight_map\":{\"a\":\"gone.safetensors\"}}", STATUS_NOT_FOUND, "gone.safetensors"},
        {"{\"weight_map\":{\"a\":\"a\\u0000b\"}}", STATUS_CORRUPT, "file name"},
        {"{\"weight_map\":{\"a\":7}}", STATUS_CORRUPT, "file name"},
        {"{\"weight_map\":{}}", STATUS_CORRUPT, "weight_map"},
        {"{\"weight_map\":[]}", STATUS_CORRUPT, "weight_map"},
        {"[]", STATUS_INVALID, "object"},
        {"{\"weight_map\":{\"a\":\"one\",\"a\":\"one\"}}", STATUS_INVALID, "duplicate"},
        {"{\"weight_map\":{\"a\":\"one\"}}", STATUS_CORRUPT, "\"b\""},
        {"{\"weight_map\":{\"a\":\"one\",\"b\":\"one\",\"c\":\"one\"}}", STATUS_CORRUPT, "\"c\""},
        {"{\"weight_map\":{\"a\":\"one\",\"b\":\"two\"}}", STATUS_CORRUPT, "one"},
    };
    struct place place;
    place_open(&place);
    synth_odd(place.model, "tied=0");
    struct files files = {0};
    (void)files_add(&files, "a", "BF16", (const uint64_t[3]){2});
    (void)files_add(&files, "b", "BF16", (const uint64_t[3]){2});
    files_write(place.model, "one", &files);
    files_write(place.model, "two", &files);
    files_clear(&files);
    char link[128];
    (void)snprintf(link, sizeof link, "%s/link", place.model);
    assert_int_equal(symlink("/etc/passwd", link), 0);
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        files_write_text(place.model, "model.safetensors.index.json", cases[i].index);
        expect_refusal(&place, cases[i].status, cases[i].says);
    }
    files_remove(place.root);
}

static void test_model_refuses_a_truncated_shard(void **state)
{
    (void)state;
    struct place place;
    place_open(&place);
    synth_odd(place.model, "tied=0");
    char path[128];
    struct stat info;
    (void)snprintf(path, sizeof path, "%s/model.safetensors", place.model);
    assert_int_equal(stat(path, &info), 0);
    for (off_t size = info.st_size - 1; size > 0; size /= 3) {
        assert_int_equal(truncate(path, size), 0);
        expect_refusal(&place, STATUS_CORRUPT, "model.safetensors");
    }
    assert_int_equal(unlink(path), 0);
    expect_refusal(&place, STATUS_NOT_FOUND, "model.safetensors.index.json");
    files_remove(place.root);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_model_places_every_weight),
        cmocka_unit_test(test_model_places_large_matrices),
        cmocka_unit_test(test_model_reads_three_forms_of_experts),
        cmocka_unit_test(test_model_refuses_tensors_by_name),
        cmocka_unit_test(test_model_refuses_tricks_in_the_index),
        cmocka_unit_test(test_model_refuses_a_truncated_shard),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
