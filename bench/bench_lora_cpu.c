// SPDX-License-Identifier: Apache-2.0
// What LoRA of many adapters adds to the layers of a model on the CPU, operation by operation.
//
//   bench_lora_cpu [--threads N] [--reps N] [--only attention|experts] [--shape N]
//
// One layer after the other as in a decode step, every row with an adapter of its own, slices
// packed as the store packs them over scattered pages. Two cases per shape:
//   attention  shrink and expand of q, k, v and o, nothing else
//   experts    moe_map, gate+up and down with LoRA, minus the same without
// Every repetition draws routes and adapters anew and measures one after the other: the base, the
// base with LoRA, and the true work alone, all threads reading the step's slices once and doing
// nothing with them, each fetched ahead while the one before is read. The median of each is
// printed: base_us, added_us (with LoRA, less the base), read_us, and
//   over_base_and_work   (base + added) / (base + read)
//   slices_gbytes_per_s  bytes over read_us
// each also in processor time over the number of threads (_cpu), for a machine that others use,
// too. read_gbytes_per_s is the ceiling of long reads (bench_kernels_ceiling.h): slices of a few
// KiB each are read slower. The numbers are not checked here (test_kernels_lora, test_kernels_moe).
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#include "base/check.h"
#include "base/rng.h"
#include "bench/bench_kernels_ceiling.h"
#include "kernels/device.h"

enum {
    REPS_MAX = 256,
    ARENA_BYTES = 1 << 30,
    PAGE_BYTES = 64 << 10,
    ADAPTERS = 40,
    ROWS_MAX = 64,
    PIECES_MAX = 16384
};

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

struct piece {
    const uint8_t *at;
    size_t bytes;
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
    struct piece pieces[PIECES_MAX]; // the slices of a step
    uint32_t piece_count;
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
        b->views[i] =
            (struct lora_adapter_view){.pages = b->pages, .pairs = pairs, .experts = h->experts};
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
    b->experts = (struct expert_view){b->arena, PAGE_BYTES, b->pages + b->cursor / PAGE_BYTES,
                                      each,     h->experts, (uint32_t)up};
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
    b->work = (struct moe_work){need(b, pairs * 4),
                                need(b, pairs * 4),
                                need(b, (h->experts + 1) * 4),
                                need(b, pairs * 4),
                                need(b, h->experts),
                                need(b, b->t->act_bytes(b->device, pairs, h->units)),
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
            b->t->lora_shrink(b->s, &(struct lora_shrink_args){&b->batch, b->act, b->hidden[m % 3],
                                                               l, in, (enum lora_module)m});
            b->t->lora_expand(b->s,
                              &(struct lora_expand_args){&b->batch, b->hidden[m % 3], b->y, stride,
                                                         l, out, (enum lora_module)m, -1});
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

// ---- the slices alone ----

static void slice_add(struct bench *b, const struct lora_adapter_view *view,
                      const struct lora_slice *slice)
{
    for (uint32_t r = 0; r < slice->rank; r++) {
        const uint8_t *at = lora_row_at(b->arena, PAGE_BYTES, view->pages, slice, r);
        struct piece *last = &b->pieces[b->piece_count];
        if (b->piece_count && last[-1].at + last[-1].bytes == at) {
            last[-1].bytes += slice->row_bytes;
        } else {
            CHECK(b->piece_count < PIECES_MAX);
            *last = (struct piece){at, slice->row_bytes};
            b->piece_count++;
        }
    }
}

static void pieces_list(struct bench *b, bool experts)
{
    const struct shape *h = b->shape;
    b->piece_count = 0;
    for (uint32_t l = 0; l < h->layers; l++)
        for (uint32_t i = 0; i < (experts ? h->rows * h->top_k : h->rows); i++) {
            const struct lora_adapter_view *view =
                &b->views[b->adapter[experts ? i / h->top_k : i]];
            for (uint32_t m = experts ? LORA_GATE : LORA_Q; m <= (experts ? LORA_DOWN : LORA_O);
                 m++) {
                const struct lora_pair *pair =
                    lora_pair_at(view, l, (enum lora_module)m, experts ? b->work.expert[i] : 0);
                slice_add(b, view, &pair->a);
                slice_add(b, view, &pair->b);
            }
        }
}

struct reader {
    const struct bench *b;
    uint32_t index;
    uint64_t sum;
    struct times times;
};

static void *read_main(void *context)
{
    struct reader *r = context;
    typedef uint64_t vu64 __attribute__((vector_size(64)));
    double wall = bench_time(CLOCK_MONOTONIC), cpu = bench_time(CLOCK_THREAD_CPUTIME_ID);
    vu64 sum = {0};
    uint32_t count = r->b->piece_count, threads = r->b->info.threads;
    for (uint32_t i = r->index; i < count; i += threads) {
        const struct piece *now = &r->b->pieces[i], *next = now + threads;
        for (size_t byte = 0; i + threads < count && byte < next->bytes; byte += 64)
            __builtin_prefetch(next->at + byte, 0, 2);
        for (size_t byte = 0; byte < now->bytes; byte += sizeof sum) {
            vu64 v;
            memcpy(&v, now->at + byte, sizeof v);
            sum ^= v;
        }
    }
    r->sum = sum[0] ^ sum[3];
    r->times = (struct times){bench_time(CLOCK_MONOTONIC) - wall,
                              bench_time(CLOCK_THREAD_CPUTIME_ID) - cpu};
    return NULL;
}

static struct times read_pieces(struct bench *b)
{
    pthread_t thread[CEILING_THREADS];
    struct reader reader[CEILING_THREADS];
    struct times times = {0, 0};
    for (uint32_t i = 0; i < b->info.threads; i++) {
        reader[i] = (struct reader){.b = b, .index = i};
        CHECK(!pthread_create(&thread[i], NULL, read_main, &reader[i]));
    }
    for (uint32_t i = 0; i < b->info.threads; i++) {
        pthread_join(thread[i], NULL);
        times.wall = reader[i].times.wall > times.wall ? reader[i].times.wall : times.wall;
        times.cpu += reader[i].times.cpu / b->info.threads;
    }
    return times;
}

// ---- a case ----

struct series {
    double wall[REPS_MAX], cpu[REPS_MAX];
    uint32_t count;
};

static void series_add(struct series *s, struct times times)
{
    s->wall[s->count] = times.wall;
    s->cpu[s->count++] = times.cpu;
}

static struct times series_median(struct series *s)
{
    return (struct times){median(s->wall, s->count), median(s->cpu, s->count)};
}

static void measure(struct bench *b, const char *what, uint32_t reps,
                    void (*record)(struct bench *b))
{
    static struct series base, with, read; // too large for the stack
    const struct shape *h = b->shape;
    double ceiling[REPS_MAX], bytes = 0;
    base.count = with.count = read.count = 0;
    for (uint32_t i = 0; i < reps; i++) {
        draw_adapters(b);
        draw_experts(b);
        pieces_list(b, record == experts_record);
        ceiling[i] = ceiling_rate(&b->ceiling, false).wall;
        series_add(&base, step(b, record, false));
        series_add(&with, step(b, record, true));
        (void)ceiling_rate(&b->ceiling, false); // so that no slice is in a cache
        series_add(&read, read_pieces(b));
        for (uint32_t p = 0; p < b->piece_count; p++)
            bytes += (double)b->pieces[p].bytes / reps;
    }
    struct times t0 = series_median(&base), t1 = series_median(&with), t2 = series_median(&read);
    printf("{\"bench\":\"lora_cpu\",\"commit\":\"%s\",\"device\":\"%s\",\"case\":\"%s\",\"shape\":"
           "\"%s\",\"rows\":%u,\"ranks\":[%u,%u],\"adapters\":%d,\"bytes\":%.0f,"
           "\"read_gbytes_per_s\":%.2f,\"slices_gbytes_per_s\":%.2f,",
           POLDER_COMMIT, b->info.name, what, h->name, h->rows, h->ranks[0], h->ranks[1], ADAPTERS,
           bytes, median(ceiling, reps) * 1e-9, bytes / t2.wall * 1e-9);
    printf("\"base_us\":%.1f,\"added_us\":%.1f,\"read_us\":%.1f,\"over_base_and_work\":%.3f,"
           "\"base_cpu_us\":%.1f,\"added_cpu_us\":%.1f,\"read_cpu_us\":%.1f,"
           "\"over_base_and_work_cpu\":%.3f}\n",
           t0.wall * 1e6, (t1.wall - t0.wall) * 1e6, t2.wall * 1e6, t1.wall / (t0.wall + t2.wall),
           t0.cpu * 1e6, (t1.cpu - t0.cpu) * 1e6, t2.cpu * 1e6, t1.cpu / (t0.cpu + t2.cpu));
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
    uint32_t reps = 100, first = 0, end = ARRAY_COUNT(shapes);
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
