// SPDX-License-Identifier: Apache-2.0
// Sampling (sample.h): logits [rows][stride] fp32; token, logprob and tops are pinned host memory.
//
// A cluster of 8 CTAs works on a row, whatever the number of rows. CTA r owns the ids
// [r * slice, (r + 1) * slice) and reads them once, into shared memory (160 KB at most; a larger
// vocabulary is read again from L2 at each pass). Greedy: one pass and one exchange of 8 maxima.
//
// A draw asks three times where, in the order (logit descending, id ascending), a running count
// (top_k) or a running mass (top_p, the uniform number) reaches a target. As on the CPU that is a
// radix selection on an order-preserving key of the logit, with count and mass per bucket: 11 bits,
// whose histogram of the whole row stays for all three questions, then 7, 7 and 7 bits within the
// bucket where the target is reached.
//
// Masses are whole numbers: exp((logit - max) / temperature) in units of 2^-40, so that atomic adds
// in any order give the same sums, on one row or on many (--batch-invariant uses this kernel), and
// sums are exact: a target below the total is always reached. What lies under 2^-41 of the most
// likely token counts as nothing, below the 24 bits of the uniform number. 64-bit sums are kept as
// two words for 32-bit atomic adds: who makes the low word wrap carries.
//
// Between CTAs (distributed shared memory): small results are pushed to all 8, then cluster.sync.
// The first histogram: CTA r adds up buckets [256 r, 256 r + 256) of the 8 copies and writes the
// sums back into all 8; nobody else touches those. Later ones (128 buckets, two sets in turn):
// everyone reads all 8 and comes to the same decision.
//
// The token is ties-th of those with the cut's key, in id order. logprob and tops use exp at
// temperature 1, fp32 per thread, double between threads, in a fixed order. tops: every CTA lists
// its best, warp 0 of CTA 0 merges the lists. Shared memory: 31 KB and the slice (74 KB at 151,936
// ids: two CTAs per SM). Bound by latency: 3 levels x (a pass over the slice and a cluster barrier)
// per question.
#include <cooperative_groups.h>

#include "kernels/cuda/common.cuh"

namespace cg = cooperative_groups;

enum {
    CLUSTER = 8,
    THREADS = 512,
    WARPS = THREADS / 32,
    BUCKETS = 2048,
    FINE = 128,
    FIRST_SHIFT = 21,
    FINE_BITS = 7,
    TOPS_MAX = 32,
    SLICE_MAX = 40960,   // ids in shared memory
    VOCAB_MAX = 1 << 23, // a sum of masses stays below 2^63
};

struct peak {
    float value;
    uint32_t id;
    bool bad; // NaN or +inf was seen
};

// Where a target is reached: the bucket's place in descending order, what stands before it, what it
// holds.
struct found {
    uint32_t place, before, count;
    uint64_t mass_before, mass;
};

// Buckets with 64-bit masses in two words.
template <int N> struct histogram {
    uint32_t count[N], low[N], high[N];
};

struct row_shared {
    histogram<BUCKETS> first;
    histogram<FINE> fine[2];
    uint32_t warp_count[WARPS];
    uint64_t warp_mass[WARPS];
    double warp_sum[WARPS];
    struct peak warp_peak[WARPS];
    struct found found;
    // Pushed by the CTAs of the cluster, each to its place.
    struct peak peaks[CLUSTER];
    double sums[CLUSTER];
    uint32_t ties[CLUSTER];
    float top_value[CLUSTER][TOPS_MAX];
    uint32_t top_id[CLUSTER][TOPS_MAX];
    uint32_t drawn;
};

// What a CTA knows of its row.
struct row_view {
    struct row_shared *s;
    const float *values; // of the slice, shared or global memory
    uint32_t first, n;   // ids [first, first + n)
    uint32_t rank;
    float max, inverse_temperature;
    uint32_t turn; // which fine histogram is next
};

// A prefix of the order: all keys above `key`, and the first `ties` ids that have it.
struct cut {
    uint32_t key, ties, local; // local: how many of this CTA's ids have the key
    uint64_t mass;
};

// count 0: by mass.
struct target {
    uint32_t count;
    uint64_t mass;
};

// ---- numbers ----

static __device__ __forceinline__ uint32_t key_of(float logit)
{
    uint32_t bits = __float_as_uint(logit + 0.0f); // -0 counts as 0
    return bits & 0x80000000u ? ~bits : bits | 0x80000000u;
}

static __device__ __forceinline__ uint64_t mass_of(const struct row_view &r, float logit)
{
    float x = (logit - r.max) * r.inverse_temperature;
    return x < -29.0f ? 0 : __float2ull_rn(expf(x) * 1099511627776.0f);
}

static __device__ uint64_t mix(uint64_t z)
{
    z += 0x9e3779b97f4a7c15u;
    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9u;
    z = (z ^ (z >> 27)) * 0x94d049bb133111ebu;
    return z ^ (z >> 31);
}

// rng_uniform(seed, 0, counter) of base/rng.h.
static __device__ float uniform_of(uint64_t seed, uint64_t counter)
{
    return (float)(mix(mix(mix(seed)) ^ counter) >> 40) * (1.0f / 16777216.0f);
}

// ---- peaks ----

static __device__ __forceinline__ bool peak_before(float a, uint32_t a_id, float b, uint32_t b_id)
{
    return a > b || (a == b && a_id < b_id);
}

static __device__ __forceinline__ void peak_take(struct peak &p, float value, uint32_t id)
{
    if (peak_before(value, id, p.value, p.id)) {
        p.value = value;
        p.id = id;
    }
}

// The best over the CTA, in all threads. Two barriers.
static __device__ struct peak block_peak(struct row_shared *s, struct peak p)
{
#pragma unroll
    for (int i = 16; i; i >>= 1) {
        float value = __shfl_xor_sync(0xffffffffu, p.value, i);
        uint32_t id = __shfl_xor_sync(0xffffffffu, p.id, i);
        peak_take(p, value, id);
        p.bad |= __shfl_xor_sync(0xffffffffu, (int)p.bad, i) != 0;
    }
    __syncthreads();
    if (threadIdx.x % 32 == 0)
        s->warp_peak[threadIdx.x / 32] = p;
    __syncthreads();
    p = s->warp_peak[0];
    for (int w = 1; w < WARPS; w++) {
        peak_take(p, s->warp_peak[w].value, s->warp_peak[w].id);
        p.bad |= s->warp_peak[w].bad;
    }
    return p;
}

static __device__ __forceinline__ void peak_see(struct peak &p, float value, uint32_t id)
{
    p.bad |= !(value < INFINITY); // NaN too
    peak_take(p, value, id);
}

// Reads the slice once; keeps it in `stage` when that is not NULL.
static __device__ struct peak slice_read(const struct row_view &r, const float *from, float *stage,
                                         bool wide)
{
    struct peak p = {-INFINITY, UINT32_MAX, false};
    uint32_t quads = wide ? r.n / 4 : 0;
#pragma unroll 4
    for (uint32_t i = threadIdx.x; i < quads; i += THREADS) {
        float4 v = ((const float4 *)from)[i];
        if (stage)
            ((float4 *)stage)[i] = v;
        peak_see(p, v.x, r.first + 4 * i);
        peak_see(p, v.y, r.first + 4 * i + 1);
        peak_see(p, v.z, r.first + 4 * i + 2);
        peak_see(p, v.w, r.first + 4 * i + 3);
    }
#pragma unroll 4
    for (uint32_t i = 4 * quads + threadIdx.x; i < r.n; i += THREADS) {
        float v = from[i];
        if (stage)
            stage[i] = v;
        peak_see(p, v, r.first + i);
    }
    return p;
}

// The row's peak, in all threads of the cluster.
static __device__ struct peak row_peak(cg::cluster_group &cluster, const struct row_view &r,
                                       struct peak p)
{
    p = block_peak(r.s, p);
    cluster.barrier_wait(); // all CTAs run: their shared memory may be written
    if (threadIdx.x < CLUSTER)
        cluster.map_shared_rank(r.s, threadIdx.x)->peaks[r.rank] = p;
    cluster.sync();
    p = r.s->peaks[0];
    for (int c = 1; c < CLUSTER; c++) {
        peak_take(p, r.s->peaks[c].value, r.s->peaks[c].id);
        p.bad |= r.s->peaks[c].bad;
    }
    return p;
}

// ---- histograms ----

template <int N>
static __device__ __forceinline__ void bucket_add(histogram<N> &h, uint32_t bucket, uint64_t mass,
                                                  bool counted)
{
    if (counted)
        atomicAdd(&h.count[bucket], 1u);
    uint32_t low = (uint32_t)mass, high = (uint32_t)(mass >> 32);
    if (low) {
        uint32_t old = atomicAdd(&h.low[bucket], low);
        high += old + low < old;
    }
    if (high)
        atomicAdd(&h.high[bucket], high);
}

template <int N>
static __device__ __forceinline__ uint64_t bucket_mass(const histogram<N> &h, uint32_t bucket)
{
    return (uint64_t)h.high[bucket] << 32 | h.low[bucket];
}

template <int N> static __device__ void histogram_clear(histogram<N> &h)
{
    for (uint32_t i = threadIdx.x; i < N; i += THREADS)
        h.count[i] = h.low[i] = h.high[i] = 0;
}

// The whole row's first histogram, in every CTA. Counts only when they are asked for.
static __device__ void histogram_first(cg::cluster_group &cluster, const struct row_view &r,
                                       bool counted)
{
    histogram_clear(r.s->first);
    __syncthreads();
    for (uint32_t i = threadIdx.x; i < r.n; i += THREADS) {
        uint64_t mass = mass_of(r, r.values[i]);
        if (mass || counted)
            bucket_add(r.s->first, key_of(r.values[i]) >> FIRST_SHIFT, mass, counted);
    }
    cluster.sync();
    if (threadIdx.x < BUCKETS / CLUSTER) {
        uint32_t bucket = r.rank * (BUCKETS / CLUSTER) + threadIdx.x, count = 0;
        uint64_t mass = 0;
#pragma unroll
        for (int c = 0; c < CLUSTER; c++) {
            const struct row_shared *s = cluster.map_shared_rank(r.s, c);
            count += s->first.count[bucket];
            mass += bucket_mass(s->first, bucket);
        }
#pragma unroll
        for (int c = 0; c < CLUSTER; c++) {
            struct row_shared *s = cluster.map_shared_rank(r.s, c);
            s->first.count[bucket] = count;
            s->first.low[bucket] = (uint32_t)mass;
            s->first.high[bucket] = (uint32_t)(mass >> 32);
        }
    }
    cluster.sync();
}

// ---- search ----

// Replaces count and mass of each thread by the sums over all threads before it; returns the total
// mass.
static __device__ uint64_t block_scan(struct row_shared *s, uint32_t &count, uint64_t &mass)
{
    uint32_t lane = threadIdx.x % 32, warp = threadIdx.x / 32, own_count = count;
    uint64_t own_mass = mass, total = 0;
#pragma unroll
    for (int i = 1; i < 32; i <<= 1) {
        uint32_t c = __shfl_up_sync(0xffffffffu, count, i);
        uint64_t m = __shfl_up_sync(0xffffffffu, (unsigned long long)mass, i);
        if (lane >= i) {
            count += c;
            mass += m;
        }
    }
    __syncthreads();
    if (lane == 31) {
        s->warp_count[warp] = count;
        s->warp_mass[warp] = mass;
    }
    __syncthreads();
    count -= own_count;
    mass -= own_mass;
    for (uint32_t w = 0; w < WARPS; w++) {
        if (w < warp) {
            count += s->warp_count[w];
            mass += s->warp_mass[w];
        }
        total += s->warp_mass[w];
    }
    return total;
}

// Thread t holds the PER places from PER t on, in descending order. `f`: what stands before place
// 0, replaced by where the target is reached. Exactly one place reaches it.
template <int PER>
static __device__ void place_find(struct row_shared *s, const uint32_t counts[PER],
                                  const uint64_t masses[PER], const struct target &t,
                                  struct found &f)
{
    uint32_t count = 0;
    uint64_t mass = 0;
#pragma unroll
    for (int i = 0; i < PER; i++) {
        count += counts[i];
        mass += masses[i];
    }
    (void)block_scan(s, count, mass);
    count += f.before;
    mass += f.mass_before;
#pragma unroll
    for (int i = 0; i < PER; i++) {
        bool before = t.count ? count >= t.count : mass >= t.mass;
        bool after = t.count ? count + counts[i] >= t.count : mass + masses[i] >= t.mass;
        if (after && !before)
            s->found = {PER * threadIdx.x + i, count, counts[i], mass, masses[i]};
        count += counts[i];
        mass += masses[i];
    }
    __syncthreads();
    f = s->found;
}

enum { FIRST_PER = BUCKETS / THREADS };

static __device__ void first_places(const struct row_shared *s, uint32_t counts[FIRST_PER],
                                    uint64_t masses[FIRST_PER])
{
#pragma unroll
    for (int i = 0; i < FIRST_PER; i++) {
        uint32_t bucket = BUCKETS - 1 - (FIRST_PER * threadIdx.x + i);
        counts[i] = s->first.count[bucket];
        masses[i] = bucket_mass(s->first, bucket);
    }
}

static __device__ uint64_t mass_total(const struct row_shared *first, struct row_shared *s)
{
    uint32_t counts[FIRST_PER], count = 0;
    uint64_t masses[FIRST_PER], mass = 0;
    first_places(first, counts, masses);
#pragma unroll
    for (int i = 0; i < FIRST_PER; i++)
        mass += masses[i];
    return block_scan(s, count, mass);
}

// One more level: of the row's logits whose key begins with `prefix` (above bit `shift` + 7), the
// bucket of 7 bits where the target is reached. Returns how many of this CTA's ids are in it.
static __device__ uint32_t level_find(cg::cluster_group &cluster, struct row_view &r,
                                      uint32_t shift, uint32_t prefix, const struct target &t,
                                      struct found &f)
{
    uint32_t turn = r.turn;
    histogram<FINE> &h = r.s->fine[turn];
    r.turn = turn ^ 1;
    histogram_clear(h);
    __syncthreads();
    for (uint32_t i = threadIdx.x; i < r.n; i += THREADS) {
        uint32_t key = key_of(r.values[i]);
        if (key >> (shift + FINE_BITS) == prefix)
            bucket_add(h, key >> shift & (FINE - 1), mass_of(r, r.values[i]), true);
    }
    cluster.sync();
    uint32_t count = 0;
    uint64_t mass = 0;
    if (threadIdx.x < FINE) {
#pragma unroll
        for (int c = 0; c < CLUSTER; c++) {
            const histogram<FINE> &other = cluster.map_shared_rank(r.s, c)->fine[turn];
            count += other.count[FINE - 1 - threadIdx.x];
            mass += bucket_mass(other, FINE - 1 - threadIdx.x);
        }
    }
    place_find<1>(r.s, &count, &mass, t, f);
    return h.count[FINE - 1 - f.place];
}

static __device__ struct cut cut_find(cg::cluster_group &cluster, struct row_view &r,
                                      const struct target &t)
{
    uint32_t counts[FIRST_PER];
    uint64_t masses[FIRST_PER];
    struct found f = {};
    struct cut cut = {};
    first_places(r.s, counts, masses);
    place_find<FIRST_PER>(r.s, counts, masses, t, f);
    cut.key = BUCKETS - 1 - f.place;
    for (int shift = FIRST_SHIFT - FINE_BITS; shift >= 0; shift -= FINE_BITS) {
        cut.local = level_find(cluster, r, shift, cut.key, t, f);
        cut.key = cut.key << FINE_BITS | (FINE - 1 - f.place);
    }
    uint64_t one = f.mass / f.count;
    cut.ties = t.count ? t.count - f.before : (uint32_t)((t.mass - f.mass_before + one - 1) / one);
    cut.mass = f.mass_before + cut.ties * one;
    return cut;
}

// The id of the `want`-th (from 1) of this CTA's ids with the key: all threads call, one writes.
static __device__ void tie_find(cg::cluster_group &cluster, const struct row_view &r, uint32_t key,
                                uint32_t want)
{
    uint32_t seen = 0, lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    for (uint32_t first = 0; first < r.n; first += THREADS) {
        uint32_t i = first + threadIdx.x;
        bool has = i < r.n && key_of(r.values[i]) == key;
        uint32_t in_chunk = (uint32_t)__syncthreads_count(has);
        if (seen + in_chunk < want) {
            seen += in_chunk;
            continue;
        }
        uint32_t ballot = __ballot_sync(0xffffffffu, has);
        if (lane == 0)
            r.s->warp_count[warp] = __popc(ballot);
        __syncthreads();
        seen += __popc(ballot & ((1u << lane) - 1));
        for (uint32_t w = 0; w < warp; w++)
            seen += r.s->warp_count[w];
        if (has && seen + 1 == want)
            for (int c = 0; c < CLUSTER; c++)
                cluster.map_shared_rank(r.s, c)->drawn = r.first + i;
        return;
    }
}

static __device__ uint32_t cut_token(cg::cluster_group &cluster, const struct row_view &r,
                                     const struct cut &cut)
{
    if (threadIdx.x < CLUSTER)
        cluster.map_shared_rank(r.s, threadIdx.x)->ties[r.rank] = cut.local;
    cluster.sync();
    uint32_t before = 0;
    for (uint32_t c = 0; c < r.rank; c++)
        before += r.s->ties[c];
    if (cut.ties > before && cut.ties <= before + cut.local)
        tie_find(cluster, r, cut.key, cut.ties - before);
    cluster.sync();
    return r.s->drawn;
}

static __device__ uint32_t draw(cg::cluster_group &cluster, struct row_view &r, uint32_t vocab,
                                const struct sample_params &p)
{
    bool counted = p.top_k && p.top_k < vocab;
    histogram_first(cluster, r, counted);
    uint64_t mass = mass_total(r.s, r.s);
    if (counted)
        mass = cut_find(cluster, r, {p.top_k, 0}).mass;
    if (p.top_p < 1.0f) {
        uint64_t least = (uint64_t)ceil((double)mass * (double)(p.top_p > 0 ? p.top_p : 0));
        mass = cut_find(cluster, r, {0, least ? least : 1}).mass;
    }
    double uniform = (double)uniform_of(p.seed, p.counter);
    return cut_token(cluster, r, cut_find(cluster, r, {0, (uint64_t)(uniform * (double)mass) + 1}));
}

// ---- log-probabilities ----

// This CTA's share of sum exp(logit - max), in thread 0.
static __device__ double slice_exp_sum(const struct row_view &r)
{
    float partial = 0;
    for (uint32_t i = threadIdx.x; i < r.n; i += THREADS)
        partial += expf(r.values[i] - r.max);
    double sum = partial;
#pragma unroll
    for (int i = 16; i; i >>= 1)
        sum += __shfl_xor_sync(0xffffffffu, sum, i);
    if (threadIdx.x % 32 == 0)
        r.s->warp_sum[threadIdx.x / 32] = sum;
    __syncthreads();
    sum = 0;
    for (int w = 0; w < WARPS; w++)
        sum += r.s->warp_sum[w];
    return sum;
}

// This thread's best after (value, id) in the order; -inf is never listed.
static __device__ struct peak next_best(const struct row_view &r, float value, uint32_t id)
{
    struct peak p = {-INFINITY, UINT32_MAX, false};
    for (uint32_t i = threadIdx.x; i < r.n; i += THREADS) {
        float v = r.values[i];
        if (v > -INFINITY && (v < value || (v == value && r.first + i > id)))
            peak_take(p, v, r.first + i);
    }
    return p;
}

// This CTA's `tops` best, in order, pushed to CTA 0.
static __device__ void tops_push(cg::cluster_group &cluster, const struct row_view &r,
                                 uint32_t tops)
{
    struct row_shared *to = cluster.map_shared_rank(r.s, 0);
    struct peak own = next_best(r, INFINITY, 0);
    for (uint32_t i = 0; i < tops; i++) {
        struct peak best = block_peak(r.s, own);
        if (threadIdx.x == 0) {
            to->top_value[r.rank][i] = best.value;
            to->top_id[r.rank][i] = best.id;
        }
        if (best.id == own.id && best.id != UINT32_MAX)
            own = next_best(r, best.value, best.id);
    }
}

// Warp 0 of CTA 0: lane c < 8 stands at the head of CTA c's list.
static __device__ void tops_merge(const struct row_view &r, const struct sample_args &a,
                                  uint32_t row, double log_total)
{
    uint32_t lane = threadIdx.x, at = 0;
    for (uint32_t i = 0; i < a.tops; i++) {
        bool left = lane < CLUSTER && at < a.tops;
        struct peak own = {left ? r.s->top_value[lane][at] : -INFINITY,
                           left ? r.s->top_id[lane][at] : UINT32_MAX, false};
        struct peak best = own;
#pragma unroll
        for (int j = 16; j; j >>= 1)
            peak_take(best, __shfl_xor_sync(0xffffffffu, best.value, j),
                      __shfl_xor_sync(0xffffffffu, best.id, j));
        at += left && own.id == best.id && best.id != UINT32_MAX;
        if (lane == 0) {
            uint64_t to = (uint64_t)row * a.tops + i;
            a.top_token[to] = best.id == UINT32_MAX ? SAMPLE_NOT_A_NUMBER : (int32_t)best.id;
            a.top_logprob[to] = (float)((double)best.value - (double)r.max - log_total);
        }
    }
}

static __device__ void logprobs(cg::cluster_group &cluster, const struct row_view &r,
                                const struct sample_args &a, uint32_t row, uint32_t token)
{
    double sum = slice_exp_sum(r), total = 0;
    if (threadIdx.x == 0)
        cluster.map_shared_rank(r.s, 0)->sums[r.rank] = sum;
    if (a.tops)
        tops_push(cluster, r, a.tops);
    cluster.sync();
    if (r.rank || threadIdx.x >= 32)
        return;
    for (int c = 0; c < CLUSTER; c++)
        total += r.s->sums[c];
    double log_total = log(total);
    if (threadIdx.x == 0 && a.logprob)
        a.logprob[row] =
            (float)((double)a.logits[(uint64_t)row * a.stride + token] - (double)r.max - log_total);
    if (a.tops)
        tops_merge(r, a, row, log_total);
}

static __device__ void row_lose(const struct sample_args &a, uint32_t row)
{
    const float nan = __int_as_float(0x7fc00000);
    if (threadIdx.x == 0) {
        a.token[row] = SAMPLE_NOT_A_NUMBER;
        if (a.logprob)
            a.logprob[row] = nan;
    }
    for (uint32_t i = threadIdx.x; i < a.tops; i += THREADS) {
        a.top_token[(uint64_t)row * a.tops + i] = SAMPLE_NOT_A_NUMBER;
        a.top_logprob[(uint64_t)row * a.tops + i] = nan;
    }
}

// ---- the kernel ----

static __global__ void __cluster_dims__(CLUSTER, 1, 1) __launch_bounds__(THREADS, 2)
    sample_kernel(const struct cuda_control *control, uint32_t slot, const struct sample_args a,
                  uint32_t slice, bool staged, bool wide)
{
    extern __shared__ float4 stage[];
    __shared__ struct row_shared shared;
    cg::cluster_group cluster = cg::this_cluster();
    uint32_t rows, row = blockIdx.x / CLUSTER;
    if (!segment_enter(control, slot, &rows) || row >= rows)
        return;
    cluster.barrier_arrive();
    struct row_view r = {};
    r.s = &shared;
    r.rank = cluster.block_rank();
    r.first = r.rank * slice;
    r.n = r.first >= a.vocab ? 0 : a.vocab - r.first < slice ? a.vocab - r.first : slice;
    const float *from = a.logits + (uint64_t)row * a.stride + r.first;
    r.values = staged ? (const float *)stage : from;
    const struct sample_params p = a.params[row];
    struct peak best =
        row_peak(cluster, r, slice_read(r, from, staged ? (float *)stage : NULL, wide));
    if (best.bad || !(best.value > -INFINITY)) { // the same in the whole cluster
        if (r.rank == 0)
            row_lose(a, row);
        return;
    }
    r.max = best.value;
    // 1e30 keeps 0 * inverse_temperature a number
    r.inverse_temperature = p.temperature > 1e-30f ? 1.0f / p.temperature : 1e30f;
    uint32_t token = p.temperature > 0 ? draw(cluster, r, a.vocab, p) : best.id;
    if (r.rank == 0 && threadIdx.x == 0)
        a.token[row] = (int32_t)token;
    if (a.logprob || a.tops)
        logprobs(cluster, r, a, row, token);
    cluster.sync(); // nobody leaves while others may read its shared memory
}

void cuda__sample(const struct cuda_launch *l, const struct sample_args *a)
{
    CHECK(a->vocab && a->vocab <= VOCAB_MAX && a->stride >= a->vocab && a->tops <= TOPS_MAX);
    CHECK(l->rows_max < INT32_MAX / CLUSTER);
    if (!l->rows_max)
        return;
    uint32_t slice = ((a->vocab + CLUSTER - 1) / CLUSTER + 3) / 4 * 4;
    bool staged = slice <= SLICE_MAX;
    bool wide = a->stride % 4 == 0 && (uintptr_t)a->logits % 16 == 0;
    launch_kernel(l, sample_kernel, dim3(l->rows_max * CLUSTER), dim3(THREADS),
                  staged ? slice * sizeof(float) : 0, l->control, l->slot, *a, slice, staged, wide);
}

enum status cuda__sample_prepare(struct cuda_device *device)
{
    CUDA_TRY(device,
             cudaFuncSetAttribute(sample_kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                  SLICE_MAX * (int)sizeof(float)));
    return STATUS_OK;
}
