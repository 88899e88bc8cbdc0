// SPDX-License-Identifier: Apache-2.0
// How near the CPU kernels come to what the machine can do, one JSON line per measurement.
//
// The machine is shared and its speed moves, so every repetition measures its ceiling and the
// operation one after the other, and the line gives the median of their ratios:
//   ratio = roofline time / measured time, roofline = max(bytes / read rate, operations / dot
//   peak).
// ratio_cpu is the same in processor time (of all threads, spinning included, divided by their
// number; the ceilings by the processor time of their threads): what remains when other programs
// take the cores away. Ceilings: all threads reading a buffer of 2 GiB (well beyond a share of the
// last-level cache); all threads in a loop of the dot instruction of the instruction set on
// registers alone. Weights of an operation are spread over 2 GiB too, experts over scattered pages.
// The answer is checked first, on every path timed.
//
//   bench_kernels_cpu [--set avx512bf16|avx2|portable] [--threads N] [--reps N] [--only PREFIX]
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#include "base/check.h"
#include "base/rng.h"
#include "bench/bench_kernels_ceiling.h"
#include "kernels/device.h"

enum { REPS_MAX = 64 };

struct bench {
    struct device *device;
    const struct device_table *t;
    struct stream *s;
    struct device_info info;
    struct ceiling ceiling;
    const char *only;
    uint32_t reps;
    uint8_t *weights; // 2 GiB of random bf16
    size_t weight_bytes;
    size_t cursor; // next unused byte of weights
};

static void *need(struct bench *b, size_t bytes)
{
    void *out;
    CHECK(b->t->alloc(b->device, bytes, &out) == STATUS_OK);
    return out;
}

// ---- measuring ----

static int double_compare(const void *a, const void *b)
{
    double x = *(const double *)a, y = *(const double *)b;
    return (x > y) - (x < y);
}

struct measure {
    char name[64], shape[96];
    double bytes, operations;
    void (*record)(struct bench *b, void *context); // fills the stream
    void *context;
};

static void run(struct bench *b)
{
    struct segment_result result;
    CHECK(b->t->submit(b->s) == STATUS_OK && b->t->wait(b->s, &result) == STATUS_OK);
    CHECK(!result.missed);
}

static double roofline(const struct measure *m, double read, double dot)
{
    double by_bytes = m->bytes / read, by_dots = m->operations / dot;
    return by_bytes > by_dots ? by_bytes : by_dots;
}

static void sorted(double *values, uint32_t n)
{
    qsort(values, n, sizeof *values, double_compare);
}

static void measure(struct bench *b, struct measure *m)
{
    double ratio[REPS_MAX], busy[REPS_MAX], seconds[REPS_MAX], read[REPS_MAX], dot[REPS_MAX];
    uint32_t n = b->reps;
    if (b->only && strncmp(m->name, b->only, strlen(b->only)) != 0)
        return;
    m->record(b, m->context); // warm
    run(b);
    for (uint32_t i = 0; i < n; i++) {
        struct rate reads = ceiling_rate(&b->ceiling, false),
                    dots = ceiling_rate(&b->ceiling, true);
        m->record(b, m->context);
        double wall = bench_time(CLOCK_MONOTONIC), cpu = bench_time(CLOCK_PROCESS_CPUTIME_ID);
        run(b);
        seconds[i] = bench_time(CLOCK_MONOTONIC) - wall;
        cpu = (bench_time(CLOCK_PROCESS_CPUTIME_ID) - cpu) / b->info.threads;
        ratio[i] = roofline(m, reads.wall, dots.wall) / seconds[i];
        busy[i] = roofline(m, reads.cpu, dots.cpu) / cpu;
        read[i] = reads.wall;
        dot[i] = dots.wall;
    }
    sorted(ratio, n);
    sorted(busy, n);
    sorted(seconds, n);
    sorted(read, n);
    sorted(dot, n);
    double median = seconds[n / 2];
    bool bytes = m->bytes / read[n / 2] > m->operations / dot[n / 2];
    printf("{\"bench\":\"kernels_cpu\",\"commit\":\"%s\",\"device\":\"%s\",\"op\":\"%s\",\"shape\":"
           "\"%s\","
           "\"median_us\":%.1f,\"fastest_us\":%.1f,\"gbytes_per_s\":%.2f,\"gflops\":%.1f,"
           "\"read_ceiling_gbytes_per_s\":%.2f,\"dot_ceiling_gflops\":%.1f,\"bound\":\"%s\","
           "\"ratio\":%.3f,\"ratio_low\":%.3f,\"ratio_high\":%.3f,\"ratio_cpu\":%.3f}\n",
           POLDER_COMMIT, b->info.name, m->name, m->shape, median * 1e6, seconds[0] * 1e6,
           m->bytes / median * 1e-9, m->operations / median * 1e-9, read[n / 2] * 1e-9,
           dot[n / 2] * 1e-9, bytes ? "bytes" : "dots", ratio[n / 2], ratio[0], ratio[n - 1],
           busy[n / 2]);
    fflush(stdout);
}

// `bytes` of weights not used lately, so that they do not come from the cache.
static const uint8_t *fresh(struct bench *b, size_t bytes)
{
    bytes = round_up(bytes, 1 << 19);
    if (b->cursor + bytes > b->weight_bytes)
        b->cursor = 0;
    const uint8_t *out = b->weights + b->cursor;
    b->cursor += bytes;
    return out;
}

static float random_float(struct rng *rng)
{
    return (float)(rng_next(rng) >> 40) * (1.0f / 8388608.0f) - 1.0f;
}

static float *random_floats(struct bench *b, size_t n)
{
    struct rng rng = {n, 0};
    float *out = need(b, n * sizeof *out);
    for (size_t i = 0; i < n; i++)
        out[i] = random_float(&rng);
    return out;
}

// ---- gemm ----

struct gemm_bench {
    uint32_t rows, n, k, times;
    void *x;
    float *y;
};

static void *act_make(struct bench *b, uint32_t rows, uint32_t cols)
{
    void *act = need(b, b->t->act_bytes(b->device, rows, cols));
    float *x = random_floats(b, (size_t)rows * cols), *weight = random_floats(b, cols);
    b->t->rmsnorm(b->s, &(struct rmsnorm_args){x, weight, act, NULL, rows, cols, 1e-6f});
    run(b);
    b->t->release(b->device, x);
    b->t->release(b->device, weight);
    return act;
}

static void gemm_record(struct bench *b, void *context)
{
    struct gemm_bench *g = context;
    for (uint32_t i = 0; i < g->times; i++)
        b->t->gemm(b->s, &(struct gemm_args){
                             .x = g->x,
                             .weight = fresh(b, tile_count(b->info.dtype, g->n, g->k) * TILE_BYTES),
                             .y = g->y,
                             .y_stride = g->n,
                             .rows = g->rows,
                             .n = g->n,
                             .k = g->k});
}

static void gemm_check(struct bench *b, const struct gemm_bench *g)
{
    size_t at = b->cursor;
    struct gemm_bench one = *g;
    one.times = 1;
    gemm_record(b, &one);
    const uint8_t *weight = b->weights + b->cursor -
                            round_up(tile_count(b->info.dtype, g->n, g->k) * TILE_BYTES, 1 << 19);
    run(b);
    b->cursor = at;
    for (uint32_t r = 0; r < g->rows; r += g->rows / 3 + 1)
        for (uint32_t j = 0; j < g->n; j += 97) {
            double sum = 0, scale = 0;
            const uint16_t *x = (const uint16_t *)g->x + r * round_up(g->k, 64);
            for (uint32_t i = 0; i < g->k; i++) {
                uint16_t w;
                memcpy(&w, weight + tile_offset(DTYPE_BF16, g->k, j, i), 2);
                sum += (double)bf16_to_f32(w) * (double)bf16_to_f32(x[i]);
                scale += fabs((double)bf16_to_f32(w) * (double)bf16_to_f32(x[i]));
            }
            double error = fabs((double)g->y[(size_t)r * g->n + j] - sum);
            CHECK(error <= 1e-5 * scale); // false for NaN
        }
}

static void bench_gemm(struct bench *b, uint32_t n, uint32_t k)
{
    static const uint32_t rows[] = {1, 2, 4, 8, 32, 128, 512};
    for (size_t i = 0; i < ARRAY_COUNT(rows); i++) {
        double weight = (double)tile_count(b->info.dtype, n, k) * TILE_BYTES;
        struct gemm_bench g = {.rows = rows[i], .n = n, .k = k};
        g.times = rows[i] <= 8 ? 4 : 1;
        g.x = act_make(b, g.rows, k);
        g.y = need(b, (size_t)g.rows * n * sizeof(float));
        gemm_check(b, &g);
        struct measure m = {.bytes = weight * g.times,
                            .operations = 2.0 * n * k * g.rows * g.times,
                            .record = gemm_record,
                            .context = &g};
        snprintf(m.name, sizeof m.name, "gemm");
        snprintf(m.shape, sizeof m.shape, "M=%u N=%u K=%u x%u", g.rows, n, k, g.times);
        measure(b, &m);
        b->t->release(b->device, g.x);
        b->t->release(b->device, g.y);
    }
}

// ---- a whole step of a Qwen3-MoE-shaped model ----

enum {
    LAYERS = 16,
    DIM = 1024,
    HEADS = 16,
    KV_HEADS = 4,
    HEAD_DIM = 128,
    EXPERTS = 40,
    TOP_K = 8,
    UNITS = 512,
    VOCAB = 32768,
    BLOCK = 16,
    PAGE_BYTES = 512 << 10,
    ROWS_MAX = 512,
};

struct layer {
    const uint8_t *q, *k, *v, *o;
    float *router, *norm, *head_norm;
    struct expert_view experts;
};

struct model {
    struct layer layer[LAYERS];
    const uint8_t *head;
    uint32_t *expert_pages;
    struct kv_view kv;
    uint32_t *kv_pages;
    float *inv_freq, *norm;
    // activations
    float *x, *q, *k, *v, *x32, *logits, *last;
    void *act, *attended;
    struct moe_work work;
    uint32_t *need, *sequence, *position, *last_row;
    int32_t *token;
    struct sample_params *params;
    uint32_t rows, sequences, context;
    double expert_bytes, other_bytes; // of one step
};

static size_t tiles_bytes(size_t n, size_t k)
{
    return tile_count(DTYPE_BF16, n, k) * TILE_BYTES;
}

// All experts of all layers over scattered pages of the 2 GiB of weights.
static void experts_place(struct bench *b, struct model *m)
{
    size_t up_tiles = tile_count(DTYPE_BF16, tile_interleaved_rows(UNITS), DIM);
    size_t tiles = up_tiles + tile_count(DTYPE_BF16, DIM, UNITS);
    uint32_t per = (uint32_t)div_up(tiles * TILE_BYTES, PAGE_BYTES);
    uint32_t used = per * EXPERTS * LAYERS, all = (uint32_t)(b->weight_bytes / PAGE_BYTES);
    CHECK(used <= all);
    uint32_t *numbers = need(b, all * sizeof *numbers);
    struct rng rng = {7, 0};
    for (uint32_t i = 0; i < all; i++)
        numbers[i] = i;
    for (uint32_t i = 0; i < used; i++) {
        uint32_t j = i + (uint32_t)rng_below(&rng, all - i), page = numbers[j];
        numbers[j] = numbers[i];
        numbers[i] = page;
    }
    m->expert_pages = numbers;
    for (uint32_t l = 0; l < LAYERS; l++)
        m->layer[l].experts = (struct expert_view){
            b->weights, PAGE_BYTES, numbers + l * per * EXPERTS, per, EXPERTS, (uint32_t)up_tiles};
}

static void model_make(struct bench *b, struct model *m)
{
    memset(m, 0, sizeof *m);
    experts_place(b, m);
    size_t attention =
        tiles_bytes(HEADS * HEAD_DIM, DIM) * 2 + tiles_bytes(KV_HEADS * HEAD_DIM, DIM) * 2;
    uint8_t *dense = need(b, attention * LAYERS + tiles_bytes(VOCAB, DIM));
    memcpy(dense, b->weights, attention * LAYERS + tiles_bytes(VOCAB, DIM));
    m->norm = random_floats(b, DIM);
    for (uint32_t l = 0; l < LAYERS; l++) {
        struct layer *y = &m->layer[l];
        y->q = dense;
        y->k = y->q + tiles_bytes(HEADS * HEAD_DIM, DIM);
        y->v = y->k + tiles_bytes(KV_HEADS * HEAD_DIM, DIM);
        y->o = y->v + tiles_bytes(KV_HEADS * HEAD_DIM, DIM);
        dense = (uint8_t *)(uintptr_t)y->o + tiles_bytes(DIM, HEADS * HEAD_DIM);
        y->router = random_floats(b, EXPERTS * DIM);
        y->norm = m->norm;
        y->head_norm = random_floats(b, HEAD_DIM);
    }
    m->head = dense;
    m->inv_freq = need(b, HEAD_DIM / 2 * sizeof(float));
    for (int i = 0; i < HEAD_DIM / 2; i++)
        m->inv_freq[i] = powf(1e6f, -2.0f * (float)i / HEAD_DIM);
    size_t rows = ROWS_MAX, pairs = rows * TOP_K;
    m->x = need(b, rows * DIM * 4);
    m->x32 = need(b, rows * DIM * 4);
    m->q = need(b, rows * HEADS * HEAD_DIM * 4);
    m->k = need(b, rows * KV_HEADS * HEAD_DIM * 4);
    m->v = need(b, rows * KV_HEADS * HEAD_DIM * 4);
    m->act = need(b, b->t->act_bytes(b->device, rows, DIM));
    m->attended = need(b, b->t->act_bytes(b->device, rows, HEADS * HEAD_DIM));
    m->last = need(b, 64 * DIM * 4);
    m->logits = need(b, (size_t)64 * VOCAB * 4);
    m->work = (struct moe_work){
        need(b, pairs * 4),         need(b, pairs * 4),
        need(b, (EXPERTS + 1) * 4), need(b, pairs * 4),
        need(b, EXPERTS),           need(b, b->t->act_bytes(b->device, pairs, UNITS)),
        need(b, pairs * DIM * 4)};
    m->need = need(b, EXPERTS * 4 * LAYERS);
    m->sequence = need(b, rows * 4);
    m->position = need(b, rows * 4);
    m->last_row = need(b, rows * 4);
    m->token = need(b, rows * 4);
    m->params = need(b, rows * sizeof *m->params);
}

static void kv_make(struct bench *b, struct model *m, uint32_t sequences, uint32_t context)
{
    size_t part = (size_t)2 * KV_HEADS * BLOCK * HEAD_DIM * 2, page = part * LAYERS;
    uint32_t blocks = (context + BLOCK - 1) / BLOCK, all = sequences * blocks;
    uint8_t *arena = need(b, all * page);
    for (size_t i = 0; i < all * page; i += 4096)
        memcpy(arena + i, b->weights + i % ((size_t)1 << 30), 4096);
    m->kv_pages = need(b, all * 4);
    for (uint32_t i = 0; i < all; i++) // an order that is not ascending
        m->kv_pages[i] = all % 7 ? (uint32_t)((uint64_t)i * 7 % all) : all - 1 - i;
    m->kv = (struct kv_view){
        arena, page, m->kv_pages, blocks, {LAYERS, KV_HEADS, HEAD_DIM, BLOCK, 1, LAYERS, part}};
    m->sequences = sequences;
    m->context = context;
}

static void kv_release(struct bench *b, struct model *m)
{
    b->t->release(b->device, m->kv.arena);
    b->t->release(b->device, m->kv_pages);
}

static void rows_set(struct model *m, uint32_t rows)
{
    m->rows = rows;
    for (uint32_t r = 0; r < rows; r++) {
        m->sequence[r] = m->sequences == 1 ? 0 : r;
        m->position[r] = m->sequences == 1 ? m->context - rows + r : m->context - 1;
        m->params[r] = (struct sample_params){.temperature = 0, .top_p = 1};
        m->last_row[r] = m->sequences == 1 ? rows - 1 : r;
    }
}

static void layer_record(struct bench *b, struct model *m, uint32_t l)
{
    const struct layer *y = &m->layer[l];
    uint32_t rows = m->rows, wide = HEADS * HEAD_DIM, narrow = KV_HEADS * HEAD_DIM;
    b->t->rmsnorm(b->s, &(struct rmsnorm_args){m->x, y->norm, m->act, NULL, rows, DIM, 1e-6f});
    b->t->gemm(b->s, &(struct gemm_args){m->act, y->q, m->q, wide, rows, wide, DIM, false});
    b->t->gemm(b->s, &(struct gemm_args){m->act, y->k, m->k, narrow, rows, narrow, DIM, false});
    b->t->gemm(b->s, &(struct gemm_args){m->act, y->v, m->v, narrow, rows, narrow, DIM, false});
    b->t->qk_norm_rope_kv(b->s,
                          &(struct qk_args){m->q, m->k, m->v, wide, narrow, narrow, y->head_norm,
                                            y->head_norm, m->inv_freq, m->sequence, m->position,
                                            m->kv, rows, HEADS, l, 1e-6f});
    b->t->attention(b->s,
                    &(struct attention_args){m->q, wide, m->attended, m->sequence, m->position,
                                             m->kv, rows, HEADS, l, 0.08838834764f});
    b->t->gemm(b->s, &(struct gemm_args){m->attended, y->o, m->x, DIM, rows, DIM, wide, true});
    b->t->rmsnorm(b->s, &(struct rmsnorm_args){m->x, y->norm, m->act, m->x32, rows, DIM, 1e-6f});
    b->t->router(b->s, &(struct router_args){m->x32, y->router, m->work.expert, m->work.gate, rows,
                                             DIM, EXPERTS, TOP_K, true});
    struct moe_gemm_args moe = {.work = m->work,
                                .view = y->experts,
                                .x = m->act,
                                .rows = rows,
                                .dim = DIM,
                                .intermediate = UNITS,
                                .top_k = TOP_K,
                                .layer = l};
    b->t->moe_map(b->s, &(struct moe_map_args){.work = m->work,
                                               .view = y->experts,
                                               .need = m->need + l * EXPERTS,
                                               .rows = rows,
                                               .top_k = TOP_K,
                                               .layer = l});
    b->t->moe_gate_up(b->s, &moe);
    b->t->moe_down(b->s, &moe);
    b->t->moe_combine(b->s,
                      &(struct moe_combine_args){
                          .work = m->work, .y = m->x, .rows = rows, .dim = DIM, .top_k = TOP_K});
}

static void step_record(struct bench *b, void *context)
{
    struct model *m = context;
    static uint64_t turn;
    struct rng rng = {turn++, 0}; // other tokens, so other experts, every time
    for (size_t i = 0; i < (size_t)m->rows * DIM; i++)
        m->x[i] = random_float(&rng);
    for (uint32_t l = 0; l < LAYERS; l++)
        layer_record(b, m, l);
    uint32_t outs = m->sequences;
    b->t->gather(b->s, &(struct gather_args){m->x, m->last_row, m->last, outs, DIM});
    b->t->rmsnorm(b->s, &(struct rmsnorm_args){m->last, m->norm, m->act, NULL, outs, DIM, 1e-6f});
    b->t->gemm(b->s,
               &(struct gemm_args){m->act, m->head, m->logits, VOCAB, outs, VOCAB, DIM, false});
    b->t->sample(b->s, &(struct sample_args){.logits = m->logits,
                                             .stride = VOCAB,
                                             .vocab = VOCAB,
                                             .rows = outs,
                                             .params = m->params,
                                             .token = m->token});
}

// Bytes and operations of a step, with the experts it really took.
static void step_cost(struct bench *b, struct model *m, struct measure *out)
{
    double distinct = 0, other = 0, operations = 0, attended = 0;
    step_record(b, m);
    run(b);
    for (uint32_t r = 0; r < m->sequences; r++)
        CHECK(m->token[r] >= 0);
    for (uint32_t i = 0; i < EXPERTS * LAYERS; i++)
        distinct += m->need[i] > 0;
    double weights = (double)DIM * HEAD_DIM * (2 * HEADS + 2 * KV_HEADS);
    other = LAYERS * (weights * 2 + (double)EXPERTS * DIM * 4) + (double)tiles_bytes(VOCAB, DIM);
    for (uint32_t r = 0; r < m->rows; r++)
        attended += m->position[r] + 1;
    double kv = (m->sequences == 1 ? (double)m->context : attended) * 2 * KV_HEADS * HEAD_DIM * 2;
    out->bytes = distinct * 3 * UNITS * DIM * 2 + other + LAYERS * kv;
    operations = LAYERS * (2.0 * m->rows * (weights + TOP_K * 3.0 * UNITS * DIM) +
                           4.0 * attended * HEADS * HEAD_DIM);
    out->operations = operations + 2.0 * m->sequences * VOCAB * DIM;
}

static void bench_step(struct bench *b, struct model *m)
{
    static const uint32_t cases[][3] = {// rows, sequences, context
                                        {1, 1, 128},   {2, 2, 128},   {4, 4, 128},  {8, 8, 128},
                                        {32, 32, 128}, {128, 1, 128}, {512, 1, 512}};
    for (size_t i = 0; i < ARRAY_COUNT(cases); i++) {
        const uint32_t *c = cases[i];
        kv_make(b, m, c[1], c[2]);
        rows_set(m, c[0]);
        struct measure out = {.record = step_record, .context = m};
        snprintf(out.name, sizeof out.name, "step_%s", c[1] == c[0] ? "decode" : "prefill");
        snprintf(out.shape, sizeof out.shape, "rows=%u context=%u", c[0], c[2]);
        step_cost(b, m, &out);
        measure(b, &out);
        kv_release(b, m);
    }
}

// ---- the parts of a step, alone ----

struct part {
    struct model *m;
    int what;
};

enum { PART_EXPERTS, PART_ATTENTION, PART_SMALL };

static void part_record(struct bench *b, void *context)
{
    struct part *p = context;
    struct model *m = p->m;
    static uint64_t turn;
    turn++;
    for (uint32_t l = 0; l < LAYERS; l++) {
        const struct layer *y = &m->layer[l];
        struct moe_gemm_args moe = {.work = m->work,
                                    .view = y->experts,
                                    .x = m->act,
                                    .rows = m->rows,
                                    .dim = DIM,
                                    .intermediate = UNITS,
                                    .top_k = TOP_K,
                                    .layer = l};
        switch (p->what) {
        case PART_EXPERTS:
            if (l % (LAYERS / 2) != turn % (LAYERS / 2))
                break;
            for (uint32_t r = 0; r < m->rows; r++) // the same number of distinct experts every time
                for (uint32_t k = 0; k < TOP_K; k++)
                    m->work.expert[r * TOP_K + k] = (r * 3 + k * 5 + (uint32_t)turn) % EXPERTS;
            b->t->moe_map(b->s, &(struct moe_map_args){.work = m->work,
                                                       .view = y->experts,
                                                       .need = m->need + l * EXPERTS,
                                                       .rows = m->rows,
                                                       .top_k = TOP_K,
                                                       .layer = l});
            b->t->moe_gate_up(b->s, &moe);
            b->t->moe_down(b->s, &moe);
            break;
        case PART_ATTENTION:
            b->t->attention(b->s, &(struct attention_args){m->q, HEADS * HEAD_DIM, m->attended,
                                                           m->sequence, m->position, m->kv, m->rows,
                                                           HEADS, l, 0.08838834764f});
            break;
        default:
            b->t->rmsnorm(
                b->s, &(struct rmsnorm_args){m->x, y->norm, m->act, m->x32, m->rows, DIM, 1e-6f});
            b->t->router(b->s,
                         &(struct router_args){m->x32, y->router, m->work.expert, m->work.gate,
                                               m->rows, DIM, EXPERTS, TOP_K, true});
            b->t->moe_map(b->s, &(struct moe_map_args){.work = m->work,
                                                       .view = y->experts,
                                                       .need = m->need,
                                                       .rows = m->rows,
                                                       .top_k = TOP_K,
                                                       .layer = l});
            b->t->moe_combine(
                b->s, &(struct moe_combine_args){
                          .work = m->work, .y = m->x, .rows = m->rows, .dim = DIM, .top_k = TOP_K});
        }
    }
}

static void bench_experts(struct bench *b, struct model *m)
{
    static const uint32_t rows[] = {1, 2, 4, 8, 32, 128, 512};
    for (size_t i = 0; i < ARRAY_COUNT(rows); i++) {
        struct part p = {m, PART_EXPERTS};
        m->rows = rows[i];
        m->sequences = rows[i];
        struct measure out = {.record = part_record, .context = &p};
        snprintf(out.name, sizeof out.name, "experts");
        snprintf(out.shape, sizeof out.shape, "rows=%u top_k=%d of %d, %dx%d, 2 layers", rows[i],
                 TOP_K, EXPERTS, UNITS, DIM);
        memset(m->need, 0, EXPERTS * LAYERS * 4);
        part_record(b, &p);
        run(b);
        double distinct = 0;
        for (uint32_t e = 0; e < EXPERTS * LAYERS; e++)
            distinct += m->need[e] > 0;
        out.bytes = distinct * 3 * UNITS * DIM * 2;
        out.operations = 6.0 * rows[i] * TOP_K * UNITS * DIM * 2;
        measure(b, &out);
    }
}

static void bench_attention(struct bench *b, struct model *m)
{
    static const uint32_t cases[][3] = {
        {1, 1, 4096}, {8, 8, 4096}, {32, 32, 1024}, {512, 1, 512}, {512, 1, 4096}};
    for (size_t i = 0; i < ARRAY_COUNT(cases); i++) {
        const uint32_t *c = cases[i];
        struct part p = {m, PART_ATTENTION};
        kv_make(b, m, c[1], c[2]);
        rows_set(m, c[0]);
        struct measure out = {.record = part_record, .context = &p};
        double attended = 0;
        for (uint32_t r = 0; r < c[0]; r++)
            attended += m->position[r] + 1;
        snprintf(out.name, sizeof out.name, "attention");
        snprintf(out.shape, sizeof out.shape, "rows=%u sequences=%u context=%u heads=%d/%d", c[0],
                 c[1], c[2], HEADS, KV_HEADS);
        out.bytes = (double)c[1] * c[2] * 2 * KV_HEADS * HEAD_DIM * 2 * LAYERS;
        out.operations = 4.0 * attended * HEADS * HEAD_DIM * LAYERS;
        measure(b, &out);
        kv_release(b, m);
    }
}

static void bench_small(struct bench *b, struct model *m)
{
    static const uint32_t rows[] = {1, 8};
    for (size_t i = 0; i < ARRAY_COUNT(rows); i++) {
        struct part p = {m, PART_SMALL};
        m->rows = rows[i];
        struct measure out = {.record = part_record, .context = &p};
        snprintf(out.name, sizeof out.name, "small");
        snprintf(out.shape, sizeof out.shape, "rows=%u norm+router+map+combine x%d", rows[i],
                 LAYERS);
        out.bytes = (double)EXPERTS * DIM * 4 * LAYERS;
        measure(b, &out);
    }
}

// ---- LoRA ----

struct lora_bench {
    struct lora_batch batch;
    struct lora_adapter_view *views;
    void *x;
    float *hidden, *y;
    uint32_t dim, times;
};

static void lora_record(struct bench *b, void *context)
{
    struct lora_bench *l = context;
    for (uint32_t i = 0; i < l->times; i++) {
        b->t->lora_shrink(
            b->s, &(struct lora_shrink_args){&l->batch, l->x, l->hidden, i, l->dim, LORA_Q});
        b->t->lora_expand(b->s, &(struct lora_expand_args){&l->batch, l->hidden, l->y, l->dim, i,
                                                           l->dim, LORA_Q, -1});
    }
}

// `rows` rows, each with its own adapter; ranks 8, 16, 32, 64 in turn; `times` layers.
static void bench_lora(struct bench *b, uint32_t rows, uint32_t dim, uint32_t times)
{
    static const uint32_t ranks[] = {8, 16, 32, 64};
    struct lora_bench l = {.dim = dim, .times = times};
    uint32_t *begin = need(b, (rows + 1) * 4), *adapter = need(b, rows * 4);
    uint32_t pages = (uint32_t)(b->weight_bytes / PAGE_BYTES), *slots = need(b, pages * 4);
    double bytes = 0, operations = 0;
    size_t cursor = 0;
    for (uint32_t i = 0; i < pages; i++)
        slots[i] = (uint32_t)((uint64_t)i * 2741 % pages);
    l.views = need(b, rows * sizeof *l.views);
    for (uint32_t r = 0; r < rows; r++) {
        struct lora_pair *pair = need(b, (size_t)times * LORA_MODULES * sizeof *pair);
        uint32_t rank = ranks[r % 4], row_bytes = dim * 2;
        for (uint32_t i = 0; i < times; i++)
            for (int side = 0; side < 2; side++) {
                cursor = cursor % PAGE_BYTES + row_bytes > PAGE_BYTES ? round_up(cursor, PAGE_BYTES)
                                                                      : cursor;
                struct lora_slice s = {(uint32_t)(cursor / PAGE_BYTES),
                                       (uint32_t)(cursor % PAGE_BYTES), row_bytes, rank};
                *(side ? &pair[i * LORA_MODULES].b : &pair[i * LORA_MODULES].a) = s;
                cursor += (size_t)rank * row_bytes;
                bytes += (double)rank * row_bytes;
                operations += 2.0 * rank * dim;
            }
        for (uint32_t i = 0; i < times; i++)
            pair[i * LORA_MODULES].scale = 1;
        l.views[r] = (struct lora_adapter_view){.pages = slots, .pairs = pair, .experts = 1};
        begin[r + 1] = r + 1;
        adapter[r] = r;
    }
    l.batch = (struct lora_batch){b->weights, PAGE_BYTES, rows, rows, begin, adapter, l.views, 64};
    l.x = act_make(b, rows, dim);
    l.hidden = need(b, rows * 64 * 4);
    l.y = need(b, (size_t)rows * dim * 4);
    struct measure m = {
        .bytes = bytes, .operations = operations, .record = lora_record, .context = &l};
    snprintf(m.name, sizeof m.name, "lora");
    snprintf(m.shape, sizeof m.shape, "rows=%u adapters=%u ranks 8..64 dim=%u x%u", rows, rows, dim,
             times);
    measure(b, &m);
}

// ---- sampling ----

struct sample_bench {
    struct sample_args a;
};

static void sample_record(struct bench *b, void *context)
{
    b->t->sample(b->s, &((struct sample_bench *)context)->a);
}

static void bench_sample(struct bench *b, uint32_t rows, float temperature, float top_p)
{
    enum { WIDE = 151936 };
    struct sample_params *params = need(b, rows * sizeof *params);
    float *logits = random_floats(b, (size_t)rows * WIDE);
    for (size_t i = 0; i < (size_t)rows * WIDE; i++)
        logits[i] *= 8;
    for (uint32_t r = 0; r < rows; r++)
        params[r] = (struct sample_params){temperature, top_p, 0, 1, r};
    struct sample_bench s = {{.logits = logits,
                              .stride = WIDE,
                              .vocab = WIDE,
                              .rows = rows,
                              .params = params,
                              .token = need(b, rows * 4),
                              .logprob = need(b, rows * 4)}};
    struct measure m = {.bytes = (double)rows * WIDE * 4, .record = sample_record, .context = &s};
    snprintf(m.name, sizeof m.name, "sample");
    snprintf(m.shape, sizeof m.shape, "rows=%u vocab=%d temperature=%g top_p=%g", rows, WIDE,
             (double)temperature, (double)top_p);
    measure(b, &m);
    b->t->release(b->device, logits);
}

static void weights_make(struct bench *b)
{
    b->weight_bytes = (size_t)2 << 30;
    b->weights = need(b, b->weight_bytes);
    uint16_t *w = (uint16_t *)(void *)b->weights;
    uint64_t state = 1;
    for (size_t i = 0; i < b->weight_bytes / 2; i++) {
        state = state * 6364136223846793005u + 1442695040888963407u;
        // sign and mantissa random, size between 2^-6 and 2^-5: sums stay small
        w[i] = (uint16_t)((state >> 48 & 0x807f) | 0x3c80);
    }
}

int main(int argc, char **argv)
{
    struct bench b = {.reps = 15};
    struct cpu_options options = {.dtype = DTYPE_BF16};
    struct fault fault;
    for (int i = 1; i + 1 < argc; i += 2) {
        if (!strcmp(argv[i], "--set"))
            options.instruction_set = argv[i + 1];
        else if (!strcmp(argv[i], "--threads"))
            options.threads = (uint32_t)atoi(argv[i + 1]);
        else if (!strcmp(argv[i], "--reps"))
            b.reps = (uint32_t)atoi(argv[i + 1]);
        else if (!strcmp(argv[i], "--only"))
            b.only = argv[i + 1];
    }
    CHECK(b.reps >= 1 && b.reps <= REPS_MAX);
    if (device_create_cpu(&options, &b.device, &fault) != STATUS_OK) {
        fprintf(stderr, "bench_kernels_cpu: %s\n", fault.text);
        return 1;
    }
    b.t = b.device->table;
    b.t->info(b.device, &b.info);
    CHECK(b.info.threads <= CEILING_THREADS &&
          b.t->stream_create(b.device, 1024, &b.s) == STATUS_OK);
    weights_make(&b);
    b.ceiling =
        (struct ceiling){b.info.instruction_set, b.info.threads, b.weights, b.weight_bytes, 0};
    bench_gemm(&b, 2048, 2048);
    static struct model m;
    model_make(&b, &m);
    bench_experts(&b, &m);
    bench_attention(&b, &m);
    bench_lora(&b, 1, 2048, 48);
    bench_lora(&b, 8, 2048, 48);
    bench_small(&b, &m);
    bench_sample(&b, 1, 0, 1);
    bench_sample(&b, 8, 0.8f, 0.9f);
    bench_step(&b, &m);
    b.t->stream_destroy(b.s);
    return 0;
}
