// SPDX-License-Identifier: Apache-2.0
// RMSNorm (Zhang and Sennrich, 2019), SwiGLU (Shazeer, 2020). Row-wise, bound by bytes.
#ifndef POLDER_KERNELS_NORM_H
#define POLDER_KERNELS_NORM_H

#include <stdint.h>

// out[row] = x[row] * rsqrt(mean(x[row]^2) + epsilon) * weight, fp32 inside.
struct rmsnorm_args {
    const float *x;      // [rows][dim]
    const float *weight; // [dim]
    void *out;           // act [rows][dim], or NULL
    float *out_f32;      // [rows][dim], or NULL: the fp32 result, for the router
    uint32_t rows, dim;
    float epsilon;
};

// out[row][i] = silu(gate) * up, where gate and up stand interleaved in blocks of 8 (tile.h).
struct swiglu_args {
    const float *gate_up; // [rows][stride]
    uint32_t stride;      // tile_interleaved_rows(intermediate)
    void *out;            // act [rows][intermediate]
    uint32_t rows, intermediate;
};

#endif
