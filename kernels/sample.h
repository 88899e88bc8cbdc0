// SPDX-License-Identifier: Apache-2.0
// Sampling on the device. Counter-based: the draw depends on (seed, position) alone, so that a
// resumed request repeats its tokens.
#ifndef POLDER_KERNELS_SAMPLE_H
#define POLDER_KERNELS_SAMPLE_H

#include <stdint.h>

struct sample_params {
    float temperature; // 0: greedy (lowest index among equals)
    float top_p;       // (0, 1]; smallest set of most likely tokens whose mass reaches top_p
    uint32_t top_k;    // 0: off
    uint64_t seed;
    uint64_t counter; // index of the generated token
};

enum { SAMPLE_NOT_A_NUMBER = -1 };

// Order: top_k, softmax at temperature, top_p, one uniform draw by inverse CDF over tokens in
// descending probability (ties: lower id first). logprob is that of the token under the softmax of
// the raw logits (temperature 1, no truncation). A row with NaN or +inf logits gets
// SAMPLE_NOT_A_NUMBER.
struct sample_args {
    const float *logits; // [rows][stride]
    uint32_t stride, vocab, rows;
    const struct sample_params *params; // [rows]
    int32_t *token;                     // [rows]
    float *logprob;                     // [rows] or NULL
    // top_logprobs: for each row the `tops` most likely ids and their logprobs, or tops 0.
    uint32_t tops;
    int32_t *top_token; // [rows][tops]
    float *top_logprob; // [rows][tops]
};

#endif
