// SPDX-License-Identifier: Apache-2.0
// Every operation of the CUDA backend beside its ceiling, one JSON line each, through the device
// table as the engine uses it: captured units that run an operation on LAYERS different sets of
// weights or pages, so that nothing is left in the L2 when it comes around.
//
// The time of an operation is that of the whole unit divided by how often it stands in it; where an
// operation needs another before it (experts need their map) it is a difference of two units.
// ratio = time the bytes (or operations) need at the ceiling of this run / measured time.
//
//   bench_kernels_cuda [gemm|experts|prefill|attention|lora|small]...
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#include "base/check.h"
#include "base/rng.h"
#include "bench/bench_ceiling_cuda.h"
#include "kernels/device.h"

enum { LAYERS = 12, TIMES = 15, PAGE = 512 << 10 };

struct bench {
    struct device *device;
    const struct device_table *t;
    struct stream *s;
    double read, copy, matmul; // ceilings, per second
    struct rng rng;
};

// ---- frame ----

static void *device_memory(struct bench *b, size_t bytes)
{
    void *out = NULL;
    if (b->t->alloc(b->device, bytes ? bytes : 64, &out)) {
        (void)fprintf(stderr, "bench: %zu bytes of device memory cannot be had\n", bytes);
        exit(1);
    }
    return out;
}

static void *random_bf16(struct bench *b, size_t count, float size)
{
    void *out = device_memory(b, count * 2 + 256);
    fill_bf16(out, count, size, (uint32_t)rng_next(&b->rng));
    return out;
}

static void *uploaded(struct bench *b, const void *from, size_t bytes)
{
    void *out = device_memory(b, bytes);
    CHECK(!b->t->upload(b->device, out, from, bytes));
    return out;
}

static float *random_f32(struct bench *b, size_t count)
{
    float *host = malloc(count * sizeof *host);
    CHECK(host);
    for (size_t i = 0; i < count; i++)
        host[i] = (float)(rng_next(&b->rng) >> 40) * (2.0f / 16777216.0f) - 1.0f;
    void *out = uploaded(b, host, count * sizeof *host);
    free(host);
    return out;
}

static double now(void)
{
    struct timespec t;
    (void)clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
}

static int compare(const void *a, const void *b)
{
    double x = *(const double *)a, y = *(const double *)b;
    return (x > y) - (x < y);
}

typedef void (*body)(struct bench *b, void *context);

// Median seconds of one segment with `record` in one unit; a wrong result ends the program.
static double unit_seconds(struct bench *b, body record, void *context)
{
    double all[TIMES];
    for (int i = -3; i < TIMES; i++) {
        struct segment_result result;
        b->t->unit(b->s);
        record(b, context);
        double begin = now();
        if (b->t->submit(b->s) || b->t->wait(b->s, &result) || result.status || result.missed) {
            (void)fprintf(stderr, "bench: a segment failed or missed\n");
            exit(1);
        }
        if (i >= 0)
            all[i] = now() - begin;
    }
    qsort(all, TIMES, sizeof *all, compare);
    return all[TIMES / 2];
}

static void nothing(struct bench *b, void *context)
{
    (void)b;
    (void)context;
}

static void print(const char *what, const char *shape, double us, const char *unit, double value,
                  double ceiling, double ratio)
{
    (void)printf(
        "{\"bench\":\"kernels_cuda\",\"what\":\"%s\",\"shape\":\"%s\",\"us\":%.2f,\"%s\":%.1f,"
        "\"ceiling\":%.1f,\"ratio\":%.3f}\n",
        what, shape, us, unit, value, ceiling, ratio);
    (void)fflush(stdout);
}

static void print_bytes(const struct bench *b, const char *what, const char *shape, double seconds,
                        double bytes)
{
    print(what, shape, seconds * 1e6, "gb_per_s", bytes / seconds * 1e-9, b->read * 1e-9,
          bytes / b->read / seconds);
}

static void print_operations(const struct bench *b, const char *what, const char *shape,
                             double seconds, double operations)
{
    print(what, shape, seconds * 1e6, "tflop_per_s", operations / seconds * 1e-12,
          b->matmul * 1e-12, operations / b->matmul / seconds);
}

// ---- dense products ----

struct gemm_bench {
    struct gemm_args a;
    const uint8_t *weights;
    size_t bytes;
    uint32_t copies;
};

static void gemm_record(struct bench *b, void *context)
{
    struct gemm_bench *g = context;
    for (uint32_t i = 0; i < g->copies; i++) {
        g->a.weight = g->weights + i * g->bytes;
        b->t->gemm(b->s, &g->a);
    }
}

static void bench_gemm(struct bench *b, double empty)
{
    static const struct {
        const char *name;
        uint32_t n, k;
    } shapes[] = {{"llama qkv", 6144, 4096},      {"llama o", 4096, 4096},
                  {"llama gate_up", 28672, 4096}, {"llama down", 4096, 14336},
                  {"llama head", 128256, 4096},   {"qwen3 qkv", 5120, 2048},
                  {"qwen3 o", 2048, 4096},        {"qwen3 head", 151936, 2048}};
    static const uint32_t rows[] = {1, 8, 16, 32, 64, 2048};
    for (size_t i = 0; i < sizeof shapes / sizeof *shapes; i++) {
        uint32_t n = shapes[i].n, k = shapes[i].k;
        struct gemm_bench g = {.bytes = (size_t)n * k * 2, .copies = n > 100000 ? 2 : LAYERS};
        void *weights = random_bf16(b, g.copies * g.bytes / 2, 0.05f);
        void *x = random_bf16(b, (size_t)2048 * k, 1);
        float *y = device_memory(b, (size_t)2048 * n * sizeof *y);
        g.weights = weights;
        for (size_t r = 0; r < sizeof rows / sizeof *rows; r++) {
            char shape[64];
            if (rows[r] == 2048 && n > 100000)
                continue;
            g.a =
                (struct gemm_args){.x = x, .y = y, .y_stride = n, .rows = rows[r], .n = n, .k = k};
            double s = (unit_seconds(b, gemm_record, &g) - empty) / g.copies;
            (void)snprintf(shape, sizeof shape, "%s %ux%u M=%u", shapes[i].name, n, k, rows[r]);
            if (rows[r] < 2048)
                print_bytes(b, "gemm", shape, s, (double)g.bytes);
            else
                print_operations(b, "gemm", shape, s, 2.0 * n * k * rows[r]);
            double theirs = cublas_dense(weights, g.copies, rows[r], n, k);
            if (rows[r] < 2048)
                print_bytes(b, "cublas bf16 out", shape, theirs, (double)g.bytes);
            else
                print_operations(b, "cublas bf16 out", shape, theirs, 2.0 * n * k * rows[r]);
        }
        b->t->release(b->device, weights);
        b->t->release(b->device, x);
        b->t->release(b->device, y);
    }
}

// ---- experts ----

struct moe_bench {
    uint32_t experts, top_k, hidden, units, rows, layers, per;
    uint8_t *arena;
    uint32_t *pages; // device, [layers][experts][per]
    uint32_t *need;
    uint32_t count[LAYERS][1024]; // tokens by expert
    uint32_t distinct;            // experts with tokens, all layers
    struct moe_work work[LAYERS];
    void *x;
    float *y;
    int stages; // 1 map, 2 and gate_up, 3 and down, 4 and combine
};

static void moe_record(struct bench *b, void *context)
{
    struct moe_bench *m = context;
    for (uint32_t l = 0; l < m->layers; l++) {
        struct expert_view view = {.arena = m->arena,
                                   .page_bytes = PAGE,
                                   .pages = m->pages + (size_t)l * m->experts * m->per,
                                   .pages_per_expert = m->per,
                                   .experts = m->experts,
                                   .down_tile = 2 * m->units / 64 * (m->hidden / 64)};
        struct moe_map_args map = {.work = m->work[l],
                                   .view = view,
                                   .need = m->need,
                                   .rows = m->rows,
                                   .top_k = m->top_k,
                                   .layer = l};
        struct moe_gemm_args g = {.work = m->work[l],
                                  .view = view,
                                  .x = m->x,
                                  .rows = m->rows,
                                  .dim = m->hidden,
                                  .intermediate = m->units,
                                  .top_k = m->top_k,
                                  .layer = l};
        struct moe_combine_args c = {
            .work = m->work[l], .y = m->y, .rows = m->rows, .dim = m->hidden, .top_k = m->top_k};
        b->t->moe_map(b->s, &map);
        if (m->stages >= 2)
            b->t->moe_gate_up(b->s, &g);
        if (m->stages >= 3)
            b->t->moe_down(b->s, &g);
        if (m->stages >= 4)
            b->t->moe_combine(b->s, &c);
    }
}

// Page numbers 0, 1, 2, ... or shuffled over the arena.
static void pages_make(struct bench *b, struct moe_bench *m, uint32_t arena_pages, bool shuffled)
{
    uint32_t used = m->layers * m->experts * m->per;
    uint32_t *numbers = malloc(arena_pages * sizeof *numbers);
    CHECK(numbers && used <= arena_pages);
    for (uint32_t i = 0; i < arena_pages; i++)
        numbers[i] = i;
    for (uint32_t i = 0; shuffled && i < used; i++) {
        uint32_t j = i + (uint32_t)rng_below(&b->rng, arena_pages - i), page = numbers[j];
        numbers[j] = numbers[i];
        numbers[i] = page;
    }
    CHECK(!b->t->upload(b->device, m->pages, numbers, used * sizeof *numbers));
    free(numbers);
}

// Uniform routing: top_k different experts for each row.
static void route(struct bench *b, struct moe_bench *m, uint32_t rows)
{
    uint32_t *expert = malloc((size_t)rows * m->top_k * sizeof *expert);
    CHECK(expert);
    m->rows = rows;
    m->distinct = 0;
    memset(m->count, 0, sizeof m->count);
    for (uint32_t l = 0; l < m->layers; l++) {
        for (uint32_t r = 0; r < rows; r++)
            for (uint32_t k = 0; k < m->top_k; k++) {
                uint32_t *e = expert + (size_t)r * m->top_k;
                bool again = true;
                while (again) {
                    e[k] = (uint32_t)rng_below(&b->rng, m->experts);
                    again = false;
                    for (uint32_t j = 0; j < k; j++)
                        again = again || e[j] == e[k];
                }
                m->distinct += m->count[l][e[k]]++ == 0;
            }
        CHECK(!b->t->upload(b->device, m->work[l].expert, expert,
                            (size_t)rows * m->top_k * sizeof *expert));
    }
    free(expert);
}

static void moe_areas(struct bench *b, struct moe_bench *m, uint32_t rows_max)
{
    size_t pairs = (size_t)rows_max * m->top_k;
    struct moe_work w = {.gate = random_f32(b, pairs),
                         .begin = device_memory(b, (m->experts + 1) * 4),
                         .order = device_memory(b, pairs * 4),
                         .state = device_memory(b, m->experts),
                         .hidden = device_memory(b, pairs * m->units * 2),
                         .out = device_memory(b, pairs * m->hidden * 4)};
    for (uint32_t l = 0; l < m->layers; l++) {
        m->work[l] = w;
        m->work[l].expert = device_memory(b, pairs * 4);
    }
    m->x = random_bf16(b, (size_t)rows_max * m->hidden, 1);
    m->y = device_memory(b, (size_t)rows_max * m->hidden * 4);
    m->need = NULL;
    CHECK(!b->t->alloc_host(b->device, m->experts * 4, (void **)&m->need));
}

struct expert_times {
    double map, gate_up, down, combine;
};

static struct expert_times moe_times(struct bench *b, struct moe_bench *m, double empty)
{
    double t[5] = {empty};
    for (m->stages = 1; m->stages <= 4; m->stages++)
        t[m->stages] = unit_seconds(b, moe_record, m);
    return (struct expert_times){(t[1] - t[0]) / m->layers, (t[2] - t[1]) / m->layers,
                                 (t[3] - t[2]) / m->layers, (t[4] - t[3]) / m->layers};
}

static void moe_print(const struct bench *b, const struct moe_bench *m, const char *name,
                      const struct expert_times *t, const char *pages)
{
    char shape[96];
    double each = (double)m->distinct / m->layers, units = m->units, hidden = m->hidden;
    double pairs = (double)m->rows * m->top_k;
    (void)snprintf(shape, sizeof shape, "%s %s B=%u distinct %.1f", name, pages, m->rows, each);
    if (m->rows <= 512) {
        print_bytes(b, "gate_up", shape, t->gate_up, each * units * hidden * 4);
        print_bytes(b, "down", shape, t->down, each * units * hidden * 2);
    } else {
        print_operations(b, "gate_up", shape, t->gate_up, pairs * units * hidden * 4);
        print_operations(b, "down", shape, t->down, pairs * units * hidden * 2);
    }
    print_bytes(b, "map", shape, t->map, pairs * 8);
    print_bytes(b, "combine", shape, t->combine, pairs * hidden * 4);
}

static void compare_cublas(struct bench *b, struct moe_bench *m, const char *name)
{
    static const char *const sides[] = {"gate_up", "down"};
    for (int down = 0; down < 2; down++) {
        uint32_t n = down ? m->hidden : 2 * m->units, k = down ? m->units : m->hidden;
        uint32_t layers = m->layers < 4 ? m->layers : 4;
        double bytes = (double)m->distinct / m->layers * n * k * 2;
        double operations = 2.0 * m->rows * m->top_k * n * k;
        double grouped = cublas_grouped(m->arena, layers, m->experts, m->count[0], n, k);
        double loop = cublas_loop(m->arena, layers, m->experts, m->count[0], n, k);
        char shape[96], what[64];
        (void)snprintf(shape, sizeof shape, "%s contiguous B=%u", name, m->rows);
        for (int way = 0; way < 2; way++) {
            double s = way ? loop : grouped;
            (void)snprintf(what, sizeof what, "cublas %s %s", way ? "loop" : "grouped",
                           sides[down]);
            if (m->rows <= 512)
                print_bytes(b, what, shape, s, bytes);
            else
                print_operations(b, what, shape, s, operations);
        }
    }
}

static void bench_moe(struct bench *b, const char *name, uint32_t experts, uint32_t top_k,
                      uint32_t hidden, uint32_t units, uint32_t layers, const uint32_t *rows,
                      size_t count, double empty)
{
    struct moe_bench m = {.experts = experts,
                          .top_k = top_k,
                          .hidden = hidden,
                          .units = units,
                          .layers = layers,
                          .per = (uint32_t)((size_t)3 * hidden * units * 2 / PAGE)};
    uint32_t used = layers * experts * m.per, arena_pages = used + used / 2;
    m.arena = random_bf16(b, (size_t)arena_pages * PAGE / 2, 0.05f);
    m.pages = device_memory(b, used * 4);
    moe_areas(b, &m, rows[count - 1]);
    for (size_t i = 0; i < count; i++) {
        route(b, &m, rows[i]);
        pages_make(b, &m, arena_pages, true);
        struct expert_times paged = moe_times(b, &m, empty);
        moe_print(b, &m, name, &paged, "paged");
        pages_make(b, &m, arena_pages, false);
        struct expert_times linear = moe_times(b, &m, empty);
        moe_print(b, &m, name, &linear, "contiguous");
        if (rows[i] != 4 && rows[i] != 16)
            compare_cublas(b, &m, name);
    }
    b->t->release(b->device, m.arena);
    for (uint32_t l = 0; l < layers; l++)
        b->t->release(b->device, m.work[l].expert);
    b->t->release(b->device, m.work[0].out);
    b->t->release(b->device, m.work[0].hidden);
}

static void bench_experts(struct bench *b, double empty)
{
    static const uint32_t rows[] = {1, 4, 8, 16, 32, 64, 128, 256, 512, 1024};
    bench_moe(b, "qwen3-30b", 128, 8, 2048, 768, LAYERS, rows, 10, empty);
    bench_moe(b, "olmoe", 64, 8, 2048, 1024, LAYERS, rows, 7, empty);
    bench_moe(b, "mixtral", 8, 2, 4096, 14336, 2, rows, 7, empty);
}

static void bench_prefill(struct bench *b, double empty)
{
    static const uint32_t rows[] = {2048, 4096, 8192};
    bench_moe(b, "qwen3-30b", 128, 8, 2048, 768, 3, rows, 3, empty);
}

// ---- attention ----

struct attention_bench {
    struct attention_args a;
    struct qk_args qk;
    bool only_qk;
};

static void attention_record(struct bench *b, void *context)
{
    struct attention_bench *x = context;
    for (uint32_t l = 0; l < LAYERS; l++) {
        x->a.layer = x->qk.layer = l;
        if (x->only_qk)
            b->t->qk_norm_rope_kv(b->s, &x->qk);
        else
            b->t->attention(b->s, &x->a);
    }
}

// `rows` decode rows with `context` tokens each, or one chunk of `rows` that ends there.
static void attention_case(struct bench *b, const char *name, uint32_t heads, uint32_t kv_heads,
                           uint32_t rows, uint32_t context, uint32_t common, bool chunk,
                           double empty)
{
    enum { DIM = 128, BLOCK = 16 };
    uint32_t sequences = chunk ? 1 : rows, blocks = context / BLOCK;
    size_t part = (size_t)2 * kv_heads * BLOCK * DIM * 2, page = part * LAYERS;
    uint32_t all = sequences * blocks;
    uint32_t *pages = malloc(all * 4), *sequence = malloc(rows * 4), *position = malloc(rows * 4);
    CHECK(pages && sequence && position);
    for (uint32_t i = 0; i < all; i++)
        pages[i] = i;
    for (uint32_t i = 0; i + 1 < all; i++) {
        uint32_t j = i + (uint32_t)rng_below(&b->rng, all - i), kept = pages[i];
        pages[i] = pages[j];
        pages[j] = kept;
    }
    for (uint32_t r = 1; r < sequences; r++) // the first `common` tokens are in the same pages
        memcpy(pages + (size_t)r * blocks, pages, common / BLOCK * sizeof *pages);
    for (uint32_t r = 0; r < rows; r++) {
        sequence[r] = chunk ? 0 : r;
        position[r] = chunk ? context - rows + r : context - 1;
    }
    size_t cols = (size_t)heads * DIM, stride = cols + (size_t)2 * kv_heads * DIM;
    struct kv_view kv = {.arena = random_bf16(b, all * page / 2, 1),
                         .page_bytes = page,
                         .pages = uploaded(b, pages, all * 4),
                         .blocks_max = blocks,
                         .shape = {LAYERS, kv_heads, DIM, BLOCK, 1, LAYERS, part}};
    float *q = random_f32(b, rows * stride), *norm = random_f32(b, DIM);
    const uint32_t *device_sequence = uploaded(b, sequence, rows * 4);
    const uint32_t *device_position = uploaded(b, position, rows * 4);
    struct attention_bench x = {.a = {.q = q,
                                      .q_stride = stride,
                                      .out = device_memory(b, row_bucket(rows) * cols * 2),
                                      .sequence = device_sequence,
                                      .position = device_position,
                                      .kv = kv,
                                      .rows = rows,
                                      .heads = heads,
                                      .scale = 0.088f},
                                .qk = {q, q + cols, q + cols + (size_t)kv_heads * DIM, stride,
                                       stride, stride, norm, norm, norm, device_sequence,
                                       device_position, kv, rows, heads, 0, 1e-6f}};
    double s = (unit_seconds(b, attention_record, &x) - empty) / LAYERS;
    char shape[96];
    (void)snprintf(shape, sizeof shape, "%s %s rows %u context %u%s", name,
                   chunk ? "prefill" : "decode", rows, context, common ? " shared" : "");
    if (chunk) {
        double seen = 0;
        for (uint32_t r = 0; r < rows; r++)
            seen += position[r] + 1;
        print_operations(b, "attention", shape, s, 4.0 * heads * DIM * seen);
    } else {
        print_bytes(b, "attention", shape, s, (double)rows * context * kv_heads * DIM * 4);
    }
    x.only_qk = true;
    s = (unit_seconds(b, attention_record, &x) - empty) / LAYERS;
    print_bytes(b, "qk_norm_rope_kv", shape, s, (double)rows * (double)(stride * 4 + cols * 4));
    b->t->release(b->device, kv.arena);
    b->t->release(b->device, q);
    free(pages);
    free(sequence);
    free(position);
}

static void bench_attention(struct bench *b, double empty)
{
    static const uint32_t rows[] = {1, 8, 32, 64};
    for (size_t i = 0; i < sizeof rows / sizeof *rows; i++) {
        attention_case(b, "llama 32/8", 32, 8, rows[i], 1024, 0, false, empty);
        attention_case(b, "qwen3 32/4", 32, 4, rows[i], 1024, 0, false, empty);
        attention_case(b, "olmoe 16/16", 16, 16, rows[i], 1024, 0, false, empty);
    }
    attention_case(b, "llama 32/8", 32, 8, 1, 32768, 0, false, empty);
    attention_case(b, "llama 32/8", 32, 8, 2048, 2048, 0, true, empty);
    attention_case(b, "llama 32/8", 32, 8, 512, 8192, 0, true, empty);
    for (uint32_t common = 0; common <= 1920; common += 1920) {
        attention_case(b, "llama 32/8", 32, 8, 64, 2048, common, false, empty);
        attention_case(b, "olmoe 16/16", 16, 16, 64, 2048, common, false, empty);
    }
}

// ---- LoRA ----

struct lora_bench {
    struct lora_batch batch;
    uint32_t rows;
    void *x, *mid;
    float *y, *hidden[3];
};

enum { LORA_HIDDEN = 4096, LORA_UNITS = 14336, LORA_KV = 1024 };

// All seven projections of Llama-3-8B.
static void lora_record(struct bench *b, void *context)
{
    static const struct {
        enum lora_module module;
        uint32_t in, out, buffer;
        int half;
    } list[] = {
        {LORA_Q, LORA_HIDDEN, LORA_HIDDEN, 0, -1},  {LORA_K, LORA_HIDDEN, LORA_KV, 1, -1},
        {LORA_V, LORA_HIDDEN, LORA_KV, 2, -1},      {LORA_O, LORA_HIDDEN, LORA_HIDDEN, 0, -1},
        {LORA_GATE, LORA_HIDDEN, LORA_UNITS, 0, 0}, {LORA_UP, LORA_HIDDEN, LORA_UNITS, 1, 1},
        {LORA_DOWN, LORA_UNITS, LORA_HIDDEN, 0, -1}};
    static const int groups[][2] = {{0, 3}, {3, 4}, {4, 6}, {6, 7}};
    struct lora_bench *l = context;
    for (uint32_t layer = 0; layer < 4; layer++)
        for (size_t g = 0; g < sizeof groups / sizeof *groups; g++) {
            for (int i = groups[g][0]; i < groups[g][1]; i++)
                b->t->lora_shrink(
                    b->s, &(struct lora_shrink_args){.batch = &l->batch,
                                                     .x = list[i].in == LORA_UNITS ? l->mid : l->x,
                                                     .hidden = l->hidden[list[i].buffer],
                                                     .layer = layer,
                                                     .d_in = list[i].in,
                                                     .module = list[i].module});
            for (int i = groups[g][0]; i < groups[g][1]; i++)
                b->t->lora_expand(b->s,
                                  &(struct lora_expand_args){.batch = &l->batch,
                                                             .hidden = l->hidden[list[i].buffer],
                                                             .y = l->y,
                                                             .y_stride = 2 * LORA_UNITS,
                                                             .layer = layer,
                                                             .d_out = list[i].out,
                                                             .module = list[i].module,
                                                             .interleave_half = list[i].half});
        }
}

struct slice_cursor {
    uint32_t slot, byte;
};

static struct lora_slice slice_next(struct slice_cursor *c, uint32_t rank, uint32_t cols)
{
    struct lora_slice s = {.row_bytes = cols * 2, .rank = rank};
    if (c->byte + s.row_bytes > PAGE) {
        c->slot++;
        c->byte = 0;
    }
    s.first_slot = c->slot;
    s.first_byte = c->byte;
    for (uint32_t r = 0; r < rank; r++) {
        if (c->byte + s.row_bytes > PAGE) {
            c->slot++;
            c->byte = 0;
        }
        c->byte += s.row_bytes;
    }
    return s;
}

// `count` adapters with ranks[i % ranks] (padded: read at `padded`), one row each. Returns seconds
// for four layers and the bytes that the true ranks need.
static double lora_case(struct bench *b, uint32_t count, const uint32_t *ranks, uint32_t kinds,
                        uint32_t padded, double *bytes, double empty)
{
    enum { LAYERS_HERE = 4 };
    static const uint32_t in[] = {4096, 4096, 4096, 4096, 4096, 4096, 14336};
    static const uint32_t out[] = {4096, 1024, 1024, 4096, 14336, 14336, 4096};
    struct lora_adapter_view *views = calloc(count, sizeof *views);
    uint32_t *begin = malloc((count + 1) * 4), *adapter = malloc(count * 4), rank_max = 0;
    uint8_t *arena = random_bf16(b, (size_t)6 << 30, 0.02f);
    uint32_t pages_all = (uint32_t)(((size_t)12 << 30) / PAGE), next = 0;
    CHECK(views && begin && adapter);
    *bytes = 0;
    for (uint32_t a = 0; a < count; a++) {
        struct lora_pair pairs[LAYERS_HERE * LORA_MODULES];
        struct slice_cursor cursor = {0};
        uint32_t rank = padded ? padded : ranks[a % kinds];
        for (uint32_t i = 0; i < LAYERS_HERE * LORA_MODULES; i++) {
            uint32_t module = i % LORA_MODULES;
            pairs[i] = (struct lora_pair){.a = slice_next(&cursor, rank, in[module]),
                                          .b = slice_next(&cursor, rank, out[module]),
                                          .scale = 0.5f};
            *bytes += 2.0 * ranks[a % kinds] * (in[module] + out[module]);
        }
        uint32_t slots = cursor.slot + 1, *numbers = malloc(slots * 4);
        CHECK(numbers && next + slots <= pages_all);
        for (uint32_t i = 0; i < slots; i++)
            numbers[i] = (next + i) * 5 % (pages_all / 2);
        next += slots;
        views[a] = (struct lora_adapter_view){.pages = uploaded(b, numbers, slots * 4),
                                              .pairs = uploaded(b, pairs, sizeof pairs),
                                              .experts = 1};
        free(numbers);
        begin[a] = adapter[a] = a;
        rank_max = rank > rank_max ? rank : rank_max;
    }
    begin[count] = count;
    struct lora_bench l = {.rows = count,
                           .batch = {.arena = arena,
                                     .page_bytes = PAGE,
                                     .segments = count,
                                     .rows = count,
                                     .row_begin = uploaded(b, begin, (count + 1) * 4),
                                     .adapter = uploaded(b, adapter, count * 4),
                                     .adapters = uploaded(b, views, count * sizeof *views),
                                     .rank_max = rank_max},
                           .x = random_bf16(b, (size_t)row_bucket(count) * LORA_HIDDEN, 1),
                           .mid = random_bf16(b, (size_t)row_bucket(count) * LORA_UNITS, 1),
                           .y = device_memory(b, (size_t)row_bucket(count) * 2 * LORA_UNITS * 4)};
    for (int i = 0; i < 3; i++)
        l.hidden[i] = device_memory(b, (size_t)row_bucket(count) * rank_max * 4);
    double s = unit_seconds(b, lora_record, &l) - empty;
    b->t->release(b->device, arena);
    free(views);
    free(begin);
    free(adapter);
    return s;
}

static void bench_lora(struct bench *b, double empty)
{
    static const uint32_t sixteen[] = {16}, mixed[] = {8, 16, 32, 64};
    static const uint32_t counts[] = {1, 8, 32, 64};
    double bytes;
    for (size_t i = 0; i < sizeof counts / sizeof *counts; i++) {
        char shape[96];
        double s = lora_case(b, counts[i], sixteen, 1, 0, &bytes, empty);
        (void)snprintf(shape, sizeof shape, "llama, 7 projections, 4 layers, %u x rank 16",
                       counts[i]);
        print_bytes(b, "lora", shape, s, bytes);
    }
    double s = lora_case(b, 64, mixed, 4, 0, &bytes, empty);
    print_bytes(b, "lora", "llama, 7 projections, 4 layers, 64 x ranks 8 16 32 64", s, bytes);
    double padded = lora_case(b, 64, mixed, 4, 64, &bytes, empty);
    print_bytes(b, "lora", "the same padded to rank 64", padded, bytes);
    print("lora", "padded / true rank", 0, "times", padded / s, 0, 0);
}

// ---- small operations ----

struct small_bench {
    struct rmsnorm_args norm;
    struct swiglu_args swiglu;
    struct router_args router;
    struct sample_args sample;
    int which;
};

static void small_record(struct bench *b, void *context)
{
    struct small_bench *x = context;
    for (uint32_t i = 0; i < 4 * LAYERS; i++) {
        switch (x->which) {
        case 0:
            b->t->rmsnorm(b->s, &x->norm);
            break;
        case 1:
            b->t->swiglu(b->s, &x->swiglu);
            break;
        case 2:
            b->t->router(b->s, &x->router);
            break;
        default:
            b->t->sample(b->s, &x->sample);
        }
    }
}

static void small_case(struct bench *b, uint32_t rows, double empty)
{
    enum { HIDDEN = 4096, UNITS = 14336, EXPERTS = 128, VOCAB = 151936 };
    static const char *const names[] = {"rmsnorm", "swiglu", "router", "sample greedy",
                                        "sample top_p"};
    uint32_t samples = rows < 64 ? rows : 64, bucket = row_bucket(rows);
    struct sample_params *params = NULL;
    int32_t *token = NULL;
    CHECK(!b->t->alloc_host(b->device, samples * sizeof *params, (void **)&params));
    CHECK(!b->t->alloc_host(b->device, samples * 4, (void **)&token));
    float *x = random_f32(b, (size_t)bucket * HIDDEN), *weight = random_f32(b, HIDDEN);
    float *wide = random_f32(b, (size_t)bucket * 2 * UNITS);
    struct small_bench s = {
        .norm = {x, weight, device_memory(b, (size_t)bucket * HIDDEN * 2), NULL, rows, HIDDEN,
                 1e-6f},
        .swiglu = {wide, 2 * UNITS, device_memory(b, (size_t)bucket * UNITS * 2), rows, UNITS},
        .router = {x, random_f32(b, (size_t)EXPERTS * 2048), device_memory(b, bucket * 32),
                   device_memory(b, bucket * 32), rows, 2048, EXPERTS, 8, true},
        .sample = {.logits = random_f32(b, (size_t)samples * VOCAB),
                   .stride = VOCAB,
                   .vocab = VOCAB,
                   .rows = samples,
                   .params = params,
                   .token = token}};
    double bytes[] = {(double)rows * HIDDEN * 6, (double)rows * UNITS * 10,
                      (double)rows * 2048 * 4 + EXPERTS * 2048 * 4, (double)samples * VOCAB * 4,
                      (double)samples * VOCAB * 4};
    for (s.which = 0; s.which < 5; s.which++) {
        char shape[64];
        if (s.which >= 3 && rows > 64)
            break;
        for (uint32_t i = 0; i < samples; i++)
            params[i] = (struct sample_params){s.which == 4 ? 0.8f : 0.0f, s.which == 4 ? 0.95f : 1,
                                               0, i, 1};
        double t = (unit_seconds(b, small_record, &s) - empty) / (4 * LAYERS);
        (void)snprintf(shape, sizeof shape, "rows %u", s.which >= 3 ? samples : rows);
        print_bytes(b, names[s.which], shape, t, bytes[s.which]);
    }
    b->t->release(b->device, x);
    b->t->release(b->device, wide);
}

static void bench_small(struct bench *b, double empty)
{
    static const uint32_t rows[] = {1, 8, 64, 2048};
    for (size_t i = 0; i < sizeof rows / sizeof *rows; i++)
        small_case(b, rows[i], empty);
}

int main(int argc, char **argv)
{
    static const struct {
        const char *name;
        void (*run)(struct bench *b, double empty);
    } parts[] = {{"gemm", bench_gemm},       {"experts", bench_experts},
                 {"prefill", bench_prefill}, {"attention", bench_attention},
                 {"lora", bench_lora},       {"small", bench_small}};
    struct bench b = {.rng = {1, 0}};
    struct fault fault = {.text = ""};
    struct cuda_options options = {.dtype = DTYPE_BF16};
    if (device_create_cuda(&options, &b.device, &fault)) {
        (void)printf("SKIPPED: %s\n", fault.text);
        return 77;
    }
    b.t = b.device->table;
    CHECK(!b.t->stream_create(b.device, 4096, &b.s));
    b.read = ceiling_read();
    b.copy = ceiling_copy();
    b.matmul = ceiling_matmul();
    double empty = unit_seconds(&b, nothing, NULL);
    struct device_info info;
    b.t->info(b.device, &info);
    (void)printf("{\"bench\":\"kernels_cuda\",\"what\":\"ceilings\",\"device\":\"%s\",\"read_gb_"
                 "per_s\":%.1f,"
                 "\"copy_gb_per_s\":%.1f,\"matmul_tflop_per_s\":%.1f,\"empty_segment_us\":%.2f}\n",
                 info.name, b.read * 1e-9, b.copy * 1e-9, b.matmul * 1e-12, empty * 1e6);
    for (size_t i = 0; i < sizeof parts / sizeof *parts; i++) {
        bool wanted = argc == 1;
        for (int a = 1; a < argc; a++)
            wanted = wanted || !strcmp(argv[a], parts[i].name);
        if (wanted)
            parts[i].run(&b, empty);
    }
    b.t->stream_destroy(b.s);
    b.t->destroy(b.device);
    return 0;
}
