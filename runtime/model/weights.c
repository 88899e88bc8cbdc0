// SPDX-License-Identifier: Apache-2.0
// Static weights: which tensors a model is made of, and where they go on the device.
//
//   model.embed_tokens.weight               -> embedding, row-major
//   lm_head.weight (tied: the embedding)    -> head, tiles
//   self_attn.{q,k,v}_proj.weight           -> qkv, tiles of the three one below the other
//   mlp.{gate,up}_proj.weight               -> gate_up, tiles interleaved in blocks of 8 rows
//   self_attn.o_proj, mlp.down_proj         -> tiles
//   norms, mlp.gate.weight (router)         -> fp32
//
// A rank of several (model_share) takes its rows of q, k, v, gate and up and its columns of o and
// down; the rest, the router included, it has whole.
//
// It owns names and placement; what a file may contain is checkpoint.c's. Nothing is read in the
// counting pass (loader.fill = false), so a checkpoint that does not fit config.json is refused at
// once. Data goes file -> row-major chunk -> tiles of the chunk -> device; chunks are whole blocks
// of 64 rows, so that a chunk of tiles is contiguous on the device. "Tiles" below are padded rows
// instead where the device takes its dense weights so (device_info.dense_tiles).
#include "runtime/model/internal.h"

#include <math.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "base/arith.h"
#include "base/check.h"

enum { STAGING_BYTES = 4 << 20, NAME_BYTES = 128, PARTS_MAX = 3 };

// The one place where bytes cross to the device.
static enum status device_upload(struct device *device, void *to, const void *from, size_t bytes,
                                 struct fault *fault)
{
    enum status status = device->table->upload(device, to, from, bytes);
    return status ? fault_set(fault, status, "copying weights to the device failed.") : STATUS_OK;
}

// tile_pack, or where the device wants rows: the same rows, interleaved alike, each rounded up to
// whole tiles of columns. Both forms of whole blocks of 64 rows have the same size.
static void dense_pack(const struct loader *loader, size_t rows, size_t cols, int half)
{
    enum dtype dtype = loader->model->dtype;
    size_t row_bytes = cols * dtype_bytes(dtype), stride = round_up(row_bytes, TILE_ROW_BYTES);
    if (!loader->rows_wanted) {
        tile_pack(dtype, loader->rows, rows, cols, half, loader->tiles);
        return;
    }
    for (size_t r = 0; r < rows; r++) {
        size_t at = half < 0 ? r : tile_interleaved_row(r, (size_t)half);
        memcpy(loader->tiles + at * stride, loader->rows + r * row_bytes, row_bytes);
    }
}

struct part {
    char name[NAME_BYTES];
    uint64_t rows, first; // taken: [first, first + rows)
    uint64_t all;         // rows of the tensor
    const struct weight *weight;
};

static struct part part(uint64_t rows, const char *format, ...) PRINTF_LIKE(2, 3);
static struct part part(uint64_t rows, const char *format, ...)
{
    struct part out = {.rows = rows, .all = rows};
    va_list list;
    va_start(list, format);
    (void)vsnprintf(out.name, sizeof out.name, format, list);
    va_end(list);
    return out;
}

// This rank's rows of it.
static struct part part_share(const struct loader *loader, struct part whole)
{
    const struct model_share *share = &loader->model->share;
    whole.rows = whole.all / share->world;
    whole.first = whole.rows * share->rank;
    return whole;
}

// The columns of a tensor that are taken.
struct columns {
    size_t all, first, count;
};

static struct columns columns_whole(size_t count)
{
    return (struct columns){.all = count, .count = count};
}

static struct columns columns_share(const struct loader *loader, size_t all)
{
    const struct model_share *share = &loader->model->share;
    size_t count = all / share->world;
    return (struct columns){.all = all, .first = count * share->rank, .count = count};
}

static enum status grow(uint8_t **buffer, size_t *has, size_t needs, struct fault *fault)
{
    if (*has >= needs)
        return STATUS_OK;
    free(*buffer);
    *has = 0;
    *buffer = malloc(needs);
    if (!*buffer)
        return fault_set(fault, STATUS_NO_MEMORY,
                         "out of memory while loading weights (%zu bytes).", needs);
    *has = needs;
    return STATUS_OK;
}

static enum status no_room(const struct model *model, enum status status, size_t bytes,
                           struct fault *fault)
{
    size_t available = model->device->table->free_bytes(model->device);
    if (status != STATUS_NO_MEMORY)
        return fault_set(fault, status, "the device failed while the static weights were loaded.");
    if (available == SIZE_MAX)
        return fault_set(fault, status, "there is no memory for the static weights (%zu MiB).",
                         model->static_bytes >> 20);
    return fault_set(fault, status,
                     "the static weights are %zu MiB; of them %zu MiB was asked for and the device "
                     "has %zu MiB free: free its memory or choose another --device.",
                     model->static_bytes >> 20, (bytes + (1u << 20) - 1) >> 20, available >> 20);
}

// Counts the bytes; in the filling pass also allocates them (zeroed).
static enum status take(struct loader *loader, size_t bytes, void *out, struct fault *fault)
{
    struct model *model = loader->model;
    if (!loader->fill) {
        model->static_bytes += round_up(bytes, 64);
        return STATUS_OK;
    }
    void *memory = NULL;
    enum status status = model->device->table->alloc(model->device, bytes, &memory);
    if (status)
        return no_room(model, status, bytes, fault);
    memcpy(out, &memory, sizeof memory);
    return STATUS_OK;
}

static enum status read_rows(struct loader *loader, const struct part *source, uint64_t first,
                             size_t count, size_t cols, void *out, struct fault *fault)
{
    uint64_t from = (source->first + first) * cols;
    enum status status =
        weight_read(source->weight, loader->model->dtype, from, out, count * cols, fault);
    if (!status && loader->progress)
        loader->progress(loader->progress_context,
                         count * cols * tensor_type_bytes(source->weight->tensor->type));
    return status;
}

static enum status claim(struct loader *loader, struct part *parts, size_t count, uint64_t cols,
                         struct fault *fault)
{
    for (size_t i = 0; i < count; i++) {
        uint64_t shape[] = {parts[i].all, cols};
        enum status status =
            checkpoint_claim(loader->checkpoint, parts[i].name, shape, 2, &parts[i].weight, fault);
        if (status)
            return status;
    }
    return STATUS_OK;
}

// fp32 values in their own order: norms, routers.
static enum status place_f32(struct loader *loader, const char *name, const uint64_t *shape,
                             uint32_t dims, float **out, struct fault *fault)
{
    const struct weight *weight = NULL;
    enum status status = checkpoint_claim(loader->checkpoint, name, shape, dims, &weight, fault);
    size_t count = (size_t)shape[0] * (dims > 1 ? (size_t)shape[1] : 1);
    if (!status)
        status = take(loader, count * sizeof(float), out, fault);
    if (status || !loader->fill)
        return status;
    status = grow(&loader->rows, &loader->rows_bytes, count * sizeof(float), fault);
    if (!status)
        status = weight_read(weight, DTYPE_F32, 0, loader->rows, count, fault);
    if (!status)
        status =
            device_upload(loader->model->device, *out, loader->rows, count * sizeof(float), fault);
    if (!status && loader->progress)
        loader->progress(loader->progress_context, weight->tensor->bytes);
    return status;
}

static size_t chunk_rows(enum dtype dtype, size_t cols)
{
    size_t rows = STAGING_BYTES / (cols * dtype_bytes(dtype)) / TILE_ROWS * TILE_ROWS;
    return rows ? rows : TILE_ROWS;
}

static enum status prepare_staging(struct loader *loader, size_t rows, size_t cols,
                                   struct fault *fault)
{
    enum dtype dtype = loader->model->dtype;
    enum status status =
        grow(&loader->rows, &loader->rows_bytes, rows * cols * dtype_bytes(dtype), fault);
    if (!status)
        status = grow(&loader->tiles, &loader->tiles_bytes,
                      tile_count(dtype, rows, cols) * TILE_BYTES, fault);
    return status;
}

// Rows [first, first + count) of the parts seen as one matrix.
static enum status read_stacked(struct loader *loader, const struct part *parts, size_t part_count,
                                size_t first, size_t count, size_t cols, struct fault *fault)
{
    size_t row_bytes = cols * dtype_bytes(loader->model->dtype), begin = 0;
    for (size_t i = 0; i < part_count; begin += (size_t)parts[i].rows, i++) {
        size_t end = begin + (size_t)parts[i].rows;
        size_t from = max_size(first, begin), to = min_size(first + count, end);
        if (from >= to)
            continue;
        enum status status = read_rows(loader, &parts[i], from - begin, to - from, cols,
                                       loader->rows + (from - first) * row_bytes, fault);
        if (status)
            return status;
    }
    return STATUS_OK;
}

// Leaves the taken columns of `count` staged rows, close together.
static void take_columns(struct loader *loader, size_t count, const struct columns *columns)
{
    size_t element = dtype_bytes(loader->model->dtype), bytes = columns->count * element;
    for (size_t r = 0; columns->count < columns->all && r < count; r++)
        memmove(loader->rows + r * bytes,
                loader->rows + (r * columns->all + columns->first) * element, bytes);
}

// Tiles of the parts one below the other.
static enum status place_tiles(struct loader *loader, struct part *parts, size_t part_count,
                               struct columns columns, void **out, struct fault *fault)
{
    enum dtype dtype = loader->model->dtype;
    size_t rows = 0, cols = columns.count, step = chunk_rows(dtype, columns.all);
    for (size_t i = 0; i < part_count; i++)
        rows += (size_t)parts[i].rows;
    enum status status = claim(loader, parts, part_count, columns.all, fault);
    if (!status)
        status = take(loader, tile_count(dtype, rows, cols) * TILE_BYTES, out, fault);
    if (status || !loader->fill)
        return status;
    status = prepare_staging(loader, step, columns.all, fault);
    for (size_t r = 0; !status && r < rows; r += step) {
        size_t count = min_size(step, rows - r), tiles = tile_count(dtype, count, cols);
        status = read_stacked(loader, parts, part_count, r, count, columns.all, fault);
        if (status)
            break;
        take_columns(loader, count, &columns);
        memset(loader->tiles, 0, tiles * TILE_BYTES);
        dense_pack(loader, count, cols, -1);
        status = device_upload(loader->model->device,
                               (uint8_t *)*out + tile_count(dtype, r, cols) * TILE_BYTES,
                               loader->tiles, tiles * TILE_BYTES, fault);
    }
    return status;
}

// Tiles of gate and up (parts[0], parts[1]) interleaved in blocks of 8 rows.
static enum status place_interleaved(struct loader *loader, struct part *parts, size_t cols,
                                     void **out, struct fault *fault)
{
    enum dtype dtype = loader->model->dtype;
    size_t rows = (size_t)parts[0].rows, step = chunk_rows(dtype, cols) / 2; // a multiple of 32
    size_t all = tile_count(dtype, tile_interleaved_rows(rows), cols);
    enum status status = claim(loader, parts, 2, cols, fault);
    if (!status)
        status = take(loader, all * TILE_BYTES, out, fault);
    if (status || !loader->fill)
        return status;
    status = prepare_staging(loader, 2 * step, cols, fault);
    for (size_t r = 0; !status && r < rows; r += step) {
        size_t count = min_size(step, rows - r);
        size_t tiles = tile_count(dtype, tile_interleaved_rows(count), cols);
        memset(loader->tiles, 0, tiles * TILE_BYTES);
        for (int half = 0; !status && half < 2; half++) {
            status = read_rows(loader, &parts[half], r, count, cols, loader->rows, fault);
            if (!status)
                dense_pack(loader, count, cols, half);
        }
        if (!status)
            status = device_upload(loader->model->device,
                                   (uint8_t *)*out + tile_count(dtype, 2 * r, cols) * TILE_BYTES,
                                   loader->tiles, tiles * TILE_BYTES, fault);
    }
    return status;
}

static enum status place_embedding(struct loader *loader, struct fault *fault)
{
    struct model *model = loader->model;
    const struct model_config *config = &model->config;
    size_t row_bytes = config->hidden * dtype_bytes(model->dtype);
    size_t step = chunk_rows(model->dtype, config->hidden);
    struct part table = part(config->vocab, "model.embed_tokens.weight");
    enum status status = claim(loader, &table, 1, config->hidden, fault);
    if (!status)
        status = take(loader, config->vocab * row_bytes, &model->embedding, fault);
    if (!status && loader->fill)
        status = prepare_staging(loader, step, config->hidden, fault);
    for (size_t r = 0; !status && loader->fill && r < config->vocab; r += step) {
        size_t count = min_size(step, config->vocab - r);
        status = read_rows(loader, &table, r, count, config->hidden, loader->rows, fault);
        if (!status)
            status = device_upload(model->device, (uint8_t *)model->embedding + r * row_bytes,
                                   loader->rows, count * row_bytes, fault);
    }
    if (status)
        return status;
    struct part head =
        part(config->vocab, "%s", config->tied_embeddings ? table.name : "lm_head.weight");
    return place_tiles(loader, &head, 1, columns_whole(config->hidden), &model->head, fault);
}

// 1 / theta^(2i / head_dim) in fp32, as transformers computes it.
static enum status place_inv_freq(struct loader *loader, struct fault *fault)
{
    struct model *model = loader->model;
    uint32_t count = model->config.head_dim / 2;
    enum status status = take(loader, count * sizeof(float), &model->inv_freq, fault);
    if (status || !loader->fill)
        return status;
    float values[1024];
    CHECK(count <= ARRAY_COUNT(values));
    for (uint32_t i = 0; i < count; i++)
        values[i] = 1.0f / powf((float)model->config.rope_theta,
                                (float)(2 * i) / (float)model->config.head_dim);
    return device_upload(model->device, model->inv_freq, values, count * sizeof(float), fault);
}

static enum status place_norm(struct loader *loader, uint32_t layer, const char *which,
                              uint64_t count, float **out, struct fault *fault)
{
    struct part name = part(0, "model.layers.%u.%s.weight", layer, which);
    return place_f32(loader, name.name, &count, 1, out, fault);
}

static enum status place_attention(struct loader *loader, uint32_t layer, struct fault *fault)
{
    const struct model_config *config = &loader->model->config;
    struct model_layer *to = &loader->model->layers[layer];
    uint64_t q = (uint64_t)config->heads * config->head_dim;
    uint64_t kv = (uint64_t)config->kv_heads * config->head_dim;
    struct part qkv[PARTS_MAX] = {part(q, "model.layers.%u.self_attn.q_proj.weight", layer),
                                  part(kv, "model.layers.%u.self_attn.k_proj.weight", layer),
                                  part(kv, "model.layers.%u.self_attn.v_proj.weight", layer)};
    for (size_t i = 0; i < PARTS_MAX; i++)
        qkv[i] = part_share(loader, qkv[i]);
    struct part o = part(config->hidden, "model.layers.%u.self_attn.o_proj.weight", layer);
    enum status status =
        place_norm(loader, layer, "input_layernorm", config->hidden, &to->attention_norm, fault);
    if (!status)
        status =
            place_norm(loader, layer, "self_attn.q_norm", config->head_dim, &to->q_norm, fault);
    if (!status)
        status =
            place_norm(loader, layer, "self_attn.k_norm", config->head_dim, &to->k_norm, fault);
    if (!status)
        status =
            place_tiles(loader, qkv, PARTS_MAX, columns_whole(config->hidden), &to->qkv, fault);
    if (!status)
        status = place_tiles(loader, &o, 1, columns_share(loader, (size_t)q), &to->o, fault);
    return status;
}

static enum status place_mlp(struct loader *loader, uint32_t layer, struct fault *fault)
{
    const struct model_config *config = &loader->model->config;
    struct model_layer *to = &loader->model->layers[layer];
    enum status status =
        place_norm(loader, layer, "post_attention_layernorm", config->hidden, &to->mlp_norm, fault);
    if (status)
        return status;
    if (config->is_moe[layer]) {
        uint64_t shape[] = {config->experts, config->hidden};
        struct part name = part(0, "model.layers.%u.mlp.gate.weight", layer);
        return place_f32(loader, name.name, shape, 2, &to->router, fault);
    }
    struct part gate_up[] = {
        part(config->intermediate, "model.layers.%u.mlp.gate_proj.weight", layer),
        part(config->intermediate, "model.layers.%u.mlp.up_proj.weight", layer)};
    for (size_t i = 0; i < ARRAY_COUNT(gate_up); i++)
        gate_up[i] = part_share(loader, gate_up[i]);
    struct part down = part(config->hidden, "model.layers.%u.mlp.down_proj.weight", layer);
    status = place_interleaved(loader, gate_up, config->hidden, &to->gate_up, fault);
    if (!status)
        status = place_tiles(loader, &down, 1, columns_share(loader, config->intermediate),
                             &to->down, fault);
    return status;
}

enum status model__place(struct loader *loader, struct fault *fault)
{
    struct model *model = loader->model;
    uint64_t hidden = model->config.hidden;
    enum status status = place_embedding(loader, fault);
    if (!status)
        status = place_f32(loader, "model.norm.weight", &hidden, 1, &model->final_norm, fault);
    if (!status)
        status = place_inv_freq(loader, fault);
    for (uint32_t layer = 0; !status && layer < model->config.layers; layer++) {
        status = place_attention(loader, layer, fault);
        if (!status)
            status = place_mlp(loader, layer, fault);
    }
    return status;
}

void model__loader_clear(struct loader *loader)
{
    free(loader->rows);
    free(loader->tiles);
    loader->rows = loader->tiles = NULL;
    loader->rows_bytes = loader->tiles_bytes = 0;
}
