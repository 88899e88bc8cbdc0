// SPDX-License-Identifier: Apache-2.0
// Streams: recording, row slots, units and their captured graphs, submit and poll.
//
// What is recorded is a list of commands with their arguments. submit sends, in this order:
//   open     a kernel that writes the control block: row counts, adapters, "no miss yet"
//   eager    the commands before the first unit, one by one (copies, scatters; all of a test)
//   units    each as one graph launch
//   close    a kernel that writes what the segment came to into pinned memory; then an event
//
// Row slots. In a captured graph row counts are not baked in: a command knows the number of a slot
// of the control block. Slots are given in the order in which different row counts appear; gather
// always opens a new one (the rows that are sampled), so that two counts that happen to be equal
// give the same graph as when they are not. Within a unit args->rows is the bucket.
//
// Graphs. A unit is looked up by the hash (two independent 64-bit lanes) of its commands:
// operation, slot and arguments, with rows as the bucket and the step's scalars of lora_batch left
// out, padding cleared. A unit never seen is captured from a stream of its own, while nothing
// waits, and kept until the stream is destroyed; when GRAPHS_MAX are kept all are dropped (never
// seen: layers x buckets x 3 classes are some thousands).
//
// Invariants: 1. one segment is in flight at most; commands are not touched meanwhile, because they
// are consumed by submit: recording for the next segment may begin at once. 2. after an error
// submit, and whatever was in flight, answer DEVICE.
#include "kernels/cuda/stream.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum {
    GRAPHS_MAX = 1 << 15,
    UNITS_MAX = 2 * 1024 + 2, // a half-layer each (--segment-halves 1) of the most layers, the head
    LORA_GROUP = 3,
};

enum operation {
    OP_COPY,
    OP_SCATTER,
#define X(name, args, own) OP_##name,
    CUDA_ROW_OPERATIONS(X) CUDA_LORA_OPERATIONS(X)
#undef X
};

struct copy_args {
    void *to;
    const void *from; // NULL: zero
    size_t bytes;
};

struct command {
    uint32_t op, slot, rows_max;
    bool captured, can_miss;
    union {
        struct copy_args copy;
        struct scatter_args scatter;
#define X(name, args, own) struct args name;
        CUDA_ROW_OPERATIONS(X) CUDA_LORA_OPERATIONS(X)
#undef X
    } a;
    struct lora_batch batch; // of the operations that have one, without the step's scalars
};

struct graph {
    uint64_t key[2];
    cudaGraphExec_t exec; // NULL: the place is free
};

struct cuda_stream {
    struct stream base;
    cudaStream_t stream, capture;
    cudaEvent_t done;
    struct command *commands;
    uint32_t capacity, count;
    uint32_t units[UNITS_MAX], unit_count;
    uint32_t rows[ROW_SLOTS], slots;
    uint32_t lora_segments, lora_rank;
    bool can_miss; // a moe_map was recorded
    struct cuda_control *control;
    struct cuda_result *result;
    uint8_t *partials, *blas_workspace, *work;
    struct graph *graphs; // [2 * GRAPHS_MAX], open addressing
    uint32_t graph_count;
    uint64_t captures;
    uint32_t sequence;
    bool in_flight;
};

static struct cuda_device *device_of(const struct cuda_stream *s)
{
    return (struct cuda_device *)s->base.device;
}

// ---- recording ----

// Padding is part of what is hashed.
#if defined(__has_builtin)
#if __has_builtin(__builtin_clear_padding)
#define CLEAR_PADDING(p) __builtin_clear_padding(p)
#endif
#endif
#ifndef CLEAR_PADDING
#define CLEAR_PADDING(p) ((void)(p)) // the same unit may then be captured twice
#endif

static struct command *record(struct cuda_stream *s, uint32_t op)
{
    CHECK(s->count < s->capacity);
    struct command *c = &s->commands[s->count++];
    memset(c, 0, sizeof *c);
    c->op = op;
    return c;
}

static void record_rows(struct cuda_stream *s, struct command *c, uint32_t rows, bool own)
{
    uint32_t slot = s->slots;
    while (!own && slot && s->rows[slot - 1] != rows)
        slot--;
    if (own || !slot) {
        CHECK(s->slots < ROW_SLOTS);
        s->rows[s->slots++] = rows;
        slot = s->slots;
    }
    c->slot = slot - 1;
    c->can_miss = s->can_miss;
    s->can_miss = s->can_miss || c->op == OP_moe_map;
    c->captured = s->unit_count > 0;
    c->rows_max = c->captured ? row_bucket(rows) : rows;
}

static void record_batch(struct cuda_stream *s, struct command *c, const struct lora_batch *batch)
{
    s->lora_segments = batch->segments;
    s->lora_rank = batch->rank_max;
    CHECK(batch->rank_max <= RANK_MAX);
    c->batch = *batch;
    CLEAR_PADDING(&c->batch);
    c->batch.segments = c->batch.rows = c->batch.rank_max = 0;
}

void cuda__record_copy(struct stream *stream, void *to, const void *from, size_t bytes)
{
    struct cuda_stream *s = (struct cuda_stream *)stream;
    CHECK(!s->unit_count && (from || !bytes));
    if (bytes)
        record(s, OP_COPY)->a.copy = (struct copy_args){to, from, bytes};
}

void cuda__record_zero(struct stream *stream, void *to, size_t bytes)
{
    struct cuda_stream *s = (struct cuda_stream *)stream;
    CHECK(!s->unit_count);
    if (bytes)
        record(s, OP_COPY)->a.copy = (struct copy_args){to, NULL, bytes};
}

void cuda__record_scatter(struct stream *stream, const struct scatter_args *a)
{
    struct cuda_stream *s = (struct cuda_stream *)stream;
    CHECK(!s->unit_count);
    if (!a->count)
        return;
    struct command *c = record(s, OP_SCATTER);
    c->a.scatter = *a;
    c->rows_max = a->count;
}

#define X(name, args, own)                                                                         \
    void cuda__record_##name(struct stream *stream, const struct args *a)                          \
    {                                                                                              \
        struct cuda_stream *s = (struct cuda_stream *)stream;                                      \
        if (!a->rows)                                                                              \
            return;                                                                                \
        struct command *c = record(s, OP_##name);                                                  \
        c->a.name = *a;                                                                            \
        CLEAR_PADDING(&c->a.name);                                                                 \
        record_rows(s, c, a->rows, own);                                                           \
        c->a.name.rows = c->rows_max;                                                              \
    }
CUDA_ROW_OPERATIONS(X)
#undef X

static void record_lora(struct cuda_stream *s, struct command *c, const struct lora_batch *batch)
{
    record_rows(s, c, batch->rows, false);
    record_batch(s, c, batch);
}

void cuda__record_lora_gather(struct stream *stream, const struct lora_gather_args *a)
{
    struct cuda_stream *s = (struct cuda_stream *)stream;
    if (!a->batch->segments || !a->batch->rank_max)
        return;
    struct command *c = record(s, OP_lora_gather);
    c->a.lora_gather = *a;
    CLEAR_PADDING(&c->a.lora_gather);
    c->a.lora_gather.batch = NULL;
    record_lora(s, c, a->batch);
}

void cuda__record_lora_shrink(struct stream *stream, const struct lora_shrink_args *a)
{
    struct cuda_stream *s = (struct cuda_stream *)stream;
    if (!a->batch->segments || !a->batch->rank_max)
        return;
    struct command *c = record(s, OP_lora_shrink);
    c->a.lora_shrink = *a;
    CLEAR_PADDING(&c->a.lora_shrink);
    c->a.lora_shrink.batch = NULL;
    record_lora(s, c, a->batch);
}

void cuda__record_lora_expand(struct stream *stream, const struct lora_expand_args *a)
{
    struct cuda_stream *s = (struct cuda_stream *)stream;
    if (!a->batch->segments || !a->batch->rank_max || !a->d_out)
        return;
    struct command *c = record(s, OP_lora_expand);
    c->a.lora_expand = *a;
    CLEAR_PADDING(&c->a.lora_expand);
    c->a.lora_expand.batch = NULL;
    record_lora(s, c, a->batch);
}

static void record_moe(struct cuda_stream *s, uint32_t op, const struct moe_gemm_args *a)
{
    if (!a->rows)
        return;
    struct command *c = record(s, op);
    c->a.moe_gate_up = *a;
    CLEAR_PADDING(&c->a.moe_gate_up);
    record_rows(s, c, a->rows, false);
    c->a.moe_gate_up.rows = c->rows_max;
    c->a.moe_gate_up.lora = NULL;
    if (a->lora && a->lora->segments && a->lora->rank_max)
        record_batch(s, c, a->lora); // page_bytes is not 0: how a launch knows
}

// A map of no rows clears.
void cuda__record_moe_map(struct stream *stream, const struct moe_map_args *a)
{
    struct cuda_stream *s = (struct cuda_stream *)stream;
    struct command *c = record(s, OP_moe_map);
    c->a.moe_map = *a;
    CLEAR_PADDING(&c->a.moe_map);
    record_rows(s, c, a->rows, false);
    c->a.moe_map.rows = c->rows_max;
    c->a.moe_map.lora = NULL;
    if (a->lora && a->lora->segments && a->lora->rank_max)
        record_batch(s, c, a->lora);
}

void cuda__record_moe_gate_up(struct stream *stream, const struct moe_gemm_args *a)
{
    record_moe((struct cuda_stream *)stream, OP_moe_gate_up, a);
}

void cuda__record_moe_down(struct stream *stream, const struct moe_gemm_args *a)
{
    record_moe((struct cuda_stream *)stream, OP_moe_down, a);
}

void cuda__unit(struct stream *stream)
{
    struct cuda_stream *s = (struct cuda_stream *)stream;
    CHECK(s->unit_count < UNITS_MAX);
    s->units[s->unit_count++] = s->count;
}

// ---- launching ----

static struct cuda_launch launch_of(const struct cuda_stream *s, const struct command *c,
                                    cudaStream_t stream)
{
    return (struct cuda_launch){.stream = stream,
                                .device = device_of(s),
                                .control = s->control,
                                .slot = c->slot,
                                .rows_max = c->rows_max,
                                .captured = c->captured,
                                .can_miss = c->can_miss,
                                .partials = s->partials,
                                .blas_workspace = s->blas_workspace,
                                .work = s->work};
}

static bool same_batch(const struct command *a, const struct command *b)
{
    return a->slot == b->slot && !memcmp(&a->batch, &b->batch, sizeof a->batch);
}

// Shrinks of one operand, or expands, that follow each other: one launch. Returns how many.
static uint32_t launch_lora(const struct cuda_launch *l, struct command *c, uint32_t left)
{
    struct lora_shrink_args shrink[LORA_GROUP];
    struct lora_expand_args expand[LORA_GROUP];
    uint32_t n = 0;
    for (; n < LORA_GROUP && n < left && c[n].op == c->op && same_batch(&c[n], c); n++) {
        if (c->op == OP_lora_shrink) {
            shrink[n] = c[n].a.lora_shrink;
            shrink[n].batch = &c->batch;
            if (shrink[n].x != shrink[0].x || shrink[n].d_in != shrink[0].d_in)
                break;
        } else {
            expand[n] = c[n].a.lora_expand;
            expand[n].batch = &c->batch;
        }
    }
    if (c->op == OP_lora_shrink)
        cuda__lora_shrink(l, shrink, n);
    else
        cuda__lora_expand(l, expand, n);
    return n;
}

static void launch_gather(const struct cuda_launch *l, const struct command *c)
{
    struct lora_gather_args a = c->a.lora_gather;
    a.batch = &c->batch;
    cuda__lora_gather(l, &a);
}

static void launch_moe(const struct cuda_launch *l, const struct command *c)
{
    struct moe_gemm_args a = c->op == OP_moe_down ? c->a.moe_down : c->a.moe_gate_up;
    a.lora = c->batch.page_bytes ? &c->batch : NULL;
    if (c->op == OP_moe_down)
        cuda__moe_down(l, &a);
    else
        cuda__moe_gate_up(l, &a);
}

static void launch_map(const struct cuda_launch *l, const struct command *c)
{
    struct moe_map_args a = c->a.moe_map;
    a.lora = c->batch.page_bytes ? &c->batch : NULL;
    cuda__moe_map(l, &a);
}

static void launch_copy(struct cuda_stream *s, const struct copy_args *a, cudaStream_t stream)
{
    cudaError_t error = a->from
                            ? cudaMemcpyAsync(a->to, a->from, a->bytes, cudaMemcpyDefault, stream)
                            : cudaMemsetAsync(a->to, 0, a->bytes, stream);
    if (error != cudaSuccess)
        (void)cuda__fail(device_of(s), "a recorded copy", (int)error);
}

static void launch_commands(struct cuda_stream *s, uint32_t begin, uint32_t end,
                            cudaStream_t stream)
{
    uint32_t launches = 0; // of one kernel or more
    for (uint32_t i = begin; i < end; launches++) {
        struct command *c = &s->commands[i];
        struct cuda_launch l = launch_of(s, c, stream);
        uint32_t n = 1;
        l.settled = c->captured && launches >= 2;
        switch (c->op) {
        case OP_COPY:
            launch_copy(s, &c->a.copy, stream);
            break;
        case OP_SCATTER:
            cuda__scatter(&l, &c->a.scatter);
            break;
        case OP_lora_gather:
            launch_gather(&l, c);
            break;
        case OP_lora_shrink:
        case OP_lora_expand:
            n = launch_lora(&l, c, end - i);
            break;
        case OP_moe_map:
            launch_map(&l, c);
            break;
        case OP_moe_gate_up:
        case OP_moe_down:
            launch_moe(&l, c);
            break;
#define X(name, args, own)                                                                         \
    case OP_##name:                                                                                \
        cuda__##name(&l, &c->a.name);                                                              \
        break;
            CUDA_ROW_OPERATIONS(X)
#undef X
        default:
            CHECK(false);
        }
        i += n;
    }
}

// ---- graphs ----

static void unit_key(const struct cuda_stream *s, uint32_t begin, uint32_t end, uint64_t key[2])
{
    const uint64_t *word = (const uint64_t *)(const void *)&s->commands[begin];
    size_t words = (size_t)(end - begin) * sizeof *s->commands / sizeof *word;
    uint64_t a = 0x9e3779b97f4a7c15u ^ words, b = 0xc2b2ae3d27d4eb4fu;
    for (size_t i = 0; i < words; i++) {
        a = (a ^ word[i]) * 0x9fb21c651e98df25u;
        a ^= a >> 32;
        b = (b + word[i]) * 0xd6e8feb86659fd93u;
        b ^= b >> 29;
    }
    key[0] = a;
    key[1] = b;
}

static struct graph *graph_place(const struct cuda_stream *s, const uint64_t key[2])
{
    uint32_t at = (uint32_t)key[0] % (2 * GRAPHS_MAX);
    while (s->graphs[at].exec && (s->graphs[at].key[0] != key[0] || s->graphs[at].key[1] != key[1]))
        at = (at + 1) % (2 * GRAPHS_MAX);
    return &s->graphs[at];
}

static void graphs_drop(struct cuda_stream *s)
{
    for (uint32_t i = 0; s->graphs && i < 2 * GRAPHS_MAX; i++) {
        if (s->graphs[i].exec)
            (void)cudaGraphExecDestroy(s->graphs[i].exec);
        s->graphs[i].exec = NULL;
    }
    s->graph_count = 0;
}

static enum status unit_capture(struct cuda_stream *s, uint32_t begin, uint32_t end,
                                cudaGraphExec_t *out)
{
    struct cuda_device *d = device_of(s);
    cudaGraph_t graph = NULL;
    CUDA_TRY(d, cudaStreamBeginCapture(s->capture, cudaStreamCaptureModeRelaxed));
    launch_commands(s, begin, end, s->capture);
    CUDA_TRY(d, cudaStreamEndCapture(s->capture, &graph));
    if (d->failed) {
        (void)cudaGraphDestroy(graph);
        return STATUS_DEVICE;
    }
    CUDA_TRY(d, cudaGraphInstantiate(out, graph, 0));
    CUDA_TRY(d, cudaGraphDestroy(graph));
    CUDA_TRY(d, cudaGraphUpload(*out, s->stream));
    s->captures++;
    return STATUS_OK;
}

static enum status unit_launch(struct cuda_stream *s, uint32_t begin, uint32_t end)
{
    uint64_t key[2];
    if (begin == end)
        return STATUS_OK;
    unit_key(s, begin, end, key);
    struct graph *g = graph_place(s, key);
    if (!g->exec) {
        if (s->graph_count == GRAPHS_MAX) {
            CUDA_TRY(device_of(s), cudaStreamSynchronize(s->stream));
            graphs_drop(s);
            g = graph_place(s, key);
        }
        enum status status = unit_capture(s, begin, end, &g->exec);
        if (status)
            return status;
        g->key[0] = key[0];
        g->key[1] = key[1];
        s->graph_count++;
    }
    CUDA_TRY(device_of(s), cudaGraphLaunch(g->exec, s->stream));
    return STATUS_OK;
}

// ---- submit ----

static enum status send(struct cuda_stream *s)
{
    struct cuda_device *d = device_of(s);
    struct cuda_open open = {.lora_segments = s->lora_segments, .lora_rank = s->lora_rank};
    memcpy(open.rows, s->rows, s->slots * sizeof *s->rows);
    CUDA_TRY(d, cudaSetDevice(d->ordinal));
    if (d->side_dirty) {
        CUDA_TRY(d, cudaEventRecord(d->side_done, d->side));
        CUDA_TRY(d, cudaStreamWaitEvent(s->stream, d->side_done, 0));
        d->side_dirty = false;
    }
    cuda__segment_open(s->stream, s->control, &open);
    launch_commands(s, 0, s->unit_count ? s->units[0] : s->count, s->stream);
    for (uint32_t i = 0; i < s->unit_count; i++) {
        uint32_t end = i + 1 < s->unit_count ? s->units[i + 1] : s->count;
        enum status status = unit_launch(s, s->units[i], end);
        if (status)
            return status;
    }
    cuda__segment_close(s->stream, s->control, s->result, ++s->sequence);
    CUDA_TRY(d, cudaGetLastError());
    CUDA_TRY(d, cudaEventRecord(s->done, s->stream));
    return d->failed;
}

enum status cuda__submit(struct stream *stream)
{
    struct cuda_stream *s = (struct cuda_stream *)stream;
    if (s->in_flight)
        return STATUS_BUSY;
    enum status status = device_of(s)->failed;
    if (!status)
        status = send(s);
    s->in_flight = !status;
    s->count = s->unit_count = s->slots = 0;
    s->can_miss = false;
    s->lora_segments = s->lora_rank = 0;
    return status;
}

static enum status take_result(struct cuda_stream *s, cudaError_t error,
                               struct segment_result *result)
{
    s->in_flight = false;
    struct segment_result out = {0};
    if (error != cudaSuccess)
        out.status = cuda__fail(device_of(s), "a segment", (int)error);
    else if (s->result->sequence != s->sequence)
        out.status = cuda__fail(device_of(s), "a segment that did not end", (int)cudaErrorUnknown);
    else if (s->result->miss_layer != NO_MISS)
        out = (struct segment_result){.missed = true, .miss_layer = s->result->miss_layer};
    if (result)
        *result = out;
    return out.status;
}

bool cuda__poll(struct stream *stream, struct segment_result *result)
{
    struct cuda_stream *s = (struct cuda_stream *)stream;
    if (!s->in_flight) {
        if (result)
            *result = (struct segment_result){0};
        return true;
    }
    cudaError_t error = cudaEventQuery(s->done);
    if (error == cudaErrorNotReady)
        return false;
    (void)take_result(s, error, result);
    return true;
}

enum status cuda__wait(struct stream *stream, struct segment_result *result)
{
    struct cuda_stream *s = (struct cuda_stream *)stream;
    if (!s->in_flight) {
        (void)cuda__poll(stream, result);
        return STATUS_OK;
    }
    return take_result(s, cudaEventSynchronize(s->done), result);
}

uint64_t cuda__captures(const struct stream *stream)
{
    return ((const struct cuda_stream *)stream)->captures;
}

// ---- life ----

static enum status stream_open(struct cuda_stream *s)
{
    struct cuda_device *d = device_of(s);
    const struct device_table *t = d->base.table;
    struct device *device = s->base.device;
    CUDA_TRY(d, cudaSetDevice(d->ordinal));
    CUDA_TRY(d, cudaStreamCreateWithFlags(&s->stream, cudaStreamNonBlocking));
    CUDA_TRY(d, cudaStreamCreateWithFlags(&s->capture, cudaStreamNonBlocking));
    CUDA_TRY(d, cudaEventCreateWithFlags(&s->done, cudaEventDisableTiming));
    if (t->alloc(device, sizeof *s->control, (void **)&s->control) ||
        t->alloc_host(device, sizeof *s->result, (void **)&s->result) ||
        t->alloc(device, ATTENTION_PARTIAL_BYTES, (void **)&s->partials) ||
        t->alloc(device, BLAS_WORKSPACE_BYTES, (void **)&s->blas_workspace) ||
        t->alloc(device, WORK_BYTES, (void **)&s->work))
        return STATUS_NO_MEMORY;
    return STATUS_OK;
}

enum status cuda__stream_create(struct device *device, uint32_t commands, struct stream **out)
{
    *out = NULL;
    struct cuda_stream *s = calloc(1, sizeof *s);
    if (!s)
        return STATUS_NO_MEMORY;
    s->base.device = device;
    s->capacity = commands;
    s->commands = calloc(commands, sizeof *s->commands);
    s->graphs = calloc(2 * GRAPHS_MAX, sizeof *s->graphs);
    enum status status = s->commands && s->graphs ? stream_open(s) : STATUS_NO_MEMORY;
    if (status) {
        cuda__stream_destroy(&s->base);
        return status;
    }
    *out = &s->base;
    return STATUS_OK;
}

void cuda__stream_destroy(struct stream *stream)
{
    if (!stream)
        return;
    struct cuda_stream *s = (struct cuda_stream *)stream;
    const struct device_table *t = stream->device->table;
    if (s->in_flight)
        (void)cuda__wait(stream, NULL);
    graphs_drop(s);
    t->release(stream->device, s->control);
    t->release(stream->device, s->partials);
    t->release(stream->device, s->blas_workspace);
    t->release(stream->device, s->work);
    t->release_host(stream->device, s->result);
    if (s->done)
        (void)cudaEventDestroy(s->done);
    if (s->capture)
        (void)cudaStreamDestroy(s->capture);
    if (s->stream)
        (void)cudaStreamDestroy(s->stream);
    free(s->commands);
    free(s->graphs);
    free(s);
}
