// SPDX-License-Identifier: Apache-2.0
// What attention.cu (decode) and attention_prefill.cu share: the state of a softmax, its merge, the
// addresses of the paged cache, fragments, and which rows belong to which kernel.
//
// Rows. A run is a maximal stretch of rows of one sequence whose positions follow each other. When
// a step is wide enough for the prefill kernel, it takes the rows of runs of RUN_MIN and more; all
// other rows are the decode kernel's. Both find this out on the device, from `continues` bits: bit
// r is set when row r continues row r - 1.
//
// Tiles in shared memory are [rows][DIM] bf16, row after row, the 16-byte chunk c of row r standing
// at c ^ (r % 8): eight rows at one column then lie in eight different bank groups, so ldmatrix has
// no conflicts. DIM is head_dim rounded up to 64, 128 or 256; columns from head_dim on are zero.
#pragma once

#include "kernels/cuda/common.cuh"

enum {
    RUN_MIN = 16,      // at most 33: the bits of two words decide
    PREFILL_ROWS = 64, // steps of more rows have the prefill kernel beside the decode kernel
    HEADS_MAX = 8,     // of a decode task: columns of an mma tile
};

#define LOG2_E 1.4426950408889634f
#define NO_SCORE (-__int_as_float(0x7f800000))

// What is the same for all tasks of a launch. `attention_args.scale` here is scale * log2(e).
struct attention_plan {
    uint32_t act_cols;
    uint32_t group;     // query heads of a KV head
    uint32_t passes;    // of at most HEADS_MAX query heads
    uint32_t lanes;     // kv_heads * passes: tasks of a (row, segment)
    uint32_t together;  // rows whose query heads of a pass have room in one task
    uint32_t wide;      // rows of K and V can be copied 16 bytes at a time
    uint32_t runs;      // the prefill kernel takes the runs
    uint64_t layer_at;  // bytes from a page's begin to K of this layer
    uint64_t values_at; // bytes from a K row to the V row of the same token
    uint32_t page_at;   // which of a block's pages
    uint32_t *counters; // [COUNTERS], zero between launches
    float *partials;
    uint64_t partial_floats;
};

// Launches the prefill kernel: rows of runs only.
void cuda__attention_prefill(const struct cuda_launch *l, const struct attention_args *a,
                             const struct attention_plan *plan);
enum status cuda__attention_prefill_prepare(struct cuda_device *device);

static __device__ __forceinline__ float exp2_fast(float x)
{
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

// What to subtract: a row whose scores are all -inf must not make NaN of what follows.
static __device__ __forceinline__ float shift_of(float max)
{
    return max == NO_SCORE ? 0.0f : max;
}

static __device__ __forceinline__ uint32_t continues_row(const struct attention_args &a,
                                                         uint32_t row, uint32_t rows)
{
    return row && row < rows && a.sequence[row] == a.sequence[row - 1] &&
           a.position[row] == a.position[row - 1] + 1;
}

// Whether `row` stands in a run of RUN_MIN. before, at, after: `continues` bits of the 32 rows
// before those of its word, of its word, and of the next.
static __device__ __forceinline__ bool in_run(uint32_t before, uint32_t at, uint32_t after,
                                              uint32_t row)
{
    uint32_t shift = row % 32 + 1;
    uint32_t left = (uint32_t)((((uint64_t)at << 32) | before) >> shift); // row is the top bit
    uint32_t right = (uint32_t)((((uint64_t)after << 32) | at) >> shift); // row + 1 is the lowest
    uint32_t ones_left = (uint32_t)__clz((int)~left);
    uint32_t ones_right = ~right ? (uint32_t)__ffs((int)~right) - 1 : 32;
    return ones_left + ones_right + 1 >= RUN_MIN;
}

// Byte offset of chunk `chunk` of row `row` in a tile.
template <int DIM> static __device__ __forceinline__ uint32_t chunk_at(uint32_t row, uint32_t chunk)
{
    return row * (DIM * 2) + ((chunk ^ (row & 7)) << 4);
}

// The A fragment (16 rows from `row`) of 16 columns.
template <int DIM>
static __device__ __forceinline__ void rows_fragment(uint32_t a[4], const uint8_t *tile,
                                                     uint32_t row, uint32_t step, uint32_t lane)
{
    matrix_load4(a,
                 tile + chunk_at<DIM>(row + (lane / 8 % 2) * 8 + lane % 8, 2 * step + lane / 16));
}

// B fragments of K for 16 tokens and 16 columns: b[0..1] of tokens 0..7, b[2..3] of tokens 8..15.
template <int DIM>
static __device__ __forceinline__ void keys_fragment(uint32_t b[4], const uint8_t *tile,
                                                     uint32_t token, uint32_t step, uint32_t lane)
{
    matrix_load4(b,
                 tile + chunk_at<DIM>(token + lane / 16 * 8 + lane % 8, 2 * step + lane / 8 % 2));
}

// B fragments of V for 16 tokens and 16 columns: b[0..1] of columns 0..7, b[2..3] of columns 8..15.
template <int DIM>
static __device__ __forceinline__ void values_fragment(uint32_t b[4], const uint8_t *tile,
                                                       uint32_t token, uint32_t step, uint32_t lane)
{
    matrix_load4_transposed(
        b, tile + chunk_at<DIM>(token + lane / 8 % 2 * 8 + lane % 8, 2 * step + lane / 16));
}

// A fragments of p, 16 rows x 16 tokens, from the accumulators of its two 8-token tiles: its
// rounding to bf16 and the rounding of what that leaves.
static __device__ __forceinline__ void weights_split(uint32_t p[4], uint32_t rest[4],
                                                     const float s[2][4])
{
#pragma unroll
    for (int i = 0; i < 4; i++) {
        float low = s[i / 2][i % 2 * 2], high = s[i / 2][i % 2 * 2 + 1];
        p[i] = pack_bf16(low, high);
        rest[i] = pack_bf16(low - __uint_as_float(p[i] << 16),
                            high - __uint_as_float(p[i] & 0xffff0000u));
    }
}

static __device__ __forceinline__ float quad_max(float x)
{
    x = fmaxf(x, __shfl_xor_sync(0xffffffffu, x, 1));
    return fmaxf(x, __shfl_xor_sync(0xffffffffu, x, 2));
}

static __device__ __forceinline__ float quad_sum(float x)
{
    x += __shfl_xor_sync(0xffffffffu, x, 1);
    return x + __shfl_xor_sync(0xffffffffu, x, 2);
}
