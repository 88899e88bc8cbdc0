// SPDX-License-Identifier: Apache-2.0
// What the GPU can do now, measured in the same run as what is compared with it, and the competing
// library calls of bench_kernels_cuda. One thread; everything waits until it is done; seconds are
// medians. CUDA errors end the program with a sentence.
#ifndef POLDER_BENCH_BENCH_CEILING_CUDA_H
#define POLDER_BENCH_BENCH_CEILING_CUDA_H

#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

double ceiling_read(void);   // bytes per second, 8 GiB read once (plain 16-byte loads)
double ceiling_copy(void);   // bytes read and written per second
double ceiling_matmul(void); // bf16 multiply-adds x 2 per second, cuBLAS at 8192^3, random data

// The expert GEMMs of one MoE layer by cuBLAS on contiguous row-major weights [experts][n][k], m[e]
// tokens for expert e: cublasGemmGroupedBatchedEx (one call, a group per expert) or a loop of
// cublasGemmEx. bf16 out. `layers` copies of the weights are used in turn. Seconds per layer.
double cublas_grouped(const void *weights, uint32_t layers, uint32_t experts, const uint32_t *m,
                      uint32_t n, uint32_t k);
double cublas_loop(const void *weights, uint32_t layers, uint32_t experts, const uint32_t *m,
                   uint32_t n, uint32_t k);
// One dense product [m][k] x [n][k]^T, bf16 out.
double cublas_dense(const void *weights, uint32_t copies, uint32_t m, uint32_t n, uint32_t k);

// Fills device memory with bf16 numbers of about the given size, uniform in (-size, size).
void fill_bf16(void *memory, size_t count, float size, uint32_t seed);

#ifdef __cplusplus
}
#endif
#endif
