// SPDX-License-Identifier: Apache-2.0
// What LoRA of many adapters adds to the layers of a model on the CPU, operation by operation.
//
//   bench_lora_cpu [--threads N] [--reps N] [--only attention|experts] [--shape N]
//
// One layer after the other as in a decode step, every row with an adapter of its own, slices packed
// as the store packs them over scattered pages. Two cases per shape:
//   attention  shrink and expand of q, k, v and o, nothing else
//   experts    moe_map, gate+up and down with LoRA, minus the same without
// Every repetition draws routes and adapters anew and measures one after the other: the read rate and
// the dot rate of all threads (bench_kernels_ceiling.h), the base, and the base with LoRA. Printed are
// medians: added_us of a step; floor_us, the larger of the bytes of the distinct slices over the read
// rate and of the multiplications over the dot rate; and their ratio. The _cpu ones are the same in
// processor time over the number of threads, for a machine that others use, too. The numbers are not
// checked here (test_kernels_lora, test_kernels_moe).
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#include "base/check.h"
#include "base/rng.h"
#include "bench/bench_kernels_ceiling.h"
#include "kernels/device.h"

enum { REPS_MAX = 256, ARENA_BYTES = 1 << 30, PAGE_BYTES = 64 << 10, ADAPTERS = 40, ROWS_MAX = 64 };

struct shape {
    const char *name;
    uint32_t layers, hidden, heads_dim, kv_dim, units, experts, top_k, rows, ranks[2];
};

static const struct shape shapes[] = {
    {"demo", 8, 256, 256, 128, 64, 32, 4, 16, {8, 16}},
    {"demo", 8, 256, 256, 128, 64, 32, 4, 16, {16, 32}},
    {"demo", 8, 256, 256, 128, 64, 32, 4, 1, {8, 16}},
    {"wide", 1, 2048, 4096, 512, 768, 32, 8, 8, {8, 16}},
};

struct bench {
    struct device *device;
    const struct device_table *t;
    struct stream *s;
    struct device_info info;
    struct ceiling ceiling;
    const struct shape *shape;
    struct rng rng;
    uint8_t *arena;
    uint32_t *pages; // scattered
    size_t cursor;   // next unused byte behind them
    // of the shape
    struct lora_adapter_view views[ADAPTERS];
    struct lora_batch batch;
    uint32_t row_begin[ROWS_MAX + 1], adapter[ROWS_MAX];
    struct expert_view experts; // the layers follow one another in its pages
    struct moe_work work;
    uint32_t *need;
    void *act;
    float *hidden[3], *y;
    bool lora_on;
};

static void *need(struct bench *b, size_t bytes)
{
    void *out;
    CHECK(b->t->alloc(b->device, bytes, &out) == STATUS_OK);
    memset(out, 0, bytes);
    return out;
}

// ---- placing ----

static struct lora_slice slice_place(struct bench *b, uint32_t cols, uint32_t rank)
{
    uint32_t bytes = (uint32_t)round_up(cols * 2, 64);
    struct lora_slice slice = {0, 0, bytes, rank};
    for (uint32_t r = 0; r < rank; r++) {
        if (b->cursor % PAGE_BYTES + bytes > PAGE_BYTES)
            b->cursor = round_up(b->cursor, PAGE_BYTES);
        if (r == 0) {
            slice.first_slot = (uint32_t)(b->cursor / PAGE_BYTES);
            slice.first_byte = (uint32_t)(b->cursor % PAGE_BYTES);
        }
        b->cursor += bytes;
    }
    CHECK(b->cursor < ARENA_BYTES);
    return slice;
}

static void module_dims(const struct shape *h, uint32_t module, uint32_t *in, uint32_t *out)
{
    const uint32_t from[LORA_MODULES] = {h->hidden, h->hidden, h->hidden, h->heads_dim,
                                         h->hidden, h->hidden, h->units};
    const uint32_t to[LORA_MODULES] = {h->heads_dim, h->kv_dim, h->kv_dim, h->hidden,
                                       h->units,     h->units,  h->hidden};
    *in = from[module];
    *out = to[module];
}

static void pair_place(struct bench *b, struct lora_pair *pairs, uint32_t layer, uint32_t module,
                       uint32_t expert, uint32_t rank)
{
    const struct shape *h = b->shape;
    uint32_t in, out;
    module_dims(h, module, &in, &out);
    pairs[((size_t)layer * LORA_MODULES + module) * h->experts + expert] = (struct lora_pair){
        .a = slice_place(b, in, rank), .b = slice_place(b, out, rank), .scale = 0.5f};
}

static void adapters_place(struct bench *b)
{
    const struct shape *h = b->shape;
    for (uint32_t i = 0; i < ADAPTERS; i++) {
        struct lora_pair *pairs =
            need(b, (size_t)h->layers * LORA_MODULES * h->experts * sizeof *pairs);
        b->views[i] = (struct lora_adapter_view){b->pages, pairs, h->experts};
        b->cursor = round_up(b->cursor, PAGE_BYTES);
        for (uint32_t l = 0; l < h->layers; l++) {
            for (uint32_t m = LORA_Q; m <= LORA_O; m++)
                pair_place(b, pairs, l, m, 0, h->ranks[i % 2]);
            for (uint32_t e = 0; e < h->experts; e++)
                for (uint32_t m = LORA_GATE; m <= LORA_DOWN; m++)
                    pair_place(b, pairs, l, m, e, h->ranks[i % 2]);
        }
    }
}

static void experts_place(struct bench *b)
{
    const struct shape *h = b->shape;
    size_t up = tile_count(DTYPE_BF16, tile_interleaved_rows(h->units), h->hidden);
    size_t tiles = up + tile_count(DTYPE_BF16, h->hidden, h->units);
    uint32_t each = (uint32_t)div_up(tiles * TILE_BYTES, PAGE_BYTES);
    b->cursor = round_up(b->cursor, PAGE_BYTES);
    b->experts = (struct expert_view){b->arena,   PAGE_BYTES, b->pages + b->cursor / PAGE_BYTES, each,
                                      h->experts, (uint32_t)up};
    b->cursor += (size_t)each * h->experts * h->layers * PAGE_BYTES;
    CHECK(b->cursor <= ARENA_BYTES);
}

static void shape_make(struct bench *b, const struct shape *h)
{
    size_t pairs = (size_t)h->rows * h->top_k, wide = h->heads_dim + h->hidden;
    b->shape = h;
    b->cursor = 0;
    adapters_place(b);
    experts_place(b);
    b->batch = (struct lora_batch){b->arena,     PAGE_BYTES, h->rows,  h->rows,
                                   b->row_begin, b->adapter, b->views, h->ranks[1]};
    b->work = (struct moe_work){
        need(b, pairs * 4),       need(b, pairs * 4),
        need(b, (h->experts + 1) * 4), need(b, pairs * 4),
        need(b, h->experts),      need(b, b->t->act_bytes(b->device, pairs, h->units)),
        need(b, pairs * h->hidden * 4)};
    b->need = need(b, h->experts * sizeof *b->need);
    b->act = need(b, b->t->act_bytes(b->device, h->rows, wide));
    for (int i = 0; i < 3; i++)
        b->hidden[i] = need(b, (size_t)h->rows * h->ranks[1] * 4);
    b->y = need(b, h->rows * wide * 4);
}

// ---- a step ----

static int compare_u32(const void *a, const void *b)
{
    uint32_t x = *(const uint32_t *)a, y = *(const uint32_t *)b;
    return (x > y) - (x < y);
}

// Other adapters for the rows, ascending.
static void draw_adapters(struct bench *b)
{
    uint32_t all[ADAPTERS], rows = b->shape->rows;
    CHECK(rows <= ADAPTERS);
    for (uint32_t i = 0; i < ADAPTERS; i++)
        all[i] = i;
    for (uint32_t i = 0; i < rows; i++) {
        uint32_t j = i + (uint32_t)rng_below(&b->rng, ADAPTERS - i), swap = all[i];
        all[i] = all[j];
        all[j] = swap;
    }
    qsort(all, rows, sizeof *all, compare_u32);
    for (uint32_t r = 0; r < rows; r++) {
        b->adapter[r] = all[r];
        b->row_begin[r] = r;
    }
    b->row_begin[rows] = rows;
}

static void draw_experts(struct bench *b)
{
    const struct shape *h = b->shape;
    for (uint32_t r = 0; r < h->rows; r++) {
        uint32_t first = (uint32_t)rng_below(&b->rng, h->experts);
        for (uint32_t k = 0; k < h->top_k; k++) {
            b->work.expert[r * h->top_k + k] = (first + k * (h->experts / h->top_k)) % h->experts;
            b->work.gate[r * h->top_k + k] = 0.25f;
        }
    }
}

static void experts_record(struct bench *b)
{
    const struct shape *h = b->shape;
    for (uint32_t l = 0; l < h->layers; l++) {
        struct expert_view view = b->experts;
        view.pages += (size_t)l * view.experts * view.pages_per_expert;
        struct moe_gemm_args gemm = {.work = b->work,
                                     .view = view,
                                     .x = b->act,
                                     .rows = h->rows,
                                     .dim = h->hidden,
                                     .intermediate = h->units,
                                     .top_k = h->top_k,
                                     .layer = l,
                                     .lora = b->lora_on ? &b->batch : NULL};
        b->t->moe_map(b->s, &(struct moe_map_args){.work = b->work,
                                                   .view = view,
                                                   .need = b->need,
                                                   .rows = h->rows,
                                                   .top_k = h->top_k,
                                                   .layer = l});
        b->t->moe_gate_up(b->s, &gemm);
        b->t->moe_down(b->s, &gemm);
    }
}

static void attention_record(struct bench *b)
{
    const struct shape *h = b->shape;
    size_t stride = h->heads_dim + h->hidden;
    for (uint32_t l = 0; b->lora_on && l < h->layers; l++)
        for (uint32_t m = LORA_Q; m <= LORA_O; m++) {
            uint32_t in, out;
            module_dims(h, m, &in, &out);
            b->t->lora_shrink(b->s, &(struct lora_shrink_args){&b->batch, b->act, b->hidden[m % 3], l,
                                                               in, (enum lora_module)m});
            b->t->lora_expand(b->s, &(struct lora_expand_args){&b->batch, b->hidden[m % 3], b->y,
                                                               stride, l, out, (enum lora_module)m,
                                                               -1});
        }
}

// ---- measuring ----

struct times {
    double wall, cpu;
};

static struct times step(struct bench *b, void (*record)(struct bench *b), bool lora)
{
    struct segment_result result;
    b->lora_on = lora;
    record(b);
    double wall = bench_time(CLOCK_MONOTONIC), cpu = bench_time(CLOCK_PROCESS_CPUTIME_ID);
    CHECK(b->t->submit(b->s) == STATUS_OK && b->t->wait(b->s, &result) == STATUS_OK);
    return (struct times){bench_time(CLOCK_MONOTONIC) - wall,
                          (bench_time(CLOCK_PROCESS_CPUTIME_ID) - cpu) / b->info.threads};
}

static int compare_double(const void *a, const void *b)
{
    double x = *(const double *)a, y = *(const double *)b;
    return (x > y) - (x < y);
}

static double median(double *values, uint32_t count)
{
    qsort(values, count, sizeof *values, compare_double);
    return values[count / 2];
}

// Bytes of the slices that a step reads, and multiplications of their elements with `rows` rows.
static void step_cost(const struct bench *b, bool experts, double *bytes, double *operations)
{
    const struct shape *h = b->shape;
    double elements = 0, ranks = (h->ranks[0] + h->ranks[1]) / 2.0;
    for (uint32_t m = experts ? LORA_GATE : LORA_Q; m <= (experts ? LORA_DOWN : LORA_O); m++) {
        uint32_t in, out;
        module_dims(h, m, &in, &out);
        elements += (double)(in + out) * ranks * (experts ? h->top_k : 1);
    }
    *bytes = elements * 2 * h->rows * h->layers; // every row has slices of its own
    *operations = elements * 2 * h->rows * h->layers;
}

static void measure(struct bench *b, const char *what, uint32_t reps,
                    void (*record)(struct bench *b))
{
    double base[REPS_MAX], with[REPS_MAX], base_cpu[REPS_MAX], with_cpu[REPS_MAX];
    double floor_s[REPS_MAX], floor_cpu[REPS_MAX], bytes, operations;
    const struct shape *h = b->shape;
    step_cost(b, record == experts_record, &bytes, &operations);
    for (uint32_t i = 0; i < reps; i++) {
        if (i % 8 == 0) {
            struct rate read = ceiling_rate(&b->ceiling, false),
                        dots = ceiling_rate(&b->ceiling, true);
            floor_s[i / 8] = bytes / read.wall > operations / dots.wall ? bytes / read.wall
                                                                        : operations / dots.wall;
            floor_cpu[i / 8] = bytes / read.cpu > operations / dots.cpu ? bytes / read.cpu
                                                                        : operations / dots.cpu;
        }
        draw_adapters(b);
        draw_experts(b);
        struct times without = step(b, record, false), lora = step(b, record, true);
        base[i] = without.wall;
        base_cpu[i] = without.cpu;
        with[i] = lora.wall;
        with_cpu[i] = lora.cpu;
    }
    double wall = median(base, reps), added = median(with, reps) - wall;
    double cpu = median(base_cpu, reps), added_cpu = median(with_cpu, reps) - cpu;
    uint32_t floors = (uint32_t)div_up(reps, 8);
    double floor_us = median(floor_s, floors), floor_c = median(floor_cpu, floors);
    printf("{\"bench\":\"lora_cpu\",\"commit\":\"%s\",\"device\":\"%s\",\"case\":\"%s\",\"shape\":"
           "\"%s\",\"rows\":%u,\"ranks\":[%u,%u],\"adapters\":%d,\"base_us\":%.1f,\"added_us\":%.1f,"
           "\"bytes\":%.0f,\"floor_us\":%.1f,\"floor_over_added\":%.3f,\"base_cpu_us\":%.1f,"
           "\"added_cpu_us\":%.1f,\"floor_cpu_us\":%.1f,\"floor_over_added_cpu\":%.3f}\n",
           POLDER_COMMIT, b->info.name, what, h->name, h->rows, h->ranks[0], h->ranks[1], ADAPTERS,
           wall * 1e6, added * 1e6, bytes, floor_us * 1e6, floor_us / added, cpu * 1e6,
           added_cpu * 1e6, floor_c * 1e6, floor_c / added_cpu);
    fflush(stdout);
}

// ---- life ----

static void arena_make(struct bench *b)
{
    uint32_t pages = ARENA_BYTES / PAGE_BYTES;
    b->arena = need(b, ARENA_BYTES);
    b->pages = need(b, pages * sizeof *b->pages);
    uint16_t *values = (uint16_t *)(void *)b->arena;
    for (size_t i = 0; i < ARENA_BYTES / 2; i++)
        values[i] = (uint16_t)(0x3c00 | (i * 2654435761u >> 13 & 0x81ff)); // about +-0.01
    for (uint32_t i = 0; i < pages; i++)
        b->pages[i] = (uint32_t)((uint64_t)i * 2741 % pages);
    b->ceiling = (struct ceiling){.set = b->info.instruction_set,
                                  .threads = b->info.threads,
                                  .from = b->arena,
                                  .bytes = ARENA_BYTES};
}

static enum status open_device(struct bench *b, const struct cpu_options *options)
{
    struct fault fault;
    enum status status = device_create_cpu(options, &b->device, &fault);
    if (status) {
        fprintf(stderr, "bench_lora_cpu: %s\n", fault.text);
        return status;
    }
    b->t = b->device->table;
    b->t->info(b->device, &b->info);
    CHECK(b->info.threads <= CEILING_THREADS);
    return b->t->stream_create(b->device, 1024, &b->s);
}

int main(int argc, char **argv)
{
    static struct bench b = {.rng = {3, 0}};
    struct cpu_options options = {.dtype = DTYPE_BF16};
    const char *only = NULL;
    uint32_t reps = 160, first = 0, end = ARRAY_COUNT(shapes);
    for (int i = 1; i + 1 < argc; i += 2) {
        if (!strcmp(argv[i], "--threads"))
            options.threads = (uint32_t)atoi(argv[i + 1]);
        else if (!strcmp(argv[i], "--reps"))
            reps = (uint32_t)atoi(argv[i + 1]);
        else if (!strcmp(argv[i], "--only"))
            only = argv[i + 1];
        else if (!strcmp(argv[i], "--shape"))
            first = (uint32_t)atoi(argv[i + 1]), end = first + 1;
    }
    CHECK(reps >= 1 && reps <= REPS_MAX);
    if (open_device(&b, &options))
        return 1;
    arena_make(&b);
    for (uint32_t i = first; i < end && i < ARRAY_COUNT(shapes); i++) {
        shape_make(&b, &shapes[i]);
        if (!only || !strcmp(only, "attention"))
            measure(&b, "attention", reps, attention_record);
        if (!only || !strcmp(only, "experts"))
            measure(&b, "experts", reps, experts_record);
    }
    b.t->stream_destroy(b.s);
    return 0;
}
