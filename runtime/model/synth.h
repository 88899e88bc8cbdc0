// SPDX-License-Identifier: Apache-2.0
// Random checkpoints of a named or given shape, for benchmarks and tests (polder synth).
//
// Writes a Hugging Face directory: safetensors shards in bf16 (per-expert tensors, index when there
// is more than one shard), then config.json last, so that a directory without config.json is an
// unfinished one. The same options give the same bytes. Any thread.
#ifndef POLDER_RUNTIME_MODEL_SYNTH_H
#define POLDER_RUNTIME_MODEL_SYNTH_H

#include <stddef.h>
#include <stdint.h>

#include "base/status.h"

struct synth_options {
    const char *directory; // created when missing; must not hold a config.json or model files
    const char *shape;     // "tiny", "demo", "qwen3-moe-2g"; NULL: "tiny"
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

#endif
