// SPDX-License-Identifier: Apache-2.0
// What the kernel tests share: a device of every instruction set and dtype the CPU has, the GPU in
// three ways (command by command, captured units, batch-invariant), random inputs, act operands,
// packed weights, and comparison against double precision. NaN is looked for first.
//
// On the GPU all arrays are pinned host memory, so that tests fill and read them as on the CPU.
#ifndef POLDER_TESTS_TEST_KERNELS_RIG_H
#define POLDER_TESTS_TEST_KERNELS_RIG_H

#include <math.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <cmocka.h>

#include "base/check.h"
#include "base/rng.h"
#include "kernels/device.h"

struct rig {
    struct device *device;
    const struct device_table *table;
    struct stream *stream;
    enum dtype dtype;
    const char *instruction_set;
    bool gpu, captured;
    bool exact;     // a row's bits do not depend on the other rows
    uint8_t *arena; // of the GPU: one block of pinned memory that rig_alloc cuts up
    size_t arena_used;
    double error;       // largest relative error seen, printed by rig_each
    void *memory[4096]; // of rig_alloc, released by rig_each
    size_t used_before[4096];
    int blocks;
};

// Runs `test` on each instruction set x dtype, then on the GPU. What is lacking is a printed skip.
void rig_each(const char *name, void (*test)(struct rig *rig));
void rig_open(struct rig *rig, const char *instruction_set, enum dtype dtype, uint32_t threads);
void rig_close(struct rig *rig);
void rig_clear(struct rig *rig); // releases all rig_alloc memory
void rig_release_last(struct rig *rig);
void rig_unit(struct rig *rig); // after a submit without rig_run: begins a unit where units are
                                // captured
void rig_run(struct rig *rig);  // submit and wait; no miss expected

extern struct rng rig_rng; // seeded freshly, seed printed; POLDER_TEST_SEED repeats
float random_float(void);  // about normal, in (-3, 3)
uint32_t random_below(uint32_t n);

void *rig_alloc(struct rig *rig, size_t bytes);
void *rig_copy(struct rig *rig, const void *from, size_t bytes);
float *rig_floats(struct rig *rig, size_t n); // random
float *rig_poison(struct rig *rig, size_t n); // NaN
float quantize(enum dtype dtype, float x);

// A random operand act [rows][cols], and its exact values.
void *rig_act(struct rig *rig, size_t rows, size_t cols, float **values);
float act_get(const struct rig *rig, const void *act, size_t cols, size_t row, size_t col);
bool act_padding_zero(const struct rig *rig, const void *act, size_t rows, size_t cols);

// A random weight [rows][cols] of the compute dtype, as exact values.
float *rig_weight(struct rig *rig, size_t rows, size_t cols);
// The same, converted to the compute dtype, row-major.
void *rig_narrow(struct rig *rig, const float *values, size_t n);
// A weight as the device's gemm wants it.
void *rig_dense(struct rig *rig, const float *values, size_t rows, size_t cols);

// |got - want| <= tolerance * scale, NaN refused first; keeps the largest |got - want| / scale.
void near(struct rig *rig, float got, double want, double scale, double tolerance);
// Tolerance of fp32 accumulation, of row-wise fp32 arithmetic, and of a result that was rounded to
// the compute dtype. Tensor cores truncate when they add, so sums are looser on the GPU.
double tolerance_sum(const struct rig *rig);
double tolerance_row(const struct rig *rig);
double tolerance_act(const struct rig *rig);

#endif
