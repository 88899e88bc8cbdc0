// SPDX-License-Identifier: Apache-2.0
// Whole steps of a real stack on any device: decode at given batch sizes and a prefill; or decode
// with LoRA adapters against the same without.
//
//   bench_step --model synth:NAME|DIR [--device cpu] [--batch 1,8,32] [--context 1024] [--steps 20]
//              [--prefill 2048] [--read-ceiling GB/s] [--matmul-ceiling TFLOP/s] [--state DIR]
//              [--batch-invariant 1] [--pool-mib N]
//              [--adapters N [--rank R[,R2,...]] [--targets all|attention|experts]]
//
// Decode: B sequences of random tokens are prefilled to `context` tokens; then the median of
// `steps` steps. Roofline: bytes of static weights, of the distinct experts that the steps used and
// of KV, over the read ceiling. Prefill: one step; roofline: operations over the matmul ceiling.
// The ceilings are measured by the caller in the same run and passed in; without one the ratio is
// 0.
//
// Adapters (--adapters N; then neither of the above): N adapters (bench_lora.c), all resident
// before and after the timing (else the run is refused); row i uses adapter i % N. For each batch
// size the steps are timed in blocks, without and with adapters in turn, ADAPTER_BLOCKS of each,
// each with sequences of its own. added_ms is the difference of the two medians; the floor is the
// time to read adapter_bytes, each slice once, at the read ceiling (0 without a ceiling, which is
// the stricter judgement); allowed is the floor and ALLOWED_SHARE of the step without adapters.
// With random MoE models compare the experts per layer of both: adapters move the routing, too.
//
// What is checked of the answers. Before the timing (check_answers): two runs over the same prompts
// give the same tokens, without adapters and with them, and adapters change at least one row's
// tokens. Always (take_done): a request that was not cancelled ends well, with every token it asked
// for; the engine ends one with NUMERIC whose logits are not finite. Of decoding sequences, which
// are cancelled when their steps are timed: every step had a row of each (decode_block). Whether
// the tokens are right is for the tests of goldens and backends.
//
// Without --state the state directory is a temporary one. It is removed, on errors too, as soon as
// everything is loaded, since what is needed of it stays open.
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <time.h>
#include <unistd.h>

#include "base/check.h"
#include "base/rng.h"
#include "base/sort.h"
#include "bench/bench_lora.h"
#include "bench/bench_state.h"
#include "runtime/engine/stack.h"

enum {
    STEPS_MAX = 4096,
    BATCHES_MAX = 16,
    WARM_STEPS = 4,
    PREFILL_TIMES = 5,
    ADAPTER_BLOCKS = 3,
    // Of check_answers: all prompts fit one step.
    CHECK_ROWS_MAX = 64,
    CHECK_PROMPT = 8,
    CHECK_TOKENS = 8
};

// Of the step without adapters: what LoRA may cost above the reading of its bytes.
#define ALLOWED_SHARE 0.08

struct arguments {
    const char *model, *device, *state;
    uint32_t batch[BATCHES_MAX], batches, context, steps, prefill;
    bool batch_invariant;
    double read_gbytes_per_s, matmul_tflops;
    uint64_t pool_bytes; // 0: everything fits
    struct bench_lora lora;
};

// The tokens of a run of check_answers; -1: none came.
struct answers {
    uint64_t first_id;
    int32_t token[CHECK_ROWS_MAX][CHECK_TOKENS];
};

struct bench {
    struct arguments arguments;
    struct stack *stack;
    const struct model *model;
    uint64_t next_id;
    uint32_t open, asked;    // requests that have not ended; tokens that each was to give
    struct answers *answers; // where tokens go, or NULL
    double *times;           // [2][ADAPTER_BLOCKS * STEPS_MAX]
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

// Row `row` of a batch; with adapters it uses the adapter row % N.
static void submit(struct bench *b, uint32_t row, bool adapters, uint32_t prompt_tokens,
                   uint32_t max_tokens, uint64_t seed)
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
    if (adapters)
        bench_lora_name(row % b->arguments.lora.count, record->adapter);
    int32_t *prompt = (int32_t *)(void *)(record + 1);
    for (uint32_t i = 0; i < prompt_tokens; i++)
        prompt[i] = (int32_t)(rng_at(seed, 0, i) % b->model->config.vocab);
    CHECK(!engine_send(stack_port(b->stack), record, bytes));
    free(record);
    b->open++;
    b->asked = max_tokens;
}

static void take_done(struct bench *b, const struct engine_done *done)
{
    b->open--;
    if (done->status == STATUS_CANCELLED)
        return;
    if (done->status != STATUS_OK)
        (void)fprintf(stderr, "request %llu: %.200s\n", (unsigned long long)done->id,
                      done->message);
    CHECK(done->status == STATUS_OK);
    CHECK(done->finish == ENGINE_FINISH_LENGTH && done->generated_tokens == b->asked);
}

static void take_token(struct bench *b, const struct engine_text *text)
{
    struct answers *answers = b->answers;
    if (!answers)
        return;
    uint64_t row = text->id - answers->first_id;
    CHECK(row < CHECK_ROWS_MAX && text->index < CHECK_TOKENS);
    answers->token[row][text->index] = text->token;
}

static void turn(struct bench *b)
{
    const void *record;
    size_t bytes;
    (void)engine_turn(stack_engine(b->stack));
    while (ring_peek(stack_port(b->stack)->events, &record, &bytes)) {
        uint32_t kind;
        memcpy(&kind, record, sizeof kind);
        if (kind == ENGINE_DONE)
            take_done(b, record);
        else if (kind == ENGINE_TEXT)
            take_token(b, record);
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

// ---- answers ----

static void answer(struct bench *b, uint32_t rows, bool adapters, struct answers *out)
{
    memset(out->token, -1, sizeof out->token);
    out->first_id = b->next_id;
    b->answers = out;
    for (uint32_t i = 0; i < rows; i++)
        submit(b, i, adapters, CHECK_PROMPT, CHECK_TOKENS, 10 + i);
    while (b->open)
        turn(b);
    b->answers = NULL;
}

static enum status answer_twice(struct bench *b, uint32_t rows, bool adapters, struct answers *out,
                                struct fault *fault)
{
    struct answers again;
    answer(b, rows, adapters, out);
    answer(b, rows, adapters, &again);
    for (uint32_t i = 0; i < rows; i++)
        for (uint32_t t = 0; t < CHECK_TOKENS; t++)
            if (out->token[i][t] < 0 || out->token[i][t] != again.token[i][t])
                return fault_set(fault, STATUS_INTERNAL,
                                 "two runs over the same prompts differ %s adapters: row %u gave "
                                 "%d and %d as token %u.",
                                 adapters ? "with" : "without", i, out->token[i][t],
                                 again.token[i][t], t);
    return STATUS_OK;
}

// See the head; prints how many rows the adapters changed.
static enum status check_answers(struct bench *b, uint32_t rows, struct fault *fault)
{
    struct answers base, with;
    uint32_t changed = 0;
    rows = rows < CHECK_ROWS_MAX ? rows : CHECK_ROWS_MAX;
    enum status status = answer_twice(b, rows, false, &base, fault);
    if (status || !b->arguments.lora.count)
        return status;
    status = answer_twice(b, rows, true, &with, fault);
    if (status)
        return status;
    for (uint32_t i = 0; i < rows; i++)
        changed += memcmp(base.token[i], with.token[i], sizeof base.token[i]) != 0;
    (void)printf("{\"bench\":\"step_answers\",\"rows\":%u,\"tokens\":%d,"
                 "\"rows_changed_by_adapters\":%u}\n",
                 rows, CHECK_TOKENS, changed);
    return changed ? STATUS_OK
                   : fault_set(fault, STATUS_INTERNAL,
                               "the adapters changed no token of %u rows (a random model with a "
                               "tied head answers with the token put in: give it tied=0).",
                               rows);
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

struct block {
    double experts; // distinct ones of a step, over all layers
    struct engine_counters from, to;
};

// Prefills `batch` sequences, times `steps` steps in which all of them decode, cancels them.
static enum status decode_block(struct bench *b, uint32_t batch, bool adapters, double *times,
                                struct block *out, struct fault *fault)
{
    const struct arguments *a = &b->arguments;
    *out = (struct block){.experts = 0};
    for (uint32_t i = 0; i < batch; i++)
        submit(b, i, adapters, a->context, 2 * WARM_STEPS + a->steps + batch * 2 + 64, 100 + i);
    for (uint32_t same = 0; same < WARM_STEPS && b->open == batch;) {
        uint64_t rows = counters(b).rows;
        (void)one_step(b);
        same = counters(b).rows - rows == batch && !counters(b).waiting ? same + 1 : 0;
    }
    out->from = counters(b);
    for (uint32_t i = 0; i < a->steps; i++) {
        times[i] = one_step(b);
        out->experts += (double)distinct_experts(b) / a->steps;
    }
    out->to = counters(b);
    bool all_decoded =
        b->open == batch && out->to.rows - out->from.rows == (uint64_t)batch * a->steps;
    cancel_all(b, batch);
    return all_decoded ? STATUS_OK
                       : fault_set(fault, STATUS_LIMIT,
                                   "not all of %u sequences decoded in every step; has the pool "
                                   "room for them?",
                                   batch);
}

static enum status bench_decode(struct bench *b, uint32_t batch, struct fault *fault)
{
    const struct arguments *a = &b->arguments;
    double *times = b->times, all_s = 0;
    struct block block;
    enum status status = decode_block(b, batch, false, times, &block, fault);
    if (status)
        return status;
    for (uint32_t i = 0; i < a->steps; i++)
        all_s += times[i];
    double bytes = step_bytes(b, batch, a->context + a->steps / 2.0, block.experts);
    double roof = a->read_gbytes_per_s > 0 ? bytes / (a->read_gbytes_per_s * 1e9) : 0;
    print_times("step_decode", b, times, a->steps);
    double median = times[a->steps / 2];
    (void)printf(",\"batch\":%u,\"context\":%u,\"tokens_per_s\":%.1f,"
                 "\"distinct_experts_per_layer\":%.2f,\"bytes\":%.0f,\"read_gbytes_per_s\":%.1f,"
                 "\"roofline_ms\":%.4f,\"roofline_over_measured\":%.3f,\"captures\":%llu,"
                 "\"gate_misses\":%llu,\"segments_per_step\":%.2f,\"submit_share\":%.4f}\n",
                 batch, a->context, batch / median,
                 moe_layers(b) > 0 ? block.experts / moe_layers(b) : 0.0, bytes,
                 a->read_gbytes_per_s, roof * 1e3, roof / median,
                 (unsigned long long)(block.to.captures - block.from.captures),
                 (unsigned long long)(block.to.gate_misses - block.from.gate_misses),
                 (double)(block.to.segments - block.from.segments) / a->steps,
                 (double)(block.to.submit_us - block.from.submit_us) * 1e-6 / all_s);
    (void)fflush(stdout);
    return STATUS_OK;
}

// One kind of block, all of its steps together.
struct side {
    double *times, median_ms, p10_ms, p90_ms, experts;
    uint64_t captures, gate_misses;
};

static void finish_side(struct side *side, uint32_t count)
{
    sort_in_place(side->times, count, sizeof *side->times, compare_double);
    side->median_ms = side->times[count / 2] * 1e3;
    side->p10_ms = side->times[count / 10] * 1e3;
    side->p90_ms = side->times[count * 9 / 10] * 1e3;
}

static void print_side(const struct bench *b, const char *name, const struct side *side)
{
    (void)printf(",\"%s_ms\":%.4f,\"%s_p10_ms\":%.4f,\"%s_p90_ms\":%.4f,"
                 "\"%s_experts_per_layer\":%.2f,\"%s_captures\":%llu,\"%s_gate_misses\":%llu",
                 name, side->median_ms, name, side->p10_ms, name, side->p90_ms, name,
                 moe_layers(b) > 0 ? side->experts / moe_layers(b) : 0.0, name,
                 (unsigned long long)side->captures, name, (unsigned long long)side->gate_misses);
}

static void print_adapters(const struct bench *b, uint32_t batch, const struct side *base,
                           const struct side *with)
{
    const struct arguments *a = &b->arguments;
    const struct bench_lora *lora = &a->lora;
    double bytes =
        bench_lora_step_bytes(lora, stack_adapter_base(b->stack), b->model->config.top_k, batch);
    double floor_ms = a->read_gbytes_per_s > 0 ? bytes / (a->read_gbytes_per_s * 1e6) : 0;
    double added_ms = with->median_ms - base->median_ms;
    double allowed_ms = floor_ms + ALLOWED_SHARE * base->median_ms;
    (void)printf("{\"bench\":\"step_adapters\",\"model\":\"%s\",\"device\":\"%s\","
                 "\"commit\":\"%s\",\"batch\":%u,\"context\":%u,\"adapters\":%u,\"ranks\":[",
                 a->model, a->device, POLDER_COMMIT, batch, a->context, lora->count);
    for (uint32_t r = 0; r < lora->ranks; r++)
        (void)printf("%s%u", r ? "," : "", lora->rank[r]);
    (void)printf("],\"targets\":\"%s\",\"times\":%u", bench_lora_targets_name(lora->targets),
                 ADAPTER_BLOCKS * a->steps);
    print_side(b, "base", base);
    print_side(b, "adapter", with);
    (void)printf(",\"added_ms\":%.4f,\"adapter_bytes\":%.0f,\"read_gbytes_per_s\":%.1f,"
                 "\"floor_ms\":%.4f,\"allowed_ms\":%.4f,\"reached\":%s}\n",
                 added_ms, bytes, a->read_gbytes_per_s, floor_ms, allowed_ms,
                 added_ms <= allowed_ms ? "true" : "false");
    (void)fflush(stdout);
}

static enum status bench_adapters(struct bench *b, uint32_t batch, struct fault *fault)
{
    uint32_t steps = b->arguments.steps;
    struct side sides[2] = {{.times = b->times}, {.times = b->times + ADAPTER_BLOCKS * STEPS_MAX}};
    enum status status = STATUS_OK;
    for (uint32_t i = 0; !status && i < 2 * ADAPTER_BLOCKS; i++) {
        struct side *side = &sides[i % 2];
        struct block block;
        status = decode_block(b, batch, i % 2 == 1, side->times + (size_t)(i / 2) * steps, &block,
                              fault);
        side->experts += block.experts / ADAPTER_BLOCKS;
        side->captures += block.to.captures - block.from.captures;
        side->gate_misses += block.to.gate_misses - block.from.gate_misses;
    }
    if (!status)
        status = bench_lora_check(&b->arguments.lora, b->stack, fault);
    if (status)
        return status;
    finish_side(&sides[0], ADAPTER_BLOCKS * steps);
    finish_side(&sides[1], ADAPTER_BLOCKS * steps);
    print_adapters(b, batch, &sides[0], &sides[1]);
    return STATUS_OK;
}

static void bench_prefill(struct bench *b)
{
    double times[PREFILL_TIMES];
    uint32_t tokens = b->arguments.prefill;
    for (int t = -1; t < PREFILL_TIMES; t++) { // the first one warms
        submit(b, 0, false, tokens, 1, 1000 + (uint64_t)(t + 1));
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

static bool parse_one(struct arguments *a, const char *key, const char *value)
{
    if (!strcmp(key, "--model"))
        a->model = value;
    else if (!strcmp(key, "--device"))
        a->device = value;
    else if (!strcmp(key, "--state"))
        a->state = value;
    else if (!strcmp(key, "--batch"))
        a->batches = bench_parse_list(value, ',', a->batch, BATCHES_MAX);
    else if (!strcmp(key, "--context"))
        a->context = (uint32_t)atoi(value);
    else if (!strcmp(key, "--steps"))
        a->steps = (uint32_t)atoi(value);
    else if (!strcmp(key, "--prefill"))
        a->prefill = (uint32_t)atoi(value);
    else if (!strcmp(key, "--batch-invariant"))
        a->batch_invariant = strcmp(value, "0") != 0;
    else if (!strcmp(key, "--pool-mib"))
        a->pool_bytes = strtoull(value, NULL, 10) << 20;
    else if (!strcmp(key, "--read-ceiling"))
        a->read_gbytes_per_s = atof(value);
    else if (!strcmp(key, "--matmul-ceiling"))
        a->matmul_tflops = atof(value);
    else if (!strcmp(key, "--adapters"))
        a->lora.count = (uint32_t)atoi(value);
    else if (!strcmp(key, "--rank"))
        a->lora.ranks = bench_parse_list(value, ',', a->lora.rank, BENCH_LORA_RANKS_MAX);
    else
        return !strcmp(key, "--targets") && bench_lora_targets_parse(value, &a->lora.targets);
    return true;
}

static bool parse(struct arguments *a, int count, char **values)
{
    bool valid = count % 2 == 1;
    a->batches = bench_parse_list("1,8,32", ',', a->batch, BATCHES_MAX);
    a->lora.ranks = bench_parse_list("16", ',', a->lora.rank, BENCH_LORA_RANKS_MAX);
    for (int i = 1; valid && i + 1 < count; i += 2)
        valid = parse_one(a, values[i], values[i + 1]);
    return valid && a->model && a->batches && a->context && a->steps && a->steps <= STEPS_MAX &&
           a->lora.ranks;
}

// ---- life ----

static uint64_t adapter_pool_bytes(const struct bench_lora *lora, const struct model_fit *fit)
{
    const struct model_config *c = &fit->config;
    struct adapter_base base = {.layers = c->layers,
                                .hidden = c->hidden,
                                .heads = c->heads,
                                .kv_heads = c->kv_heads,
                                .head_dim = c->head_dim,
                                .intermediate = c->intermediate,
                                .experts = c->experts,
                                .moe_intermediate = c->moe_intermediate,
                                .is_moe = c->is_moe,
                                .dtype = DTYPE_BF16};
    return bench_lora_pages(lora, &base, fit->page_bytes) * fit->page_bytes;
}

static uint32_t batch_max(const struct arguments *a)
{
    uint32_t most = 1;
    for (uint32_t i = 0; i < a->batches; i++)
        most = a->batch[i] > most ? a->batch[i] : most;
    return most;
}

static enum status open_stack(struct bench *b, struct fault *fault)
{
    const struct arguments *a = &b->arguments;
    struct model_fit fit;
    uint32_t most = batch_max(a), room = a->context + 2 * WARM_STEPS + a->steps + most * 2 + 64;
    if (!a->lora.count && a->prefill + 1 > room)
        room = a->prefill + 1;
    enum status status = model_fit(a->model, DTYPE_BF16, 0, &fit, fault);
    if (status)
        return status;
    // Every expert, adapter and sequence fits, with a sixteenth for blocks that are not full.
    uint64_t kv = (uint64_t)fit.kv_bytes_per_token * room * (most + 1);
    uint64_t all = fit.expert_bytes + adapter_pool_bytes(&a->lora, &fit) + kv + kv / 16;
    struct stack_options o = {.model = a->model,
                              .device = a->device,
                              .batch_invariant = a->batch_invariant,
                              .state_directory = a->state,
                              .context_max = room,
                              .sequences_max = most,
                              .rows_max = a->prefill > 512 ? a->prefill : 512,
                              .pool_bytes = a->pool_bytes ? a->pool_bytes : all + (128ull << 20),
                              .no_prefix_sharing = true};
    model_config_clear(&fit.config);
    status = stack_create(&o, &b->stack, fault);
    if (!status)
        b->model = stack_model(b->stack);
    return status;
}

// Stack, experts and adapters, all resident.
static enum status load(struct bench *b, struct fault *fault)
{
    char line[400];
    double start = now_s();
    enum status status = open_stack(b, fault);
    if (status)
        return status;
    double loaded = now_s();
    while (engine_turn(stack_engine(b->stack)) != ENGINE_IDLE)
        (void)usleep(50); // until every expert is resident
    double filled = now_s();
    if (b->arguments.lora.count)
        status = bench_lora_load(&b->arguments.lora, b->stack, b->arguments.state, fault);
    stack_describe(b->stack, line, sizeof line);
    (void)printf("{\"bench\":\"step_start\",\"stack\":\"%s\",\"load_s\":%.2f,\"fill_s\":%.2f,"
                 "\"adapters_s\":%.2f}\n",
                 line, loaded - start, filled - loaded, now_s() - filled);
    return status;
}

static enum status measure(struct bench *b, struct fault *fault)
{
    const struct arguments *a = &b->arguments;
    enum status status = check_answers(b, batch_max(a), fault);
    for (uint32_t i = 0; !status && i < a->batches; i++) {
        status = a->lora.count ? bench_adapters(b, a->batch[i], fault)
                               : bench_decode(b, a->batch[i], fault);
    }
    if (!status && !a->lora.count && a->prefill)
        bench_prefill(b);
    return status;
}

int main(int count, char **values)
{
    struct bench_state own = {.path = ""};
    struct bench b = {.arguments = {.device = "cpu", .context = 1024, .steps = 20, .prefill = 2048},
                      .next_id = 1};
    struct fault fault = {.text = ""};
    if (!parse(&b.arguments, count, values)) {
        (void)fprintf(stderr, "usage: see the head of bench_step.c\n");
        return 2;
    }
    b.times = calloc(2 * ADAPTER_BLOCKS * STEPS_MAX, sizeof *b.times);
    if (!b.arguments.state)
        b.arguments.state = bench_state_begin(&own);
    if (!b.times || !b.arguments.state) {
        (void)fprintf(stderr, "no memory or no temporary directory.\n");
        free(b.times);
        return 1;
    }
    enum status status = load(&b, &fault);
    bench_state_end(&own); // what is needed of it is open
    if (!status)
        status = measure(&b, &fault);
    if (status)
        (void)fprintf(stderr, "%s\n", fault.text);
    stack_destroy(b.stack);
    free(b.times);
    return status ? 1 : 0;
}
