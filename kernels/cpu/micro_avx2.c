// SPDX-License-Identifier: Apache-2.0
// AVX2 + FMA microkernels. bf16 operands are widened in registers: the even elements by a shift,
// the odd ones by a mask, each then one fused multiply-add.
#include <immintrin.h>
#include <string.h>

#include "kernels/cpu/micro.h"

enum { WIDTH = 8, STREAM_T = 2, BLOCK_T = 2, DOT_GROUP = 4 };
#define STRIP_WIDE 0
#define MICRO_NAME "avx2"
#define MICRO_ENTRY cpu__micro_avx2

typedef float vf __attribute__((vector_size(32)));
typedef uint32_t vu __attribute__((vector_size(32)));
typedef int32_t vi __attribute__((vector_size(32)));

static inline vf v_fma(vf a, vf b, vf c)
{
    return (vf)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
}

static inline vu v_spread(const uint8_t *p)
{
    return (vu)_mm256_broadcastsi128_si256(_mm_loadu_si128((const __m128i *)(const void *)p));
}

static inline void v_fold_rows(const vf *a, float *out)
{
    __m256 t = _mm256_hadd_ps((__m256)a[0], (__m256)a[1]); // 0+1, 2+3 of each row
    __m256 u = _mm256_hadd_ps((__m256)a[2], (__m256)a[3]);
    t = _mm256_hadd_ps(t, u); // even rows | odd rows
    __m128 even = _mm256_castps256_ps128(t), odd = _mm256_extractf128_ps(t, 1);
    _mm_storeu_ps(out, _mm_unpacklo_ps(even, odd));
    _mm_storeu_ps(out + 4, _mm_unpackhi_ps(even, odd));
}

static inline float v_fold(vf a)
{
    __m256 t = _mm256_hadd_ps((__m256)a, (__m256)a);
    t = _mm256_hadd_ps(t, t);
    return _mm_cvtss_f32(_mm256_castps256_ps128(t)) + _mm_cvtss_f32(_mm256_extractf128_ps(t, 1));
}

static inline void v_fold_group(const vf *a, float *out)
{
    __m256 s = _mm256_hadd_ps((__m256)a[0], (__m256)a[1]);
    __m256 t = _mm256_hadd_ps((__m256)a[2], (__m256)a[3]);
    s = _mm256_hadd_ps(s, t);
    _mm_storeu_ps(out, _mm_add_ps(_mm256_castps256_ps128(s), _mm256_extractf128_ps(s, 1)));
}

static inline vu v_raw_part(const uint8_t *p, size_t bytes)
{
    vu v = {0};
    memcpy(&v, p, bytes);
    return v;
}

static inline vf v_dot_bf16(vf acc, vu w, vu x)
{
    acc = v_fma((vf)(w << 16), (vf)(x << 16), acc);
    return v_fma((vf)(w & 0xffff0000u), (vf)(x & 0xffff0000u), acc);
}

static inline vf v_widen(const uint8_t *p)
{
    __m256i v = _mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i *)(const void *)p));
    return (vf)_mm256_slli_epi32(v, 16);
}

static inline void v_narrow(vf a, uint8_t *p)
{
    vu bits = (vu)a;
    vu rounded = (bits + 0x7fffu + (bits >> 16 & 1u)) >> 16;
    vu nan = (vu)((bits & 0x7fffffffu) > 0x7f800000u);
    vu h = (nan & (bits >> 16 | 0x40u)) | (~nan & rounded);
    __m256i packed = _mm256_packus_epi32((__m256i)h, (__m256i)h);
    packed = _mm256_permute4x64_epi64(packed, 0x08);
    _mm_storeu_si128((__m128i *)(void *)p, _mm256_castsi256_si128(packed));
}

static inline void v_gate_up(const float *p, vf *gate, vf *up)
{
    *gate = (vf)_mm256_loadu_ps(p);
    *up = (vf)_mm256_loadu_ps(p + 8);
}

#include "kernels/cpu/micro_body.h"
