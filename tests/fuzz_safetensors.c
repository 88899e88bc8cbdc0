// SPDX-License-Identifier: Apache-2.0
// Opens any bytes as a safetensors file. What is accepted must keep the container's invariants:
// tensors tile the data, sizes fit, every element can be read, every name is found again.
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#include "base/check.h"
#include "base/safetensors.h"

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

struct memory {
    struct reader reader;
    const uint8_t *bytes;
};

static enum status memory_read(struct reader *reader, uint64_t offset, void *out, size_t bytes)
{
    if (bytes)
        memcpy(out, ((struct memory *)reader)->bytes + offset, bytes);
    return STATUS_OK;
}

static void check_tensor(const struct safetensors *file, const struct tensor *tensor)
{
    uint64_t elements = 1;
    CHECK(tensor->dims <= SAFETENSORS_DIMS_MAX);
    for (uint32_t i = 0; i < tensor->dims; i++)
        elements *= tensor->shape[i];
    CHECK(elements == tensor->elements);
    CHECK(tensor->bytes == elements * tensor_type_bytes(tensor->type));
    CHECK(safetensors_find(file, tensor->name) == tensor);
    uint8_t *bytes = malloc((size_t)tensor->bytes + 1);
    float *values = malloc((size_t)tensor->elements * sizeof(float) + 1);
    CHECK(bytes && values);
    CHECK(safetensors_read(file, tensor, 0, bytes, (size_t)tensor->bytes, NULL) == STATUS_OK);
    size_t count = (size_t)tensor->elements;
    enum status wide = safetensors_read_f32(file, tensor, 0, values, count, NULL);
    enum status narrow = safetensors_read_bf16(file, tensor, 0, (uint16_t *)values, count, NULL);
    CHECK(wide == STATUS_OK || wide == STATUS_NUMERIC || wide == STATUS_UNSUPPORTED);
    CHECK(wide == narrow || narrow == STATUS_NUMERIC);
    free(values);
    free(bytes);
}

static void run(const uint8_t *data, size_t size)
{
    struct memory memory = {.reader = {.read_at = memory_read, .size = size}, .bytes = data};
    struct safetensors *file = NULL;
    struct fault fault;
    if (safetensors_open(&memory.reader, "fuzz", &file, &fault)) {
        CHECK(fault.text[0]);
        return;
    }
    uint64_t covered = 0;
    for (size_t i = 0; i < safetensors_count(file); i++) {
        check_tensor(file, safetensors_at(file, i));
        covered += safetensors_at(file, i)->bytes;
    }
    CHECK(covered <= size);
    (void)safetensors_metadata(file, "format");
    safetensors_close(file);
}

// The input as a file; and, since a mutation of the header rarely fits the length before it, the
// input up to the first newline as a header with its true length, the rest as data.
int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    run(data, size);
    const uint8_t *newline = size ? memchr(data, '\n', size) : NULL;
    uint64_t header = newline ? (uint64_t)(newline - data) : size;
    size_t rest = newline ? size - (size_t)header - 1 : 0;
    uint8_t *file = malloc(8 + (size_t)header + rest);
    CHECK(file);
    memcpy(file, &header, 8);
    if (size)
        memcpy(file + 8, data, (size_t)header);
    if (rest)
        memcpy(file + 8 + header, newline + 1, rest);
    run(file, 8 + (size_t)header + rest);
    free(file);
    return 0;
}
