// SPDX-License-Identifier: Apache-2.0
// Loading a model: the order of things, the digest, the name of the expert store. Owns `struct
// model`.
//
//   config.json -> shards opened -> every tensor claimed, shapes checked (nothing read yet) ->
//   digest -> static weights to the device -> expert store opened, or written and then opened
//
// The digest covers config.json, tokenizer.json and every tensor (name, type, shape, bytes), so
// that an adapter or a cached prefix can never meet other weights. The store's name carries the
// digest, the type and the page size; a store that is damaged is written anew.
#include "runtime/model/model.h"

#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>

#include "base/arith.h"
#include "base/check.h"
#include "base/log.h"
#include "runtime/model/internal.h"

enum { PATH_BYTES = 4096, HASH_CHUNK = 64 << 10 };

struct progress {
    const struct model_options *options;
    uint64_t done, total;
};

static void report(void *context, uint64_t bytes)
{
    struct progress *progress = context;
    uint64_t done = progress->done + bytes;
    progress->done = done < progress->total ? done : progress->total;
    if (progress->options->progress)
        progress->options->progress(progress->options->progress_context, progress->done,
                                    progress->total);
}

// ---- digest ----

// (name, size, bytes) of a file of the directory; one that is not there counts as such.
static enum status hash_file(const char *directory, const char *name, struct hash_stream *stream,
                             struct fault *fault)
{
    struct reader *reader = NULL;
    enum status status = reader_open_in(directory, name, &reader, fault);
    uint64_t size = status == STATUS_NOT_FOUND ? UINT64_MAX : 0;
    if (status && status != STATUS_NOT_FOUND)
        return status;
    size = reader ? reader->size : size;
    hash_update(stream, name, strlen(name) + 1);
    hash_update(stream, &size, sizeof size);
    status = STATUS_OK;
    uint8_t *chunk = reader ? malloc(HASH_CHUNK) : NULL;
    if (reader && !chunk)
        status = fault_set(fault, STATUS_NO_MEMORY, "out of memory while reading %s.", name);
    for (uint64_t at = 0; reader && !status && at < size;) {
        size_t n = min_size((size_t)(size - at), HASH_CHUNK);
        status = reader_read(reader, at, chunk, n);
        if (status)
            status = fault_set(fault, status, "reading %s failed.", name);
        else
            hash_update(stream, chunk, n);
        at += n;
    }
    free(chunk);
    reader_close(reader);
    return status;
}

static enum status make_digest(struct loader *loader, const char *directory, struct fault *fault)
{
    static const char domain[] = "polder model 1";
    struct checkpoint_digest wanted[] = {{.name = "model.embed_tokens.weight"},
                                         {.name = "lm_head.weight"}};
    struct hash_stream stream;
    hash_begin(&stream, NULL);
    hash_update(&stream, domain, sizeof domain);
    enum status status = hash_file(directory, "config.json", &stream, fault);
    if (!status)
        status = hash_file(directory, "tokenizer.json", &stream, fault);
    if (!status)
        status = checkpoint_hash(loader->checkpoint, &stream, wanted, ARRAY_COUNT(wanted),
                                 loader->progress, loader->progress_context, fault);
    loader->model->digests = (struct model_digests){
        .model = hash_end(&stream), .embedding = wanted[0].digest, .head = wanted[1].digest};
    return status;
}

// ---- expert store ----

static enum status store_path(const struct model *model, const char *state_directory,
                              char out[PATH_BYTES], struct fault *fault)
{
    char hex[2 * DIGEST_BYTES + 1];
    digest_hex(&model->digests.model, hex);
    int n =
        snprintf(out, PATH_BYTES, "%s/experts-%.32s-%s-%zuk.store", state_directory, hex,
                 model->dtype == DTYPE_F32 ? "f32" : "bf16", model->expert_shape.page_bytes >> 10);
    return n < PATH_BYTES
               ? STATUS_OK
               : fault_set(fault, STATUS_INVALID, "the path of the state directory is too long.");
}

static enum status open_store(struct loader *loader, const char *state_directory,
                              struct fault *fault)
{
    struct model *model = loader->model;
    char path[PATH_BYTES];
    if (!state_directory)
        return fault_set(fault, STATUS_INVALID,
                         "a model with experts needs a state directory for its expert store.");
    enum status status = store_path(model, state_directory, path, fault);
    if (status)
        return status;
    if (mkdir(state_directory, 0700) != 0 && errno != EEXIST)
        return fault_set(fault, STATUS_IO, "cannot create the state directory: %s.",
                         strerror(errno));
    status = expert_store_open(path, &model->expert_shape, &model->digests.model,
                               &model->expert_store, fault);
    if (status != STATUS_NOT_FOUND && status != STATUS_CORRUPT)
        return status;
    if (status == STATUS_CORRUPT)
        log_line(LOG_WARN, "the expert store is damaged and is written anew");
    status = model__experts_store(loader, path, fault);
    return status ? status
                  : expert_store_open(path, &model->expert_shape, &model->digests.model,
                                      &model->expert_store, fault);
}

// ---- life ----

enum status model_share(const struct model_config *config, uint32_t rank, uint32_t world,
                        struct model_share *out, struct fault *fault)
{
    const struct {
        const char *what;
        uint32_t count;
    } parts[] = {{"attention heads", config->heads},
                 {"KV heads", config->kv_heads},
                 {"MLP units", config->intermediate},
                 {"experts", config->experts}};
    world = world ? world : 1;
    if (rank >= world)
        return fault_set(fault, STATUS_INVALID, "rank %u of %u: ranks count from 0.", rank, world);
    for (size_t i = 0; i < ARRAY_COUNT(parts); i++)
        if (parts[i].count % world)
            return fault_set(fault, STATUS_UNSUPPORTED,
                             "the model's %u %s cannot be shared evenly by %u ranks.",
                             parts[i].count, parts[i].what, world);
    uint32_t experts = config->experts / world;
    *out = (struct model_share){.rank = rank,
                                .world = world,
                                .heads = config->heads / world,
                                .kv_heads = config->kv_heads / world,
                                .intermediate = config->intermediate / world};
    if (world > 1)
        out->experts = (struct expert_range){.first = rank * experts, .count = experts};
    return STATUS_OK;
}

// Configuration, shards, page size and the counting pass: what model_load and model_fit share.
static enum status prepare(struct loader *loader, const struct model_options *options,
                           size_t *page_out, struct fault *fault)
{
    struct model *model = loader->model;
    const char *directory = options->directory;
    enum status status = STATUS_OK;
    if (synth_is_name(directory))
        status = synth_open(directory, &loader->synth, &model->config, fault);
    else
        status = model_config_load(directory, &model->config, fault);
    if (!status)
        status = model_share(&model->config, options->rank, options->world, &model->share, fault);
    if (!status)
        status =
            model__page_bytes(&model->config, model->dtype, options->page_bytes, page_out, fault);
    if (status)
        return status;
    model->expert_shape = model__expert_shape(&model->config, model->dtype, *page_out);
    model->layers = calloc(model->config.layers, sizeof *model->layers);
    if (!model->layers)
        return fault_set(fault, STATUS_NO_MEMORY, "out of memory while loading the model.");
    status = loader->synth ? synth_checkpoint(loader->synth, &loader->checkpoint, fault)
                           : checkpoint_open(directory, &loader->checkpoint, fault);
    if (!status)
        status = model__place(loader, fault);
    if (!status && !loader->synth)
        status = model__experts_claim(loader, fault);
    if (!status)
        status = checkpoint_finish(loader->checkpoint, model->config.tied_embeddings, fault);
    return status;
}

static enum status load(struct loader *loader, const struct model_options *options,
                        struct progress *progress, struct fault *fault)
{
    struct model *model = loader->model;
    size_t page_bytes = 0;
    enum status status = prepare(loader, options, &page_bytes, fault);
    if (status)
        return status;
    model->page_bytes = page_bytes;
    // Every tensor is read twice, for the digest and for its place; a store that exists saves its
    // part.
    progress->total = 2 * checkpoint_bytes(loader->checkpoint);
    if (loader->synth)
        model->digests.model = synth_digest(loader->synth);
    else
        status = make_digest(loader, options->directory, fault);
    loader->fill = true;
    if (!status)
        status = model__place(loader, fault);
    if (!status && model->expert_shape.experts && loader->synth)
        status = synth_store(loader->synth, &model->expert_shape, &model->expert_store, fault);
    else if (!status && model->expert_shape.experts)
        status = open_store(loader, options->state_directory, fault);
    if (!status)
        report(progress, progress->total);
    return status;
}

enum status model_load(struct device *device, const struct model_options *options,
                       struct model **out, struct fault *fault)
{
    struct model *model = calloc(1, sizeof *model);
    if (!model)
        return fault_set(fault, STATUS_NO_MEMORY, "out of memory while loading the model.");
    struct device_info info = {0};
    device->table->info(device, &info);
    model->device = device;
    model->dtype = info.dtype;
    struct progress progress = {.options = options};
    struct loader loader = {.model = model,
                            .rows_wanted = !info.dense_tiles,
                            .progress = report,
                            .progress_context = &progress};
    enum status status = load(&loader, options, &progress, fault);
    checkpoint_close(loader.checkpoint);
    synth_close(loader.synth);
    model__loader_clear(&loader);
    if (status) {
        model_destroy(model);
        return status;
    }
    *out = model;
    return STATUS_OK;
}

static void release(const struct model *model, void *memory)
{
    if (memory)
        model->device->table->release(model->device, memory);
}

void model_destroy(struct model *model)
{
    if (!model)
        return;
    for (uint32_t i = 0; model->layers && i < model->config.layers; i++) {
        const struct model_layer *layer = &model->layers[i];
        void *const all[] = {layer->attention_norm, layer->mlp_norm, layer->q_norm,
                             layer->k_norm,         layer->qkv,      layer->o,
                             layer->router,         layer->gate_up,  layer->down};
        for (size_t k = 0; k < ARRAY_COUNT(all); k++)
            release(model, all[k]);
    }
    release(model, model->embedding);
    release(model, model->head);
    release(model, model->final_norm);
    release(model, model->inv_freq);
    reader_close(model->expert_store);
    free(model->layers);
    model_config_clear(&model->config);
    free(model);
}

enum status model_fit(const char *directory, enum dtype dtype, size_t page_bytes,
                      struct model_fit *out, struct fault *fault)
{
    struct model model = {.dtype = dtype};
    struct loader loader = {.model = &model};
    *out = (struct model_fit){0};
    struct model_options options = {.directory = directory, .page_bytes = page_bytes};
    enum status status = prepare(&loader, &options, &out->page_bytes, fault);
    checkpoint_close(loader.checkpoint);
    synth_close(loader.synth);
    free(model.layers);
    if (status) {
        model_config_clear(&model.config);
        return status;
    }
    const struct expert_shape *shape = &model.expert_shape;
    out->config = model.config; // the caller's from here on
    out->static_bytes = model.static_bytes;
    out->expert_bytes =
        (size_t)shape->layers * shape->experts * shape->pages_per_expert * shape->page_bytes;
    out->kv_bytes_per_token = (size_t)2 * out->config.layers * out->config.kv_heads *
                              out->config.head_dim * dtype_bytes(dtype);
    return STATUS_OK;
}

enum status model_identify(const struct model_options *options, enum dtype dtype,
                           struct model_config *config, size_t *page_bytes,
                           struct model_digests *digests, struct fault *fault)
{
    struct model model = {.dtype = dtype};
    struct progress progress = {.options = options};
    struct loader loader = {.model = &model, .progress = report, .progress_context = &progress};
    enum status status = prepare(&loader, options, page_bytes, fault);
    if (!status)
        progress.total = checkpoint_bytes(loader.checkpoint);
    if (!status && loader.synth)
        model.digests.model = synth_digest(loader.synth);
    else if (!status)
        status = make_digest(&loader, options->directory, fault);
    checkpoint_close(loader.checkpoint);
    synth_close(loader.synth);
    free(model.layers);
    *config = model.config; // the caller's from here on
    *digests = model.digests;
    if (status)
        model_config_clear(config);
    return status;
}
