// SPDX-License-Identifier: Apache-2.0
// See stack.h. stack_size decides every size from options and model shape, for the real thing and
// for the dry run alike.
#include "runtime/engine/stack.h"

#include <dirent.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "adapters/registry.h"
#include "base/check.h"
#include "base/log.h"
#include "runtime/engine/stack_device.h"

struct stack {
    struct stack_options options;
    char state_directory[ENGINE_PATH]; // what options.state_directory points at
    struct device *device;
    struct model *model;
    struct copy_queues *copies;
    struct pool *pool;
    struct kv *kv;
    struct experts *experts;
    struct adapters *adapters;
    struct engine_port port;
    struct engine *engine;
    struct kv_shape kv_shape;
    struct adapter_base base;
    struct digest secret;
    uint8_t *device_arena, *host_arena;
    uint32_t device_pages, host_pages;
    uint64_t pool_bytes, host_bytes;
    size_t page_bytes;
    int lock;                // descriptor of the state directory's lock, or -1
    struct stack_left *left; // [left_count]
    size_t left_count;
    pthread_t thread;
    bool running;
};

enum { CONTEXT_DEFAULT_MAX = 32768, KV_CONTEXTS_DEFAULT = 8 };

static void default_u32(uint32_t *value, uint32_t otherwise)
{
    *value = *value ? *value : otherwise;
}

static void fill_defaults(struct stack_options *o, const struct model_config *c)
{
    uint32_t context =
        c->max_positions < CONTEXT_DEFAULT_MAX ? c->max_positions : CONTEXT_DEFAULT_MAX;
    default_u32(&o->context_max, context);
    default_u32(&o->sequences_max, 64);
    default_u32(&o->rows_max, 512);
    default_u32(&o->queue_max, 256);
    default_u32(&o->adapters_max, 4096);
    default_u32(&o->rank_max, 512);
    default_u32(&o->tenants_max, 1);
    default_u32(&o->segment_halves_max, 12);
    if (o->rows_max < o->sequences_max)
        o->rows_max = o->sequences_max;
}

static enum status check_context(const struct stack_options *o, const struct model_config *c,
                                 struct fault *fault)
{
    if (o->context_max > c->max_positions)
        return fault_set(fault, STATUS_INVALID,
                         "--max-model-len %u is longer than the model's %u positions.",
                         o->context_max, c->max_positions);
    return STATUS_OK;
}

// Pool and host sizes in whole pages.
static void choose_sizes(const struct stack_options *o, const struct model_config *c,
                         const struct expert_shape *shape, size_t page_bytes,
                         const struct kv_shape *kv, uint64_t *pool_bytes, uint64_t *host_bytes)
{
    uint64_t experts =
        (uint64_t)shape->layers * shape->experts * shape->pages_per_expert * page_bytes;
    uint64_t blocks = div_up(o->context_max, kv->block_tokens);
    uint64_t context = blocks * kv->pages_per_block * page_bytes;
    uint64_t wanted = experts + KV_CONTEXTS_DEFAULT * context + ((uint64_t)64 << 20);
    *pool_bytes = (o->pool_bytes ? o->pool_bytes : wanted) / page_bytes * page_bytes;
    uint64_t host = o->host_bytes ? o->host_bytes : (uint64_t)256 << 20;
    *host_bytes = max_size(host / page_bytes, 8) * page_bytes;
    (void)c;
}

static enum status lock_state(struct stack *s, struct fault *fault)
{
    enum status status = registry_make(s->options.state_directory, fault);
    if (!status && s->options.owns_state)
        status = registry_lock(s->options.state_directory, &s->lock, fault);
    return status;
}

static enum status make_device_and_model(struct stack *s, struct fault *fault)
{
    struct stack_options *o = &s->options;
    enum status status = stack__device_open(o, &s->device, fault);
    if (status)
        return status;
    struct model_options model = {.directory = o->model,
                                  .state_directory = o->state_directory,
                                  .page_bytes = o->page_bytes,
                                  .rank = o->comm ? o->comm->rank : 0,
                                  .world = o->comm ? o->comm->world : 1,
                                  .progress = o->progress,
                                  .progress_context = o->progress_context};
    status = model_load(s->device, &model, &s->model, fault);
    if (status)
        return status;
    fill_defaults(o, &s->model->config);
    return check_context(o, &s->model->config, fault);
}

// The epoch rule says that no segment reads the page now. A failure is the device's: the next
// segment ends with it.
static void zero_pages(void *context, void *memory, size_t bytes)
{
    struct device *device = context;
    if (device->table->zero_now(device, memory, bytes))
        log_line(LOG_ERROR, "a page could not be zeroed.");
}

static enum status make_arenas(struct stack *s, struct fault *fault)
{
    const struct device_table *table = s->device->table;
    void *memory = NULL;
    s->device_pages = (uint32_t)(s->pool_bytes / s->page_bytes);
    s->host_pages = (uint32_t)(s->host_bytes / s->page_bytes);
    if (!s->device_pages)
        return fault_set(fault, STATUS_INVALID,
                         "--pool-bytes holds not even one page of %zu bytes.", s->page_bytes);
    enum status status = table->alloc(s->device, s->pool_bytes, &memory);
    if (status == STATUS_DEVICE)
        return fault_set(fault, status, "the device failed while the pool was made.");
    if (status)
        return stack__no_room(s->device, "a pool", s->pool_bytes, "--pool-bytes", fault);
    s->device_arena = memory;
    if (table->alloc_host(s->device, s->host_bytes, &memory))
        return fault_set(fault, STATUS_NO_MEMORY,
                         "a host tier of %llu MiB could not be had; lower --host-bytes.",
                         (unsigned long long)(s->host_bytes >> 20));
    s->host_arena = memory;
    return STATUS_OK;
}

// Adapters that are registered, resident or not, may have 16 times the pages of the device.
static uint64_t adapter_slots(const struct stack *s)
{
    return 65536 + 16ull * s->device_pages;
}

static enum status make_pool(struct stack *s, struct fault *fault)
{
    struct stack_options *o = &s->options;
    const struct expert_shape *shape = &s->model->expert_shape;
    uint32_t experts = shape->layers * shape->experts;
    uint32_t owners = o->tenants_max + 1; // and one for the base model's experts
    struct link *link = NULL;
    enum status status = stack__link_open(o, s->device, &link);
    if (status)
        return fault_set(fault, status, "the copy threads could not be started.");
    struct copy_options copies = {.link = link,
                                  .clock = clock_monotonic(),
                                  .copies_max = s->device_pages + s->host_pages + 1024,
                                  .owners_max = owners};
    status = copy_create(&copies, &s->copies);
    if (status) {
        link->destroy(link);
        return fault_set(fault, status, "the copy queues could not be made.");
    }
    // KV objects: every device and host page could be a block of its own.
    uint64_t objects = (uint64_t)experts + o->adapters_max + s->device_pages + s->host_pages + 64;
    if (experts) // pages of expert LoRA are objects of their own
        objects += adapter_slots(s);
    // Every kind has its own: registered adapters cannot use up what KV needs.
    uint64_t slots = (uint64_t)experts * shape->pages_per_expert + s->host_pages + s->device_pages +
                     adapter_slots(s);
    struct pool_options pool = {.page_bytes = s->page_bytes,
                                .device_pages = s->device_pages,
                                .host_pages = s->host_pages,
                                .objects_max = (uint32_t)objects,
                                .slots_max = (uint32_t)slots,
                                .owners_max = owners,
                                .device_arena = s->device_arena,
                                .host_arena = s->host_arena,
                                .copies = s->copies,
                                .zero = zero_pages,
                                .zero_context = s->device};
    return pool_create(&pool, &s->pool, fault);
}

// What a byte of an expert or adapter costs to bring back, in microseconds: the copies' own cost,
// measured over single pages on two cores (12.1 GB in 28.8 s), then the link's speed and latency as
// configured.
static float fetch_price(const struct stack *s)
{
    const struct stack_options *o = &s->options;
    double price = 28.8 / 12.1e3 + (double)o->link_latency_us / (double)s->page_bytes;
    if (o->h2d_gbytes_per_s > 0)
        price += 1.0 / (o->h2d_gbytes_per_s * 1e3);
    if (o->read_gbytes_per_s > 0)
        price += 1.0 / (o->read_gbytes_per_s * 1e3);
    return (float)price;
}

static enum status make_kv(struct stack *s, struct fault *fault)
{
    const struct stack_options *o = &s->options;
    struct kv_options kv = {.pool = s->pool,
                            .clock = clock_monotonic(),
                            .shape = s->kv_shape,
                            .page_bytes = s->page_bytes,
                            .sequences_max = o->sequences_max + o->queue_max,
                            .blocks_max =
                                (uint32_t)div_up(o->context_max, s->kv_shape.block_tokens),
                            .secret = s->secret,
                            .recompute_us_per_token = 100.0f,
                            .prefix_sharing = !o->no_prefix_sharing};
    if (kv_create(&kv, &s->kv))
        return fault_set(fault, STATUS_NO_MEMORY, "out of memory for the KV tables.");
    return STATUS_OK;
}

static void fill_base(const struct model_config *c, enum dtype dtype,
                      const struct model_digests *digests, struct adapter_base *out)
{
    *out = (struct adapter_base){.layers = c->layers,
                                 .hidden = c->hidden,
                                 .heads = c->heads,
                                 .kv_heads = c->kv_heads,
                                 .head_dim = c->head_dim,
                                 .intermediate = c->intermediate,
                                 .experts = c->experts,
                                 .moe_intermediate = c->moe_intermediate,
                                 .vocab = c->vocab,
                                 .tied = c->tied_embeddings,
                                 .is_moe = c->is_moe,
                                 .dtype = dtype,
                                 .digest = digests->model,
                                 .embedding_weights = digests->embedding,
                                 .head_weights = digests->head};
}

enum status stack_identify(const struct stack_options *options, struct stack_identity *out,
                           struct fault *fault)
{
    struct model_options model = {.directory = options->model,
                                  .page_bytes = options->page_bytes,
                                  .progress = options->progress,
                                  .progress_context = options->progress_context};
    struct model_digests digests;
    enum status status =
        model_identify(&model, options->dtype, &out->config, &out->page_bytes, &digests, fault);
    if (!status)
        fill_base(&out->config, options->dtype, &digests, &out->base);
    return status;
}

void stack_identity_clear(struct stack_identity *identity)
{
    model_config_clear(&identity->config);
}

static enum status make_residents(struct stack *s, struct fault *fault)
{
    const struct stack_options *o = &s->options;
    struct expert_options experts = {.shape = s->model->expert_shape,
                                     .pool = s->pool,
                                     .device = s->device,
                                     .arena = s->device_arena,
                                     .store = s->model->expert_store,
                                     .clock = clock_monotonic(),
                                     .owner = o->tenants_max,
                                     .fetch_us_per_byte = fetch_price(s)};
    enum status status = STATUS_OK;
    if (s->model->expert_shape.experts)
        status = experts_create(&experts, &s->experts, fault);
    if (status)
        return status;
    fill_base(&s->model->config, s->model->dtype, &s->model->digests, &s->base);
    struct adapter_options adapters = {.pool = s->pool,
                                       .device = s->device,
                                       .arena = s->device_arena,
                                       .base = s->base,
                                       .clock = clock_monotonic(),
                                       .adapters_max = o->adapters_max,
                                       .resident_max = o->adapters_max,
                                       .slots_max = adapter_slots(s),
                                       .fetch_us_per_byte = fetch_price(s)};
    if (adapters_create(&adapters, &s->adapters))
        return fault_set(fault, STATUS_NO_MEMORY, "out of memory for the adapter registry.");
    return STATUS_OK;
}

static enum status make_engine(struct stack *s, struct fault *fault)
{
    const struct stack_options *o = &s->options;
    if (engine_port_create((size_t)8 << 20, (size_t)8 << 20, &s->port))
        return fault_set(fault, STATUS_NO_MEMORY, "out of memory for the engine's queues.");
    struct engine_options engine = {.model = s->model,
                                    .device = s->device,
                                    .comm = o->comm,
                                    .pool = s->pool,
                                    .copies = s->copies,
                                    .arena = s->device_arena,
                                    .page_bytes = s->page_bytes,
                                    .kv = s->kv,
                                    .kv_shape = s->kv_shape,
                                    .experts = s->experts,
                                    .adapters = s->adapters,
                                    .decoder = o->decoder,
                                    .port = &s->port,
                                    .clock = clock_monotonic(),
                                    .sequences_max = o->sequences_max,
                                    .rows_max = o->rows_max,
                                    .context_max = o->context_max,
                                    .queue_max = o->queue_max,
                                    .tenants_max = o->tenants_max,
                                    .rank_max = o->rank_max,
                                    .segment_halves_max = o->segment_halves_max,
                                    .secret = s->secret,
                                    .trace = o->trace,
                                    .trace_context = o->trace_context,
                                    .force_leave = o->force_leave,
                                    .force_leave_context = o->force_leave_context,
                                    .no_plan_ahead = o->no_plan_ahead,
                                    .may_block = stack__may_block(s->device)};
    return engine_create(&engine, &s->engine, fault);
}

static enum status build(struct stack *s, struct fault *fault)
{
    enum status status = lock_state(s, fault);
    if (!status)
        status = make_device_and_model(s, fault);
    if (status)
        return status;
    const struct model_config *c = &s->model->config;
    s->page_bytes = s->model->page_bytes;
    status = kv_shape_choose(c->layers, s->model->share.kv_heads, c->head_dim, s->model->dtype,
                             s->page_bytes, &s->kv_shape, fault);
    if (status)
        return status;
    choose_sizes(&s->options, c, &s->model->expert_shape, s->page_bytes, &s->kv_shape,
                 &s->pool_bytes, &s->host_bytes);
    if (!s->options.pool_bytes)
        stack__fit_pool(&s->options, s->device, s->page_bytes, &s->pool_bytes);
    random_bytes(&s->secret, sizeof s->secret);
    status = make_arenas(s, fault);
    if (!status)
        status = make_pool(s, fault);
    if (!status)
        status = make_kv(s, fault);
    if (!status)
        status = make_residents(s, fault);
    if (!status)
        status = make_engine(s, fault);
    return status;
}

enum status stack_create(const struct stack_options *options, struct stack **out,
                         struct fault *fault)
{
    struct stack *s = calloc(1, sizeof *s);
    if (!s)
        return fault_set(fault, STATUS_NO_MEMORY, "out of memory.");
    s->options = *options;
    s->lock = -1;
    (void)snprintf(s->state_directory, sizeof s->state_directory, "%s", options->state_directory);
    s->options.state_directory = s->state_directory;
    enum status status = build(s, fault);
    if (status) {
        stack_destroy(s);
        return status;
    }
    *out = s;
    return STATUS_OK;
}

static void *engine_thread(void *argument)
{
    engine_run(argument);
    return NULL;
}

enum status stack_start(struct stack *stack)
{
    CHECK(!stack->running);
    if (pthread_create(&stack->thread, NULL, engine_thread, stack->engine))
        return STATUS_NO_MEMORY;
    stack->running = true;
    return STATUS_OK;
}

static void stop(struct stack *s)
{
    struct engine_control quit = {.kind = ENGINE_QUIT};
    const void *record;
    size_t bytes;
    // The engine may wait for room in the event ring: keep emptying it until the command is in.
    while (engine_send(&s->port, &quit, sizeof quit)) {
        while (ring_peek(s->port.events, &record, &bytes))
            ring_pop(s->port.events);
        if (pthread_tryjoin_np(s->thread, NULL) == 0)
            return; // it had halted by itself
    }
    for (bool stopped = false; !stopped;) {
        while (ring_peek(s->port.events, &record, &bytes)) {
            uint32_t kind;
            memcpy(&kind, record, sizeof kind);
            stopped = stopped || kind == ENGINE_STOPPED;
            ring_pop(s->port.events);
        }
        if (pthread_tryjoin_np(s->thread, NULL) == 0)
            return;
        struct timespec little = {.tv_nsec = 1000000};
        (void)nanosleep(&little, NULL);
    }
    (void)pthread_join(s->thread, NULL);
}

void stack_destroy(struct stack *stack)
{
    if (!stack)
        return;
    if (stack->options.comm)
        stack->options.comm->table->leave(stack->options.comm); // nobody waits for this rank
    if (stack->running)
        stop(stack);
    engine_destroy(stack->engine);
    engine_port_destroy(&stack->port);
    adapters_destroy(stack->adapters);
    experts_destroy(stack->experts);
    kv_destroy(stack->kv);
    if (stack->copies)
        copy_destroy(stack->copies);
    pool_destroy(stack->pool);
    if (stack->device_arena)
        stack->device->table->release(stack->device, stack->device_arena);
    if (stack->host_arena)
        stack->device->table->release_host(stack->device, stack->host_arena);
    model_destroy(stack->model);
    if (stack->device)
        stack->device->table->destroy(stack->device);
    if (stack->lock >= 0)
        (void)close(stack->lock);
    free(stack->left);
    free(stack);
}

// ---- faces ----

struct engine *stack_engine(struct stack *stack)
{
    return stack->engine;
}

struct engine_port *stack_port(struct stack *stack)
{
    return &stack->port;
}

const struct model *stack_model(const struct stack *stack)
{
    return stack->model;
}

struct pool *stack_pool(struct stack *stack)
{
    return stack->pool;
}

struct copy_queues *stack_copies(struct stack *stack)
{
    return stack->copies;
}

struct experts *stack_experts(struct stack *stack)
{
    return stack->experts;
}

struct kv *stack_kv(struct stack *stack)
{
    return stack->kv;
}

struct adapters *stack_adapters(struct stack *stack)
{
    return stack->adapters;
}

const struct adapter_base *stack_adapter_base(const struct stack *stack)
{
    return &stack->base;
}

size_t stack_page_bytes(const struct stack *stack)
{
    return stack->page_bytes;
}

const struct kv_shape *stack_kv_shape(const struct stack *stack)
{
    return &stack->kv_shape;
}

struct engine_limits stack_limits(const struct stack *stack)
{
    const struct model_config *c = &stack->model->config;
    struct engine_limits limits = {.vocab = c->vocab,
                                   .context_tokens = stack->options.context_max,
                                   .queue_max = stack->options.queue_max,
                                   .eos_count = c->eos_count};
    for (uint32_t i = 0; i < c->eos_count && i < ARRAY_COUNT(limits.eos); i++)
        limits.eos[i] = c->eos[i];
    return limits;
}

void stack_describe(const struct stack *stack, char *out, size_t room)
{
    struct device_info info;
    stack->device->table->info(stack->device, &info);
    (void)snprintf(
        out, room,
        "%s; %s, %.1f MiB static weights; pool %.1f MiB in %u pages of %zu KiB, KV blocks of "
        "%u tokens, host tier %.1f MiB, context %u",
        info.name, stack->model->config.architecture,
        (double)stack->model->static_bytes / 1048576.0, (double)stack->pool_bytes / 1048576.0,
        stack->device_pages, stack->page_bytes / 1024, stack->kv_shape.block_tokens,
        (double)stack->host_bytes / 1048576.0, stack->options.context_max);
}

// ---- adapters on disk ----

enum status stack_convert_adapter(const struct stack *stack, const char *name,
                                  const char *directory, char *store_path, size_t store_path_room,
                                  struct adapter_report *report, struct fault *fault)
{
    if (!adapter_name_is_valid(name))
        return fault_set(
            fault, STATUS_INVALID,
            "\"%.80s\" is not an adapter name; use letters, digits, '.', '_' and '-', at "
            "most %d.",
            name, ADAPTER_NAME_MAX - 1);
    // Only a server leaves stores behind under their names.
    const char *directory_of = stack->options.state_directory;
    int n =
        stack->options.owns_state
            ? snprintf(store_path, store_path_room, "%s/adapters/%s.adapter", directory_of, name)
            : snprintf(store_path, store_path_room, "%s/adapters/%s-%d.adapter.new", directory_of,
                       name, (int)getpid());
    if (n < 0 || (size_t)n >= store_path_room)
        return fault_set(fault, STATUS_INVALID, "the state directory's path is too long.");
    bool same = false;
    struct adapter_summary now;
    uint32_t version =
        adapter_version_at(store_path, directory, &stack->base, stack->page_bytes, &same);
    if (same && !adapter_inspect(store_path, true, &now, NULL)) {
        *report = now.report;
        return STATUS_OK;
    }
    return adapter_convert_version(directory, &stack->base, stack->page_bytes, version + 1,
                                   store_path, report, fault);
}

enum status stack_add_adapter(struct stack *stack, const char *name, const char *directory,
                              struct adapter_report *report, struct fault *fault)
{
    char path[ENGINE_PATH];
    enum status status =
        stack_convert_adapter(stack, name, directory, path, sizeof path, report, fault);
    if (!status)
        status =
            engine_register_adapter(stack->engine, name, path, stack->options.tenants_max, fault);
    if (!stack->options.owns_state)
        (void)unlink(path); // the registry has it open
    return status;
}

// Its owner is told; without memory for that it is only in the log.
static void leave_alone(struct stack *stack, const struct registry_entry *entry, const char *why)
{
    struct stack_left *more = realloc(stack->left, (stack->left_count + 1) * sizeof *stack->left);
    if (!more)
        return;
    struct stack_left *left = &more[stack->left_count++];
    stack->left = more;
    (void)snprintf(left->name, sizeof left->name, "%s", entry->name);
    (void)snprintf(left->tenant, sizeof left->tenant, "%s", entry->tenant);
    (void)snprintf(left->why, sizeof left->why, "%s", why);
}

const struct stack_left *stack_left_alone(const struct stack *stack, size_t *count)
{
    *count = stack->left_count;
    return stack->left;
}

static bool load_store(struct stack *stack, const struct registry_entry *entry, uint32_t owner)
{
    char path[REGISTRY_PATH] = "";
    struct fault fault = {.text = ""};
    adapter_id id;
    bool is_there = !adapter_find(stack->adapters, entry->name, &id);
    if (is_there && !entry->tenant[0])
        return false; // the command line has just converted it
    if (is_there)
        (void)fault_set(&fault, STATUS_EXISTS, "there is another adapter of this name.");
    else if (owner == UINT32_MAX)
        (void)fault_set(&fault, STATUS_DENIED, "its tenant is not in the tenants file.");
    else if (!registry_path(stack->options.state_directory, entry, path, &fault) &&
             !engine_register_adapter(stack->engine, entry->name, path, owner, &fault))
        return true;
    log_line(LOG_WARN, "the stored adapter \"%s\" of %s%s was left alone: %s", entry->name,
             entry->tenant[0] ? "tenant " : "the operator", entry->tenant, fault.text);
    if (!is_there && owner != UINT32_MAX)
        leave_alone(stack, entry, fault.text);
    return false;
}

uint32_t stack_load_adapters(struct stack *stack,
                             uint32_t (*owner_of)(void *context, const char *tenant), void *context)
{
    struct registry_entry *entries = NULL;
    size_t entry_count = 0;
    uint32_t count = 0;
    struct fault fault;
    const char *state = stack->options.state_directory;
    // Conversions that a kill interrupted.
    if (stack->options.owns_state && registry_collect(state, NULL, NULL, &fault))
        log_line(LOG_WARN, "the state directory was not tidied: %s", fault.text);
    if (registry_list(state, &entries, &entry_count, &fault))
        log_line(LOG_WARN, "no adapters from the state directory: %s", fault.text);
    for (size_t i = 0; i < entry_count; i++) { // by name, the operator's first
        uint32_t owner = entries[i].tenant[0] && owner_of ? owner_of(context, entries[i].tenant)
                                                          : stack->options.tenants_max;
        count += load_store(stack, &entries[i], owner);
    }
    free(entries);
    return count;
}

// ---- dry run ----

enum status stack_device_free(const struct stack_options *options, uint64_t *free_bytes,
                              struct fault *fault)
{
    struct device *device = NULL;
    enum status status = stack__device_open(options, &device, fault);
    if (status)
        return status;
    size_t available = device->table->free_bytes(device);
    *free_bytes = available == SIZE_MAX ? UINT64_MAX : available;
    device->table->destroy(device);
    return STATUS_OK;
}

// Work areas, tables and queues, as engine.c, pool.c and kv.c size them, to within a few percent.
static void fit_memory(const struct stack_options *o, const struct model_config *c,
                       const struct kv_shape *kv, struct stack_fit *out)
{
    enum { POOL_SLOT = 16, POOL_PAGE = 32, POOL_OBJECT = 96, KV_BLOCK = 96, RINGS = 16 << 20 };
    uint64_t rows = o->rows_max, runs = o->sequences_max, pairs = rows * (c->top_k ? c->top_k : 1);
    uint64_t q = (uint64_t)c->heads * c->head_dim, kv_n = 2ull * c->kv_heads * c->head_dim;
    uint64_t blocks = div_up(o->context_max, kv->block_tokens);
    uint64_t row = c->hidden * 4ull * (ENGINE_CLASSES + 2) + (q + kv_n) * 4 + q * 4 +
                   (c->intermediate ? c->intermediate * 12ull : 0) + 3ull * o->rank_max * 4;
    out->work_bytes = rows * row + pairs * (c->hidden * 4ull + c->moe_intermediate * 4ull + 16) +
                      runs * c->vocab * 4ull +
                      2ull * ENGINE_CLASSES * runs * blocks * kv->pages_per_block * 4 +
                      (runs + o->queue_max) * o->context_max * 4ull;
    uint64_t pages = out->pool_pages + out->host_bytes / out->model.page_bytes;
    out->table_bytes = RINGS + pages * (POOL_PAGE + POOL_OBJECT + KV_BLOCK) +
                       (out->expert_pages + 17 * out->pool_pages + 65536) * POOL_SLOT +
                       (runs + o->queue_max) * blocks * 4;
    uint64_t bytes = o->dtype == DTYPE_BF16 ? 2 : 4;
    out->adapter_bytes = 16ull * c->layers * bytes * (4ull * c->hidden + 2 * q + kv_n);
    out->total_bytes = out->model.static_bytes + out->pool_bytes + out->host_bytes +
                       out->work_bytes + out->table_bytes;
}

enum status stack_fit(const struct stack_options *options, uint64_t memory_bytes,
                      struct stack_fit *out, struct fault *fault)
{
    struct stack_options o = *options;
    memset(out, 0, sizeof *out);
    enum status status = model_fit(o.model, o.dtype, o.page_bytes, &out->model, fault);
    if (status)
        return status;
    const struct model_config *c = &out->model.config;
    fill_defaults(&o, c);
    struct kv_shape kv;
    struct expert_shape shape = {.experts = c->experts,
                                 .hidden = c->hidden,
                                 .intermediate = c->moe_intermediate,
                                 .dtype = o.dtype,
                                 .page_bytes = out->model.page_bytes};
    for (uint32_t layer = 0; layer < c->layers; layer++)
        shape.layers += c->is_moe[layer];
    if (shape.layers && shape.experts)
        expert_shape_complete(&shape);
    status = check_context(&o, c, fault);
    if (!status)
        status = kv_shape_choose(c->layers, c->kv_heads, c->head_dim, o.dtype,
                                 out->model.page_bytes, &kv, fault);
    if (status)
        return status;
    choose_sizes(&o, c, &shape, out->model.page_bytes, &kv, &out->pool_bytes, &out->host_bytes);
    out->context_max = o.context_max;
    out->pool_pages = out->pool_bytes / out->model.page_bytes;
    out->expert_pages = (uint64_t)shape.layers * shape.experts * shape.pages_per_expert;
    out->kv_bytes_per_token = kv.pages_per_block * out->model.page_bytes / kv.block_tokens;
    uint64_t left = out->pool_pages > out->expert_pages ? out->pool_pages - out->expert_pages : 0;
    out->kv_tokens = left / kv.pages_per_block * kv.block_tokens;
    fit_memory(&o, c, &kv, out);
    out->adapters_that_fit = left * out->model.page_bytes / out->adapter_bytes;
    uint64_t floor = engine_expert_floor(&shape, c->top_k);
    uint64_t one = div_up(o.context_max, kv.block_tokens) * kv.pages_per_block;
    if (one + floor > out->pool_pages)
        return fault_set(
            fault, STATUS_LIMIT,
            "the pool has %llu pages, but one sequence of %u tokens needs %llu and one "
            "token's experts %llu: raise --pool-bytes or lower --max-model-len.",
            (unsigned long long)out->pool_pages, o.context_max, (unsigned long long)one,
            (unsigned long long)floor);
    if (memory_bytes && out->total_bytes > memory_bytes)
        return fault_set(fault, STATUS_NO_MEMORY,
                         "%llu MiB are needed and this machine has %llu MiB: lower --pool-bytes, "
                         "--host-bytes or --max-num-seqs.",
                         (unsigned long long)(out->total_bytes >> 20),
                         (unsigned long long)(memory_bytes >> 20));
    return STATUS_OK;
}
