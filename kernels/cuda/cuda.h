// SPDX-License-Identifier: Apache-2.0
// What the files of this folder share: the device, the stream, and how a launcher launches.
//
//   device.c   the device: memory, copy streams, faults, the table
//   stream.c   recording, row slots, units and their captured graphs, submit and poll
//   *.cu       one operation (or family) each: device code, then the launcher cuda__<op>
//
// Launchers are called in stream order, either eagerly or under stream capture, so they must only
// launch: no allocation, no synchronisation, no host read of device memory. A captured graph is
// replayed for other steps of the same bucket, so nothing that changes from step to step may be
// baked in: what changes stands in struct cuda_control, in device memory:
//   rows[slot]     the number of rows this command really has; args->rows and launch->rows_max are
//                  the bucket, which sizes the grid. Kernels never touch rows >= rows[slot].
//   lora_segments, lora_rank   of the lora_batch of the step; args->batch->segments, rows and
//                  rank_max are NOT to be read by kernels or launchers (stride of `hidden`:
//                  lora_rank).
//   tops is baked in (an argument); `resume` too.
//
// Every kernel begins with segment_enter (common.cuh): it waits for the kernel before it
// (programmatic dependent launch), reads the control block and leaves when the segment has missed.
// Only loads of static weights may stand before that wait; nothing may be written before it. In a
// settled launch (below) what was written before the unit may be read too: since every kernel lets
// the next begin only after its own wait, the kernel before the last one is done by then.
#ifndef POLDER_KERNELS_CUDA_CUDA_H
#define POLDER_KERNELS_CUDA_CUDA_H

#include <cublasLt.h>
#include <cuda_runtime_api.h>

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

#include "base/check.h"
#include "kernels/device.h"

enum {
    ROW_SLOTS = 32, // distinct row counts of one segment
    NO_MISS = 0xffffffff,
    ROWS_MAX = 49152,   // the largest bucket below the 65535 blocks of a grid's second dimension
    HIDDEN_MAX = 16384, // rmsnorm: a thread's registers; narrow expert GEMM: a lane's addresses
    HEAD_DIM_MAX = 256,
    EXPERTS_MAX = 1024,
    TOP_K_MAX = 32,
    RANK_MAX = 512,
    ATTENTION_PARTIAL_BYTES = 96 << 20,
    BLAS_WORKSPACE_BYTES = 64 << 20,
};

// Device memory, one per stream. Written by the kernel that opens a segment; missed by moe_map.
struct cuda_control {
    uint32_t miss_layer; // NO_MISS, or the MoE layer where an expert was missing
    uint32_t lora_segments, lora_rank;
    uint32_t reserved;
    uint32_t rows[ROW_SLOTS];
};

struct cuda_device {
    struct device base;
    struct device_info info;
    int ordinal, multiprocessors;
    bool invariant; // --batch-invariant: a row's bits do not depend on the other rows
    cublasLtHandle_t blas;
    cudaStream_t copies[2];                      // host to device, device to host
    cudaEvent_t copy_done[2][DEVICE_COPIES_MAX]; // a ring of those under way
    uint32_t copy_first[2], copy_count[2];
    cudaStream_t side; // zero_now
    cudaEvent_t side_done;
    bool side_dirty;
    enum status failed; // DEVICE once a CUDA call failed: the process has to be started anew
    char failure[160];  // which call, and what CUDA said
};

// Handed to launchers.
struct cuda_launch {
    cudaStream_t stream;
    struct cuda_device *device;
    struct cuda_control *control; // device memory
    uint32_t slot;                // control->rows[slot] is the number of rows
    uint32_t rows_max;            // bucket: the grid covers this many rows
    bool can_miss;                // a moe_map stands before it in the segment
    bool settled;                 // two kernels or more of the same unit stand before it
    bool captured;                // under capture (rows_max is a bucket), else rows_max is exact
    // Scratch of the stream, device memory.
    uint8_t *partials;       // ATTENTION_PARTIAL_BYTES
    uint8_t *blas_workspace; // BLAS_WORKSPACE_BYTES
    uint8_t *work;           // WORK_BYTES; for whichever operation runs
};
enum { WORK_BYTES = 64 << 20 };

// Marks the device failed and logs once. Returns STATUS_DEVICE.
enum status cuda__fail(struct cuda_device *device, const char *call, int error);
#define CUDA_TRY(device, call)                                                                     \
    do {                                                                                           \
        cudaError_t error_ = (call);                                                               \
        if (error_ != cudaSuccess)                                                                 \
            return cuda__fail((device), #call, (int)error_);                                       \
    } while (0)

// An act operand: [rows][act_cols] bf16 row-major, act_cols = cols rounded up to 64, padding zero.
// A dense weight: the same, [n][act_cols(k)] bf16 row-major (gate and up rows interleaved as in
// tile.h). Experts: tiles in pages (tile.h).
static inline size_t cuda__act_cols(size_t cols)
{
    return (cols + 63) / 64 * 64;
}

// The launchers. Fill-in order of the table.
void cuda__scatter(const struct cuda_launch *l, const struct scatter_args *a);
void cuda__gather(const struct cuda_launch *l, const struct gather_args *a);
void cuda__embed(const struct cuda_launch *l, const struct embed_args *a);
void cuda__rmsnorm(const struct cuda_launch *l, const struct rmsnorm_args *a);
void cuda__swiglu(const struct cuda_launch *l, const struct swiglu_args *a);
void cuda__gemm(const struct cuda_launch *l, const struct gemm_args *a);
void cuda__lora_gather(const struct cuda_launch *l, const struct lora_gather_args *a);
// Shrinks (expands) of one step that follow each other are launched together: count 1..3, same
// batch; shrinks of the same x and d_in.
void cuda__lora_shrink(const struct cuda_launch *l, const struct lora_shrink_args *a,
                       uint32_t count);
void cuda__lora_expand(const struct cuda_launch *l, const struct lora_expand_args *a,
                       uint32_t count);
void cuda__qk_norm_rope_kv(const struct cuda_launch *l, const struct qk_args *a);
void cuda__attention(const struct cuda_launch *l, const struct attention_args *a);
void cuda__router(const struct cuda_launch *l, const struct router_args *a);
void cuda__moe_map(const struct cuda_launch *l, const struct moe_map_args *a);
void cuda__moe_gate_up(const struct cuda_launch *l, const struct moe_gemm_args *a);
void cuda__moe_down(const struct cuda_launch *l, const struct moe_gemm_args *a);
void cuda__moe_combine(const struct cuda_launch *l, const struct moe_combine_args *a);
void cuda__all_reduce(const struct cuda_launch *l, const struct all_reduce_args *a);
void cuda__sample(const struct cuda_launch *l, const struct sample_args *a);

// segment.cu: the kernels that open and close a segment.
struct cuda_open {
    uint32_t lora_segments, lora_rank;
    uint32_t rows[ROW_SLOTS];
};
struct cuda_result { // pinned host memory
    uint32_t miss_layer;
    uint32_t sequence; // of the segment, written last
};
void cuda__segment_open(cudaStream_t stream, struct cuda_control *control,
                        const struct cuda_open *open);
void cuda__segment_close(cudaStream_t stream, const struct cuda_control *control,
                         struct cuda_result *result, uint32_t sequence);

// A raised dynamic shared memory limit and other one-time kernel attributes, per .cu file; called
// once by device_create_cuda, before anything is captured.
enum status cuda__attention_prepare(struct cuda_device *device);
enum status cuda__gemm_prepare(struct cuda_device *device);
enum status cuda__lora_prepare(struct cuda_device *device);
enum status cuda__moe_prepare(struct cuda_device *device);
enum status cuda__sample_prepare(struct cuda_device *device);

#ifdef __cplusplus
}
#endif
#endif
