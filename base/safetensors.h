// SPDX-License-Identifier: Apache-2.0
// The safetensors container, read strictly: what the reference reader refuses is refused here as
// well.
//
//   u64 little-endian header length | JSON header | data
//   header: { "name": { "dtype": "BF16", "shape": [2, 3], "data_offsets": [begin, end) }, ...,
//             "__metadata__": { "key": "value" } }
//
// Checked when opening, before any tensor is believed: header at most 100 MB and inside the file,
// begins with '{', UTF-8 JSON without duplicate names, known dtype of whole bytes (F4, F6 are
// refused by name), at most SAFETENSORS_DIMS_MAX dimensions, product of the shape times the element
// size (checked arithmetic) equal to end - begin, no overlap, no hole, the data covers the file
// exactly. Scalars (shape []) and dimensions of 0 are legal.
//
// Data is read with reader_read (pread), never mapped: a file cut short while serving gives
// STATUS_IO, not a signal. Offsets need not be aligned. Any thread; reading allocates nothing but
// for safetensors_digest.
#ifndef POLDER_BASE_SAFETENSORS_H
#define POLDER_BASE_SAFETENSORS_H

#include <stddef.h>
#include <stdint.h>

#include "base/hash.h"
#include "base/reader.h"
#include "base/status.h"

enum { SAFETENSORS_DIMS_MAX = 8, SAFETENSORS_HEADER_MAX = 100000000 };

// name in the file, bytes per element
#define TENSOR_TYPE_LIST(X)                                                                        \
    X(BOOL, 1)                                                                                     \
    X(U8, 1)                                                                                       \
    X(I8, 1)                                                                                       \
    X(F8_E5M2, 1)                                                                                  \
    X(F8_E4M3, 1)                                                                                  \
    X(F8_E8M0, 1)                                                                                  \
    X(I16, 2)                                                                                      \
    X(U16, 2)                                                                                      \
    X(F16, 2)                                                                                      \
    X(BF16, 2)                                                                                     \
    X(I32, 4)                                                                                      \
    X(U32, 4)                                                                                      \
    X(F32, 4)                                                                                      \
    X(C64, 8)                                                                                      \
    X(F64, 8)                                                                                      \
    X(I64, 8)                                                                                      \
    X(U64, 8)

enum tensor_type {
#define X(name, bytes) TENSOR_##name,
    TENSOR_TYPE_LIST(X)
#undef X
        TENSOR_TYPES
};

const char *tensor_type_name(enum tensor_type type);
size_t tensor_type_bytes(enum tensor_type type);

struct tensor {
    const char *name; // lives as long as the container
    enum tensor_type type;
    uint32_t dims;
    uint64_t shape[SAFETENSORS_DIMS_MAX];
    uint64_t elements, bytes;
    uint64_t offset; // from the beginning of the file
};

struct safetensors;

// `label` names the file in faults. The reader is not owned and must outlive the container.
// CORRUPT, UNSUPPORTED, LIMIT, IO, NO_MEMORY.
MUST_USE enum status safetensors_open(struct reader *reader, const char *label,
                                      struct safetensors **out, struct fault *fault);
void safetensors_close(struct safetensors *file);

size_t safetensors_count(const struct safetensors *file);
// In the order of the data; index < count.
const struct tensor *safetensors_at(const struct safetensors *file, size_t index);
const struct tensor *safetensors_find(const struct safetensors *file, const char *name); // or NULL
// Value of a key of "__metadata__", NULL when there is none.
const char *safetensors_metadata(const struct safetensors *file, const char *key);

// Bytes [begin, begin + bytes) of a tensor as they stand in the file.
MUST_USE enum status safetensors_read(const struct safetensors *file, const struct tensor *tensor,
                                      uint64_t begin, void *out, size_t bytes, struct fault *fault);

// Digest of a tensor: of its name, type, dimensions and bytes. `name` and `type` may be others than
// its own: BF16 of an F32 tensor, INVALID when that would round a value. progress may be NULL.
MUST_USE enum status safetensors_digest(const struct safetensors *file, const struct tensor *tensor,
                                        const char *name, enum tensor_type type,
                                        void (*progress)(void *context, uint64_t bytes),
                                        void *context, struct digest *out, struct fault *fault);

// Elements [first, first + count) of an F32, F16 or BF16 tensor (others: UNSUPPORTED), converted;
// to bf16 with round to nearest even. A value that is NaN or infinite, in the file or after
// rounding, is refused with STATUS_NUMERIC and a sentence that names the tensor.
MUST_USE enum status safetensors_read_f32(const struct safetensors *file,
                                          const struct tensor *tensor, uint64_t first, float *out,
                                          size_t count, struct fault *fault);
MUST_USE enum status safetensors_read_bf16(const struct safetensors *file,
                                           const struct tensor *tensor, uint64_t first,
                                           uint16_t *out, size_t count, struct fault *fault);

#endif
