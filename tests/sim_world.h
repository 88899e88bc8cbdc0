// SPDX-License-Identifier: Apache-2.0
// The whole serving stack over fakes: real engine, kv, experts, adapters, pool and copy queues;
// fake device, link, storage and clock. One thread; time moves only when the simulation moves it.
#ifndef POLDER_TESTS_SIM_WORLD_H
#define POLDER_TESTS_SIM_WORLD_H

#include "fake_device.h"
#include "fakes.h"
#include "runtime/engine/engine.h"
#include "sim_model.h"

enum { SIM_TENANTS = 4, SIM_CONTEXT = 96 };

struct sim_options {
    uint64_t seed;
    uint32_t device_pages,
        host_pages; // 0: just enough for one sequence, its adapter and two experts
    uint32_t sequences_max, rows_max, queue_max, halves_max;
    size_t event_bytes, chunk_bytes;
    enum fake_timing timing;
    uint32_t base_us, row_ns;
    uint64_t delay_min_us, delay_max_us; // of a chunk on the link
    bool (*force_leave)(void *context, uint32_t step_class, uint32_t half);
    void (*trace)(void *context, const char *line);
    void *context;
    bool may_block, no_plan_ahead;
    // The n-th one fails, from 1; 0: none.
    uint64_t fail_alloc, fail_chunk, fail_submit, fail_segment;
    uint64_t lose_copies; // the n-th chunk, and all behind it that are not reads, find no device
};

struct sim_world {
    struct sim_options options;
    struct sim_model *model; // not owned
    uint64_t now_us;
    struct device *device;
    struct fake_link link;
    struct copy_queues *copies;
    uint8_t *arena, *host_arena;
    struct pool *pool;
    struct kv *kv;
    struct experts *experts;
    struct adapters *adapters;
    struct engine_port port;
    struct engine *engine;
};

// Fewest device pages with which every request can be served.
uint32_t sim_pages_min(const struct sim_model *model);
// What failed is taken down again.
enum status sim_world_make(struct sim_world *world, struct sim_model *model,
                           const struct sim_options *options);
// CHECKs that nothing is left: pages, pins, device memory.
void sim_world_clear(struct sim_world *world);
// The next moment at which a segment or a chunk ends; UINT64_MAX: nothing is under way.
uint64_t sim_world_next_us(const struct sim_world *world);

// The simulated tokenizer: token to text, some characters split over two tokens.
size_t sim_decode(void *context, uint8_t *state, int32_t token, char *out, size_t room);
size_t sim_decode_finish(void *context, uint8_t *state, char *out, size_t room);

#endif
