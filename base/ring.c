// SPDX-License-Identifier: Apache-2.0
// Records are stored as {u32 length, payload, padding to 8}. A record never wraps: when the tail of
// the buffer is too short, a skip mark (length 0xffffffff) sends the consumer to the start.
// Invariants: 1. head and tail only grow; tail - head <= capacity. 2. the producer alone writes
// tail, the consumer alone writes head. 3. a record becomes visible by the release store of tail.
#include "base/ring.h"

#include <stdatomic.h>
#include <stdlib.h>
#include <string.h>

#include "base/arith.h"
#include "base/check.h"

enum { HEADER = 8, SKIP = -1 };

struct ring {
    size_t capacity;
    uint8_t *bytes;
    _Alignas(64) _Atomic uint64_t head;
    _Alignas(64) _Atomic uint64_t tail;
};

enum status ring_create(size_t capacity_bytes, struct ring **out)
{
    size_t capacity = 4096;
    while (capacity < capacity_bytes)
        capacity *= 2;
    struct ring *ring = aligned_alloc(64, round_up(sizeof *ring, 64));
    if (!ring)
        return STATUS_NO_MEMORY;
    memset(ring, 0, sizeof *ring);
    ring->capacity = capacity;
    ring->bytes = aligned_alloc(64, capacity);
    if (!ring->bytes) {
        free(ring);
        return STATUS_NO_MEMORY;
    }
    memset(ring->bytes, 0,
           capacity); // all its pages now, not one by one over the first thousands of records
    *out = ring;
    return STATUS_OK;
}

void ring_destroy(struct ring *ring)
{
    if (!ring)
        return;
    free(ring->bytes);
    free(ring);
}

size_t ring_room(const struct ring *ring)
{
    uint64_t head = atomic_load_explicit(&ring->head, memory_order_acquire);
    uint64_t tail = atomic_load_explicit(&ring->tail, memory_order_relaxed);
    size_t free_bytes = ring->capacity - (size_t)(tail - head);
    size_t to_end = ring->capacity - (size_t)(tail & (ring->capacity - 1));
    size_t usable = free_bytes <= to_end ? free_bytes : max_size(to_end, free_bytes - to_end);
    return usable > HEADER ? usable - HEADER : 0;
}

size_t ring_free(const struct ring *ring)
{
    uint64_t head = atomic_load_explicit(&ring->head, memory_order_acquire);
    uint64_t tail = atomic_load_explicit(&ring->tail, memory_order_relaxed);
    return ring->capacity - (size_t)(tail - head);
}

enum status ring_push(struct ring *ring, const void *record, size_t bytes)
{
    if (bytes > ring->capacity / 2 - HEADER)
        return STATUS_INVALID;
    size_t need = HEADER + round_up(bytes, 8);
    uint64_t head = atomic_load_explicit(&ring->head, memory_order_acquire);
    uint64_t tail = atomic_load_explicit(&ring->tail, memory_order_relaxed);
    size_t at = (size_t)(tail & (ring->capacity - 1));
    size_t to_end = ring->capacity - at;
    size_t skip = to_end < need ? to_end : 0;
    if (ring->capacity - (size_t)(tail - head) < need + skip)
        return STATUS_FULL;
    if (skip) {
        int32_t mark = SKIP;
        memcpy(ring->bytes + at, &mark, sizeof mark);
        at = 0;
    }
    uint32_t length = (uint32_t)bytes;
    memcpy(ring->bytes + at, &length, sizeof length);
    memcpy(ring->bytes + at + HEADER, record, bytes);
    atomic_store_explicit(&ring->tail, tail + skip + need, memory_order_release);
    return STATUS_OK;
}

bool ring_peek(struct ring *ring, const void **record, size_t *bytes)
{
    for (;;) {
        uint64_t head = atomic_load_explicit(&ring->head, memory_order_relaxed);
        uint64_t tail = atomic_load_explicit(&ring->tail, memory_order_acquire);
        if (head == tail)
            return false;
        size_t at = (size_t)(head & (ring->capacity - 1));
        int32_t length;
        memcpy(&length, ring->bytes + at, sizeof length);
        if (length == SKIP) {
            atomic_store_explicit(&ring->head, head + ring->capacity - at, memory_order_release);
            continue;
        }
        *record = ring->bytes + at + HEADER;
        *bytes = (size_t)length;
        return true;
    }
}

void ring_pop(struct ring *ring)
{
    const void *record;
    size_t bytes;
    CHECK(ring_peek(ring, &record, &bytes));
    uint64_t head = atomic_load_explicit(&ring->head, memory_order_relaxed);
    atomic_store_explicit(&ring->head, head + HEADER + round_up(bytes, 8), memory_order_release);
}
