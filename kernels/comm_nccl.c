// SPDX-License-Identifier: Apache-2.0
// The NCCL form of kernels/comm.h: one process per GPU. Compiled where NCCL is found
// (POLDER_NCCL); elsewhere the same two functions refuse with a sentence.
//
// One process makes the key and hands it to the others; every process selects its GPU and calls
// comm_create_nccl, which returns when all have come. A sum is put on the rank's stream and runs in
// stream order; NCCL decides the order of additions, the same on every rank, for given counts and
// world. It may be captured into a graph: every rank replays the same ones.
//
// What it does not do: a segment that misses cannot skip a collective, because NCCL's kernels know
// nothing of the control block. A world above 1 therefore needs every expert of the rank resident
// before a step, or a segment that ends at each gate; neither is built, since only one GPU has been
// at hand: with world 1 nothing is sent.
//
// A rank that leaves aborts its communicator, so that its own stream drains; the others find out by
// their own failed call. Thread: the engine thread, except leave.
#include "kernels/comm.h"

#ifdef POLDER_NCCL

#include <nccl.h>

#include <stdatomic.h>
#include <stdlib.h>
#include <string.h>

#include "base/check.h"
#include "base/log.h"

_Static_assert(sizeof(ncclUniqueId) == COMM_KEY_BYTES, "a key is NCCL's unique id");

struct nccl_comm {
    struct comm base;
    ncclComm_t nccl;
    _Atomic uint32_t gone; // aborted: `nccl` is no more
};

static enum status refuse(const char *what, ncclResult_t result, struct fault *fault)
{
    return fault_set(fault, STATUS_DEVICE, "NCCL: %s failed: %s.", what,
                     ncclGetErrorString(result));
}

static enum status nccl_all_reduce(struct comm *comm, void *stream, const float *from, float *to,
                                   size_t count)
{
    struct nccl_comm *c = (struct nccl_comm *)comm;
    if (atomic_load(&c->gone))
        return STATUS_DEVICE;
    ncclResult_t result =
        ncclAllReduce(from, to, count, ncclFloat32, ncclSum, c->nccl, (cudaStream_t)stream);
    if (result == ncclSuccess)
        return STATUS_OK;
    log_line(LOG_ERROR, "NCCL: a sum over ranks failed: %s", ncclGetErrorString(result));
    return STATUS_DEVICE;
}

static void nccl_leave(struct comm *comm)
{
    struct nccl_comm *c = (struct nccl_comm *)comm;
    if (!atomic_exchange(&c->gone, 1))
        (void)ncclCommAbort(c->nccl);
}

static void nccl_destroy(struct comm *comm)
{
    if (!comm)
        return;
    nccl_leave(comm);
    free(comm);
}

enum status comm_key_make(struct comm_key *out, struct fault *fault)
{
    ncclUniqueId id;
    ncclResult_t result = ncclGetUniqueId(&id);
    if (result != ncclSuccess)
        return refuse("making a group key", result, fault);
    memcpy(out->bytes, &id, sizeof id);
    return STATUS_OK;
}

enum status comm_create_nccl(const struct comm_key *key, uint32_t rank, uint32_t world,
                             struct comm **out, struct fault *fault)
{
    static const struct comm_table table = {
        .all_reduce = nccl_all_reduce, .leave = nccl_leave, .destroy = nccl_destroy};
    *out = NULL;
    if (!world || world > COMM_RANKS_MAX || rank >= world)
        return fault_set(fault, STATUS_INVALID, "rank %u of %u: ranks are 0 to %d of at most %d.",
                         rank, world, COMM_RANKS_MAX - 1, COMM_RANKS_MAX);
    struct nccl_comm *c = calloc(1, sizeof *c);
    if (!c)
        return fault_set(fault, STATUS_NO_MEMORY, "out of memory for rank %u.", rank);
    c->base = (struct comm){.table = &table, .rank = rank, .world = world};
    ncclUniqueId id;
    memcpy(&id, key->bytes, sizeof id);
    ncclResult_t result = ncclCommInitRank(&c->nccl, (int)world, id, (int)rank);
    if (result != ncclSuccess) {
        free(c);
        return refuse("joining the ranks", result, fault);
    }
    *out = &c->base;
    return STATUS_OK;
}

#else

enum status comm_key_make(struct comm_key *out, struct fault *fault)
{
    (void)out;
    return fault_set(fault, STATUS_UNSUPPORTED, "this build has no NCCL.");
}

enum status comm_create_nccl(const struct comm_key *key, uint32_t rank, uint32_t world,
                             struct comm **out, struct fault *fault)
{
    (void)key;
    *out = NULL;
    return fault_set(fault, STATUS_UNSUPPORTED, "this build has no NCCL: rank %u of %u.", rank,
                     world);
}

#endif
