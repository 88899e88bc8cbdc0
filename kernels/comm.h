// SPDX-License-Identifier: Apache-2.0
// Ranks: several devices that compute one model together, each with its own engine, stream and
// memory. What they share goes through one collective, the sum of fp32 arrays.
//
// Terms
//   rank      one member, numbered 0 .. world - 1; it holds its share of heads and of experts.
//   partial   what a rank alone adds to the residual rows; the sum over ranks is the whole.
//
// Two forms behind one table
//   in-process (comm_local.c)  ranks are threads of one process; host-accessible devices only. The
//                              sum is in ascending rank order, computed once and handed to all, so
//                              every rank has the same bits.
//   NCCL (comm_nccl.c)         one process per GPU; the call is put on the rank's CUDA stream.
//
// Contract: every rank calls the same collectives with the same counts in the same order. The
// in-process form checks the counts: a mismatch fails the call on every rank. It follows that all
// ranks must plan the same steps; docs/decisions.md says what a launcher owes them.
#ifndef POLDER_KERNELS_COMM_H
#define POLDER_KERNELS_COMM_H

#include <stddef.h>
#include <stdint.h>

#include "base/status.h"

enum { COMM_RANKS_MAX = 64 };

struct comm;

struct comm_table {
    // to[i] = sum over ranks, ascending, of from[i], on every rank; from and to may be the same
    // array. In-process: returns when it is done, `stream` is NULL. NCCL: put on the cudaStream_t
    // `stream`. DEVICE: a rank has left or failed, or the counts differ; `to` is lost.
    enum status (*all_reduce)(struct comm *comm, void *stream, const float *from, float *to,
                              size_t count);
    // This rank takes part in nothing more: calls of others that wait for it, now or later, end
    // with DEVICE. Any thread, any number of times.
    void (*leave)(struct comm *comm);
    void (*destroy)(struct comm *comm); // leaves first; no call may be running on this rank
};

// Every form begins with these.
struct comm {
    const struct comm_table *table;
    uint32_t rank, world;
};

// Fills comms[0 .. world); each is destroyed on its own, in any order.
MUST_USE enum status comm_create_local(uint32_t world, struct comm **comms, struct fault *fault);

enum { COMM_KEY_BYTES = 128 };
// The name of a group of NCCL ranks: made by one process and handed to the others.
struct comm_key {
    uint8_t bytes[COMM_KEY_BYTES];
};
// Both UNSUPPORTED, with a sentence, in a build without NCCL. comm_create_nccl binds to the calling
// thread's current CUDA device and returns when all ranks have come.
MUST_USE enum status comm_key_make(struct comm_key *out, struct fault *fault);
MUST_USE enum status comm_create_nccl(const struct comm_key *key, uint32_t rank, uint32_t world,
                                      struct comm **out, struct fault *fault);

// Recorded: to[rows][cols] = sum over ranks, ascending, of from[rows][cols]; contiguous; from == to
// is allowed. The residual rows need no addition of their own: rank 0 adds its partial to them and
// passes them as `from`.
struct all_reduce_args {
    struct comm *comm;
    const float *from;
    float *to;
    uint32_t rows, cols;
};

#endif
