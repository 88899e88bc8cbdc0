// SPDX-License-Identifier: Apache-2.0
// The link of the CPU backend: for each resource a ring of mailboxes for a chunk each and a thread,
// for reads perhaps several, moving bytes with memcpy or a read and holding the result back until
// the configured speed allows it. It decides nothing about order.
//
//   EMPTY --start (engine)--> POSTED --a thread--> TAKEN --the same--> DONE --poll (engine)-->
//   EMPTY
//
// The side whose turn it is owns the chunk; `state` (release/acquire) hands it over. Both sides go
// round the ring, so that chunks are told of in the order in which they were started. A thread
// without a chunk sleeps on the condition variable and uses no CPU; one that paces sleeps on the
// clock.
#include "unified_pool/copy.h"

#include <pthread.h>
#include <stdatomic.h>
#include <stdlib.h>
#include <string.h>
#include <sys/prctl.h>
#include <time.h>

#include "base/check.h"

enum mailbox_state { MAILBOX_EMPTY, MAILBOX_POSTED, MAILBOX_TAKEN, MAILBOX_DONE };

struct mailbox {
    _Atomic int state;
    struct copy_chunk chunk;
    enum status status;
    uint64_t posted_ns;
};

struct worker {
    pthread_t threads[COPY_READ_THREADS_MAX];
    uint32_t running;     // threads
    pthread_mutex_t lock; // guards the sleep and `next`
    pthread_cond_t wake;
    _Atomic bool stop;
    struct mailbox mailbox[COPY_DEPTH_MAX];
    uint32_t next;         // to be taken
    uint32_t first, count; // the engine's: under way
    uint64_t free_ns;      // of the only thread: when the chunk before had been moved, at its speed
    double ns_per_byte;
    uint64_t latency_ns;
    bool is_made;
};

struct thread_link {
    struct link link;
    struct worker workers[COPY_RESOURCES];
};

// Nanoseconds, which base/clock.h does not offer: pacing is mechanism, no policy depends on it.
static uint64_t now_ns(void)
{
    struct timespec t;
    (void)clock_gettime(CLOCK_MONOTONIC, &t);
    return (uint64_t)t.tv_sec * 1000000000u + (uint64_t)t.tv_nsec;
}

static void sleep_until(uint64_t ns)
{
    struct timespec t = {.tv_sec = (time_t)(ns / 1000000000u), .tv_nsec = (long)(ns % 1000000000u)};
    while (clock_nanosleep(CLOCK_MONOTONIC, TIMER_ABSTIME, &t, NULL) != 0)
        ;
}

static enum status move_bytes(const struct copy_chunk *chunk)
{
    if (chunk->resource == COPY_READ)
        return reader_read(chunk->file, chunk->offset, chunk->to, chunk->bytes);
    memcpy(chunk->to, chunk->from, chunk->bytes);
    return STATUS_OK;
}

static bool is_posted(const struct mailbox *mailbox)
{
    return atomic_load_explicit(&mailbox->state, memory_order_acquire) == MAILBOX_POSTED;
}

// The next chunk, which is the caller's then; NULL: stop.
static struct mailbox *take(struct worker *worker)
{
    struct mailbox *taken = NULL;
    (void)pthread_mutex_lock(&worker->lock);
    while (!is_posted(&worker->mailbox[worker->next]) && !atomic_load(&worker->stop))
        (void)pthread_cond_wait(&worker->wake, &worker->lock);
    if (!atomic_load(&worker->stop)) {
        taken = &worker->mailbox[worker->next];
        worker->next = (worker->next + 1) % COPY_DEPTH_MAX;
        atomic_store_explicit(&taken->state, MAILBOX_TAKEN, memory_order_relaxed);
    }
    (void)pthread_mutex_unlock(&worker->lock);
    return taken;
}

// Until the configured speed would have moved it.
static void pace(struct worker *worker, const struct mailbox *mailbox)
{
    uint64_t wait_ns =
        worker->latency_ns + (uint64_t)((double)mailbox->chunk.bytes * worker->ns_per_byte);
    if (!wait_ns)
        return;
    uint64_t began_ns = mailbox->posted_ns > worker->free_ns ? mailbox->posted_ns : worker->free_ns;
    if (!atomic_load(&worker->stop))
        sleep_until(began_ns + wait_ns);
    worker->free_ns = began_ns + wait_ns;
}

static void *work(void *argument)
{
    struct worker *worker = argument;
    (void)prctl(PR_SET_TIMERSLACK, 1); // the default of 50 us is longer than most chunks
    for (struct mailbox *mailbox; (mailbox = take(worker));) {
        mailbox->status = move_bytes(&mailbox->chunk);
        pace(worker, mailbox);
        atomic_store_explicit(&mailbox->state, MAILBOX_DONE, memory_order_release);
    }
    return NULL;
}

static void thread_link_start(struct link *link, const struct copy_chunk *chunk)
{
    struct worker *worker = &((struct thread_link *)link)->workers[chunk->resource];
    struct mailbox *mailbox = &worker->mailbox[(worker->first + worker->count++) % COPY_DEPTH_MAX];
    CHECK(worker->count <= COPY_DEPTH_MAX && atomic_load(&mailbox->state) == MAILBOX_EMPTY);
    mailbox->chunk = *chunk;
    mailbox->posted_ns = now_ns();
    (void)pthread_mutex_lock(&worker->lock);
    atomic_store_explicit(&mailbox->state, MAILBOX_POSTED, memory_order_release);
    (void)pthread_cond_signal(&worker->wake);
    (void)pthread_mutex_unlock(&worker->lock);
}

static bool thread_link_poll(struct link *link, enum copy_resource resource, enum status *status)
{
    struct worker *worker = &((struct thread_link *)link)->workers[resource];
    struct mailbox *mailbox = &worker->mailbox[worker->first];
    *status = STATUS_OK;
    if (!worker->count)
        return true;
    if (atomic_load_explicit(&mailbox->state, memory_order_acquire) != MAILBOX_DONE)
        return false;
    *status = mailbox->status;
    atomic_store_explicit(&mailbox->state, MAILBOX_EMPTY, memory_order_relaxed);
    worker->first = (worker->first + 1) % COPY_DEPTH_MAX;
    worker->count--;
    return true;
}

static void thread_link_destroy(struct link *link)
{
    struct thread_link *self = (struct thread_link *)link;
    for (int r = 0; r < COPY_RESOURCES; r++) {
        struct worker *worker = &self->workers[r];
        if (!worker->is_made)
            continue;
        (void)pthread_mutex_lock(&worker->lock);
        atomic_store(&worker->stop, true);
        (void)pthread_cond_broadcast(&worker->wake);
        (void)pthread_mutex_unlock(&worker->lock);
        while (worker->running)
            (void)pthread_join(worker->threads[--worker->running], NULL);
        (void)pthread_cond_destroy(&worker->wake);
        (void)pthread_mutex_destroy(&worker->lock);
    }
    free(self);
}

static enum status start_worker(struct worker *worker, double gbytes_per_s, uint32_t latency_us,
                                uint32_t threads)
{
    worker->ns_per_byte = gbytes_per_s > 0 ? 1.0 / gbytes_per_s : 0; // GB/s = bytes per ns
    worker->latency_ns = (uint64_t)latency_us * 1000;
    for (int i = 0; i < COPY_DEPTH_MAX; i++)
        atomic_init(&worker->mailbox[i].state, MAILBOX_EMPTY);
    atomic_init(&worker->stop, false);
    if (pthread_mutex_init(&worker->lock, NULL) != 0)
        return STATUS_NO_MEMORY;
    if (pthread_cond_init(&worker->wake, NULL) != 0) {
        (void)pthread_mutex_destroy(&worker->lock);
        return STATUS_NO_MEMORY;
    }
    worker->is_made = true; // thread_link_destroy ends what runs
    for (; worker->running < threads; worker->running++)
        if (pthread_create(&worker->threads[worker->running], NULL, work, worker) != 0)
            return STATUS_NO_MEMORY;
    return STATUS_OK;
}

enum status copy_link_threads(const struct link_options *options, struct link **out)
{
    struct thread_link *self = calloc(1, sizeof *self);
    if (!self)
        return STATUS_NO_MEMORY;
    self->link = (struct link){
        .start = thread_link_start, .poll = thread_link_poll, .destroy = thread_link_destroy};
    const double speeds[COPY_RESOURCES] = {[COPY_H2D] = options->h2d_gbytes_per_s,
                                           [COPY_D2H] = options->d2h_gbytes_per_s,
                                           [COPY_READ] = options->read_gbytes_per_s};
    for (int r = 0; r < COPY_RESOURCES; r++) {
        self->link.depth[r] = COPY_DEPTH_MAX;
        uint32_t threads = 1;
        if (r == COPY_READ && options->read_threads && speeds[r] <= 0 && !options->latency_us)
            threads = options->read_threads;
        enum status status =
            start_worker(&self->workers[r], speeds[r], options->latency_us, threads);
        if (status) {
            thread_link_destroy(&self->link);
            return status;
        }
    }
    *out = &self->link;
    return STATUS_OK;
}
