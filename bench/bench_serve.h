// SPDX-License-Identifier: Apache-2.0
// Drives a stack through a workload and measures what a client and an operator would see. The
// caller's thread turns the engine; nothing else may.
//
// Open loop: requests are sent at their times, whatever has become of the others, and waiting
// counts from that time. Closed loop: a fixed number is in flight, times are ignored, and waiting
// counts from the sending.
#ifndef POLDER_BENCH_BENCH_SERVE_H
#define POLDER_BENCH_BENCH_SERVE_H

#include <stdbool.h>
#include <stdint.h>

#include "bench/workload.h"
#include "runtime/engine/stack.h"

enum { SERVE_PROBE_TOKENS = 8 };

struct serve_options {
    struct stack *stack;
    uint32_t concurrency; // 0: open loop
    uint32_t open_max;    // requests that the engine is given at once; others wait in front of it
    uint64_t seed;        // of the prompts
};

// Sorted, in milliseconds.
struct serve_times {
    double *ms;
    uint32_t count;
};
double serve_percentile(const struct serve_times *times, double share); // 0 when there are none

// Counters at one moment.
struct serve_counters {
    struct engine_counters engine;
    struct pool_stats pool;
    struct adapters_stats adapters;
    struct copy_stats copies;
    struct expert_stats experts;
};
void serve_counters(struct stack *stack, struct serve_counters *out);

struct serve_result {
    double seconds; // from the first request's arrival, or the beginning, to the last one's end
    double cpu_s;   // processor seconds of all threads of this process
    uint32_t finished, failed, held_back; // held_back: waited because open_max were in the engine
    uint64_t input_tokens, output_tokens; // of those that finished
    struct serve_times first;             // to the first token
    struct serve_times each;              // a token, after the first
    struct serve_times adapter;           // waiting for the adapter, of requests with one
    struct serve_counters from, to;
    // of steps, each counted once
    double rows_mean, running_mean, pages_mean[PAGE_KINDS], free_mean;
    uint32_t running_max, pages_max[PAGE_KINDS];
    char message[200]; // of the first that failed
};

// INTERNAL, with a sentence, when nothing comes out for two minutes.
MUST_USE enum status serve_run(const struct serve_options *options, const struct workload *workload,
                               struct serve_result *out, struct fault *fault);
void serve_result_clear(struct serve_result *result);

// Greedy tokens of a prompt that depends on nothing but the seed, alone in the engine.
MUST_USE enum status serve_probe(const struct serve_options *options, uint32_t adapter,
                                 uint32_t tenant, int32_t token[SERVE_PROBE_TOKENS],
                                 struct fault *fault);

// Turns until nothing is left to do: experts are as resident as they can be.
void serve_settle(struct stack *stack);

#endif
