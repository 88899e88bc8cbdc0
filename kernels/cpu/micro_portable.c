// SPDX-License-Identifier: Apache-2.0
// Portable microkernels: C with 16-byte vector types of GCC and Clang (SSE2 on x86-64, NEON on
// aarch64, scalars elsewhere). No fused multiply-add: the product is rounded.
#include <string.h>

#include "kernels/cpu/micro.h"

enum { WIDTH = 4, STREAM_T = 2, BLOCK_T = 2, DOT_GROUP = 4 };
#define STRIP_WIDE 0
#define MICRO_NAME "portable"
#define MICRO_ENTRY cpu__micro_portable

typedef float vf __attribute__((vector_size(16)));
typedef uint32_t vu __attribute__((vector_size(16)));
typedef int32_t vi __attribute__((vector_size(16)));

static inline vf v_fma(vf a, vf b, vf c)
{
    return a * b + c;
}

static inline vu v_spread(const uint8_t *p)
{
    vu v;
    memcpy(&v, p, 16);
    return v;
}

static inline void v_fold_rows(const vf *a, float *out)
{
    for (int i = 0; i < 4; i++)
        out[i] = (a[i][0] + a[i][1]) + (a[i][2] + a[i][3]);
}

static inline float v_fold(vf a)
{
    return (a[0] + a[2]) + (a[1] + a[3]);
}

static inline void v_fold_group(const vf *a, float *out)
{
    for (int i = 0; i < DOT_GROUP; i++)
        out[i] = v_fold(a[i]);
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
    uint16_t h[4];
    memcpy(h, p, 8);
    vu v = {h[0], h[1], h[2], h[3]};
    return (vf)(v << 16);
}

static inline void v_narrow(vf a, uint8_t *p)
{
    uint16_t h[4];
    for (int i = 0; i < 4; i++)
        h[i] = bf16_from_f32(a[i]);
    memcpy(p, h, 8);
}

static inline void v_gate_up(const float *p, vf *gate, vf *up)
{
    memcpy(gate, p, sizeof *gate);
    memcpy(up, p + 8, sizeof *up);
}

#include "kernels/cpu/micro_body.h"
