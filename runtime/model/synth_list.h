// SPDX-License-Identifier: Apache-2.0
// Shared inside runtime/model: the shapes of random models and their tensors, in the order of the
// file, for checkpoints that are written (synth.c) and for those that exist in memory only
// (synth_source.c). Any thread; plain data.
#ifndef POLDER_RUNTIME_MODEL_SYNTH_LIST_H
#define POLDER_RUNTIME_MODEL_SYNTH_LIST_H

#include <stddef.h>
#include <stdint.h>
#include <stdio.h>

#include "runtime/model/model.h"

enum { SYNTH_NAME_BYTES = 96, SYNTH_CONFIG_BYTES = 2048 };

#define SHAPE_FIELDS(X)                                                                            \
    X(hidden)                                                                                      \
    X(layers)                                                                                      \
    X(heads)                                                                                       \
    X(kv_heads)                                                                                    \
    X(head_dim)                                                                                    \
    X(vocab) X(max_positions) X(intermediate) X(experts) X(top_k) X(moe_intermediate)              \
        X(sparse_step) X(tied) X(rope_theta) X(shard_mib)

struct synth_shape {
    const char *name;
#define X(field) uint32_t field;
    SHAPE_FIELDS(X)
#undef X
};

struct synth_entry {
    char name[SYNTH_NAME_BYTES];
    uint64_t rows, cols; // cols 0: a vector
    float sd;            // 0: a norm
    uint32_t shard;
};

struct synth_list {
    struct synth_shape shape;
    struct synth_entry *entries; // in the order of the files
    size_t count, capacity;
    uint32_t shards;
    uint64_t total; // bytes
};

uint64_t synth__elements(const struct synth_entry *entry);

// name NULL: "tiny". Overrides are "key=value" (synth.h).
MUST_USE enum status synth__shape(const char *name, const char *const *overrides, size_t count,
                                  struct synth_shape *out, struct fault *fault);
// The text of config.json, judged by the loader's own parser; clear *config.
MUST_USE enum status synth__config(const struct synth_shape *shape, char out[SYNTH_CONFIG_BYTES],
                                   struct model_config *config, struct fault *fault);
// Lists the tensors of list->shape and deals them out to shards; the routed experts' only when
// asked for. The caller frees list->entries.
MUST_USE enum status synth__list(struct synth_list *list, const struct model_config *config,
                                 bool experts, struct fault *fault);
// The JSON of a safetensors header.
void synth__print_header(const struct synth_list *list, uint32_t shard, FILE *out);
// `count` values; `word` is the generator's counter at the first of them, in words of four values.
// sd 0: a norm's.
void synth__fill(float sd, uint64_t key, uint64_t word, uint16_t *out, size_t count);
// The standard deviations of a layer's matrices: what reads the residual, what is added to it.
double synth__sd_in(const struct synth_shape *shape);
double synth__sd_out(const struct synth_shape *shape, uint64_t inputs);

#endif
