// SPDX-License-Identifier: Apache-2.0
// The arithmetic of the fake device, shared with the reference that predicts its tokens: every
// operation is a hash of what the real one would read. A row is one 64-bit word; a weight matrix, a
// tile, a row of an adapter is the first 8 bytes of it. So a wrong page, row, order, adapter or
// expert gives a wrong token.
#ifndef POLDER_TESTS_SIM_FINGERPRINT_H
#define POLDER_TESTS_SIM_FINGERPRINT_H

#include <stdint.h>
#include <string.h>

#include "base/rng.h"
#include "kernels/sample.h"

enum {
    PRINT_COLUMNS = 32
}; // outputs of a matrix differ from one block of so many columns to the next

// Requests with this in the upper half of their seed meet a value that is not a number at token
// (seed & 0xffff).
#define PRINT_NAN_SEED 0xbad0bad0u

static inline uint64_t print_mix(uint64_t a, uint64_t b)
{
    return rng_mix(a * 0x9fb21c651e98df25u + b);
}

static inline uint64_t print_word(const void *at)
{
    uint64_t word;
    memcpy(&word, at, sizeof word);
    return word;
}

// Column `column` of the row of a matrix product whose column 0 is `word`.
static inline uint64_t print_column(uint64_t word, uint64_t column)
{
    return word + column * 0xd6e8feb86659fd93u;
}

static inline uint32_t print_shrink(uint64_t x, uint64_t a_row, uint32_t j)
{
    return (uint32_t)(print_mix(x, a_row + j) >> 32);
}

// What row j of B^T adds, before the scale.
static inline uint64_t print_expand(uint32_t hidden, uint64_t b_row, uint32_t j)
{
    return print_mix(hidden, b_row + j);
}

static inline uint64_t print_scaled(uint64_t sum, float scale)
{
    uint32_t bits;
    memcpy(&bits, &scale, sizeof bits);
    return print_mix(sum, bits);
}

static inline uint64_t print_query(uint64_t q, uint64_t weight, uint64_t rope, uint32_t position)
{
    return print_mix(q, weight + rope * (position + 1));
}

static inline uint64_t print_kv(uint64_t k, uint64_t v, uint64_t weight, uint64_t rope,
                                uint32_t position)
{
    return print_mix(print_mix(k, weight + rope * (position + 1)), v);
}

// Stands beside a KV slot's fingerprint: a slot that was never written, or for another place,
// shows.
static inline uint64_t print_slot_magic(uint64_t print, uint32_t position, uint32_t layer)
{
    return ~print ^ ((uint64_t)(position + 1) << 32 | (layer + 1));
}

// The i-th distinct expert of a row; `chosen` are the i before. Low numbers are likelier, so that
// there is something to keep.
static inline uint32_t print_expert(uint64_t word, uint32_t i, uint32_t experts,
                                    const uint32_t *chosen)
{
    uint64_t draw = print_mix(word, i);
    uint32_t a = (uint32_t)(draw & 0xffff) % experts, b = (uint32_t)(draw >> 16 & 0xffff) % experts;
    uint32_t expert = a < b ? a : b;
    for (uint32_t k = 0; k < i;) {
        if (chosen[k] == expert) {
            expert = (expert + 1) % experts;
            k = 0;
        } else {
            k++;
        }
    }
    return expert;
}

static inline uint32_t print_gate(uint64_t word, uint32_t i)
{
    return (uint32_t)print_mix(word, 1000 + i);
}

// Next token from the word of the logits row.
static inline int32_t print_token(uint64_t logits, const struct sample_params *p, uint32_t vocab)
{
    if (p->seed >> 32 == PRINT_NAN_SEED && (p->seed & 0xffff) == p->counter)
        return SAMPLE_NOT_A_NUMBER;
    if (p->temperature > 0) {
        uint32_t bits[2];
        memcpy(&bits[0], &p->temperature, sizeof bits[0]);
        memcpy(&bits[1], &p->top_p, sizeof bits[1]);
        logits = print_mix(logits, print_mix(p->seed, p->counter) + p->top_k);
        logits = print_mix(logits, (uint64_t)bits[0] << 32 | bits[1]);
    }
    return (int32_t)(logits % vocab);
}

static inline int32_t print_top_token(uint64_t logits, uint32_t i, uint32_t vocab)
{
    return (int32_t)(print_mix(logits, 77 + i) % vocab);
}

static inline float print_logprob(uint64_t logits)
{
    return -(float)(logits >> 52) / 64.0f;
}

#endif
