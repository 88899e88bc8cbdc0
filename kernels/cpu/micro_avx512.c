// SPDX-License-Identifier: Apache-2.0
// AVX-512 microkernels with vdpbf16ps: one register holds 4 weight rows x 8 columns of bf16, four
// lanes of a row are added at the end. vdpbf16ps takes the odd product first and flushes denormals;
// its results are the same on every CPU that has it.
#include <immintrin.h>
#include <string.h>

#include "kernels/cpu/micro.h"

enum { WIDTH = 16, STREAM_T = 8, BLOCK_T = 6, DOT_GROUP = 16 };
#define STRIP_WIDE 1 // 32 registers: more weight registers and more tokens at once
#define MICRO_NAME "avx512bf16"
#define MICRO_ENTRY cpu__micro_avx512

typedef float vf __attribute__((vector_size(64)));
typedef uint32_t vu __attribute__((vector_size(64)));
typedef int32_t vi __attribute__((vector_size(64)));

static inline vf v_fma(vf a, vf b, vf c)
{
    return (vf)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
}

static inline vu v_spread(const uint8_t *p)
{
    return (vu)_mm512_broadcast_i32x4(_mm_loadu_si128((const __m128i *)(const void *)p));
}

static inline void v_fold_rows(const vf *v, float *out)
{
    __m512 a = (__m512)v[0], b = (__m512)v[1], c = (__m512)v[2], d = (__m512)v[3];
    // 0+1, 2+3 of each row
    __m512 t = _mm512_add_ps(_mm512_shuffle_ps(a, b, 0x88), _mm512_shuffle_ps(a, b, 0xdd));
    __m512 u = _mm512_add_ps(_mm512_shuffle_ps(c, d, 0x88), _mm512_shuffle_ps(c, d, 0xdd));
    t = _mm512_add_ps(_mm512_shuffle_ps(t, u, 0x88), _mm512_shuffle_ps(t, u, 0xdd));
    // row r of register i stands at [r][i]
    const __m512i order = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
    _mm512_storeu_ps(out, _mm512_permutexvar_ps(order, t));
}

// Sums of 16 registers at once; each lane of the result goes through the same tree:
// per 128 bits (0+2)+(1+3), then (first+second)+(third+fourth).
static inline void v_fold_group(const vf *v, float *out)
{
    __m512 a[16];
    for (int i = 0; i < 16; i++)
        a[i] = (__m512)v[i];
    for (int i = 0; i < 8; i++)
        a[i] = _mm512_add_ps(_mm512_unpacklo_ps(a[2 * i], a[2 * i + 1]),
                             _mm512_unpackhi_ps(a[2 * i], a[2 * i + 1]));
    for (int i = 0; i < 4; i++) {
        __m512d lo = _mm512_castps_pd(a[2 * i]), hi = _mm512_castps_pd(a[2 * i + 1]);
        a[i] = _mm512_add_ps(_mm512_castpd_ps(_mm512_unpacklo_pd(lo, hi)),
                             _mm512_castpd_ps(_mm512_unpackhi_pd(lo, hi)));
    }
    for (int i = 0; i < 2; i++)
        a[i] = _mm512_add_ps(_mm512_shuffle_f32x4(a[2 * i], a[2 * i + 1], 0x88),
                             _mm512_shuffle_f32x4(a[2 * i], a[2 * i + 1], 0xdd));
    a[0] = _mm512_add_ps(_mm512_shuffle_f32x4(a[0], a[1], 0x88),
                         _mm512_shuffle_f32x4(a[0], a[1], 0xdd));
    _mm512_storeu_ps(out, a[0]);
}

// The same tree for one register.
static inline float v_fold(vf v)
{
    __m512 a = (__m512)v;
    a = _mm512_add_ps(a, _mm512_permute_ps(a, 0x4e));
    a = _mm512_add_ps(a, _mm512_permute_ps(a, 0xb1));
    a = _mm512_add_ps(a, _mm512_shuffle_f32x4(a, a, 0xb1));
    a = _mm512_add_ps(a, _mm512_shuffle_f32x4(a, a, 0x4e));
    return _mm_cvtss_f32(_mm512_castps512_ps128(a));
}

static inline vu v_raw_part(const uint8_t *p, size_t bytes)
{
    return (vu)_mm512_maskz_loadu_epi16((__mmask32)((1u << (bytes / 2)) - 1u), p);
}

static inline vf v_dot_bf16(vf acc, vu w, vu x)
{
    return (vf)_mm512_dpbf16_ps((__m512)acc, (__m512bh)w, (__m512bh)x);
}

static inline vf v_widen(const uint8_t *p)
{
    __m512i v = _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i *)(const void *)p));
    return (vf)_mm512_slli_epi32(v, 16);
}

static inline void v_narrow(vf a, uint8_t *p)
{
    vu bits = (vu)a;
    vu rounded = (bits + 0x7fffu + (bits >> 16 & 1u)) >> 16;
    vu nan = (vu)((bits & 0x7fffffffu) > 0x7f800000u);
    vu h = (nan & (bits >> 16 | 0x40u)) | (~nan & rounded);
    _mm256_storeu_si256((__m256i *)(void *)p, _mm512_cvtepi32_epi16((__m512i)h));
}

static inline void v_gate_up(const float *p, vf *gate, vf *up)
{
    __m512 a = _mm512_loadu_ps(p), b = _mm512_loadu_ps(p + 16);
    *gate = (vf)_mm512_shuffle_f32x4(a, b, 0x44);
    *up = (vf)_mm512_shuffle_f32x4(a, b, 0xee);
}

#include "kernels/cpu/micro_body.h"
