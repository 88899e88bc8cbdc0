// SPDX-License-Identifier: Apache-2.0
// Dense products: y[r][j] (+)= sum_k x[r][k] W[j][k].
//   x  act [rows][K] bf16, W [n][K] bf16, K = act_cols(k), padding zero; y fp32, rows y_stride
//   apart.
//
// Two ways:
//   narrow   our kernel, up to NARROW_ROWS rows, where time is that of reading W once; and every
//            number of rows under --batch-invariant: a result's bits depend on k alone.
//   blas     cuBLASLt, more rows (gemm_blas.c). It works on the whole bucket and knows nothing of
//            misses, so it only writes what a resumed segment computes anew. `add` changes the
//            residual stream, which a missed segment must leave alone: where a moe_map stands
//            before it, the product goes to scratch and a kernel of ours adds it, when the segment
//            has not missed. Beside a fused add that moves 8 bytes more per result, mostly through
//            L2; by arithmetic a fifth of the time at K = 4,096, a twentieth at 14,336. Without
//            misses (dense models) it is not needed.
//
// Narrow. Weights are the M operand of mma.m16n8k16 (16 weight rows), tokens the N operand (8).
// Both go from global memory into registers without shared memory, because the order of k within
// a product is free as long as both operands agree: of a piece of 64 columns, lane (g = lane / 4,
// t = lane % 4) holds columns 8t..8t+7 and 32+8t..32+8t+7 of weight row g (and g + 8) and of token
// g, which are 16-byte loads. Of 8 columns, (0,1) and (2,3) are its places (2t,2t+1) and
// (2t+8,2t+9) of one mma, (4,5) and (6,7) of the next.
//
// Work: an item is (unit of 8 H MT weight rows, H = 1 or 2 halves of an m-tile) x (group of 8 NT
// tokens) x all K, groups innermost, so that with many groups W is read from DRAM once. A CTA of 8
// warps takes items blockIdx.x, + gridDim.x, ...; warp w takes pieces w, w + 8, ... in ascending
// order; then the 8 partial sums are added in order of warps through shared memory. Neither MT, NT,
// the group nor the grid changes the order in which one result is summed.
//
// In flight: each lane keeps 16 loads of 16 bytes ahead (ring), 64 KB per CTA, mostly two CTAs per
// SM, and goes on with the next item's weights before it finishes this one. W is static: the first
// ring is requested before the kernel waits for its predecessor, which hides the gap between
// kernels. x is read through L1, where the CTA's next unit finds it again. Shared memory: 8 warps x
// 8 NT tokens x (16 MT + 4) floats, 5 to 36 KB. Bound by bytes of W. Tolerance 2e-5 of the sum of
// absolute terms: tensor cores truncate while adding.
#include "kernels/cuda/common.cuh"
#include "kernels/cuda/gemm.h"

enum {
    WARPS = 8,
    THREADS = 32 * WARPS,
    PIECE = 64,      // columns
    RING_ROWS = 4,   // pieces x m-tiles ahead
    NARROW_ROWS = 8, // above it cuBLASLt: at 16 rows it is ahead by 5 to 25 %
    ADD_THREADS = 256,
};

// The largest instance would spill with 128 registers.
static constexpr uint32_t ctas_per_sm(int nt, int mt, int halves)
{
    return halves == 1 && nt == 1 ? 3 : nt * mt < 8 ? 2 : 1;
}

struct narrow_args {
    const bf16 *x, *w;
    float *y;
    uint64_t y_stride;
    uint32_t n, cols, groups, items;
    bool add;
};

// Where a lane reads a unit's weights: its two rows of each m-tile. Rows behind n read row n - 1.
template <int MT, int H>
static __device__ __forceinline__ void unit_rows(const struct narrow_args &a, uint32_t unit,
                                                 const bf16 *row[MT][H])
{
    uint32_t g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
#pragma unroll
    for (int m = 0; m < MT; m++)
#pragma unroll
        for (int h = 0; h < H; h++) {
            uint32_t j = (unit * MT + m) * 8 * H + 8 * h + g;
            row[m][h] = a.w + (uint64_t)(j < a.n ? j : a.n - 1) * a.cols + 8 * t;
        }
}

template <int MT, int H>
static __device__ __forceinline__ void piece_load(uint4 to[MT][H][2], const bf16 *const row[MT][H],
                                                  uint32_t piece)
{
#pragma unroll
    for (int m = 0; m < MT; m++)
#pragma unroll
        for (int h = 0; h < H; h++) {
            to[m][h][0] = load_once(row[m][h] + piece * PIECE);
            to[m][h][1] = load_once(row[m][h] + piece * PIECE + PIECE / 2);
        }
}

// sum += one piece of weights x tokens. token[i]: where this lane reads token 8i + g.
template <int NT, int MT, int H>
static __device__ __forceinline__ void piece_multiply(float sum[MT][NT][4], const uint4 w[MT][H][2],
                                                      const bf16 *const token[NT], uint32_t piece)
{
#pragma unroll
    for (int i = 0; i < NT; i++)
#pragma unroll
        for (int half = 0; half < 2; half++) {
            uint4 x = *(const uint4 *)(token[i] + piece * PIECE + half * (PIECE / 2));
#pragma unroll
            for (int m = 0; m < MT; m++) {
                const uint4 low = w[m][0][half];
                const uint4 high = H == 2 ? w[m][H - 1][half] : make_uint4(0, 0, 0, 0);
                const uint32_t first[4] = {low.x, high.x, low.y, high.y};
                const uint32_t second[4] = {low.z, high.z, low.w, high.w};
                mma_16816(sum[m][i], first, x.x, x.y);
                mma_16816(sum[m][i], second, x.z, x.w);
            }
        }
}

// Adds the warps' partial sums in order and writes the item's results.
template <int NT, int MT, int H>
static __device__ __forceinline__ void item_store(const struct narrow_args &a, uint32_t item,
                                                  uint32_t rows, const float sum[MT][NT][4])
{
    enum { ROWS = 8 * H * MT, STRIDE = ROWS + 4, TOKENS = 8 * NT };
    __shared__ float partial[WARPS][TOKENS][STRIDE];
    uint32_t warp = threadIdx.x / 32, g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
    __syncthreads(); // the item before has been read
#pragma unroll
    for (int m = 0; m < MT; m++)
#pragma unroll
        for (int i = 0; i < NT; i++)
#pragma unroll
            for (int c = 0; c < 2 * H; c++)
                partial[warp][8 * i + 2 * t + c % 2][8 * H * m + g + c / 2 * 8] = sum[m][i][c];
    __syncthreads();
    for (uint32_t at = threadIdx.x; at < ROWS * TOKENS; at += THREADS) {
        uint32_t token = at / ROWS, row = at % ROWS;
        uint32_t r = item % a.groups * TOKENS + token, j = item / a.groups * ROWS + row;
        if (r >= rows || j >= a.n)
            continue;
        float total = 0;
#pragma unroll
        for (int w = 0; w < WARPS; w++)
            total += partial[w][token][row];
        float *y = a.y + r * a.y_stride + j;
        *y = a.add ? *y + total : total;
    }
}

template <int NT, int MT, int H>
static __global__ void __launch_bounds__(THREADS, ctas_per_sm(NT, MT, H))
    narrow_kernel(const struct cuda_control *control, uint32_t slot, const struct narrow_args a)
{
    enum { RING = RING_ROWS / MT };
    uint32_t warp = threadIdx.x / 32, g = threadIdx.x % 32 / 4, t = threadIdx.x % 4, rows;
    uint32_t pieces = a.cols / PIECE;
    uint32_t rounds = ((pieces + WARPS - 1) / WARPS + RING - 1) / RING;
    const bf16 *row[MT][H];
    uint4 ring[RING][MT][H][2];
    unit_rows<MT, H>(a, blockIdx.x / a.groups, row);
#pragma unroll
    for (int d = 0; d < RING; d++)
        if (d * WARPS + warp < pieces)
            piece_load<MT, H>(ring[d], row, d * WARPS + warp);
    if (!segment_enter(control, slot, &rows))
        return;
    // Places of the N operand without a token repeat the last one; nobody looks at their sums.
    uint32_t last_row = rows ? rows - 1 : 0;
    for (uint32_t item = blockIdx.x; item < a.items; item += gridDim.x) {
        float sum[MT][NT][4] = {};
        const bf16 *token[NT];
#pragma unroll
        for (int i = 0; i < NT; i++) {
            uint32_t r = (item % a.groups * NT + i) * 8 + g;
            token[i] = a.x + (uint64_t)(r < rows ? r : last_row) * a.cols + 8 * t;
        }
        for (uint32_t round = 0; round < rounds; round++) {
            // The ring is filled again for the next round, or for the first one of the next item.
            bool last = round + 1 == rounds;
            bool more = !last || item + gridDim.x < a.items;
            uint32_t next = last ? warp : (round + 1) * RING * WARPS + warp;
            if (last && more)
                unit_rows<MT, H>(a, (item + gridDim.x) / a.groups, row);
#pragma unroll
            for (int d = 0; d < RING; d++) {
                uint32_t piece = (round * RING + d) * WARPS + warp;
                if (piece < pieces)
                    piece_multiply<NT, MT, H>(sum, ring[d], token, piece);
                if (more && next + d * WARPS < pieces)
                    piece_load<MT, H>(ring[d], row, next + d * WARPS);
            }
        }
        item_store<NT, MT, H>(a, item, rows, sum);
    }
}

// y[r][j] += product[r - first][j] of the rows of one chunk. A thread per result.
static __global__ void __launch_bounds__(ADD_THREADS)
    add_kernel(const struct cuda_control *control, uint32_t slot, float *y, uint64_t y_stride,
               const float *product, uint32_t n, uint32_t first)
{
    uint32_t rows, r = first + blockIdx.x;
    if (!segment_enter(control, slot, &rows) || r >= rows)
        return;
    const float *from = product + (uint64_t)blockIdx.x * n;
    float *to = y + r * y_stride;
    for (uint32_t j = threadIdx.x; j < n; j += ADD_THREADS)
        to[j] += from[j];
}

template <int NT, int MT, int H>
static void narrow_launch(const struct cuda_launch *l, const struct gemm_args *a,
                          uint32_t ctas = ctas_per_sm(NT, MT, H))
{
    uint32_t units = (a->n + 8 * H * MT - 1) / (8 * H * MT);
    struct narrow_args args = {.x = (const bf16 *)a->x,
                               .w = (const bf16 *)a->weight,
                               .y = a->y,
                               .y_stride = a->y_stride,
                               .n = a->n,
                               .cols = (uint32_t)cuda__act_cols(a->k),
                               .groups = (l->rows_max + 8 * NT - 1) / (8 * NT),
                               .add = a->add};
    CHECK((uint64_t)units * args.groups < UINT32_MAX / 2);
    args.items = units * args.groups;
    uint32_t grid = ctas * (uint32_t)l->device->multiprocessors;
    launch_kernel(l, narrow_kernel<NT, MT, H>, dim3(args.items < grid ? args.items : grid),
                  dim3(THREADS), 0, l->control, l->slot, args);
}

// How much of the machine is busy when `units` are dealt out to `ctas` CTAs a multiprocessor.
static float busy(const struct cuda_launch *l, uint32_t units, uint32_t ctas)
{
    uint32_t slots = ctas * (uint32_t)l->device->multiprocessors;
    uint32_t waves = (units + slots - 1) / slots;
    return (float)units / (float)(waves * slots);
}

// Up to 8 rows: units of 16 or 8 weight rows, and of those two or three CTAs a multiprocessor,
// whichever leaves the fewest without a unit in the last round.
static void narrow_few(const struct cuda_launch *l, const struct gemm_args *a)
{
    uint32_t sixteens = (a->n + 15) / 16, eights = (a->n + 7) / 8;
    float tall = busy(l, sixteens, 2), two = busy(l, eights, 2), three = busy(l, eights, 3);
    if (tall + 0.02f >= two && tall + 0.02f >= three)
        narrow_launch<1, 1, 2>(l, a);
    else
        narrow_launch<1, 1, 1>(l, a, two > three + 0.02f ? 2 : 3);
}

// Units of 32 rows halve the reading of x, where they leave a unit for every CTA.
static void narrow(const struct cuda_launch *l, const struct gemm_args *a)
{
    bool tall = a->n / 32 >= 2 * (uint32_t)l->device->multiprocessors;
    if (l->rows_max <= 8)
        narrow_few(l, a);
    else if (l->rows_max <= 16 && !tall)
        narrow_launch<2, 1, 2>(l, a);
    else if (l->rows_max <= 16)
        narrow_launch<2, 2, 2>(l, a);
    else if (!tall)
        narrow_launch<4, 1, 2>(l, a);
    else
        narrow_launch<4, 2, 2>(l, a);
}

// The product of all rows into scratch, in chunks that fit, each added to y. False: no algorithm.
static bool blas_add(const struct cuda_launch *l, const struct gemm_args *a)
{
    uint32_t chunk = WORK_BYTES / sizeof(float) / a->n;
    if (!chunk)
        return false;
    float *product = (float *)l->work;
    for (uint32_t first = 0; first < l->rows_max; first += chunk) {
        uint32_t left = l->rows_max - first, rows = left < chunk ? left : chunk;
        const bf16 *x = (const bf16 *)a->x + (uint64_t)first * cuda__act_cols(a->k);
        if (!cuda__gemm_blas(l, a, x, product, a->n, rows)) {
            CHECK(!first); // what is known for the first chunk is known for a smaller one
            return false;
        }
        launch_kernel(l, add_kernel, dim3(rows), dim3(ADD_THREADS), 0, l->control, l->slot, a->y,
                      (uint64_t)a->y_stride, (const float *)product, a->n, first);
    }
    return true;
}

void cuda__gemm(const struct cuda_launch *l, const struct gemm_args *a)
{
    CHECK(a->k && a->k <= 1 << 20 && a->y_stride >= a->n);
    if (!l->rows_max || !a->n)
        return;
    bool own = l->device->invariant || l->rows_max <= NARROW_ROWS;
    if (!own)
        own =
            !(a->add && l->can_miss ? blas_add(l, a)
                                    : cuda__gemm_blas(l, a, a->x, a->y, a->y_stride, l->rows_max));
    if (own)
        narrow(l, a);
}

enum status cuda__gemm_prepare(struct cuda_device *device)
{
    (void)device; // no kernel here wants more than the default shared memory
    return STATUS_OK;
}
