// SPDX-License-Identifier: Apache-2.0
// The sum over ranks as a command: one task that may sleep until the other ranks have come.
//
// It is a fence, so collectives run in the order they were recorded in, whatever overlaps around
// them. The thread that sleeps in it is one of this device's own; the other ranks' devices have
// theirs, and no rank waits for anything but the same collective of the others, so none waits in a
// circle. A miss skips it like any command: the rank then comes to it in a later segment, and the
// others wait.
#include "kernels/cpu/cpu.h"

static void all_reduce_task(struct cpu_stream *s, struct slot *slot, struct command *c,
                            uint32_t task)
{
    (void)slot;
    (void)task;
    const struct all_reduce_args *a = &c->a.all_reduce;
    if (a->comm->table->all_reduce(a->comm, NULL, a->from, a->to, (size_t)a->rows * a->cols))
        s->failed = true;
}

static const struct operation all_reduce_operation = {.task = all_reduce_task, .fence = true};

void cpu__all_reduce(struct stream *s, const struct all_reduce_args *a)
{
    if (!a->rows || !a->cols)
        return;
    struct command *c = cpu__record(s, &all_reduce_operation, 1);
    c->a.all_reduce = *a;
    cpu__record_end(s, c);
}
