// SPDX-License-Identifier: Apache-2.0
// Page-in and page-out by page size: the copy engine (one cudaMemcpyAsync a page, and a batch of
// them) against a gather kernel that reads pinned host pages (zero copy), each beside one large
// copy of the same run; then how much a step that is bound by memory (a read of the whole arena)
// slows down while pages come in either way. One JSON line per measurement; ratio: to the large
// copy, or of the step with copies to the step alone.
#include <algorithm>
#include <cuda_runtime.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <time.h>
#include <vector>

#define TRY(call)                                                                                  \
    do {                                                                                           \
        cudaError_t error_ = (call);                                                               \
        if (error_ != cudaSuccess) {                                                               \
            fprintf(stderr, "bench_copies: %s: %s\n", #call, cudaGetErrorString(error_));          \
            exit(1);                                                                               \
        }                                                                                          \
    } while (0)

static const size_t total_bytes = (size_t)512 << 20, arena_bytes = (size_t)4 << 30;

static __global__ void gather_kernel(const uint4 *const *from, uint4 *const *to, size_t words,
                                     uint32_t pages, uint32_t cuts)
{
    for (uint32_t w = blockIdx.x; w < pages * cuts; w += gridDim.x) {
        size_t per = words / cuts, begin = per * (w % cuts);
        const uint4 *s = from[w / cuts] + begin;
        uint4 *d = to[w / cuts] + begin;
        for (size_t i = threadIdx.x; i < per; i += blockDim.x * 4) {
            uint4 v[4];
#pragma unroll
            for (int k = 0; k < 4; k++)
                if (i + k * blockDim.x < per)
                    v[k] = s[i + k * blockDim.x];
#pragma unroll
            for (int k = 0; k < 4; k++)
                if (i + k * blockDim.x < per)
                    d[i + k * blockDim.x] = v[k];
        }
    }
}

static __global__ void read_kernel(const uint4 *from, size_t count, uint32_t *out)
{
    size_t step = (size_t)gridDim.x * blockDim.x;
    uint32_t sum = 0;
    for (size_t i = (size_t)blockIdx.x * blockDim.x + threadIdx.x; i + 3 * step < count;
         i += 4 * step) {
        uint4 v[4];
#pragma unroll
        for (int k = 0; k < 4; k++)
            v[k] = __ldcs(from + i + k * step);
#pragma unroll
        for (int k = 0; k < 4; k++)
            sum += v[k].x ^ v[k].y ^ v[k].z ^ v[k].w;
    }
    if (sum == 0x12345678)
        *out = sum;
}

static double now()
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
}

struct copies {
    uint8_t *device, *host;
    cudaStream_t copy, step;
    size_t page;
    uint32_t pages;
    std::vector<void *> device_page, host_page;
    std::vector<size_t> bytes;
    void **device_list, **host_list; // on the device
};

static void choose_pages(struct copies *c, size_t page)
{
    c->page = page;
    c->pages = (uint32_t)(total_bytes / page);
    std::vector<uint32_t> order(arena_bytes / page);
    for (uint32_t i = 0; i < order.size(); i++)
        order[i] = i;
    srand(1);
    c->device_page.clear();
    c->host_page.clear();
    for (uint32_t i = 0; i < c->pages; i++) {
        std::swap(order[i], order[i + (uint32_t)rand() % (order.size() - i)]);
        c->device_page.push_back(c->device + order[i] * page);
        c->host_page.push_back(c->host + (order[i] * page + total_bytes) % arena_bytes);
    }
    c->bytes.assign(c->pages, page);
    TRY(cudaMemcpy(c->device_list, c->device_page.data(), c->pages * 8, cudaMemcpyHostToDevice));
    TRY(cudaMemcpy(c->host_list, c->host_page.data(), c->pages * 8, cudaMemcpyHostToDevice));
}

enum way { LOOP, BATCH, GATHER };

static void start(struct copies *c, enum way way, bool in)
{
    std::vector<void *> &to = in ? c->device_page : c->host_page;
    std::vector<void *> &from = in ? c->host_page : c->device_page;
    if (way == LOOP) {
        for (uint32_t i = 0; i < c->pages; i++)
            TRY(cudaMemcpyAsync(to[i], from[i], c->page,
                                in ? cudaMemcpyHostToDevice : cudaMemcpyDeviceToHost, c->copy));
    } else if (way == BATCH) {
        cudaMemcpyAttributes attributes = {};
        attributes.srcAccessOrder = cudaMemcpySrcAccessOrderStream;
        attributes.flags = cudaMemcpyFlagPreferOverlapWithCompute;
        size_t first = 0;
        TRY(cudaMemcpyBatchAsync((const void **)to.data(), (const void **)from.data(),
                                 c->bytes.data(), c->pages, &attributes, &first, 1, c->copy));
    } else {
        void **source = in ? c->host_list : c->device_list;
        void **target = in ? c->device_list : c->host_list;
        uint32_t cuts = (uint32_t)std::max<size_t>(1, c->page / 16384);
        gather_kernel<<<16, 512, 0, c->copy>>>((const uint4 *const *)source, (uint4 *const *)target,
                                               c->page / 16, c->pages, cuts);
        TRY(cudaGetLastError());
    }
}

static double seconds(struct copies *c, enum way way, bool in)
{
    std::vector<double> all;
    for (int i = 0; i < 5; i++) {
        double begin = now();
        start(c, way, in);
        TRY(cudaStreamSynchronize(c->copy));
        all.push_back(now() - begin);
    }
    std::sort(all.begin(), all.end());
    return all[2];
}

static double large_copy(struct copies *c, bool in)
{
    std::vector<double> all;
    for (int i = 0; i < 5; i++) {
        double begin = now();
        TRY(cudaMemcpyAsync(in ? c->device : c->host, in ? c->host : c->device, total_bytes,
                            in ? cudaMemcpyHostToDevice : cudaMemcpyDeviceToHost, c->copy));
        TRY(cudaStreamSynchronize(c->copy));
        all.push_back(now() - begin);
    }
    std::sort(all.begin(), all.end());
    return (double)total_bytes / all[2];
}

// A read of the whole arena, eight times in a row, while pages come in (or alone).
static double step_seconds(struct copies *c, int way)
{
    cudaEvent_t begin, end;
    float ms = 0, best = 1e9f;
    TRY(cudaEventCreate(&begin));
    TRY(cudaEventCreate(&end));
    for (int i = 0; i < 3; i++) {
        if (way >= 0)
            for (int k = 0; k < 2; k++)
                start(c, (enum way)way, true);
        TRY(cudaEventRecord(begin, c->step));
        for (int k = 0; k < 8; k++)
            read_kernel<<<132 * 8, 256, 0, c->step>>>((const uint4 *)c->device, arena_bytes / 16,
                                                      (uint32_t *)(c->device + arena_bytes));
        TRY(cudaEventRecord(end, c->step));
        TRY(cudaDeviceSynchronize());
        TRY(cudaEventElapsedTime(&ms, begin, end));
        best = std::min(best, ms);
    }
    TRY(cudaEventDestroy(begin));
    TRY(cudaEventDestroy(end));
    return best * 1e-3;
}

static void print(const char *what, const char *way, size_t page, double value, double ceiling,
                  double ratio)
{
    printf("{\"bench\":\"copies\",\"what\":\"%s\",\"way\":\"%s\",\"page_kib\":%zu,"
           "\"gb_per_s\":%.2f,\"ceiling\":%.2f,\"ratio\":%.3f}\n",
           what, way, page >> 10, value * 1e-9, ceiling * 1e-9, ratio);
    fflush(stdout);
}

int main()
{
    static const char *const ways[] = {"memcpy per page", "memcpy batch", "gather kernel"};
    static const size_t pages[] = {32768, 65536, 262144, 524288, 1 << 20, 2 << 20};
    struct copies c = {};
    int count = 0;
    if (cudaGetDeviceCount(&count) != cudaSuccess || !count) {
        printf("SKIPPED: there is no GPU here\n");
        return 77;
    }
    TRY(cudaMalloc(&c.device, arena_bytes + 256));
    TRY(cudaMemset(c.device, 1, arena_bytes));
    TRY(cudaMallocHost(&c.host, arena_bytes));
    TRY(cudaMalloc(&c.device_list, (arena_bytes >> 15) * 8));
    TRY(cudaMalloc(&c.host_list, (arena_bytes >> 15) * 8));
    TRY(cudaStreamCreateWithFlags(&c.copy, cudaStreamNonBlocking));
    TRY(cudaStreamCreateWithFlags(&c.step, cudaStreamNonBlocking));
    for (int in = 1; in >= 0; in--) {
        double large = large_copy(&c, in);
        print(in ? "page in" : "page out", "one large copy", total_bytes, large, large, 1);
        for (size_t page : pages) {
            choose_pages(&c, page);
            for (int way = LOOP; way <= GATHER; way++) {
                double rate = (double)total_bytes / seconds(&c, (enum way)way, in);
                print(in ? "page in" : "page out", ways[way], page, rate, large, rate / large);
            }
        }
    }
    choose_pages(&c, 524288);
    double alone = step_seconds(&c, -1);
    print("step alone", "", 0, 8.0 * arena_bytes / alone, 8.0 * arena_bytes / alone, 1);
    for (int way = BATCH; way <= GATHER; way++) {
        double with = step_seconds(&c, way);
        print("step while pages come in", ways[way], 524288, 8.0 * arena_bytes / with,
              8.0 * arena_bytes / alone, alone / with);
    }
    return 0;
}
