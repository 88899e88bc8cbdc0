// SPDX-License-Identifier: Apache-2.0
// See bench_serve.h. One record per request; its index is its id less the first id of the run.
//
// The engine is turned by this thread, as its own thread would turn it, but what a turn takes
// delays the sending of the next request by as much. That changes nothing: the engine would have
// taken the request at its next turn anyway, and waiting counts from the time in the workload.
//
// Step means are means over steps and not over time, so what the engine does between requests has
// no weight in them.
#include "bench/bench_serve.h"

#include <sched.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

#include "base/check.h"
#include "base/clock.h"
#include "base/rng.h"
#include "base/sort.h"
#include "bench/bench_lora.h"

enum { STALL_US = 120000000, REST_US = 20, PROBE_PROMPT = 12 };

struct record {
    uint64_t arrived_us, first_us, done_us, adapter_us;
    uint32_t generated;
    bool ok;
};

struct serve {
    const struct serve_options *options;
    const struct workload *workload;
    struct clock clock;
    struct record *records; // [workload->count]
    int32_t *probe;         // where tokens go, or NULL
    uint64_t start_us, heard_us, steps_seen;
    uint32_t next, open, done, held_for; // held_for: 1 + the last request that was held back
    void *message;                       // the request being sent
    struct serve_result *result;
};

double serve_percentile(const struct serve_times *times, double share)
{
    if (!times->count)
        return 0;
    uint32_t at = (uint32_t)(share * times->count);
    return times->ms[at < times->count ? at : times->count - 1];
}

void serve_counters(struct stack *stack, struct serve_counters *out)
{
    *out = (struct serve_counters){.experts = {.total = 0}};
    engine_counters(stack_engine(stack), &out->engine);
    pool_stats(stack_pool(stack), &out->pool);
    adapters_stats(stack_adapters(stack), &out->adapters);
    copy_stats(stack_copies(stack), &out->copies);
    if (stack_experts(stack))
        experts_stats(stack_experts(stack), &out->experts);
}

// ---- sending ----

// Request i; false when the engine's queue of commands is full.
static bool send_request(struct serve *s, uint32_t i)
{
    const struct workload_request *w = &s->workload->requests[i];
    const uint64_t vocab = stack_limits(s->options->stack).vocab;
    size_t bytes = sizeof(struct engine_request) + w->input * sizeof(int32_t);
    struct engine_request *request = s->message;
    *request = (struct engine_request){.kind = ENGINE_REQUEST,
                                       .tenant = w->tenant,
                                       .id = i,
                                       .class = ENGINE_STANDARD,
                                       .prompt_tokens = w->input,
                                       .max_tokens = w->output,
                                       .top_p = 1.0f,
                                       .ignore_eos = 1};
    if (w->adapter != WORKLOAD_BASE)
        bench_lora_name(w->adapter, request->adapter);
    int32_t *prompt = (int32_t *)(void *)(request + 1);
    for (uint32_t t = 0; t < w->input; t++)
        prompt[t] = (int32_t)(rng_at(s->options->seed, i, t) % vocab);
    return engine_send(stack_port(s->options->stack), request, bytes) == STATUS_OK;
}

// Sends what is due.
static void feed(struct serve *s)
{
    const struct serve_options *o = s->options;
    uint64_t now = clock_now_us(&s->clock);
    while (s->next < s->workload->count) {
        uint64_t due = o->concurrency ? now : s->start_us + s->workload->requests[s->next].time_us;
        if (due > now || (o->concurrency && s->open >= o->concurrency))
            return;
        if (s->open >= o->open_max || !send_request(s, s->next)) {
            s->result->held_back += s->held_for != s->next + 1;
            s->held_for = s->next + 1;
            return;
        }
        s->records[s->next++].arrived_us = due;
        s->open++;
    }
}

// ---- hearing ----

static void take_done(struct serve *s, const struct engine_done *done)
{
    struct record *r = &s->records[done->id];
    struct serve_result *result = s->result;
    r->done_us = clock_now_us(&s->clock);
    r->adapter_us = done->adapter_us;
    r->generated = done->generated_tokens;
    r->ok = done->status == STATUS_OK &&
            done->generated_tokens == s->workload->requests[done->id].output;
    if (!r->ok && !result->failed++)
        (void)snprintf(result->message, sizeof result->message, "%s",
                       done->status ? done->message : "too few tokens came.");
    s->open--;
    s->done++;
}

static void take_text(struct serve *s, const struct engine_text *text)
{
    if (!text->index)
        s->records[text->id].first_us = clock_now_us(&s->clock);
    if (s->probe)
        s->probe[text->index] = text->token;
}

static void hear(struct serve *s)
{
    struct ring *events = stack_port(s->options->stack)->events;
    const void *record;
    size_t bytes;
    while (ring_peek(events, &record, &bytes)) {
        uint32_t kind;
        memcpy(&kind, record, sizeof kind);
        if (kind == ENGINE_DONE)
            take_done(s, record);
        else if (kind == ENGINE_TEXT)
            take_text(s, record);
        ring_pop(events);
        s->heard_us = clock_now_us(&s->clock);
    }
}

// After a turn: a step that has begun since the last is counted.
static void sample(struct serve *s)
{
    struct engine_counters c;
    struct pool_stats p;
    struct serve_result *r = s->result;
    engine_counters(stack_engine(s->options->stack), &c);
    if (c.steps == s->steps_seen)
        return;
    double steps = (double)(c.steps - s->steps_seen);
    pool_stats(stack_pool(s->options->stack), &p);
    s->steps_seen = c.steps;
    r->running_mean += steps * c.running;
    r->running_max = c.running > r->running_max ? c.running : r->running_max;
    r->free_mean += steps * p.device_free;
    for (int k = 0; k < PAGE_KINDS; k++) {
        r->pages_mean[k] += steps * p.device_by_kind[k];
        r->pages_max[k] =
            p.device_by_kind[k] > r->pages_max[k] ? p.device_by_kind[k] : r->pages_max[k];
    }
}

// ---- a run ----

static double cpu_s(void)
{
    struct timespec t = {0};
    (void)clock_gettime(CLOCK_PROCESS_CPUTIME_ID, &t);
    return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
}

static enum status stall(const struct serve *s, struct fault *fault)
{
    struct serve_counters c;
    serve_counters(s->options->stack, &c);
    return fault_set(fault, STATUS_INTERNAL,
                     "nothing came out of the engine for %u s: %u requests are open, %u running, "
                     "%u waiting; of %u pages %u are free, %u of KV, %u of adapters; %u steps, "
                     "%u swapped out, %u in.",
                     STALL_US / 1000000, s->open, c.engine.running, c.engine.waiting,
                     c.pool.device_total, c.pool.device_free, c.pool.device_by_kind[PAGE_KV],
                     c.pool.device_by_kind[PAGE_ADAPTER], (unsigned)c.engine.steps,
                     (unsigned)c.engine.swaps_out, (unsigned)c.engine.swaps_in);
}

static enum status loop(struct serve *s, struct fault *fault)
{
    while (s->done < s->workload->count) {
        feed(s);
        enum engine_turn turn = engine_turn(stack_engine(s->options->stack));
        hear(s);
        sample(s);
        if (turn == ENGINE_HALTED)
            return fault_set(fault, STATUS_DEVICE, "the engine has stopped.");
        uint64_t now = clock_now_us(&s->clock);
        s->heard_us = s->open ? s->heard_us : now;
        if (now - s->heard_us > STALL_US)
            return stall(s, fault);
        if (turn == ENGINE_WAITING)
            (void)sched_yield(); // a device that computes by itself, or copies
        else if (turn == ENGINE_IDLE)
            (void)usleep(REST_US);
    }
    return STATUS_OK;
}

static int compare_double(const void *a, const void *b)
{
    double x = *(const double *)a, y = *(const double *)b;
    return x < y ? -1 : x > y;
}

static void add_time(struct serve_times *times, double us)
{
    times->ms[times->count++] = us * 1e-3;
}

static void sort_times(struct serve_times *times)
{
    sort_in_place(times->ms, times->count, sizeof *times->ms, compare_double);
}

static void sum_up(struct serve *s)
{
    struct serve_result *r = s->result;
    uint64_t begin = UINT64_MAX, end = 0;
    for (uint32_t i = 0; i < s->workload->count; i++) {
        const struct record *x = &s->records[i];
        begin = x->arrived_us < begin ? x->arrived_us : begin;
        end = x->done_us > end ? x->done_us : end;
        if (!x->ok)
            continue;
        r->finished++;
        r->input_tokens += s->workload->requests[i].input;
        r->output_tokens += x->generated;
        add_time(&r->first, (double)(x->first_us - x->arrived_us));
        if (x->generated > 1)
            add_time(&r->each, (double)(x->done_us - x->first_us) / (x->generated - 1));
        if (s->workload->requests[i].adapter != WORKLOAD_BASE)
            add_time(&r->adapter, (double)x->adapter_us);
    }
    r->seconds = (double)(end - begin) * 1e-6;
    sort_times(&r->first);
    sort_times(&r->each);
    sort_times(&r->adapter);
    double steps = (double)(s->steps_seen - r->from.engine.steps);
    steps = steps > 0 ? steps : 1;
    r->rows_mean = (double)(r->to.engine.rows - r->from.engine.rows) / steps;
    r->running_mean /= steps;
    r->free_mean /= steps;
    for (int k = 0; k < PAGE_KINDS; k++)
        r->pages_mean[k] /= steps;
}

static enum status allocate(struct serve *s, struct fault *fault)
{
    struct serve_result *r = s->result;
    uint32_t count = s->workload->count;
    s->records = calloc(count, sizeof *s->records);
    s->message = malloc(sizeof(struct engine_request) + s->workload->input_max * sizeof(int32_t));
    struct serve_times *times[] = {&r->first, &r->each, &r->adapter};
    bool has_all = s->records && s->message;
    for (int i = 0; i < 3; i++) {
        times[i]->ms = malloc(count * sizeof(double));
        has_all = has_all && times[i]->ms;
    }
    return has_all ? STATUS_OK
                   : fault_set(fault, STATUS_NO_MEMORY, "out of memory for the measurements.");
}

static enum status run(const struct serve_options *options, const struct workload *workload,
                       int32_t *probe, struct serve_result *out, struct fault *fault)
{
    *out = (struct serve_result){.seconds = 0};
    struct serve s = {.options = options,
                      .workload = workload,
                      .clock = clock_monotonic(),
                      .probe = probe,
                      .result = out};
    enum status status = allocate(&s, fault);
    serve_counters(options->stack, &out->from);
    s.steps_seen = out->from.engine.steps;
    s.start_us = s.heard_us = clock_now_us(&s.clock);
    double spent = cpu_s();
    if (!status)
        status = loop(&s, fault);
    out->cpu_s = cpu_s() - spent;
    serve_counters(options->stack, &out->to);
    if (!status)
        sum_up(&s);
    free(s.records);
    free(s.message);
    return status;
}

enum status serve_run(const struct serve_options *options, const struct workload *workload,
                      struct serve_result *out, struct fault *fault)
{
    return run(options, workload, NULL, out, fault);
}

void serve_result_clear(struct serve_result *result)
{
    free(result->first.ms);
    free(result->each.ms);
    free(result->adapter.ms);
    *result = (struct serve_result){.seconds = 0};
}

enum status serve_probe(const struct serve_options *options, uint32_t adapter, uint32_t tenant,
                        int32_t token[SERVE_PROBE_TOKENS], struct fault *fault)
{
    struct serve_options o = *options;
    struct workload_request request = {
        .adapter = adapter, .input = PROBE_PROMPT, .output = SERVE_PROBE_TOKENS, .tenant = tenant};
    struct workload one = {.requests = &request, .count = 1, .input_max = PROBE_PROMPT};
    struct serve_result result;
    o.concurrency = 1;
    memset(token, -1, SERVE_PROBE_TOKENS * sizeof *token);
    serve_settle(options->stack);
    enum status status = run(&o, &one, token, &result, fault);
    if (!status && result.failed)
        status = fault_set(fault, STATUS_INTERNAL, "a probe failed: %.200s", result.message);
    serve_result_clear(&result);
    return status;
}

void serve_settle(struct stack *stack)
{
    while (engine_turn(stack_engine(stack)) != ENGINE_IDLE)
        (void)sched_yield();
}
