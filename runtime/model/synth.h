// SPDX-License-Identifier: Apache-2.0
// Random checkpoints of a named or given shape, for benchmarks and tests (polder synth).
//
// Writes a Hugging Face directory: safetensors shards in bf16 (per-expert tensors, index when there
// is more than one shard), then config.json last, so that a directory without config.json is an
// unfinished one. The same options give the same bytes. Any thread.
//
// Or in memory only: a model named "synth:SHAPE[,key=value...]" is never written anywhere. Its
// checkpoint and its expert store are readers that make up every byte when it is read, at the speed
// of a copy. Keys are those of overrides, and seed=N, router_skew=S: experts' popularity falls
// about as rank^-S (0: as even as random weights make it, which is the worst case for residency).
#ifndef POLDER_RUNTIME_MODEL_SYNTH_H
#define POLDER_RUNTIME_MODEL_SYNTH_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "base/hash.h"
#include "base/status.h"

struct synth_options {
    const char *directory; // created when missing; must not hold a config.json or model files
    const char *shape;     // "tiny", "demo", "qwen3-moe-2g", "qwen3-30b-a3b", ...; NULL: "tiny"
    // "key=value": hidden, layers, heads, kv_heads, head_dim, vocab, max_positions, intermediate,
    // experts (0: dense Qwen3), top_k, moe_intermediate, sparse_step, tied (0 or 1), rope_theta,
    // shard_mib
    const char *const *overrides;
    size_t override_count;
    const char *tokenizer_directory; // tokenizer.json is copied from here; NULL: none
    uint64_t seed;
    void (*progress)(void *context, uint64_t done_bytes, uint64_t total_bytes); // may be NULL
    void *progress_context;
};

// INVALID names the override or the shape; EXISTS when the directory holds a model.
MUST_USE enum status synth_write(const struct synth_options *options, struct fault *fault);

struct synth_source;
struct checkpoint;
struct expert_shape;
struct model_config;
struct reader;

bool synth_is_name(const char *model); // "synth:..."
// Also fills *config, which the caller clears.
MUST_USE enum status synth_open(const char *name, struct synth_source **out,
                                struct model_config *config, struct fault *fault);
void synth_close(struct synth_source *source); // NULL is fine
// The static weights; without routed experts' tensors.
MUST_USE enum status synth_checkpoint(const struct synth_source *source, struct checkpoint **out,
                                      struct fault *fault);
// The routed experts, laid out as in a store file. Both readers outlive the source.
MUST_USE enum status synth_store(const struct synth_source *source,
                                 const struct expert_shape *shape, struct reader **out,
                                 struct fault *fault);
struct digest synth_digest(const struct synth_source *source);

#endif
