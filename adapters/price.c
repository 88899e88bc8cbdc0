// SPDX-License-Identifier: Apache-2.0
#include "adapters/price.h"

#include <math.h>

#include "unified_pool/pool.h"

static const float HORIZON_STEPS = 16; // as experts look ahead (experts/policy.c)

double adapter__heat_at(const struct adapter_heat *heat, uint64_t now_us)
{
    double age = now_us > heat->at_us ? (double)(now_us - heat->at_us) : 0;
    return heat->uses * exp2(-age / ADAPTER_HALF_LIFE_US);
}

static void level_set(struct adapter_heat *heat)
{
    heat->level = log2(heat->uses) + (double)heat->at_us / ADAPTER_HALF_LIFE_US;
}

void adapter__heat_add(struct adapter_heat *heat, uint64_t now_us)
{
    heat->uses = adapter__heat_at(heat, now_us) + 1;
    heat->at_us = now_us;
    level_set(heat);
}

void adapter__heat_keep(struct adapter_heat *heat, uint64_t now_us)
{
    heat->at_us = now_us;
    level_set(heat);
}

double adapter__idle_likely(const struct adapter_heat *heat, uint64_t now_us)
{
    // A steady rate of x uses per microsecond settles at x * half_life / ln 2 decayed uses.
    double rate = adapter__heat_at(heat, now_us) * log(2) / ADAPTER_HALF_LIFE_US;
    return 1 - exp(-rate * POOL_HORIZON_US); // Poisson: at least one use
}

float adapter__price(const struct adapter_heat *heat, uint32_t users, float fetch_us_per_byte,
                     uint64_t now_us)
{
    return (float)((adapter__idle_likely(heat, now_us) + users) * fetch_us_per_byte);
}

float adapter__part_likely(uint64_t idle_steps)
{
    return HORIZON_STEPS / (HORIZON_STEPS + (float)idle_steps);
}
