// SPDX-License-Identifier: Apache-2.0
// The compute threads of a CPU device. It owns the workers and their scratch; what there is to do,
// and in which order, is the stream's (stream.c).
//
// There are `threads` slots and as many workers, but slot 0 is shared: the thread that waits for a
// segment computes in it, so that an engine that submits and waits keeps `threads` cores busy with
// threads - 1 woken. Worker 0 is woken only when the engine polls, and so does other work
// meanwhile.
//
//   asleep --pulse changes--> looking --work--> computing --SPIN_LIMIT looks without work--> asleep
//
// Invariants
//   1. A thread touches a slot's scratch only while it holds the slot.
//   2. A thread that is about to sleep counts itself in `sleepers`, reads `pulse`, looks once more,
//      then sleeps only if pulse still has that value. Who makes work changes state first, then
//      reads `sleepers`. Both in sequentially consistent order: no wake-up is lost.
//   3. With nothing in flight all workers sleep in the kernel, after LINGER_LIMIT looks.
//   4. Worker 0 sleeps on `help` alone, so that a command that completes wakes nobody in vain.
#include <linux/futex.h>
#include <pthread.h>
#include <stdlib.h>
#include <string.h>
#include <sys/syscall.h>
#include <unistd.h>

#include "kernels/cpu/cpu.h"

struct worker {
    struct pool *pool;
    uint32_t index;
    pthread_t thread;
};

struct pool {
    uint32_t threads, started;
    struct slot *slots;
    struct worker *workers;
    struct cpu_stream *_Atomic streams[STREAMS_MAX];
    _Alignas(64) _Atomic uint32_t pulse;
    _Atomic uint32_t retired; // changes when a segment retires or slot 0 is given back
    _Alignas(64) _Atomic uint32_t sleepers;
    _Atomic uint32_t waiters;
    _Atomic uint32_t slot0_taken;
    _Atomic uint32_t help; // worker 0 may compute: the engine polls instead of waiting
    _Atomic uint32_t stop;
    _Alignas(64) _Atomic uint32_t readers; // workers walking over `streams`
};

static void futex(_Atomic uint32_t *word, int op, uint32_t value)
{
    syscall(SYS_futex, word, op, value, NULL, NULL, 0);
}

static void word_wake(_Atomic uint32_t *word)
{
    atomic_fetch_add(word, 1);
    futex(word, FUTEX_WAKE_PRIVATE, INT32_MAX);
}

static bool slot0_take(struct pool *pool)
{
    uint32_t no = 0;
    return atomic_compare_exchange_strong(&pool->slot0_taken, &no, 1);
}

static void slot0_give(struct pool *pool)
{
    atomic_store(&pool->slot0_taken, 0);
    if (atomic_load(&pool->waiters))
        word_wake(&pool->retired);
}

// May this worker compute now?
static bool worker_enter(struct worker *w)
{
    if (w->index > 0)
        return true;
    return atomic_load(&w->pool->help) && slot0_take(w->pool);
}

static void worker_leave(struct worker *w)
{
    if (w->index == 0)
        slot0_give(w->pool);
}

// Computes on every stream that has work. Returns whether any task was run.
static bool streams_work(struct worker *w)
{
    struct pool *pool = w->pool;
    bool any = false;
    atomic_fetch_add(&pool->readers, 1);
    for (int i = 0; i < STREAMS_MAX; i++) {
        struct cpu_stream *s = atomic_load(&pool->streams[i]);
        if (s && cpu__stream_has_work(s))
            any |= cpu__stream_work(s, &pool->slots[w->index]);
    }
    atomic_fetch_sub(&pool->readers, 1);
    return any;
}

static bool streams_have_work(struct pool *pool)
{
    bool any = false;
    atomic_fetch_add(&pool->readers, 1);
    for (int i = 0; i < STREAMS_MAX && !any; i++) {
        struct cpu_stream *s = atomic_load(&pool->streams[i]);
        any = s && cpu__stream_has_work(s);
    }
    atomic_fetch_sub(&pool->readers, 1);
    return any;
}

static void worker_sleep(struct worker *w)
{
    struct pool *pool = w->pool;
    if (w->index == 0 && (!atomic_load(&pool->help) || atomic_load(&pool->slot0_taken))) {
        atomic_store(&pool->help, 0);
        if (!atomic_load(&pool->stop))
            futex(&pool->help, FUTEX_WAIT_PRIVATE, 0);
        return;
    }
    atomic_fetch_add(&pool->sleepers, 1);
    uint32_t seen = atomic_load(&pool->pulse);
    if (!atomic_load(&pool->stop) && !streams_have_work(pool))
        futex(&pool->pulse, FUTEX_WAIT_PRIVATE, seen);
    atomic_fetch_sub(&pool->sleepers, 1);
}

// After work, the next segment often comes at once.
static bool worker_linger(struct pool *pool)
{
    for (uint32_t looks = 0; looks < LINGER_LIMIT; looks++)
        if (streams_have_work(pool))
            return true;
    return false;
}

static void *worker_main(void *context)
{
    struct worker *w = context;
    while (!atomic_load(&w->pool->stop)) {
        bool worked = false;
        if (worker_enter(w)) {
            worked = streams_work(w);
            worker_leave(w);
        }
        if (!worked || (w->index > 0 && !worker_linger(w->pool)))
            worker_sleep(w);
    }
    return NULL;
}

enum status cpu__pool_create(uint32_t threads, struct pool **out)
{
    struct pool *pool = aligned_alloc(64, round_up(sizeof *pool, 64));
    if (!pool)
        return STATUS_NO_MEMORY;
    memset(pool, 0, sizeof *pool);
    pool->threads = threads;
    pool->slots = aligned_alloc(64, threads * sizeof *pool->slots);
    pool->workers = calloc(threads, sizeof *pool->workers);
    if (!pool->slots || !pool->workers) {
        cpu__pool_destroy(pool);
        return STATUS_NO_MEMORY;
    }
    memset(pool->slots, 0, threads * sizeof *pool->slots);
    for (; pool->started < threads; pool->started++) {
        struct worker *w = &pool->workers[pool->started];
        *w = (struct worker){.pool = pool, .index = pool->started};
        if (pthread_create(&w->thread, NULL, worker_main, w)) {
            cpu__pool_destroy(pool);
            return STATUS_NO_MEMORY;
        }
    }
    *out = pool;
    return STATUS_OK;
}

void cpu__pool_destroy(struct pool *pool)
{
    atomic_store(&pool->stop, 1);
    atomic_store(&pool->help, 1);
    futex(&pool->help, FUTEX_WAKE_PRIVATE, 1);
    word_wake(&pool->pulse);
    for (uint32_t i = 0; i < pool->started; i++)
        pthread_join(pool->workers[i].thread, NULL);
    free(pool->workers);
    free(pool->slots);
    free(pool);
}

bool cpu__pool_add(struct pool *pool, struct cpu_stream *s)
{
    for (int i = 0; i < STREAMS_MAX; i++) {
        struct cpu_stream *none = NULL;
        if (atomic_compare_exchange_strong(&pool->streams[i], &none, s))
            return true;
    }
    return false;
}

void cpu__pool_remove(struct pool *pool, struct cpu_stream *s)
{
    for (int i = 0; i < STREAMS_MAX; i++) {
        struct cpu_stream *mine = s;
        atomic_compare_exchange_strong(&pool->streams[i], &mine, NULL);
    }
    while (atomic_load(&pool->readers))
        sched_yield(); // a worker may still hold the pointer
}

void cpu__pool_submitted(struct pool *pool)
{
    atomic_store(&pool->help, 0);
    if (atomic_load(&pool->sleepers))
        word_wake(&pool->pulse);
}

void cpu__pool_progress(struct pool *pool, bool retired)
{
    if (atomic_load(&pool->sleepers))
        word_wake(&pool->pulse);
    if (retired && atomic_load(&pool->waiters))
        word_wake(&pool->retired);
}

void cpu__pool_help(struct pool *pool)
{
    if (!atomic_load(&pool->help) && !atomic_exchange(&pool->help, 1))
        futex(&pool->help, FUTEX_WAKE_PRIVATE, 1);
}

// Sleeps until something is complete or open that this thread could work on in slot 0.
static void wait_for_work(struct pool *pool, struct cpu_stream *s)
{
    atomic_fetch_add(&pool->sleepers, 1);
    uint32_t seen = atomic_load(&pool->pulse);
    if (!cpu__stream_retired(s) && !cpu__stream_has_work(s))
        futex(&pool->pulse, FUTEX_WAIT_PRIVATE, seen);
    atomic_fetch_sub(&pool->sleepers, 1);
}

// Slot 0 is busy: sleeps until a segment retires.
static void wait_for_end(struct pool *pool, struct cpu_stream *s)
{
    atomic_fetch_add(&pool->waiters, 1);
    uint32_t seen = atomic_load(&pool->retired);
    if (!cpu__stream_retired(s) && atomic_load(&pool->slot0_taken))
        futex(&pool->retired, FUTEX_WAIT_PRIVATE, seen);
    atomic_fetch_sub(&pool->waiters, 1);
}

void cpu__pool_wait(struct pool *pool, struct cpu_stream *s)
{
    while (!cpu__stream_retired(s)) {
        if (!slot0_take(pool)) {
            wait_for_end(pool, s);
            continue;
        }
        bool worked = cpu__stream_work(s, &pool->slots[0]);
        slot0_give(pool);
        if (!worked)
            wait_for_work(pool, s);
    }
}
