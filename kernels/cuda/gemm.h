// SPDX-License-Identifier: Apache-2.0
// Between gemm.cu, which decides, and gemm_blas.c, which calls cuBLASLt.
#ifndef POLDER_KERNELS_CUDA_GEMM_H
#define POLDER_KERNELS_CUDA_GEMM_H

#include "kernels/cuda/cuda.h"

#ifdef __cplusplus
extern "C" {
#endif

// y[rows][n] (row stride y_stride) = x W^T of `rows` rows that begin at x, on l's stream; added
// when args say so and y is their y. False when cuBLASLt knows no algorithm for this shape; nothing
// was launched then.
bool cuda__gemm_blas(const struct cuda_launch *l, const struct gemm_args *a, const void *x,
                     float *y, size_t y_stride, uint32_t rows);

#ifdef __cplusplus
}
#endif
#endif
