// SPDX-License-Identifier: Apache-2.0
// The engine: continuous batching of many tenants' sequences over one model, one pool and one
// device.
//
// One thread owns the engine and everything it is given (pool, kv, experts, adapters, device
// streams); front ends talk to it through a port (port.h). The engine is a state machine:
// engine_turn does what can be done now and returns, so that the simulator can drive the same code
// on a fake clock.
//
// A step is planned (plan.h), then run as segments of half-layers. After each half-layer
// (attention, MLP) lies a preemption point: only the residual rows, the KV and the place are kept
// when a step is left there. At most one step per priority class is paused.
#ifndef POLDER_RUNTIME_ENGINE_ENGINE_H
#define POLDER_RUNTIME_ENGINE_ENGINE_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "adapters/adapters.h"
#include "base/clock.h"
#include "base/status.h"
#include "experts/experts.h"
#include "kernels/device.h"
#include "runtime/engine/port.h"
#include "runtime/kv/kv.h"
#include "runtime/model/model.h"

struct engine;

// Streaming decode, wired to the tokenizer by whoever makes the engine. `state` belongs to one
// sequence, zeroed at its start. Writes only complete UTF-8 characters, at most `room` bytes;
// returns the length.
struct engine_text_decoder {
    size_t (*decode)(void *context, uint8_t *state, int32_t token, char *out, size_t room);
    size_t (*finish)(void *context, uint8_t *state, char *out, size_t room); // what was left
    void *context;
};
enum { ENGINE_DECODE_STATE = 64 }; // bytes of state

struct engine_options {
    // Owned by the caller, used by the engine thread alone until engine_destroy.
    const struct model *model;
    struct device *device;
    struct comm *comm; // NULL: this is the only rank; else of the model's share
    struct pool *pool;
    struct copy_queues *copies;
    const uint8_t *arena; // device arena of the pool
    size_t page_bytes;
    struct kv *kv;
    struct kv_shape kv_shape;
    struct experts *experts;            // NULL for a dense model
    struct adapters *adapters;          // NULL: no adapters
    struct engine_text_decoder decoder; // decode NULL: events carry token ids and no text
    struct engine_port *port;
    struct clock clock;

    uint32_t sequences_max; // running at once (--max-num-seqs)
    uint32_t rows_max;      // token budget of a step (--max-num-batched-tokens)
    uint32_t context_max;   // tokens of one sequence (--max-model-len)
    uint32_t queue_max;     // waiting sequences
    uint32_t tenants_max;
    uint32_t rank_max;           // largest adapter rank that may be registered
    uint32_t segment_halves_max; // half-layers submitted as one unit, 1..12
    struct digest secret;        // prefix keys: tenant salts are derived from it

    void (*trace)(void *context, const char *line); // --trace-plan, or NULL
    void *trace_context;
    // Test hook: forces the running step to be left at a preemption point. NULL in production.
    bool (*force_leave)(void *context, uint32_t step_class, uint32_t half);
    void *force_leave_context;
    bool no_plan_ahead; // plan a step only when the one before has given its results
    bool may_block; // wait inside engine_turn for a submitted segment (the CPU backend's threads)
};

MUST_USE enum status engine_create(const struct engine_options *options, struct engine **out,
                                   struct fault *fault);
void engine_destroy(struct engine *engine);

// BUSY: call again. WAITING: a copy or a segment is under way, call again soon. IDLE: nothing to do
// until a command comes. HALTED: after ENGINE_QUIT or a finished drain.
enum engine_turn { ENGINE_BUSY, ENGINE_WAITING, ENGINE_IDLE, ENGINE_HALTED };
enum engine_turn engine_turn(struct engine *engine);

// Turns until halted, sleeping on the port's eventfd when idle: the body of the engine thread.
void engine_run(struct engine *engine);

// Logits [vocab] of sample `index` of the last step that sampled, valid until the next turn. For
// tests and tools that turn the engine themselves, with no_plan_ahead or when nothing follows: a
// step that was planned ahead is already running when the results of the one before come out.
const float *engine_logits(const struct engine *engine, uint32_t index);

// Pairs per expert of the step that ran last, [MoE layers][experts]; NULL for a dense model.
// Likewise.
const uint32_t *engine_need(const struct engine *engine);

// Registers a store file, refusing ranks above rank_max with LIMIT. Engine thread.
MUST_USE enum status engine_register_adapter(struct engine *engine, const char *name,
                                             const char *store_path, uint32_t owner,
                                             struct fault *fault);

struct engine_counters {
    uint64_t steps, segments, gate_misses, pauses, swaps_out, swaps_in, drops;
    uint64_t rows;          // rows of finished steps
    uint64_t planned_ahead; // steps that were planned while one ran, and entered
    uint64_t ahead_dropped; // planned so, but given up
    uint64_t rows_surplus;  // of sequences that had ended when the step was already planned
    uint64_t half_rows_run, half_rows_due; // half-layers x rows; equal when nothing ran twice
    uint64_t rows_recomputed;              // positions computed again because their KV was dropped
    uint64_t requests, finished, failed, prompt_tokens, cached_tokens, generated_tokens;
    uint64_t submit_us, flight_us; // of segments: inside submit; from submit to retirement
    uint64_t captures;             // units captured (device_table.captures)
    uint32_t running, waiting;
};
void engine_counters(const struct engine *engine, struct engine_counters *out);
// Every invariant of engine, kv and pool; a broken one aborts.
void engine_check(const struct engine *engine);

// Pool pages that pinned things (KV of running sequences, adapters of the step) must leave to
// experts.
uint32_t engine_expert_floor(const struct expert_shape *shape, uint32_t top_k);

#endif
