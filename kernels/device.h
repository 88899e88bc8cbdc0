// SPDX-License-Identifier: Apache-2.0
// The device table: every numeric operation, once, for all backends (DESIGN.md 12).
//
// Terms
//   device   one backend instance: memory, a table of operations.
//   stream   an ordered list of commands. Operations RECORD a command; nothing runs until
//            stream_submit. What is recorded between two submits is one segment. Argument structs
//            are copied when recorded; the arrays they point to must live until the segment has
//            retired.
//   act      an activation operand [rows][cols] in a layout private to the backend (CPU: row-major,
//   rows
//            padded with zeros to act_cols(cols) elements of the compute dtype). Made by rmsnorm,
//            attention, swiglu and moe_gate_up, consumed by gemm, lora_shrink, moe_*.
//   miss     moe_map finds an expert that is not resident: it sets the stream's miss state; every
//   later
//            command of the segment except the moe commands of that same layer (which compute the
//            resident experts) exits early. The host brings the pages and submits again from that
//            gate.
//   page     the kernels reach experts, adapters and KV only through page numbers into the arena.
//
// Compute dtype: DTYPE_BF16 (shipped: bf16 operands of dot products, fp32 everything else) or
// DTYPE_F32 (the reference path: weights, KV and operands all fp32). One device runs one compute
// dtype.
//
// Determinism (FIXED): a row's bits depend on that row and its KV alone, never on the number of
// rows, their order, the thread count or page numbers. Reductions have a fixed order that depends
// on shape alone; KV is reduced in segments of KV_SEGMENT tokens at absolute positions, merged in
// ascending order.
//
// Scratch is sized when devices and streams are created and never grows; operations allocate
// nothing. CPU: about 1.5 MiB per thread, and per stream 16 MiB (touched when expert LoRA runs) and
// 2 KiB per command.
//
// Threads: a stream is used by one thread (the engine thread). Sizes are elements unless named
// _bytes. Shapes are checked when recording: CHECK for bugs. 64-bit offsets throughout.
#ifndef POLDER_KERNELS_DEVICE_H
#define POLDER_KERNELS_DEVICE_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "base/status.h"
#include "kernels/attention.h"
#include "kernels/comm.h"
#include "kernels/lora.h"
#include "kernels/moe.h"
#include "kernels/norm.h"
#include "kernels/sample.h"
#include "kernels/tile.h"

enum { PAGE_NONE = 0xffffffff };

struct device;
struct stream;

struct device_info {
    char name[64]; // "cpu avx512bf16, 2 threads"
    char instruction_set[32];
    uint32_t threads;
    enum dtype dtype;
    // How gemm wants its weights: true: tiles (tile.h); false: row-major, each row rounded up to
    // whole tiles of columns and padded with zeros. Gate and up rows are interleaved either way.
    bool dense_tiles;
    bool host_access; // device memory is plain memory that the host may read and write
    // The largest that the operations take, checked when the engine is made; 0: whatever comes.
    uint32_t rows_max, hidden_max, head_dim_max, experts_max, top_k_max;
};

// What a submitted segment came to.
struct segment_result {
    bool missed;         // an expert was not resident
    uint32_t miss_layer; // at which MoE layer, when missed
    enum status status;  // DEVICE: the segment failed; nothing it wrote can be trusted
};

// y[rows][n] (fp32) = x[rows][k] * W[n][k]^T (+ y when add). W is contiguous, laid out as
// device_info.dense_tiles says.
struct gemm_args {
    const void *x;      // act [rows][k]
    const void *weight; // n x k
    float *y;
    size_t y_stride; // elements between rows of y
    uint32_t rows, n, k;
    bool add;
};

// x[rows][dim] (fp32) = table[token[row]] ; table row-major, compute dtype.
struct embed_args {
    const int32_t *token;
    const void *table;
    float *x;
    uint32_t rows, dim, vocab;
};

// to[i][dim] (fp32) = from[index[i]][dim]
struct gather_args {
    const float *from;
    const uint32_t *index;
    float *to;
    uint32_t rows, dim;
};

// table[index[i]] = value[i], stream-ordered: how page tables change.
struct scatter_args {
    uint32_t *table;
    const uint32_t *index, *value;
    uint32_t count;
};

enum copy_direction { COPY_TO_DEVICE, COPY_TO_HOST };
enum { DEVICE_COPIES_MAX = 4 };

// Arrays with a row for each row of a step are allocated for row_bucket(rows) rows: backends that
// replay captured segments round row counts up to it. A power of two, or three quarters of one.
static inline uint32_t row_bucket(uint32_t rows)
{
    uint32_t bucket = 1;
    while (bucket < rows)
        bucket *= 2;
    return bucket >= 32 && bucket / 4 * 3 >= rows ? bucket / 4 * 3 : bucket;
}

struct device_table {
    void (*destroy)(struct device *device);
    void (*info)(const struct device *device, struct device_info *out);

    // Memory: zeroed, 64-byte aligned or better. NO_MEMORY when the device has not enough.
    enum status (*alloc)(struct device *device, size_t bytes, void **out);
    void (*release)(struct device *device, void *memory);
    size_t (*act_bytes)(const struct device *device, size_t rows, size_t cols);
    // Host memory that recorded operations may read and write at its own address (pinned; zeroed).
    enum status (*alloc_host)(struct device *device, size_t bytes, void **out);
    void (*release_host)(struct device *device, void *memory);
    // At once, before anything that is submitted later; not for memory that a segment in flight
    // touches. upload and download wait until it is done; zero_now need not.
    enum status (*upload)(struct device *device, void *to, const void *from, size_t bytes);
    enum status (*download)(struct device *device, void *to, const void *from, size_t bytes);
    enum status (*zero_now)(struct device *device, void *to, size_t bytes);
    // Bytes free for alloc now; SIZE_MAX when the device does not know.
    size_t (*free_bytes)(const struct device *device);

    // Copies beside the segments (unified_pool/link_device.c), between alloc_host memory and device
    // memory: at most DEVICE_COPIES_MAX of a direction at a time, done in the order of their
    // starts. copy_poll: true when the oldest is done, which is one less then, or when there is
    // none.
    enum status (*copy_start)(struct device *device, enum copy_direction direction, void *to,
                              const void *from, size_t bytes);
    bool (*copy_poll)(struct device *device, enum copy_direction direction, enum status *status);

    // A stream holds at most `commands` recorded commands per segment.
    enum status (*stream_create)(struct device *device, uint32_t commands, struct stream **out);
    void (*stream_destroy)(struct stream *stream);
    // Runs what was recorded; returns at once. One segment may be in flight per stream.
    enum status (*submit)(struct stream *stream);
    // True when the segment has retired (or none is in flight); fills *result.
    bool (*poll)(struct stream *stream, struct segment_result *result);
    enum status (*wait)(struct stream *stream, struct segment_result *result);

    // What is recorded from here to the next unit (or submit) may be replayed as a whole for later
    // steps: within a unit the same operations on the same arrays differ in row counts and in the
    // scalars of lora_batch only. CUDA captures each unit once per bucket of rows. Without a unit
    // operations are launched one by one. copy, zero and scatter stand before the first unit.
    void (*unit)(struct stream *s);
    // Units captured since the stream was made.
    uint64_t (*captures)(const struct stream *s);

    // Recorded operations.
    void (*copy)(struct stream *s, void *to, const void *from, size_t bytes);
    void (*zero)(struct stream *s, void *to, size_t bytes);
    void (*scatter)(struct stream *s, const struct scatter_args *a);
    void (*gather)(struct stream *s, const struct gather_args *a);
    void (*embed)(struct stream *s, const struct embed_args *a);
    void (*rmsnorm)(struct stream *s, const struct rmsnorm_args *a);
    void (*gemm)(struct stream *s, const struct gemm_args *a);
    void (*swiglu)(struct stream *s, const struct swiglu_args *a);
    void (*lora_gather)(struct stream *s, const struct lora_gather_args *a);
    void (*lora_shrink)(struct stream *s, const struct lora_shrink_args *a);
    void (*lora_expand)(struct stream *s, const struct lora_expand_args *a);
    void (*qk_norm_rope_kv)(struct stream *s, const struct qk_args *a);
    void (*attention)(struct stream *s, const struct attention_args *a);
    void (*router)(struct stream *s, const struct router_args *a);
    void (*moe_map)(struct stream *s, const struct moe_map_args *a);
    void (*moe_gate_up)(struct stream *s, const struct moe_gemm_args *a);
    void (*moe_down)(struct stream *s, const struct moe_gemm_args *a);
    void (*moe_combine)(struct stream *s, const struct moe_combine_args *a);
    void (*all_reduce)(struct stream *s, const struct all_reduce_args *a);
    void (*sample)(struct stream *s, const struct sample_args *a);
};

// Every backend's device begins with its table; every stream with its device.
struct device {
    const struct device_table *table;
};
struct stream {
    struct device *device;
};

struct cpu_options {
    uint32_t threads; // 0: one per core this process may use
    enum dtype dtype;
    const char *instruction_set; // NULL: best; "avx512bf16", "avx2", "portable"
};

MUST_USE enum status device_create_cpu(const struct cpu_options *options, struct device **out,
                                       struct fault *fault);

struct cuda_options {
    int ordinal;          // cuda:N
    enum dtype dtype;     // bf16 only
    bool batch_invariant; // a row's bits do not depend on the other rows of the step
};

// UNSUPPORTED, with a sentence: a build without CUDA, no driver, no such GPU, not sm_90.
MUST_USE enum status device_create_cuda(const struct cuda_options *options, struct device **out,
                                        struct fault *fault);

#endif
