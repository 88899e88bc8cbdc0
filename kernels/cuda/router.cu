// SPDX-License-Identifier: Apache-2.0
// The MoE router, the map of pairs by expert, and the combine.
//
// Router: logits[row][e] = sum_k x[row][k] W[e][k], fp32 throughout (tf32 would reorder experts).
// A warp owns EXPERTS experts x ROWS rows. Lane l takes the columns 4 (l + 32 i) .. + 3, i
// ascending, then the lanes are summed by a butterfly: the order depends on dim alone, so a row's
// bits are the same in every variant, batch and bucket. Few rows: one or two experts per warp, so
// that W (1 MiB for 128 x 2048) is spread over the machine; it is in L2 before the wait. Many
// rows: 4 x 8, bound by L1 loads (12 per 128 FMA, about half of the fp32 peak). The logits stand
// in l->work; a second kernel (a warp per row, experts in registers, e = lane + 32 i) takes the
// softmax and the top-k by argmax over the warp, ties to the lower index.
//
// Map: one CTA of 32 warps, bound by latency. Warp w owns a run of pairs; in steps of 32 the lanes
// of equal experts find each other by ballots over the bits of the expert, and the first adds to
// count[w][e] in shared memory (32 x experts x 4 bytes): no atomics. A thread per expert turns the
// counts into offsets by warp, a scan over the experts gives begin[], and a second walk places the
// pairs: order[] is ascending within an expert. Missing pages are looked up meanwhile. Experts in
// state 1 are listed in l->work (moe.cuh).
//
// Combine: y[row] += sum over slots ascending of gate * out; bound by bytes.
#include "kernels/cuda/moe_lora.cuh"

enum { MAP_THREADS = 1024, MAP_WARPS = 32, COMBINE_THREADS = 256, ROUTER_FEW = 16 };

// ---- router ----

template <bool FOUR> __device__ __forceinline__ float4 column_load(const float *p, uint32_t k)
{
    if (FOUR) {
        float4 v; // volatile: requested where it is written, not where it is needed
        asm volatile("ld.global.v4.f32 {%0, %1, %2, %3}, [%4];"
                     : "=f"(v.x), "=f"(v.y), "=f"(v.z), "=f"(v.w)
                     : "l"(p + k));
        return v;
    }
    return make_float4(p[k], 0, 0, 0);
}

__device__ __forceinline__ float dot_add(float sum, float4 a, float4 b)
{
    return fmaf(a.w, b.w, fmaf(a.z, b.z, fmaf(a.y, b.y, fmaf(a.x, b.x, sum))));
}

// A warp has EXPERTS x ROWS dots. The warps of a CTA have other rows of the same experts, or,
// ACROSS, other experts for the same rows, which then come from L2 once per CTA: x of 64 rows read
// by each of 128 experts would be 64 MB.
// grid: (experts / EXPERTS, rows / (ROWS * warps)); ACROSS: (experts / (EXPERTS * warps),
// rows / ROWS).
template <int EXPERTS, int ROWS, bool ACROSS, bool FOUR>
__global__ void __launch_bounds__(128)
    logits_kernel(const struct cuda_control *control, uint32_t slot, struct router_args a,
                  float *logits)
{
    constexpr uint32_t STEP = FOUR ? 4 : 1, BATCH = EXPERTS > 2 ? 1 : EXPERTS > 1 ? 4 : 8;
    uint32_t lane = threadIdx.x % 32, warp = threadIdx.x / 32, warps = blockDim.x / 32, rows;
    uint32_t expert = (ACROSS ? blockIdx.x * warps + warp : blockIdx.x) * EXPERTS;
    const float *w[EXPERTS], *x[ROWS];
    for (int e = 0; e < EXPERTS; e++)
        w[e] = a.weight + (uint64_t)min(expert + e, a.experts - 1) * a.dim;
    if (EXPERTS == 1)
        for (uint32_t k = lane * 32; k < a.dim; k += 1024)
            asm volatile("prefetch.global.L2 [%0];" ::"l"(w[0] + k));
    if (!segment_enter(control, slot, &rows))
        return;
    uint32_t first = (ACROSS ? blockIdx.y : blockIdx.y * warps + warp) * ROWS;
    if (first >= rows || expert >= a.experts)
        return;
    for (int r = 0; r < ROWS; r++)
        x[r] = a.x + (uint64_t)min(first + r, rows - 1) * a.dim;
    float sum[EXPERTS][ROWS] = {};
    for (uint32_t k0 = lane * STEP; k0 < a.dim; k0 += BATCH * 32 * STEP) {
        float4 wk[BATCH][EXPERTS], xk[BATCH][ROWS]; // all requested before the first is needed
#pragma unroll
        for (int b = 0; b < BATCH; b++) {
            // Columns behind the end read the last ones: a load under a condition would not be
            // requested ahead.
            uint32_t k = min(k0 + b * 32 * STEP, a.dim - STEP);
#pragma unroll
            for (int e = 0; e < EXPERTS; e++)
                wk[b][e] = column_load<FOUR>(w[e], k);
#pragma unroll
            for (int r = 0; r < ROWS; r++)
                xk[b][r] = column_load<FOUR>(x[r], k);
        }
#pragma unroll
        for (int b = 0; b < BATCH; b++)
            if (k0 + b * 32 * STEP < a.dim)
#pragma unroll
                for (int r = 0; r < ROWS; r++)
#pragma unroll
                    for (int e = 0; e < EXPERTS; e++)
                        sum[e][r] = dot_add(sum[e][r], xk[b][r], wk[b][e]);
    }
#pragma unroll
    for (int r = 0; r < ROWS; r++)
#pragma unroll
        for (int e = 0; e < EXPERTS; e++) {
            float total = warp_sum(sum[e][r]);
            if (lane == 0 && first + r < rows && expert + e < a.experts)
                logits[(uint64_t)(first + r) * a.experts + expert + e] = total;
        }
}

// The largest of v over the warp, ties to the lower expert; e: the expert of v.
__device__ __forceinline__ void warp_best(float &v, uint32_t &e)
{
#pragma unroll
    for (int i = 16; i; i >>= 1) {
        float other = __shfl_xor_sync(0xffffffffu, v, i);
        uint32_t at = __shfl_xor_sync(0xffffffffu, e, i);
        if (other > v || (other == v && at < e)) {
            v = other;
            e = at;
        }
    }
}

// A warp per row; lane l holds experts l + 32 i.
template <int PER>
__global__ void __launch_bounds__(128)
    choose_kernel(const struct cuda_control *control, uint32_t slot, struct router_args a,
                  const float *logits)
{
    uint32_t lane = threadIdx.x % 32, row = blockIdx.x * (blockDim.x / 32) + threadIdx.x / 32, rows;
    if (!segment_enter(control, slot, &rows) || row >= rows)
        return;
    float v[PER], max = -INFINITY, sum = 0;
    bool finite = true;
#pragma unroll
    for (int i = 0; i < PER; i++) {
        uint32_t e = lane + 32 * i;
        v[i] = e < a.experts ? logits[(uint64_t)row * a.experts + e] : -INFINITY;
        finite = finite && (e >= a.experts || isfinite(v[i]));
        max = fmaxf(max, v[i]);
    }
    uint32_t *expert = a.expert + (uint64_t)row * a.top_k;
    float *gate = a.gate + (uint64_t)row * a.top_k;
    if (!__all_sync(0xffffffffu, finite)) {
        if (lane < a.top_k) {
            expert[lane] = lane;
            gate[lane] = NAN;
        }
        return;
    }
    max = warp_max(max);
#pragma unroll
    for (int i = 0; i < PER; i++)
        sum += expf(v[i] - max);
    sum = warp_sum(sum);
    float kept = 0, mine_gate = 0;
    uint32_t mine = 0;
    for (uint32_t k = 0; k < a.top_k; k++) {
        float best = -INFINITY;
        uint32_t at = 0xffffffff;
#pragma unroll
        for (int i = 0; i < PER; i++)
            if (v[i] > best) {
                best = v[i];
                at = lane + 32 * i;
            }
        warp_best(best, at);
#pragma unroll
        for (int i = 0; i < PER; i++)
            if (at == lane + 32 * i)
                v[i] = -INFINITY;
        float weight = expf(best - max) / sum;
        kept += weight;
        if (lane == k) {
            mine = at;
            mine_gate = weight;
        }
    }
    if (lane < a.top_k) {
        expert[lane] = mine;
        gate[lane] = a.normalize ? mine_gate / kept : mine_gate;
    }
}

// ---- map ----

// The lanes of the warp with the same expert.
__device__ __forceinline__ uint32_t expert_peers(uint32_t expert, bool valid, uint32_t bits)
{
    uint32_t peers = __ballot_sync(0xffffffffu, valid);
    for (uint32_t b = 0; b < bits; b++) {
        bool set = expert >> b & 1;
        uint32_t with = __ballot_sync(0xffffffffu, set);
        peers &= set ? with : ~with;
    }
    return peers;
}

struct map_walk {
    uint32_t first, end; // pairs of this warp
    uint32_t bits;
};

// One walk over the warp's pairs: counts them (order NULL), or places them.
__device__ __forceinline__ void pairs_walk(const struct map_walk &walk, const uint32_t *expert,
                                           uint32_t *count, uint32_t *order)
{
    uint32_t lane = threadIdx.x % 32;
    for (uint32_t p = walk.first + lane; p - lane < walk.end; p += 32) {
        bool valid = p < walk.end;
        uint32_t e = valid ? expert[p] : 0;
        uint32_t peers = expert_peers(e, valid, walk.bits);
        uint32_t before = __popc(peers & ((1u << lane) - 1));
        uint32_t at = valid ? count[e] : 0;
        __syncwarp();
        if (valid && before == 0)
            count[e] = at + __popc(peers);
        if (valid && order)
            order[at + before] = p;
        __syncwarp();
    }
}

// Exclusive sum over the CTA's threads; *total: of all. `sums`: MAP_WARPS words.
__device__ __forceinline__ uint32_t map_scan(uint32_t value, uint32_t *sums, uint32_t *total)
{
    uint32_t lane = threadIdx.x % 32, warp = threadIdx.x / 32, sum = value;
#pragma unroll
    for (uint32_t i = 1; i < 32; i *= 2) {
        uint32_t below = __shfl_up_sync(0xffffffffu, sum, i);
        sum += lane >= i ? below : 0;
    }
    if (lane == 31)
        sums[warp] = sum;
    __syncthreads();
    uint32_t all = sums[lane], inclusive = all;
#pragma unroll
    for (uint32_t i = 1; i < 32; i *= 2) {
        uint32_t below = __shfl_up_sync(0xffffffffu, inclusive, i);
        inclusive += lane >= i ? below : 0;
    }
    *total = __shfl_sync(0xffffffffu, inclusive, 31);
    return sum - value + __shfl_sync(0xffffffffu, inclusive - all, warp);
}

// Turns count[w][e] into the first place of warp w's pairs of expert e; begin and number of pairs
// of the thread's expert.
__device__ __forceinline__ uint32_t pairs_offsets(uint32_t *count, uint32_t experts, uint32_t *sums,
                                                  uint32_t *begin, uint32_t *total)
{
    uint32_t e = threadIdx.x, pairs = 0;
    if (e < experts)
        for (uint32_t w = 0; w < MAP_WARPS; w++)
            pairs += count[w * experts + e];
    *begin = map_scan(pairs, sums, total);
    if (e < experts) {
        uint32_t at = *begin;
        for (uint32_t w = 0; w < MAP_WARPS; w++) {
            uint32_t n = count[w * experts + e];
            count[w * experts + e] = at;
            at += n;
        }
    }
    __syncthreads();
    return pairs;
}

__device__ __forceinline__ void pages_look(const struct expert_view &view, uint8_t *missing)
{
    uint32_t pages = view.experts * view.pages_per_expert;
#pragma unroll 4
    for (uint32_t i = threadIdx.x; i < pages; i += MAP_THREADS)
        if (view.pages[i] == PAGE_NONE)
            missing[i / view.pages_per_expert] = 1;
}

// What the map reads of the step's adapters.
struct map_lora {
    const uint32_t *row_begin, *adapter;
    const struct lora_adapter_view *adapters; // NULL: none has parts
};

// The part of a pair's adapter for its expert, and its pages; count 0 when there is none.
__device__ __forceinline__ struct lora_part part_of(const struct moe_map_args &a,
                                                    const struct map_lora &b, uint32_t expert,
                                                    uint32_t segment, const uint32_t **pages)
{
    uint32_t adapter = segment == NO_SEGMENT ? 0xffffffff : b.adapter[segment];
    if (adapter == 0xffffffff)
        return {0, 0};
    struct lora_adapter_view view = b.adapters[adapter];
    *pages = view.pages;
    return view.parts ? view.parts[(uint64_t)a.layer * view.experts + expert] : lora_part{0, 0};
}

// Pairs whose adapter has a part for their expert that is not all there; a thread per pair. In a
// resumed map only pairs of experts that still wait.
__device__ __forceinline__ void parts_look(const struct moe_map_args &a, const struct map_lora &b,
                                           uint32_t segments, uint32_t rows, uint8_t *missing)
{
    const uint32_t *pages = NULL;
    for (uint32_t p = threadIdx.x; p < rows * a.top_k; p += MAP_THREADS) {
        uint32_t e = a.work.expert[p];
        if (a.resume && a.work.state[e] != 2)
            continue;
        uint32_t segment = moe_lora_segment(b.row_begin, segments, p / a.top_k);
        struct lora_part part = part_of(a, b, e, segment, &pages);
        for (uint32_t i = 0; i < part.count; i++) {
            uint32_t page = pages[part.first + i];
            if (page == PAGE_NONE)
                missing[e] = 1;
            else if (a.page_used)
                a.page_used[page] = 1;
        }
    }
}

// Which parts the missing experts want; after the states were written.
__device__ __forceinline__ void parts_mark(const struct moe_map_args &a, const struct map_lora &b,
                                           uint32_t segments, uint32_t rows)
{
    const uint32_t *pages = NULL;
    for (uint32_t p = threadIdx.x; p < rows * a.top_k; p += MAP_THREADS) {
        uint32_t e = a.work.expert[p];
        if (a.work.state[e] != 2)
            continue;
        uint32_t segment = moe_lora_segment(b.row_begin, segments, p / a.top_k);
        if (part_of(a, b, e, segment, &pages).count)
            a.part_wanted[(uint64_t)segment * a.view.experts + e] = 1;
    }
}

// Shared memory: count[MAP_WARPS][experts].
template <bool LORA>
__global__ void __launch_bounds__(MAP_THREADS)
    map_kernel(struct cuda_control *control, uint32_t slot, struct moe_map_args a,
               struct moe_list *list, struct map_lora lora)
{
    extern __shared__ uint32_t count[];
    __shared__ uint32_t sums[2][MAP_WARPS];
    __shared__ uint8_t missing[EXPERTS_MAX];
    uint32_t e = threadIdx.x, warp = e / 32, experts = a.view.experts, rows;
    missing[e] = 0;
    for (uint32_t i = e; !a.resume && i < MAP_WARPS * experts; i += MAP_THREADS)
        count[i] = 0;
    __syncthreads();
    if (!segment_enter(control, slot, &rows))
        return;
    uint32_t begin = 0, pairs = 0, total = 0, state = 0;
    pages_look(a.view, missing);
    if (LORA)
        parts_look(a, lora, control_lora_segments(control), rows, missing);
    if (!a.resume) {
        uint32_t all = rows * a.top_k, per = ((all + MAP_WARPS - 1) / MAP_WARPS + 31) / 32 * 32;
        struct map_walk walk = {min(warp * per, all), min((warp + 1) * per, all),
                                32u - __clz(experts - 1)};
        pairs_walk(walk, a.work.expert, count + warp * experts, NULL);
        __syncthreads();
        pairs = pairs_offsets(count, experts, sums[0], &begin, &total);
        pairs_walk(walk, a.work.expert, count + warp * experts, a.work.order);
        if (e < experts)
            a.work.begin[e] = begin;
        if (e == 0)
            a.work.begin[experts] = total;
        state = !pairs ? 0 : missing[e] ? 2 : 1;
    } else {
        __syncthreads();
        if (e < experts) {
            begin = a.work.begin[e];
            pairs = a.work.begin[e + 1] - begin;
            state = a.work.state[e];
            state = state == 1 ? 3 : state == 2 && !missing[e] ? 1 : state;
        }
    }
    if (e < experts) {
        a.work.state[e] = (uint8_t)state;
        if (a.need)
            a.need[e] = pairs;
        if (a.host_state)
            a.host_state[e] = (uint8_t)state;
    }
    uint32_t at = map_scan(state == 1, sums[1], &total);
    if (state == 1)
        list->run[at] = {e, begin, pairs, 0};
    if (e == 0)
        list->count = total;
    bool missed = __syncthreads_or(state == 2);
    if (missed && e == 0)
        control->miss_layer = a.layer;
    if (LORA && missed)
        parts_mark(a, lora, control_lora_segments(control), rows);
}

// ---- combine ----

template <bool FOUR>
__global__ void __launch_bounds__(COMBINE_THREADS)
    combine_kernel(const struct cuda_control *control, uint32_t slot, struct moe_combine_args a)
{
    uint32_t rows, row = blockIdx.y;
    if (!segment_enter(control, slot, &rows) || row >= rows)
        return;
    uint32_t col = (blockIdx.x * COMBINE_THREADS + threadIdx.x) * (FOUR ? 4 : 1);
    if (col >= a.dim)
        return;
    const float *gate = a.work.gate + (uint64_t)row * a.top_k;
    const float *out = a.work.out + (uint64_t)row * a.top_k * a.dim;
    float *y = a.y + (uint64_t)row * a.dim + col;
    float4 sum = column_load<FOUR>(y, 0);
#pragma unroll 8
    for (uint32_t k = 0; k < a.top_k; k++) {
        float4 o = column_load<FOUR>(out + (uint64_t)k * a.dim, col);
        float g = gate[k];
        sum.x = fmaf(g, o.x, sum.x);
        sum.y = fmaf(g, o.y, sum.y);
        sum.z = fmaf(g, o.z, sum.z);
        sum.w = fmaf(g, o.w, sum.w);
    }
    if (FOUR)
        *(float4 *)y = sum;
    else
        *y = sum.x;
}

// ---- launchers ----

template <bool FOUR>
static void logits_launch(const struct cuda_launch *l, const struct router_args *a, float *logits)
{
    uint32_t rows = l->rows_max;
    if (rows == 1)
        launch_kernel(l, logits_kernel<1, 1, false, FOUR>, dim3(a->experts), dim3(32), 0,
                      l->control, l->slot, *a, logits);
    else if (rows <= 4)
        launch_kernel(l, logits_kernel<1, 1, false, FOUR>, dim3(a->experts, 1), dim3(128), 0,
                      l->control, l->slot, *a, logits);
    else if (rows <= 16)
        launch_kernel(l, logits_kernel<2, 2, true, FOUR>,
                      dim3((a->experts + 7) / 8, (rows + 1) / 2), dim3(128), 0, l->control, l->slot,
                      *a, logits);
    else if (rows <= 128)
        launch_kernel(l, logits_kernel<2, 4, true, FOUR>,
                      dim3((a->experts + 7) / 8, (rows + 3) / 4), dim3(128), 0, l->control, l->slot,
                      *a, logits);
    else
        launch_kernel(l, logits_kernel<4, 8, false, FOUR>,
                      dim3((a->experts + 3) / 4, (rows + 31) / 32), dim3(128), 0, l->control,
                      l->slot, *a, logits);
}

extern "C" void cuda__router(const struct cuda_launch *l, const struct router_args *a)
{
    CHECK(a->experts && a->experts <= EXPERTS_MAX && a->top_k && a->top_k <= a->experts);
    CHECK(a->top_k <= TOP_K_MAX && (uint64_t)l->rows_max * a->experts * 4 <= WORK_BYTES);
    if (!l->rows_max)
        return;
    float *logits = (float *)l->work;
    if (a->dim % 4 == 0)
        logits_launch<true>(l, a, logits);
    else
        logits_launch<false>(l, a, logits);
    const float *from = logits;
    dim3 block(l->rows_max <= ROUTER_FEW ? 32 : 128),
        grid((l->rows_max * 32 + block.x - 1) / block.x);
    uint32_t per = (a->experts + 31) / 32;
    launch_kernel(l,
                  per <= 4    ? choose_kernel<4>
                  : per <= 8  ? choose_kernel<8>
                  : per <= 16 ? choose_kernel<16>
                              : choose_kernel<32>,
                  grid, block, 0, l->control, l->slot, *a, from);
}

extern "C" void cuda__moe_map(const struct cuda_launch *l, const struct moe_map_args *a)
{
    CHECK(a->view.experts && a->view.experts <= EXPERTS_MAX);
    CHECK(!a->mine.count); // expert-parallel ranks run on the CPU backend so far
    CHECK((uint64_t)l->rows_max * a->top_k < UINT32_MAX / 2);
    CHECK((uint64_t)a->view.experts * a->view.pages_per_expert < UINT32_MAX / 2);
    CHECK(!a->lora || a->part_wanted);
    struct map_lora lora = {};
    if (a->lora)
        lora = {a->lora->row_begin, a->lora->adapter, a->lora->adapters};
    launch_kernel(l, a->lora ? map_kernel<true> : map_kernel<false>, dim3(1), dim3(MAP_THREADS),
                  MAP_WARPS * a->view.experts * sizeof(uint32_t), l->control, l->slot, *a,
                  (struct moe_list *)l->work, lora);
}

extern "C" void cuda__moe_combine(const struct cuda_launch *l, const struct moe_combine_args *a)
{
    if (!l->rows_max || !a->dim)
        return;
    CHECK(l->rows_max <= 65535 && !a->mine.count && !a->replace);
    uint32_t per = COMBINE_THREADS * (a->dim % 4 ? 1 : 4);
    dim3 grid((a->dim + per - 1) / per, l->rows_max);
    launch_kernel(l, a->dim % 4 ? combine_kernel<false> : combine_kernel<true>, grid,
                  dim3(COMBINE_THREADS), 0, l->control, l->slot, *a);
}

extern "C" enum status cuda__moe_prepare(struct cuda_device *device)
{
    int bytes = MAP_WARPS * EXPERTS_MAX * (int)sizeof(uint32_t);
    CUDA_TRY(device, cudaFuncSetAttribute(map_kernel<false>,
                                          cudaFuncAttributeMaxDynamicSharedMemorySize, bytes));
    CUDA_TRY(device, cudaFuncSetAttribute(map_kernel<true>,
                                          cudaFuncAttributeMaxDynamicSharedMemorySize, bytes));
    return cuda__moe_wide_prepare(device);
}
