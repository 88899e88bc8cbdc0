// SPDX-License-Identifier: Apache-2.0
// wgmma of shared memory operands: d[64][N] += A[64][16] B[N][16]^T, bf16, fp32 sums.
// A warpgroup issues it; accumulator i of lane l in warp w: row w * 16 + l / 4 (+ 8 when i & 2),
// column i / 4 * 8 + l % 4 * 2 + i % 2.
#pragma once

#include "kernels/cuda/common.cuh"

// A K-major operand of core matrices (8 rows x 16 bytes, not swizzled): k_step bytes between cores
// that are neighbours in K, row_step between 8-row groups.
__device__ __forceinline__ uint64_t core_descriptor(const void *p, uint32_t k_step,
                                                    uint32_t row_step)
{
    uint64_t at = (shared_address(p) & 0x3ffff) >> 4;
    return at | (uint64_t)(k_step >> 4) << 16 | (uint64_t)(row_step >> 4) << 32;
}

// A K-major operand of rows of 128 bytes whose 16-byte chunk c stands at c ^ (row % 8); the rows
// begin on 1024 bytes, p is 32 bytes further for each 16 columns.
__device__ __forceinline__ uint64_t swizzled_descriptor(const void *p)
{
    uint64_t at = (shared_address(p) & 0x3ffff) >> 4;
    return at | (uint64_t)1 << 16 | (uint64_t)(1024 >> 4) << 32 | (uint64_t)1 << 62;
}

__device__ __forceinline__ void wgmma_begin()
{
    asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
}

__device__ __forceinline__ void wgmma_commit()
{
    asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
}

// Until at most LEFT committed groups are at work.
template <int LEFT> __device__ __forceinline__ void wgmma_wait()
{
    asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(LEFT) : "memory");
}

template <int N> __device__ void wgmma(float *d, uint64_t a, uint64_t b);

// Accumulators i .. i + 3, and their places in the text.
#define ACC(i) "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3])
// clang-format off
#define TEXT0 "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15"
#define TEXT16 ", %16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31"
#define TEXT32 ", %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47"
#define TEXT48 ", %48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"
#define TEXT64 ", %64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79"
#define TEXT80 ", %80, %81, %82, %83, %84, %85, %86, %87, %88, %89, %90, %91, %92, %93, %94, %95"
#define TEXT96 ", %96, %97, %98, %99, %100, %101, %102, %103, " \
    "%104, %105, %106, %107, %108, %109, %110, %111"
#define TEXT112 ", %112, %113, %114, %115, %116, %117, %118, %119, " \
    "%120, %121, %122, %123, %124, %125, %126, %127"
#define ACC16(i) ACC(i), ACC(i + 4), ACC(i + 8), ACC(i + 12)
#define WGMMA(N, A, B, TEXT, ...)                                                                  \
    template <> __device__ __forceinline__ void wgmma<N>(float *d, uint64_t a, uint64_t b)         \
    {                                                                                              \
        asm volatile("wgmma.mma_async.sync.aligned.m64n" #N "k16.f32.bf16.bf16 "                   \
                     "{" TEXT "}, %" #A ", %" #B ", 1, 1, 1, 0, 0;"                                \
                     : __VA_ARGS__ : "l"(a), "l"(b));                                              \
    }
WGMMA(8, 4, 5, "%0, %1, %2, %3", ACC(0))
WGMMA(16, 8, 9, "%0, %1, %2, %3, %4, %5, %6, %7", ACC(0), ACC(4))
WGMMA(24, 12, 13, "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11", ACC(0), ACC(4), ACC(8))
WGMMA(32, 16, 17, TEXT0, ACC16(0))
WGMMA(40, 20, 21, TEXT0 ", %16, %17, %18, %19", ACC16(0), ACC(16))
WGMMA(48, 24, 25, TEXT0 ", %16, %17, %18, %19, %20, %21, %22, %23", ACC16(0), ACC(16), ACC(20))
WGMMA(56, 28, 29,
      TEXT0 ", %16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27",
      ACC16(0), ACC(16), ACC(20), ACC(24))
WGMMA(64, 32, 33, TEXT0 TEXT16, ACC16(0), ACC16(16))
WGMMA(80, 40, 41,
      TEXT0 TEXT16 ", %32, %33, %34, %35, %36, %37, %38, %39",
      ACC16(0), ACC16(16), ACC(32), ACC(36))
WGMMA(96, 48, 49, TEXT0 TEXT16 TEXT32, ACC16(0), ACC16(16), ACC16(32))
WGMMA(112, 56, 57,
      TEXT0 TEXT16 TEXT32 ", %48, %49, %50, %51, %52, %53, %54, %55",
      ACC16(0), ACC16(16), ACC16(32), ACC(48), ACC(52))
WGMMA(128, 64, 65, TEXT0 TEXT16 TEXT32 TEXT48, ACC16(0), ACC16(16), ACC16(32), ACC16(48))
WGMMA(160, 80, 81,
      TEXT0 TEXT16 TEXT32 TEXT48 TEXT64,
      ACC16(0), ACC16(16), ACC16(32), ACC16(48), ACC16(64))
WGMMA(192, 96, 97,
      TEXT0 TEXT16 TEXT32 TEXT48 TEXT64 TEXT80,
      ACC16(0), ACC16(16), ACC16(32), ACC16(48), ACC16(64), ACC16(80))
WGMMA(224, 112, 113,
      TEXT0 TEXT16 TEXT32 TEXT48 TEXT64 TEXT80 TEXT96,
      ACC16(0), ACC16(16), ACC16(32), ACC16(48), ACC16(64), ACC16(80), ACC16(96))
WGMMA(256, 128, 129,
      TEXT0 TEXT16 TEXT32 TEXT48 TEXT64 TEXT80 TEXT96 TEXT112,
      ACC16(0), ACC16(16), ACC16(32), ACC16(48), ACC16(64), ACC16(80), ACC16(96), ACC16(112))
// clang-format on
#undef WGMMA
#undef ACC16
#undef ACC
