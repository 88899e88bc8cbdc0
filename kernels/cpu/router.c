// SPDX-License-Identifier: Apache-2.0
// The MoE router: logits = x W^T in fp32, softmax over all experts, top-k in descending order
// (ties: lower index), renormalised on demand. A few rows: the logits are a command of their own, a
// task per 16 experts, so that all threads share the bytes of W; many rows: a task per row does
// everything. The dot and the rest are the same code, so the bits are the same.
#include <math.h>
#include <string.h>

#include "kernels/cpu/cpu.h"

enum { EXPERTS_TASK = 16 };

static void logits_of(struct cpu_stream *s, struct slot *slot, const struct router_args *a,
                      uint32_t row, uint32_t first, uint32_t count, float *logits)
{
    for (uint32_t e = 0; e < count; e += RANK_MAX) {
        uint32_t n = (uint32_t)min_size(RANK_MAX, count - e);
        for (uint32_t i = 0; i < n; i++)
            slot->rows[i] = (const uint8_t *)(a->weight + (size_t)(first + e + i) * a->dim);
        cpu__micro(s)->dtype[DTYPE_F32].dots(a->x + (size_t)row * a->dim, slot->rows, n, a->dim,
                                             logits + e);
    }
}

static void lose_row(const struct router_args *a, uint32_t row)
{
    for (uint32_t k = 0; k < a->top_k; k++) {
        a->expert[(size_t)row * a->top_k + k] = k;
        a->gate[(size_t)row * a->top_k + k] = NAN;
    }
}

// Chooses from logits, which are overwritten.
static void choose(struct cpu_stream *s, const struct router_args *a, uint32_t row, float *logits)
{
    for (uint32_t e = 0; e < a->experts; e++)
        if (!isfinite(logits[e])) {
            lose_row(a, row);
            return;
        }
    float max = cpu__micro(s)->max(logits, a->experts);
    float sum = cpu__micro(s)->exp_sum(logits, logits, a->experts, max, 1.0f), kept = 0;
    uint32_t *expert = a->expert + (size_t)row * a->top_k;
    float *gate = a->gate + (size_t)row * a->top_k;
    for (uint32_t k = 0; k < a->top_k; k++) {
        uint32_t best = UINT32_MAX;
        for (uint32_t e = 0; e < a->experts; e++)
            if (logits[e] >= 0 && (best == UINT32_MAX || logits[e] > logits[best]))
                best = e;
        expert[k] = best;
        gate[k] = logits[best] / sum;
        kept += gate[k];
        logits[best] = -1; // taken
    }
    for (uint32_t k = 0; a->normalize && k < a->top_k; k++)
        gate[k] /= kept;
}

static void logits_task(struct cpu_stream *s, struct slot *slot, struct command *c, uint32_t task)
{
    const struct router_args *a = &c->a.router;
    uint32_t first = task * EXPERTS_TASK;
    uint32_t n = (uint32_t)min_size(EXPERTS_TASK, a->experts - first);
    float out[EXPERTS_TASK];
    for (uint32_t row = 0; row < a->rows; row++) {
        logits_of(s, slot, a, row, first, n, out);
        memcpy(s->router_logits + (size_t)row * EXPERTS_MAX + first, out, n * sizeof(float));
    }
}

static void choose_task(struct cpu_stream *s, struct slot *slot, struct command *c, uint32_t row)
{
    const struct router_args *a = &c->a.router;
    float *logits = slot->logits;
    if (a->rows <= ROUTER_ROWS)
        logits = s->router_logits + (size_t)row * EXPERTS_MAX;
    else
        logits_of(s, slot, a, row, 0, a->experts, logits);
    choose(s, a, row, logits);
}

static const struct operation logits_operation = {.task = logits_task};
static const struct operation choose_operation = {.task = choose_task};

void cpu__router(struct stream *stream, const struct router_args *a)
{
    struct cpu_stream *s = (struct cpu_stream *)stream;
    CHECK(a->experts && a->experts <= EXPERTS_MAX && a->top_k && a->top_k <= a->experts);
    if (!a->rows)
        return;
    size_t x_bytes = (size_t)a->rows * a->dim * sizeof(float);
    size_t chosen = (size_t)a->rows * a->top_k, logits_bytes = (size_t)ROUTER_ROWS * EXPERTS_MAX;
    if (a->rows <= ROUTER_ROWS) {
        struct command *c =
            cpu__record(stream, &logits_operation, (uint32_t)div_up(a->experts, EXPERTS_TASK));
        c->a.router = *a;
        cpu__reads(c, a->x, x_bytes, 0, 1);
        cpu__writes(c, s->router_logits, logits_bytes * sizeof(float), 0, 1);
        cpu__record_end(stream, c);
    }
    struct command *c = cpu__record(stream, &choose_operation, a->rows);
    c->a.router = *a;
    cpu__reads(c, a->x, x_bytes, 0, 1);
    cpu__writes(c, s->router_logits, logits_bytes * sizeof(float), 0, 1);
    cpu__writes(c, a->expert, chosen * sizeof(uint32_t), 0, 1);
    cpu__writes(c, a->gate, chosen * sizeof(float), 0, 1);
    cpu__record_end(stream, c);
}
