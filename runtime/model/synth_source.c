// SPDX-License-Identifier: Apache-2.0
// Random models in memory only ("synth:..."). Owns two readers that make up what is read.
//
//   checkpoint   a safetensors header in memory, then the static tensors in its order
//   store        what a store file would hold from its first record on
//
// Numbers come from blocks: BLOCK_BYTES of random numbers of one standard deviation, made once.
// Each tensor (each half of an expert's record) is a window on its block that begins at a hash of
// (seed, index) and goes round, so a read is a copy, any part of a tensor can be read on its own,
// and no two experts are equal. In the store the window is read in the order of the tiles; the
// padding of tiles holds numbers too, which meet activations padded with zeros.
//
// Popularity of experts. With router_skew = S > 0 column 0 is a common direction: every embedding
// has PIN there, large against the rest of its row and against all that layers add, so that behind
// the norm it is about PIN_SHARE * sqrt(hidden) for every token. A router row has its expert's bias
// over that number, biases falling as -GUMBEL * S * ln(rank), ranks dealt anew in each layer.
// Router logits have a standard deviation near 1, so the chosen expert follows about rank^-S, as
// softmax of biases over Gumbel noise of that deviation (scale sqrt(6) / pi) would.
#include <errno.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "base/arith.h"
#include "base/check.h"
#include "base/reader.h"
#include "base/rng.h"
#include "runtime/model/checkpoint.h"
#include "runtime/model/synth.h"
#include "runtime/model/synth_list.h"

enum { BLOCK_BYTES = 8 << 20, BLOCKS_MAX = 8, OVERRIDES_MAX = 32, NAME_MAX_BYTES = 1024 };

static const char PREFIX[] = "synth:";
static const double GUMBEL = 0.78, PIN = 2.0; // an embedding row has the norm 4 without PIN
static const double PIN_SHARE = 0.447;        // 2 / sqrt(4 * 4 + 2 * 2)

struct synth_source {
    struct synth_shape shape;
    struct model_config config; // is_moe is the source's own
    char text[SYNTH_CONFIG_BYTES];
    uint64_t seed;
    double skew;
};

struct block {
    float sd;
    uint8_t *bytes;
};

// A tensor of the checkpoint, in the order of the file.
struct span {
    uint64_t begin, bytes, cols; // begin: offset in the file
    const uint8_t *block;
    uint64_t window;  // where in the block it begins
    uint16_t pin;     // of every row's column 0, when pinned
    uint16_t *biases; // or each row's own; NULL: pin
    bool pinned;
};

struct made {
    struct reader reader;
    struct block blocks[BLOCKS_MAX];
    uint32_t block_count;
    // checkpoint
    char *header;
    uint64_t header_bytes;
    struct span *spans;
    size_t span_count;
    // store
    const uint8_t *parts[2]; // blocks of gate and up, of down
    uint64_t seed, page_bytes, record_bytes, down_begin, down_end;
};

// ---- blocks and windows ----

static void made_close(struct reader *reader)
{
    struct made *made = (struct made *)reader;
    for (uint32_t i = 0; i < made->block_count; i++)
        free(made->blocks[i].bytes);
    for (size_t i = 0; i < made->span_count; i++)
        free(made->spans[i].biases);
    free(made->spans);
    free(made->header);
    free(made);
}

// The block of a standard deviation, made when there is none yet; NULL: out of memory.
static const uint8_t *block_of(struct made *made, float sd, enum dtype dtype)
{
    for (uint32_t i = 0; i < made->block_count; i++)
        if (memcmp(&made->blocks[i].sd, &sd, sizeof sd) == 0)
            return made->blocks[i].bytes;
    CHECK(made->block_count < BLOCKS_MAX);
    size_t count = BLOCK_BYTES / dtype_bytes(dtype);
    uint16_t *numbers = malloc(BLOCK_BYTES);
    if (!numbers)
        return NULL;
    synth__fill(sd, rng_at(made->seed, 2, made->block_count), 0, numbers, count);
    for (size_t i = count; dtype == DTYPE_F32 && i-- > 0;) { // from the end: in place
        float wide = bf16_to_f32(numbers[i]);
        memcpy((uint8_t *)numbers + 4 * i, &wide, sizeof wide);
    }
    made->blocks[made->block_count++] = (struct block){sd, (uint8_t *)numbers};
    return (const uint8_t *)numbers;
}

// Bytes [at, at + bytes) of the endless repetition of a block.
static void copy_round(const uint8_t *block, uint64_t at, uint8_t *out, size_t bytes)
{
    for (at %= BLOCK_BYTES; bytes; at = 0) {
        size_t n = min_size(bytes, (size_t)(BLOCK_BYTES - at));
        memcpy(out, block + at, n);
        out += n;
        bytes -= n;
    }
}

static uint64_t window(uint64_t seed, uint64_t stream, uint64_t index)
{
    return rng_at(seed, stream, index) % (BLOCK_BYTES / 64) * 64;
}

// ---- the checkpoint ----

// Column 0 of the rows that begin in bytes [from, to) of a tensor.
static void pin_rows(const struct span *span, uint64_t from, uint64_t to, uint8_t *out)
{
    uint64_t row_bytes = 2 * span->cols;
    for (uint64_t row = div_up(from, row_bytes); row * row_bytes + 2 <= to; row++) {
        uint16_t value = span->biases ? span->biases[row] : span->pin;
        memcpy(out + (row * row_bytes - from), &value, sizeof value);
    }
}

static enum status checkpoint_read_at(struct reader *reader, uint64_t offset, void *out,
                                      size_t bytes)
{
    const struct made *made = (const struct made *)reader;
    uint8_t *to = out;
    uint64_t end = offset + bytes;
    if (offset < made->header_bytes)
        memcpy(to, made->header + offset, min_size(bytes, (size_t)(made->header_bytes - offset)));
    size_t low = 0, high = made->span_count; // the first span that ends behind offset
    while (low < high) {
        size_t middle = (low + high) / 2;
        if (made->spans[middle].begin + made->spans[middle].bytes <= offset)
            low = middle + 1;
        else
            high = middle;
    }
    for (; low < made->span_count && made->spans[low].begin < end; low++) {
        const struct span *span = &made->spans[low];
        uint64_t from = offset > span->begin ? offset - span->begin : 0;
        uint64_t stop = min_size((size_t)(end - span->begin), (size_t)span->bytes);
        uint8_t *at = to + (span->begin + from - offset);
        copy_round(span->block, span->window + from, at, (size_t)(stop - from));
        if (span->pinned)
            pin_rows(span, from, stop, at);
    }
    return STATUS_OK;
}

// Each expert's bias, its rank dealt by a shuffle (Fisher, Yates).
static uint16_t *make_biases(const struct synth_source *source, uint64_t index, uint64_t experts)
{
    uint16_t *biases = malloc(experts * sizeof *biases);
    struct rng rng = {.seed = rng_at(source->seed, 3, index)};
    double direction = PIN_SHARE * sqrt((double)source->shape.hidden);
    for (uint64_t e = 0; biases && e < experts; e++) {
        double bias = -GUMBEL * source->skew * log((double)(e + 1));
        uint64_t other = rng_below(&rng, e + 1);
        biases[e] = biases[other];
        biases[other] = bf16_from_f32((float)(bias / direction));
    }
    return biases;
}

static bool is_router(const char *name)
{
    static const char suffix[] = ".mlp.gate.weight";
    size_t length = strlen(name), tail = sizeof suffix - 1;
    return length > tail && !strcmp(name + length - tail, suffix);
}

static bool make_span(struct made *made, const struct synth_source *source,
                      const struct synth_entry *entry, uint64_t begin, struct span *span)
{
    size_t index = made->span_count;
    *span = (struct span){.begin = begin,
                          .bytes = 2 * synth__elements(entry),
                          .cols = entry->cols,
                          .block = block_of(made, entry->sd, DTYPE_BF16),
                          .window = window(source->seed, 1, index)};
    made->span_count++;
    if (source->skew > 0 && is_router(entry->name)) {
        span->biases = make_biases(source, index, entry->rows);
        span->pinned = true;
        return span->block && span->biases;
    }
    if (source->skew > 0 && !strcmp(entry->name, "model.embed_tokens.weight")) {
        span->pin = bf16_from_f32((float)PIN);
        span->pinned = true;
    }
    return span->block != NULL;
}

// The length (8 bytes), the JSON, blanks up to a multiple of 64.
static bool make_header(struct made *made, const struct synth_list *list)
{
    char *text = NULL;
    size_t bytes = 0;
    FILE *file = open_memstream(&text, &bytes);
    if (!file)
        return false;
    synth__print_header(list, 0, file);
    bool ok = fclose(file) == 0;
    uint64_t padded = round_up(8 + bytes, 64) - 8;
    made->header_bytes = 8 + padded;
    made->header = ok ? malloc((size_t)made->header_bytes) : NULL;
    if (made->header) {
        memset(made->header, ' ', (size_t)made->header_bytes);
        memcpy(made->header, &padded, sizeof padded);
        memcpy(made->header + 8, text, bytes);
    }
    free(text);
    return made->header != NULL;
}

enum status synth_checkpoint(const struct synth_source *source, struct checkpoint **out,
                             struct fault *fault)
{
    struct synth_list list = {.shape = source->shape};
    struct made *made = calloc(1, sizeof *made);
    enum status status = synth__list(&list, &source->config, false, fault);
    for (size_t i = 0; i < list.count; i++)
        list.entries[i].shard = 0; // all in one file
    bool ok = !status && made && make_header(made, &list);
    if (ok)
        ok = (made->spans = calloc(list.count, sizeof *made->spans)) != NULL;
    if (made)
        made->seed = source->seed;
    uint64_t at = ok ? made->header_bytes : 0;
    for (size_t i = 0; ok && i < list.count; at += made->spans[i].bytes, i++)
        ok = make_span(made, source, &list.entries[i], at, &made->spans[i]);
    free(list.entries);
    if (!ok) {
        if (made)
            made_close(&made->reader);
        return fault_set(fault, STATUS_NO_MEMORY, "out of memory for a random model.");
    }
    made->reader = (struct reader){.read_at = checkpoint_read_at, .close = made_close, .size = at};
    return checkpoint_open_reader(&made->reader, out, fault);
}

// ---- the store ----

static enum status store_read_at(struct reader *reader, uint64_t offset, void *out, size_t bytes)
{
    const struct made *made = (const struct made *)reader;
    uint8_t *to = out;
    for (size_t n; bytes; offset += n, to += n, bytes -= n) {
        if (offset < made->page_bytes) { // the header's page
            n = min_size(bytes, (size_t)(made->page_bytes - offset));
            memset(to, 0, n);
            continue;
        }
        uint64_t record = (offset - made->page_bytes) / made->record_bytes;
        uint64_t in = (offset - made->page_bytes) % made->record_bytes;
        bool down = in >= made->down_begin;
        if (in >= made->down_end) {
            n = min_size(bytes, (size_t)(made->record_bytes - in));
            memset(to, 0, n);
            continue;
        }
        uint64_t stop = down ? made->down_end : made->down_begin;
        n = min_size(bytes, (size_t)(stop - in));
        copy_round(made->parts[down],
                   window(made->seed, 4, 2 * record + down) + (down ? in - made->down_begin : in),
                   to, n);
    }
    return STATUS_OK;
}

enum status synth_store(const struct synth_source *source, const struct expert_shape *shape,
                        struct reader **out, struct fault *fault)
{
    struct made *made = calloc(1, sizeof *made);
    float in = (float)synth__sd_in(&source->shape);
    float down = (float)synth__sd_out(&source->shape, shape->intermediate);
    if (made) {
        made->seed = source->seed;
        made->parts[0] = block_of(made, in, shape->dtype);
        made->parts[1] = block_of(made, down, shape->dtype);
    }
    if (!made || !made->parts[0] || !made->parts[1]) {
        if (made)
            made_close(&made->reader);
        return fault_set(fault, STATUS_NO_MEMORY, "out of memory for random experts.");
    }
    made->page_bytes = shape->page_bytes;
    made->record_bytes = shape->pages_per_expert * shape->page_bytes;
    made->down_begin = (uint64_t)shape->down_tile * TILE_BYTES;
    made->down_end = made->down_begin +
                     tile_count(shape->dtype, shape->hidden, shape->intermediate) * TILE_BYTES;
    made->reader = (struct reader){.read_at = store_read_at,
                                   .close = made_close,
                                   .size = shape->page_bytes +
                                           made->record_bytes * shape->layers * shape->experts};
    *out = &made->reader;
    return STATUS_OK;
}

// ---- names ----

bool synth_is_name(const char *model)
{
    return model && !strncmp(model, PREFIX, sizeof PREFIX - 1);
}

// seed and router_skew; false: another key.
static bool own_key(struct synth_source *source, const char *text, bool *valid)
{
    char *end = NULL;
    if (!strncmp(text, "seed=", 5)) {
        source->seed = strtoull(text + 5, &end, 10);
        *valid = end != text + 5 && !*end;
        return true;
    }
    if (!strncmp(text, "router_skew=", 12)) {
        source->skew = strtod(text + 12, &end);
        *valid = end != text + 12 && !*end && source->skew >= 0 && source->skew <= 8;
        return true;
    }
    return false;
}

static enum status parse_name(struct synth_source *source, const char *name, struct fault *fault)
{
    char copy[NAME_MAX_BYTES], *rest = copy;
    const char *overrides[OVERRIDES_MAX];
    size_t count = 0;
    if (snprintf(copy, sizeof copy, "%s", name + sizeof PREFIX - 1) >= (int)sizeof copy)
        return fault_set(fault, STATUS_INVALID, "the name of the random model is too long.");
    const char *shape = strsep(&rest, ",");
    for (char *part; (part = strsep(&rest, ","));) {
        bool valid = true;
        if (own_key(source, part, &valid)) {
            if (!valid)
                return fault_set(fault, STATUS_INVALID, "\"%.60s\" has no such value.", part);
            continue;
        }
        if (count == OVERRIDES_MAX)
            return fault_set(fault, STATUS_INVALID, "the random model has too many keys.");
        overrides[count++] = part;
    }
    return synth__shape(shape, overrides, count, &source->shape, fault);
}

enum status synth_open(const char *name, struct synth_source **out, struct model_config *config,
                       struct fault *fault)
{
    struct synth_source *source = calloc(1, sizeof *source);
    if (!source)
        return fault_set(fault, STATUS_NO_MEMORY, "out of memory for a random model.");
    source->seed = 1;
    enum status status = parse_name(source, name, fault);
    if (!status)
        status = synth__config(&source->shape, source->text, &source->config, fault);
    if (!status)
        status = model_config_parse(source->text, strlen(source->text), config, fault);
    if (status) {
        synth_close(source);
        return status;
    }
    *out = source;
    return STATUS_OK;
}

void synth_close(struct synth_source *source)
{
    if (!source)
        return;
    model_config_clear(&source->config);
    free(source);
}

struct digest synth_digest(const struct synth_source *source)
{
    static const char domain[] = "polder synth 1";
    struct hash_stream stream;
    hash_begin(&stream, NULL);
    hash_update(&stream, domain, sizeof domain);
    hash_update(&stream, source->text, strlen(source->text));
    hash_update(&stream, &source->seed, sizeof source->seed);
    hash_update(&stream, &source->skew, sizeof source->skew);
    return hash_end(&stream);
}
