// SPDX-License-Identifier: Apache-2.0
// A stack: everything an engine needs, made in order and undone in reverse. The server, the offline
// commands, the tests and the benchmarks all start one, so there is one place that knows the order.
//
//   device -> model (static weights, expert store) -> copy queues -> pool -> kv -> experts ->
//   adapters
//          -> port -> engine
//
// Made and destroyed by one thread; stack_start gives the engine to a thread of its own.
#ifndef POLDER_RUNTIME_ENGINE_STACK_H
#define POLDER_RUNTIME_ENGINE_STACK_H

#include "runtime/engine/engine.h"

struct stack_options {
    const char *model;             // Hugging Face directory
    const char *state_directory;   // expert store, converted adapters; made when missing
    const char *device;            // "cpu" (NULL: cpu), "cuda:N"
    double gpu_memory_utilization; // share of the GPU's free memory for the pool; 0: as needed
    bool batch_invariant;          // of a GPU: bits of a row do not depend on the other rows
    enum dtype dtype;
    const char *instruction_set; // NULL: the best this processor has
    uint32_t threads;            // 0: all cores
    struct comm *comm;    // NULL: alone; else loads and computes the share of comm->rank. Not owned
    uint64_t pool_bytes;  // 0: experts + KV of kv_contexts_default contexts + adapters' share
    uint64_t host_bytes;  // 0: 256 MiB, at least eight pages
    size_t page_bytes;    // 0: chosen to waste least
    uint32_t context_max; // 0: what the model allows, at most 32,768
    uint32_t sequences_max, rows_max, queue_max;                  // 0: 64, 512, 256
    uint32_t adapters_max, rank_max;                              // 0: 4096, 512
    uint32_t tenants_max;                                         // 0: 1
    uint32_t segment_halves_max;                                  // 0: 12
    double h2d_gbytes_per_s, d2h_gbytes_per_s, read_gbytes_per_s; // 0: as fast as it goes
    uint32_t link_latency_us;
    bool no_prefix_sharing, no_plan_ahead;
    bool owns_state; // a server: one per state directory, and it tidies what a kill left there
    struct engine_text_decoder decoder;
    void (*trace)(void *context, const char *line);
    void *trace_context;
    bool (*force_leave)(void *context, uint32_t step_class, uint32_t half);
    void *force_leave_context;
    void (*progress)(void *context, uint64_t done_bytes, uint64_t total_bytes);
    void *progress_context;
};

struct stack; // opaque

MUST_USE enum status stack_create(const struct stack_options *options, struct stack **out,
                                  struct fault *fault);
// Starts the engine thread. Without it the caller turns the engine itself (tests).
MUST_USE enum status stack_start(struct stack *stack);
// Sends ENGINE_QUIT when the thread still runs, joins it, undoes everything.
void stack_destroy(struct stack *stack);

struct engine *stack_engine(struct stack *stack);
struct engine_port *stack_port(struct stack *stack);
const struct model *stack_model(const struct stack *stack);
struct pool *stack_pool(struct stack *stack);
struct copy_queues *stack_copies(struct stack *stack);
struct experts *stack_experts(struct stack *stack); // NULL for a dense model
struct kv *stack_kv(struct stack *stack);
struct adapters *stack_adapters(struct stack *stack);
struct engine_limits stack_limits(const struct stack *stack);
// What is needed to convert adapters for this stack; any thread. Lives as long as the stack.
const struct adapter_base *stack_adapter_base(const struct stack *stack);
size_t stack_page_bytes(const struct stack *stack);
const struct kv_shape *stack_kv_shape(const struct stack *stack);
// "cpu avx512bf16, 2 threads" and the sizes, one line, for the log.
void stack_describe(const struct stack *stack, char *out, size_t room);

// Converts directory into <state>/adapters/<name>.adapter. Any thread.
MUST_USE enum status stack_convert_adapter(const struct stack *stack, const char *name,
                                           const char *directory, char *store_path,
                                           size_t store_path_room, struct adapter_report *report,
                                           struct fault *fault);
// Before stack_start: converts and registers.
MUST_USE enum status stack_add_adapter(struct stack *stack, const char *name, const char *directory,
                                       struct adapter_report *report, struct fault *fault);
// Before stack_start: registers every store file already in <state>/adapters that fits this base,
// NAME.adapter as the operator's, NAME@TENANT.adapter as that tenant's; others are named in the log
// and left alone. owner_of (may be NULL: all are the operator's) gives a tenant's number,
// UINT32_MAX when unknown. Returns how many.
uint32_t stack_load_adapters(struct stack *stack,
                             uint32_t (*owner_of)(void *context, const char *tenant),
                             void *context);
// Of these, by name, those that could not be registered; not those of unknown tenants.
struct stack_left {
    char name[ENGINE_ADAPTER_NAME], tenant[ENGINE_ADAPTER_NAME]; // tenant "": the operator's
    char why[160];
};
const struct stack_left *stack_left_alone(const struct stack *stack, size_t *count);

// What an adapter is converted for, without loading the model: its digest still reads every weight
// once. base points into config.
struct stack_identity {
    struct model_config config;
    struct adapter_base base;
    size_t page_bytes;
};
MUST_USE enum status stack_identify(const struct stack_options *options, struct stack_identity *out,
                                    struct fault *fault);
void stack_identity_clear(struct stack_identity *identity);

// Opens the device only to ask what is free on it; UINT64_MAX: host memory. INVALID: there is no
// such name; other failures say why the device cannot be had.
MUST_USE enum status stack_device_free(const struct stack_options *options, uint64_t *free_bytes,
                                       struct fault *fault);

// How the pool would be filled, without loading weights (polder serve --dry-run).
struct stack_fit {
    struct model_fit model;
    uint64_t pool_bytes, pool_pages, expert_pages, kv_bytes_per_token, kv_tokens, host_bytes;
    uint64_t work_bytes, table_bytes, total_bytes;
    uint64_t adapter_bytes;     // a rank-16 adapter of q, k, v and o, as a measure
    uint64_t adapters_that_fit; // of those, in what all experts leave of the pool
    uint32_t context_max;
};
// Refuses with a sentence what cannot fit the pool or the machine's memory. Clear
// out->model.config.
MUST_USE enum status stack_fit(const struct stack_options *options, uint64_t memory_bytes,
                               struct stack_fit *out, struct fault *fault);

#endif
