// SPDX-License-Identifier: Apache-2.0
// The bodies of the microkernels, included once by each micro_<instruction set>.c, which defines
// before:
//   WIDTH (fp32 lanes), STREAM_T and BLOCK_T (tokens that share loads of weights), DOT_GROUP,
//   MICRO_NAME, MICRO_ENTRY, types vf, vu, vi, and v_fma, v_spread (16 bytes to every 128-bit
//   lane), v_fold_rows (one sum per 128-bit lane of 4 registers, in row order), v_fold,
//   v_fold_group (all lanes; the same tree), v_raw_part (bytes, zero-filled), v_dot_bf16, v_widen
//   (bf16 -> fp32), v_narrow (fp32 -> bf16), v_gate_up (WIDTH gates and ups of an interleaved row).
//
// strip: a tile is 8 x 8 core matrices of 8 rows x 16 bytes; a register holds WIDTH / 4 weight rows
// x 16 bytes, and 16 bytes of a token are spread over its 128-bit lanes. Up to STREAM_T tokens
// (bound by memory): tile after tile in memory order. More (bound by the dot unit): 4 registers of
// rows x BLOCK_T tokens over all columns. The order of accumulation of one (row, token) is the same
// in both.
#ifndef POLDER_KERNELS_CPU_MICRO_BODY_H
#define POLDER_KERNELS_CPU_MICRO_BODY_H

#include <math.h>
#include <stdbool.h>

#if defined(__clang__)
#define UNROLL _Pragma("clang loop unroll(full)")
#else
#define UNROLL _Pragma("GCC unroll 16")
#endif
#define INLINE static inline __attribute__((always_inline))

enum { VECTOR_BYTES = 4 * WIDTH, PER_CORE = CORE_BYTES / VECTOR_BYTES, STRIP_BLOCKS = 8 };

INLINE vf v_load(const float *p)
{
    vf v;
    memcpy(&v, p, sizeof v);
    return v;
}

INLINE void v_store(float *p, vf v)
{
    memcpy(p, &v, sizeof v);
}

INLINE vu v_raw(const uint8_t *p)
{
    vu v;
    memcpy(&v, p, sizeof v);
    return v;
}

INLINE vf v_set(float a)
{
    return a - (vf){0}; // x - 0 is x: no instruction
}

INLINE vf v_part(const float *p, size_t n, float fill)
{
    vf v = v_set(fill);
    memcpy(&v, p, n * sizeof(float));
    return v;
}

INLINE vf v_select(vi mask, vf yes, vf no)
{
    return (vf)((mask & (vi)yes) | (~mask & (vi)no));
}

INLINE vf v_dot(enum dtype d, vf acc, vu w, vu x)
{
    return d == DTYPE_BF16 ? v_dot_bf16(acc, w, x) : v_fma((vf)w, (vf)x, acc);
}

// ---- strip ----

// The first lines of 4 KiB (half a tile). A macro: GCC takes a function that only fetches for one
// that does nothing, and drops its calls.
#define PAGE_BEGIN(page)                                                                           \
    UNROLL for (size_t line = 0; line < 8; line++) __builtin_prefetch((page) + line * 64, 0, 2)

// One tile after the other, each read once and in the order it lies in memory, so that the
// processor's own prefetcher follows; the accumulators of all its rows are kept in `sums` between
// tiles. That prefetcher starts anew in every 4 KiB, which costs a latency each time when there is
// work between the loads: so the first 8 lines of the next 4 KiB are fetched by hand. Only at T = 1
// fetching all of the next tile is better. Measured on a Sapphire Rapids core, share of the rate of
// a plain read loop, without and with: T = 2 0.88 1.03, T = 4 0.75 0.97, T = 6 0.70 0.83, T = 8
// 0.65 0.76; T = 1 0.86, all of the next tile 0.94.
#define STREAM_PART(T)                                                                             \
    INLINE void stream_##T(enum dtype d, const struct strip *s, size_t token)                      \
    {                                                                                              \
        float sums[STRIP_BLOCKS][T][PER_CORE][WIDTH];                                              \
        size_t begin = s->first / CORE_ROWS, end = begin + div_up(s->rows, CORE_ROWS);             \
        size_t last = end - begin > STRIP_BLOCKS / 2 ? begin + STRIP_BLOCKS / 2 : begin;           \
        memset(sums, 0, sizeof sums);                                                              \
        for (size_t i = 0; i < s->k_tiles; i++) {                                                  \
            const uint8_t *x[T];                                                                   \
            UNROLL for (size_t t = 0; t < T; t++) x[t] = s->x[token + t] + i * TILE_ROW_BYTES;     \
            for (size_t b = begin; b < end; b++) {                                                 \
                const uint8_t *core = s->tiles[i] + b * STRIP_BLOCKS * CORE_BYTES;                 \
                const uint8_t *ahead = s->tiles[i + 1] + b * STRIP_BLOCKS * CORE_BYTES;            \
                if (T > 1 && (b == begin || b == last)) {                                          \
                    const uint8_t *page = b < last ? s->tiles[i] + TILE_BYTES / 2                  \
                                                   : s->tiles[i + 1] + s->first * TILE_ROW_BYTES;  \
                    PAGE_BEGIN(page);                                                              \
                }                                                                                  \
                vf acc[T][PER_CORE];                                                               \
                UNROLL for (size_t t = 0; t < T; t++) UNROLL for (size_t r = 0; r < PER_CORE; r++) \
                    acc[t][r] = v_load(sums[b][t][r]);                                             \
                UNROLL for (size_t k = 0; k < STRIP_BLOCKS; k++)                                   \
                {                                                                                  \
                    if (T == 1) {                                                                  \
                        __builtin_prefetch(ahead + k * CORE_BYTES, 0, 2);                          \
                        __builtin_prefetch(ahead + k * CORE_BYTES + 64, 0, 2);                     \
                    }                                                                              \
                    vu w[PER_CORE];                                                                \
                    UNROLL for (size_t r = 0; r < PER_CORE; r++) w[r] =                            \
                        v_raw(core + k * CORE_BYTES + r * VECTOR_BYTES);                           \
                    UNROLL for (size_t t = 0; t < T; t++)                                          \
                    {                                                                              \
                        vu v = v_spread(x[t] + k * 16);                                            \
                        UNROLL for (size_t r = 0; r < PER_CORE; r++) acc[t][r] =                   \
                            v_dot(d, acc[t][r], w[r], v);                                          \
                    }                                                                              \
                }                                                                                  \
                UNROLL for (size_t t = 0; t < T; t++) UNROLL for (size_t r = 0; r < PER_CORE; r++) \
                    v_store(sums[b][t][r], acc[t][r]);                                             \
            }                                                                                      \
        }                                                                                          \
        for (size_t t = 0; t < T; t++)                                                             \
            for (size_t v = begin * PER_CORE; v < end * PER_CORE; v += 4) {                        \
                vf four[4];                                                                        \
                UNROLL for (size_t j = 0; j < 4; j++) four[j] =                                    \
                    v_load(sums[(v + j) / PER_CORE][t][(v + j) % PER_CORE]);                       \
                v_fold_rows(four, s->out + (token + t) * TILE_ROWS + v * (WIDTH / 4));             \
            }                                                                                      \
    }

// WIDTH rows from `first` on (4 registers) x T tokens, over all tiles: a load serves several dot
// steps. The WIDTH rows after them are fetched meanwhile: group g of `groups` of tokens fetches its
// share of each tile.
#define BLOCK_PART(T)                                                                              \
    INLINE void block_##T(enum dtype d, const struct strip *s, size_t first, size_t token,         \
                          const uint8_t *const *after, size_t after_base, size_t line, size_t end) \
    {                                                                                              \
        vf acc[T][4] = {{{0}}};                                                                    \
        size_t base = first / CORE_ROWS * (STRIP_BLOCKS * CORE_BYTES) + first % CORE_ROWS * 16;    \
        for (size_t i = 0; i < s->k_tiles; i++) {                                                  \
            const uint8_t *tile = s->tiles[i] + base, *ahead = after[i] + after_base;              \
            for (size_t l = line; l < end; l++)                                                    \
                __builtin_prefetch(ahead + l * 64, 0, 2);                                          \
            UNROLL for (size_t k = 0; k < STRIP_BLOCKS; k++)                                       \
            {                                                                                      \
                vu w[4];                                                                           \
                UNROLL for (size_t r = 0; r < 4; r++) w[r] =                                       \
                    v_raw(tile + r / PER_CORE * (STRIP_BLOCKS * CORE_BYTES) + k * CORE_BYTES +     \
                          r % PER_CORE * VECTOR_BYTES);                                            \
                UNROLL for (size_t t = 0; t < T; t++)                                              \
                {                                                                                  \
                    vu x = v_spread(s->x[token + t] + i * TILE_ROW_BYTES + k * 16);                \
                    UNROLL for (size_t r = 0; r < 4; r++) acc[t][r] =                              \
                        v_dot(d, acc[t][r], w[r], x);                                              \
                }                                                                                  \
            }                                                                                      \
        }                                                                                          \
        UNROLL for (size_t t = 0; t < T; t++)                                                      \
            v_fold_rows(acc[t], s->out + (token + t) * TILE_ROWS + first);                         \
    }

#define CASE_STREAM(T)                                                                             \
    case T:                                                                                        \
        stream_##T(d, s, t);                                                                       \
        break;
#define CASE_BLOCK(T)                                                                              \
    case T:                                                                                        \
        block_##T(d, s, r, t, after, base, line, line + share);                                    \
        break;

STREAM_PART(1)
STREAM_PART(2)
#if STRIP_WIDE
STREAM_PART(3)
STREAM_PART(4)
STREAM_PART(5)
STREAM_PART(6)
STREAM_PART(7)
STREAM_PART(8)
BLOCK_PART(4)
BLOCK_PART(5)
BLOCK_PART(6)
#endif

// Tokens in groups of at most `most`, as even as can be: the size of the next one.
INLINE size_t group_next(size_t left, size_t most)
{
    size_t groups = div_up(left, most);
    return div_up(left, groups);
}

#if STRIP_WIDE
INLINE void strip_blocks(enum dtype d, const struct strip *s)
{
    const size_t lines = WIDTH * TILE_ROW_BYTES / 64; // of WIDTH rows of a tile
    size_t share = div_up(lines, div_up(s->tokens, BLOCK_T));
    for (size_t r = s->first; r < s->first + s->rows; r += WIDTH) {
        bool last = r + WIDTH >= s->first + s->rows;
        const uint8_t *const *after = last ? s->tiles + s->k_tiles : s->tiles;
        size_t base = (last ? s->first : r + WIDTH) * TILE_ROW_BYTES, line = 0;
        for (size_t t = 0, n; t < s->tokens; t += n, line += share)
            switch (n = group_next(s->tokens - t, BLOCK_T)) {
                CASE_BLOCK(4)
                CASE_BLOCK(5)
                CASE_BLOCK(6)
            }
    }
}
#endif

INLINE void strip_any(enum dtype d, const struct strip *s)
{
#if STRIP_WIDE
    if (s->tokens > STREAM_T) {
        strip_blocks(d, s);
        return;
    }
#endif
    for (size_t t = 0, n; t < s->tokens; t += n)
        switch (n = group_next(s->tokens - t, STREAM_T)) {
            CASE_STREAM(1)
            CASE_STREAM(2)
#if STRIP_WIDE
            CASE_STREAM(3)
            CASE_STREAM(4)
            CASE_STREAM(5)
            CASE_STREAM(6)
            CASE_STREAM(7)
            CASE_STREAM(8)
#endif
        }
}

// ---- dots ----

// Rows of exactly CHUNKS registers, x kept in registers: the heads of attention.
#define DOTS_CHUNKS(CHUNKS)                                                                        \
    INLINE void dots_chunks_##CHUNKS(enum dtype d, const uint8_t *x, const uint8_t *const *rows,   \
                                     float *out)                                                   \
    {                                                                                              \
        vu v[CHUNKS];                                                                              \
        vf acc[DOT_GROUP];                                                                         \
        UNROLL for (size_t i = 0; i < CHUNKS; i++) v[i] = v_raw(x + i * VECTOR_BYTES);             \
        UNROLL for (size_t r = 0; r < DOT_GROUP; r++)                                              \
        {                                                                                          \
            acc[r] = (vf){0};                                                                      \
            UNROLL for (size_t i = 0; i < CHUNKS; i++) acc[r] =                                    \
                v_dot(d, acc[r], v_raw(rows[r] + i * VECTOR_BYTES), v[i]);                         \
        }                                                                                          \
        v_fold_group(acc, out);                                                                    \
    }
DOTS_CHUNKS(2)
DOTS_CHUNKS(4)

INLINE void dots_group(enum dtype d, const uint8_t *x, const uint8_t *const *rows, size_t bytes,
                       float *out)
{
    vf acc[DOT_GROUP] = {{0}};
    size_t i = 0, whole = bytes / VECTOR_BYTES * VECTOR_BYTES;
    for (; i < whole; i += VECTOR_BYTES) {
        vu v = v_raw(x + i);
        UNROLL for (size_t r = 0; r < DOT_GROUP; r++) acc[r] =
            v_dot(d, acc[r], v_raw(rows[r] + i), v);
    }
    if (whole < bytes) {
        vu v = v_raw_part(x + whole, bytes - whole);
        UNROLL for (size_t r = 0; r < DOT_GROUP; r++) acc[r] =
            v_dot(d, acc[r], v_raw_part(rows[r] + whole, bytes - whole), v);
    }
    v_fold_group(acc, out);
}

// Half a group, as many LoRA ranks leave.
INLINE void dots_half(enum dtype d, const uint8_t *x, const uint8_t *const *rows, size_t bytes,
                      float *out)
{
    vf acc[DOT_GROUP] = {{0}};
    float sums[DOT_GROUP];
    size_t i = 0;
    for (; i + VECTOR_BYTES <= bytes; i += VECTOR_BYTES) {
        vu v = v_raw(x + i);
        UNROLL for (size_t r = 0; r < DOT_GROUP / 2; r++) acc[r] =
            v_dot(d, acc[r], v_raw(rows[r] + i), v);
    }
    if (i < bytes) {
        vu v = v_raw_part(x + i, bytes - i);
        UNROLL for (size_t r = 0; r < DOT_GROUP / 2; r++) acc[r] =
            v_dot(d, acc[r], v_raw_part(rows[r] + i, bytes - i), v);
    }
    v_fold_group(acc, sums);
    memcpy(out, sums, DOT_GROUP / 2 * sizeof *out);
}

INLINE void dots_any(enum dtype d, const void *vector, const uint8_t *const *rows, size_t n,
                     size_t dim, float *out)
{
    const uint8_t *x = vector;
    size_t bytes = dim * dtype_bytes(d), r = 0;
    for (; r + DOT_GROUP <= n; r += DOT_GROUP)
        if (bytes == 4 * VECTOR_BYTES)
            dots_chunks_4(d, x, rows + r, out + r);
        else if (bytes == 2 * VECTOR_BYTES)
            dots_chunks_2(d, x, rows + r, out + r);
        else
            dots_group(d, x, rows + r, bytes, out + r);
    if (r + DOT_GROUP / 2 <= n) {
        dots_half(d, x, rows + r, bytes, out + r);
        r += DOT_GROUP / 2;
    }
    for (; r < n; r++) {
        vf acc = {0};
        size_t i = 0;
        for (; i + VECTOR_BYTES <= bytes; i += VECTOR_BYTES)
            acc = v_dot(d, acc, v_raw(rows[r] + i), v_raw(x + i));
        if (i < bytes)
            acc = v_dot(d, acc, v_raw_part(rows[r] + i, bytes - i), v_raw_part(x + i, bytes - i));
        out[r] = v_fold(acc);
    }
}

// ---- mix ----

INLINE vf mix_row(enum dtype d, const uint8_t *row, size_t c)
{
    return d == DTYPE_BF16 ? v_widen(row + c * 2) : v_load((const float *)(const void *)row + c);
}

// The last columns of a row, fewer than WIDTH.
INLINE vf mix_row_part(enum dtype d, const uint8_t *row, size_t c, size_t n)
{
    uint8_t part[VECTOR_BYTES] = {0};
    memcpy(part, row + c * dtype_bytes(d), n * dtype_bytes(d));
    return mix_row(d, part, 0);
}

#define MIX_PART(Q, V)                                                                             \
    INLINE void mix_##Q##_##V(enum dtype d, const float *weight, size_t weight_stride,             \
                              const uint8_t *const *rows, size_t n, size_t column, size_t part,    \
                              float *acc, size_t acc_stride)                                       \
    {                                                                                              \
        vf a[Q][V];                                                                                \
        UNROLL for (size_t q = 0; q < Q; q++) UNROLL for (size_t v = 0; v < V; v++) a[q][v] =      \
            v_load(acc + q * acc_stride + v * WIDTH);                                              \
        for (size_t i = 0; i < n; i++) {                                                           \
            vf w[V];                                                                               \
            UNROLL for (size_t v = 0; v < V; v++) w[v] =                                           \
                part ? mix_row_part(d, rows[i], column + v * WIDTH, part)                          \
                     : mix_row(d, rows[i], column + v * WIDTH);                                    \
            UNROLL for (size_t q = 0; q < Q; q++)                                                  \
            {                                                                                      \
                vf p = v_set(weight[q * weight_stride + i]);                                       \
                UNROLL for (size_t v = 0; v < V; v++) a[q][v] = v_fma(p, w[v], a[q][v]);           \
            }                                                                                      \
        }                                                                                          \
        UNROLL for (size_t q = 0; q < Q; q++) UNROLL for (size_t v = 0; v < V; v++)                \
            v_store(acc + q * acc_stride + v * WIDTH, a[q][v]);                                    \
    }

MIX_PART(1, 1)
MIX_PART(1, 4)
MIX_PART(2, 1)
MIX_PART(2, 4)
#if STRIP_WIDE
MIX_PART(4, 1)
MIX_PART(4, 4)
#endif

// One block of at most 4 * WIDTH columns for `queries` queries.
#define MIX_COLUMNS(V, part)                                                                       \
    do {                                                                                           \
        size_t q = 0;                                                                              \
        MIX_WIDE(V, part)                                                                          \
        for (; q + 2 <= queries; q += 2)                                                           \
            mix_2_##V(d, weight + q * weight_stride, weight_stride, rows, n, first + c, part,      \
                      acc + q * acc_stride + c, acc_stride);                                       \
        for (; q < queries; q++)                                                                   \
            mix_1_##V(d, weight + q * weight_stride, weight_stride, rows, n, first + c, part,      \
                      acc + q * acc_stride + c, acc_stride);                                       \
    } while (0)
#if STRIP_WIDE
#define MIX_WIDE(V, part)                                                                          \
    for (; q + 4 <= queries; q += 4)                                                               \
        mix_4_##V(d, weight + q * weight_stride, weight_stride, rows, n, first + c, part,          \
                  acc + q * acc_stride + c, acc_stride);
#else
#define MIX_WIDE(V, part)
#endif

INLINE void mix_any(enum dtype d, const float *weight, size_t weight_stride,
                    const uint8_t *const *rows, size_t n, size_t first, size_t dim, float *acc,
                    size_t acc_stride, size_t queries)
{
    size_t c = 0;
    for (; c + 4 * WIDTH <= dim; c += 4 * WIDTH)
        MIX_COLUMNS(4, 0);
    for (; c + WIDTH <= dim; c += WIDTH)
        MIX_COLUMNS(1, 0);
    if (c < dim) {
        size_t rest = dim - c;
        MIX_COLUMNS(1, rest);
    }
}

// ---- conversions ----

static void store_bf16(const float *from, void *to, size_t n)
{
    uint8_t *out = to;
    size_t i = 0;
    for (; i + WIDTH <= n; i += WIDTH)
        v_narrow(v_load(from + i), out + i * 2);
    for (; i < n; i++) {
        uint16_t h = bf16_from_f32(from[i]);
        memcpy(out + i * 2, &h, 2);
    }
}

static void load_bf16(const void *from, float *to, size_t n)
{
    const uint8_t *in = from;
    size_t i = 0;
    for (; i + WIDTH <= n; i += WIDTH)
        v_store(to + i, v_widen(in + i * 2));
    for (; i < n; i++) {
        uint16_t h;
        memcpy(&h, in + i * 2, 2);
        to[i] = bf16_to_f32(h);
    }
}

static void store_f32(const float *from, void *to, size_t n)
{
    memcpy(to, from, n * sizeof(float));
}

static void load_f32(const void *from, float *to, size_t n)
{
    memcpy(to, from, n * sizeof(float));
}

// ---- plain fp32 ----

static float max_f32(const float *x, size_t n)
{
    vf m = v_set(-INFINITY);
    size_t i = 0;
    for (; i + WIDTH <= n; i += WIDTH) {
        vf v = v_load(x + i);
        m = v_select(v > m, v, m);
    }
    if (i < n) {
        vf v = v_part(x + i, n - i, -INFINITY);
        m = v_select(v > m, v, m);
    }
    float best = -INFINITY;
    for (size_t l = 0; l < WIDTH; l++)
        best = m[l] > best ? m[l] : best;
    return best;
}

static float sum_squares_f32(const float *x, size_t n)
{
    vf a = {0}, b = {0};
    size_t i = 0;
    for (; i + 2 * WIDTH <= n; i += 2 * WIDTH) {
        vf v = v_load(x + i), w = v_load(x + i + WIDTH);
        a = v_fma(v, v, a);
        b = v_fma(w, w, b);
    }
    for (; i < n; i += WIDTH) {
        vf v = n - i < WIDTH ? v_part(x + i, n - i, 0.0f) : v_load(x + i);
        a = v_fma(v, v, a);
    }
    return v_fold(a + b);
}

// exp by 2^n * e^r, |r| <= ln 2 / 2, degree 6 (the polynomial of Cephes expf, Moshier 1989): at
// most 2 ulp. Below -87.33 the result is 0, above 88.37 inf; NaN stays NaN.
INLINE vf v_exp(vf x)
{
    const float low = -87.33654f, high = 88.72284f, magic = 12582912.0f; // 1.5 * 2^23
    vi under = x<v_set(low), over = x> v_set(high);
    x = v_select(under, v_set(low), x);
    x = v_select(over, v_set(high), x);
    vf t = v_fma(x, v_set(1.44269504088896341f), v_set(magic)), n = t - magic;
    vf r = v_fma(n, v_set(-0.693359375f), x);
    r = v_fma(n, v_set(2.12194440e-4f), r);
    vf p = v_fma(v_set(1.9875691500e-4f), r, v_set(1.3981999507e-3f));
    p = v_fma(p, r, v_set(8.3334519073e-3f));
    p = v_fma(p, r, v_set(4.1665795894e-2f));
    p = v_fma(p, r, v_set(1.6666665459e-1f));
    p = v_fma(p, r, v_set(5.0000001201e-1f));
    p = v_fma(p, r * r, r) + 1.0f;
    vf y = p * (vf)(((vu)t << 23) + 0x3f800000u);
    return v_select(over, v_set(INFINITY), v_select(under, v_set(0.0f), y));
}

static float exp_sum_f32(const float *x, float *out, size_t n, float max, float scale)
{
    vf sum = {0};
    size_t i = 0;
    for (; i + WIDTH <= n; i += WIDTH) {
        vf e = v_exp((v_load(x + i) - max) * scale);
        v_store(out + i, e);
        sum += e;
    }
    if (i < n) {
        vf e = v_exp((v_part(x + i, n - i, -INFINITY) - max) * scale);
        memcpy(out + i, &e, (n - i) * sizeof(float));
        for (size_t l = n - i; l < WIDTH; l++)
            e[l] = 0;
        sum += e;
    }
    return v_fold(sum);
}

static void scale_mul_f32(const float *x, const float *weight, float scale, float *out, size_t n)
{
    size_t i = 0;
    for (; i + WIDTH <= n; i += WIDTH)
        v_store(out + i, v_load(x + i) * scale * v_load(weight + i));
    for (; i < n; i++)
        out[i] = x[i] * scale * weight[i];
}

static void axpy_f32(float *y, const float *x, float a, size_t n)
{
    size_t i = 0;
    for (; i + WIDTH <= n; i += WIDTH)
        v_store(y + i, v_fma(v_set(a), v_load(x + i), v_load(y + i)));
    if (i < n) {
        vf v = v_fma(v_set(a), v_part(x + i, n - i, 0.0f), v_part(y + i, n - i, 0.0f));
        memcpy(y + i, &v, (n - i) * sizeof(float));
    }
}

static void axpy_half_f32(float *y, const float *x, float a, size_t n)
{
    typedef float v8 __attribute__((vector_size(32)));
    size_t i = 0;
    for (; i + 8 <= n; i += 8) {
        v8 from, to;
        memcpy(&from, x + i, sizeof from);
        memcpy(&to, y + 2 * i, sizeof to);
        to += from * a;
        memcpy(y + 2 * i, &to, sizeof to);
    }
    for (size_t j = 0; i + j < n; j++)
        y[2 * i + j] += a * x[i + j];
}

INLINE vf v_silu_mul(vf gate, vf up)
{
    return gate / (v_exp(-gate) + 1.0f) * up;
}

static void swiglu_f32(const float *gate_up, float *out, size_t units)
{
    const size_t step = WIDTH > 8 ? WIDTH : 8; // a whole block of 8 at least
    vf gate, up;
    size_t u = 0;
    for (; u + step <= units; u += step)
        for (size_t i = 0; i < step; i += WIDTH) {
            v_gate_up(gate_up + u * 2 + i, &gate, &up);
            v_store(out + u + i, v_silu_mul(gate, up));
        }
    if (u < units) { // the last block of 8 of a register of 16
        float part[32] = {0}, result[16];
        memcpy(part, gate_up + u * 2, 16 * sizeof(float));
        v_gate_up(part, &gate, &up);
        v_store(result, v_silu_mul(gate, up));
        memcpy(out + u, result, 8 * sizeof(float));
    }
}

// ---- the table ----

#define MICRO_DTYPE(name, d)                                                                       \
    static void strip_##name(const struct strip *s)                                                \
    {                                                                                              \
        strip_any(d, s);                                                                           \
    }                                                                                              \
    static void dots_##name(const void *x, const uint8_t *const *rows, size_t n, size_t dim,       \
                            float *out)                                                            \
    {                                                                                              \
        dots_any(d, x, rows, n, dim, out);                                                         \
    }                                                                                              \
    static void mix_##name(const float *weight, size_t weight_stride, const uint8_t *const *rows,  \
                           size_t n, size_t first, size_t dim, float *acc, size_t acc_stride,      \
                           size_t queries)                                                         \
    {                                                                                              \
        mix_any(d, weight, weight_stride, rows, n, first, dim, acc, acc_stride, queries);          \
    }
MICRO_DTYPE(bf16, DTYPE_BF16)
MICRO_DTYPE(f32, DTYPE_F32)

const struct micro *MICRO_ENTRY(void)
{
    static const struct micro micro = {
        .name = MICRO_NAME,
        .dtype = {[DTYPE_BF16] = {strip_bf16, dots_bf16, mix_bf16, store_bf16, load_bf16},
                  [DTYPE_F32] = {strip_f32, dots_f32, mix_f32, store_f32, load_f32}},
        .max = max_f32,
        .sum_squares = sum_squares_f32,
        .exp_sum = exp_sum_f32,
        .scale_mul = scale_mul_f32,
        .axpy = axpy_f32,
        .axpy_half = axpy_half_f32,
        .swiglu = swiglu_f32,
    };
    return &micro;
}

#endif
