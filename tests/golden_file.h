// SPDX-License-Identifier: Apache-2.0
// Reads golden.bin of tests/golden/model/NAME (format: tools/goldens/model.py).
#ifndef POLDER_TESTS_GOLDEN_FILE_H
#define POLDER_TESTS_GOLDEN_FILE_H

#include <stdbool.h>
#include <stdint.h>

struct golden_sequence {
    uint32_t tokens, rows, greedy;
    int32_t *token;        // [tokens]
    uint32_t *position;    // [rows], ascending: whose logits follow
    float *logits;         // [rows][vocab], transformers in float32
    uint16_t *logits_bf16; // [rows][vocab], bits, transformers in bfloat16
    int32_t *next;         // [greedy] float32 greedy continuation of the whole sequence
};

enum { GOLDEN_SEQUENCES_MAX = 8 };

struct golden {
    uint32_t vocab, count;
    struct golden_sequence sequences[GOLDEN_SEQUENCES_MAX];
};

// False, with a line on standard error, when the file is missing or broken. Free with golden_clear.
bool golden_load(const char *path, struct golden *out);
void golden_clear(struct golden *golden);

#endif
