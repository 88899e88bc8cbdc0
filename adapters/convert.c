// SPDX-License-Identifier: Apache-2.0
// adapter_convert: a PEFT directory becomes a store file, in two passes over the layers.
//
// Reads adapter_config.json and adapter_model.safetensors through confined readers (nothing outside
// the directory is opened), asks peft__plan what goes where, and writes rows in the order of the
// store: first what every row of a step needs by (layer, module), embed_tokens and lm_head last,
// then what experts need by (layer, expert, module), A before B. The tensors of one layer are held
// in memory at a time, already in the compute dtype; a value that is not finite is refused while it
// is read. Its bytes are read once: source.c hashes them as they come.
//
// Does not decide what is accepted (peft_*.c) nor how it is stored (store.c).
#include <stdlib.h>
#include <string.h>

#include "adapters/peft.h"
#include "adapters/source.h"
#include "adapters/store.h"
#include "base/arith.h"
#include "base/check.h"

enum { CONFIG_BYTES_MAX = 4 << 20 };

// A tensor of the layer being written. The memory is kept for the layers after it.
struct loaded {
    const struct tensor *tensor;
    void *data;
    size_t room;
};

struct conversion {
    const struct adapter_base *base;
    const char *directory;
    struct source source;
    struct peft_plan plan;
    struct adapter_writer *writer;
    struct loaded *loaded;
    uint32_t loaded_count, loaded_room; // count: in use; all of room have memory or NULL
    struct adapter_report *report;
};

static enum status tensor_read(struct conversion *conversion, const struct tensor *tensor,
                               struct loaded *into, struct fault *fault)
{
    size_t bytes;
    if (!mul_size(tensor->elements, dtype_bytes(conversion->base->dtype), &bytes))
        return fault_set(fault, STATUS_LIMIT, "\"%.150s\" is too large.", tensor->name);
    if (into->room < bytes) {
        free(into->data);
        into->data = malloc(bytes);
        into->room = into->data ? bytes : 0;
    }
    if (into->room < bytes)
        return fault_set(fault, STATUS_NO_MEMORY, "out of memory for \"%.150s\".", tensor->name);
    const struct safetensors *file = conversion->source.container;
    source__tensor_begin(&conversion->source);
    enum status status =
        conversion->base->dtype == DTYPE_BF16
            ? safetensors_read_bf16(file, tensor, 0, into->data, tensor->elements, fault)
            : safetensors_read_f32(file, tensor, 0, into->data, tensor->elements, fault);
    source__tensor_end(&conversion->source, tensor, !status);
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
        memset(more + conversion->loaded_room, 0, (room - conversion->loaded_room) * sizeof *more);
        conversion->loaded = more;
        conversion->loaded_room = room;
    }
    struct loaded *into = &conversion->loaded[conversion->loaded_count];
    enum status status = tensor_read(conversion, tensor, into, fault);
    if (status)
        return status;
    into->tensor = tensor;
    conversion->loaded_count++;
    *out = into->data;
    return STATUS_OK;
}

static void loaded_free(struct conversion *conversion)
{
    for (uint32_t i = 0; i < conversion->loaded_room; i++)
        free(conversion->loaded[i].data);
    free(conversion->loaded);
}

// Row r, element i of a slice (of its first block) is element first + r * row_step + i * step.
struct gather {
    const void *data;
    size_t first, row_step, step;
    enum dtype dtype;
};

typedef uint16_t eight __attribute__((vector_size(16)));

#define ZIP(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#define ZIP_LOW(a, b) ZIP(a, b, 0, 8, 1, 9, 2, 10, 3, 11)
#define ZIP_HIGH(a, b) ZIP(a, b, 4, 12, 5, 13, 6, 14, 7, 15)

// Eight rows of eight, transposed: three times interleaving with the row four further on.
static void transpose_eight(const uint16_t *from, size_t from_step, uint8_t *out, size_t out_bytes)
{
    eight row[8], mixed[8];
    for (size_t i = 0; i < 8; i++)
        memcpy(&row[i], from + i * from_step, sizeof row[i]);
    for (int turn = 0; turn < 3; turn++) {
        for (size_t i = 0; i < 4; i++) {
            mixed[2 * i] = ZIP_LOW(row[i], row[i + 4]);
            mixed[2 * i + 1] = ZIP_HIGH(row[i], row[i + 4]);
        }
        memcpy(row, mixed, sizeof row);
    }
    for (size_t i = 0; i < 8; i++)
        memcpy(out + i * out_bytes, &row[i], sizeof row[i]);
}

// A band of up to eight rows: what is read of a line of the source is used at once.
static void gather_band(const struct gather *gather, size_t at, uint32_t rows, uint32_t dim,
                        uint8_t *out, size_t row_bytes)
{
    uint32_t i = 0;
    if (gather->dtype == DTYPE_BF16) {
        const uint16_t *from = (const uint16_t *)gather->data + at;
        if (rows == 8 && gather->row_step == 1)
            for (; i + 8 <= dim; i += 8)
                transpose_eight(from + i * gather->step, gather->step, out + i * sizeof *from,
                                row_bytes);
        for (; i < dim; i++)
            for (uint32_t j = 0; j < rows; j++)
                memcpy(out + j * row_bytes + i * sizeof *from,
                       &from[i * gather->step + j * gather->row_step], sizeof *from);
    } else {
        const float *from = (const float *)gather->data + at;
        for (; i < dim; i++)
            for (uint32_t j = 0; j < rows; j++)
                memcpy(out + j * row_bytes + i * sizeof *from,
                       &from[i * gather->step + j * gather->row_step], sizeof *from);
    }
}

// `rows` rows of `count` elements, all of one block.
static void gather_run(const struct gather *gather, size_t at, uint32_t rows, uint32_t count,
                       uint8_t *out, size_t row_bytes)
{
    enum { BAND = 8 };
    size_t element = dtype_bytes(gather->dtype), done;
    for (uint32_t row = 0; row < rows; row += (uint32_t)done, out += done * row_bytes) {
        if (gather->step == 1) {
            memcpy(out, (const uint8_t *)gather->data + at * element, count * element);
            done = 1;
        } else {
            done = min_size(rows - row, BAND);
            gather_band(gather, at, (uint32_t)done, count, out, row_bytes);
        }
        at += done * gather->row_step;
    }
}

static void gather_rows(const void *context, const struct adapter_side *side, uint32_t first,
                        uint32_t rows, uint8_t *out)
{
    const struct gather *gather = context;
    for (uint32_t row = first, n; row < first + rows; row += n) {
        uint32_t left = first + rows - row, j = side->by_token ? row : row % side->rank;
        size_t skipped = side->by_token ? 0 : (size_t)(row / side->rank) * side->columns;
        n = side->by_token || left < side->rank - j ? left : side->rank - j;
        size_t at = gather->first + j * gather->row_step + skipped * gather->step;
        gather_run(gather, at, n, adapter__side_elements(side, row), out, side->row_bytes);
        out += (size_t)n * side->row_bytes;
    }
}

static enum status side_put(struct conversion *conversion, enum lora_module module, bool is_b,
                            const struct peft_pair *pair, struct lora_slice *out,
                            struct fault *fault)
{
    const struct peft_source *source = is_b ? &pair->b : &pair->a;
    struct adapter_side side =
        adapter__side(conversion->base, module, is_b, pair->rank, is_b ? pair->d_out : pair->d_in);
    struct gather gather = {.first = source->first,
                            .row_step = side.by_token ? source->dim_step : source->rank_step,
                            .step = side.by_token ? source->rank_step : source->dim_step,
                            .dtype = conversion->base->dtype};
    enum status status = tensor_load(conversion, source->tensor, &gather.data, fault);
    if (status)
        return status;
    return adapter__store_put(conversion->writer, &side, gather_rows, &gather, out, fault);
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
    conversion->loaded_count = 0;
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
    conversion->loaded_count = 0;
    return status;
}

static enum status config_load(const char *directory, struct peft_config *out, struct fault *fault)
{
    char *text = NULL;
    size_t bytes = 0;
    enum status status =
        reader_slurp_in(directory, SOURCE_CONFIG, CONFIG_BYTES_MAX, &text, &bytes, fault);
    if (!status)
        status = peft__config_parse(text, bytes, out, fault);
    free(text);
    return status;
}

// embed_tokens and lm_head.
static enum status model_put(struct conversion *conversion, struct fault *fault)
{
    struct lora_slice a;
    enum status status = STATUS_OK;
    for (int m = LORA_EMBED; m <= LORA_HEAD && !status; m++) {
        status = pair_put(conversion, conversion->base->layers, (enum lora_module)m, 0, &a, fault);
        conversion->loaded_count = 0;
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
    if (!status)
        status = source__digest(&conversion->source, conversion->directory, &report->source, fault);
    if (status) {
        adapter__store_abandon(conversion->writer);
        return status;
    }
    report->matrices_applied = conversion->plan.applied;
    report->matrices_possible = adapter__matrices_possible(conversion->base);
    memcpy(report->layout, conversion->plan.layout, sizeof report->layout);
    return adapter__store_finish(conversion->writer, report, fault);
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
    struct conversion conversion = {.base = base, .report = report, .directory = directory};
    CHECK(is_power_of_two(page_bytes) && page_bytes >= 4096);
    *report = (struct adapter_report){.version = version};
    enum status status = config_load(directory, &config, fault);
    if (!status)
        status = source__open(directory, &conversion.source, fault);
    if (!status)
        status = peft__plan(conversion.source.container, base, &config, &conversion.plan, fault);
    memcpy(report->ignored, config.ignored, sizeof report->ignored);
    if (!status)
        status = store_write(&conversion, page_bytes, store_path, fault);
    loaded_free(&conversion);
    peft__plan_clear(&conversion.plan);
    source__close(&conversion.source);
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
