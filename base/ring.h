// SPDX-License-Identifier: Apache-2.0
// A bounded single-producer single-consumer queue of byte records: the only way server threads and
// the engine talk. Records are plain structs without pointers, so that the engine can later live in
// another process. One producer thread, one consumer thread; no locks, no allocation after
// creation.
#ifndef POLDER_BASE_RING_H
#define POLDER_BASE_RING_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "base/status.h"

struct ring;

// capacity_bytes is rounded up to a power of two. The creator destroys.
MUST_USE enum status ring_create(size_t capacity_bytes, struct ring **out);
void ring_destroy(struct ring *ring);

// Producer. STATUS_FULL when the record does not fit now; STATUS_INVALID when it never can.
MUST_USE enum status ring_push(struct ring *ring, const void *record, size_t bytes);
// Producer: bytes that a single record may have right now.
size_t ring_room(const struct ring *ring);
// Producer: free bytes in all. Several records fit when the sum of their bytes + 16, and the
// largest once more (a record never wraps), is at most this.
size_t ring_free(const struct ring *ring);

// Consumer: the oldest record, valid until ring_pop; false when empty.
bool ring_peek(struct ring *ring, const void **record, size_t *bytes);
void ring_pop(struct ring *ring);

#endif
