// SPDX-License-Identifier: Apache-2.0
// See sim_world.h. The order of making and unmaking is that of runtime/engine/stack.c.
#include "sim_world.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "base/check.h"

enum { ADAPTERS_MAX = 64, ADAPTER_PAGES_MAX = 32 };

static uint32_t context_pages(const struct sim_model *model)
{
    return (uint32_t)div_up(SIM_CONTEXT, model->kv_shape.block_tokens) *
           model->kv_shape.pages_per_block;
}

static uint32_t adapter_pages_max(const struct sim_model *model)
{
    uint32_t most = 0;
    for (uint32_t i = 0; i < SIM_CONTENTS; i++) {
        struct reader *file = NULL;
        CHECK(reader_open(model->adapters[i].store, &file, NULL) == STATUS_OK);
        uint32_t pages = (uint32_t)(file->size / SIM_PAGE_BYTES); // header page included
        most = pages > most ? pages : most;
        reader_close(file);
    }
    return most;
}

uint32_t sim_pages_min(const struct sim_model *model)
{
    return context_pages(model) + adapter_pages_max(model) +
           engine_expert_floor(&model->model.expert_shape, model->model.config.top_k);
}

static void zero_pages(void *context, void *memory, size_t bytes)
{
    (void)context;
    memset(memory, 0, bytes);
}

// ---- text ----

size_t sim_decode(void *context, uint8_t *state, int32_t token, char *out, size_t room)
{
    (void)context;
    CHECK(room >= 8);
    size_t n = 0;
    if (state[0]) { // the second byte of an e with an acute accent comes with the next token
        out[n++] = (char)0xc3;
        out[n++] = (char)0xa9;
        state[0] = 0;
    }
    if (token % 11 == 10)
        state[0] = 1;
    else
        out[n++] = (char)('a' + token % 5);
    if (token % 3 == 0)
        out[n++] = (char)('a' + token % 7);
    return n;
}

size_t sim_decode_finish(void *context, uint8_t *state, char *out, size_t room)
{
    (void)context;
    CHECK(room >= 3);
    if (!state[0])
        return 0;
    state[0] = 0;
    memcpy(out, "\xef\xbf\xbd", 3);
    return 3;
}

// ---- life ----

static enum status make_device(struct sim_world *w)
{
    const struct sim_options *o = &w->options;
    struct fake_device_options device = {.now_us = &w->now_us,
                                         .timing = o->timing,
                                         .base_us = o->base_us,
                                         .row_ns = o->row_ns,
                                         .fail_alloc = o->fail_alloc,
                                         .fail_submit = o->fail_submit,
                                         .fail_segment = o->fail_segment,
                                         .pages = o->device_pages,
                                         .page_bytes = SIM_PAGE_BYTES};
    void *memory = NULL;
    enum status status = fake_device_create(&device, &w->device);
    if (!status)
        status =
            w->device->table->alloc(w->device, (size_t)o->device_pages * SIM_PAGE_BYTES, &memory);
    w->arena = memory;
    w->host_arena = calloc(o->host_pages, SIM_PAGE_BYTES);
    CHECK(w->host_arena);
    w->model->model.device = w->device;
    return status;
}

static enum status make_pool(struct sim_world *w)
{
    const struct sim_options *o = &w->options;
    const struct expert_shape *shape = &w->model->model.expert_shape;
    uint32_t experts = shape->layers * shape->experts;
    fake_link_init(&w->link, o->seed, &w->now_us);
    w->link.delay_min_us = o->delay_min_us;
    w->link.delay_max_us = o->delay_max_us;
    w->link.fail_at = o->fail_chunk;
    w->link.lose_at = o->lose_copies;
    struct copy_options copies = {.link = &w->link.link,
                                  .clock = clock_fake(&w->now_us),
                                  .copies_max = o->device_pages + o->host_pages + 64,
                                  .owners_max = SIM_TENANTS + 1,
                                  .chunk_bytes = o->chunk_bytes};
    enum status status = copy_create(&copies, &w->copies);
    struct pool_options pool = {.page_bytes = SIM_PAGE_BYTES,
                                .device_pages = o->device_pages,
                                .host_pages = o->host_pages,
                                .objects_max = experts + ADAPTERS_MAX * (1 + ADAPTER_PAGES_MAX) +
                                               o->device_pages + o->host_pages + 64,
                                .slots_max = experts * shape->pages_per_expert +
                                             ADAPTERS_MAX * ADAPTER_PAGES_MAX +
                                             17 * o->device_pages + o->host_pages + 64,
                                .owners_max = SIM_TENANTS + 1,
                                .device_arena = w->arena,
                                .host_arena = w->host_arena,
                                .copies = w->copies,
                                .zero = zero_pages};
    return status ? status : pool_create(&pool, &w->pool, NULL);
}

static enum status make_owners(struct sim_world *w)
{
    const struct sim_options *o = &w->options;
    struct kv_options kv = {.pool = w->pool,
                            .clock = clock_fake(&w->now_us),
                            .shape = w->model->kv_shape,
                            .page_bytes = SIM_PAGE_BYTES,
                            .sequences_max = o->sequences_max + o->queue_max,
                            .blocks_max =
                                (uint32_t)div_up(SIM_CONTEXT, w->model->kv_shape.block_tokens),
                            .recompute_us_per_token = 20.0f,
                            .prefix_sharing = true};
    kv.secret.bytes[3] = 9;
    struct expert_options experts = {.shape = w->model->model.expert_shape,
                                     .pool = w->pool,
                                     .device = w->device,
                                     .arena = w->arena,
                                     .store = w->model->model.expert_store,
                                     .clock = clock_fake(&w->now_us),
                                     .owner = SIM_TENANTS,
                                     .fetch_us_per_byte = 1e-3f};
    struct adapter_options adapters = {.pool = w->pool,
                                       .device = w->device,
                                       .arena = w->arena,
                                       .base = w->model->base,
                                       .clock = clock_fake(&w->now_us),
                                       .adapters_max = ADAPTERS_MAX,
                                       .resident_max = ADAPTERS_MAX,
                                       .fetch_us_per_byte = 1e-3f};
    enum status status = kv_create(&kv, &w->kv);
    if (!status && w->model->model.expert_store)
        status = experts_create(&experts, &w->experts, NULL);
    if (!status)
        status = adapters_create(&adapters, &w->adapters);
    return status;
}

static enum status make_engine(struct sim_world *w)
{
    const struct sim_options *o = &w->options;
    struct engine_options engine = {.model = &w->model->model,
                                    .device = w->device,
                                    .pool = w->pool,
                                    .copies = w->copies,
                                    .arena = w->arena,
                                    .page_bytes = SIM_PAGE_BYTES,
                                    .kv = w->kv,
                                    .kv_shape = w->model->kv_shape,
                                    .experts = w->experts,
                                    .adapters = w->adapters,
                                    .decoder = {.decode = sim_decode, .finish = sim_decode_finish},
                                    .port = &w->port,
                                    .clock = clock_fake(&w->now_us),
                                    .sequences_max = o->sequences_max,
                                    .rows_max = o->rows_max,
                                    .context_max = SIM_CONTEXT,
                                    .queue_max = o->queue_max,
                                    .tenants_max = SIM_TENANTS,
                                    .rank_max = SIM_RANK_MAX,
                                    .segment_halves_max = o->halves_max,
                                    .trace = o->trace,
                                    .trace_context = o->context,
                                    .force_leave = o->force_leave,
                                    .force_leave_context = o->context,
                                    .no_plan_ahead = o->no_plan_ahead,
                                    .may_block = o->may_block};
    engine.secret.bytes[0] = 1;
    struct fault fault = {.text = ""};
    if (engine_port_create(16384, o->event_bytes, &w->port))
        return STATUS_NO_MEMORY;
    enum status status = engine_create(&engine, &w->engine, &fault);
    if (status && !o->fail_alloc)
        fprintf(stderr, "engine_create: %s\n", fault.text);
    return status;
}

enum status sim_world_make(struct sim_world *world, struct sim_model *model,
                           const struct sim_options *options)
{
    memset(world, 0, sizeof *world);
    world->options = *options;
    world->model = model;
    world->now_us = 1000000;
    if (!world->options.device_pages)
        world->options.device_pages = sim_pages_min(model);
    enum status status = make_device(world);
    if (!status)
        status = make_pool(world);
    if (!status)
        status = make_owners(world);
    if (!status)
        status = make_engine(world);
    if (status)
        sim_world_clear(world);
    return status;
}

static void hurry(struct sim_world *w)
{
    w->link.delay_min_us = w->link.delay_max_us = 0;
    for (int r = 0; r < COPY_RESOURCES; r++) {
        w->link.flying[r].ready_us = 0;
        w->link.held[r] = false;
    }
}

static void check_pool_is_empty(struct sim_world *w)
{
    struct pool_stats p;
    for (int i = 0; i < 1000; i++)
        pool_poll(w->pool);
    pool_check(w->pool);
    pool_stats(w->pool, &p);
    CHECK(p.device_free == p.device_total && p.device_waiting == 0);
    CHECK(p.host_free == p.host_total);
}

void sim_world_clear(struct sim_world *world)
{
    struct fake_device_counts counts;
    hurry(world);
    engine_destroy(world->engine);
    if (world->port.commands)
        engine_port_destroy(&world->port);
    adapters_destroy(world->adapters);
    experts_destroy(world->experts);
    kv_destroy(world->kv);
    if (world->pool)
        check_pool_is_empty(world);
    if (world->copies)
        copy_destroy(world->copies);
    pool_destroy(world->pool);
    if (world->arena)
        world->device->table->release(world->device, world->arena);
    free(world->host_arena);
    fake_device_counts(world->device, &counts);
    CHECK(counts.live == 0);
    world->device->table->destroy(world->device);
    memset(world, 0, sizeof *world);
}

uint64_t sim_world_next_us(const struct sim_world *world)
{
    uint64_t next = fake_device_ready_us(world->device);
    for (int r = 0; r < COPY_RESOURCES; r++) {
        if (world->link.flying[r].is_busy && world->link.flying[r].ready_us < next)
            next = world->link.flying[r].ready_us;
    }
    return next;
}
