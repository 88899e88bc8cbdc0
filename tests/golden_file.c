// SPDX-License-Identifier: Apache-2.0
#include "golden_file.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

// Allocates and reads count elements; NULL when the file ends before.
static void *take(FILE *file, size_t count, size_t size)
{
    void *out = calloc(count + 1, size);
    if (out && fread(out, size, count, file) != count) {
        free(out);
        out = NULL;
    }
    return out;
}

static bool load_sequence(FILE *file, uint32_t vocab, struct golden_sequence *out)
{
    uint32_t head[3];
    if (fread(head, sizeof head, 1, file) != 1 || head[1] > head[0] || head[0] > 1 << 20)
        return false;
    out->tokens = head[0];
    out->rows = head[1];
    out->greedy = head[2];
    size_t values = (size_t)out->rows * vocab;
    out->token = take(file, out->tokens, sizeof *out->token);
    out->position = take(file, out->rows, sizeof *out->position);
    out->logits = take(file, values, sizeof *out->logits);
    out->logits_bf16 = take(file, values, sizeof *out->logits_bf16);
    out->next = take(file, out->greedy, sizeof *out->next);
    return out->token && out->position && out->logits && out->logits_bf16 && out->next;
}

static bool load(FILE *file, struct golden *out)
{
    char magic[8];
    uint32_t head[3];
    if (fread(magic, sizeof magic, 1, file) != 1 || memcmp(magic, "PLDRGOLD", sizeof magic) != 0 ||
        fread(head, sizeof head, 1, file) != 1 || head[0] != 1 || head[2] > GOLDEN_SEQUENCES_MAX)
        return false;
    out->vocab = head[1];
    out->count = head[2];
    for (uint32_t i = 0; i < out->count; i++)
        if (!load_sequence(file, out->vocab, &out->sequences[i]))
            return false;
    return fgetc(file) == EOF;
}

bool golden_load(const char *path, struct golden *out)
{
    *out = (struct golden){0};
    FILE *file = fopen(path, "rb");
    bool ok = file && load(file, out);
    if (file)
        (void)fclose(file);
    if (!ok) {
        (void)fprintf(stderr, "%s: missing, or not a golden file\n", path);
        golden_clear(out);
    }
    return ok;
}

void golden_clear(struct golden *golden)
{
    for (uint32_t i = 0; i < golden->count; i++) {
        struct golden_sequence *s = &golden->sequences[i];
        free(s->token);
        free(s->position);
        free(s->logits);
        free(s->logits_bf16);
        free(s->next);
    }
    *golden = (struct golden){0};
}
