// SPDX-License-Identifier: Apache-2.0
// Copies and look-ups, bound by bytes: copy, zero, scatter (fences: they may change page tables, KV
// pages and anything else the spans of other commands do not name), gather and embed (a task per
// row).
#include <math.h>
#include <string.h>

#include "kernels/cpu/cpu.h"

static void copy_task(struct cpu_stream *s, struct slot *slot, struct command *c, uint32_t task)
{
    (void)s;
    (void)slot;
    const struct copy_args *a = &c->a.copy;
    size_t first = (size_t)task * COPY_CHUNK, bytes = min_size(COPY_CHUNK, a->bytes - first);
    if (a->from)
        memcpy(a->to + first, a->from + first, bytes);
    else
        memset(a->to + first, 0, bytes);
}

static const struct operation copy_operation = {.task = copy_task, .fence = true};

static void record_copy(struct stream *s, void *to, const void *from, size_t bytes)
{
    if (!bytes)
        return;
    size_t tasks = div_up(bytes, COPY_CHUNK);
    CHECK(tasks < UINT32_MAX / 2);
    struct command *c = cpu__record(s, &copy_operation, (uint32_t)tasks);
    c->a.copy = (struct copy_args){to, from, bytes};
    cpu__record_end(s, c);
}

void cpu__copy(struct stream *s, void *to, const void *from, size_t bytes)
{
    CHECK(from || !bytes);
    record_copy(s, to, from, bytes);
}

void cpu__zero(struct stream *s, void *to, size_t bytes)
{
    record_copy(s, to, NULL, bytes);
}

static void scatter_task(struct cpu_stream *s, struct slot *slot, struct command *c, uint32_t task)
{
    (void)s;
    (void)slot;
    (void)task;
    const struct scatter_args *a = &c->a.scatter;
    for (uint32_t i = 0; i < a->count; i++)
        a->table[a->index[i]] = a->value[i];
}

static const struct operation scatter_operation = {.task = scatter_task, .fence = true};

void cpu__scatter(struct stream *s, const struct scatter_args *a)
{
    if (!a->count)
        return;
    struct command *c = cpu__record(s, &scatter_operation, 1);
    c->a.scatter = *a;
    cpu__record_end(s, c);
}

static void gather_task(struct cpu_stream *s, struct slot *slot, struct command *c, uint32_t task)
{
    (void)s;
    (void)slot;
    const struct gather_args *a = &c->a.gather;
    memcpy(a->to + (size_t)task * a->dim, a->from + (size_t)a->index[task] * a->dim,
           a->dim * sizeof(float));
}

static const struct operation gather_operation = {.task = gather_task};

// The rows read are not known when recording: `from` counts as read as far as a pointer reaches.
void cpu__gather(struct stream *s, const struct gather_args *a)
{
    if (!a->rows || !a->dim)
        return;
    struct command *c = cpu__record(s, &gather_operation, a->rows);
    c->a.gather = *a;
    cpu__reads(c, a->from, SIZE_MAX - (size_t)a->from, 0, 1);
    cpu__writes(c, a->to, a->rows * (size_t)a->dim * sizeof(float), 0, 1);
    cpu__record_end(s, c);
}

static void embed_task(struct cpu_stream *s, struct slot *slot, struct command *c, uint32_t task)
{
    (void)slot;
    const struct embed_args *a = &c->a.embed;
    size_t row_bytes = a->dim * cpu__element(s);
    float *x = a->x + (size_t)task * a->dim;
    if (a->token[task] >= 0 && (uint32_t)a->token[task] < a->vocab)
        cpu__kernel(s)->load((const uint8_t *)a->table + (size_t)a->token[task] * row_bytes, x,
                             a->dim);
    else // what sample gives a row that is lost: it stays lost
        for (uint32_t i = 0; i < a->dim; i++)
            x[i] = NAN;
}

static const struct operation embed_operation = {.task = embed_task};

void cpu__embed(struct stream *s, const struct embed_args *a)
{
    if (!a->rows || !a->dim)
        return;
    struct command *c = cpu__record(s, &embed_operation, a->rows);
    c->a.embed = *a;
    cpu__reads(c, a->token, a->rows * sizeof *a->token, 0, 1);
    cpu__writes(c, a->x, a->rows * (size_t)a->dim * sizeof(float), 0, 1);
    cpu__record_end(s, c);
}
