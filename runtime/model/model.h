// SPDX-License-Identifier: Apache-2.0
// A loaded base model: configuration, static weights on the device, routed experts in a store file.
//
// Loads a Hugging Face directory (config.json, model.safetensors or sharded with an index,
// tokenizer.json) for Qwen3-MoE and dense Qwen3; every other architecture or unknown option that
// changes the maths is refused by name. Static weights (embeddings, attention, norms, routers,
// dense MLPs, head) live in device memory outside the pool; routed experts always live in the pool
// and come from the expert store.
#ifndef POLDER_RUNTIME_MODEL_MODEL_H
#define POLDER_RUNTIME_MODEL_MODEL_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "base/hash.h"
#include "base/reader.h"
#include "base/status.h"
#include "experts/experts.h"
#include "kernels/device.h"

enum { MODEL_EOS_MAX = 8 };

struct model_config {
    char architecture[64]; // "Qwen3MoeForCausalLM", "Qwen3ForCausalLM"
    uint32_t hidden, layers, heads, kv_heads, head_dim, vocab, max_positions;
    uint32_t intermediate;                     // dense MLP units, 0 when no layer is dense
    uint32_t experts, top_k, moe_intermediate; // 0 for a dense model
    bool normalize_top_k, tied_embeddings;
    float rms_epsilon;
    double rope_theta;
    uint32_t eos[MODEL_EOS_MAX], eos_count; // config.json and generation_config.json
    uint8_t *is_moe;                        // [layers]
};

// Parses config.json (and generation_config.json when there is one). Frees with model_config_clear.
MUST_USE enum status model_config_load(const char *directory, struct model_config *out,
                                       struct fault *fault);
MUST_USE enum status model_config_parse(const char *text, size_t bytes, struct model_config *out,
                                        struct fault *fault);
void model_config_clear(struct model_config *config);

// What this rank of several (kernels/comm.h) holds: a whole number of heads, units and experts.
// With one rank: all of them.
struct model_share {
    uint32_t rank, world;
    uint32_t heads, kv_heads, intermediate;
    struct expert_range experts;
};

// The share of a rank; refuses what does not divide. world 0 counts as 1.
MUST_USE enum status model_share(const struct model_config *config, uint32_t rank, uint32_t world,
                                 struct model_share *out, struct fault *fault);

struct model_digests {
    struct digest model; // of config, tokenizer and weights: what adapters and KV keys name
    // safetensors_digest of the embeddings and of lm_head; zero: there is no such tensor, or none
    // is read (synth).
    struct digest embedding, head;
};

struct model_layer {
    float *attention_norm, *mlp_norm; // [hidden]
    float *q_norm, *k_norm;           // [head_dim]
    // Heads, KV heads and units of the share.
    void *qkv;            // tiles, (heads + 2 * kv_heads) * head_dim x hidden, q then k then v
    void *o;              // tiles, hidden x heads * head_dim
    float *router;        // [experts][hidden], MoE layers
    void *gate_up, *down; // dense layers: interleaved tiles, tiles
};

struct model {
    struct model_config config; // of the whole model
    struct model_share share;
    enum dtype dtype;
    struct device *device;
    void *embedding; // [vocab][hidden] row-major, compute dtype
    void *head;      // tiles, vocab x hidden
    float *final_norm;
    float *inv_freq; // [head_dim / 2]
    struct model_layer *layers;
    size_t page_bytes;                // of the pool that will serve this model
    struct expert_shape expert_shape; // experts 0 for a dense model
    struct reader *expert_store;      // NULL for a dense model
    struct model_digests digests;
    size_t static_bytes;
};

struct model_options {
    const char *directory;
    const char
        *state_directory; // where the expert store is kept (named by digest, dtype and page size)
    size_t page_bytes;    // 0: chosen to waste least
    uint32_t rank, world; // loads the share of one rank; world 0: all
    void (*progress)(void *context, uint64_t done_bytes, uint64_t total_bytes);
    void *progress_context;
};

MUST_USE enum status model_load(struct device *device, const struct model_options *options,
                                struct model **out, struct fault *fault);
void model_destroy(struct model *model);

// What a model will need, from config.json and the safetensors headers alone (polder serve
// --dry-run).
struct model_fit {
    struct model_config config; // clear with model_config_clear
    size_t page_bytes, static_bytes, expert_bytes, kv_bytes_per_token;
};
MUST_USE enum status model_fit(const char *directory, enum dtype dtype, size_t page_bytes,
                               struct model_fit *out, struct fault *fault);

// The page size and the digests that model_load would give, without a device or a store: reads
// every weight once. The caller clears *config.
MUST_USE enum status model_identify(const struct model_options *options, enum dtype dtype,
                                    struct model_config *config, size_t *page_bytes,
                                    struct model_digests *digests, struct fault *fault);

#endif
