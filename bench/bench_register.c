// SPDX-License-Identifier: Apache-2.0
// Registering one adapter, and the first token with it.
//
//   bench_register --model synth:NAME|DIR [--device cpu|cuda:N] [--mib 100] [--times 5]
//                  [--targets all|attention|experts] [--pool-mib N] [--state DIR]
//
// The adapter's rank is the one with which its store is nearest to --mib. Each time, in this order:
//   write     as many bytes as the store has, written to a file beside it and synced: the disk
//   convert   the PEFT directory (in the page cache, just written) to the synced store file
//   register  the store file to the engine
//   read      the store file from beginning to end, dropped from the page cache before: the disk
//   cold      dropped again; a short request alone, to its first token: load and one step
//   warm      the same request again: one step
// and the medians are printed as one JSON line. register_over_disk is write / (convert + register),
// 1 as fast as the disk; cold_over_copy_and_step is cold / (read + warm), 1 when nothing but the
// copy and a step is waited for. A file system that keeps its files in memory makes read a copy.
//
// Checked: a prompt gives the same tokens after every load.
#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include "base/arith.h"
#include "base/clock.h"
#include "base/sort.h"
#include "bench/bench_lora.h"
#include "bench/bench_serve.h"
#include "bench/bench_state.h"

enum { TIMES_MAX = 64, CHUNK = 1 << 20, RANK_MAX = 512, PATH_ROOM = ENGINE_PATH - 64 };
enum { WRITE, CONVERT, REGISTER, READ, COLD, LOAD, WARM, MEASURES };

struct bench {
    const char *model, *device, *state;
    double mib;
    uint64_t pool_bytes;
    uint32_t times;
    struct bench_lora lora;
    struct stack *stack;
    uint64_t bytes;
    double s[MEASURES][TIMES_MAX];
    uint8_t *chunk;
    int32_t token[SERVE_PROBE_TOKENS]; // after the first load
};

static double now_s(void)
{
    struct clock clock = clock_monotonic();
    return (double)clock_now_us(&clock) * 1e-6;
}

static int compare_double(const void *a, const void *b)
{
    double x = *(const double *)a, y = *(const double *)b;
    return x < y ? -1 : x > y;
}

// ---- the disk ----

static enum status io_fault(const char *path, struct fault *fault)
{
    return fault_set(fault, STATUS_IO, "%.200s: %s.", path, strerror(errno));
}

static enum status write_plain(struct bench *b, double *seconds, struct fault *fault)
{
    char path[ENGINE_PATH];
    (void)snprintf(path, sizeof path, "%.*s/plain", PATH_ROOM, b->state);
    double start = now_s();
    int file = open(path, O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC, 0600);
    bool failed = file < 0;
    for (uint64_t at = 0; !failed && at < b->bytes; at += CHUNK) {
        size_t n = min_size(CHUNK, (size_t)(b->bytes - at));
        failed = write(file, b->chunk, n) != (ssize_t)n;
    }
    failed = failed || fsync(file);
    *seconds = now_s() - start;
    enum status status = failed ? io_fault(path, fault) : STATUS_OK;
    if (file >= 0)
        (void)close(file);
    (void)unlink(path);
    return status;
}

// Drops the file from the page cache; with `seconds` then reads it all.
static enum status read_plain(struct bench *b, const char *path, double *seconds,
                              struct fault *fault)
{
    int file = open(path, O_RDONLY | O_CLOEXEC);
    if (file < 0)
        return io_fault(path, fault);
    ssize_t got = 1;
    bool failed = posix_fadvise(file, 0, 0, POSIX_FADV_DONTNEED);
    double start = now_s();
    while (seconds && got > 0)
        got = read(file, b->chunk, CHUNK);
    if (seconds)
        *seconds = now_s() - start;
    failed = failed || got < 0;
    (void)close(file);
    return failed ? io_fault(path, fault) : STATUS_OK;
}

// ---- one time ----

static enum status first_token(struct bench *b, double *seconds, struct serve_result *result,
                               struct fault *fault)
{
    struct serve_options o = {.stack = b->stack, .concurrency = 1, .open_max = 1, .seed = 7};
    struct workload_request request = {.input = 8, .output = 1};
    struct workload one = {.requests = &request, .count = 1, .input_max = 8};
    enum status status = serve_run(&o, &one, result, fault);
    if (!status && result->failed)
        status = fault_set(fault, STATUS_INTERNAL, "%.200s", result->message);
    if (!status)
        *seconds = serve_percentile(&result->first, 0.5) * 1e-3;
    serve_result_clear(result);
    return status;
}

static enum status serve_it(struct bench *b, const char *store, uint32_t time, struct fault *fault)
{
    struct serve_result result;
    struct adapters_stats before, after;
    int32_t token[SERVE_PROBE_TOKENS];
    serve_settle(b->stack);
    enum status status = read_plain(b, store, &b->s[READ][time], fault);
    if (!status)
        status = read_plain(b, store, NULL, fault);
    adapters_stats(stack_adapters(b->stack), &before);
    if (!status)
        status = first_token(b, &b->s[COLD][time], &result, fault);
    adapters_stats(stack_adapters(b->stack), &after);
    b->s[LOAD][time] = (double)(after.loads.load_us - before.loads.load_us) * 1e-6;
    if (!status)
        status = first_token(b, &b->s[WARM][time], &result, fault);
    if (!status)
        status = serve_probe(&(struct serve_options){.stack = b->stack, .open_max = 1, .seed = 7},
                             0, 0, token, fault);
    if (status)
        return status;
    if (!time)
        memcpy(b->token, token, sizeof token);
    return !memcmp(b->token, token, sizeof token)
               ? STATUS_OK
               : fault_set(fault, STATUS_INTERNAL,
                           "the adapter gave other tokens when loaded anew.");
}

static enum status one_time(struct bench *b, uint32_t time, struct fault *fault)
{
    char peft[ENGINE_PATH], store[ENGINE_PATH] = "", name[ADAPTER_NAME_MAX];
    struct adapter_report report;
    (void)snprintf(peft, sizeof peft, "%.*s/peft", PATH_ROOM, b->state);
    bench_lora_name(0, name);
    enum status status = bench_lora_peft(&b->lora, b->stack, 0, peft, fault);
    double start = now_s();
    if (!status)
        status = stack_convert_adapter(b->stack, name, peft, store, sizeof store, &report, fault);
    double converted = now_s();
    if (!status)
        status = engine_register_adapter(stack_engine(b->stack), name, store, UINT32_MAX, fault);
    b->s[REGISTER][time] = now_s() - converted;
    b->s[CONVERT][time] = converted - start;
    b->bytes = report.bytes;
    if (!status)
        status = serve_it(b, store, time, fault);
    if (!status)
        status = adapter_remove(stack_adapters(b->stack), name);
    bench_lora_peft_remove(peft);
    if (*store)
        (void)unlink(store);
    return status ? status : write_plain(b, &b->s[WRITE][time], fault);
}

// ---- life ----

static void print(struct bench *b)
{
    double m[MEASURES];
    for (int i = 0; i < MEASURES; i++) {
        sort_in_place(b->s[i], b->times, sizeof b->s[i][0], compare_double);
        m[i] = b->s[i][b->times / 2];
    }
    (void)printf("{\"bench\":\"register\",\"model\":\"%s\",\"device\":\"%s\",\"commit\":\"%s\","
                 "\"rank\":%u,\"targets\":\"%s\",\"bytes\":%llu,\"times\":%u,\"write_s\":%.4f,"
                 "\"convert_s\":%.4f,\"register_s\":%.4f,\"register_over_disk\":%.3f,"
                 "\"read_s\":%.4f,\"cold_first_token_s\":%.4f,\"load_s\":%.4f,"
                 "\"warm_first_token_s\":%.4f,\"cold_over_copy_and_step\":%.3f}\n",
                 b->model, b->device, POLDER_COMMIT, b->lora.rank[0],
                 bench_lora_targets_name(b->lora.targets), (unsigned long long)b->bytes, b->times,
                 m[WRITE], m[CONVERT], m[REGISTER], m[WRITE] / (m[CONVERT] + m[REGISTER]), m[READ],
                 m[COLD], m[LOAD], m[WARM], m[COLD] / (m[READ] + m[WARM]));
}

static enum status run(struct bench *b, struct fault *fault)
{
    struct stack_options o = {.model = b->model,
                              .device = b->device,
                              .state_directory = b->state,
                              .pool_bytes = b->pool_bytes,
                              .context_max = 64,
                              .sequences_max = 4,
                              .no_prefix_sharing = true};
    enum status status = stack_create(&o, &b->stack, fault);
    if (status)
        return status;
    b->lora.rank[0] = 16;
    uint64_t of_16 =
        bench_lora_pages(&b->lora, stack_adapter_base(b->stack), stack_page_bytes(b->stack)) *
        stack_page_bytes(b->stack);
    double rank = b->mib * 1048576 * 16 / (double)of_16 + 0.5;
    b->lora.rank[0] = rank < 1 ? 1 : rank > RANK_MAX ? RANK_MAX : (uint32_t)rank;
    for (uint32_t t = 0; !status && t < b->times; t++)
        status = one_time(b, t, fault);
    if (!status)
        print(b);
    return status;
}

static bool parse(struct bench *b, int count, char **values)
{
    bool valid = count % 2 == 1;
    for (int i = 1; valid && i + 1 < count; i += 2) {
        const char *key = values[i], *value = values[i + 1];
        if (!strcmp(key, "--model"))
            b->model = value;
        else if (!strcmp(key, "--device"))
            b->device = value;
        else if (!strcmp(key, "--state"))
            b->state = value;
        else if (!strcmp(key, "--mib"))
            b->mib = atof(value);
        else if (!strcmp(key, "--pool-mib"))
            b->pool_bytes = strtoull(value, NULL, 10) << 20;
        else if (!strcmp(key, "--times"))
            b->times = (uint32_t)atoi(value);
        else
            valid = !strcmp(key, "--targets") && bench_lora_targets_parse(value, &b->lora.targets);
    }
    return valid && b->model && b->times && b->times <= TIMES_MAX && b->mib > 0;
}

int main(int count, char **values)
{
    struct bench_state own = {.path = ""};
    struct bench *b = calloc(1, sizeof *b);
    struct fault fault = {.text = ""};
    if (!b)
        return 1;
    b->device = "cpu";
    b->mib = 100;
    b->times = 5;
    b->lora.count = b->lora.ranks = 1;
    if (!parse(b, count, values)) {
        (void)fprintf(stderr, "usage: see the head of bench_register.c\n");
        free(b);
        return 2;
    }
    b->chunk = calloc(1, CHUNK);
    if (!b->state)
        b->state = bench_state_begin(&own);
    enum status status = b->chunk && b->state
                             ? run(b, &fault)
                             : fault_set(&fault, STATUS_IO, "no memory or temporary directory.");
    if (status)
        (void)fprintf(stderr, "%s\n", fault.text);
    stack_destroy(b->stack);
    bench_state_end(&own);
    free(b->chunk);
    free(b);
    return status ? 1 : 0;
}
