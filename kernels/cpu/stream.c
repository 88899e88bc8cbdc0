// SPDX-License-Identifier: Apache-2.0
// Streams: recording, what may overlap, and how threads work through a segment.
//
// A command is complete when all its tasks are; `head` is the number of leading commands that are.
// A command may begin when head >= after: `after` comes from the memory it touches (spans) compared
// with the commands before it, at most WINDOW back, so that q, k and v projections, LoRA shrinks
// and gate/up overlap without a barrier, and a thread that finds no task of one command takes one
// of the next.
//
//   WAITING --head >= after, one thread wins--> PREPARING --tasks counted--> OPEN
//   OPEN --last task--> COMPLETE        PREPARING --no tasks, or skipped by a miss--> COMPLETE
//
// Invariants
//   1. Threads claim tasks by `next` and count them off by `done`; who counts the last finishes.
//   2. Between active = 0 and the next submit only the engine thread touches the commands: a thread
//      counts itself in `users`, then reads `active`; the engine clears `active`, then waits for
//      users == 0.
//   3. After moe_map (a fence) nothing begins before it is complete: later commands see a miss.
#include <sched.h>
#include <stdlib.h>
#include <string.h>
#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include "kernels/cpu/cpu.h"

enum command_state { WAITING, PREPARING, OPEN, COMPLETE };

static inline void relax(void)
{
#if defined(__x86_64__)
    _mm_pause();
#endif
}

// ---- recording ----

struct command *cpu__record(struct stream *stream, const struct operation *op, uint32_t tasks)
{
    struct cpu_stream *s = (struct cpu_stream *)stream;
    CHECK(!atomic_load(&s->active));
    CHECK(s->count < s->capacity);
    struct command *c = &s->commands[s->count];
    c->op = op;
    c->tasks = tasks;
    c->read_count = c->write_count = 0;
    c->split = c->miss_layer = 0;
    c->skipped = false;
    atomic_store_explicit(&c->state, WAITING, memory_order_relaxed);
    atomic_store_explicit(&c->next, 0, memory_order_relaxed);
    atomic_store_explicit(&c->done, 0, memory_order_relaxed);
    return c;
}

void cpu__reads(struct command *c, const void *base, size_t width, size_t stride, size_t rows)
{
    CHECK(c->read_count < SPANS);
    if (base && width && rows)
        c->reads[c->read_count++] = (struct span){base, width, stride, rows};
}

void cpu__writes(struct command *c, const void *base, size_t width, size_t stride, size_t rows)
{
    CHECK(c->write_count < SPANS);
    if (base && width && rows)
        c->writes[c->write_count++] = (struct span){base, width, stride, rows};
}

static bool spans_touch(const struct span *a, const struct span *b)
{
    size_t a_begin = (size_t)a->base, a_end = a_begin + (a->rows - 1) * a->stride + a->width;
    size_t b_begin = (size_t)b->base, b_end = b_begin + (b->rows - 1) * b->stride + b->width;
    if (a_end <= b_begin || b_end <= a_begin)
        return false;
    if (a->stride != b->stride || !a->stride)
        return true;
    // Column windows of the same matrix.
    size_t shift = (b_begin + a->stride - a_begin % a->stride) % a->stride;
    return shift < a->width || shift + b->width > a->stride;
}

static bool any_touch(const struct span *a, uint32_t a_count, const struct span *b,
                      uint32_t b_count)
{
    for (uint32_t i = 0; i < a_count; i++)
        for (uint32_t j = 0; j < b_count; j++)
            if (spans_touch(&a[i], &b[j]))
                return true;
    return false;
}

static bool commands_conflict(const struct command *first, const struct command *second)
{
    return any_touch(first->writes, first->write_count, second->reads, second->read_count) ||
           any_touch(first->writes, first->write_count, second->writes, second->write_count) ||
           any_touch(first->reads, first->read_count, second->writes, second->write_count);
}

void cpu__record_end(struct stream *stream, struct command *c)
{
    struct cpu_stream *s = (struct cpu_stream *)stream;
    uint32_t at = s->count++, low = at > WINDOW ? at - WINDOW : 0;
    c->after = at;
    if (c->op->fence) {
        s->fence = at + 1;
        return;
    }
    low = low > s->fence ? low : s->fence;
    while (c->after > low && !commands_conflict(&s->commands[c->after - 1], c))
        c->after--;
}

// ---- running ----

static void command_complete(struct cpu_stream *s, struct command *c)
{
    if (c->op->finish && !c->skipped)
        c->op->finish(s, c);
    atomic_store(&c->state, COMPLETE);
    uint32_t head = atomic_load(&s->head), end = atomic_load(&s->submitted);
    while (head < end && atomic_load(&s->commands[head].state) == COMPLETE)
        if (atomic_compare_exchange_strong(&s->head, &head, head + 1))
            head++;
    cpu__pool_progress(cpu__device(s)->pool, head == end);
}

// Counts the tasks; the caller has won the transition to PREPARING.
static void command_prepare(struct cpu_stream *s, struct command *c)
{
    c->skipped = s->failed || (s->missed && !(c->op->in_miss && c->miss_layer == s->miss_layer));
    if (c->skipped)
        c->tasks = 0;
    else if (c->op->prepare)
        c->tasks = c->op->prepare(s, c);
    if (!c->tasks) {
        command_complete(s, c);
        return;
    }
    atomic_store(&c->state, OPEN);
    if (c->tasks > 1)
        cpu__pool_progress(cpu__device(s)->pool, false);
}

// Is there a task to claim in command i, or a command to prepare?
static bool command_ready(struct cpu_stream *s, struct command *c)
{
    uint32_t state = atomic_load_explicit(&c->state, memory_order_acquire);
    if (state == WAITING)
        return c->after <= atomic_load(&s->head);
    return state == OPEN && atomic_load_explicit(&c->next, memory_order_relaxed) < c->tasks;
}

// Claims a task; false: nothing to do now.
static bool task_claim(struct cpu_stream *s, struct command **out, uint32_t *task)
{
    uint32_t head = atomic_load_explicit(&s->head, memory_order_acquire);
    uint32_t end = atomic_load_explicit(&s->submitted, memory_order_relaxed);
    for (uint32_t i = head; i < end && i < head + WINDOW; i++) {
        struct command *c = &s->commands[i];
        if (!command_ready(s, c))
            continue;
        uint32_t waiting = WAITING;
        if (atomic_compare_exchange_strong(&c->state, &waiting, PREPARING))
            command_prepare(s, c);
        if (atomic_load_explicit(&c->state, memory_order_acquire) != OPEN)
            continue;
        *task = atomic_fetch_add_explicit(&c->next, 1, memory_order_relaxed);
        *out = c;
        if (*task < c->tasks)
            return true;
    }
    return false;
}

static bool stream_enter(struct cpu_stream *s)
{
    atomic_fetch_add(&s->users, 1);
    if (atomic_load(&s->active))
        return true;
    atomic_fetch_sub(&s->users, 1);
    return false;
}

static void stream_leave(struct cpu_stream *s)
{
    atomic_fetch_sub(&s->users, 1);
}

bool cpu__stream_retired(struct cpu_stream *s)
{
    return atomic_load(&s->head) == atomic_load(&s->submitted);
}

bool cpu__stream_has_work(struct cpu_stream *s)
{
    if (!atomic_load(&s->active) || !stream_enter(s))
        return false;
    bool any = false;
    uint32_t head = atomic_load(&s->head), end = atomic_load(&s->submitted);
    for (uint32_t i = head; i < end && i < head + WINDOW && !any; i++)
        any = command_ready(s, &s->commands[i]);
    stream_leave(s);
    return any;
}

bool cpu__stream_work(struct cpu_stream *s, struct slot *slot)
{
    if (!stream_enter(s))
        return false;
    bool any = false;
    for (uint32_t looks = 0; looks < SPIN_LIMIT && !cpu__stream_retired(s); looks++) {
        struct command *c;
        uint32_t task;
        if (!task_claim(s, &c, &task)) {
            relax();
            continue;
        }
        c->op->task(s, slot, c, task);
        if (atomic_fetch_add(&c->done, 1) + 1 == c->tasks)
            command_complete(s, c);
        any = true;
        looks = 0;
    }
    stream_leave(s);
    return any;
}

// ---- life ----

enum status cpu__stream_create(struct device *device, uint32_t commands, struct stream **out)
{
    *out = NULL;
    struct cpu_stream *s = calloc(1, sizeof *s);
    if (!s)
        return STATUS_NO_MEMORY;
    s->base.device = device;
    s->capacity = 2 * commands; // some operations are two commands inside
    size_t bytes;
    if (mul_size(s->capacity + 1u, sizeof *s->commands, &bytes))
        s->commands = aligned_alloc(64, bytes);
    s->experts = calloc(EXPERTS_MAX, sizeof *s->experts);
    s->cursor = calloc(EXPERTS_MAX, sizeof *s->cursor);
    enum status status =
        cpu__alloc(device, sizeof(float) * ROUTER_ROWS * EXPERTS_MAX, (void **)&s->router_logits);
    if (status == STATUS_OK)
        status = cpu__alloc(device, sizeof(float) * ADAPTER_ADDED, (void **)&s->adapter_added);
    if (status == STATUS_OK && (!s->commands || !s->experts || !s->cursor))
        status = STATUS_NO_MEMORY;
    if (status == STATUS_OK && !cpu__pool_add(((struct cpu_device *)device)->pool, s))
        status = STATUS_FULL;
    if (status != STATUS_OK) {
        cpu__stream_destroy(&s->base);
        return status;
    }
    memset(s->commands, 0, bytes);
    *out = &s->base;
    return STATUS_OK;
}

void cpu__stream_destroy(struct stream *stream)
{
    if (!stream)
        return;
    struct cpu_stream *s = (struct cpu_stream *)stream;
    struct segment_result result;
    (void)cpu__wait(stream, &result);
    cpu__pool_remove(cpu__device(s)->pool, s);
    cpu__release(stream->device, s->router_logits);
    cpu__release(stream->device, s->adapter_added);
    free(s->commands);
    free(s->experts);
    free(s->cursor);
    free(s);
}

enum status cpu__submit(struct stream *stream)
{
    struct cpu_stream *s = (struct cpu_stream *)stream;
    if (atomic_load(&s->active))
        return STATUS_BUSY;
    s->missed = s->failed = false;
    atomic_store(&s->head, 0);
    atomic_store(&s->submitted, s->count);
    atomic_store(&s->active, 1);
    cpu__pool_submitted(cpu__device(s)->pool);
    return STATUS_OK;
}

// The segment is complete: takes the commands back from the workers.
static void stream_retire(struct cpu_stream *s, struct segment_result *result)
{
    if (atomic_exchange(&s->active, 0))
        while (atomic_load(&s->users))
            relax();
    s->count = s->fence = 0;
    if (result)
        *result = (struct segment_result){.missed = s->missed,
                                          .miss_layer = s->missed ? s->miss_layer : 0,
                                          .status = s->failed ? STATUS_DEVICE : STATUS_OK};
    s->missed = s->failed = false;
}

bool cpu__poll(struct stream *stream, struct segment_result *result)
{
    struct cpu_stream *s = (struct cpu_stream *)stream;
    if (atomic_load(&s->active) && !cpu__stream_retired(s)) {
        cpu__pool_help(cpu__device(s)->pool);
        return false;
    }
    if (atomic_load(&s->active))
        stream_retire(s, result);
    else if (result)
        *result = (struct segment_result){0};
    return true;
}

enum status cpu__wait(struct stream *stream, struct segment_result *result)
{
    struct cpu_stream *s = (struct cpu_stream *)stream;
    if (atomic_load(&s->active))
        cpu__pool_wait(cpu__device(s)->pool, s);
    (void)cpu__poll(stream, result);
    return STATUS_OK;
}
