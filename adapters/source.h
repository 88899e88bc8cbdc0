// SPDX-License-Identifier: Apache-2.0
// The two files an adapter is made from, open, and the digest of what is in them (folder-internal).
//
// The digest comes from the very bytes that are converted: the container is read through `reader`,
// which hashes what passes while a tensor is being read. Whoever converts says which tensor that
// is; what nobody has read is read at the end. One thread.
#ifndef POLDER_ADAPTERS_SOURCE_H
#define POLDER_ADAPTERS_SOURCE_H

#include <stdbool.h>
#include <stdint.h>

#include "base/hash.h"
#include "base/reader.h"
#include "base/safetensors.h"
#include "base/status.h"

#define SOURCE_CONFIG "adapter_config.json"
#define SOURCE_WEIGHTS "adapter_model.safetensors"

struct source {
    struct reader reader; // over `file`
    struct reader *file;
    struct safetensors *container;
    struct digest *digests; // [tensors], by place in the file
    bool *known;            // [tensors]
    bool hashing;           // a tensor is being read
    struct hash_stream stream;
};

// `out` must stay where it is. After this source__close, also when it failed.
MUST_USE enum status source__open(const char *directory, struct source *out, struct fault *fault);
void source__close(struct source *source);

// Between these two a tensor is read through the container, from its first byte to its last, in
// pieces of HASH_PIECE bytes or more at a time.
void source__tensor_begin(struct source *source);
void source__tensor_end(struct source *source, const struct tensor *tensor, bool good);

// The digest of both files (docs/formats.md 8).
MUST_USE enum status source__digest(struct source *source, const char *directory,
                                    struct digest *out, struct fault *fault);

#endif
