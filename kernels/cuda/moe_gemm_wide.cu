// SPDX-License-Identifier: Apache-2.0
// The wide expert GEMMs: buckets with many tokens per expert. Bound by flops from about 256 tokens
// per expert on, below by the bytes of the weights.
//
//   gate_up: hidden[pair] = silu(Wg x[row]) * (Wu x[row])     down: out[pair] = Wd hidden[pair]
//
// Task: one expert x 128 weight rows (2 tiles) x at most TOKENS of its pairs, all of K. CTAs are
// persistent, one per multiprocessor, and stride over the tasks (token chunks vary fastest, so that
// those that run together share weights in L2).
//
// Warpgroup 0 produces: its first thread copies the two weight tiles of a k step (64 columns) by
// bulk copies; all 128 threads gather the tokens by 16-byte cp.async (thread: chunk q % 8 of tokens
// q / 8 + 16 i; tokens behind the task's are zeros) and let them arrive at the full barrier when
// they are there. Warpgroups 1 and 2 multiply, one tile each: m64nNk16, N the tokens of the task
// rounded up to a multiple of wide_shape::step.
//
// Shared memory, a stage: two tiles as they stand in the page (cores: 128 bytes to the next in K,
// 1024 to the next 8 rows), then the tokens as [TOKENS][128 bytes], swizzled: a token's copy and a
// column of cores both touch each bank once. Stages: 10, 8, 6, 4 for TOKENS 32, 64, 128, 256 (192
// to 200 KiB).
//
// Sums: k ascending per accumulator; the bits do depend on N only where the hardware's do, so an
// invariant device takes the narrow kernel.
#include "kernels/cuda/moe.cuh"
#include "kernels/cuda/moe_wgmma.cuh"

enum { WIDE_THREADS = 384, PRODUCERS = 128, BLOCK_ROWS = 2 * TILE_ROWS };

struct wide_args {
    struct moe_gemm_args a;
    const struct moe_list *list;
    const uint8_t *x;
    uint64_t x_bytes;
    uint32_t per_x, k_tiles, first_tile;
    uint32_t page_shift;  // log2 of a page's tiles
    uint32_t tile_blocks; // blocks of 64 rows that have tiles
    uint32_t blocks;      // blocks of 128 rows
};

template <int TOKENS> struct wide_shape {
    static constexpr int stages = TOKENS <= 32 ? 10 : TOKENS <= 64 ? 8 : TOKENS <= 128 ? 6 : 4;
    static constexpr int step = TOKENS <= 64 ? 8 : TOKENS / 8; // columns come in multiples of it
    static constexpr int stage_bytes = 2 * TILE_BYTES + TOKENS * 128;
    static constexpr int bytes = stages * stage_bytes;
};

template <int TOKENS> struct wide_shared {
    uint64_t full[wide_shape<TOKENS>::stages], empty[wide_shape<TOKENS>::stages];
    uint32_t chunk[EXPERTS_MAX + 1]; // token chunks before run i
};

struct wide_task {
    uint32_t expert, block, begin, count; // pairs order[begin .. begin + count)
};

template <int TOKENS>
__device__ __forceinline__ struct wide_task task_at(const struct wide_args &n,
                                                    const uint32_t *chunk, uint32_t task)
{
    uint32_t low = 0, high = n.list->count; // the last run with chunk * blocks <= task
    while (high - low > 1) {
        uint32_t middle = (low + high) / 2;
        if (chunk[middle] * n.blocks <= task)
            low = middle;
        else
            high = middle;
    }
    struct moe_run run = n.list->run[low];
    uint32_t chunks = chunk[low + 1] - chunk[low], within = task - chunk[low] * n.blocks;
    constexpr uint32_t step = wide_shape<TOKENS>::step;
    uint32_t size = ((run.count + chunks - 1) / chunks + step - 1) / step * step;
    uint32_t first = min(within % chunks * size, run.count);
    return {run.expert, within / chunks, run.begin + first, min(size, run.count - first)};
}

// chunk[i]: token chunks before run i; by the first warp.
template <int TOKENS>
__device__ __forceinline__ void chunks_count(const struct moe_list *list, uint32_t *chunk)
{
    uint32_t lane = threadIdx.x, before = 0;
    for (uint32_t i = 0; i < list->count; i += 32) {
        uint32_t own =
            i + lane < list->count ? (list->run[i + lane].count + TOKENS - 1) / TOKENS : 0;
        uint32_t sum = own;
#pragma unroll
        for (uint32_t j = 1; j < 32; j *= 2) {
            uint32_t below = __shfl_up_sync(0xffffffffu, sum, j);
            sum += lane >= j ? below : 0;
        }
        if (i + lane < list->count)
            chunk[i + lane] = before + sum - own;
        before += __shfl_sync(0xffffffffu, sum, 31);
    }
    if (lane == 0)
        chunk[list->count] = before;
}

// Columns of the product that hold `count` tokens.
template <int TOKENS> __device__ __forceinline__ uint32_t columns_of(uint32_t count)
{
    constexpr uint32_t step = wide_shape<TOKENS>::step;
    return max((count + step - 1) / step, 1) * step;
}

template <int TOKENS>
__device__ __forceinline__ void weights_load(const struct wide_args &n, const struct wide_task &t,
                                             uint32_t k, uint8_t *stage, uint64_t *full)
{
    const uint32_t *pages = n.a.view.pages + (uint64_t)t.expert * n.a.view.pages_per_expert;
    barrier_expect(full, 2 * TILE_BYTES);
    for (uint32_t h = 0; h < 2; h++) {
        uint32_t block = min(t.block * 2 + h, n.tile_blocks - 1);
        uint32_t tile = n.first_tile + block * n.k_tiles + k;
        uint32_t page = __ldg(pages + (tile >> n.page_shift));
        const uint8_t *from = n.a.view.arena + (uint64_t)page * n.a.view.page_bytes +
                              (uint64_t)(tile & ((1u << n.page_shift) - 1)) * TILE_BYTES;
        bulk_load(stage + h * TILE_BYTES, from, TILE_BYTES, full);
    }
}

// A producer's tokens: q / 8 + 16 i.
template <int TOKENS> struct wide_tokens {
    uint32_t at[TOKENS / 16]; // where each token's row of x begins, in 16 bytes
    uint32_t valid;           // bit i: there is such a token
};

template <int TOKENS>
__device__ __forceinline__ void tokens_find(const struct wide_args &n, const struct wide_task &t,
                                            wide_tokens<TOKENS> &x)
{
    x.valid = 0;
#pragma unroll
    for (int i = 0; i < TOKENS / 16; i++) {
        uint32_t token = threadIdx.x / 8 + i * 16;
        x.at[i] = 0;
        if (token >= t.count)
            continue;
        x.at[i] = __ldg(n.a.work.order + t.begin + token) / n.per_x * (uint32_t)(n.x_bytes / 16);
        x.valid |= 1u << i;
    }
}

template <int TOKENS>
__device__ void produce(const struct wide_args &n, wide_shared<TOKENS> &s, uint8_t *buffer,
                        uint32_t tasks)
{
    using shape = wide_shape<TOKENS>;
    uint32_t q = threadIdx.x, step = 0; // k steps of all tasks
    uint32_t to = 2 * TILE_BYTES + q / 8 * 128 + (q % 8 ^ q / 8 % 8) * 16;
    for (uint32_t task = blockIdx.x; task < tasks; task += gridDim.x) {
        struct wide_task t = task_at<TOKENS>(n, s.chunk, task);
        uint32_t columns = columns_of<TOKENS>(t.count);
        wide_tokens<TOKENS> tokens;
        tokens_find<TOKENS>(n, t, tokens);
        const uint8_t *x = n.x + q % 8 * 16;
        for (uint32_t k = 0; k < n.k_tiles; k++, step++, x += 128) {
            uint32_t at = step % shape::stages;
            uint8_t *stage = buffer + at * shape::stage_bytes;
            if (step >= shape::stages)
                barrier_wait(&s.empty[at], (step / shape::stages & 1) ^ 1);
            if (q == 0)
                weights_load<TOKENS>(n, t, k, stage, &s.full[at]);
#pragma unroll
            for (int i = 0; i < TOKENS / 16; i++)
                if (i * 16 < columns)
                    async_load16(stage + to + i * (16 * 128), x + (uint64_t)tokens.at[i] * 16,
                                 (tokens.valid >> i & 1) * 16);
            async_arrive(&s.full[at]);
        }
    }
    async_commit();
    async_wait<0>();
}

// The product of one task; N columns.
template <int TOKENS, int N>
__device__ __forceinline__ void multiply(wide_shared<TOKENS> &s, uint8_t *buffer, uint32_t k_tiles,
                                         uint32_t step, uint32_t half, float *d)
{
    using shape = wide_shape<TOKENS>;
    bool first = threadIdx.x % 128 == 0;
#pragma unroll
    for (int i = 0; i < N / 2; i++)
        d[i] = 0;
    for (uint32_t k = 0; k < k_tiles; k++, step++) {
        uint32_t at = step % shape::stages;
        uint8_t *stage = buffer + at * shape::stage_bytes;
        barrier_wait(&s.full[at], step / shape::stages & 1);
        async_proxy_fence();
        wgmma_begin();
#pragma unroll
        for (int i = 0; i < 4; i++)
            wgmma<N>(d,
                     core_descriptor(stage + half * TILE_BYTES + i * 2 * CORE_BYTES, CORE_BYTES,
                                     8 * CORE_BYTES),
                     swizzled_descriptor(stage + 2 * TILE_BYTES + i * 32));
        wgmma_commit();
        wgmma_wait<0>();
        if (first)
            barrier_arrive(&s.empty[at]);
    }
}

// Two rows of one token from two tokens of one row: lanes of even rows keep the first token, their
// neighbours (4 lanes up) the second. low: the even row.
__device__ __forceinline__ void rows_pair(float first, float second, float *low, float *high)
{
    bool odd = threadIdx.x & 4;
    float other = __shfl_xor_sync(0xffffffffu, odd ? first : second, 4);
    *low = odd ? other : first;
    *high = odd ? second : other;
}

// The pairs of a task, a warp's copy: lane l holds those of tokens l, l + 32, ...
template <int N> struct wide_pairs {
    uint32_t of[(N + 31) / 32];
};

template <int N>
__device__ __forceinline__ void pairs_find(const struct wide_args &n, const struct wide_task &t,
                                           wide_pairs<N> &pairs)
{
#pragma unroll
    for (int i = 0; i < (N + 31) / 32; i++) {
        uint32_t token = i * 32 + threadIdx.x % 32;
        pairs.of[i] = token < t.count ? __ldg(n.a.work.order + t.begin + token) : 0;
    }
}

// row: first of the warp's 16 rows. Lane: rows l / 4 and l / 4 + 8.
template <int N, bool DOWN>
__device__ __forceinline__ void store(const struct wide_args &n, const struct wide_task &t,
                                      const wide_pairs<N> &pairs, uint32_t row, const float *d)
{
    uint32_t lane = threadIdx.x % 32, g = lane / 4 & ~1u;
    uint32_t cols = (n.a.intermediate + 63) / 64 * 64, dim = n.a.dim;
#pragma unroll
    for (int i = 0; i < N / 8; i++) {
        uint32_t in_group = lane % 4 * 2 + (lane / 4 & 1);
        uint64_t pair = __shfl_sync(0xffffffffu, pairs.of[i / 4], i % 4 * 8 + in_group);
        float v[4];
        if (DOWN) {
            rows_pair(d[i * 4], d[i * 4 + 1], &v[0], &v[1]);
            rows_pair(d[i * 4 + 2], d[i * 4 + 3], &v[2], &v[3]);
        } else {
            rows_pair(silu(d[i * 4]) * d[i * 4 + 2], silu(d[i * 4 + 1]) * d[i * 4 + 3], &v[0],
                      &v[1]);
        }
        bool is_there = i * 8 + in_group < t.count;
        if (!DOWN) {
            uint32_t col = row / 2 + g;
            uint32_t both = pack_bf16(col < n.a.intermediate ? v[0] : 0.0f,
                                      col + 1 < n.a.intermediate ? v[1] : 0.0f);
            if (is_there && col < cols)
                *(uint32_t *)((bf16 *)n.a.work.hidden + pair * cols + col) = both;
            continue;
        }
        float *out = n.a.work.out + pair * dim;
#pragma unroll
        for (int h = 0; h < 2; h++) {
            uint32_t r = row + g + h * 8;
            if (!is_there)
                continue;
            if (dim % 2 == 0 && r < dim) {
                *(float2 *)(out + r) = make_float2(v[h * 2], v[h * 2 + 1]);
            } else if (r < dim) {
                out[r] = v[h * 2];
                if (r + 1 < dim)
                    out[r + 1] = v[h * 2 + 1];
            }
        }
    }
}

template <int TOKENS, int N, bool DOWN>
__device__ __forceinline__ void consume_task(const struct wide_args &n, wide_shared<TOKENS> &s,
                                             uint8_t *buffer, const struct wide_task &t,
                                             uint32_t columns, uint32_t step, float *d)
{
    constexpr int next = N - wide_shape<TOKENS>::step;
    if constexpr (next > 0)
        if (columns <= next) {
            consume_task<TOKENS, next, DOWN>(n, s, buffer, t, columns, step, d);
            return;
        }
    uint32_t half = threadIdx.x / 128 - 1, warp = threadIdx.x % 128 / 32;
    wide_pairs<N> pairs;
    pairs_find<N>(n, t, pairs);
    multiply<TOKENS, N>(s, buffer, n.k_tiles, step, half, d);
    store<N, DOWN>(n, t, pairs, t.block * BLOCK_ROWS + half * TILE_ROWS + warp * 16, d);
}

template <int TOKENS, bool DOWN>
__global__ void __launch_bounds__(WIDE_THREADS, 1)
    wide_kernel(const struct cuda_control *control, uint32_t slot, struct wide_args n)
{
    extern __shared__ __align__(1024) uint8_t buffer[];
    __shared__ wide_shared<TOKENS> s;
    uint32_t rows;
    if (threadIdx.x == 0) {
        for (int i = 0; i < wide_shape<TOKENS>::stages; i++) {
            barrier_init(&s.full[i], 1 + PRODUCERS);
            barrier_init(&s.empty[i], 2);
        }
        barrier_init_fence();
    }
    if (!segment_enter_moe(control, slot, n.a.layer, &rows))
        return;
    if (threadIdx.x < 32)
        chunks_count<TOKENS>(n.list, s.chunk);
    __syncthreads();
    uint32_t tasks = s.chunk[n.list->count] * n.blocks;
    if (threadIdx.x < PRODUCERS) {
        asm volatile("setmaxnreg.dec.sync.aligned.u32 56;");
        produce<TOKENS>(n, s, buffer, tasks);
    } else {
        asm volatile("setmaxnreg.inc.sync.aligned.u32 224;");
        float d[TOKENS / 2];
        uint32_t step = 0;
        for (uint32_t task = blockIdx.x; task < tasks; task += gridDim.x, step += n.k_tiles) {
            struct wide_task t = task_at<TOKENS>(n, s.chunk, task);
            consume_task<TOKENS, TOKENS, DOWN>(n, s, buffer, t, columns_of<TOKENS>(t.count), step,
                                               d);
        }
    }
}

// ---- launchers ----

template <int TOKENS>
static void wide_launch(const struct cuda_launch *l, const struct wide_args *n, bool down)
{
    launch_kernel(l, down ? wide_kernel<TOKENS, true> : wide_kernel<TOKENS, false>,
                  dim3((uint32_t)l->device->multiprocessors), dim3(WIDE_THREADS),
                  wide_shape<TOKENS>::bytes, l->control, l->slot, *n);
}

void cuda__moe_wide(const struct cuda_launch *l, const struct moe_gemm_args *a, bool down)
{
    struct wide_args n = {};
    uint32_t in = down ? a->intermediate : a->dim;
    n.a = *a;
    n.list = (const struct moe_list *)l->work;
    n.x = (const uint8_t *)(down ? a->work.hidden : a->x);
    n.x_bytes = cuda__act_cols(in) * 2;
    n.per_x = down ? 1 : a->top_k;
    n.k_tiles = (in + 63) / 64;
    n.first_tile = down ? a->view.down_tile : 0;
    uint64_t per_page = a->view.page_bytes / TILE_BYTES;
    CHECK(per_page && (per_page & (per_page - 1)) == 0);
    n.page_shift = (uint32_t)__builtin_ctzll(per_page);
    uint32_t rows = down ? a->dim : (a->intermediate + 7) / 8 * 16;
    n.tile_blocks = (rows + TILE_ROWS - 1) / TILE_ROWS;
    uint32_t covered = down ? a->dim : (uint32_t)cuda__act_cols(a->intermediate) * 2;
    n.blocks = (covered + BLOCK_ROWS - 1) / BLOCK_ROWS;
    uint64_t mean = (uint64_t)l->rows_max * a->top_k / a->view.experts;
    if (mean <= 20)
        wide_launch<32>(l, &n, down);
    else if (mean <= 48)
        wide_launch<64>(l, &n, down);
    else if (mean <= 160)
        wide_launch<128>(l, &n, down);
    else
        wide_launch<256>(l, &n, down);
}

template <int TOKENS> static enum status shared_raise(struct cuda_device *device)
{
    int bytes = wide_shape<TOKENS>::bytes;
    cudaFuncAttribute what = cudaFuncAttributeMaxDynamicSharedMemorySize;
    CUDA_TRY(device, cudaFuncSetAttribute(wide_kernel<TOKENS, true>, what, bytes));
    CUDA_TRY(device, cudaFuncSetAttribute(wide_kernel<TOKENS, false>, what, bytes));
    return STATUS_OK;
}

enum status cuda__moe_wide_prepare(struct cuda_device *device)
{
    enum status status = shared_raise<32>(device);
    if (status == STATUS_OK)
        status = shared_raise<64>(device);
    if (status == STATUS_OK)
        status = shared_raise<128>(device);
    if (status == STATUS_OK)
        status = shared_raise<256>(device);
    return status;
}
