// SPDX-License-Identifier: Apache-2.0
// BLAKE2b-256 (RFC 7693) of LANES pieces at once, a piece to each lane of a vector. No include
// guard: hash_pieces.c includes it once for every width, with LANES, LANES_NAME and LANES_TARGET
// defined. Nothing else includes it.
//
// All pieces are HASH_PIECE bytes long and unkeyed. v and m are [word][lane]; the message words,
// [lane][word] in memory, are transposed when they are loaded.
#define LANES_CAT2(a, b) a##b
#define LANES_CAT(a, b) LANES_CAT2(a, b)
#define LANES_VECTOR LANES_CAT(LANES_NAME, _vector)

typedef uint64_t LANES_VECTOR __attribute__((vector_size(8 * LANES)));

#define LANES_ROTATE(x, n) ((x) >> (n) | (x) << (64 - (n)))
#define LANES_MIX(a, b, c, d, x, y)                                                                \
    do {                                                                                           \
        v[a] = v[a] + v[b] + m[x];                                                                 \
        v[d] = LANES_ROTATE(v[d] ^ v[a], 32);                                                      \
        v[c] = v[c] + v[d];                                                                        \
        v[b] = LANES_ROTATE(v[b] ^ v[c], 24);                                                      \
        v[a] = v[a] + v[b] + m[y];                                                                 \
        v[d] = LANES_ROTATE(v[d] ^ v[a], 16);                                                      \
        v[c] = v[c] + v[d];                                                                        \
        v[b] = LANES_ROTATE(v[b] ^ v[c], 63);                                                      \
    } while (0)
// The order in which the sixteen message words enter a round.
#define LANES_ROUND(a, b, c, d, e, f, g, h, i, j, k, l, n, o, p, q)                                \
    do {                                                                                           \
        LANES_MIX(0, 4, 8, 12, a, b);                                                              \
        LANES_MIX(1, 5, 9, 13, c, d);                                                              \
        LANES_MIX(2, 6, 10, 14, e, f);                                                             \
        LANES_MIX(3, 7, 11, 15, g, h);                                                             \
        LANES_MIX(0, 5, 10, 15, i, j);                                                             \
        LANES_MIX(1, 6, 11, 12, k, l);                                                             \
        LANES_MIX(2, 7, 8, 13, n, o);                                                              \
        LANES_MIX(3, 4, 9, 14, p, q);                                                              \
    } while (0)

// The eight words from `at` of every lane, as [word][lane].
LANES_TARGET static inline void LANES_CAT(LANES_NAME, _load)(const uint8_t *const piece[LANES],
                                                             size_t at, LANES_VECTOR m[8])
{
    for (int half = 0; half < 8; half += LANES) {
        LANES_VECTOR row[LANES];
        for (int lane = 0; lane < LANES; lane++)
            memcpy(&row[lane], piece[lane] + at + 8 * half, sizeof row[lane]);
        LANES_TRANSPOSE(row, m + half);
    }
}

LANES_TARGET static void LANES_NAME(const uint8_t *const piece[LANES], struct digest out[LANES])
{
    LANES_VECTOR h[8], v[16], m[16];
    for (int i = 0; i < 8; i++)
        h[i] = (LANES_VECTOR){0} + iv[i];
    h[0] ^= (LANES_VECTOR){0} + (0x01010000 ^ DIGEST_BYTES); // fanout 1, depth 1, no key
    for (size_t at = 0; at < HASH_PIECE; at += BLOCK) {
        LANES_CAT(LANES_NAME, _load)(piece, at, m);
        LANES_CAT(LANES_NAME, _load)(piece, at + BLOCK / 2, m + 8);
        for (int i = 0; i < 8; i++) {
            v[i] = h[i];
            v[i + 8] = (LANES_VECTOR){0} + iv[i];
        }
        v[12] ^= (LANES_VECTOR){0} + (at + BLOCK); // bytes so far
        if (at + BLOCK == HASH_PIECE)
            v[14] = ~v[14]; // the last block
        LANES_ROUND(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
        LANES_ROUND(14, 10, 4, 8, 9, 15, 13, 6, 1, 12, 0, 2, 11, 7, 5, 3);
        LANES_ROUND(11, 8, 12, 0, 5, 2, 15, 13, 10, 14, 3, 6, 7, 1, 9, 4);
        LANES_ROUND(7, 9, 3, 1, 13, 12, 11, 14, 2, 6, 5, 10, 4, 0, 15, 8);
        LANES_ROUND(9, 0, 5, 7, 2, 4, 10, 15, 14, 1, 11, 12, 6, 8, 3, 13);
        LANES_ROUND(2, 12, 6, 10, 0, 11, 8, 3, 4, 13, 7, 5, 15, 14, 1, 9);
        LANES_ROUND(12, 5, 1, 15, 14, 13, 4, 10, 0, 7, 6, 3, 9, 2, 8, 11);
        LANES_ROUND(13, 11, 7, 14, 12, 1, 3, 9, 5, 0, 15, 4, 8, 6, 2, 10);
        LANES_ROUND(6, 15, 14, 9, 11, 3, 0, 8, 12, 2, 13, 7, 1, 4, 10, 5);
        LANES_ROUND(10, 2, 8, 4, 7, 6, 1, 5, 15, 11, 9, 14, 3, 12, 13, 0);
        LANES_ROUND(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
        LANES_ROUND(14, 10, 4, 8, 9, 15, 13, 6, 1, 12, 0, 2, 11, 7, 5, 3);
        for (int i = 0; i < 8; i++)
            h[i] ^= v[i] ^ v[i + 8];
    }
    for (int lane = 0; lane < LANES; lane++)
        for (int word = 0; word < DIGEST_BYTES / 8; word++) {
            uint64_t value = h[word][lane];
            memcpy(out[lane].bytes + 8 * word, &value, sizeof value);
        }
}

#undef LANES_CAT2
#undef LANES_CAT
#undef LANES_VECTOR
#undef LANES_ROTATE
#undef LANES_MIX
#undef LANES_ROUND
