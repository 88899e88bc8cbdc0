// SPDX-License-Identifier: Apache-2.0
// See bench_ceiling_cuda.h. Buffers are larger than the L2 many times over; library calls are timed
// in a captured graph where they can be captured (grouped GEMM takes host arrays: it is timed as it
// would be called, outside a graph).
#include "bench/bench_ceiling_cuda.h"

#include <algorithm>
#include <cublas_v2.h>
#include <cuda_bf16.h>
#include <cuda_runtime.h>
#include <stdio.h>
#include <stdlib.h>
#include <vector>

#define TRY(call)                                                                                  \
    do {                                                                                           \
        int error_ = (int)(call);                                                                  \
        if (error_) {                                                                              \
            fprintf(stderr, "bench: %s gave %d at %s:%d\n", #call, error_, __FILE__, __LINE__);    \
            exit(1);                                                                               \
        }                                                                                          \
    } while (0)

static __global__ void read_kernel(const uint4 *from, size_t count, uint32_t *out)
{
    size_t step = (size_t)gridDim.x * blockDim.x, i = (size_t)blockIdx.x * blockDim.x + threadIdx.x;
    uint32_t sum = 0;
    for (; i + 7 * step < count; i += 8 * step) {
        uint4 v[8];
#pragma unroll
        for (int k = 0; k < 8; k++)
            v[k] = __ldcs(from + i + k * step);
#pragma unroll
        for (int k = 0; k < 8; k++)
            sum += v[k].x ^ v[k].y ^ v[k].z ^ v[k].w;
    }
    if (sum == 0x12345678)
        *out = sum;
}

static __global__ void fill_kernel(__nv_bfloat16 *to, size_t count, float size, uint32_t seed)
{
    size_t step = (size_t)gridDim.x * blockDim.x;
    for (size_t i = (size_t)blockIdx.x * blockDim.x + threadIdx.x; i < count; i += step) {
        uint64_t h = (i + 1) * 0x9e3779b97f4a7c15u + seed;
        h ^= h >> 29;
        h *= 0xbf58476d1ce4e5b9u;
        h ^= h >> 32;
        to[i] = __float2bfloat16(((float)(uint32_t)(h & 0xffffff) / 8388608.0f - 1.0f) * size);
    }
}

void fill_bf16(void *memory, size_t count, float size, uint32_t seed)
{
    fill_kernel<<<2048, 256>>>((__nv_bfloat16 *)memory, count, size, seed);
    TRY(cudaDeviceSynchronize());
}

// Seconds of body(stream), median of `times`.
template <typename Body> static double seconds(int times, Body body)
{
    cudaStream_t stream;
    cudaEvent_t begin, end;
    std::vector<float> all;
    TRY(cudaStreamCreate(&stream));
    TRY(cudaEventCreate(&begin));
    TRY(cudaEventCreate(&end));
    for (int i = 0; i < times + 2; i++) {
        float ms = 0;
        TRY(cudaEventRecord(begin, stream));
        body(stream);
        TRY(cudaEventRecord(end, stream));
        TRY(cudaEventSynchronize(end));
        TRY(cudaEventElapsedTime(&ms, begin, end));
        if (i >= 2)
            all.push_back(ms);
    }
    TRY(cudaStreamDestroy(stream));
    TRY(cudaEventDestroy(begin));
    TRY(cudaEventDestroy(end));
    std::sort(all.begin(), all.end());
    return all[all.size() / 2] * 1e-3;
}

double ceiling_read(void)
{
    size_t bytes = (size_t)8 << 30;
    uint8_t *memory;
    TRY(cudaMalloc(&memory, bytes + 256));
    fill_bf16(memory, bytes / 2, 1, 1);
    double s = seconds(7, [&](cudaStream_t stream) {
        read_kernel<<<132 * 8, 256, 0, stream>>>((const uint4 *)memory, bytes / 16,
                                                 (uint32_t *)(memory + bytes));
    });
    TRY(cudaFree(memory));
    return (double)bytes / s;
}

double ceiling_copy(void)
{
    size_t bytes = (size_t)2 << 30;
    uint8_t *memory;
    TRY(cudaMalloc(&memory, 2 * bytes));
    double s = seconds(5, [&](cudaStream_t stream) {
        TRY(cudaMemcpyAsync(memory + bytes, memory, bytes, cudaMemcpyDeviceToDevice, stream));
    });
    TRY(cudaFree(memory));
    return 2.0 * (double)bytes / s;
}

static void gemm(cublasHandle_t blas, const void *weight, const void *x, void *y, uint32_t m,
                 uint32_t n, uint32_t k)
{
    float one = 1, zero = 0;
    TRY(cublasGemmEx(blas, CUBLAS_OP_T, CUBLAS_OP_N, (int)n, (int)m, (int)k, &one, weight,
                     CUDA_R_16BF, (int)k, x, CUDA_R_16BF, (int)k, &zero, y, CUDA_R_16BF, (int)n,
                     CUBLAS_COMPUTE_32F, CUBLAS_GEMM_DEFAULT));
}

struct blas_rig {
    cublasHandle_t blas;
    uint8_t *x, *y, *workspace;

    blas_rig(size_t rows, size_t n, size_t k)
    {
        size_t space = (size_t)64 << 20;
        TRY(cublasCreate(&blas));
        TRY(cudaMalloc(&x, rows * k * 2));
        TRY(cudaMalloc(&y, rows * n * 2));
        TRY(cudaMalloc(&workspace, space));
        TRY(cublasSetWorkspace(blas, workspace, space));
        fill_bf16(x, rows * k, 1, 3);
    }
    ~blas_rig()
    {
        TRY(cublasDestroy(blas));
        TRY(cudaFree(x));
        TRY(cudaFree(y));
        TRY(cudaFree(workspace));
    }
};

// `body` captured once, then replayed.
template <typename Body> static double graph_seconds(int times, Body body)
{
    cudaStream_t stream;
    cudaGraph_t graph;
    cudaGraphExec_t exec;
    TRY(cudaStreamCreate(&stream));
    body(stream); // first calls may allocate
    TRY(cudaStreamSynchronize(stream));
    TRY(cudaStreamBeginCapture(stream, cudaStreamCaptureModeRelaxed));
    body(stream);
    TRY(cudaStreamEndCapture(stream, &graph));
    TRY(cudaGraphInstantiate(&exec, graph, 0));
    double s = seconds(times, [&](cudaStream_t other) { TRY(cudaGraphLaunch(exec, other)); });
    TRY(cudaGraphExecDestroy(exec));
    TRY(cudaGraphDestroy(graph));
    TRY(cudaStreamDestroy(stream));
    return s;
}

double cublas_dense(const void *weights, uint32_t copies, uint32_t m, uint32_t n, uint32_t k)
{
    blas_rig rig(m, n, k);
    return graph_seconds(7, [&](cudaStream_t stream) {
               TRY(cublasSetStream(rig.blas, stream));
               TRY(cublasSetWorkspace(rig.blas, rig.workspace, (size_t)64 << 20));
               for (uint32_t c = 0; c < copies; c++)
                   gemm(rig.blas, (const uint8_t *)weights + (size_t)c * n * k * 2, rig.x, rig.y, m,
                        n, k);
           }) /
           copies;
}

double ceiling_matmul(void)
{
    uint8_t *weights;
    const uint32_t n = 8192;
    TRY(cudaMalloc(&weights, (size_t)n * n * 2));
    fill_bf16(weights, (size_t)n * n, 1, 5);
    double s = cublas_dense(weights, 1, n, n, n);
    TRY(cudaFree(weights));
    return 2.0 * n * n * n / s;
}

double cublas_loop(const void *weights, uint32_t layers, uint32_t experts, const uint32_t *m,
                   uint32_t n, uint32_t k)
{
    size_t rows = 0;
    for (uint32_t e = 0; e < experts; e++)
        rows += m[e];
    blas_rig rig(rows, n, k);
    return graph_seconds(7, [&](cudaStream_t stream) {
               TRY(cublasSetStream(rig.blas, stream));
               TRY(cublasSetWorkspace(rig.blas, rig.workspace, (size_t)64 << 20));
               for (uint32_t l = 0; l < layers; l++) {
                   size_t row = 0;
                   for (uint32_t e = 0; e < experts; e++) {
                       if (m[e])
                           gemm(rig.blas,
                                (const uint8_t *)weights + ((size_t)l * experts + e) * n * k * 2,
                                rig.x + row * k * 2, rig.y + row * n * 2, m[e], n, k);
                       row += m[e];
                   }
               }
           }) /
           layers;
}

double cublas_grouped(const void *weights, uint32_t layers, uint32_t experts, const uint32_t *m,
                      uint32_t n, uint32_t k)
{
    std::vector<int> ms, ns, ks, sizes;
    std::vector<cublasOperation_t> t, no;
    std::vector<float> ones, zeros;
    std::vector<const void *> a, b;
    std::vector<void *> y;
    size_t rows = 0;
    for (uint32_t e = 0; e < experts; e++)
        rows += m[e];
    blas_rig rig(rows, n, k);
    for (uint32_t l = 0; l < layers; l++) {
        size_t row = 0;
        for (uint32_t e = 0; e < experts; e++) {
            if (m[e]) {
                a.push_back((const uint8_t *)weights + ((size_t)l * experts + e) * n * k * 2);
                b.push_back(rig.x + row * k * 2);
                y.push_back(rig.y + row * n * 2);
                if (l == 0) {
                    ms.push_back((int)n);
                    ns.push_back((int)m[e]);
                    ks.push_back((int)k);
                }
            }
            row += m[e];
        }
    }
    int groups = (int)ms.size();
    t.assign(groups, CUBLAS_OP_T);
    no.assign(groups, CUBLAS_OP_N);
    ones.assign(groups, 1);
    zeros.assign(groups, 0);
    sizes.assign(groups, 1);
    void **pointers;
    size_t count = a.size();
    TRY(cudaMalloc(&pointers, 3 * count * sizeof *pointers));
    TRY(cudaMemcpy(pointers, a.data(), count * 8, cudaMemcpyHostToDevice));
    TRY(cudaMemcpy(pointers + count, b.data(), count * 8, cudaMemcpyHostToDevice));
    TRY(cudaMemcpy(pointers + 2 * count, y.data(), count * 8, cudaMemcpyHostToDevice));
    double s = seconds(7, [&](cudaStream_t stream) {
        TRY(cublasSetStream(rig.blas, stream));
        for (uint32_t l = 0; l < layers; l++) {
            void **p = pointers + (size_t)l * groups;
            TRY(cublasGemmGroupedBatchedEx(
                rig.blas, t.data(), no.data(), ms.data(), ns.data(), ks.data(), ones.data(),
                (const void *const *)p, CUDA_R_16BF, ks.data(), (const void *const *)(p + count),
                CUDA_R_16BF, ks.data(), zeros.data(), (void *const *)(p + 2 * count), CUDA_R_16BF,
                ms.data(), groups, sizes.data(), CUBLAS_COMPUTE_32F));
        }
    });
    TRY(cudaFree(pointers));
    return s / layers;
}
