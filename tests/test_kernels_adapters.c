// SPDX-License-Identifier: Apache-2.0
#include "tests/test_kernels_adapters.h"

enum { PAGES = 4096, SLOTS = 2048, CUT_BYTES = 4096 };

static void page_next(struct adapters *l)
{
    uint32_t at = l->next_page + random_below(PAGES - l->next_page);
    uint32_t page = l->free_pages[at];
    l->free_pages[at] = l->free_pages[l->next_page];
    l->free_pages[l->next_page++] = page;
    CHECK(l->next_page < PAGES && l->slot_count < SLOTS);
    l->slots[l->slot_count++] = page;
    l->page = page;
    l->fill = 0;
}

// Appends a row after what was packed before.
static void row_pack(struct adapters *l, struct lora_slice *s, const float *row, size_t cols,
                     uint32_t slots0)
{
    bool first = !s->row_bytes;
    size_t bytes = cols * dtype_bytes(l->rig->dtype);
    s->row_bytes = first ? (uint32_t)round_up(bytes, l->align) : s->row_bytes;
    CHECK(bytes <= s->row_bytes && s->row_bytes <= l->batch.page_bytes);
    if (first)
        l->fill = (uint32_t)round_up(l->fill, 64);
    if (l->slot_count == slots0 || l->fill + s->row_bytes > l->batch.page_bytes)
        page_next(l);
    if (first) {
        s->first_slot = l->slot_count - 1 - slots0;
        s->first_byte = l->fill;
    }
    uint8_t *to = l->arena + l->page * l->batch.page_bytes + l->fill;
    memset(to, 0, s->row_bytes);
    memcpy(to, rig_narrow(l->rig, row, (uint32_t)cols), bytes);
    rig_release_last(l->rig);
    l->fill += s->row_bytes;
}

// Rows of `cols` columns, in blocks of columns where they are longer than `longest` bytes;
// `slots0`: where the adapter's slots begin.
static struct lora_slice slice_pack(struct adapters *l, const float *rows, uint32_t rank,
                                    uint32_t cols, uint32_t slots0, size_t longest)
{
    struct lora_slice s = {.rank = rank};
    size_t most = longest / dtype_bytes(l->rig->dtype);
    l->align = 64;
    for (size_t first = 0; first < cols; first += most)
        for (uint32_t j = 0; j < rank; j++)
            row_pack(l, &s, rows + j * cols + first, min_size(most, cols - first), slots0);
    return s;
}

// A by token.
static struct lora_slice slice_pack_tokens(struct adapters *l, const float *rows, uint32_t rank,
                                           uint32_t tokens, uint32_t slots0)
{
    struct lora_slice s = {.rank = rank};
    float *row = rig_alloc(l->rig, rank * sizeof *row);
    l->align = 16;
    for (uint32_t t = 0; t < tokens; t++) {
        for (uint32_t j = 0; j < rank; j++)
            row[j] = rows[j * tokens + t];
        row_pack(l, &s, row, rank, slots0);
    }
    rig_release_last(l->rig);
    return s;
}

// Does the test ask for this module, and would it fit?
static bool is_absent(const struct adapters *l, uint32_t layer, uint32_t module, uint32_t expert,
                      uint32_t out)
{
    if (module >= LORA_MODULES)
        return expert != 0;
    bool some = l->layers * l->experts > 2 && random_below(5) == 0;
    return layer != 1 || some || out * dtype_bytes(l->rig->dtype) > l->batch.page_bytes;
}

static void adapter_make(struct adapters *l, uint32_t number, uint32_t rank, uint32_t d_in,
                         uint32_t d_out)
{
    size_t pairs = lora_pair_rows(l->layers) * l->experts;
    uint32_t slots0 = l->slot_count;
    struct lora_pair *pair = rig_alloc(l->rig, pairs * sizeof *pair);
    l->plain[number] = rig_alloc(l->rig, pairs * sizeof *l->plain[number]);
    for (uint32_t i = 0; i < pairs; i++) {
        uint32_t module = i / l->experts % LORA_MODULES, layer = i / l->experts / LORA_MODULES;
        bool down = module == LORA_DOWN && layer < l->layers;
        uint32_t in = down ? d_out : d_in, out = down ? d_in : d_out;
        module += layer == l->layers ? LORA_MODULES : 0;
        bool absent = is_absent(l, layer, module, i % l->experts, in > out ? in : out);
        struct plain_pair *p = &l->plain[number][i];
        p->rank = absent ? 0 : rank > 4 && random_below(3) == 0 ? rank / 2 : rank;
        p->scale = 0.25f + (float)number;
        if (!p->rank)
            continue;
        p->a = rig_weight(l->rig, p->rank, in);
        p->b = rig_weight(l->rig, p->rank, out);
        pair[i].scale = p->scale;
        pair[i].a = module == LORA_EMBED
                        ? slice_pack_tokens(l, p->a, p->rank, in, slots0)
                        : slice_pack(l, p->a, p->rank, in, slots0, l->batch.page_bytes);
        pair[i].b = slice_pack(l, p->b, p->rank, out, slots0,
                               module == LORA_HEAD ? CUT_BYTES : l->batch.page_bytes);
    }
    l->view[number] = (struct lora_adapter_view){
        .pages = l->slots + slots0, .pairs = pair, .experts = l->experts};
}

void adapters_make(struct adapters *l, struct rig *rig, const uint32_t *ranks, uint32_t count,
                   uint32_t layers, uint32_t experts, uint32_t d_in, uint32_t d_out,
                   size_t page_bytes)
{
    memset(l, 0, sizeof *l);
    l->rig = rig;
    l->view = rig_alloc(rig, ADAPTERS_MAX * sizeof *l->view);
    l->row_begin = rig_alloc(rig, SEGMENTS_MAX * sizeof *l->row_begin);
    l->adapter = rig_alloc(rig, SEGMENTS_MAX * sizeof *l->adapter);
    l->count = count;
    l->layers = layers;
    l->experts = experts;
    l->batch.page_bytes = page_bytes;
    l->batch.adapters = l->view;
    l->batch.row_begin = l->row_begin;
    l->batch.adapter = l->adapter;
    l->arena = rig_alloc(rig, PAGES * page_bytes);
    memset(l->arena, 0xff, PAGES * page_bytes);
    l->batch.arena = l->arena;
    l->free_pages = rig_alloc(rig, PAGES * sizeof *l->free_pages);
    l->slots = rig_alloc(rig, SLOTS * sizeof *l->slots);
    for (uint32_t i = 0; i < PAGES; i++)
        l->free_pages[i] = i;
    for (uint32_t i = 0; i < count; i++) {
        adapter_make(l, i, ranks[i], d_in, d_out);
        l->batch.rank_max = ranks[i] > l->batch.rank_max ? ranks[i] : l->batch.rank_max;
    }
}

void adapters_parts(struct adapters *l)
{
    for (uint32_t n = 0; n < l->count; n++) {
        struct lora_part *parts = rig_alloc(l->rig, l->layers * l->experts * sizeof *parts);
        for (uint32_t i = 0; i < l->layers * l->experts; i++)
            for (uint32_t m = LORA_GATE; m <= LORA_DOWN; m++) {
                const struct lora_pair *pair =
                    lora_pair_at(&l->view[n], i / l->experts, (enum lora_module)m, i % l->experts);
                size_t bytes = (size_t)pair->b.rank * pair->b.row_bytes + pair->b.first_byte;
                // Generous: a page more than the last row may need.
                uint32_t end = pair->b.first_slot + 2 + (uint32_t)(bytes / l->batch.page_bytes);
                uint32_t slots = (uint32_t)(l->slots + l->slot_count - l->view[n].pages);
                if (!pair->a.rank)
                    continue;
                if (!parts[i].count || pair->a.first_slot < parts[i].first)
                    parts[i] = (struct lora_part){pair->a.first_slot, 0};
                parts[i].count = (end < slots ? end : slots) - parts[i].first;
            }
        l->view[n].parts = parts;
    }
}

void adapters_batch(struct adapters *l, uint32_t rows)
{
    uint32_t n = 0;
    for (uint32_t row = 0; row < rows; n++) {
        // Some segments are empty: of an adapter without a row that is sampled.
        bool empty = n < 40 && random_below(4) == 0;
        uint32_t length = empty ? 0 : 1 + random_below(rows < 6 ? 2 : rows / 3);
        uint32_t pick = random_below(l->count + 1);
        l->row_begin[n] = row;
        l->adapter[n] = pick == l->count ? 0xffffffff : pick;
        row = row + length < rows ? row + length : rows;
        l->row_begin[n + 1] = l->batch.rows = row;
    }
    l->batch.segments = n;
}

uint32_t adapters_of(const struct adapters *l, uint32_t row)
{
    for (uint32_t i = 0; i < l->batch.segments; i++)
        if (row >= l->row_begin[i] && row < l->row_begin[i + 1])
            return l->adapter[i];
    return 0xffffffff;
}

const struct plain_pair *adapters_pair(const struct adapters *l, uint32_t row, uint32_t layer,
                                       enum lora_module module, uint32_t expert)
{
    uint32_t adapter = adapters_of(l, row);
    if (adapter == 0xffffffff)
        return NULL;
    return &l->plain[adapter]
                    [lora_pair_row(layer, module) * l->experts + (l->experts > 1 ? expert : 0)];
}
