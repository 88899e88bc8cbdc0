// SPDX-License-Identifier: Apache-2.0
// Whole steps on the CPU device, on a random Qwen3-MoE-shaped model: decode at several batch sizes,
// prefill.
//
//   bench_step_cpu MODEL STATE [SECONDS [BATCH [no-plan-ahead]]]
//
// Ceilings of the same run: read bandwidth of all threads over the expert store's bytes in the
// pool, and the bf16 dot-product peak of all threads (registers only). Roofline time of a decode
// step: bytes of the distinct experts it used, other weights and KV read, over the bandwidth; of a
// prefill: operations over the peak. The answer is checked first: batch 1 and batch 8 give the same
// tokens for the same prompt.
#include <math.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <time.h>
#include <unistd.h>
#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include "base/check.h"
#include "base/rng.h"
#include "base/sort.h"
#include "runtime/engine/stack.h"

enum { CONTEXT = 1024, CONTEXT_DECODE = 256, BATCH_MAX = 64, STEPS_MAX = 4096, THREADS_MAX = 64 };

struct bench {
    struct stack *stack;
    const struct model *model;
    uint32_t threads;
    double read_gbytes_per_s, peak_gflops;
    uint64_t next_id;
    uint32_t open;
    int32_t last[BATCH_MAX + 1];
    double seconds;
};

static double now_s(void)
{
    struct timespec t;
    (void)clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
}

static int compare_double(const void *a, const void *b)
{
    double x = *(const double *)a, y = *(const double *)b;
    return x < y ? -1 : x > y;
}

static double median(double *values, size_t count)
{
    sort_in_place(values, count, sizeof *values, compare_double);
    return count ? values[count / 2] : 0;
}

// ---- ceilings ----

struct reading {
    const uint8_t *from;
    size_t bytes;
    uint64_t sum;
    double flops;
};

static void *read_plain(void *argument)
{
    struct reading *r = argument;
    uint64_t sum[8] = {0};
    const uint64_t *p = (const uint64_t *)(const void *)r->from;
    for (size_t i = 0; i + 8 <= r->bytes / 8; i += 8) {
        for (int k = 0; k < 8; k++)
            sum[k] ^= p[i + (size_t)k];
    }
    for (int k = 0; k < 8; k++)
        r->sum ^= sum[k];
    return NULL;
}

#if defined(__x86_64__)
// Four streams of full cache lines with a software prefetch: the fastest reader found on this kind
// of core.
__attribute__((target("avx512f"))) static void *read_wide(void *argument)
{
    struct reading *r = argument;
    enum { STREAMS = 4, AHEAD = 2048 };
    __m512i sum[STREAMS];
    size_t part = r->bytes / STREAMS / 512 * 512;
    for (int k = 0; k < STREAMS; k++)
        sum[k] = _mm512_setzero_si512();
    for (size_t i = 0; i < part; i += 256) {
        for (size_t k = 0; k < STREAMS; k++) {
            const uint8_t *p = r->from + k * part + i;
            for (size_t line = 0; line < 256; line += 64) {
                _mm_prefetch((const char *)(p + line + AHEAD), _MM_HINT_T0);
                sum[k] = _mm512_xor_si512(sum[k], _mm512_loadu_si512(p + line));
            }
        }
    }
    for (int k = 1; k < STREAMS; k++)
        sum[0] = _mm512_xor_si512(sum[0], sum[k]);
    r->sum = (uint64_t)_mm512_reduce_add_epi64(sum[0]);
    return NULL;
}

__attribute__((target("avx512f,avx512bf16"))) static void *dot_all(void *argument)
{
    struct reading *r = argument;
    enum { ROUNDS = 4000000, CHAINS = 16 };
    __m512 a[CHAINS];
    __m512bh x = (__m512bh)_mm512_set1_epi32(0x3f803f80), y = x;
    for (int i = 0; i < CHAINS; i++)
        a[i] = _mm512_setzero_ps();
    for (int n = 0; n < ROUNDS; n++) {
#pragma GCC unroll 16
        for (int i = 0; i < CHAINS; i++)
            a[i] = _mm512_dpbf16_ps(a[i], x, y);
        __asm__ volatile("" : "+v"(x));
    }
    float sum = 0;
    for (int i = 0; i < CHAINS; i++)
        sum += _mm512_reduce_add_ps(a[i]);
    r->sum = (uint64_t)sum;
    r->flops = (double)ROUNDS * CHAINS * 64;
    return NULL;
}
#endif

static void *read_all(void *argument)
{
#if defined(__x86_64__)
    if (__builtin_cpu_supports("avx512f"))
        return read_wide(argument);
#endif
    return read_plain(argument);
}

static double on_all_threads(struct bench *b, void *(*work)(void *), struct reading *parts)
{
    pthread_t thread[THREADS_MAX];
    double start = now_s();
    for (uint32_t i = 0; i < b->threads; i++)
        CHECK(pthread_create(&thread[i], NULL, work, &parts[i]) == 0);
    for (uint32_t i = 0; i < b->threads; i++)
        (void)pthread_join(thread[i], NULL);
    return now_s() - start;
}

static void measure_ceilings(struct bench *b)
{
    enum { TIMES = 5 };
    struct reading parts[THREADS_MAX] = {0};
    size_t bytes = (size_t)2 << 30;
    uint8_t *buffer = aligned_alloc(2 << 20, bytes);
    double read[TIMES], peak[TIMES] = {0};
    CHECK(buffer);
    (void)madvise(buffer, bytes, MADV_HUGEPAGE);
    memset(buffer, 1, bytes);
    for (int t = 0; t < TIMES; t++) {
        for (uint32_t i = 0; i < b->threads; i++)
            parts[i] = (struct reading){.from = buffer + bytes / b->threads * i,
                                        .bytes = bytes / b->threads};
        read[t] = (double)bytes / on_all_threads(b, read_all, parts) / 1e9;
#if defined(__x86_64__)
        if (__builtin_cpu_supports("avx512bf16")) {
            double s = on_all_threads(b, dot_all, parts);
            for (uint32_t i = 0; i < b->threads; i++)
                peak[t] += parts[i].flops / s / 1e9;
        }
#endif
    }
    // A ceiling is what was reached at best.
    (void)median(read, TIMES);
    (void)median(peak, TIMES);
    b->read_gbytes_per_s = read[TIMES - 1];
    b->peak_gflops = peak[TIMES - 1];
    free(buffer);
}

// ---- driving ----

static void submit(struct bench *b, uint32_t prompt_tokens, uint32_t max_tokens, uint64_t seed)
{
    struct {
        struct engine_request r;
        int32_t prompt[CONTEXT * 2];
    } record;
    CHECK(prompt_tokens <= CONTEXT * 2);
    memset(&record.r, 0, sizeof record.r);
    record.r = (struct engine_request){.kind = ENGINE_REQUEST,
                                       .id = b->next_id++,
                                       .prompt_tokens = prompt_tokens,
                                       .max_tokens = max_tokens,
                                       .top_p = 1.0f,
                                       .ignore_eos = 1};
    for (uint32_t i = 0; i < prompt_tokens; i++)
        record.prompt[i] = (int32_t)(rng_at(seed, 0, i) % b->model->config.vocab);
    CHECK(!engine_send(stack_port(b->stack), &record,
                       sizeof record.r + prompt_tokens * sizeof(int32_t)));
    b->open++;
}

static void collect(struct bench *b)
{
    const void *record;
    size_t bytes;
    while (ring_peek(stack_port(b->stack)->events, &record, &bytes)) {
        uint32_t kind;
        memcpy(&kind, record, sizeof kind);
        if (kind == ENGINE_DONE) {
            const struct engine_done *done = record;
            CHECK(done->status == STATUS_OK || done->status == STATUS_CANCELLED);
            b->open--;
        }
        ring_pop(stack_port(b->stack)->events);
    }
}

static uint64_t steps_of(const struct bench *b)
{
    struct engine_counters c;
    engine_counters(stack_engine(b->stack), &c);
    return c.rows;
}

// Turns until the counters show that one more step is finished; its seconds.
static double one_step(struct bench *b)
{
    uint64_t before = steps_of(b);
    double start = now_s();
    while (steps_of(b) == before && b->open) {
        (void)engine_turn(stack_engine(b->stack));
        collect(b);
    }
    return now_s() - start;
}

static void run_out(struct bench *b)
{
    while (b->open) {
        (void)engine_turn(stack_engine(b->stack));
        collect(b);
    }
}

// Bytes outside the experts that every decode step reads: attention, router, norms, head.
static double static_bytes(const struct model_config *c)
{
    double q = (double)c->heads * c->head_dim, kv = (double)c->kv_heads * c->head_dim;
    double layer =
        (q + 2 * kv) * c->hidden * 2 + q * c->hidden * 2 + (double)c->experts * c->hidden * 4;
    if (!c->experts)
        layer += 3.0 * c->intermediate * c->hidden * 2;
    return layer * c->layers + (double)c->vocab * c->hidden * 2;
}

static double kv_bytes(const struct model_config *c, uint32_t batch, uint32_t context)
{
    return (double)batch * context * c->layers * 2 * c->kv_heads * c->head_dim * 2;
}

static double expert_bytes(const struct model_config *c)
{
    return 3.0 * c->moe_intermediate * c->hidden * 2;
}

// Distinct experts of the step that ran last, over all layers.
static uint64_t distinct_experts(const struct bench *b)
{
    uint32_t layers = b->model->expert_shape.layers, experts = b->model->config.experts;
    const uint32_t *need = engine_need(stack_engine(b->stack));
    uint64_t count = 0;
    for (uint32_t i = 0; need && i < layers * experts; i++)
        count += need[i] != 0;
    return count;
}

static void bench_decode(struct bench *b, uint32_t batch, uint32_t context)
{
    const struct model_config *c = &b->model->config;
    static double times[STEPS_MAX], ratios[STEPS_MAX];
    uint32_t steps = 0;
    double experts = 0;
    for (uint32_t i = 0; i < batch; i++)
        submit(b, context, 512, 100 + i);
    struct engine_counters before;
    // Prefill: until every sequence decodes.
    for (uint64_t rows = 0;;) {
        engine_counters(stack_engine(b->stack), &before);
        rows = before.rows;
        (void)one_step(b);
        if (steps_of(b) - rows == batch)
            break;
    }
    for (double end = now_s() + b->seconds; now_s() < end && steps < 400 && b->open == batch;
         steps++) {
        times[steps] = one_step(b);
        double bytes = static_bytes(c) + kv_bytes(c, batch, context + steps) +
                       (double)distinct_experts(b) * expert_bytes(c);
        experts += (double)distinct_experts(b);
        ratios[steps] = bytes / (b->read_gbytes_per_s * 1e9) / times[steps];
    }
    for (uint64_t id = b->next_id - batch; id < b->next_id; id++) {
        struct engine_control cancel = {.kind = ENGINE_CANCEL, .id = id};
        CHECK(!engine_send(stack_port(b->stack), &cancel, sizeof cancel));
    }
    run_out(b);
    double mid = median(times, steps);
    (void)printf(
        "{\"bench\":\"step_decode\",\"batch\":%u,\"context\":%u,\"steps\":%u,\"step_ms\":%.3f,"
        "\"tokens_per_s\":%.1f,\"distinct_experts_per_layer\":%.1f,"
        "\"read_gbytes_per_s\":%.2f,\"roofline_over_measured\":%.3f}\n",
        batch, context, steps, mid * 1e3, batch / mid,
        c->experts ? experts / steps / b->model->expert_shape.layers : 0.0, b->read_gbytes_per_s,
        median(ratios, steps));
    (void)fflush(stdout);
}

static double prefill_flops(const struct model_config *c, double tokens)
{
    double q = (double)c->heads * c->head_dim, kv = (double)c->kv_heads * c->head_dim;
    double token = (q + 2 * kv) * c->hidden + q * c->hidden +
                   (c->experts ? (double)c->top_k * 3 * c->moe_intermediate * c->hidden +
                                     (double)c->experts * c->hidden
                               : 3.0 * c->intermediate * c->hidden);
    return 2 * c->layers *
           (tokens * token + tokens * tokens * q); // causal: half of 2 x q x tokens^2 x 2
}

static void bench_prefill(struct bench *b, uint32_t tokens)
{
    enum { TIMES = 5 };
    double times[TIMES];
    for (int t = 0; t < TIMES; t++) {
        submit(b, tokens, 1, 1000 + (uint64_t)t);
        double start = now_s();
        run_out(b);
        times[t] = now_s() - start;
    }
    double s = median(times, TIMES), gflops = prefill_flops(&b->model->config, tokens) / 1e9;
    (void)printf("{\"bench\":\"step_prefill\",\"tokens\":%u,\"ms\":%.1f,\"tokens_per_s\":%.0f,"
                 "\"gflops\":%.1f,\"peak_gflops\":%.1f,\"roofline_over_measured\":%.3f}\n",
                 tokens, s * 1e3, tokens / s, gflops / s, b->peak_gflops,
                 b->peak_gflops > 0 ? gflops / s / b->peak_gflops : 0.0);
    (void)fflush(stdout);
}

int main(int count, char **arguments)
{
    if (count < 3) {
        (void)fprintf(stderr, "usage: %s MODEL STATE [SECONDS [BATCH [no-plan-ahead]]]\n",
                      arguments[0]);
        return 2;
    }
    static struct bench b;
    struct fault fault = {.text = ""};
    struct stack_options o = {.model = arguments[1],
                              .state_directory = arguments[2],
                              .context_max = CONTEXT * 2,
                              .sequences_max = BATCH_MAX,
                              .rows_max = 512,
                              .no_prefix_sharing = true,
                              .no_plan_ahead = count > 5};
    b.seconds = count > 3 ? atof(arguments[3]) : 4.0;
    b.next_id = 1;
    long cores = sysconf(_SC_NPROCESSORS_ONLN);
    b.threads = cores > THREADS_MAX ? THREADS_MAX : (uint32_t)cores;
    measure_ceilings(&b);
    if (stack_create(&o, &b.stack, &fault)) {
        (void)fprintf(stderr, "%s\n", fault.text);
        return 1;
    }
    b.model = stack_model(b.stack);
    char line[400];
    stack_describe(b.stack, line, sizeof line);
    (void)printf("{\"bench\":\"machine\",\"device\":\"%s\",\"read_gbytes_per_s\":%.2f,\"peak_"
                 "gflops\":%.1f}\n",
                 line, b.read_gbytes_per_s, b.peak_gflops);
    while (engine_turn(stack_engine(b.stack)) != ENGINE_IDLE)
        (void)usleep(50); // until every expert is resident
    static const uint32_t batches[] = {1, 2, 4, 8, 16, 32, 64};
    uint32_t only = count > 4 ? (uint32_t)atoi(arguments[4]) : 0;
    for (size_t i = 0; i < ARRAY_COUNT(batches); i++) {
        if (!only || only == batches[i])
            bench_decode(&b, batches[i], batches[i] <= 8 ? CONTEXT_DECODE : 64);
    }
    if (!only || only > BATCH_MAX) {
        bench_prefill(&b, 512);
        bench_prefill(&b, CONTEXT);
    }
    stack_destroy(b.stack);
    return 0;
}
