// SPDX-License-Identifier: Apache-2.0
// The in-process form of kernels/comm.h: ranks are threads of one process.
//
// A sum goes  post -> meet (breakable) -> sum my share of the elements -> meet (unbreakable).
// Every rank posts its pointers; once all have, rank r alone reads elements [n r / w, n (r+1) / w)
// of every `from`, adds them in ascending rank order and writes them to every `to`. So one thread
// touches an element and `from` may be `to`; all ranks get the same bits; the work is shared.
//
// Invariants
//   1. Slots are written before the first meeting and read between the two: a rank posts again
//      only when all have come out of the sum before.
//   2. Only the first meeting can be broken by a rank that leaves. Between the two nobody blocks on
//      anything else, so all arrive at the second, and none can return (and free its arrays) while
//      another still reads them.
//   3. Ranks that disagree on the count all see it after the first meeting, and all fail.
//
// Owned by all ranks together; the last destroy frees the group. Bound by bytes: each element is
// read and written once per rank.
#include <pthread.h>
#include <stdbool.h>
#include <stdlib.h>

#include "base/arith.h"
#include "base/check.h"
#include "kernels/comm.h"

enum { BLOCK = 256 }; // floats summed at a time: 1 KiB of stack

struct post {
    const float *from;
    float *to;
    size_t count;
};

struct group {
    pthread_mutex_t lock;
    pthread_cond_t changed;
    uint32_t world, alive, arrived;
    uint64_t meetings;
    bool broken; // a rank has left, or the ranks disagreed
    struct post posts[COMM_RANKS_MAX];
};

struct local_comm {
    struct comm base;
    struct group *group;
};

static struct group *group_of(struct comm *comm)
{
    return ((struct local_comm *)comm)->group;
}

// Waits until all ranks are here. False: a rank has left, or will not come.
static bool meet(struct group *g, bool breakable)
{
    pthread_mutex_lock(&g->lock);
    if (breakable && g->broken) {
        pthread_mutex_unlock(&g->lock);
        return false;
    }
    uint64_t meeting = g->meetings;
    if (++g->arrived == g->world) {
        g->arrived = 0;
        g->meetings++;
        pthread_cond_broadcast(&g->changed);
    }
    while (g->meetings == meeting && !(breakable && g->broken))
        pthread_cond_wait(&g->changed, &g->lock);
    bool met = g->meetings != meeting;
    g->arrived -= !met;
    pthread_mutex_unlock(&g->lock);
    return met;
}

static void local_leave(struct comm *comm)
{
    struct group *g = group_of(comm);
    pthread_mutex_lock(&g->lock);
    g->broken = true;
    pthread_cond_broadcast(&g->changed);
    pthread_mutex_unlock(&g->lock);
}

static void sum_share(const struct group *g, uint32_t rank, size_t count)
{
    float sum[BLOCK];
    size_t end = count * (rank + 1) / g->world;
    for (size_t at = count * rank / g->world, n; at < end; at += n) {
        n = min_size(BLOCK, end - at);
        for (size_t i = 0; i < n; i++)
            sum[i] = g->posts[0].from[at + i];
        for (uint32_t r = 1; r < g->world; r++)
            for (size_t i = 0; i < n; i++)
                sum[i] += g->posts[r].from[at + i];
        for (uint32_t r = 0; r < g->world; r++)
            for (size_t i = 0; i < n; i++)
                g->posts[r].to[at + i] = sum[i];
    }
}

static enum status local_all_reduce(struct comm *comm, void *stream, const float *from, float *to,
                                    size_t count)
{
    struct group *g = group_of(comm);
    CHECK(!stream);
    CHECK(count <= SIZE_MAX / sizeof(float) / COMM_RANKS_MAX);
    g->posts[comm->rank] = (struct post){from, to, count};
    if (!meet(g, true))
        return STATUS_DEVICE;
    bool agreed = true;
    for (uint32_t r = 0; r < g->world; r++)
        agreed = agreed && g->posts[r].count == count;
    if (agreed)
        sum_share(g, comm->rank, count);
    else
        local_leave(comm);
    (void)meet(g, false);
    return agreed ? STATUS_OK : STATUS_DEVICE;
}

static void group_free(struct group *g)
{
    pthread_cond_destroy(&g->changed);
    pthread_mutex_destroy(&g->lock);
    free(g);
}

static void local_destroy(struct comm *comm)
{
    if (!comm)
        return;
    struct group *g = group_of(comm);
    local_leave(comm);
    pthread_mutex_lock(&g->lock);
    bool last = --g->alive == 0;
    pthread_mutex_unlock(&g->lock);
    if (last)
        group_free(g);
    free(comm);
}

enum status comm_create_local(uint32_t world, struct comm **comms, struct fault *fault)
{
    static const struct comm_table table = {
        .all_reduce = local_all_reduce, .leave = local_leave, .destroy = local_destroy};
    if (!world || world > COMM_RANKS_MAX)
        return fault_set(fault, STATUS_INVALID, "%u ranks asked for: 1 to %d can work together.",
                         world, COMM_RANKS_MAX);
    struct group *g = calloc(1, sizeof *g);
    if (!g)
        return fault_set(fault, STATUS_NO_MEMORY, "out of memory for %u ranks.", world);
    pthread_mutex_init(&g->lock, NULL);
    pthread_cond_init(&g->changed, NULL);
    g->world = world;
    for (; g->alive < world; g->alive++) {
        struct local_comm *c = calloc(1, sizeof *c);
        if (!c)
            break;
        *c = (struct local_comm){{&table, g->alive, world}, g};
        comms[g->alive] = &c->base;
    }
    if (g->alive == world)
        return STATUS_OK;
    for (uint32_t r = 0; r < g->alive; r++)
        free(comms[r]);
    group_free(g);
    return fault_set(fault, STATUS_NO_MEMORY, "out of memory for %u ranks.", world);
}
