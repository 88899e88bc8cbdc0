// SPDX-License-Identifier: Apache-2.0
// The narrow expert GEMMs: decode, and every bucket of an invariant device.
//
//   gate_up: hidden[pair] = silu(Wg x[row]) * (Wu x[row])     down: out[pair] = Wd hidden[pair]
//
// Bound by the bytes of the weights of the distinct experts. Weights never pass shared memory: a
// row of a core matrix is 16 bytes, and a lane loads it straight into mma fragments. With the
// weights as the 16-row operand of m16n8k16, lane (g = l / 4, t = l % 4) loads row g of core
// columns t and t + 4 of both 8-row groups of a unit. Its 8 halves of a core column serve two
// k steps: halves 0..3 as k 2t, 2t+1, 2t+8, 2t+9 of the first, 4..7 of the second. That is a
// permutation of k, and the tokens (the 8-column operand, token g of a group) are loaded with the
// same one, so the product is right.
//
// Unit: 16 weight rows of one expert, all of K. For gate_up these are 8 gate rows and the same 8 up
// rows: accumulators c0, c1 are gate and c2, c3 up of the same hidden unit and tokens.
// CTA: WARPS warps share a unit's tiles of 64 columns, warp w takes w, w + WARPS, ..; depth_of
// tiles (4 loads per lane each) are in flight per warp at any time, also across items: as soon as a
// tile is used, its registers are loaded with the tile of the next batch. Item: (unit, group of
// GROUPS*8 tokens); a unit's further groups read the weights from L2. The grid is persistent and
// strides over units. Partial sums meet in shared memory [2][WARPS][4 * GROUPS][32] fp32, added in
// warp order; two buffers, so one barrier per item.
//
// Expert LoRA (moe_lora.cuh): a shrink before, the expansion when an item is stored.
//
// Invariance: a token is a column of the mma; the order of its sums depends on K alone (WARPS is
// chosen by K), not on GROUPS, the bucket or the other tokens.
#include "kernels/cuda/moe_lora.cuh"

enum { WIDE_TOKENS = 12 };

// Tiles in flight per warp: what 128 registers hold.
template <int GROUPS> struct depth_of {
    static constexpr int value = GROUPS <= 2 ? 4 : 2;
};

struct narrow_args {
    struct moe_gemm_args a;
    struct moe_lora lora;
    const struct moe_list *list;
    const uint8_t *x; // act rows
    uint64_t x_bytes; // of an act row
    uint32_t per_x;   // pairs that share a row of x
    uint32_t k_tiles, units, first_tile, per_page;
    uint32_t tiled_units; // units that have tiles; the rest is zero padding of hidden
};

// Where a warp stands: an item, and the batch of tiles in it.
template <int GROUPS> struct cursor {
    uint32_t unit;             // of all units of all experts
    uint32_t token, batch;     // first token of the group within the expert's pairs
    uint32_t expert, row_unit; // the expert and the unit within it
    uint32_t begin, count;
    uint32_t x_row[GROUPS]; // of x, for this lane's token (l / 4) in each group of 8
    uint64_t tile;          // lane l: address of the warp's l-th tile of this unit
};

template <int WARPS, int GROUPS>
__device__ __forceinline__ void item_pairs(const struct narrow_args &n, cursor<GROUPS> &c)
{
    uint32_t g = threadIdx.x % 32 / 4;
#pragma unroll
    for (int i = 0; i < GROUPS; i++) {
        uint32_t token = c.token + i * 8 + g;
        c.x_row[i] = token < c.count ? n.a.work.order[c.begin + token] / n.per_x : 0;
    }
}

template <int WARPS, int GROUPS>
__device__ __forceinline__ void unit_open(const struct narrow_args &n, uint32_t total,
                                          cursor<GROUPS> &c)
{
    if (c.unit >= total)
        return;
    struct moe_run run = n.list->run[c.unit / n.units];
    c.row_unit = c.unit % n.units;
    c.expert = run.expert;
    c.begin = run.begin;
    c.count = run.count;
    if (n.lora.present) { // the positions of this pass
        uint32_t end = min(run.begin + run.count, n.lora.end);
        c.begin = max(run.begin, n.lora.first);
        c.count = end > c.begin ? end - c.begin : 0;
    }
    c.token = c.batch = 0;
    uint32_t tile = threadIdx.x / 32 + threadIdx.x % 32 * WARPS;
    tile = min(tile, n.k_tiles - 1) + n.first_tile +
           min(c.row_unit, n.tiled_units - 1) / 4 * n.k_tiles;
    c.tile = (uint64_t)expert_tile(n.a.view, n.per_page, c.expert, tile);
    item_pairs<WARPS, GROUPS>(n, c);
}

// To the next batch; true when the item is finished.
template <int WARPS, int GROUPS>
__device__ __forceinline__ bool cursor_next(const struct narrow_args &n, uint32_t total,
                                            cursor<GROUPS> &c)
{
    if (++c.batch * (depth_of<GROUPS>::value * WARPS) < n.k_tiles)
        return false;
    c.batch = 0;
    c.token += GROUPS * 8;
    if (c.token < c.count) {
        item_pairs<WARPS, GROUPS>(n, c);
    } else {
        c.unit += gridDim.x;
        unit_open<WARPS, GROUPS>(n, total, c);
    }
    return true;
}

// Tile i of the cursor's batch into w[row group * 2 + half of the core columns].
template <int WARPS, int GROUPS>
__device__ __forceinline__ void tile_load(const struct narrow_args &n, uint32_t total,
                                          const cursor<GROUPS> &c, int i, uint4 w[4])
{
    uint32_t lane = threadIdx.x % 32, nth = c.batch * depth_of<GROUPS>::value + i;
    const uint8_t *tile = (const uint8_t *)__shfl_sync(0xffffffffu, c.tile, nth % 32);
    if (c.unit >= total || threadIdx.x / 32 + nth * WARPS >= n.k_tiles)
        return;
    tile += c.row_unit % 4 * (2 * 8 * CORE_BYTES) + lane % 4 * CORE_BYTES + lane / 4 * 16;
#pragma unroll
    for (int h = 0; h < 4; h++)
        w[h] = load_once(tile + h * (4 * CORE_BYTES));
}

template <int WARPS, int GROUPS>
__device__ __forceinline__ void tile_multiply(const struct narrow_args &n, const cursor<GROUPS> &c,
                                              int i, const uint4 w[4], float d[GROUPS][4])
{
    uint32_t lane = threadIdx.x % 32,
             k = threadIdx.x / 32 + (c.batch * depth_of<GROUPS>::value + i) * WARPS;
    if (k >= n.k_tiles)
        return;
    uint4 x[GROUPS][2];
#pragma unroll
    for (int j = 0; j < GROUPS; j++) {
        x[j][0] = x[j][1] = make_uint4(0, 0, 0, 0);
        if (c.token + j * 8 + lane / 4 >= c.count)
            continue;
        const uint8_t *from = n.x + c.x_row[j] * n.x_bytes + k * 128 + lane % 4 * 16;
        x[j][0] = *(const uint4 *)from;
        x[j][1] = *(const uint4 *)(from + 64);
    }
#pragma unroll
    for (int j = 0; j < GROUPS; j++) {
        if (j && c.token + j * 8 >= c.count)
            break;
#pragma unroll
        for (int h = 0; h < 2; h++) {
            uint32_t first[4] = {w[h].x, w[2 + h].x, w[h].y, w[2 + h].y};
            uint32_t second[4] = {w[h].z, w[2 + h].z, w[h].w, w[2 + h].w};
            mma_16816(d[j], first, x[j][h].x, x[j][h].y);
            mma_16816(d[j], second, x[j][h].z, x[j][h].w);
        }
    }
}

// Adds the LoRA of a pair to weight rows r and r + 8 of a unit.
template <bool DOWN>
__device__ __noinline__ void
lora_add(const struct narrow_args &n, const struct cuda_control *control, uint32_t expert,
         uint32_t row_unit, uint32_t r, uint32_t position, uint32_t pair, float *low, float *high)
{
    const struct lora_adapter_view *view =
        moe_lora_view(n.lora, control_lora_segments(control), pair / n.a.top_k);
    if (!view)
        return;
    uint32_t stride = control_lora_rank(control);
    const float *hidden = n.lora.hidden + (uint64_t)(position - n.lora.first) * 2 * stride;
    if (DOWN) {
        const struct lora_pair *p = moe_lora_pair(view, n.a.layer, LORA_DOWN, expert);
        uint32_t row = row_unit * 16 + r;
        if (row < n.a.dim)
            *low += moe_lora_column(n.lora, view, p, hidden, row);
        if (row + 8 < n.a.dim)
            *high += moe_lora_column(n.lora, view, p, hidden, row + 8);
    } else if (row_unit * 8 + r < n.a.intermediate) {
        uint32_t col = row_unit * 8 + r;
        const struct lora_pair *gate = moe_lora_pair(view, n.a.layer, LORA_GATE, expert);
        const struct lora_pair *up = moe_lora_pair(view, n.a.layer, LORA_UP, expert);
        *low += moe_lora_column(n.lora, view, gate, hidden, col);
        *high += moe_lora_column(n.lora, view, up, hidden + stride, col);
    }
}

// Adds the warps' sums of one item and stores what comes of them. Thread q owns weight rows r and
// r + 8 of the unit and one token.
template <int WARPS, int GROUPS, bool DOWN, bool LORA>
__device__ __forceinline__ void item_store(const struct narrow_args &n,
                                           const struct cuda_control *control,
                                           const cursor<GROUPS> &c, const float *sums)
{
    for (uint32_t q = threadIdx.x; q < GROUPS * 64; q += WARPS * 32) {
        uint32_t r = q % 8, token = q / 8; // within the item
        if (c.token + token >= c.count)
            break;
        // Accumulator i of lane l: row l / 4 (+ 8 for i >= 2), token l % 4 * 2 + i % 2.
        const float *from = sums + (token / 8 * 4 + token % 2) * 32 + r * 4 + token % 8 / 2;
        float low = 0, high = 0;
#pragma unroll
        for (int w = 0; w < WARPS; w++) {
            low += from[w * GROUPS * 128];
            high += from[w * GROUPS * 128 + 64];
        }
        uint32_t position = c.begin + c.token + token;
        uint64_t pair = n.a.work.order[position];
        if (LORA)
            lora_add<DOWN>(n, control, c.expert, c.row_unit, r, position, (uint32_t)pair, &low,
                           &high);
        if (DOWN) {
            float *out = n.a.work.out + pair * n.a.dim;
            uint32_t row = c.row_unit * 16 + r;
            if (row < n.a.dim)
                out[row] = low;
            if (row + 8 < n.a.dim)
                out[row + 8] = high;
        } else {
            uint32_t col = c.row_unit * 8 + r, cols = (n.a.intermediate + 63) / 64 * 64;
            float value = col < n.a.intermediate ? silu(low) * high : 0.0f;
            ((bf16 *)n.a.work.hidden)[pair * cols + col] = __float2bfloat16(value);
        }
    }
}

template <int WARPS, int GROUPS, bool DOWN, bool LORA>
__global__ void __launch_bounds__(WARPS * 32, 16 / WARPS)
    narrow_kernel(const struct cuda_control *control, uint32_t slot,
                  const __grid_constant__ struct narrow_args n)
{
    constexpr int DEPTH = depth_of<GROUPS>::value;
    __shared__ float sums[2][WARPS * GROUPS * 128];
    uint32_t rows, lane = threadIdx.x % 32, warp = threadIdx.x / 32, buffer = 0;
    if (!segment_enter_moe(control, slot, n.a.layer, &rows))
        return;
    uint32_t total = n.list->count * n.units;
    cursor<GROUPS> at = {};
    at.unit = blockIdx.x;
    unit_open<WARPS, GROUPS>(n, total, at);
    uint4 w[DEPTH][4];
    float d[GROUPS][4] = {};
#pragma unroll
    for (int i = 0; i < DEPTH; i++)
        tile_load<WARPS, GROUPS>(n, total, at, i, w[i]);
    while (at.unit < total) {
        cursor<GROUPS> next = at;
        bool finished = cursor_next<WARPS, GROUPS>(n, total, next);
#pragma unroll
        for (int i = 0; i < DEPTH; i++) {
            tile_multiply<WARPS, GROUPS>(n, at, i, w[i], d);
            tile_load<WARPS, GROUPS>(n, total, next, i, w[i]);
        }
        if (finished) {
#pragma unroll
            for (int i = 0; i < GROUPS * 4; i++) {
                sums[buffer][(warp * GROUPS * 4 + i) * 32 + lane] = d[i / 4][i % 4];
                d[i / 4][i % 4] = 0;
            }
            __syncthreads();
            item_store<WARPS, GROUPS, DOWN, LORA>(n, control, at, sums[buffer]);
            buffer ^= 1;
        }
        at = next;
    }
}

// ---- launchers ----

template <int WARPS, int GROUPS>
static void narrow_launch(const struct cuda_launch *l, const struct narrow_args *n, bool down)
{
    uint64_t pairs = (uint64_t)l->rows_max * n->a.top_k;
    uint64_t experts = pairs < n->a.view.experts ? pairs : n->a.view.experts;
    uint64_t ctas = (uint64_t)l->device->multiprocessors * (16 / WARPS);
    if (experts * n->units < ctas)
        ctas = experts * n->units;
    auto kernel = down              ? n->lora.present ? narrow_kernel<WARPS, GROUPS, true, true>
                                                      : narrow_kernel<WARPS, GROUPS, true, false>
                               : n->lora.present ? narrow_kernel<WARPS, GROUPS, false, true>
                                    : narrow_kernel<WARPS, GROUPS, false, false>;
    launch_kernel(l, kernel, dim3((uint32_t)ctas), dim3(WARPS * 32), 0, l->control, l->slot, *n);
}

static void narrow_choose(const struct cuda_launch *l, const struct narrow_args *n, bool down)
{
    uint64_t mean = (uint64_t)l->rows_max * n->a.top_k / n->a.view.experts;
    bool eight = n->k_tiles > 16;
    if (l->rows_max <= 8)
        (eight ? narrow_launch<8, 1> : narrow_launch<4, 1>)(l, n, down);
    else if (mean <= 6)
        (eight ? narrow_launch<8, 2> : narrow_launch<4, 2>)(l, n, down);
    else
        (eight ? narrow_launch<8, 4> : narrow_launch<4, 4>)(l, n, down);
}

// With expert LoRA: in passes over as many positions as have room for hidden vectors of the
// largest rank; more than one only from prefill buckets of thousands of rows on.
static void narrow_lora(const struct cuda_launch *l, const struct narrow_args *plain, bool down)
{
    const struct lora_batch *b = plain->a.lora;
    struct narrow_args n = *plain;
    uint32_t positions = l->rows_max * n.a.top_k;
    uint32_t fit = (WORK_BYTES - MOE_HIDDEN_AT) / (2 * RANK_MAX * (uint32_t)sizeof(float));
    n.lora.present = true;
    n.lora.arena = b->arena;
    n.lora.page_bytes = b->page_bytes;
    n.lora.row_begin = b->row_begin;
    n.lora.adapter = b->adapter;
    n.lora.adapters = b->adapters;
    n.lora.hidden = (float *)(l->work + MOE_HIDDEN_AT);
    for (uint32_t first = 0; first < positions; first += fit) {
        n.lora.first = first;
        n.lora.end = positions - first < fit ? positions : first + fit;
        cuda__moe_shrink(l, &n.a, down, &n.lora);
        narrow_choose(l, &n, down);
    }
}

static void narrow(const struct cuda_launch *l, const struct moe_gemm_args *a, bool down)
{
    struct narrow_args n = {};
    uint32_t in = down ? a->intermediate : a->dim;
    n.a = *a;
    n.list = (const struct moe_list *)l->work;
    n.x = (const uint8_t *)(down ? a->work.hidden : a->x);
    n.x_bytes = cuda__act_cols(in) * 2;
    n.per_x = down ? 1 : a->top_k;
    n.k_tiles = (in + 63) / 64;
    n.first_tile = down ? a->view.down_tile : 0;
    n.per_page = (uint32_t)(a->view.page_bytes / TILE_BYTES);
    n.tiled_units = down ? (a->dim + 15) / 16 : (a->intermediate + 7) / 8;
    n.units = down ? n.tiled_units : (uint32_t)cuda__act_cols(a->intermediate) / 8;
    CHECK(n.k_tiles <= 32 * 8);
    if (a->lora)
        narrow_lora(l, &n, down);
    else
        narrow_choose(l, &n, down);
}

static void moe_gemm(const struct cuda_launch *l, const struct moe_gemm_args *a, bool down)
{
    CHECK(a->view.experts && a->view.experts <= EXPERTS_MAX && a->top_k);
    CHECK(a->view.page_bytes >= TILE_BYTES);
    if (!l->rows_max || !a->dim || !a->intermediate)
        return;
    bool wide = !l->device->invariant && !a->lora &&
                (uint64_t)l->rows_max * a->top_k > (uint64_t)a->view.experts * WIDE_TOKENS;
    if (wide)
        cuda__moe_wide(l, a, down);
    else
        narrow(l, a, down);
}

extern "C" void cuda__moe_gate_up(const struct cuda_launch *l, const struct moe_gemm_args *a)
{
    moe_gemm(l, a, false);
}

extern "C" void cuda__moe_down(const struct cuda_launch *l, const struct moe_gemm_args *a)
{
    moe_gemm(l, a, true);
}
