// SPDX-License-Identifier: Apache-2.0
// One thread that converts adapters, so that the I/O thread never waits for a disk. Two bounded
// queues under one lock; results are announced by an eventfd. There are never more results than
// jobs were accepted, so a result always has room: jobs waiting + running + results not taken <=
// JOBS_MAX.
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/eventfd.h>
#include <unistd.h>

#include "runtime/server/internal.h"

enum { JOBS_MAX = 8, REPORT_BYTES = 4096 };

struct worker {
    struct server_converter converter;
    pthread_t thread;
    pthread_mutex_t lock;
    pthread_cond_t changed;
    int wake;
    bool stop;
    uint32_t outstanding; // jobs put and results not taken
    uint32_t jobs, results;
    struct worker_job job[JOBS_MAX];
    struct worker_result result[JOBS_MAX];
};

static struct worker_result convert(const struct worker *worker, const struct worker_job *job)
{
    struct worker_result result = {.id = job->id};
    char directory[64];
    (void)snprintf(directory, sizeof directory, "/proc/self/fd/%d", job->directory);
    result.report = calloc(1, REPORT_BYTES);
    if (!result.report)
        result.status = fault_set(&result.fault, STATUS_NO_MEMORY, "out of memory.");
    else
        result.status =
            worker->converter.convert(worker->converter.context, directory, job->old_path,
                                      job->store_path, result.report, REPORT_BYTES, &result.fault);
    if (result.status && !result.fault.status)
        (void)fault_set(&result.fault, result.status, "%s", status_sentence(result.status));
    (void)close(job->directory);
    return result;
}

static void *worker_main(void *context)
{
    struct worker *worker = context;
    (void)pthread_mutex_lock(&worker->lock);
    for (;;) {
        while (!worker->jobs && !worker->stop)
            (void)pthread_cond_wait(&worker->changed, &worker->lock);
        if (worker->stop)
            break;
        struct worker_job job = worker->job[0];
        memmove(worker->job, worker->job + 1, (--worker->jobs) * sizeof worker->job[0]);
        (void)pthread_mutex_unlock(&worker->lock);
        struct worker_result result = convert(worker, &job);
        (void)pthread_mutex_lock(&worker->lock);
        worker->result[worker->results++] = result;
        uint64_t one = 1;
        (void)!write(worker->wake, &one, sizeof one);
    }
    (void)pthread_mutex_unlock(&worker->lock);
    return NULL;
}

enum status worker_create(const struct server_converter *converter, struct worker **out)
{
    struct worker *worker = calloc(1, sizeof *worker);
    if (!worker)
        return STATUS_NO_MEMORY;
    worker->converter = *converter;
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

void worker_destroy(struct worker *worker)
{
    if (!worker)
        return;
    (void)pthread_mutex_lock(&worker->lock);
    worker->stop = true;
    (void)pthread_cond_signal(&worker->changed);
    (void)pthread_mutex_unlock(&worker->lock);
    (void)pthread_join(worker->thread, NULL);
    for (uint32_t i = 0; i < worker->jobs; i++)
        (void)close(worker->job[i].directory);
    for (uint32_t i = 0; i < worker->results; i++)
        free(worker->result[i].report);
    (void)close(worker->wake);
    (void)pthread_mutex_destroy(&worker->lock);
    (void)pthread_cond_destroy(&worker->changed);
    free(worker);
}

int worker_descriptor(const struct worker *worker)
{
    return worker->wake;
}

enum status worker_put(struct worker *worker, const struct worker_job *job)
{
    enum status status = STATUS_FULL;
    (void)pthread_mutex_lock(&worker->lock);
    if (worker->outstanding < JOBS_MAX) {
        worker->outstanding++;
        worker->job[worker->jobs++] = *job;
        (void)pthread_cond_signal(&worker->changed);
        status = STATUS_OK;
    }
    (void)pthread_mutex_unlock(&worker->lock);
    return status;
}

bool worker_take(struct worker *worker, struct worker_result *out)
{
    (void)pthread_mutex_lock(&worker->lock);
    bool any = worker->results;
    if (any) {
        *out = worker->result[0];
        memmove(worker->result, worker->result + 1, (--worker->results) * sizeof worker->result[0]);
        worker->outstanding--;
    }
    (void)pthread_mutex_unlock(&worker->lock);
    return any;
}
