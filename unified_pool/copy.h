// SPDX-License-Identifier: Apache-2.0
// Copy queues: three resources (host-to-device, device-to-host, file reads), one priority queue
// each, one order in all (DESIGN.md 7). Copies are cut into chunks of at most 1 MiB; a higher need
// overtakes at the next chunk; prefetches can be cancelled; every byte is charged to an owner.
//
// What moves the bytes is a `struct link`: worker threads at a configured speed (copy_link_threads,
// for the CPU backend), or the simulator's fake. Engine thread only; callbacks run inside
// copy_poll.
#ifndef POLDER_UNIFIED_POOL_COPY_H
#define POLDER_UNIFIED_POOL_COPY_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "base/clock.h"
#include "base/reader.h"
#include "base/status.h"

enum copy_resource { COPY_H2D, COPY_D2H, COPY_READ, COPY_RESOURCES };

// Most urgent first. COPY_GATE is what a running segment waits for: before everything else.
enum copy_class { COPY_INTERACTIVE, COPY_STANDARD, COPY_BATCH, COPY_CLASSES };
enum copy_need { COPY_GATE, COPY_ADAPTER, COPY_KV, COPY_PREFETCH, COPY_TIDY, COPY_NEEDS };

// One chunk on one resource. For COPY_READ `file` and `offset` name the source, else `from`.
struct copy_chunk {
    enum copy_resource resource;
    void *to;
    const void *from;
    struct reader *file;
    uint64_t offset;
    size_t bytes;
};

// The mechanism under the queues. It takes `depth` chunks of a resource at a time (0: one), and
// they end in the order in which they were started.
enum { COPY_DEPTH_MAX = 32, COPY_READ_THREADS_MAX = 4 };
struct link {
    void (*start)(struct link *link, const struct copy_chunk *chunk);
    // True when the oldest chunk of this resource is done (or none is under way); *status tells
    // how.
    bool (*poll)(struct link *link, enum copy_resource resource, enum status *status);
    void (*destroy)(struct link *link);
    uint32_t depth[COPY_RESOURCES];
};

struct link_options {
    double h2d_gbytes_per_s, d2h_gbytes_per_s, read_gbytes_per_s; // 0: as fast as it goes
    uint32_t latency_us;                                          // added to every chunk
    uint32_t read_threads; // 0: one, as always at a given speed
};

// Worker threads, one for each resource and read_threads for reads, that copy with memcpy and read
// from files, paced to the given speeds.
MUST_USE enum status copy_link_threads(const struct link_options *options, struct link **out);

// A device that copies by itself (device table: copy_start), and threads for the reads.
struct device;
MUST_USE enum status copy_link_device(struct device *device, const struct link_options *options,
                                      struct link **out);

struct copy_queues;

struct copy_options {
    struct link *link;
    struct clock clock;
    uint32_t copies_max; // queued at once, per resource
    uint32_t owners_max;
    size_t chunk_bytes; // 0: 1 MiB
};

typedef struct {
    uint64_t bits; // 0: none
} copy_id;

struct copy_request {
    struct copy_chunk whole; // bytes may exceed a chunk
    enum copy_class class;
    enum copy_need need;
    uint32_t owner;
    // OK, IO, CANCELLED, or DEVICE: the device that copies has failed
    void (*done)(void *context, uint64_t tag, enum status status);
    void *context;
    uint64_t tag;
};

// The link is the queues' own when this succeeds, else still the caller's.
MUST_USE enum status copy_create(const struct copy_options *options, struct copy_queues **out);
void copy_destroy(struct copy_queues *queues); // waits for chunks in flight; no callbacks
// FULL when copies_max are queued on this resource. Starts nothing: copy_poll does.
MUST_USE enum status copy_submit(struct copy_queues *queues, const struct copy_request *request,
                                 copy_id *out);
void copy_promote(struct copy_queues *queues, copy_id id, enum copy_class class,
                  enum copy_need need);
// The callback still comes (CANCELLED, at once when no chunk is in flight, else after it).
void copy_cancel(struct copy_queues *queues, copy_id id);
// Takes finished chunks, calls done(), starts the next ones, until no chunk is done. Not from
// done().
void copy_poll(struct copy_queues *queues);
bool copy_is_idle(const struct copy_queues *queues);
// A copy ended with DEVICE: none will do better, whoever asks again would ask for ever.
bool copy_device_failed(const struct copy_queues *queues);

struct copy_stats {
    uint64_t bytes[COPY_RESOURCES], copies[COPY_RESOURCES], cancelled;
    uint64_t busy_us[COPY_RESOURCES];
    uint32_t queued[COPY_RESOURCES];
};
void copy_stats(const struct copy_queues *queues, struct copy_stats *out);
uint64_t copy_owner_bytes(const struct copy_queues *queues, uint32_t owner,
                          enum copy_resource resource);

#endif
