// SPDX-License-Identifier: Apache-2.0
// A thread that does what waits for a disk, so that the I/O thread does not: one converts adapters
// (seconds), one writes, renames and unlinks (see server.c). Jobs run in the order they were put; a
// finished one is announced by an eventfd and handed to its `done` on the I/O thread.
//
// A job belongs to the worker from worker_put to its done. When the worker stops, the running one
// is waited for; those that wait are run as well when it `finishes`. Those that are done can be
// finished after that, too; on destroy the others are dropped: their drop is called, and not their
// done.
#include <pthread.h>
#include <stdlib.h>
#include <sys/eventfd.h>
#include <unistd.h>

#include "runtime/server/internal.h"

struct queue {
    struct worker_job *first, **end;
};

struct worker {
    pthread_t thread;
    pthread_mutex_t lock;
    pthread_cond_t changed;
    int wake;
    bool stop, finishes, joined;    // joined: the thread has ended
    uint32_t outstanding, jobs_max; // outstanding: put and not handed to done
    struct queue jobs, results;
};

static void push(struct queue *queue, struct worker_job *job)
{
    job->next = NULL;
    *queue->end = job;
    queue->end = &job->next;
}

static struct worker_job *pop(struct queue *queue)
{
    struct worker_job *job = queue->first;
    if (!job)
        return NULL;
    queue->first = job->next;
    if (!queue->first)
        queue->end = &queue->first;
    return job;
}

struct worker_job *worker_job_new(uint64_t id)
{
    struct worker_job *job = calloc(1, sizeof *job);
    if (!job)
        return NULL;
    job->id = id;
    job->directory = -1;
    return job;
}

void worker_job_free(struct worker_job *job)
{
    if (!job)
        return;
    if (job->directory >= 0)
        (void)close(job->directory);
    free(job->data);
    free(job->report);
    free(job);
}

static void *worker_main(void *context)
{
    struct worker *worker = context;
    (void)pthread_mutex_lock(&worker->lock);
    for (;;) {
        while (!worker->jobs.first && !worker->stop)
            (void)pthread_cond_wait(&worker->changed, &worker->lock);
        if (worker->stop && !(worker->finishes && worker->jobs.first))
            break;
        struct worker_job *job = pop(&worker->jobs);
        (void)pthread_mutex_unlock(&worker->lock);
        job->run(job);
        if (job->status && !job->fault.status)
            (void)fault_set(&job->fault, job->status, "%s", status_sentence(job->status));
        (void)pthread_mutex_lock(&worker->lock);
        push(&worker->results, job);
        uint64_t one = 1;
        (void)!write(worker->wake, &one, sizeof one);
    }
    (void)pthread_mutex_unlock(&worker->lock);
    return NULL;
}

enum status worker_create(uint32_t jobs_max, bool finishes, struct worker **out)
{
    struct worker *worker = calloc(1, sizeof *worker);
    if (!worker)
        return STATUS_NO_MEMORY;
    worker->jobs_max = jobs_max;
    worker->finishes = finishes;
    worker->jobs.end = &worker->jobs.first;
    worker->results.end = &worker->results.first;
    worker->wake = eventfd(0, EFD_NONBLOCK | EFD_CLOEXEC);
    (void)pthread_mutex_init(&worker->lock, NULL);
    (void)pthread_cond_init(&worker->changed, NULL);
    if (worker->wake < 0 || pthread_create(&worker->thread, NULL, worker_main, worker)) {
        if (worker->wake >= 0)
            (void)close(worker->wake);
        free(worker);
        return STATUS_NO_MEMORY;
    }
    *out = worker;
    return STATUS_OK;
}

static void drop_all(struct queue *queue)
{
    for (struct worker_job *job; (job = pop(queue));) {
        if (job->drop)
            job->drop(job);
        worker_job_free(job);
    }
}

void worker_stop(struct worker *worker)
{
    if (!worker || worker->joined)
        return;
    (void)pthread_mutex_lock(&worker->lock);
    worker->stop = true;
    (void)pthread_cond_signal(&worker->changed);
    (void)pthread_mutex_unlock(&worker->lock);
    (void)pthread_join(worker->thread, NULL);
    worker->joined = true;
}

void worker_destroy(struct worker *worker)
{
    if (!worker)
        return;
    worker_stop(worker);
    drop_all(&worker->jobs);
    drop_all(&worker->results);
    (void)close(worker->wake);
    (void)pthread_mutex_destroy(&worker->lock);
    (void)pthread_cond_destroy(&worker->changed);
    free(worker);
}

int worker_descriptor(const struct worker *worker)
{
    return worker->wake;
}

enum status worker_put(struct worker *worker, struct worker_job *job)
{
    enum status status = STATUS_FULL;
    (void)pthread_mutex_lock(&worker->lock);
    if (!worker->stop && worker->outstanding < worker->jobs_max) {
        worker->outstanding++;
        push(&worker->jobs, job);
        (void)pthread_cond_signal(&worker->changed);
        status = STATUS_OK;
    }
    (void)pthread_mutex_unlock(&worker->lock);
    return status;
}

void worker_finish(struct worker *worker, struct server *server)
{
    for (;;) {
        (void)pthread_mutex_lock(&worker->lock);
        struct worker_job *job = pop(&worker->results);
        worker->outstanding -= job != NULL;
        (void)pthread_mutex_unlock(&worker->lock);
        if (!job)
            return;
        job->done(server, job);
        worker_job_free(job);
    }
}
