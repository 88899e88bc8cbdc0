// SPDX-License-Identifier: Apache-2.0
// Serving many adapters from one engine: throughput, waiting, and what the pool did for it.
//
//   bench_adapters --model synth:NAME|DIR --workload FILE[,key=value...] [--workload ...]
//                  [--device cpu|cuda:N] [--pool-mib N | --pool-share S] [--host-mib N]
//                  [--sequences 64] [--rows 512] [--queue 256] [--page-kib N] [--threads N]
//                  [--batch-invariant 1] [--h2d GB/s] [--read GB/s] [--link-latency us]
//                  [--adapters N] [--rank R[,R...]] [--targets all|attention|experts]
//                  [--concurrency K] [--adapter-mib X] [--warm N] [--state DIR] [--write FILE]
//
// Every --workload is a case, run one after another on one stack, and prints one JSON line. Its
// keys are those of a workload (workload.h), set for all phases, and these, whose defaults are the
// options of the same names:
//   name=TEXT          in the line, else the file's
//   registered=N       adapters that are registered, at least those that the workload names
//   rank=R[+R...]      adapter i has the rank i % count
//   targets=...        projections
//   concurrency=K      closed loop of K in flight; 0: open loop, at the workload's times
//   adapter_mib=X      a fixed split: adapters may have X MiB of the pool, experts what all of them
//                      need, KV the rest; 0: one pool
//   adapter_share=X    likewise, in percent of what experts leave of the pool
//   first=1            over_first of this case and of those after it is over this one
//   warm=N             N requests of the workload are served first, and not measured
// and adapters=fit, or adapters=2fit, 1.5fit: so many times the adapters that the pool holds beside
// all experts and the KV of --sequences sequences of the workload's mean length.
//
// Adapters are random (bench_lora.c), registered anew for every case, so that each begins with none
// of them resident and as many experts as fit. Those of one rank share a store file, and each has
// pages of its own; the file is in the page cache after its first reading, so the file tier is read
// at the speed of memory unless --read makes it slower.
//
// What is checked of the answers: a prompt served alone, with the base, with the first and with the
// last adapter, gives the same tokens before and after the case, and the same with two adapters of
// one rank (their numbers are the same, their pages are not). Every request of the case ends well
// with every token it asked for, else the exit code is 1.
//
// live: adapters that requests choose from; used: those that some request has chosen.
// store_s: making the store files that were not there yet; register_s: registering from them.
// part_pages: pages of expert LoRA that came, part_misses those that a gate waited for.
// times: ttft from the time in the workload (open) or the sending (closed) to the first token; tpot
// per output token after the first; adapter_wait as the engine measures it. bytes: all copies of
// the case, and of them what adapters and experts were fetched. over_first: this case's number over
// that of the first case, or of the last that had first=1. lora_work_share: multiplications of LoRA
// over those of the base model, of the tokens of the case.
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <unistd.h>

#include "base/arith.h"
#include "base/check.h"
#include "base/clock.h"
#include "bench/bench_lora.h"
#include "bench/bench_serve.h"
#include "bench/bench_state.h"

enum { CASES_MAX = 64, STORES_MAX = 32, TEXT_MAX = 512, PROBES = 3, SEED = 1234 };

struct arguments {
    const char *model, *device, *state, *write;
    const char *cases[CASES_MAX];
    uint32_t case_count;
    uint64_t pool_bytes, host_bytes;
    size_t page_bytes;
    double pool_share, h2d_gbytes_per_s, read_gbytes_per_s;
    uint32_t link_latency_us, sequences, rows, queue, threads;
    bool batch_invariant;
    // of the cases
    struct bench_lora lora; // count: registered, at least
    uint32_t concurrency, warm;
    double adapter_mib;
};

struct bench_case {
    char name[64], path[TEXT_MAX], overrides[TEXT_MAX];
    struct bench_lora lora;
    double fit; // adapters=1.5fit; 0: a number
    double adapter_mib, adapter_share;
    uint32_t concurrency, warm;
    bool is_first;
    struct workload workload;
};

struct store {
    uint32_t rank;
    enum bench_lora_targets targets;
    char path[ENGINE_PATH];
};

struct bench {
    struct arguments arguments;
    struct bench_case *cases; // [case_count]
    struct stack *stack;
    struct store stores[STORES_MAX];
    uint32_t store_count, registered, failed; // failed: requests
    double store_s, register_s, first_requests_per_s,
        first_ttft_ms; // the latter two of the first case
};

static double now_s(void)
{
    struct clock clock = clock_monotonic();
    return (double)clock_now_us(&clock) * 1e-6;
}

// ---- the command line ----

static bool parse_size(struct arguments *a, const char *key, const char *value)
{
    double number = atof(value);
    if (!strcmp(key, "--pool-mib"))
        a->pool_bytes = (uint64_t)(number * 1048576);
    else if (!strcmp(key, "--host-mib"))
        a->host_bytes = (uint64_t)(number * 1048576);
    else if (!strcmp(key, "--page-kib"))
        a->page_bytes = (size_t)(number * 1024);
    else if (!strcmp(key, "--pool-share"))
        a->pool_share = number;
    else if (!strcmp(key, "--h2d"))
        a->h2d_gbytes_per_s = number;
    else if (!strcmp(key, "--read"))
        a->read_gbytes_per_s = number;
    else if (!strcmp(key, "--link-latency"))
        a->link_latency_us = (uint32_t)number;
    else if (!strcmp(key, "--sequences"))
        a->sequences = (uint32_t)number;
    else if (!strcmp(key, "--rows"))
        a->rows = (uint32_t)number;
    else if (!strcmp(key, "--queue"))
        a->queue = (uint32_t)number;
    else if (!strcmp(key, "--threads"))
        a->threads = (uint32_t)number;
    else if (!strcmp(key, "--batch-invariant"))
        a->batch_invariant = number > 0;
    else if (!strcmp(key, "--adapters"))
        a->lora.count = (uint32_t)number;
    else if (!strcmp(key, "--concurrency"))
        a->concurrency = (uint32_t)number;
    else if (!strcmp(key, "--adapter-mib"))
        a->adapter_mib = number;
    else if (!strcmp(key, "--warm"))
        a->warm = (uint32_t)number;
    else
        return false;
    return number >= 0;
}

static bool parse_one(struct arguments *a, const char *key, const char *value)
{
    if (!strcmp(key, "--model"))
        a->model = value;
    else if (!strcmp(key, "--device"))
        a->device = value;
    else if (!strcmp(key, "--state"))
        a->state = value;
    else if (!strcmp(key, "--write"))
        a->write = value;
    else if (!strcmp(key, "--workload") && a->case_count < CASES_MAX)
        a->cases[a->case_count++] = value;
    else if (!strcmp(key, "--rank"))
        a->lora.ranks = bench_parse_list(value, ',', a->lora.rank, BENCH_LORA_RANKS_MAX);
    else if (!strcmp(key, "--targets"))
        return bench_lora_targets_parse(value, &a->lora.targets);
    else
        return parse_size(a, key, value);
    return true;
}

static bool parse(struct arguments *a, int count, char **values)
{
    bool valid = count % 2 == 1;
    a->lora.ranks = bench_parse_list("8", ',', a->lora.rank, BENCH_LORA_RANKS_MAX);
    for (int i = 1; valid && i + 1 < count; i += 2) {
        valid = parse_one(a, values[i], values[i + 1]);
        if (!valid)
            (void)fprintf(stderr, "%s %s: no such option or value.\n", values[i], values[i + 1]);
    }
    return valid && a->case_count && a->lora.ranks && a->sequences && a->rows && a->queue &&
           (a->model || a->write);
}

// ---- cases ----

// A key that is not the workload's; *known: it was one.
static bool set_case(struct bench_case *c, const char *key, const char *value, bool *known)
{
    *known = true;
    if (!strcmp(key, "name"))
        (void)snprintf(c->name, sizeof c->name, "%s", value);
    else if (!strcmp(key, "registered"))
        c->lora.count = (uint32_t)atoi(value);
    else if (!strcmp(key, "concurrency"))
        c->concurrency = (uint32_t)atoi(value);
    else if (!strcmp(key, "adapter_mib"))
        c->adapter_mib = atof(value);
    else if (!strcmp(key, "adapter_share"))
        c->adapter_share = atof(value);
    else if (!strcmp(key, "first"))
        c->is_first = atoi(value) != 0;
    else if (!strcmp(key, "warm"))
        c->warm = (uint32_t)atoi(value);
    else if (!strcmp(key, "rank"))
        c->lora.ranks = bench_parse_list(value, '+', c->lora.rank, BENCH_LORA_RANKS_MAX);
    else if (!strcmp(key, "targets"))
        return bench_lora_targets_parse(value, &c->lora.targets);
    else if (!strcmp(key, "adapters") && strstr(value, "fit"))
        c->fit = value[0] == 'f' ? 1 : atof(value);
    else
        *known = false;
    return c->lora.ranks > 0;
}

static enum status parse_case(const struct arguments *a, const char *text, struct bench_case *c,
                              struct fault *fault)
{
    char copy[TEXT_MAX], *rest;
    if (strlen(text) >= sizeof copy)
        return fault_set(fault, STATUS_LIMIT, "--workload %.40s... is too long.", text);
    strcpy(copy, text);
    *c = (struct bench_case){.lora = a->lora,
                             .concurrency = a->concurrency,
                             .warm = a->warm,
                             .adapter_mib = a->adapter_mib};
    char *word = strtok_r(copy, ",", &rest);
    (void)snprintf(c->path, sizeof c->path, "%s", word ? word : "");
    const char *slash = strrchr(c->path, '/'), *file = slash ? slash + 1 : c->path;
    (void)snprintf(c->name, sizeof c->name, "%.*s", (int)strcspn(file, "."), file);
    while ((word = strtok_r(NULL, ",", &rest))) {
        char whole[TEXT_MAX], *equals = strchr(word, '=');
        bool known = false;
        (void)snprintf(whole, sizeof whole, "%s", word);
        if (equals)
            *equals = 0;
        if (equals && !set_case(c, word, equals + 1, &known) && known)
            return fault_set(fault, STATUS_INVALID, "\"%.60s\" is not a value for it.", whole);
        if (!known) {
            strcat(c->overrides, *c->overrides ? "," : "");
            strcat(c->overrides, whole);
        }
    }
    return workload_open(c->path, c->overrides, &c->workload, fault);
}

static enum status parse_cases(struct bench *b, struct fault *fault)
{
    const struct arguments *a = &b->arguments;
    enum status status = STATUS_OK;
    b->cases = calloc(a->case_count, sizeof *b->cases);
    if (!b->cases)
        return fault_set(fault, STATUS_NO_MEMORY, "out of memory.");
    for (uint32_t i = 0; !status && i < a->case_count; i++)
        status = parse_case(a, a->cases[i], &b->cases[i], fault);
    return status;
}

static double tokens_mean(const struct workload *w)
{
    double tokens = 0;
    for (uint32_t i = 0; i < w->count; i++)
        tokens += w->requests[i].input + w->requests[i].output;
    return tokens / w->count;
}

static double expert_pages(const struct bench *b)
{
    const struct expert_shape *shape = &stack_model(b->stack)->expert_shape;
    return (double)shape->layers * shape->experts * shape->pages_per_expert;
}

// adapters=fit: see the head. At least one.
static uint32_t adapters_that_fit(const struct bench *b, const struct bench_case *c)
{
    const struct kv_shape *kv = stack_kv_shape(b->stack);
    struct bench_lora each = c->lora;
    struct pool_stats pool;
    pool_stats(stack_pool(b->stack), &pool);
    each.count = each.ranks;
    double pages =
        (double)bench_lora_pages(&each, stack_adapter_base(b->stack), pool.page_bytes) / each.ranks;
    double blocks = tokens_mean(&c->workload) / kv->block_tokens + 1;
    double left = (double)pool.device_total - expert_pages(b) -
                  b->arguments.sequences * blocks * kv->pages_per_block;
    double count = c->fit * (left > pages ? floor(left / pages) : 1);
    return count < 1 ? 1 : (uint32_t)count;
}

static enum status resolve_fit(struct bench *b, struct bench_case *c, struct fault *fault)
{
    char overrides[TEXT_MAX + 40];
    if (c->fit <= 0)
        return STATUS_OK;
    (void)snprintf(overrides, sizeof overrides, "%s%sadapters=%u", c->overrides,
                   *c->overrides ? "," : "", adapters_that_fit(b, c));
    workload_clear(&c->workload);
    return workload_open(c->path, overrides, &c->workload, fault);
}

// adapter_mib: see the head.
static enum status set_split(struct bench *b, const struct bench_case *c, struct fault *fault)
{
    struct pool_stats pool;
    struct pool *p = stack_pool(b->stack);
    pool_stats(p, &pool);
    double left = pool.device_total - expert_pages(b);
    double adapters =
        floor(c->adapter_share > 0 ? left * c->adapter_share / 100
                                   : c->adapter_mib * 1048576 / (double)pool.page_bytes);
    double rest = left - adapters;
    bool splits = c->adapter_mib > 0 || c->adapter_share > 0;
    if (splits && (adapters < 1 || rest < 1))
        return fault_set(fault, STATUS_LIMIT,
                         "case %.40s: the pool has %u pages of %zu KiB, experts need %.0f.",
                         c->name, pool.device_total, pool.page_bytes / 1024, expert_pages(b));
    pool_set_limit(p, PAGE_ADAPTER, splits ? (uint32_t)adapters : POOL_PAGE_NONE);
    pool_set_limit(p, PAGE_KV, splits ? (uint32_t)rest : POOL_PAGE_NONE);
    return STATUS_OK;
}

// ---- registering ----

static enum status find_store(struct bench *b, const struct bench_lora *lora, uint32_t r,
                              const char **out, struct fault *fault)
{
    for (uint32_t i = 0; i < b->store_count; i++) {
        const struct store *known = &b->stores[i];
        *out = known->path;
        if (known->rank == lora->rank[r] && known->targets == lora->targets)
            return STATUS_OK;
    }
    if (b->store_count == STORES_MAX)
        return fault_set(fault, STATUS_LIMIT, "more than %d kinds of adapters.", STORES_MAX);
    struct store *store = &b->stores[b->store_count];
    enum status status =
        bench_lora_store(lora, b->stack, r, b->arguments.state, store->path, fault);
    if (status)
        return status;
    store->rank = lora->rank[r];
    store->targets = lora->targets;
    *out = store->path;
    b->store_count++;
    return STATUS_OK;
}

static void unregister_all(struct bench *b)
{
    for (char name[ADAPTER_NAME_MAX]; b->registered; b->registered--) {
        bench_lora_name(b->registered - 1, name);
        CHECK(!adapter_remove(stack_adapters(b->stack), name));
    }
    serve_settle(b->stack);
}

static enum status register_all(struct bench *b, const struct bench_case *c, struct fault *fault)
{
    const struct bench_lora *lora = &c->lora;
    const char *path[BENCH_LORA_RANKS_MAX] = {NULL};
    char name[ADAPTER_NAME_MAX];
    uint32_t tenants = c->workload.tenants;
    enum status status = STATUS_OK;
    double begin = now_s();
    for (uint32_t r = 0; !status && r < lora->ranks && r < lora->count; r++)
        status = find_store(b, lora, r, &path[r], fault);
    double start = now_s();
    b->store_s = start - begin;
    for (uint32_t i = 0; !status && i < lora->count; i++) {
        bench_lora_name(i, name);
        status = engine_register_adapter(stack_engine(b->stack), name, path[i % lora->ranks],
                                         tenants > 1 ? i % tenants : UINT32_MAX, fault);
        b->registered += !status;
    }
    b->register_s = now_s() - start;
    return status;
}

// ---- answers ----

struct probes {
    int32_t token[PROBES][SERVE_PROBE_TOKENS];
};

// The base, the first adapter and the last one of the same rank.
static enum status probe(const struct serve_options *serve, const struct bench_case *c,
                         struct probes *out, struct fault *fault)
{
    uint32_t count = c->lora.count, tenants = c->workload.tenants;
    uint32_t last = count ? (count - 1) / c->lora.ranks * c->lora.ranks : 0;
    enum status status = serve_probe(serve, WORKLOAD_BASE, 0, out->token[0], fault);
    memcpy(out->token[1], out->token[0], sizeof out->token[0]);
    memcpy(out->token[2], out->token[0], sizeof out->token[0]);
    if (!status && count)
        status = serve_probe(serve, 0, 0, out->token[1], fault);
    if (!status && count)
        status = serve_probe(serve, last, last % tenants, out->token[2], fault);
    if (!status && memcmp(out->token[1], out->token[2], sizeof out->token[1]) != 0)
        status = fault_set(fault, STATUS_INTERNAL,
                           "adapters 0 and %u have the same numbers and gave other tokens.", last);
    return status;
}

// ---- printing ----

// Multiplications of the base model for these tokens, and of LoRA.
static double lora_work_share(const struct bench *b, const struct bench_case *c,
                              const struct serve_result *r)
{
    const struct model *model = stack_model(b->stack);
    const struct model_config *m = &model->config;
    double moe = model->expert_shape.layers, rows = (double)(r->input_tokens + r->output_tokens);
    double attention = 2.0 * (m->heads + m->kv_heads) * m->head_dim * m->hidden;
    double dense = (m->layers - moe) * 3.0 * m->intermediate * m->hidden;
    double routed = moe * (3.0 * m->top_k * m->moe_intermediate + m->experts) * m->hidden;
    double head = (double)m->vocab * m->hidden * (double)r->output_tokens, ranks = 0;
    for (uint32_t i = 0; i < c->lora.ranks; i++)
        ranks += (double)c->lora.rank[i] / c->lora.ranks;
    double lora = c->workload.adapters
                      ? bench_lora_work(&c->lora, stack_adapter_base(b->stack), m->top_k, 1) * ranks
                      : 0;
    return lora * rows / ((m->layers * attention + dense + routed) * rows + head);
}

static void print_head(const struct bench *b, const struct bench_case *c)
{
    const struct arguments *a = &b->arguments;
    const struct workload *w = &c->workload;
    const struct bench_lora *lora = &c->lora;
    double span = (double)w->requests[w->count - 1].time_us * 1e-6;
    (void)printf("{\"bench\":\"adapters\",\"case\":\"%s\",\"model\":\"%s\",\"device\":\"%s\","
                 "\"commit\":\"%s\",\"workload\":\"%s\",\"set\":\"%s\",\"registered\":%u,"
                 "\"live\":%u,\"used\":%u,\"ranks\":[",
                 c->name, a->model, a->device, POLDER_COMMIT, c->path, c->overrides, lora->count,
                 w->adapters, w->used);
    for (uint32_t r = 0; r < lora->ranks; r++)
        (void)printf("%s%u", r ? "," : "", lora->rank[r]);
    (void)printf("],\"targets\":\"%s\",\"tenants\":%u,\"loop\":\"%s\",\"concurrency\":%u,"
                 "\"offered_per_s\":%.3f,\"store_s\":%.3f,\"register_s\":%.3f",
                 bench_lora_targets_name(lora->targets), w->tenants,
                 c->concurrency ? "closed" : "open", c->concurrency,
                 c->concurrency || span <= 0 ? 0.0 : w->count / span, b->store_s, b->register_s);
}

static void print_times(const char *name, const struct serve_times *times)
{
    (void)printf(",\"%s_p50_ms\":%.3f,\"%s_p90_ms\":%.3f,\"%s_p99_ms\":%.3f", name,
                 serve_percentile(times, 0.5), name, serve_percentile(times, 0.9), name,
                 serve_percentile(times, 0.99));
}

static void print_served(struct bench *b, const struct bench_case *c, const struct serve_result *r)
{
    double per_s = r->finished / r->seconds, first = serve_percentile(&r->first, 0.5);
    if (c->is_first || b->first_requests_per_s <= 0) {
        b->first_requests_per_s = per_s;
        b->first_ttft_ms = first;
    }
    (void)printf(",\"requests\":%u,\"finished\":%u,\"failed\":%u,\"held_back\":%u,\"seconds\":%.3f,"
                 "\"cpu_s\":%.3f,"
                 "\"requests_per_s\":%.4f,\"output_tokens_per_s\":%.1f,\"tokens_per_s\":%.1f",
                 c->workload.count, r->finished, r->failed, r->held_back, r->seconds, r->cpu_s,
                 per_s, (double)r->output_tokens / r->seconds,
                 (double)(r->output_tokens + r->input_tokens) / r->seconds);
    print_times("ttft", &r->first);
    print_times("tpot", &r->each);
    print_times("adapter_wait", &r->adapter);
    (void)printf(",\"requests_per_s_over_first\":%.4f,\"ttft_p50_over_first\":%.3f,"
                 "\"lora_work_share\":%.4f",
                 b->first_requests_per_s > 0 ? per_s / b->first_requests_per_s : 0.0,
                 b->first_ttft_ms > 0 ? first / b->first_ttft_ms : 0.0, lora_work_share(b, c, r));
}

// Bytes of every adapter's loads.
static double adapter_bytes(const struct bench *b)
{
    struct adapter_info info;
    double bytes = 0;
    for (uint32_t i = 0; adapter_at(stack_adapters(b->stack), i, &info); i++)
        bytes += ((double)info.loads.loads * info.trunk_pages + (double)info.loads.part_pages) *
                 (double)stack_page_bytes(b->stack);
    return bytes;
}

// loaded_before: adapter_bytes at the beginning of the case.
static void print_moved(const struct bench *b, const struct serve_result *r, double loaded_before)
{
    const struct serve_counters *f = &r->from, *t = &r->to;
    uint64_t hits = t->adapters.loads.hits - f->adapters.loads.hits;
    uint64_t misses = t->adapters.loads.misses - f->adapters.loads.misses;
    uint64_t loads = t->adapters.loads.loads - f->adapters.loads.loads;
    uint64_t load_us = t->adapters.loads.load_us - f->adapters.loads.load_us;
    (void)printf(
        ",\"adapter_hits\":%llu,\"adapter_misses\":%llu,\"adapter_hit_rate\":%.4f,"
        "\"adapter_loads\":%llu,\"adapter_load_mean_ms\":%.3f,\"adapters_given_back\":%llu,"
        "\"adapters_resident\":%u,\"part_pages\":%llu,\"part_misses\":%llu,"
        "\"parts_given_back\":%llu,\"parts_resident\":%u",
        (unsigned long long)hits, (unsigned long long)misses,
        hits + misses ? (double)hits / (double)(hits + misses) : 0.0, (unsigned long long)loads,
        loads ? (double)load_us * 1e-3 / (double)loads : 0.0,
        (unsigned long long)(t->adapters.given_back - f->adapters.given_back), t->adapters.resident,
        (unsigned long long)(t->adapters.loads.part_pages - f->adapters.loads.part_pages),
        (unsigned long long)(t->adapters.loads.part_misses - f->adapters.loads.part_misses),
        (unsigned long long)(t->adapters.parts_given_back - f->adapters.parts_given_back),
        t->adapters.parts_resident);
    (void)printf(",\"expert_hits\":%llu,\"expert_misses\":%llu,\"experts_resident\":%llu,"
                 "\"experts_total\":%llu",
                 (unsigned long long)(t->experts.hits - f->experts.hits),
                 (unsigned long long)(t->experts.misses - f->experts.misses),
                 (unsigned long long)t->experts.resident, (unsigned long long)t->experts.total);
    static const char *const tiers[COPY_RESOURCES] = {"h2d", "d2h", "file_read"};
    for (int i = 0; i < COPY_RESOURCES; i++)
        (void)printf(",\"%s_bytes\":%llu,\"%s_busy_ms\":%.1f", tiers[i],
                     (unsigned long long)(t->copies.bytes[i] - f->copies.bytes[i]), tiers[i],
                     (double)(t->copies.busy_us[i] - f->copies.busy_us[i]) * 1e-3);
    (void)printf(",\"adapter_bytes\":%.0f,\"expert_bytes\":%llu", adapter_bytes(b) - loaded_before,
                 (unsigned long long)(t->experts.fetched_bytes - f->experts.fetched_bytes));
}

static void print_pool(const struct pool *pool, const struct serve_result *r)
{
    static const char *const kinds[PAGE_KINDS] = {"kv", "adapter", "expert"};
    const struct engine_counters *f = &r->from.engine, *t = &r->to.engine;
    const struct pool_stats *from = &r->from.pool, *to = &r->to.pool;
    (void)printf(",\"swaps_out\":%llu,\"swaps_in\":%llu,\"kv_drops\":%llu,"
                 "\"rows_recomputed\":%llu,\"preemptions\":%llu,\"gate_misses\":%llu,"
                 "\"captures\":%llu",
                 (unsigned long long)(t->swaps_out - f->swaps_out),
                 (unsigned long long)(t->swaps_in - f->swaps_in),
                 (unsigned long long)(t->drops - f->drops),
                 (unsigned long long)(t->rows_recomputed - f->rows_recomputed),
                 (unsigned long long)(t->pauses - f->pauses),
                 (unsigned long long)(t->gate_misses - f->gate_misses),
                 (unsigned long long)(t->captures - f->captures));
    (void)printf(",\"page_bytes\":%zu,\"pool_pages\":%u,\"host_pages\":%u,\"free_pages_mean\":%.0f",
                 to->page_bytes, to->device_total, to->host_total, r->free_mean);
    (void)printf(",\"adapter_pages_limit\":%u,\"kv_pages_limit\":%u",
                 pool_limit(pool, PAGE_ADAPTER), pool_limit(pool, PAGE_KV));
    for (int k = 0; k < PAGE_KINDS; k++)
        (void)printf(",\"%s_pages_mean\":%.0f,\"%s_pages_max\":%u", kinds[k], r->pages_mean[k],
                     kinds[k], r->pages_max[k]);
    for (int k = 0; k < PAGE_KINDS; k++)
        for (int l = 0; l < PAGE_KINDS; l++)
            if (k != l)
                (void)printf(",\"%s_took_from_%s\":%llu", kinds[k], kinds[l],
                             (unsigned long long)(to->taken_from[k][l] - from->taken_from[k][l]));
    (void)printf(
        ",\"steps\":%llu,\"rows_per_step\":%.2f,\"running_mean\":%.2f,\"running_max\":%u}\n",
        (unsigned long long)(t->steps - f->steps), r->rows_mean, r->running_mean, r->running_max);
}

// ---- running ----

static enum status warm_up(const struct serve_options *options, const struct bench_case *c,
                           struct fault *fault)
{
    struct serve_options o = *options;
    struct workload some = c->workload;
    struct serve_result result;
    if (!c->warm)
        return STATUS_OK;
    some.count = c->warm < some.count ? c->warm : some.count;
    o.concurrency = o.concurrency ? o.concurrency : o.open_max;
    enum status status = serve_run(&o, &some, &result, fault);
    serve_result_clear(&result);
    return status;
}

static enum status run_case(struct bench *b, struct bench_case *c, struct fault *fault)
{
    struct serve_options serve = {.stack = b->stack,
                                  .concurrency = c->concurrency,
                                  .open_max = b->arguments.queue,
                                  .seed = SEED};
    struct probes before, after;
    struct serve_result result = {.seconds = 0};
    enum status status = resolve_fit(b, c, fault);
    if (c->lora.count < c->workload.adapters)
        c->lora.count = c->workload.adapters;
    if (!status)
        status = set_split(b, c, fault);
    if (!status)
        status = register_all(b, c, fault);
    if (!status)
        status = probe(&serve, c, &before, fault);
    if (!status)
        status = warm_up(&serve, c, fault);
    double loaded = adapter_bytes(b);
    if (!status)
        status = serve_run(&serve, &c->workload, &result, fault);
    if (!status) {
        print_head(b, c);
        print_served(b, c, &result);
        print_moved(b, &result, loaded);
        print_pool(stack_pool(b->stack), &result);
        (void)fflush(stdout);
        status = probe(&serve, c, &after, fault);
    }
    if (!status && memcmp(&before, &after, sizeof before) != 0)
        status = fault_set(fault, STATUS_INTERNAL,
                           "a prompt gave other tokens after case %.40s than before.", c->name);
    if (result.failed)
        (void)fprintf(stderr, "%u requests of case %s failed: %s\n", result.failed, c->name,
                      result.message);
    b->failed += result.failed;
    serve_result_clear(&result);
    return status;
}

// ---- life ----

static enum status open_stack(struct bench *b, struct fault *fault)
{
    const struct arguments *a = &b->arguments;
    uint32_t context = SERVE_PROBE_TOKENS * 4, tenants = 1, adapters = 4096, rank = 1;
    for (uint32_t i = 0; i < a->case_count; i++) {
        const struct bench_case *c = &b->cases[i];
        context = (uint32_t)max_size(context, c->workload.tokens_max);
        tenants = (uint32_t)max_size(tenants, c->workload.tenants);
        adapters = (uint32_t)max_size(adapters, max_size(c->lora.count, c->workload.adapters));
        for (uint32_t r = 0; r < c->lora.ranks; r++)
            rank = (uint32_t)max_size(rank, c->lora.rank[r]);
    }
    struct stack_options o = {.model = a->model,
                              .device = a->device,
                              .state_directory = a->state,
                              .gpu_memory_utilization = a->pool_share,
                              .batch_invariant = a->batch_invariant,
                              .threads = a->threads,
                              .pool_bytes = a->pool_bytes,
                              .host_bytes = a->host_bytes,
                              .page_bytes = a->page_bytes,
                              .context_max = context,
                              .sequences_max = a->sequences,
                              .rows_max = a->rows,
                              .queue_max = a->queue,
                              .adapters_max = adapters,
                              .rank_max = rank,
                              .tenants_max = tenants,
                              .h2d_gbytes_per_s = a->h2d_gbytes_per_s,
                              .read_gbytes_per_s = a->read_gbytes_per_s,
                              .link_latency_us = a->link_latency_us,
                              .no_prefix_sharing = true};
    return stack_create(&o, &b->stack, fault);
}

static enum status run_all(struct bench *b, struct fault *fault)
{
    char line[400];
    double start = now_s();
    enum status status = open_stack(b, fault);
    if (status)
        return status;
    double loaded = now_s();
    serve_settle(b->stack);
    stack_describe(b->stack, line, sizeof line);
    (void)printf("{\"bench\":\"adapters_start\",\"stack\":\"%s\",\"load_s\":%.2f,"
                 "\"fill_s\":%.2f}\n",
                 line, loaded - start, now_s() - loaded);
    (void)fflush(stdout);
    for (uint32_t i = 0; !status && i < b->arguments.case_count; i++) {
        status = run_case(b, &b->cases[i], fault);
        if (!status)
            unregister_all(b);
    }
    return status;
}

// A descriptor for every registered adapter.
static void raise_descriptors(void)
{
    struct rlimit limit;
    if (getrlimit(RLIMIT_NOFILE, &limit))
        return;
    limit.rlim_cur = limit.rlim_max;
    if (setrlimit(RLIMIT_NOFILE, &limit))
        return; // registering says so when they run out
}

int main(int count, char **values)
{
    struct bench_state own = {.path = ""};
    struct bench b = {.arguments = {.device = "cpu", .sequences = 64, .rows = 512, .queue = 256}};
    struct fault fault = {.text = ""};
    if (!parse(&b.arguments, count, values)) {
        (void)fprintf(stderr, "usage: see the head of bench_adapters.c\n");
        return 2;
    }
    raise_descriptors();
    enum status status = parse_cases(&b, &fault);
    bool is_ours = !b.arguments.state && !b.arguments.write;
    if (is_ours)
        b.arguments.state = bench_state_begin(&own);
    if (!status && is_ours && !b.arguments.state)
        status = fault_set(&fault, STATUS_IO, "no temporary directory could be made.");
    if (!status)
        status = b.arguments.write ? workload_write(&b.cases[0].workload, b.arguments.write, &fault)
                                   : run_all(&b, &fault);
    if (status)
        (void)fprintf(stderr, "%s\n", fault.text);
    stack_destroy(b.stack);
    for (uint32_t i = 0; i < b.store_count; i++)
        (void)unlink(b.stores[i].path);
    bench_state_end(&own);
    for (uint32_t i = 0; b.cases && i < b.arguments.case_count; i++)
        workload_clear(&b.cases[i].workload);
    free(b.cases);
    return status || b.failed ? 1 : 0;
}
