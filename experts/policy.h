// SPDX-License-Identifier: Apache-2.0
// How likely an expert is to be used again: pure functions over numbers, no state of their own.
//
// Frequency with ageing: a use adds 1 to the expert's count, a step of its layer multiplies every
// count by EXPERT_AGE = 1 - 1 / EXPERT_WINDOW. count / EXPERT_WINDOW is then the share of the last
// steps that used it, r, and 1 - (1 - r)^EXPERT_HORIZON the probability that one of the next
// EXPERT_HORIZON steps does (as if the steps were independent). Any thread.
#ifndef POLDER_EXPERTS_POLICY_H
#define POLDER_EXPERTS_POLICY_H

#include <stdint.h>

// 64 steps: longer than a phrase, shorter than a change of subject; not measured yet. The horizon
// is a power of two so that it is squarings.
enum { EXPERT_WINDOW = 64, EXPERT_HORIZON = 16 };

struct expert_history {
    float count;   // aged number of uses at step `step` of its layer
    uint32_t step; // the step of the last use
};

void expert_history_use(struct expert_history *history, uint32_t now);
float expert_count_at(const struct expert_history *history, uint32_t now);
// In [0, 1]; never used: a small number above 0, so that a price is never nothing.
float expert_probability(const struct expert_history *history, uint32_t now);

#endif
