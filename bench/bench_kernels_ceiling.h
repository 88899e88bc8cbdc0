// SPDX-License-Identifier: Apache-2.0
// What the machine can do now: read rate and dot rate of all threads together, in wall clock and in
// processor time. The read goes over `bytes` in turns of 16 MiB per thread, so that nothing is left
// in a cache when it comes around again; the dot loop has independent sums of the instruction set's
// own step (vdpbf16ps; fused multiply-add; multiply and add) in registers.
#ifndef POLDER_BENCH_BENCH_KERNELS_CEILING_H
#define POLDER_BENCH_BENCH_KERNELS_CEILING_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <time.h>

enum { CEILING_THREADS = 256 };

struct ceiling {
    const char *set; // instruction set
    uint32_t threads;
    const uint8_t *from;
    size_t bytes, turn;
};

struct rate {
    double wall, cpu; // per second
};

double bench_time(clockid_t clock);
struct rate ceiling_rate(struct ceiling *c, bool dots); // bytes, or operations

#endif
