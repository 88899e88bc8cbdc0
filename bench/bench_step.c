// SPDX-License-Identifier: Apache-2.0
// Whole steps of a real stack on any device: decode at given batch sizes and a prefill.
//
//   bench_step --model synth:NAME|DIR [--device cpu] [--batch 1,8,32] [--context 1024] [--steps 20]
//              [--prefill 2048] [--read-ceiling GB/s] [--matmul-ceiling TFLOP/s] [--state DIR]
//
// Decode: B sequences of random tokens are prefilled to `context` tokens; then the median of
// `steps` steps. Roofline: bytes of static weights, of the distinct experts that the steps used and
// of KV, over the read ceiling. Prefill: one step; roofline: operations over the matmul ceiling.
// The ceilings are measured by the caller in the same run and passed in; without one the ratio is
// 0. The answer is checked first: every request ends well, with every token it asked for.
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

#include "base/check.h"
#include "base/rng.h"
#include "base/sort.h"
#include "runtime/engine/stack.h"

enum { STEPS_MAX = 4096, BATCHES_MAX = 16, WARM_STEPS = 4, PREFILL_TIMES = 5 };

struct arguments {
    const char *model, *device, *state;
    uint32_t batch[BATCHES_MAX], batches, context, steps, prefill;
    bool batch_invariant;
    double read_gbytes_per_s, matmul_tflops;
};

struct bench {
    struct arguments arguments;
    struct stack *stack;
    const struct model *model;
    uint64_t next_id;
    uint32_t open;
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

// ---- driving ----

static void submit(struct bench *b, uint32_t prompt_tokens, uint32_t max_tokens, uint64_t seed)
{
    size_t bytes = sizeof(struct engine_request) + prompt_tokens * sizeof(int32_t);
    struct engine_request *record = calloc(1, bytes);
    CHECK(record);
    *record = (struct engine_request){.kind = ENGINE_REQUEST,
                                      .id = b->next_id++,
                                      .prompt_tokens = prompt_tokens,
                                      .max_tokens = max_tokens,
                                      .top_p = 1.0f,
                                      .ignore_eos = 1};
    int32_t *prompt = (int32_t *)(void *)(record + 1);
    for (uint32_t i = 0; i < prompt_tokens; i++)
        prompt[i] = (int32_t)(rng_at(seed, 0, i) % b->model->config.vocab);
    CHECK(!engine_send(stack_port(b->stack), record, bytes));
    free(record);
    b->open++;
}

static void turn(struct bench *b)
{
    const void *record;
    size_t bytes;
    (void)engine_turn(stack_engine(b->stack));
    while (ring_peek(stack_port(b->stack)->events, &record, &bytes)) {
        const struct engine_done *done = record;
        if (done->kind == ENGINE_DONE) {
            CHECK(done->status == STATUS_OK || done->status == STATUS_CANCELLED);
            b->open--;
        }
        ring_pop(stack_port(b->stack)->events);
    }
}

static struct engine_counters counters(const struct bench *b)
{
    struct engine_counters c;
    engine_counters(stack_engine(b->stack), &c);
    return c;
}

// Turns until one more step is finished; its seconds.
static double one_step(struct bench *b)
{
    uint64_t before = counters(b).rows;
    double start = now_s();
    while (counters(b).rows == before && b->open)
        turn(b);
    return now_s() - start;
}

static void cancel_all(struct bench *b, uint32_t batch)
{
    for (uint64_t id = b->next_id - batch; id < b->next_id; id++) {
        struct engine_control cancel = {.kind = ENGINE_CANCEL, .id = id};
        CHECK(!engine_send(stack_port(b->stack), &cancel, sizeof cancel));
    }
    while (b->open)
        turn(b);
}

// ---- bytes and operations ----

static double moe_layers(const struct bench *b)
{
    return b->model->expert_shape.layers;
}

// Weights of one token's path through all layers outside routed experts, and the head.
static double path_weights(const struct bench *b)
{
    const struct model_config *c = &b->model->config;
    double q = (double)c->heads * c->head_dim, kv = (double)c->kv_heads * c->head_dim;
    double dense = ((double)c->layers - moe_layers(b)) * 3.0 * c->intermediate * c->hidden;
    return c->layers * (2 * q + 2 * kv) * c->hidden + dense;
}

static double element_bytes(const struct bench *b)
{
    return (double)dtype_bytes(b->model->dtype);
}

static double step_bytes(const struct bench *b, uint32_t batch, double context, double experts)
{
    const struct model_config *c = &b->model->config;
    double head = (double)c->vocab * c->hidden, router = moe_layers(b) * c->experts * c->hidden * 4;
    double kv = (double)batch * context * c->layers * 2 * c->kv_heads * c->head_dim;
    double routed = experts * 3.0 * c->moe_intermediate * c->hidden;
    return element_bytes(b) * (path_weights(b) + head + kv + routed) + router;
}

static double prefill_flops(const struct bench *b, double tokens)
{
    const struct model_config *c = &b->model->config;
    double token = path_weights(b) + moe_layers(b) *
                                         ((double)c->top_k * 3 * c->moe_intermediate + c->experts) *
                                         c->hidden;
    double attention = tokens * tokens * c->heads * c->head_dim * c->layers; // causal: half
    return 2 * (tokens * token + attention);
}

// Distinct experts of the step that ran last, over all layers.
static uint64_t distinct_experts(const struct bench *b)
{
    size_t all = (size_t)b->model->expert_shape.layers * b->model->config.experts;
    const uint32_t *need = engine_need(stack_engine(b->stack));
    uint64_t count = 0;
    for (size_t i = 0; need && i < all; i++)
        count += need[i] != 0;
    return count;
}

// ---- measurements ----

static void print_times(const char *what, const struct bench *b, double *times, uint32_t count)
{
    sort_in_place(times, count, sizeof *times, compare_double);
    (void)printf("{\"bench\":\"%s\",\"model\":\"%s\",\"device\":\"%s\",\"times\":%u,"
                 "\"median_ms\":%.4f,\"p10_ms\":%.4f,\"p90_ms\":%.4f",
                 what, b->arguments.model, b->arguments.device, count, times[count / 2] * 1e3,
                 times[count / 10] * 1e3, times[count * 9 / 10] * 1e3);
}

static void bench_decode(struct bench *b, uint32_t batch)
{
    static double times[STEPS_MAX];
    const struct arguments *a = &b->arguments;
    double experts = 0;
    for (uint32_t i = 0; i < batch; i++)
        submit(b, a->context, 2 * WARM_STEPS + a->steps + batch * 2 + 64, 100 + i);
    for (uint32_t same = 0; same < WARM_STEPS && b->open == batch;) {
        uint64_t rows = counters(b).rows;
        (void)one_step(b);
        same = counters(b).rows - rows == batch && !counters(b).waiting ? same + 1 : 0;
    }
    struct engine_counters from = counters(b);
    for (uint32_t i = 0; i < a->steps; i++) {
        times[i] = one_step(b);
        experts += (double)distinct_experts(b) / a->steps;
    }
    CHECK(b->open == batch);
    struct engine_counters to = counters(b);
    double all_s = 0;
    for (uint32_t i = 0; i < a->steps; i++)
        all_s += times[i];
    cancel_all(b, batch);
    double bytes = step_bytes(b, batch, a->context + a->steps / 2.0, experts);
    double roof = a->read_gbytes_per_s > 0 ? bytes / (a->read_gbytes_per_s * 1e9) : 0;
    print_times("step_decode", b, times, a->steps);
    double median = times[a->steps / 2];
    (void)printf(",\"batch\":%u,\"context\":%u,\"tokens_per_s\":%.1f,"
                 "\"distinct_experts_per_layer\":%.2f,\"bytes\":%.0f,\"read_gbytes_per_s\":%.1f,"
                 "\"roofline_ms\":%.4f,\"roofline_over_measured\":%.3f,\"captures\":%llu,"
                 "\"gate_misses\":%llu,\"segments_per_step\":%.2f,\"submit_share\":%.4f}\n",
                 batch, a->context, batch / median,
                 moe_layers(b) > 0 ? experts / moe_layers(b) : 0.0, bytes, a->read_gbytes_per_s,
                 roof * 1e3, roof / median, (unsigned long long)(to.captures - from.captures),
                 (unsigned long long)(to.gate_misses - from.gate_misses),
                 (double)(to.segments - from.segments) / a->steps,
                 (double)(to.submit_us - from.submit_us) * 1e-6 / all_s);
    (void)fflush(stdout);
}

static void bench_prefill(struct bench *b)
{
    double times[PREFILL_TIMES];
    uint32_t tokens = b->arguments.prefill;
    for (int t = -1; t < PREFILL_TIMES; t++) { // the first one warms
        submit(b, tokens, 1, 1000 + (uint64_t)(t + 1));
        double start = now_s();
        while (b->open)
            turn(b);
        if (t >= 0)
            times[t] = now_s() - start;
    }
    print_times("step_prefill", b, times, PREFILL_TIMES);
    double s = times[PREFILL_TIMES / 2], tflops = prefill_flops(b, tokens) / 1e12 / s;
    double ceiling = b->arguments.matmul_tflops;
    (void)printf(",\"tokens\":%u,\"tokens_per_s\":%.0f,\"tflops\":%.3f,\"matmul_tflops\":%.1f,"
                 "\"roofline_over_measured\":%.3f}\n",
                 tokens, tokens / s, tflops, ceiling, ceiling > 0 ? tflops / ceiling : 0.0);
    (void)fflush(stdout);
}

// ---- the command line ----

static void parse_batches(struct arguments *a, const char *text)
{
    char *end = NULL;
    for (a->batches = 0; a->batches < BATCHES_MAX; text = end + 1) {
        a->batch[a->batches++] = (uint32_t)strtoul(text, &end, 10);
        if (end == text || *end != ',')
            break;
    }
}

static bool parse(struct arguments *a, int count, char **values)
{
    for (int i = 1; i + 1 < count; i += 2) {
        const char *key = values[i], *value = values[i + 1];
        if (!strcmp(key, "--model"))
            a->model = value;
        else if (!strcmp(key, "--device"))
            a->device = value;
        else if (!strcmp(key, "--state"))
            a->state = value;
        else if (!strcmp(key, "--batch"))
            parse_batches(a, value);
        else if (!strcmp(key, "--context"))
            a->context = (uint32_t)atoi(value);
        else if (!strcmp(key, "--steps"))
            a->steps = (uint32_t)atoi(value);
        else if (!strcmp(key, "--prefill"))
            a->prefill = (uint32_t)atoi(value);
        else if (!strcmp(key, "--batch-invariant"))
            a->batch_invariant = strcmp(value, "0") != 0;
        else if (!strcmp(key, "--read-ceiling"))
            a->read_gbytes_per_s = atof(value);
        else if (!strcmp(key, "--matmul-ceiling"))
            a->matmul_tflops = atof(value);
        else
            return false;
    }
    bool valid = count % 2 == 1 && a->model && a->context && a->steps && a->steps <= STEPS_MAX;
    for (uint32_t i = 0; i < a->batches; i++)
        valid = valid && a->batch[i] > 0;
    return valid;
}

static enum status open_stack(struct bench *b, struct fault *fault)
{
    const struct arguments *a = &b->arguments;
    struct model_fit fit;
    uint32_t batch_max = 1, room = 0;
    for (uint32_t i = 0; i < a->batches; i++)
        batch_max = a->batch[i] > batch_max ? a->batch[i] : batch_max;
    room = a->context + 2 * WARM_STEPS + a->steps + batch_max * 2 + 64;
    room = a->prefill + 1 > room ? a->prefill + 1 : room;
    enum status status = model_fit(a->model, DTYPE_BF16, 0, &fit, fault);
    if (status)
        return status;
    model_config_clear(&fit.config);
    // Every expert and every sequence fit, with a sixteenth for blocks that are not full.
    uint64_t kv = (uint64_t)fit.kv_bytes_per_token * room * (batch_max + 1);
    struct stack_options o = {.model = a->model,
                              .device = a->device,
                              .batch_invariant = a->batch_invariant,
                              .state_directory = a->state,
                              .context_max = room,
                              .sequences_max = batch_max,
                              .rows_max = a->prefill > 512 ? a->prefill : 512,
                              .pool_bytes = fit.expert_bytes + kv + kv / 16 + (128ull << 20),
                              .no_prefix_sharing = true};
    status = stack_create(&o, &b->stack, fault);
    if (!status)
        b->model = stack_model(b->stack);
    return status;
}

int main(int count, char **values)
{
    char state[] = "/tmp/polder-bench-XXXXXX", line[400];
    struct bench b = {.arguments = {.device = "cpu", .context = 1024, .steps = 20, .prefill = 2048},
                      .next_id = 1};
    struct fault fault = {.text = ""};
    parse_batches(&b.arguments, "1,8,32");
    if (!parse(&b.arguments, count, values)) {
        (void)fprintf(stderr, "usage: see the head of bench_step.c\n");
        return 2;
    }
    if (!b.arguments.state)
        b.arguments.state = mkdtemp(state);
    double start = now_s();
    if (!b.arguments.state || open_stack(&b, &fault)) {
        (void)fprintf(stderr, "%s\n", fault.text);
        return 1;
    }
    double loaded = now_s();
    while (engine_turn(stack_engine(b.stack)) != ENGINE_IDLE)
        (void)usleep(50); // until every expert is resident
    stack_describe(b.stack, line, sizeof line);
    (void)printf("{\"bench\":\"step_start\",\"stack\":\"%s\",\"load_s\":%.2f,\"fill_s\":%.2f}\n",
                 line, loaded - start, now_s() - loaded);
    for (uint32_t i = 0; i < b.arguments.batches; i++)
        bench_decode(&b, b.arguments.batch[i]);
    if (b.arguments.prefill)
        bench_prefill(&b);
    stack_destroy(b.stack);
    return 0;
}
