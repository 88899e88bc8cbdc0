// SPDX-License-Identifier: Apache-2.0
// The copy queues: which chunk moves next on each resource, and who pays for it. How bytes move is
// the link's business; why they move is the caller's.
//
// Each resource has a binary heap of its waiting copies, ordered by (rank, arrival); rank 0 is the
// most urgent (copy__rank). A copy whose chunk is in flight is not in the heap and comes back for
// the next chunk, so that at each chunk boundary the smallest element, and nothing else, decides
// what runs: that is the whole of overtaking.
//
//   free record -> copy_submit -> in the heap -> [chunk in flight -> in the heap]* -> done() ->
//   free record
//
// Invariants
//   1. A record is in its heap or in flight from copy_submit until just before done() is called;
//   done() comes once.
//   2. In flight are at most `depth` chunks of a resource, what its link takes, and together at
//   most a chunk's bytes: small pages follow each other without waiting for the engine, and what
//   is urgent never waits for more than one chunk.
//   3. done() is called without any state of ours half changed: it may submit, promote and cancel.
//   4. Promotion keeps the arrival number: among equals the one that asked first goes first.
#include "unified_pool/copy.h"

#include <stdlib.h>

#include "base/arith.h"
#include "base/check.h"
#include "unified_pool/internal.h"
#include "unified_pool/place.h"

enum {
    CHUNK_BYTES = 1 << 20, // at 25 GB/s 42 us: how long a gate waits at most for what is in flight
    INDEX_BITS = 28
};

enum { IN_FLIGHT = 0xffffffff };

struct flying {
    uint32_t copy; // its index
    size_t bytes;
};

struct copy {
    struct copy_request request;
    size_t moved;
    uint64_t arrival;
    uint32_t generation, rank;
    uint32_t position;  // in the heap, or IN_FLIGHT
    uint32_t next_free; // while the record is free
    bool live, cancelled;
};

struct queue {
    struct copy *copies;
    uint32_t *heap; // indices of copies
    uint32_t count;
    uint32_t free_head;                   // == copies_max: none
    struct flying flying[COPY_DEPTH_MAX]; // in the order they were started
    uint32_t flying_first, flying_count, depth;
    size_t flying_bytes;
    uint64_t busy_us; // until then the time in flight is counted
};

struct copy_queues {
    struct link *link;
    struct clock clock;
    uint32_t copies_max, owners_max;
    size_t chunk_bytes;
    uint64_t arrivals;
    struct queue queues[COPY_RESOURCES];
    uint64_t *owner_bytes; // [owners_max][COPY_RESOURCES]
    struct copy_stats stats;
    bool device_failed;
};

uint32_t copy__rank(enum copy_class class, enum copy_need need)
{
    CHECK((unsigned)class < COPY_CLASSES && (unsigned)need < COPY_NEEDS);
    if (need == COPY_GATE)
        return (uint32_t) class;
    return COPY_CLASSES + (uint32_t) class * (COPY_NEEDS - 1) + (uint32_t)need - 1;
}

// ---- heap ----

static bool is_before(const struct queue *queue, uint32_t a, uint32_t b)
{
    const struct copy *x = &queue->copies[a], *y = &queue->copies[b];
    return x->rank != y->rank ? x->rank < y->rank : x->arrival < y->arrival;
}

static void heap_put(struct queue *queue, uint32_t position, uint32_t index)
{
    queue->heap[position] = index;
    queue->copies[index].position = position;
}

static void heap_up(struct queue *queue, uint32_t position)
{
    uint32_t index = queue->heap[position];
    while (position) {
        uint32_t parent = (position - 1) / 2;
        if (!is_before(queue, index, queue->heap[parent]))
            break;
        heap_put(queue, position, queue->heap[parent]);
        position = parent;
    }
    heap_put(queue, position, index);
}

static void heap_down(struct queue *queue, uint32_t position)
{
    uint32_t index = queue->heap[position];
    for (;;) {
        uint32_t child = 2 * position + 1;
        if (child >= queue->count)
            break;
        if (child + 1 < queue->count &&
            is_before(queue, queue->heap[child + 1], queue->heap[child]))
            child++;
        if (!is_before(queue, queue->heap[child], index))
            break;
        heap_put(queue, position, queue->heap[child]);
        position = child;
    }
    heap_put(queue, position, index);
}

static void heap_remove(struct queue *queue, uint32_t position)
{
    uint32_t last = queue->heap[--queue->count];
    if (position == queue->count)
        return;
    heap_put(queue, position, last);
    heap_up(queue, position);
    heap_down(queue, queue->copies[last].position);
}

// ---- life ----

static void lay_out(struct placer *placer, const struct copy_options *options,
                    struct copy_queues **self, struct copy_queues *body)
{
    *self = place(placer, 1, sizeof **self);
    for (int r = 0; r < COPY_RESOURCES; r++) {
        body->queues[r].copies = place(placer, options->copies_max, sizeof(struct copy));
        body->queues[r].heap = place(placer, options->copies_max, sizeof(uint32_t));
    }
    body->owner_bytes =
        place(placer, (size_t)options->owners_max * COPY_RESOURCES, sizeof(uint64_t));
}

enum status copy_create(const struct copy_options *options, struct copy_queues **out)
{
    if (!options->link || !options->copies_max || options->copies_max >= 1u << INDEX_BITS)
        return STATUS_INVALID;
    struct copy_queues body = {.link = options->link,
                               .clock = options->clock,
                               .copies_max = options->copies_max,
                               .owners_max = options->owners_max,
                               .chunk_bytes =
                                   options->chunk_bytes ? options->chunk_bytes : CHUNK_BYTES};
    struct copy_queues *self;
    struct placer placer = {0};
    lay_out(&placer, options, &self, &body);
    void *memory = calloc(1, placer.used);
    if (!memory)
        return STATUS_NO_MEMORY;
    placer = (struct placer){.base = memory};
    lay_out(&placer, options, &self, &body);
    for (int r = 0; r < COPY_RESOURCES; r++) {
        uint32_t depth = options->link->depth[r];
        CHECK(depth <= COPY_DEPTH_MAX);
        body.queues[r].depth = depth ? depth : 1;
        for (uint32_t i = 0; i < options->copies_max; i++) {
            body.queues[r].copies[i].next_free = i + 1;
            body.queues[r].copies[i].generation = 1;
        }
    }
    *self = body;
    *out = self;
    return STATUS_OK;
}

void copy_destroy(struct copy_queues *queues)
{
    if (!queues)
        return;
    queues->link->destroy(queues->link); // waits for its chunks
    free(queues);
}

static copy_id id_of(enum copy_resource resource, uint32_t index, uint32_t generation)
{
    return (copy_id){(uint64_t)generation << 32 | (uint64_t)resource << INDEX_BITS | (index + 1)};
}

static struct copy *find(struct copy_queues *queues, copy_id id, enum copy_resource *resource)
{
    uint32_t low = (uint32_t)id.bits;
    uint32_t which = low >> INDEX_BITS, index = (low & ((1u << INDEX_BITS) - 1)) - 1;
    CHECK(which < COPY_RESOURCES && index < queues->copies_max);
    struct copy *copy = &queues->queues[which].copies[index];
    *resource = (enum copy_resource)which;
    return copy->live && copy->generation == (uint32_t)(id.bits >> 32) ? copy : NULL;
}

// Takes the record out and tells the caller; nothing of the record is touched afterwards.
static void finish(struct copy_queues *queues, enum copy_resource resource, struct copy *copy,
                   enum status status)
{
    struct queue *queue = &queues->queues[resource];
    if (copy->position != IN_FLIGHT)
        heap_remove(queue, copy->position);
    copy->live = false;
    copy->generation++;
    copy->next_free = queue->free_head;
    queue->free_head = (uint32_t)(copy - queue->copies);
    if (status == STATUS_OK)
        queues->stats.copies[resource]++;
    else if (status == STATUS_CANCELLED)
        queues->stats.cancelled++;
    struct copy_request request = copy->request;
    if (request.done)
        request.done(request.context, request.tag, status);
}

enum status copy_submit(struct copy_queues *queues, const struct copy_request *request,
                        copy_id *out)
{
    enum copy_resource resource = request->whole.resource;
    CHECK((unsigned)resource < COPY_RESOURCES && request->owner < queues->owners_max);
    CHECK(request->whole.bytes && request->whole.to);
    struct queue *queue = &queues->queues[resource];
    if (queue->free_head == queues->copies_max)
        return STATUS_FULL;
    uint32_t index = queue->free_head;
    struct copy *copy = &queue->copies[index];
    queue->free_head = copy->next_free;
    copy->request = *request;
    copy->moved = 0;
    copy->arrival = queues->arrivals++;
    copy->rank = copy__rank(request->class, request->need);
    copy->live = true;
    copy->cancelled = false;
    heap_put(queue, queue->count++, index);
    heap_up(queue, queue->count - 1);
    *out = id_of(resource, index, copy->generation);
    return STATUS_OK;
}

void copy_promote(struct copy_queues *queues, copy_id id, enum copy_class class,
                  enum copy_need need)
{
    enum copy_resource resource;
    struct copy *copy = find(queues, id, &resource);
    uint32_t rank = copy__rank(class, need);
    if (!copy || rank >= copy->rank)
        return;
    copy->rank = rank;
    if (copy->position != IN_FLIGHT)
        heap_up(&queues->queues[resource], copy->position);
}

void copy_cancel(struct copy_queues *queues, copy_id id)
{
    enum copy_resource resource;
    struct copy *copy = find(queues, id, &resource);
    if (!copy || copy->cancelled)
        return;
    if (copy->position == IN_FLIGHT)
        copy->cancelled = true; // told when its chunk is done
    else
        finish(queues, resource, copy, STATUS_CANCELLED);
}

// ---- moving ----

static void start_chunk(struct copy_queues *queues, struct queue *queue, uint32_t index,
                        size_t bytes)
{
    struct copy *copy = &queue->copies[index];
    struct copy_chunk chunk = copy->request.whole;
    chunk.to = (uint8_t *)chunk.to + copy->moved;
    if (chunk.from)
        chunk.from = (const uint8_t *)chunk.from + copy->moved;
    chunk.offset += copy->moved;
    chunk.bytes = bytes;
    heap_remove(queue, copy->position);
    copy->position = IN_FLIGHT;
    if (!queue->flying_count)
        queue->busy_us = clock_now_us(&queues->clock);
    uint32_t last = (queue->flying_first + queue->flying_count++) % COPY_DEPTH_MAX;
    queue->flying[last] = (struct flying){.copy = index, .bytes = bytes};
    queue->flying_bytes += bytes;
    queues->link->start(queues->link, &chunk);
}

static void start_next(struct copy_queues *queues, enum copy_resource resource)
{
    struct queue *queue = &queues->queues[resource];
    while (queue->count && queue->flying_count < queue->depth) {
        uint32_t index = queue->heap[0];
        const struct copy *copy = &queue->copies[index];
        size_t bytes = min_size(queues->chunk_bytes, copy->request.whole.bytes - copy->moved);
        if (queue->flying_count && queue->flying_bytes + bytes > queues->chunk_bytes)
            return;
        start_chunk(queues, queue, index, bytes);
    }
}

// True when a chunk was done.
static bool finish_chunk(struct copy_queues *queues, enum copy_resource resource)
{
    struct queue *queue = &queues->queues[resource];
    enum status status = STATUS_OK;
    if (!queue->flying_count || !queues->link->poll(queues->link, resource, &status))
        return false;
    struct flying flying = queue->flying[queue->flying_first];
    struct copy *copy = &queue->copies[flying.copy];
    uint64_t now_us = clock_now_us(&queues->clock);
    queue->flying_first = (queue->flying_first + 1) % COPY_DEPTH_MAX;
    queue->flying_count--;
    queue->flying_bytes -= flying.bytes;
    queues->device_failed = queues->device_failed || status == STATUS_DEVICE;
    queues->stats.busy_us[resource] += now_us - queue->busy_us;
    queue->busy_us = now_us;
    if (status == STATUS_OK) {
        copy->moved += flying.bytes;
        queues->stats.bytes[resource] += flying.bytes;
        queues->owner_bytes[(size_t)copy->request.owner * COPY_RESOURCES + resource] +=
            flying.bytes;
    }
    if (copy->cancelled) {
        finish(queues, resource, copy, STATUS_CANCELLED);
    } else if (status || copy->moved == copy->request.whole.bytes) {
        finish(queues, resource, copy, status);
    } else {
        heap_put(queue, queue->count++, flying.copy);
        heap_up(queue, queue->count - 1);
    }
    return true;
}

void copy_poll(struct copy_queues *queues)
{
    bool again = true;
    while (again) {
        again = false;
        for (int r = 0; r < COPY_RESOURCES; r++) {
            again |= finish_chunk(queues, (enum copy_resource)r);
            start_next(queues, (enum copy_resource)r);
        }
    }
}

bool copy_is_idle(const struct copy_queues *queues)
{
    for (int r = 0; r < COPY_RESOURCES; r++)
        if (queues->queues[r].count || queues->queues[r].flying_count)
            return false;
    return true;
}

bool copy_device_failed(const struct copy_queues *queues)
{
    return queues->device_failed;
}

// ---- numbers ----

void copy_stats(const struct copy_queues *queues, struct copy_stats *out)
{
    *out = queues->stats;
    for (int r = 0; r < COPY_RESOURCES; r++)
        out->queued[r] = queues->queues[r].count + queues->queues[r].flying_count;
}

uint64_t copy_owner_bytes(const struct copy_queues *queues, uint32_t owner,
                          enum copy_resource resource)
{
    CHECK(owner < queues->owners_max && (unsigned)resource < COPY_RESOURCES);
    return queues->owner_bytes[(size_t)owner * COPY_RESOURCES + resource];
}
