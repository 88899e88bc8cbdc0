// SPDX-License-Identifier: Apache-2.0
// See sim_model.h. Adapters take the whole way: PEFT directory, adapter_convert, store file; so the
// offsets that the kernels see are those of the real converter.
#include "sim_model.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include "base/check.h"
#include "sim_fingerprint.h"

enum { STORE_SEED = 4711, WEIGHT_SEED = 42, ADAPTER_SEED = 99, CELL_WORDS = 8, LAYER_CELLS = 10 };
enum { ALPHA = 16 };

struct variant {
    uint32_t layers, kv_heads, head_dim, block_tokens, experts, top_k, moe_intermediate;
    uint32_t moe_mask;
};

static const struct variant variants[SIM_VARIANTS] = {
    {3, 2, 128, 8, 6, 2, 128, 0x6},
    {4, 2, 128, 16, 8, 3, 64, 0xf},
    {2, 1, 64, 8, 0, 0, 0, 0},
    {5, 4, 128, 8, 5, 1, 192, 0x1b},
};

// ---- the base model ----

static void *cell(struct sim_model *sim, uint32_t number)
{
    uint64_t *at = sim->cells + (size_t)number * CELL_WORDS;
    *at = rng_at(WEIGHT_SEED, sim->variant, number);
    return at;
}

static void fill_config(struct sim_model *sim, const struct variant *v)
{
    struct model_config *c = &sim->model.config;
    *c = (struct model_config){.architecture = "Simulated",
                               .hidden = 64,
                               .layers = v->layers,
                               .heads = 2,
                               .kv_heads = v->kv_heads,
                               .head_dim = v->head_dim,
                               .vocab = SIM_VOCAB,
                               .max_positions = 4096,
                               .intermediate = 96,
                               .experts = v->experts,
                               .top_k = v->top_k,
                               .moe_intermediate = v->moe_intermediate,
                               .normalize_top_k = true,
                               .rms_epsilon = 1e-6f,
                               .rope_theta = 1e6,
                               .eos = {17, 300},
                               .eos_count = 2,
                               .is_moe = sim->is_moe};
    for (uint32_t l = 0; l < v->layers; l++)
        sim->is_moe[l] = v->moe_mask >> l & 1;
    struct fault fault = {.text = ""};
    CHECK(!model_share(c, 0, 1, &sim->model.share, &fault));
}

static void fill_weights(struct sim_model *sim)
{
    struct model *m = &sim->model;
    sim->cells = calloc((size_t)(SIM_LAYERS_MAX * LAYER_CELLS + 4) * CELL_WORDS, sizeof(uint64_t));
    CHECK(sim->cells);
    for (uint32_t l = 0; l < m->config.layers; l++) {
        uint32_t first = 4 + l * LAYER_CELLS;
        sim->layers[l] = (struct model_layer){.attention_norm = cell(sim, first),
                                              .mlp_norm = cell(sim, first + 1),
                                              .q_norm = cell(sim, first + 2),
                                              .k_norm = cell(sim, first + 3),
                                              .qkv = cell(sim, first + 4),
                                              .o = cell(sim, first + 5),
                                              .router = cell(sim, first + 6),
                                              .gate_up = cell(sim, first + 7),
                                              .down = cell(sim, first + 8)};
    }
    m->layers = sim->layers;
    m->embedding = cell(sim, 0);
    m->head = cell(sim, 1);
    m->final_norm = cell(sim, 2);
    m->inv_freq = cell(sim, 3);
    m->dtype = DTYPE_BF16;
    m->digests.model.bytes[0] = (uint8_t)(sim->variant + 1);
}

static void fill_kv_shape(struct sim_model *sim, const struct variant *v)
{
    struct kv_shape *s = &sim->kv_shape;
    *s = (struct kv_shape){.layers = v->layers,
                           .kv_heads = v->kv_heads,
                           .head_dim = v->head_dim,
                           .block_tokens = v->block_tokens,
                           .part_bytes = 2ul * v->kv_heads * v->block_tokens * v->head_dim * 2};
    uint32_t fit = (uint32_t)(SIM_PAGE_BYTES / s->part_bytes);
    s->layers_per_page = fit < v->layers ? fit : v->layers;
    s->pages_per_block = (uint32_t)div_up(v->layers, s->layers_per_page);
}

static void fill_experts(struct sim_model *sim, const struct variant *v)
{
    struct expert_shape *x = &sim->model.expert_shape;
    uint32_t moe_layers = (uint32_t)__builtin_popcount(v->moe_mask);
    if (!v->experts)
        return;
    *x = (struct expert_shape){.layers = moe_layers,
                               .experts = v->experts,
                               .hidden = 64,
                               .intermediate = v->moe_intermediate,
                               .dtype = DTYPE_BF16,
                               .page_bytes = SIM_PAGE_BYTES};
    expert_shape_complete(x);
    uint64_t pages = 1ull + (uint64_t)moe_layers * v->experts * x->pages_per_expert;
    fake_reader_init(&sim->store, STORE_SEED, pages * SIM_PAGE_BYTES);
    sim->model.expert_store = &sim->store.reader;
    uint32_t down = (uint32_t)tile_count(DTYPE_BF16, 64, v->moe_intermediate);
    for (uint32_t l = 0; l < moe_layers; l++) {
        for (uint32_t e = 0; e < v->experts; e++) {
            uint64_t first =
                (1 + (uint64_t)(l * v->experts + e) * x->pages_per_expert) * SIM_PAGE_BYTES;
            for (uint32_t t = 0; t < x->down_tile + down; t++) {
                uint64_t *sum = t < x->down_tile ? &sim->gate_up[l][e] : &sim->down[l][e];
                *sum = print_mix(*sum, rng_mix(STORE_SEED + first + (uint64_t)t * TILE_BYTES));
            }
        }
    }
}

// ---- adapters ----

static const char *const words[LORA_MODULES_ALL] = {"q_proj",    "k_proj",       "v_proj",
                                                    "o_proj",    "gate_proj",    "up_proj",
                                                    "down_proj", "embed_tokens", "lm_head"};

// Forms: attention only, all-linear, experts (or dense MLP) only, embed_tokens and lm_head; ranks
// mixed inside one adapter.
static const uint32_t ranks[SIM_CONTENTS][LORA_MODULES_ALL] = {
    {4, 0, 4, 0, 0, 0, 0, 0, 0}, {16, 16, 16, 16, 0, 0, 0, 0, 2}, {8, 2, 5, 8, 4, 4, 3, 3, 5},
    {0, 0, 0, 1, 0, 0, 0, 0, 0}, {32, 32, 32, 32, 3, 3, 3, 0, 0}, {0, 0, 0, 0, 8, 8, 8, 5, 0},
    {4, 0, 4, 0, 0, 0, 0, 0, 0}, {1, 0, 0, 1, 2, 0, 0, 0, 1},
};

struct side {
    uint32_t number, layer, module, expert, is_b;
};

static uint16_t element(const struct side *s, uint32_t row, uint32_t i)
{
    uint64_t place =
        ((uint64_t)s->layer << 40 | (uint64_t)s->module << 32 | s->expert << 8 | s->is_b);
    return (uint16_t)(0x3800 |
                      (rng_at(ADAPTER_SEED + s->number, place, (uint64_t)row << 32 | i) & 0x87ff));
}

static uint32_t matrices(const struct sim_model *sim, uint32_t layer, uint32_t module)
{
    bool is_mlp = module >= LORA_GATE && module < LORA_MODULES;
    return is_mlp && sim->is_moe[layer] ? sim->model.config.experts : 1;
}

static uint32_t dimension(const struct sim_model *sim, const struct side *s)
{
    const struct model_config *c = &sim->model.config;
    uint32_t q = c->heads * c->head_dim, kv = c->kv_heads * c->head_dim;
    bool is_moe = s->layer < c->layers && sim->is_moe[s->layer];
    uint32_t inner = is_moe ? c->moe_intermediate : c->intermediate;
    const uint32_t dims[LORA_MODULES_ALL][2] = {
        {c->hidden, q},     {c->hidden, kv},       {c->hidden, kv},
        {q, c->hidden},     {c->hidden, inner},    {c->hidden, inner},
        {inner, c->hidden}, {c->vocab, c->hidden}, {c->hidden, c->vocab}};
    return dims[s->module][s->is_b];
}

typedef void side_visit(struct sim_model *sim, const struct sim_adapter *a, const struct side *s,
                        void *context);

static void for_each_side(struct sim_model *sim, const struct sim_adapter *a, side_visit *visit,
                          void *context)
{
    for (uint32_t layer = 0; layer < sim->model.config.layers; layer++) {
        for (uint32_t m = 0; m < LORA_MODULES; m++) {
            for (uint32_t e = 0; a->rank[m] && e < matrices(sim, layer, m); e++) {
                for (uint32_t b = 0; b < 2; b++)
                    visit(sim, a, &(struct side){a->number, layer, m, e, b}, context);
            }
        }
    }
    for (uint32_t m = LORA_EMBED; m < LORA_MODULES_ALL; m++) {
        for (uint32_t b = 0; a->rank[m] && b < 2; b++)
            visit(sim, a, &(struct side){a->number, sim->model.config.layers, m, 0, b}, context);
    }
}

struct tensor_file {
    FILE *file;
    uint64_t at;
    bool first;
};

// "base_model.model." goes before it.
static void name_side(const struct sim_model *sim, const struct side *s, char *out, size_t room)
{
    char expert[24] = "", side = s->is_b ? 'B' : 'A';
    if (s->module == LORA_EMBED) {
        (void)snprintf(out, room, "model.embed_tokens.lora_embedding_%c", side);
    } else if (s->module == LORA_HEAD) {
        (void)snprintf(out, room, "lm_head.lora_%c.weight", side);
    } else {
        if (matrices(sim, s->layer, s->module) > 1)
            (void)snprintf(expert, sizeof expert, "experts.%u.", s->expert);
        (void)snprintf(out, room, "model.layers.%u.%s.%s%s.lora_%c.weight", s->layer,
                       s->module < LORA_GATE ? "self_attn" : "mlp", expert, words[s->module], side);
    }
}

static void put_header(struct sim_model *sim, const struct sim_adapter *a, const struct side *s,
                       void *context)
{
    struct tensor_file *f = context;
    char name[120];
    uint32_t rank = a->rank[s->module], dim = dimension(sim, s);
    name_side(sim, s, name, sizeof name);
    fprintf(f->file,
            "%s\"base_model.model.%s\":{\"dtype\":\"BF16\",\"shape\":[%u,%u],"
            "\"data_offsets\":[%llu,%llu]}",
            f->first ? "" : ",", name, s->is_b ? dim : rank, s->is_b ? rank : dim,
            (unsigned long long)f->at, (unsigned long long)(f->at + 2ull * rank * dim));
    f->first = false;
    f->at += 2ull * rank * dim;
}

static void put_data(struct sim_model *sim, const struct sim_adapter *a, const struct side *s,
                     void *context)
{
    struct tensor_file *f = context;
    uint32_t rank = a->rank[s->module], dim = dimension(sim, s);
    for (uint32_t x = 0; x < (s->is_b ? dim : rank); x++) {
        for (uint32_t y = 0; y < (s->is_b ? rank : dim); y++) {
            uint16_t value = s->is_b ? element(s, y, x) : element(s, x, y);
            CHECK(fwrite(&value, sizeof value, 1, f->file) == 1);
        }
    }
}

static void keep_words(struct sim_model *sim, const struct sim_adapter *a, const struct side *s,
                       void *context)
{
    (void)context;
    uint32_t experts = sim->model.config.experts ? sim->model.config.experts : 1;
    size_t row = lora_pair_row(s->layer, (enum lora_module)s->module);
    size_t at = (row * experts + s->expert) * 2 + s->is_b;
    for (uint32_t j = 0; j < a->rank[s->module]; j++) {
        uint16_t value[4];
        for (uint32_t i = 0; i < 4; i++)
            value[i] = element(s, j, i);
        a->words[at * SIM_RANK_MAX + j] = print_word(value);
    }
}

static FILE *open_in(const char *directory, const char *name, const char *mode)
{
    char path[512];
    (void)snprintf(path, sizeof path, "%s/%s", directory, name);
    FILE *file = fopen(path, mode);
    CHECK(file);
    return file;
}

static void write_config(const struct sim_adapter *a, const char *directory)
{
    FILE *file = open_in(directory, "adapter_config.json", "w");
    const char *comma = "";
    fprintf(
        file,
        "{\"peft_type\":\"LORA\",\"r\":8,\"lora_alpha\":%d,\"bias\":\"none\",\"target_modules\":[",
        ALPHA);
    for (int m = 0; m < LORA_MODULES_ALL; m++) {
        if (a->rank[m])
            fprintf(file, "%s\"%s\"", comma, words[m]), comma = ",";
    }
    fprintf(file, "],\"rank_pattern\":{");
    comma = "";
    for (int m = 0; m < LORA_MODULES_ALL; m++) {
        if (a->rank[m])
            fprintf(file, "%s\"%s\":%u", comma, words[m], a->rank[m]), comma = ",";
    }
    fprintf(file, "}}");
    CHECK(fclose(file) == 0);
}

static void write_weights(struct sim_model *sim, const struct sim_adapter *a, const char *directory)
{
    struct tensor_file f = {.file = open_in(directory, "adapter_model.safetensors", "wb"),
                            .first = true};
    uint64_t bytes = 0;
    CHECK(fwrite(&bytes, sizeof bytes, 1, f.file) == 1);
    fputc('{', f.file);
    for_each_side(sim, a, put_header, &f);
    fputc('}', f.file);
    while (ftell(f.file) % 8)
        fputc(' ', f.file);
    bytes = (uint64_t)ftell(f.file) - sizeof bytes;
    for_each_side(sim, a, put_data, &f);
    rewind(f.file);
    CHECK(fwrite(&bytes, sizeof bytes, 1, f.file) == 1);
    CHECK(fclose(f.file) == 0);
}

static void make_adapter(struct sim_model *sim, uint32_t number)
{
    struct sim_adapter *a = &sim->adapters[number];
    const struct model_config *c = &sim->model.config;
    size_t experts = c->experts ? c->experts : 1;
    char directory[256], part[512];
    struct adapter_report report;
    struct fault fault = {.text = ""};
    a->number = number;
    memcpy(a->rank, ranks[number], sizeof a->rank);
    (void)snprintf(directory, sizeof directory, "%s/peft%u", sim->directory, number);
    (void)snprintf(a->store, sizeof a->store, "%s/%u.store", sim->directory, number);
    CHECK(mkdir(directory, 0700) == 0);
    write_config(a, directory);
    write_weights(sim, a, directory);
    if (adapter_convert(directory, &sim->base, SIM_PAGE_BYTES, a->store, &report, &fault)) {
        fprintf(stderr, "adapter %u: %s\n", number, fault.text);
        abort();
    }
    a->words = calloc(lora_pair_rows(c->layers) * experts * 2 * SIM_RANK_MAX, sizeof *a->words);
    CHECK(a->words);
    for_each_side(sim, a, keep_words, NULL);
    (void)snprintf(part, sizeof part, "%s/adapter_config.json", directory);
    (void)unlink(part);
    (void)snprintf(part, sizeof part, "%s/adapter_model.safetensors", directory);
    (void)unlink(part);
    (void)rmdir(directory);
}

// ---- life ----

void sim_model_make(struct sim_model *sim, uint32_t variant)
{
    const struct variant *v = &variants[variant];
    memset(sim, 0, sizeof *sim);
    sim->variant = variant;
    fill_config(sim, v);
    fill_weights(sim);
    fill_kv_shape(sim, v);
    fill_experts(sim, v);
    const struct model_config *c = &sim->model.config;
    sim->base = (struct adapter_base){.layers = c->layers,
                                      .hidden = c->hidden,
                                      .heads = c->heads,
                                      .kv_heads = c->kv_heads,
                                      .head_dim = c->head_dim,
                                      .intermediate = c->intermediate,
                                      .experts = c->experts,
                                      .moe_intermediate = c->moe_intermediate,
                                      .vocab = c->vocab,
                                      .is_moe = c->is_moe,
                                      .dtype = DTYPE_BF16,
                                      .digest = sim->model.digests.model};
    (void)snprintf(sim->directory, sizeof sim->directory, "/tmp/polder-sim-XXXXXX");
    CHECK(mkdtemp(sim->directory));
    for (uint32_t i = 0; i < SIM_CONTENTS; i++)
        make_adapter(sim, i);
}

void sim_model_clear(struct sim_model *sim)
{
    for (uint32_t i = 0; i < SIM_CONTENTS; i++) {
        (void)unlink(sim->adapters[i].store);
        free(sim->adapters[i].words);
    }
    (void)rmdir(sim->directory);
    free(sim->cells);
}

// ---- the reference ----

void sim_reference_begin(struct sim_reference *r, const struct sim_model *sim,
                         const struct sim_adapter *adapter)
{
    *r = (struct sim_reference){.sim = sim, .adapter = adapter};
}

static uint64_t lora(const struct sim_reference *r, uint32_t layer, uint32_t module,
                     uint32_t expert, uint64_t x)
{
    if (!r->adapter || !r->adapter->rank[module])
        return 0;
    uint32_t experts = r->sim->model.config.experts ? r->sim->model.config.experts : 1;
    uint32_t rank = r->adapter->rank[module];
    size_t at = (lora_pair_row(layer, (enum lora_module)module) * experts + expert) * 2;
    const uint64_t *a = r->adapter->words + at * SIM_RANK_MAX, *b = a + SIM_RANK_MAX;
    uint64_t sum = 0;
    for (uint32_t j = 0; j < rank; j++)
        sum += print_expand(print_shrink(x, a[j], j), b[j], j);
    return print_scaled(sum, (float)((double)ALPHA / rank));
}

// A of embed_tokens is read by token: what stands there for a token is its `rank` elements.
static uint64_t embedding_lora(const struct sim_reference *r, int32_t token)
{
    const struct model_config *c = &r->sim->model.config;
    uint32_t rank = r->adapter ? r->adapter->rank[LORA_EMBED] : 0;
    if (!rank)
        return 0;
    const struct side a = {r->adapter->number, c->layers, LORA_EMBED, 0, 0};
    uint16_t value[4] = {0};
    for (uint32_t j = 0; j < rank && j < 4; j++)
        value[j] = element(&a, j, (uint32_t)token);
    size_t at = lora_pair_row(c->layers, LORA_EMBED) * (c->experts ? c->experts : 1) * 2;
    const uint64_t *b = r->adapter->words + (at + 1) * SIM_RANK_MAX;
    uint64_t sum = 0;
    for (uint32_t j = 0; j < rank; j++)
        sum += print_expand(print_shrink(1, print_word(value), j), b[j], j);
    return print_scaled(sum, (float)((double)ALPHA / rank));
}

static uint64_t attention(struct sim_reference *r, uint32_t layer, uint64_t x)
{
    const struct model_config *c = &r->sim->model.config;
    const struct model_layer *w = &r->sim->layers[layer];
    uint64_t rope = print_word(r->sim->model.inv_freq), q_n = c->heads * c->head_dim;
    uint64_t act = print_mix(x, print_word(w->attention_norm));
    uint64_t q = print_mix(act, print_word(w->qkv));
    uint64_t k = print_column(q, q_n), v = print_column(q, q_n + c->kv_heads * c->head_dim);
    q += lora(r, layer, LORA_Q, 0, act);
    k += lora(r, layer, LORA_K, 0, act);
    v += lora(r, layer, LORA_V, 0, act);
    q = print_query(q, print_word(w->q_norm), rope, r->position);
    r->kv_sum[layer] += print_kv(k, v, print_word(w->k_norm), rope, r->position);
    uint64_t out = print_mix(q, r->kv_sum[layer]);
    return print_mix(x, print_mix(out, print_word(w->o))) + lora(r, layer, LORA_O, 0, out);
}

static uint64_t dense(const struct sim_reference *r, uint32_t layer, uint64_t x)
{
    const struct model_layer *w = &r->sim->layers[layer];
    uint64_t act = print_mix(x, print_word(w->mlp_norm));
    uint64_t gate = print_mix(act, print_word(w->gate_up)), up = print_column(gate, 8);
    gate += lora(r, layer, LORA_GATE, 0, act);
    up += lora(r, layer, LORA_UP, 0, act);
    uint64_t mid = print_mix(gate, up);
    return print_mix(x, print_mix(mid, print_word(w->down))) + lora(r, layer, LORA_DOWN, 0, mid);
}

static uint64_t moe(const struct sim_reference *r, uint32_t layer, uint32_t moe_layer, uint64_t x)
{
    const struct model_config *c = &r->sim->model.config;
    const struct model_layer *w = &r->sim->layers[layer];
    uint64_t act = print_mix(x, print_word(w->mlp_norm)), sum = 0;
    uint64_t route = print_mix(act, print_word(w->router));
    uint32_t chosen[SIM_EXPERTS_MAX];
    for (uint32_t i = 0; i < c->top_k; i++) {
        uint32_t e = chosen[i] = print_expert(route, i, c->experts, chosen);
        uint64_t gate = print_mix(act, r->sim->gate_up[moe_layer][e]), up = print_column(gate, 8);
        gate += lora(r, layer, LORA_GATE, e, act);
        up += lora(r, layer, LORA_UP, e, act);
        uint64_t hidden = print_mix(gate, up);
        uint64_t out =
            print_mix(hidden, r->sim->down[moe_layer][e]) + lora(r, layer, LORA_DOWN, e, hidden);
        sum = print_mix(sum, out + print_gate(route, i));
    }
    return print_mix(x, sum);
}

void sim_reference_feed(struct sim_reference *r, int32_t token)
{
    const struct model *m = &r->sim->model;
    uint64_t x =
        print_mix((uint64_t)token + 1, print_word(m->embedding)) + embedding_lora(r, token);
    uint32_t moe_layer = 0;
    for (uint32_t layer = 0; layer < m->config.layers; layer++) {
        x = attention(r, layer, x);
        x = r->sim->is_moe[layer] ? moe(r, layer, moe_layer++, x) : dense(r, layer, x);
    }
    r->position++;
    uint64_t act = print_mix(x, print_word(m->final_norm));
    r->logits = print_mix(act, print_word(m->head)) + lora(r, m->config.layers, LORA_HEAD, 0, act);
}
