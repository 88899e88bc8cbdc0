// SPDX-License-Identifier: Apache-2.0
// Counter-based random numbers: the value depends on (seed, stream, counter) alone, so a paused or
// resumed request draws what it would have drawn. Mixer: SplitMix64 (Steele et al., OOPSLA 2014).
#ifndef POLDER_BASE_RNG_H
#define POLDER_BASE_RNG_H

#include <stdint.h>

static inline uint64_t rng_mix(uint64_t z)
{
    z += 0x9e3779b97f4a7c15u;
    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9u;
    z = (z ^ (z >> 27)) * 0x94d049bb133111ebu;
    return z ^ (z >> 31);
}

static inline uint64_t rng_at(uint64_t seed, uint64_t stream, uint64_t counter)
{
    return rng_mix(rng_mix(rng_mix(seed) ^ stream) ^ counter);
}

// Uniform in [0, 1), 24 bits: exactly representable in float.
static inline float rng_uniform(uint64_t seed, uint64_t stream, uint64_t counter)
{
    return (float)(rng_at(seed, stream, counter) >> 40) * (1.0f / 16777216.0f);
}

struct rng {
    uint64_t seed, counter;
};

static inline uint64_t rng_next(struct rng *rng)
{
    return rng_at(rng->seed, 0, rng->counter++);
}

static inline uint64_t rng_below(struct rng *rng, uint64_t n)
{
    return n ? rng_next(rng) % n : 0;
}

#endif
