// SPDX-License-Identifier: Apache-2.0
// The sum over ranks as a launch: puts the collective of kernels/comm.h on the stream. There is no
// kernel here; the other ranks' arrays are reached by whoever made the comm (NCCL).
//
// Rows: all rows of the bucket are summed, since NCCL cannot read the control block; rows beyond
// the step's own hold what earlier steps left there, are allocated, and are read by nobody. Ranks
// plan the same steps, so their buckets are the same. Misses: see comm_nccl.c.
#include "kernels/cuda/cuda.h"

void cuda__all_reduce(const struct cuda_launch *l, const struct all_reduce_args *a)
{
    struct comm *comm = a->comm;
    if (!l->rows_max || !a->cols)
        return;
    if (comm->world == 1) {
        CHECK(a->from == a->to); // rank 0 adds to the residual rows themselves
        return;
    }
    size_t count = (size_t)l->rows_max * a->cols;
    if (comm->table->all_reduce(comm, l->stream, a->from, a->to, count))
        (void)cuda__fail(l->device, "a sum over ranks", (int)cudaErrorUnknown);
}
