// SPDX-License-Identifier: Apache-2.0
// The microkernels: all that differs between instruction sets. Operations are written once, above
// this table; each instruction set fills it from micro_body.h with its own vector width and dot
// step.
//
// Contract of every entry: the bits of one result depend on the values it is computed from alone,
// not on how many results are asked for in one call. Accumulation orders are fixed:
//   strip  4 lanes per (weight row, token), columns ascending; lanes (0+1)+(2+3)
//   dots   WIDTH lanes per (vector, row), columns ascending; a fixed tree over the lanes
//   mix    one accumulator per (query, column), rows ascending
#ifndef POLDER_KERNELS_CPU_MICRO_H
#define POLDER_KERNELS_CPU_MICRO_H

#include <stddef.h>
#include <stdint.h>

#include "kernels/tile.h"

enum { MIX_PAD = 16 }; // accumulators of mix are padded to a multiple of this many floats

// One row block of 64 weight rows: its tiles in column order, not necessarily contiguous.
struct strip {
    const uint8_t *const
        *tiles; // [2 * k_tiles]: of this row block, then of the next, to fetch ahead
    size_t k_tiles;
    const uint8_t *const *x; // [tokens] act rows, padded with zeros to whole tiles
    uint32_t tokens;
    uint32_t first, rows; // rows of the block that are wanted; first: a multiple of 16
    float *out;           // [tokens][64]; rows up to the next multiple of 16 may be written
};

// What depends on the compute dtype.
struct micro_dtype {
    void (*strip)(const struct strip *s);
    // out[i] = x[0..dim) . rows[i][0..dim); no padding needed. out has room for n rounded up to 16.
    void (*dots)(const void *x, const uint8_t *const *rows, size_t n, size_t dim, float *out);
    // acc[q][0..dim) += sum over i ascending of weight[q][i] * rows[i][0..dim), rows starting at
    // element `first`; acc rows are padded to MIX_PAD (the padding is overwritten).
    void (*mix)(const float *weight, size_t weight_stride, const uint8_t *const *rows, size_t n,
                size_t first, size_t dim, float *acc, size_t acc_stride, size_t queries);
    void (*store)(const float *from, void *to, size_t n);
    void (*load)(const void *from, float *to, size_t n);
};

struct micro {
    const char *name;
    struct micro_dtype dtype[2]; // by enum dtype
    // Largest of x[0..n); -inf when n is 0. NaN may be passed over: callers find it elsewhere.
    float (*max)(const float *x, size_t n);
    float (*sum_squares)(const float *x, size_t n);
    // out[i] = exp((x[i] - max) * scale); returns their sum. x == out is allowed.
    float (*exp_sum)(const float *x, float *out, size_t n, float max, float scale);
    // out[i] = x[i] * scale * weight[i]
    void (*scale_mul)(const float *x, const float *weight, float scale, float *out, size_t n);
    void (*axpy)(float *y, const float *x, float a, size_t n); // y += a * x
    // Into blocks of 8 of an interleaved row (tile.h): y[i / 8 * 16 + i % 8] += a * x[i].
    void (*axpy_half)(float *y, const float *x, float a, size_t n);
    // out[i] = silu(gate[i]) * up[i]; gate_up interleaved in blocks of 8 (tile.h), units multiple
    // of 8.
    void (*swiglu)(const float *gate_up, float *out, size_t units);
};

const struct micro *cpu__micro_portable(void);
const struct micro *cpu__micro_avx2(void);
const struct micro *cpu__micro_avx512(void);

#endif
