// SPDX-License-Identifier: Apache-2.0
// RMSNorm and SwiGLU, a task per row, bound by bytes. The sum of squares has a fixed order
// (micro.h), the rest is element-wise. What becomes an operand is rounded once, at the end.
#include <math.h>
#include <string.h>

#include "kernels/cpu/cpu.h"

void cpu__act_store(struct cpu_stream *s, void *act, size_t row, size_t cols, size_t first,
                    size_t n, const float *from)
{
    size_t row_bytes = cpu__act_row_bytes(cpu__device(s)->dtype, cols), element = cpu__element(s);
    uint8_t *to = (uint8_t *)act + row * row_bytes;
    cpu__kernel(s)->store(from, to + first * element, n);
    if (first + n == cols)
        memset(to + cols * element, 0, row_bytes - cols * element);
}

static void rmsnorm_task(struct cpu_stream *s, struct slot *slot, struct command *c, uint32_t row)
{
    const struct rmsnorm_args *a = &c->a.rmsnorm;
    const struct micro *micro = cpu__micro(s);
    const float *x = a->x + (size_t)row * a->dim;
    float mean = micro->sum_squares(x, a->dim) / (float)a->dim;
    float scale = 1.0f / sqrtf(mean + a->epsilon);
    for (size_t first = 0; first < a->dim; first += TOKENS_CHUNK * TILE_ROWS) {
        size_t n = min_size(TOKENS_CHUNK * TILE_ROWS, a->dim - first);
        float *out = a->out_f32 ? a->out_f32 + (size_t)row * a->dim + first : slot->out;
        micro->scale_mul(x + first, a->weight + first, scale, out, n);
        if (a->out)
            cpu__act_store(s, a->out, row, a->dim, first, n, out);
    }
}

static const struct operation rmsnorm_operation = {.task = rmsnorm_task};

void cpu__rmsnorm(struct stream *s, const struct rmsnorm_args *a)
{
    if (!a->rows || !a->dim)
        return;
    struct command *c = cpu__record(s, &rmsnorm_operation, a->rows);
    c->a.rmsnorm = *a;
    size_t fp32 = (size_t)a->rows * a->dim * sizeof(float);
    size_t act = a->rows * cpu__act_row_bytes(((struct cpu_device *)s->device)->dtype, a->dim);
    cpu__reads(c, a->x, fp32, 0, 1);
    cpu__writes(c, a->out, act, 0, 1);
    cpu__writes(c, a->out_f32, fp32, 0, 1);
    cpu__record_end(s, c);
}

static void swiglu_task(struct cpu_stream *s, struct slot *slot, struct command *c, uint32_t row)
{
    const struct swiglu_args *a = &c->a.swiglu;
    const float *gate_up = a->gate_up + (size_t)row * a->stride;
    for (size_t first = 0; first < a->intermediate; first += TOKENS_CHUNK * TILE_ROWS) {
        size_t n = min_size(TOKENS_CHUNK * TILE_ROWS, a->intermediate - first);
        cpu__micro(s)->swiglu(gate_up + 2 * first, slot->out, round_up(n, 8));
        cpu__act_store(s, a->out, row, a->intermediate, first, n, slot->out);
    }
}

static const struct operation swiglu_operation = {.task = swiglu_task};

void cpu__swiglu(struct stream *s, const struct swiglu_args *a)
{
    CHECK(a->stride >= tile_interleaved_rows(a->intermediate));
    if (!a->rows || !a->intermediate)
        return;
    struct command *c = cpu__record(s, &swiglu_operation, a->rows);
    c->a.swiglu = *a;
    enum dtype dtype = ((struct cpu_device *)s->device)->dtype;
    cpu__reads(c, a->gate_up, (size_t)a->rows * a->stride * sizeof(float), 0, 1);
    cpu__writes(c, a->out, a->rows * cpu__act_row_bytes(dtype, a->intermediate), 0, 1);
    cpu__record_end(s, c);
}
