// SPDX-License-Identifier: Apache-2.0
// Random LoRA adapters for a stack under benchmark: how large they are, and getting all of them
// onto the device. Everything is called by the thread that turns the engine.
#ifndef POLDER_BENCH_BENCH_LORA_H
#define POLDER_BENCH_BENCH_LORA_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "runtime/engine/stack.h"

enum { BENCH_LORA_RANKS_MAX = 16 };

enum bench_lora_targets {
    BENCH_LORA_ALL,       // every projection
    BENCH_LORA_ATTENTION, // q, k, v, o
    BENCH_LORA_EXPERTS    // gate, up, down: of every expert, or of the dense MLP
};
bool bench_lora_targets_parse(const char *text, enum bench_lora_targets *out);
const char *bench_lora_targets_name(enum bench_lora_targets targets);

// `count` adapters; adapter i has rank[i % ranks] on the projections of `targets`.
struct bench_lora {
    uint32_t count, ranks, rank[BENCH_LORA_RANKS_MAX];
    enum bench_lora_targets targets;
};

void bench_lora_name(uint32_t index, char out[ADAPTER_NAME_MAX]);

// Pool pages of all adapters, packed as the store packs them.
uint64_t bench_lora_pages(const struct bench_lora *lora, const struct adapter_base *base,
                          size_t page_bytes);

// Bytes of the slices that a decode step of `batch` rows reads, row i with adapter i % count: every
// slice of the adapters in the batch, but of the routed experts' only min(top_k, experts) a layer
// and adapter. Exact for one row an adapter, too low for more (they may be routed elsewhere).
double bench_lora_step_bytes(const struct bench_lora *lora, const struct adapter_base *base,
                             uint32_t top_k, uint32_t batch);

// Multiplications of the LoRA of one token, whose adapter has the rank given; of the routed
// experts' only those of top_k.
double bench_lora_work(const struct bench_lora *lora, const struct adapter_base *base,
                       uint32_t top_k, uint32_t rank);

// A PEFT directory of the r-th rank, and its removal, whatever is there of it.
MUST_USE enum status bench_lora_peft(const struct bench_lora *lora, struct stack *stack, uint32_t r,
                                     const char *path, struct fault *fault);
void bench_lora_peft_remove(const char *path);

// Makes a store file of the r-th rank, which adapters of that rank may be registered from; the
// caller removes it. `scratch` is a directory to write in.
MUST_USE enum status bench_lora_store(const struct bench_lora *lora, struct stack *stack,
                                      uint32_t r, const char *scratch, char store[ENGINE_PATH],
                                      struct fault *fault);

// Makes and registers the adapters, then turns the engine until all are resident. `scratch` is a
// directory to write in; what is written there is gone on return, whatever the result. LIMIT, with
// a sentence, when the pool cannot hold them beside the experts.
MUST_USE enum status bench_lora_load(const struct bench_lora *lora, struct stack *stack,
                                     const char *scratch, struct fault *fault);

// All are resident, and no adapter was given back since the stack was made.
MUST_USE enum status bench_lora_check(const struct bench_lora *lora, struct stack *stack,
                                      struct fault *fault);

// Positive numbers between separators; how many, 0 when the text is anything else.
uint32_t bench_parse_list(const char *text, char separator, uint32_t *out, uint32_t room);
// A directory and all in it, as far as it can be removed.
void bench_remove_tree(const char *path);

#endif
