// SPDX-License-Identifier: Apache-2.0
// hash_pieces: the lower level of a tree hash, several pieces at once.
//
// One BLAKE2b is a chain of dependent additions: libsodium's takes 3 cycles a byte whatever the
// machine could do beside it. Pieces depend on nothing, so eight of them (AVX-512), or four (AVX2),
// go through the lanes of a vector in about the time of one. Measured on one core of the
// development machine, 100 MiB in memory: libsodium 0.98 GB/s, four lanes 1.6 (AVX2) or 2.2
// (AVX-512), eight 3.7.
//
// What comes out does not depend on how it was computed. Lanes that are left over hash the first
// piece once more; a single piece, the short one at the end and other processors take libsodium's.
#include <string.h>

#include "base/arith.h"
#include "base/hash.h"

#if defined(__x86_64__)

enum { BLOCK = 128 };

static const uint64_t iv[8] = {0x6a09e667f3bcc908, 0xbb67ae8584caa73b, 0x3c6ef372fe94f82b,
                               0xa54ff53a5f1d36f1, 0x510e527fade682d1, 0x9b05688c2b3e6c1f,
                               0x1f83d9abfb41bd6b, 0x5be0cd19137e2179};

// The two halves of a pair of vectors, interleaved in steps of `step` words.
#define SHUFFLE4(a, b, w, x, y, z) __builtin_shufflevector(a, b, w, x, y, z)
#define TRANSPOSE4(row, out)                                                                       \
    do {                                                                                           \
        four_vector a = SHUFFLE4((row)[0], (row)[1], 0, 4, 2, 6);                                  \
        four_vector b = SHUFFLE4((row)[0], (row)[1], 1, 5, 3, 7);                                  \
        four_vector c = SHUFFLE4((row)[2], (row)[3], 0, 4, 2, 6);                                  \
        four_vector d = SHUFFLE4((row)[2], (row)[3], 1, 5, 3, 7);                                  \
        (out)[0] = SHUFFLE4(a, c, 0, 1, 4, 5);                                                     \
        (out)[1] = SHUFFLE4(b, d, 0, 1, 4, 5);                                                     \
        (out)[2] = SHUFFLE4(a, c, 2, 3, 6, 7);                                                     \
        (out)[3] = SHUFFLE4(b, d, 2, 3, 6, 7);                                                     \
    } while (0)

#define LANES 4
#define LANES_NAME four
#define LANES_TARGET __attribute__((target("avx2")))
#define LANES_TRANSPOSE TRANSPOSE4
#include "base/hash_lanes.h"
#undef LANES_NAME
#undef LANES_TARGET

// The same with rotations in one instruction and twice the registers.
#define LANES_NAME four_wide
#define LANES_TARGET __attribute__((target("avx512f,avx512vl")))
#define four_vector four_wide_vector
#include "base/hash_lanes.h"
#undef LANES
#undef LANES_NAME
#undef LANES_TARGET
#undef LANES_TRANSPOSE
#undef four_vector

#define SHUFFLE8(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#define TRANSPOSE8(row, out)                                                                       \
    do {                                                                                           \
        eight_vector a[8], b[8];                                                                   \
        for (int i = 0; i < 8; i += 2) {                                                           \
            a[i] = SHUFFLE8((row)[i], (row)[i + 1], 0, 8, 2, 10, 4, 12, 6, 14);                    \
            a[i + 1] = SHUFFLE8((row)[i], (row)[i + 1], 1, 9, 3, 11, 5, 13, 7, 15);                \
        }                                                                                          \
        for (int i = 0; i < 8; i += 4)                                                             \
            for (int k = 0; k < 2; k++) {                                                          \
                b[i + k] = SHUFFLE8(a[i + k], a[i + k + 2], 0, 1, 8, 9, 4, 5, 12, 13);             \
                b[i + k + 2] = SHUFFLE8(a[i + k], a[i + k + 2], 2, 3, 10, 11, 6, 7, 14, 15);       \
            }                                                                                      \
        for (int k = 0; k < 4; k++) {                                                              \
            (out)[k] = SHUFFLE8(b[k], b[k + 4], 0, 1, 2, 3, 8, 9, 10, 11);                         \
            (out)[k + 4] = SHUFFLE8(b[k], b[k + 4], 4, 5, 6, 7, 12, 13, 14, 15);                   \
        }                                                                                          \
    } while (0)

#define LANES 8
#define LANES_NAME eight
#define LANES_TARGET __attribute__((target("avx512f,avx512vl")))
#define LANES_TRANSPOSE TRANSPOSE8
#include "base/hash_lanes.h"

enum { WIDEST = 8 };

// Hashes some pieces, as many as go at once, and says how many.
static uint32_t take(const uint8_t *pieces, size_t whole, enum hash_width width,
                     struct digest out[WIDEST])
{
    const uint8_t *piece[WIDEST];
    uint32_t lanes = width == HASH_EIGHT && whole > 4 ? 8 : width > HASH_ONE && whole > 1 ? 4 : 1;
    uint32_t n = (uint32_t)min_size(lanes, whole);
    for (uint32_t i = 0; i < lanes; i++)
        piece[i] = pieces + (i < n ? (size_t)i * HASH_PIECE : 0);
    if (lanes == 8)
        eight(piece, out);
    else if (lanes == 4 && width == HASH_EIGHT)
        four_wide(piece, out);
    else if (lanes == 4)
        four(piece, out);
    else
        out[0] = hash_bytes(NULL, pieces, HASH_PIECE);
    return n;
}

enum hash_width hash_width_here(void)
{
    bool wide = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512vl");
    return wide ? HASH_EIGHT : __builtin_cpu_supports("avx2") ? HASH_FOUR : HASH_ONE;
}

#else

enum { WIDEST = 1 };

static uint32_t take(const uint8_t *pieces, size_t whole, enum hash_width width,
                     struct digest out[WIDEST])
{
    (void)whole;
    (void)width;
    out[0] = hash_bytes(NULL, pieces, HASH_PIECE);
    return 1;
}

enum hash_width hash_width_here(void)
{
    return HASH_ONE;
}

#endif

void hash_pieces_as(struct hash_stream *stream, const void *data, size_t bytes,
                    enum hash_width width)
{
    const uint8_t *at = data;
    for (size_t left = bytes / HASH_PIECE; left;) {
        struct digest out[WIDEST];
        uint32_t n = take(at, left, width, out);
        hash_update(stream, out, n * sizeof *out);
        at += (size_t)n * HASH_PIECE;
        left -= n;
    }
    if (bytes % HASH_PIECE) {
        struct digest last = hash_bytes(NULL, at, bytes % HASH_PIECE);
        hash_update(stream, &last, sizeof last);
    }
}

void hash_pieces(struct hash_stream *stream, const void *data, size_t bytes)
{
    hash_pieces_as(stream, data, bytes, hash_width_here());
}
