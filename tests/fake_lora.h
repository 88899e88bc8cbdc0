// SPDX-License-Identifier: Apache-2.0
// The fake device's LoRA (fake_device.c), by the fingerprints of sim_fingerprint.h.
#ifndef POLDER_TESTS_FAKE_LORA_H
#define POLDER_TESTS_FAKE_LORA_H

#include <string.h>

#include "kernels/lora.h"
#include "sim_fingerprint.h"

// Rows of words: what a row is stands in its first eight bytes.

static inline void put(void *rows, size_t stride_bytes, size_t row, uint64_t word)
{
    memcpy((uint8_t *)rows + row * stride_bytes, &word, sizeof word);
}

static inline uint64_t get(const void *rows, size_t stride_bytes, size_t row)
{
    return print_word((const uint8_t *)rows + row * stride_bytes);
}

enum { ACT = sizeof(uint64_t) }; // bytes of a row of an activation

static inline size_t f32(size_t columns)
{
    return columns * sizeof(float);
}

void fake_run_shrink(const struct lora_shrink_args *a);
void fake_run_lora_gather(const struct lora_gather_args *a);
void fake_run_expand(const struct lora_expand_args *a);
// What the adapter of a row adds to an expert's product; 0 without one.
uint64_t fake_expert_lora(const struct lora_batch *b, uint32_t row, uint32_t layer,
                          enum lora_module module, uint32_t expert, uint64_t x);

#endif
