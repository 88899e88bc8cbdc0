// SPDX-License-Identifier: Apache-2.0
// wgmma of core-matrix operands without swizzle: d[64][N] += A[64][16] B[N][16]^T, bf16, fp32 sums.
// A warpgroup issues it; accumulator i of lane l in warp w: row w * 16 + l / 4 (+ 8 when i & 2),
// column i / 4 * 8 + l % 4 * 2 + i % 2.
#pragma once

#include "kernels/cuda/common.cuh"

// A K-major operand of core matrices (8 rows x 16 bytes): k_step bytes between cores that are
// neighbours in K, row_step between 8-row groups.
__device__ __forceinline__ uint64_t core_descriptor(const void *p, uint32_t k_step,
                                                    uint32_t row_step)
{
    uint64_t at = (shared_address(p) & 0x3ffff) >> 4;
    return at | (uint64_t)(k_step >> 4) << 16 | (uint64_t)(row_step >> 4) << 32;
}

__device__ __forceinline__ void wgmma_begin()
{
    asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
}

__device__ __forceinline__ void wgmma_end()
{
    asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
    asm volatile("wgmma.wait_group.sync.aligned 0;" ::: "memory");
}

#define ACC8(d, i)                                                                                 \
    "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3]), "+f"(d[i + 4]), "+f"(d[i + 5]),    \
        "+f"(d[i + 6]), "+f"(d[i + 7])

template <int N> __device__ void wgmma(float *d, uint64_t a, uint64_t b);

template <> __device__ __forceinline__ void wgmma<16>(float *d, uint64_t a, uint64_t b)
{
    asm volatile("wgmma.mma_async.sync.aligned.m64n16k16.f32.bf16.bf16 {"
                 "%0, %1, %2, %3, %4, %5, %6, %7}, "
                 "%8, %9, 1, 1, 1, 0, 0;\n"
                 : ACC8(d, 0)
                 : "l"(a), "l"(b));
}

template <> __device__ __forceinline__ void wgmma<32>(float *d, uint64_t a, uint64_t b)
{
    asm volatile("wgmma.mma_async.sync.aligned.m64n32k16.f32.bf16.bf16 {"
                 "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15}, "
                 "%16, %17, 1, 1, 1, 0, 0;\n"
                 : ACC8(d, 0), ACC8(d, 8)
                 : "l"(a), "l"(b));
}

template <> __device__ __forceinline__ void wgmma<64>(float *d, uint64_t a, uint64_t b)
{
    asm volatile("wgmma.mma_async.sync.aligned.m64n64k16.f32.bf16.bf16 {"
                 "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "
                 "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31}, "
                 "%32, %33, 1, 1, 1, 0, 0;\n"
                 : ACC8(d, 0), ACC8(d, 8), ACC8(d, 16), ACC8(d, 24)
                 : "l"(a), "l"(b));
}

template <> __device__ __forceinline__ void wgmma<128>(float *d, uint64_t a, uint64_t b)
{
    asm volatile("wgmma.mma_async.sync.aligned.m64n128k16.f32.bf16.bf16 {"
                 "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "
                 "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, "
                 "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, "
                 "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63}, "
                 "%64, %65, 1, 1, 1, 0, 0;\n"
                 : ACC8(d, 0), ACC8(d, 8), ACC8(d, 16), ACC8(d, 24), ACC8(d, 32), ACC8(d, 40),
                   ACC8(d, 48), ACC8(d, 56)
                 : "l"(a), "l"(b));
}

template <> __device__ __forceinline__ void wgmma<256>(float *d, uint64_t a, uint64_t b)
{
    asm volatile("wgmma.mma_async.sync.aligned.m64n256k16.f32.bf16.bf16 {"
                 "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "
                 "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, "
                 "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, "
                 "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63, "
                 "%64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79, "
                 "%80, %81, %82, %83, %84, %85, %86, %87, %88, %89, %90, %91, %92, %93, %94, %95, "
                 "%96, %97, %98, %99, %100, %101, %102, %103, %104, %105, %106, %107, %108, %109, "
                 "%110, %111, "
                 "%112, %113, %114, %115, %116, %117, %118, %119, %120, %121, %122, %123, %124, "
                 "%125, %126, %127}, "
                 "%128, %129, 1, 1, 1, 0, 0;\n"
                 : ACC8(d, 0), ACC8(d, 8), ACC8(d, 16), ACC8(d, 24), ACC8(d, 32), ACC8(d, 40),
                   ACC8(d, 48), ACC8(d, 56), ACC8(d, 64), ACC8(d, 72), ACC8(d, 80), ACC8(d, 88),
                   ACC8(d, 96), ACC8(d, 104), ACC8(d, 112), ACC8(d, 120)
                 : "l"(a), "l"(b));
}

#undef ACC8
