// SPDX-License-Identifier: Apache-2.0
// The loops that say what the machine can do: xor over a buffer, and the dot step on registers.
#include "bench/bench_kernels_ceiling.h"

#include <pthread.h>
#include <string.h>
#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include "base/check.h"

double bench_time(clockid_t clock)
{
    struct timespec t;
    clock_gettime(clock, &t);
    return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
}

struct ceiling_job {
    const char *set;
    const uint8_t *from;
    size_t bytes;
    bool dots;
    double result;
    struct rate rate;
};

typedef uint64_t vu64 __attribute__((vector_size(64)));

#if defined(__x86_64__)
__attribute__((target("avx512f,avx512bw,avx512vl,avx512bf16"))) static double
dots_avx512(size_t rounds)
{
    __m512 a[12];
    __m512bh x = (__m512bh)_mm512_set1_epi32(0x3c003c00),
             y = (__m512bh)_mm512_set1_epi32(0x3b803c01);
    for (int i = 0; i < 12; i++)
        a[i] = _mm512_set1_ps((float)i);
    for (size_t r = 0; r < rounds; r++) {
        _Pragma("GCC unroll 12") for (int i = 0; i < 12; i++) a[i] = _mm512_dpbf16_ps(a[i], x, y);
        __asm__ volatile("" : "+v"(a[0]));
    }
    for (int i = 1; i < 12; i++)
        a[0] = _mm512_add_ps(a[0], a[i]);
    return (double)_mm512_reduce_add_ps(a[0]);
}

__attribute__((target("avx512f"))) static uint64_t read_avx512(const uint8_t *p, size_t bytes)
{
    __m512i a[8];
    for (int i = 0; i < 8; i++)
        a[i] = _mm512_setzero_si512();
    for (size_t i = 0; i < bytes; i += 512)
        _Pragma("GCC unroll 8") for (int k = 0; k < 8; k++) a[k] =
            _mm512_xor_si512(a[k], _mm512_load_si512((const void *)(p + i + (size_t)k * 64)));
    for (int i = 1; i < 8; i++)
        a[0] = _mm512_xor_si512(a[0], a[i]);
    return (uint64_t)_mm512_reduce_add_epi64(a[0]);
}

__attribute__((target("avx2,fma"))) static double dots_avx2(size_t rounds)
{
    __m256 a[12], x = _mm256_set1_ps(0.5f), y = _mm256_set1_ps(0.25f);
    for (int i = 0; i < 12; i++)
        a[i] = _mm256_set1_ps((float)i);
    for (size_t r = 0; r < rounds; r++) {
        _Pragma("GCC unroll 12") for (int i = 0; i < 12; i++) a[i] = _mm256_fmadd_ps(x, y, a[i]);
        __asm__ volatile("" : "+x"(a[0]));
    }
    for (int i = 1; i < 12; i++)
        a[0] = _mm256_add_ps(a[0], a[i]);
    return (double)a[0][0];
}
#endif

static uint64_t read_plain(const uint8_t *p, size_t bytes)
{
    vu64 a[4] = {{0}};
    for (size_t i = 0; i < bytes; i += 256)
        for (int k = 0; k < 4; k++)
            a[k] ^= *(const vu64 *)(const void *)(p + i + (size_t)k * 64);
    a[0] ^= a[1] ^ a[2] ^ a[3];
    return a[0][0];
}

static double dots_run(const char *set, size_t rounds, double *operations)
{
#if defined(__x86_64__)
    if (!strcmp(set, "avx512bf16")) {
        *operations = (double)rounds * 12 * 64;
        return dots_avx512(rounds);
    }
    if (!strcmp(set, "avx2")) {
        *operations = (double)rounds * 12 * 16;
        return dots_avx2(rounds);
    }
#endif
    typedef float vf __attribute__((vector_size(16)));
    vf a[8], x = {0.5f, 0.5f, 0.5f, 0.5f};
    for (int i = 0; i < 8; i++)
        a[i] = x * (float)i;
    for (size_t r = 0; r < rounds; r++) {
        for (int i = 0; i < 8; i++)
            a[i] = a[i] * x + x;
        __asm__ volatile("" : "+m"(a[0]));
    }
    *operations = (double)rounds * 8 * 8;
    for (int i = 1; i < 8; i++)
        a[0] += a[i];
    return (double)a[0][0];
}

static void *ceiling_main(void *context)
{
    struct ceiling_job *job = context;
    double wall = bench_time(CLOCK_MONOTONIC), cpu = bench_time(CLOCK_THREAD_CPUTIME_ID), amount;
    if (job->dots) {
        job->result = dots_run(job->set, job->bytes, &amount);
    } else {
        amount = (double)job->bytes;
#if defined(__x86_64__)
        if (__builtin_cpu_supports("avx512f"))
            job->result = (double)read_avx512(job->from, job->bytes);
        else
#endif
            job->result = (double)read_plain(job->from, job->bytes);
    }
    job->rate.wall = amount / (bench_time(CLOCK_MONOTONIC) - wall);
    job->rate.cpu = amount / (bench_time(CLOCK_THREAD_CPUTIME_ID) - cpu);
    return NULL;
}

struct rate ceiling_rate(struct ceiling *c, bool dots)
{
    struct ceiling_job job[CEILING_THREADS];
    pthread_t thread[CEILING_THREADS];
    size_t part = (size_t)16 << 20, parts = c->bytes / part;
    struct rate rate = {0, 0};
    for (uint32_t i = 0; i < c->threads; i++) {
        job[i] = (struct ceiling_job){.set = c->set,
                                      .from = c->from + c->turn++ % parts * part,
                                      .bytes = dots ? 150000 : part,
                                      .dots = dots};
        CHECK(!pthread_create(&thread[i], NULL, ceiling_main, &job[i]));
    }
    for (uint32_t i = 0; i < c->threads; i++) {
        pthread_join(thread[i], NULL);
        rate.wall += job[i].rate.wall;
        rate.cpu += job[i].rate.cpu;
    }
    return rate;
}
