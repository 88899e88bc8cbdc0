// SPDX-License-Identifier: Apache-2.0
// adapter_convert: a PEFT directory becomes a store file, in two passes over the layers.
//
// Reads adapter_config.json and adapter_model.safetensors through confined readers (nothing outside
// the directory is opened), asks peft__plan what goes where, and writes rows in the order of the
// store: first what every row of a step needs by (layer, module), embed_tokens and lm_head last,
// then what experts need by (layer, expert, module), A before B. The tensors of one layer are held
// in memory at a time, already in the compute dtype; a value that is not finite is refused while it
// is read.
//
// Does not decide what is accepted (peft_*.c) nor how it is stored (store.c).
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "adapters/peft.h"
#include "adapters/store.h"
#include "base/arith.h"
#include "base/check.h"

enum { CONFIG_BYTES_MAX = 4 << 20, HASH_CHUNK = 256 << 10 };

#define CONFIG_NAME "adapter_config.json"
#define WEIGHTS_NAME "adapter_model.safetensors"
#define PICKLE_NAME "adapter_model.bin"

// The tensors of the layer being written.
struct loaded {
    const struct tensor *tensor;
    void *data;
};

struct conversion {
    const struct adapter_base *base;
    const struct safetensors *file;
    struct peft_plan plan;
    struct adapter_writer *writer;
    struct loaded *loaded;
    uint32_t loaded_count, loaded_room;
    struct adapter_report *report;
};

static void layer_forget(struct conversion *conversion)
{
    for (uint32_t i = 0; i < conversion->loaded_count; i++)
        free(conversion->loaded[i].data);
    conversion->loaded_count = 0;
}

static enum status tensor_read(struct conversion *conversion, const struct tensor *tensor,
                               void **out, struct fault *fault)
{
    size_t bytes;
    if (!mul_size(tensor->elements, dtype_bytes(conversion->base->dtype), &bytes))
        return fault_set(fault, STATUS_LIMIT, "\"%.150s\" is too large.", tensor->name);
    void *data = malloc(bytes);
    if (!data)
        return fault_set(fault, STATUS_NO_MEMORY, "out of memory for \"%.150s\".", tensor->name);
    enum status status =
        conversion->base->dtype == DTYPE_BF16
            ? safetensors_read_bf16(conversion->file, tensor, 0, data, tensor->elements, fault)
            : safetensors_read_f32(conversion->file, tensor, 0, data, tensor->elements, fault);
    if (status)
        free(data);
    else
        *out = data;
    return status;
}

static enum status tensor_load(struct conversion *conversion, const struct tensor *tensor,
                               const void **out, struct fault *fault)
{
    for (uint32_t i = conversion->loaded_count; i-- > 0;)
        if (conversion->loaded[i].tensor == tensor) {
            *out = conversion->loaded[i].data;
            return STATUS_OK;
        }
    if (conversion->loaded_count == conversion->loaded_room) {
        uint32_t room = conversion->loaded_room ? 2 * conversion->loaded_room : 64;
        struct loaded *more = realloc(conversion->loaded, room * sizeof *more);
        if (!more)
            return fault_set(fault, STATUS_NO_MEMORY, "out of memory while converting an adapter.");
        conversion->loaded = more;
        conversion->loaded_room = room;
    }
    void *data = NULL;
    enum status status = tensor_read(conversion, tensor, &data, fault);
    if (status)
        return status;
    conversion->loaded[conversion->loaded_count++] = (struct loaded){tensor, data};
    *out = data;
    return STATUS_OK;
}

struct gather {
    const struct peft_source *source;
    const void *data;
    enum dtype dtype;
};

static void gather_row(const void *context, const struct adapter_side *side, uint32_t row,
                       void *out)
{
    const struct gather *gather = context;
    const struct peft_source *source = gather->source;
    size_t rank = side->by_token ? 0 : row % side->rank;
    size_t dim = side->by_token ? row : (size_t)(row / side->rank) * side->columns;
    size_t at = source->first + rank * source->rank_step + dim * source->dim_step;
    size_t step = side->by_token ? source->rank_step : source->dim_step;
    size_t count = side->by_token ? side->rank : min_size(side->columns, side->dim - dim);
    if (step == 1) {
        size_t element = dtype_bytes(gather->dtype);
        memcpy(out, (const uint8_t *)gather->data + at * element, count * element);
    } else if (gather->dtype == DTYPE_BF16) {
        const uint16_t *from = gather->data;
        for (size_t i = 0; i < count; i++, at += step)
            ((uint16_t *)out)[i] = from[at];
    } else {
        const float *from = gather->data;
        for (size_t i = 0; i < count; i++, at += step)
            ((float *)out)[i] = from[at];
    }
}

static enum status side_put(struct conversion *conversion, enum lora_module module, bool is_b,
                            const struct peft_pair *pair, struct lora_slice *out,
                            struct fault *fault)
{
    const struct peft_source *source = is_b ? &pair->b : &pair->a;
    struct adapter_side side =
        adapter__side(conversion->base, module, is_b, pair->rank, is_b ? pair->d_out : pair->d_in);
    struct gather gather = {.source = source, .dtype = conversion->base->dtype};
    enum status status = tensor_load(conversion, source->tensor, &gather.data, fault);
    if (status)
        return status;
    return adapter__store_put(conversion->writer, &side, gather_row, &gather, out, fault);
}

// Writes one matrix; *a_before is the A slice of the matrix before it.
static enum status pair_put(struct conversion *conversion, uint32_t layer, enum lora_module module,
                            uint32_t expert, struct lora_slice *a_before, struct fault *fault)
{
    const struct peft_pair *pair = peft__pair_at(&conversion->plan, layer, module, expert);
    struct adapter_report *report = conversion->report;
    if (!pair->rank)
        return STATUS_OK;
    struct adapter_record record = {.layer = layer, .module = module, .expert = expert};
    enum status status = STATUS_OK;
    if (!pair->shares_a)
        status = side_put(conversion, module, false, pair, a_before, fault);
    record.pair.a = *a_before;
    record.pair.scale = pair->scale;
    if (!status)
        status = side_put(conversion, module, true, pair, &record.pair.b, fault);
    if (!status)
        status = adapter__store_record(conversion->writer, &record, fault);
    if (pair->rank < report->rank_min)
        report->rank_min = pair->rank;
    if (pair->rank > report->rank_max)
        report->rank_max = pair->rank;
    return status;
}

// The trunk of a layer: what is no expert's.
static enum status trunk_put(struct conversion *conversion, uint32_t layer, struct fault *fault)
{
    struct lora_slice a;
    enum status status = STATUS_OK;
    int last = conversion->base->is_moe[layer] ? LORA_O : LORA_DOWN;
    for (int m = LORA_Q; m <= last && !status; m++)
        status = pair_put(conversion, layer, (enum lora_module)m, 0, &a, fault);
    layer_forget(conversion);
    return status;
}

static enum status experts_put(struct conversion *conversion, uint32_t layer, struct fault *fault)
{
    struct lora_slice a;
    enum status status = STATUS_OK;
    uint32_t count = conversion->base->is_moe[layer] ? conversion->base->experts : 0;
    for (uint32_t expert = 0; expert < count && !status; expert++)
        for (int m = LORA_GATE; m <= LORA_DOWN && !status; m++)
            status = pair_put(conversion, layer, (enum lora_module)m, expert, &a, fault);
    layer_forget(conversion);
    return status;
}

// embed_tokens and lm_head.
static enum status model_put(struct conversion *conversion, struct fault *fault)
{
    struct lora_slice a;
    enum status status = STATUS_OK;
    for (int m = LORA_EMBED; m <= LORA_HEAD && !status; m++) {
        status = pair_put(conversion, conversion->base->layers, (enum lora_module)m, 0, &a, fault);
        layer_forget(conversion);
    }
    return status;
}

static enum status store_write(struct conversion *conversion, size_t page_bytes,
                               const char *store_path, struct fault *fault)
{
    struct adapter_report *report = conversion->report;
    enum status status =
        adapter__store_create(store_path, conversion->base, page_bytes, conversion->plan.applied,
                              &conversion->writer, fault);
    if (status)
        return status;
    report->rank_min = ADAPTER_RANK_MAX;
    for (uint32_t layer = 0; layer < conversion->base->layers && !status; layer++)
        status = trunk_put(conversion, layer, fault);
    if (!status)
        status = model_put(conversion, fault);
    for (uint32_t layer = 0; layer < conversion->base->layers && !status; layer++)
        status = experts_put(conversion, layer, fault);
    if (status) {
        adapter__store_abandon(conversion->writer);
        return status;
    }
    report->matrices_applied = conversion->plan.applied;
    report->matrices_possible = adapter__matrices_possible(conversion->base);
    memcpy(report->layout, conversion->plan.layout, sizeof report->layout);
    return adapter__store_finish(conversion->writer, report, fault);
}

static enum status weights_open(const char *directory, struct reader **out, struct fault *fault)
{
    enum status status = reader_open_in(directory, WEIGHTS_NAME, out, fault);
    struct reader *pickle = NULL;
    if (status != STATUS_NOT_FOUND || reader_open_in(directory, PICKLE_NAME, &pickle, NULL))
        return status;
    reader_close(pickle);
    return fault_set(fault, STATUS_UNSUPPORTED,
                     PICKLE_NAME " is a pickle file, which can run code when it is read; save the "
                                 "adapter with safe_serialization=True.");
}

static enum status config_load(const char *directory, struct peft_config *out, struct fault *fault)
{
    char *text = NULL;
    size_t bytes = 0;
    enum status status =
        reader_slurp_in(directory, CONFIG_NAME, CONFIG_BYTES_MAX, &text, &bytes, fault);
    if (!status)
        status = peft__config_parse(text, bytes, out, fault);
    free(text);
    return status;
}

// (size, bytes) of a file that is open.
static enum status hash_reader(struct reader *reader, const char *name, struct hash_stream *stream,
                               struct fault *fault)
{
    uint8_t *chunk = malloc(HASH_CHUNK);
    if (!chunk)
        return fault_set(fault, STATUS_NO_MEMORY, "out of memory while reading %s.", name);
    enum status status = STATUS_OK;
    hash_update(stream, &reader->size, sizeof reader->size);
    for (uint64_t at = 0; at < reader->size && !status; at += HASH_CHUNK) {
        size_t bytes = min_size((size_t)(reader->size - at), HASH_CHUNK);
        status = reader_read(reader, at, chunk, bytes);
        hash_update(stream, chunk, bytes);
    }
    free(chunk);
    return status ? fault_set(fault, status, "reading %s failed.", name) : STATUS_OK;
}

static enum status source_hash(const char *directory, struct reader *weights, struct digest *out,
                               struct fault *fault)
{
    struct hash_stream stream;
    struct reader *config = NULL;
    hash_begin(&stream, NULL);
    enum status status = reader_open_in(directory, CONFIG_NAME, &config, fault);
    if (!status)
        status = hash_reader(config, CONFIG_NAME, &stream, fault);
    if (!status)
        status = hash_reader(weights, WEIGHTS_NAME, &stream, fault);
    reader_close(config);
    *out = hash_end(&stream);
    return status;
}

enum status adapter_source(const char *directory, struct digest *out, struct fault *fault)
{
    struct reader *reader = NULL;
    enum status status = weights_open(directory, &reader, fault);
    if (!status)
        status = source_hash(directory, reader, out, fault);
    reader_close(reader);
    return status;
}

enum status adapter_convert(const char *directory, const struct adapter_base *base,
                            size_t page_bytes, const char *store_path,
                            struct adapter_report *report, struct fault *fault)
{
    return adapter_convert_version(directory, base, page_bytes, 1, store_path, report, fault);
}

enum status adapter_convert_version(const char *directory, const struct adapter_base *base,
                                    size_t page_bytes, uint32_t version, const char *store_path,
                                    struct adapter_report *report, struct fault *fault)
{
    struct peft_config config = {.rank = 0};
    struct conversion conversion = {.base = base, .report = report};
    struct reader *reader = NULL;
    struct safetensors *file = NULL;
    CHECK(is_power_of_two(page_bytes) && page_bytes >= 4096);
    *report = (struct adapter_report){.version = version};
    enum status status = config_load(directory, &config, fault);
    if (!status)
        status = weights_open(directory, &reader, fault);
    if (!status)
        status = safetensors_open(reader, WEIGHTS_NAME, &file, fault);
    if (!status)
        status = peft__plan(file, base, &config, &conversion.plan, fault);
    if (!status)
        status = source_hash(directory, reader, &report->source, fault);
    conversion.file = file;
    memcpy(report->ignored, config.ignored, sizeof report->ignored);
    if (!status)
        status = store_write(&conversion, page_bytes, store_path, fault);
    layer_forget(&conversion);
    free(conversion.loaded);
    peft__plan_clear(&conversion.plan);
    if (file)
        safetensors_close(file);
    reader_close(reader);
    peft__config_clear(&config);
    return status;
}

enum status adapter_inspect(const char *store_path, bool whole, struct adapter_summary *out,
                            struct fault *fault)
{
    struct reader *reader = NULL;
    struct adapter_store store;
    enum status status = reader_open(store_path, &reader, fault);
    if (!status)
        status = adapter__store_peek(reader, store_path, &store, out, fault);
    if (!status && whole)
        status = adapter__store_verify(reader, store_path, &store, fault);
    reader_close(reader);
    return status;
}

uint32_t adapter_version_at(const char *store_path, const char *directory,
                            const struct adapter_base *base, size_t page_bytes, bool *same)
{
    struct adapter_summary now;
    struct digest source;
    if (same)
        *same = false;
    if (adapter_inspect(store_path, false, &now, NULL))
        return 0;
    if (same)
        *same = digest_equal(&base->digest, &now.base) && base->dtype == now.dtype &&
                page_bytes == now.page_bytes && !adapter_source(directory, &source, NULL) &&
                digest_equal(&source, &now.report.source);
    return now.report.version;
}

enum status adapter_verify(const char *store_path, const struct adapter_base *base,
                           size_t page_bytes, struct fault *fault)
{
    struct reader *reader = NULL;
    struct adapter_store store = {.pages = 0};
    enum status status = reader_open(store_path, &reader, fault);
    if (!status)
        status = adapter__store_open(reader, store_path, base, page_bytes, &store, fault);
    if (!status)
        status = adapter__store_verify(reader, store_path, &store, fault);
    adapter__store_clear(&store);
    reader_close(reader);
    return status;
}
