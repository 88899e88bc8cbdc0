// SPDX-License-Identifier: Apache-2.0
// Device-side helpers of all kernels: how a kernel enters a segment, launches with programmatic
// dependent launch (PDL), warp reductions, bf16, PTX of mbarriers, bulk copies, ldmatrix, mma.
#pragma once

#include <cuda_bf16.h>
#include <cuda_runtime.h>
#include <stdint.h>

#include "kernels/cuda/cuda.h"

typedef __nv_bfloat16 bf16;

// ---- segments ----

// Waits until the kernel before has finished and its writes are visible.
__device__ __forceinline__ void pdl_wait()
{
    asm volatile("griddepcontrol.wait;" ::: "memory");
}

// From here on the next kernel's CTAs may be scheduled (they wait in pdl_wait for our end).
__device__ __forceinline__ void pdl_launch()
{
    asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
}

// Enters: false when the segment has missed (the kernel returns). `rows`: of this command.
__device__ __forceinline__ bool segment_enter(const struct cuda_control *control, uint32_t slot,
                                              uint32_t *rows)
{
    pdl_wait();
    const volatile uint32_t *c = (const volatile uint32_t *)control;
    uint32_t miss = c[0];
    *rows = c[4 + slot];
    pdl_launch();
    return miss == NO_MISS;
}

// Without letting the next kernel begin: for kernels whose shared memory leaves it no room.
__device__ __forceinline__ bool segment_enter_alone(const struct cuda_control *control,
                                                    uint32_t slot, uint32_t *rows)
{
    pdl_wait();
    const volatile uint32_t *c = (const volatile uint32_t *)control;
    *rows = c[4 + slot];
    return c[0] == NO_MISS;
}

// The same for moe_gate_up and moe_down, which run during a miss of their own layer.
__device__ __forceinline__ bool segment_enter_moe(const struct cuda_control *control, uint32_t slot,
                                                  uint32_t layer, uint32_t *rows)
{
    pdl_wait();
    const volatile uint32_t *c = (const volatile uint32_t *)control;
    uint32_t miss = c[0];
    *rows = c[4 + slot];
    pdl_launch();
    return miss == NO_MISS || miss == layer;
}

__device__ __forceinline__ uint32_t control_lora_segments(const struct cuda_control *control)
{
    return ((const volatile uint32_t *)control)[1];
}

__device__ __forceinline__ uint32_t control_lora_rank(const struct cuda_control *control)
{
    return ((const volatile uint32_t *)control)[2];
}

__device__ __forceinline__ uint32_t control_rows(const struct cuda_control *control, uint32_t slot)
{
    return ((const volatile uint32_t *)control)[4 + slot];
}

// Launches with the attribute that lets the kernel's prologue overlap the end of the one before.
template <typename... Params, typename... Args>
static inline void launch_kernel(const struct cuda_launch *l, void (*kernel)(Params...), dim3 grid,
                                 dim3 block, size_t shared_bytes, Args... args)
{
    cudaLaunchConfig_t config = {};
    config.gridDim = grid;
    config.blockDim = block;
    config.dynamicSmemBytes = shared_bytes;
    config.stream = l->stream;
    cudaLaunchAttribute attribute[1];
    attribute[0].id = cudaLaunchAttributeProgrammaticStreamSerialization;
    attribute[0].val.programmaticStreamSerializationAllowed = 1;
    config.attrs = attribute;
    config.numAttrs = 1;
    cudaError_t error = cudaLaunchKernelEx(&config, kernel, Params(args)...);
    if (error != cudaSuccess)
        (void)cuda__fail(l->device, "cudaLaunchKernelEx", (int)error);
}

// ---- warps ----

__device__ __forceinline__ float warp_sum(float x)
{
#pragma unroll
    for (int i = 16; i; i >>= 1)
        x += __shfl_xor_sync(0xffffffffu, x, i);
    return x;
}

__device__ __forceinline__ float warp_max(float x)
{
#pragma unroll
    for (int i = 16; i; i >>= 1)
        x = fmaxf(x, __shfl_xor_sync(0xffffffffu, x, i));
    return x;
}

// ---- PTX ----

__device__ __forceinline__ uint32_t shared_address(const void *p)
{
    return (uint32_t)__cvta_generic_to_shared(p);
}

__device__ __forceinline__ void barrier_init(uint64_t *b, uint32_t arrivals)
{
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(b)), "r"(arrivals));
}

__device__ __forceinline__ void barrier_init_fence()
{
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}

__device__ __forceinline__ void barrier_expect(uint64_t *b, uint32_t bytes)
{
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(b)),
                 "r"(bytes)
                 : "memory");
}

__device__ __forceinline__ void barrier_arrive(uint64_t *b)
{
    asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(shared_address(b)) : "memory");
}

__device__ __forceinline__ void barrier_wait(uint64_t *b, uint32_t phase)
{
    asm volatile("{\n.reg .pred p;\nWAIT_%=:\n"
                 "mbarrier.try_wait.parity.shared::cta.b64 p, [%0], %1;\n"
                 "@p bra DONE_%=;\nbra WAIT_%=;\nDONE_%=:\n}" ::"r"(shared_address(b)),
                 "r"(phase)
                 : "memory");
}

// 1-D bulk copy global -> shared, counted by the barrier. 16-byte aligned, multiple of 16.
__device__ __forceinline__ void bulk_load(void *to, const void *from, uint32_t bytes, uint64_t *b)
{
    asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], "
                 "%2, [%3];" ::"r"(shared_address(to)),
                 "l"(from), "r"(bytes), "r"(shared_address(b))
                 : "memory");
}

// 16 bytes global -> shared; `bytes` 0 writes zeros.
__device__ __forceinline__ void async_load16(void *to, const void *from, uint32_t bytes = 16)
{
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(to)),
                 "l"(from), "r"(bytes)
                 : "memory");
}

// The same of 4 bytes, through L1.
__device__ __forceinline__ void async_load4(void *to, const void *from, uint32_t bytes = 4)
{
    asm volatile("cp.async.ca.shared.global [%0], [%1], 4, %2;" ::"r"(shared_address(to)),
                 "l"(from), "r"(bytes)
                 : "memory");
}

__device__ __forceinline__ void async_commit()
{
    asm volatile("cp.async.commit_group;" ::: "memory");
}

// The barrier counts one arrival of this thread when all its async_load16 so far have landed.
__device__ __forceinline__ void async_arrive(uint64_t *b)
{
    asm volatile("cp.async.mbarrier.arrive.noinc.shared::cta.b64 [%0];" ::"r"(shared_address(b))
                 : "memory");
}

// Makes what is visible to this thread in shared memory visible to wgmma and bulk copies.
__device__ __forceinline__ void async_proxy_fence()
{
    asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}

template <int N> __device__ __forceinline__ void async_wait()
{
    asm volatile("cp.async.wait_group %0;" ::"n"(N) : "memory");
}

// 16 bytes that are read once (weights): do not keep them in L1.
__device__ __forceinline__ uint4 load_once(const void *p)
{
    uint4 v;
    asm volatile("ld.global.nc.L1::no_allocate.L2::256B.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
                 : "l"(p));
    return v;
}

__device__ __forceinline__ void matrix_load4(uint32_t r[4], const void *p)
{
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(shared_address(p)));
}

__device__ __forceinline__ void matrix_load4_transposed(uint32_t r[4], const void *p)
{
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(shared_address(p)));
}

// d += a b: a 16x16 (row), b 16x8 (col), fp32.
__device__ __forceinline__ void mma_16816(float d[4], const uint32_t a[4], uint32_t b0, uint32_t b1)
{
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, "
                 "{%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
                 : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

__device__ __forceinline__ uint32_t pack_bf16(float low, float high)
{
    __nv_bfloat162 v = __floats2bfloat162_rn(low, high);
    return *(uint32_t *)&v;
}

__device__ __forceinline__ float silu(float x)
{
    return __fdividef(x, 1.0f + __expf(-x)); // within 2 ulp; NaN stays NaN
}

// The address of row `row` of a LoRA slice (lora.h: lora_row_at).
__device__ __forceinline__ const uint8_t *lora_row(const uint8_t *arena, uint64_t page_bytes,
                                                   const uint32_t *pages,
                                                   const struct lora_slice *s, uint32_t row)
{
    uint32_t in_first = ((uint32_t)page_bytes - s->first_byte) / s->row_bytes;
    if (row < in_first)
        return arena + (uint64_t)pages[s->first_slot] * page_bytes + s->first_byte +
               (uint64_t)row * s->row_bytes;
    uint32_t left = row - in_first, per = (uint32_t)page_bytes / s->row_bytes;
    return arena + (uint64_t)pages[s->first_slot + 1 + left / per] * page_bytes +
           (uint64_t)(left % per) * s->row_bytes;
}
