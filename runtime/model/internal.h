// SPDX-License-Identifier: Apache-2.0
// Shared inside runtime/model: choosing the page size, placing the weights, writing the expert
// store.
#ifndef POLDER_RUNTIME_MODEL_INTERNAL_H
#define POLDER_RUNTIME_MODEL_INTERNAL_H

#include "runtime/model/checkpoint.h"
#include "runtime/model/model.h"
#include "runtime/model/synth.h"

// The shape of the routed experts under a page size; all zero for a dense model.
struct expert_shape model__expert_shape(const struct model_config *config, enum dtype dtype,
                                        size_t page_bytes);

// page_bytes 0: the size that wastes least; else checks the given one.
MUST_USE enum status model__page_bytes(const struct model_config *config, enum dtype dtype,
                                       size_t asked, size_t *out, struct fault *fault);

// One pass over all weights. Without `model->device` it claims every tensor, checks its shape and
// adds up static_bytes; with it, it also allocates and fills: the same code counts and places.
struct loader {
    struct model *model;
    struct checkpoint *checkpoint;
    bool fill;
    bool rows_wanted;           // dense weights as padded rows, not tiles (device_info.dense_tiles)
    struct synth_source *synth; // of "synth:NAME"; NULL: a directory
    void (*progress)(void *context, uint64_t bytes); // bytes read since the last call; may be NULL
    void *progress_context;
    uint8_t *rows, *tiles; // staging, grown as needed
    size_t rows_bytes, tiles_bytes;
};
MUST_USE enum status model__place(struct loader *loader, struct fault *fault);
void model__loader_clear(struct loader *loader);

// Claims the expert tensors of all MoE layers (per expert, or fused in either orientation).
MUST_USE enum status model__experts_claim(struct loader *loader, struct fault *fault);
// Writes them all into a new store at `path`.
MUST_USE enum status model__experts_store(struct loader *loader, const char *path,
                                          struct fault *fault);

#endif
