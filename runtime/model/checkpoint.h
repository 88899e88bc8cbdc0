// SPDX-License-Identifier: Apache-2.0
// Shared inside runtime/model: the tensors of a Hugging Face directory as one name space over its
// shards.
//
// model.safetensors.index.json when there is one (its file names are confined to the directory),
// else model.safetensors. Every tensor of every shard must be in the index and in the file that the
// index names. Each expected tensor is claimed once with its shape; what nobody claims is refused,
// except names that are known to carry no weights (checkpoint_finish). Loading thread only.
#ifndef POLDER_RUNTIME_MODEL_CHECKPOINT_H
#define POLDER_RUNTIME_MODEL_CHECKPOINT_H

#include <stdbool.h>

#include "base/hash.h"
#include "base/safetensors.h"
#include "kernels/tile.h"

struct checkpoint;

// One tensor of the checkpoint; valid until checkpoint_close.
struct weight {
    const struct safetensors *file;
    const struct tensor *tensor;
    bool claimed;
};

MUST_USE enum status checkpoint_open(const char *directory, struct checkpoint **out,
                                     struct fault *fault);
// Of one safetensors file, which it owns from here on, whatever comes out.
MUST_USE enum status checkpoint_open_reader(struct reader *reader, struct checkpoint **out,
                                            struct fault *fault);
void checkpoint_close(struct checkpoint *checkpoint);
uint64_t checkpoint_bytes(const struct checkpoint *checkpoint); // of all tensors

bool checkpoint_has(const struct checkpoint *checkpoint, const char *name);
// Finds a tensor whose shape must be shape[0..dims) and whose type can be converted. CORRUPT when
// it is missing or has another shape.
MUST_USE enum status checkpoint_claim(struct checkpoint *checkpoint, const char *name,
                                      const uint64_t *shape, uint32_t dims,
                                      const struct weight **out, struct fault *fault);
// Of a tensor that exists; the shape is the caller's business.
const struct tensor *checkpoint_look(const struct checkpoint *checkpoint, const char *name);
// Names one tensor that nobody claimed and says how many there are. tied: lm_head.weight may stay.
MUST_USE enum status checkpoint_finish(const struct checkpoint *checkpoint, bool tied,
                                       struct fault *fault);

// Elements [first, first + count) as `dtype`.
MUST_USE enum status weight_read(const struct weight *weight, enum dtype dtype, uint64_t first,
                                 void *out, size_t count, struct fault *fault);

// The digest of one tensor by its name, also kept for whom asks for it.
struct checkpoint_digest {
    const char *name;
    struct digest digest; // untouched when there is no such tensor
};

// Feeds the digest of each tensor (safetensors_digest) in the order of their names: independent of
// sharding.
MUST_USE enum status checkpoint_hash(const struct checkpoint *checkpoint,
                                     struct hash_stream *stream, struct checkpoint_digest *wanted,
                                     uint32_t wanted_count,
                                     void (*progress)(void *context, uint64_t bytes), void *context,
                                     struct fault *fault);

#endif
