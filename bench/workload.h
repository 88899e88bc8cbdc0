// SPDX-License-Identifier: Apache-2.0
// Workloads of a serving benchmark: lists of requests, generated from a few numbers or read from a
// file. The same numbers give the same list on every machine.
//
// Two kinds of files; `#` begins a comment, in both:
//   a spec       seed 42
//                repeat 2
//                phase rate=10 cv=1 alpha=1 adapters=2000 input=8..512 output=8..512 requests=600
//   a list       one request a line: time_us adapter input output tenant (adapter -: the base)
//
// A phase: intervals between requests are Gamma(1 / cv^2) with the mean 1 / rate (cv 1: Poisson
// arrivals; 0: a clock); adapter i of N has the weight (i + 1)^-alpha (0: all alike); lengths are
// uniform from min to max inclusive, in tokens; adapter i belongs to tenant i % tenants. It ends
// after `requests` requests or `seconds` seconds, whichever is first; 0 is no bound, but one there
// must be. Phases follow each other, all of them `repeat` times.
//
// Times, adapters and lengths are drawn from streams of their own: another number of adapters, say,
// leaves times and lengths as they were.
//
// S-LoRA's benchmark (arXiv 2311.03285) writes alpha for something else: its program draws adapter
// floor(N u^(1 / alpha)), so its alpha 1 is alpha 0 here.
#ifndef POLDER_BENCH_WORKLOAD_H
#define POLDER_BENCH_WORKLOAD_H

#include <stddef.h>
#include <stdint.h>

#include "base/status.h"

enum { WORKLOAD_PHASES_MAX = 16, WORKLOAD_REQUESTS_MAX = 1 << 20 };
enum { WORKLOAD_BASE = 0xffffffff }; // as an adapter: none

struct workload_phase {
    double rate;                // requests a second
    double cv;                  // of the intervals: deviation over mean, 0..16
    double alpha;               // 0..16
    double seconds;             // 0: no bound
    uint32_t requests;          // 0: no bound
    uint32_t adapters, tenants; // adapters 0: the base model alone; tenants at least 1
    uint32_t input_min, input_max, output_min, output_max;
};

struct workload_spec {
    uint64_t seed;
    uint32_t repeat, phases;
    struct workload_phase phase[WORKLOAD_PHASES_MAX];
};

struct workload_request {
    uint64_t time_us;
    uint32_t adapter, input, output, tenant;
};

struct workload {
    struct workload_request *requests; // in the order of time
    uint32_t count;
    uint32_t adapters, tenants; // of the spec; of a list one above the largest index
    uint32_t used;              // adapters that some request names
    uint32_t input_max, output_max, tokens_max; // tokens: of input and output of one request
    double output_mean;
};

// One phase: rate 1, cv 1, alpha 1, one adapter and tenant, input and output 8..512, 100 requests.
void workload_spec_default(struct workload_spec *out);
// INVALID names the key. `seed` and `repeat` are of the whole, the others set every phase.
MUST_USE enum status workload_spec_set(struct workload_spec *spec, const char *key,
                                       const char *value, struct fault *fault);
// `name` stands in faults. Keys that a phase does not give are those of workload_spec_default.
MUST_USE enum status workload_spec_parse(const char *text, const char *name,
                                         struct workload_spec *out, struct fault *fault);
// LIMIT: more than WORKLOAD_REQUESTS_MAX requests.
MUST_USE enum status workload_make(const struct workload_spec *spec, struct workload *out,
                                   struct fault *fault);
void workload_clear(struct workload *workload);

MUST_USE enum status workload_parse(const char *text, const char *name, struct workload *out,
                                    struct fault *fault);
MUST_USE enum status workload_write(const struct workload *workload, const char *path,
                                    struct fault *fault);

// Reads a file of either kind, sets `overrides` ("key=value,key=value", "" or NULL: none; only a
// spec can have any) and makes the list.
MUST_USE enum status workload_open(const char *path, const char *overrides, struct workload *out,
                                   struct fault *fault);

#endif
