// SPDX-License-Identifier: Apache-2.0
#include "experts/policy.h"

// 1 in 4096: below one use in the whole window. Not measured.
static const float PROBABILITY_MIN = 1.0f / 4096.0f;

float expert_count_at(const struct expert_history *history, uint32_t now)
{
    uint32_t age = now - history->step;
    if (history->count == 0.0f || age > 100 * EXPERT_WINDOW)
        return 0.0f;
    // (1 - 1/window)^age by squaring: the same bits on every machine.
    float factor = 1.0f, base = 1.0f - 1.0f / (float)EXPERT_WINDOW;
    for (; age; age >>= 1, base *= base)
        if (age & 1)
            factor *= base;
    return history->count * factor;
}

void expert_history_use(struct expert_history *history, uint32_t now)
{
    history->count = expert_count_at(history, now) + 1.0f;
    history->step = now;
}

float expert_probability(const struct expert_history *history, uint32_t now)
{
    float rate = expert_count_at(history, now) / (float)EXPERT_WINDOW;
    float miss = rate < 1.0f ? 1.0f - rate : 0.0f;
    for (int i = 1; i < EXPERT_HORIZON; i *= 2)
        miss *= miss;
    float probability = 1.0f - miss;
    return probability > PROBABILITY_MIN ? probability : PROBABILITY_MIN;
}
