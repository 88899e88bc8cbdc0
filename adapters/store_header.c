// SPDX-License-Identifier: Apache-2.0
// The header of an adapter store file: encoding, decoding, and every check made before a slice is
// believed.
//
//   0    "polderLA", u32 version, u32 dtype, u64 header_bytes, u64 page_bytes, u32 pages, records
//   40   base digest
//   72   u32 layers, hidden, heads, kv_heads, head_dim, intermediate, experts, moe_intermediate,
//        vocab
//   108  u32 matrices_applied, matrices_possible, rank_min, rank_max; 128 u64 bytes
//   136  layout[64], ignored[512]
//   712  content digest, pages digest, seal (BLAKE2b of the whole header with the seal zero)
//   808  u32 version of the name, 0 as good as 1; 816 digest of what it was made from
//   848  records of 48 bytes: u32 layer, module, expert, scale (float bits), slice A, slice B;
//        a slice is u32 first_slot, first_byte, row_bytes, rank
//   ...  zeros up to header_bytes, a multiple of page_bytes; then `pages` pages; then the list of
//        the digests of their blocks (store_reader.c); nothing after it
//
// All little-endian. Records ascend strictly: first the trunk, which is what no expert owns, by
// (layer, module), then the experts' by (layer, expert, module). So the pages that every row of a
// step needs come first and what a (layer, expert) needs stands together behind them. Slices stand
// in the order of their records; a page may hold the end of one part and the beginning of the next.
// embed_tokens and lm_head are the trunk's last, as a layer of their own.
//
// Invariants of a store that adapter__store_open accepted: 1. the base digest and shapes are those
// of the given base. 2. every slice lies inside the pages, its rows have the length the base's
// shape asks for, and no row straddles a page. 3. rank is 1..512, the same for A and B. 4. every
// scale is finite. 5. the file is as long as it says, and the seal fits. Opening thousands of
// adapters must not read all pages: their content is compared as they are read.
#include "adapters/store.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "base/arith.h"
#include "base/check.h"

enum {
    STORE_VERSION = 5,
    AT_DTYPE = 12,
    AT_HEADER_BYTES = 16,
    AT_PAGE_BYTES = 24,
    AT_PAGES = 32,
    AT_RECORDS = 36,
    AT_BASE = 40,
    AT_SHAPE = 72,
    AT_COUNTS = 108,
    AT_BYTES = 128,
    AT_LAYOUT = 136,
    AT_IGNORED = 200,
    AT_CONTENT = 712,
    AT_PAGES_DIGEST = 744,
    AT_SEAL = 776,
    AT_VERSION = 808,
    AT_SOURCE = 816,
    FIXED_BYTES = 848,
    RECORD_BYTES = 48,
    SHAPE_FIELDS = 9,
    PAGE_BYTES_MIN = 4096,
    PAGE_BYTES_MAX = 2 << 20
};

_Static_assert(AT_IGNORED - AT_LAYOUT == sizeof(((struct adapter_report *)0)->layout), "layout");
_Static_assert(AT_CONTENT - AT_IGNORED == sizeof(((struct adapter_report *)0)->ignored), "ignored");

static const uint8_t magic[8] = {'p', 'o', 'l', 'd', 'e', 'r', 'L', 'A'};

static void put_u32(uint8_t *at, uint32_t value)
{
    for (int i = 0; i < 4; i++)
        at[i] = (uint8_t)(value >> (8 * i));
}

static uint32_t get_u32(const uint8_t *at)
{
    return (uint32_t)at[0] | (uint32_t)at[1] << 8 | (uint32_t)at[2] << 16 | (uint32_t)at[3] << 24;
}

static void put_u64(uint8_t *at, uint64_t value)
{
    put_u32(at, (uint32_t)value);
    put_u32(at + 4, (uint32_t)(value >> 32));
}

static uint64_t get_u64(const uint8_t *at)
{
    return get_u32(at) | (uint64_t)get_u32(at + 4) << 32;
}

bool adapter__module_dims(const struct adapter_base *base, uint32_t layer, enum lora_module module,
                          uint32_t *d_in, uint32_t *d_out)
{
    uint32_t q = base->heads * base->head_dim, kv = base->kv_heads * base->head_dim;
    bool is_moe = layer < base->layers && base->is_moe[layer];
    uint32_t inner = is_moe ? base->moe_intermediate : base->intermediate;
    const uint32_t dims[LORA_MODULES_ALL][2] = {
        [LORA_Q] = {base->hidden, q},
        [LORA_K] = {base->hidden, kv},
        [LORA_V] = {base->hidden, kv},
        [LORA_O] = {q, base->hidden},
        [LORA_GATE] = {base->hidden, inner},
        [LORA_UP] = {base->hidden, inner},
        [LORA_DOWN] = {inner, base->hidden},
        [LORA_EMBED] = {base->vocab, base->hidden},
        [LORA_HEAD] = {base->hidden, base->vocab},
    };
    *d_in = dims[module][0];
    *d_out = dims[module][1];
    return *d_in && *d_out;
}

// Is it a matrix of each expert?
static bool is_expert(const struct adapter_base *base, uint32_t layer, enum lora_module module)
{
    return module >= LORA_GATE && module < LORA_MODULES && base->is_moe[layer];
}

uint32_t adapter__module_count(const struct adapter_base *base, uint32_t layer,
                               enum lora_module module)
{
    return is_expert(base, layer, module) ? base->experts : 1;
}

uint32_t adapter__matrices_possible(const struct adapter_base *base)
{
    uint32_t total = 0;
    for (uint32_t layer = 0; layer < base->layers; layer++)
        total += 4 + 3 * adapter__module_count(base, layer, LORA_GATE);
    return total + (base->vocab ? LORA_MODULES_ALL - LORA_MODULES : 0);
}

struct adapter_side adapter__side(const struct adapter_base *base, enum lora_module module,
                                  bool is_b, uint32_t rank, uint32_t dim)
{
    size_t element = dtype_bytes(base->dtype);
    size_t row_bytes = round_up(dim * element, ADAPTER_ROW_ALIGN);
    struct adapter_side side = {
        .rank = rank, .dim = dim, .rows = rank, .row_bytes = (uint32_t)row_bytes, .columns = dim};
    if (module == LORA_EMBED && !is_b) {
        side.by_token = true;
        side.rows = dim;
        side.row_bytes = (uint32_t)round_up(rank * element, ADAPTER_TOKEN_ALIGN);
    } else if (module == LORA_HEAD && is_b && row_bytes > ADAPTER_CUT_BYTES) {
        side.columns = (uint32_t)(ADAPTER_CUT_BYTES / element);
        side.rows = rank * (uint32_t)div_up(dim, side.columns);
        side.row_bytes = ADAPTER_CUT_BYTES;
    }
    return side;
}

size_t adapter__header_bytes(uint32_t records, size_t page_bytes)
{
    return round_up(FIXED_BYTES + (size_t)records * RECORD_BYTES, page_bytes);
}

static void shape_encode(const struct adapter_base *base, uint8_t *out)
{
    const uint32_t shape[SHAPE_FIELDS] = {
        base->layers,   base->hidden,           base->heads,
        base->kv_heads, base->head_dim,         base->intermediate,
        base->experts,  base->moe_intermediate, base->vocab};
    for (int i = 0; i < SHAPE_FIELDS; i++)
        put_u32(out + 4 * i, shape[i]);
}

static void slice_encode(const struct lora_slice *slice, uint8_t *out)
{
    put_u32(out, slice->first_slot);
    put_u32(out + 4, slice->first_byte);
    put_u32(out + 8, slice->row_bytes);
    put_u32(out + 12, slice->rank);
}

static struct lora_slice slice_decode(const uint8_t *at)
{
    return (struct lora_slice){.first_slot = get_u32(at),
                               .first_byte = get_u32(at + 4),
                               .row_bytes = get_u32(at + 8),
                               .rank = get_u32(at + 12)};
}

static void record_encode(const struct adapter_record *record, uint8_t *out)
{
    uint32_t scale;
    memcpy(&scale, &record->pair.scale, sizeof scale);
    put_u32(out, record->layer);
    put_u32(out + 4, record->module);
    put_u32(out + 8, record->expert);
    put_u32(out + 12, scale);
    slice_encode(&record->pair.a, out + 16);
    slice_encode(&record->pair.b, out + 32);
}

static struct adapter_record record_decode(const uint8_t *at)
{
    struct adapter_record record = {
        .layer = get_u32(at), .module = get_u32(at + 4), .expert = get_u32(at + 8)};
    uint32_t scale = get_u32(at + 12);
    memcpy(&record.pair.scale, &scale, sizeof scale);
    record.pair.a = slice_decode(at + 16);
    record.pair.b = slice_decode(at + 32);
    return record;
}

struct digest adapter__content_digest(const struct adapter_base *base,
                                      const struct adapter_record *records, uint32_t count,
                                      const struct digest *pages)
{
    struct hash_stream stream;
    uint8_t bytes[RECORD_BYTES];
    hash_begin(&stream, NULL);
    hash_update(&stream, magic, sizeof magic);
    shape_encode(base, bytes);
    put_u32(bytes + 4 * SHAPE_FIELDS, base->dtype);
    hash_update(&stream, bytes, 4 * SHAPE_FIELDS + 4);
    for (uint32_t i = 0; i < count; i++) {
        record_encode(&records[i], bytes);
        hash_update(&stream, bytes, RECORD_BYTES);
    }
    hash_update(&stream, pages->bytes, DIGEST_BYTES);
    return hash_end(&stream);
}

void adapter__header_encode(const struct adapter_header *header, const struct adapter_base *base,
                            const struct adapter_record *records, uint8_t *out)
{
    const struct adapter_report *report = &header->report;
    memcpy(out, magic, sizeof magic);
    put_u32(out + 8, STORE_VERSION);
    put_u32(out + AT_DTYPE, base->dtype);
    put_u64(out + AT_HEADER_BYTES, header->header_bytes);
    put_u64(out + AT_PAGE_BYTES, header->page_bytes);
    put_u32(out + AT_PAGES, header->pages);
    put_u32(out + AT_RECORDS, header->records);
    memcpy(out + AT_BASE, header->base.bytes, DIGEST_BYTES);
    shape_encode(base, out + AT_SHAPE);
    put_u32(out + AT_COUNTS, report->matrices_applied);
    put_u32(out + AT_COUNTS + 4, report->matrices_possible);
    put_u32(out + AT_COUNTS + 8, report->rank_min);
    put_u32(out + AT_COUNTS + 12, report->rank_max);
    put_u64(out + AT_BYTES, report->bytes);
    memcpy(out + AT_LAYOUT, report->layout, sizeof report->layout);
    memcpy(out + AT_IGNORED, report->ignored, sizeof report->ignored);
    memcpy(out + AT_CONTENT, report->digest.bytes, DIGEST_BYTES);
    memcpy(out + AT_PAGES_DIGEST, header->pages_digest.bytes, DIGEST_BYTES);
    put_u32(out + AT_VERSION, report->version);
    memcpy(out + AT_SOURCE, report->source.bytes, DIGEST_BYTES);
    for (uint32_t i = 0; i < header->records; i++)
        record_encode(&records[i], out + FIXED_BYTES + (size_t)i * RECORD_BYTES);
    struct digest seal = hash_bytes(NULL, out, header->header_bytes);
    memcpy(out + AT_SEAL, seal.bytes, DIGEST_BYTES);
}

static enum status magic_check(const uint8_t *at, const char *label, struct fault *fault)
{
    if (memcmp(at, magic, sizeof magic) != 0 || get_u32(at + 8) != STORE_VERSION)
        return fault_set(fault, STATUS_CORRUPT,
                         "%s is not an adapter store file of version %d: register the adapter "
                         "again.",
                         label, STORE_VERSION);
    return STATUS_OK;
}

// Is it as long as it says? out->page_bytes is set by the caller.
static enum status lengths_check(const uint8_t *at, uint64_t file_bytes, const char *label,
                                 struct adapter_header *out, struct fault *fault)
{
    out->header_bytes = get_u64(at + AT_HEADER_BYTES);
    out->pages = get_u32(at + AT_PAGES);
    out->records = get_u32(at + AT_RECORDS);
    uint64_t blocks = out->page_bytes / adapter__block_bytes(out->page_bytes);
    uint64_t page_bytes = out->page_bytes + blocks * DIGEST_BYTES;
    uint64_t pages_bytes = out->pages * page_bytes; // below 2^32 * 2^22
    if (!out->records || !out->pages ||
        out->header_bytes != adapter__header_bytes(out->records, out->page_bytes) ||
        out->header_bytes > file_bytes || file_bytes - out->header_bytes != pages_bytes)
        return fault_set(fault, STATUS_CORRUPT, "%s has %llu bytes, which is not what it says.",
                         label, (unsigned long long)file_bytes);
    return STATUS_OK;
}

// The fixed part: is it a store file, is it whole, does it fit this base and this pool?
static enum status fixed_check(const uint8_t *at, uint64_t file_bytes, const char *label,
                               const struct adapter_base *base, size_t page_bytes,
                               struct adapter_header *out, struct fault *fault)
{
    enum status status = magic_check(at, label, fault);
    if (status)
        return status;
    uint64_t page = get_u64(at + AT_PAGE_BYTES);
    if (page != page_bytes)
        return fault_set(fault, STATUS_INVALID,
                         "%s has pages of %llu bytes; the pool has pages of %zu: convert the "
                         "adapter again.",
                         label, (unsigned long long)page, page_bytes);
    out->page_bytes = page_bytes;
    status = lengths_check(at, file_bytes, label, out, fault);
    if (status)
        return status;
    uint8_t shape[4 * SHAPE_FIELDS];
    shape_encode(base, shape);
    if (memcmp(at + AT_BASE, base->digest.bytes, DIGEST_BYTES) != 0 ||
        memcmp(at + AT_SHAPE, shape, sizeof shape) != 0)
        return fault_set(fault, STATUS_DENIED, "%s was made for another base model.", label);
    if (get_u32(at + AT_DTYPE) != (uint32_t)base->dtype)
        return fault_set(fault, STATUS_INVALID,
                         "%s has another element type than the model runs in: convert the adapter "
                         "again.",
                         label);
    if (out->records > adapter__matrices_possible(base))
        return fault_set(fault, STATUS_CORRUPT, "%s lists %u matrices; the base model has %u.",
                         label, out->records, adapter__matrices_possible(base));
    return STATUS_OK;
}

static enum status report_decode(const uint8_t *at, const char *label, struct adapter_report *out,
                                 struct fault *fault)
{
    out->matrices_applied = get_u32(at + AT_COUNTS);
    out->matrices_possible = get_u32(at + AT_COUNTS + 4);
    out->rank_min = get_u32(at + AT_COUNTS + 8);
    out->rank_max = get_u32(at + AT_COUNTS + 12);
    out->bytes = get_u64(at + AT_BYTES);
    memcpy(out->layout, at + AT_LAYOUT, sizeof out->layout);
    memcpy(out->ignored, at + AT_IGNORED, sizeof out->ignored);
    memcpy(out->digest.bytes, at + AT_CONTENT, DIGEST_BYTES);
    memcpy(out->source.bytes, at + AT_SOURCE, DIGEST_BYTES);
    out->version = get_u32(at + AT_VERSION) ? get_u32(at + AT_VERSION) : 1;
    if (out->layout[sizeof out->layout - 1] || out->ignored[sizeof out->ignored - 1])
        return fault_set(fault, STATUS_CORRUPT, "%s has a text without an end.", label);
    return STATUS_OK;
}

// The page behind the last one of a slice.
static uint64_t slice_end(const struct lora_slice *slice, uint32_t rows, size_t page_bytes)
{
    size_t in_first = (page_bytes - slice->first_byte) / slice->row_bytes;
    size_t per_page = page_bytes / slice->row_bytes;
    size_t later = rows > in_first ? div_up(rows - in_first, per_page) : 0;
    return (uint64_t)slice->first_slot + 1 + later;
}

static uint32_t pair_first(const struct lora_pair *pair)
{
    return pair->a.first_slot < pair->b.first_slot ? pair->a.first_slot : pair->b.first_slot;
}

// A matrix of the base: a row of the table.
struct place {
    uint32_t layer;
    enum lora_module module;
};

static struct place place_of(const struct adapter_base *base, size_t row)
{
    struct place at = {.layer = (uint32_t)(row / LORA_MODULES)};
    size_t module = row % LORA_MODULES;
    at.module = (enum lora_module)(at.layer < base->layers ? module : LORA_MODULES + module);
    return at;
}

// Of slices that are inside the pages.
static uint32_t pair_end(const struct adapter_base *base, const struct place *at,
                         const struct lora_pair *pair, size_t page_bytes)
{
    uint32_t d_in = 0, d_out = 0, rank = pair->a.rank;
    (void)adapter__module_dims(base, at->layer, at->module, &d_in, &d_out);
    uint64_t a =
        slice_end(&pair->a, adapter__side(base, at->module, false, rank, d_in).rows, page_bytes);
    uint64_t b =
        slice_end(&pair->b, adapter__side(base, at->module, true, rank, d_out).rows, page_bytes);
    return (uint32_t)(a > b ? a : b);
}

static bool slice_is_inside(const struct lora_slice *slice, const struct adapter_side *side,
                            size_t page_bytes, uint32_t pages)
{
    uint32_t row_bytes = side->row_bytes;
    if (!slice->rank || slice->rank > ADAPTER_RANK_MAX || slice->row_bytes != row_bytes ||
        !row_bytes || row_bytes > page_bytes || slice->first_byte >= page_bytes ||
        slice->first_byte % ADAPTER_ROW_ALIGN)
        return false;
    return slice_end(slice, side->rows, page_bytes) <= pages;
}

static bool record_is_good(const struct adapter_record *record, const struct adapter_base *base,
                           size_t page_bytes, uint32_t pages)
{
    const struct lora_pair *pair = &record->pair;
    uint32_t d_in, d_out, rank = pair->a.rank;
    if (record->layer > base->layers || record->module >= LORA_MODULES_ALL ||
        (record->layer == base->layers) != (record->module >= LORA_MODULES))
        return false;
    enum lora_module module = (enum lora_module)record->module;
    if (!adapter__module_dims(base, record->layer, module, &d_in, &d_out) ||
        record->expert >= adapter__module_count(base, record->layer, module) ||
        !isfinite(pair->scale) || pair->b.rank != rank || rank > ADAPTER_RANK_MAX)
        return false;
    struct adapter_side a = adapter__side(base, module, false, rank, d_in);
    struct adapter_side b = adapter__side(base, module, true, rank, d_out);
    return slice_is_inside(&pair->a, &a, page_bytes, pages) &&
           slice_is_inside(&pair->b, &b, page_bytes, pages);
}

// Places of records in the file, ascending.
static uint64_t record_order(const struct adapter_base *base, const struct adapter_record *record)
{
    bool of_expert = is_expert(base, record->layer, (enum lora_module)record->module);
    return (uint64_t)of_expert << 63 | (uint64_t)record->layer << 40 |
           (uint64_t)record->expert << 8 | record->module;
}

// Takes the pages [first, end) of a pair into a part that has some already, or none.
static void part_add(struct lora_part *part, uint32_t first, uint32_t end)
{
    uint32_t part_end = part->first + part->count;
    if (!part->count || first < part->first)
        part->first = first;
    part->count = (part_end > end ? part_end : end) - part->first;
}

// The pages of the trunk, and for every (layer, expert) those of its slices behind the trunk.
static enum status parts_find(const struct adapter_base *base, struct adapter_store *store)
{
    size_t rows = lora_pair_rows(base->layers), experts = store->experts;
    store->trunk_pages = experts > 1 ? 1 : store->pages; // one: so that it has any
    if (experts == 1)
        return STATUS_OK;
    store->parts = calloc(base->layers * experts, sizeof *store->parts);
    if (!store->parts)
        return STATUS_NO_MEMORY;
    for (size_t i = 0; i < rows * experts; i++) {
        const struct lora_pair *pair = &store->pairs[i];
        struct place at = place_of(base, i / experts);
        if (!pair->a.rank || is_expert(base, at.layer, at.module))
            continue;
        uint32_t end = pair_end(base, &at, pair, store->page_bytes);
        store->trunk_pages = end > store->trunk_pages ? end : store->trunk_pages;
    }
    for (size_t i = 0; i < rows * experts; i++) {
        const struct lora_pair *pair = &store->pairs[i];
        struct place at = place_of(base, i / experts);
        if (!pair->a.rank || !is_expert(base, at.layer, at.module))
            continue;
        uint32_t first = pair_first(pair), end = pair_end(base, &at, pair, store->page_bytes);
        struct lora_part *part = &store->parts[at.layer * experts + i % experts];
        if (end > store->trunk_pages)
            part_add(part, first > store->trunk_pages ? first : store->trunk_pages, end);
        if (part->count > store->part_pages_max)
            store->part_pages_max = part->count;
    }
    return STATUS_OK;
}

// Checks every record and spreads them over the dense table.
static enum status table_decode(const uint8_t *at, const struct adapter_header *header,
                                const char *label, const struct adapter_base *base,
                                struct adapter_store *out, struct fault *fault)
{
    uint32_t rank_min = ADAPTER_RANK_MAX, rank_max = 0;
    uint64_t before = 0;
    out->experts = 1;
    for (uint32_t i = 0; i < header->records; i++) {
        struct adapter_record record = record_decode(at + (size_t)i * RECORD_BYTES);
        if (!record_is_good(&record, base, header->page_bytes, header->pages) ||
            (i && record_order(base, &record) <= before))
            return fault_set(fault, STATUS_CORRUPT, "%s: record %u of %u is wrong.", label, i,
                             header->records);
        before = record_order(base, &record);
        if (is_expert(base, record.layer, (enum lora_module)record.module))
            out->experts = base->experts;
        out->modules |= 1u << record.module;
        rank_min = record.pair.a.rank < rank_min ? record.pair.a.rank : rank_min;
        rank_max = record.pair.a.rank > rank_max ? record.pair.a.rank : rank_max;
    }
    const struct adapter_report *report = &out->report;
    if (report->rank_min != rank_min || report->rank_max != rank_max ||
        report->matrices_applied != header->records ||
        report->matrices_possible != adapter__matrices_possible(base) ||
        report->bytes != (uint64_t)header->pages * header->page_bytes)
        return fault_set(fault, STATUS_CORRUPT, "%s: its summary does not fit its table.", label);
    out->pairs = calloc(lora_pair_rows(base->layers) * out->experts, sizeof *out->pairs);
    if (!out->pairs)
        return fault_set(fault, STATUS_NO_MEMORY, "out of memory for the table of %s.", label);
    for (uint32_t i = 0; i < header->records; i++) {
        struct adapter_record record = record_decode(at + (size_t)i * RECORD_BYTES);
        size_t row = lora_pair_row(record.layer, (enum lora_module)record.module);
        out->pairs[row * out->experts + record.expert] = record.pair;
    }
    return parts_find(base, out)
               ? fault_set(fault, STATUS_NO_MEMORY, "out of memory for the table of %s.", label)
               : STATUS_OK;
}

static enum status fixed_read(struct reader *reader, const char *label, uint8_t out[FIXED_BYTES],
                              struct fault *fault)
{
    if (reader->size < FIXED_BYTES)
        return fault_set(fault, STATUS_CORRUPT, "%s is too short for an adapter store file.",
                         label);
    enum status status = reader_read(reader, 0, out, FIXED_BYTES);
    return status ? fault_set(fault, status, "reading %s failed.", label) : STATUS_OK;
}

// The whole header, its seal checked and then zeroed. The caller frees *out.
static enum status header_read(struct reader *reader, const char *label, size_t bytes,
                               uint8_t **out, struct fault *fault)
{
    struct digest wanted;
    uint8_t *whole = malloc(bytes);
    if (!whole)
        return fault_set(fault, STATUS_NO_MEMORY, "out of memory for the header of %s.", label);
    enum status status = reader_read(reader, 0, whole, bytes);
    if (status) {
        free(whole);
        return fault_set(fault, status, "reading %s failed.", label);
    }
    memcpy(wanted.bytes, whole + AT_SEAL, DIGEST_BYTES);
    memset(whole + AT_SEAL, 0, DIGEST_BYTES);
    struct digest seal = hash_bytes(NULL, whole, bytes);
    if (memcmp(seal.bytes, wanted.bytes, DIGEST_BYTES) != 0) {
        free(whole);
        return fault_set(fault, STATUS_CORRUPT, "the header of %s is damaged.", label);
    }
    *out = whole;
    return STATUS_OK;
}

enum status adapter__store_open(struct reader *reader, const char *label,
                                const struct adapter_base *base, size_t page_bytes,
                                struct adapter_store *out, struct fault *fault)
{
    uint8_t fixed[FIXED_BYTES], *whole = NULL;
    struct adapter_header header = {.records = 0};
    *out = (struct adapter_store){.page_bytes = page_bytes};
    enum status status = fixed_read(reader, label, fixed, fault);
    if (!status)
        status = fixed_check(fixed, reader->size, label, base, page_bytes, &header, fault);
    if (!status)
        status = header_read(reader, label, header.header_bytes, &whole, fault);
    if (status)
        return status;
    out->header_bytes = header.header_bytes;
    out->pages = header.pages;
    memcpy(out->pages_digest.bytes, whole + AT_PAGES_DIGEST, DIGEST_BYTES);
    status = report_decode(whole, label, &out->report, fault);
    if (!status)
        status = table_decode(whole + FIXED_BYTES, &header, label, base, out, fault);
    free(whole);
    return status;
}

enum status adapter__store_peek(struct reader *reader, const char *label, struct adapter_store *out,
                                struct adapter_summary *summary, struct fault *fault)
{
    uint8_t fixed[FIXED_BYTES], *whole = NULL;
    *out = (struct adapter_store){.pages = 0};
    *summary = (struct adapter_summary){.file_bytes = reader->size};
    enum status status = fixed_read(reader, label, fixed, fault);
    if (!status)
        status = magic_check(fixed, label, fault);
    if (status)
        return status;
    uint64_t page = get_u64(fixed + AT_PAGE_BYTES);
    uint32_t dtype = get_u32(fixed + AT_DTYPE);
    if (page < PAGE_BYTES_MIN || page > PAGE_BYTES_MAX || !is_power_of_two((size_t)page) ||
        (dtype != DTYPE_BF16 && dtype != DTYPE_F32))
        return fault_set(fault, STATUS_CORRUPT, "the header of %s is damaged.", label);
    struct adapter_header header = {.page_bytes = (size_t)page};
    status = lengths_check(fixed, reader->size, label, &header, fault);
    if (!status)
        status = header_read(reader, label, header.header_bytes, &whole, fault);
    if (!status)
        status = report_decode(whole, label, &summary->report, fault);
    if (!status)
        memcpy(out->pages_digest.bytes, whole + AT_PAGES_DIGEST, DIGEST_BYTES);
    free(whole);
    memcpy(summary->base.bytes, fixed + AT_BASE, DIGEST_BYTES);
    summary->dtype = (enum dtype)dtype;
    summary->page_bytes = out->page_bytes = header.page_bytes;
    out->header_bytes = header.header_bytes;
    out->pages = header.pages;
    return status;
}

void adapter__store_clear(struct adapter_store *store)
{
    free(store->pairs);
    free(store->parts);
    store->pairs = NULL;
    store->parts = NULL;
}
