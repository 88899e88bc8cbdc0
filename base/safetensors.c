// SPDX-License-Identifier: Apache-2.0
// The safetensors container. Owns the parsed header and the list of tensors; the reader is the
// caller's. It does not decide which tensors a model needs.
//
// Invariants once safetensors_open has returned OK:
//   1. tensors[] is in ascending order of offset and tiles the data area: the first begins where
//   the
//      header ends, each next one where the last ended, the last ends at the end of the file.
//   2. elements = product of the shape and bytes = elements * element size, neither overflowed.
//   3. names are unique (the JSON parser refuses duplicates) and by_name[] is sorted by them.
// The JSON text comes from outside: jansson checks UTF-8, depth and integer range, refuses NUL in
// names.
#include "base/safetensors.h"

#include <jansson.h>
#include <math.h>
#include <stdbool.h>
#include <stdlib.h>
#include <string.h>

#include "base/arith.h"
#include "base/check.h"
#include "base/hash.h"

enum { LENGTH_BYTES = 8, CONVERT_ELEMENTS = 8192, DIGEST_CHUNK = 1 << 20 };

struct safetensors {
    struct reader *reader;
    json_t *header;                // owns the names
    struct tensor *tensors;        // [count], by offset
    const struct tensor **by_name; // [count]
    size_t count;
    char label[128];
};

const char *tensor_type_name(enum tensor_type type)
{
    static const char *const names[] = {
#define X(name, bytes) #name,
        TENSOR_TYPE_LIST(X)
#undef X
    };
    return (unsigned)type < TENSOR_TYPES ? names[type] : "?";
}

size_t tensor_type_bytes(enum tensor_type type)
{
    static const size_t sizes[] = {
#define X(name, bytes) bytes,
        TENSOR_TYPE_LIST(X)
#undef X
    };
    CHECK((unsigned)type < TENSOR_TYPES);
    return sizes[type];
}

// ---- the header ----

static enum status corrupt(const struct safetensors *file, const char *what, struct fault *fault)
{
    return fault_set(fault, STATUS_CORRUPT, "%s is not a valid safetensors file: %s.", file->label,
                     what);
}

static enum status read_header(struct safetensors *file, uint64_t *data_begin, struct fault *fault)
{
    uint8_t raw[LENGTH_BYTES];
    if (file->reader->size < LENGTH_BYTES)
        return corrupt(file, "it is shorter than 8 bytes", fault);
    enum status status = reader_read(file->reader, 0, raw, sizeof raw);
    if (status)
        return fault_set(fault, status, "reading %s failed.", file->label);
    uint64_t length = 0;
    for (int i = LENGTH_BYTES - 1; i >= 0; i--)
        length = length << 8 | raw[i];
    if (length > SAFETENSORS_HEADER_MAX)
        return corrupt(file, "its header claims more than 100 MB", fault);
    if (length > file->reader->size - LENGTH_BYTES)
        return corrupt(file, "its header ends beyond the file", fault);
    char *text = malloc((size_t)length + 1);
    if (!text)
        return fault_set(fault, STATUS_NO_MEMORY, "out of memory while reading %s.", file->label);
    status = reader_read(file->reader, LENGTH_BYTES, text, (size_t)length);
    if (status) {
        status = fault_set(fault, status, "reading %s failed.", file->label);
    } else if (length == 0 || text[0] != '{') {
        status = corrupt(file, "its header does not begin with '{'", fault);
    } else {
        json_error_t error;
        file->header = json_loadb(text, (size_t)length, JSON_REJECT_DUPLICATES, &error);
        if (!file->header)
            status = fault_set(fault, STATUS_CORRUPT,
                               "%s is not a valid safetensors file: its header, byte %d: %.80s.",
                               file->label, error.position, error.text);
    }
    free(text);
    *data_begin = LENGTH_BYTES + length;
    return status;
}

static enum status entry_fault(const struct safetensors *file, const char *name, const char *what,
                               struct fault *fault)
{
    return fault_set(fault, STATUS_CORRUPT, "%s: tensor \"%.100s\": %s.", file->label, name, what);
}

static enum status parse_type(const struct safetensors *file, const char *name, const char *text,
                              enum tensor_type *out, struct fault *fault)
{
    static const char *const sub_byte[] = {"F4", "F6_E2M3", "F6_E3M2"};
    if (!text)
        return entry_fault(file, name, "it has no dtype", fault);
    for (unsigned type = 0; type < TENSOR_TYPES; type++)
        if (!strcmp(text, tensor_type_name((enum tensor_type)type))) {
            *out = (enum tensor_type)type;
            return STATUS_OK;
        }
    for (size_t i = 0; i < ARRAY_COUNT(sub_byte); i++)
        if (!strcmp(text, sub_byte[i]))
            return fault_set(fault, STATUS_UNSUPPORTED,
                             "%s: tensor \"%.100s\" has dtype %s; types of less than a byte are "
                             "not supported.",
                             file->label, name, text);
    return fault_set(fault, STATUS_CORRUPT,
                     "%s: tensor \"%.100s\" has the unknown dtype \"%.20s\".", file->label, name,
                     text);
}

static bool json_u64(const json_t *value, uint64_t *out)
{
    if (!json_is_integer(value) || json_integer_value(value) < 0)
        return false;
    *out = (uint64_t)json_integer_value(value);
    return true;
}

static enum status parse_shape(const struct safetensors *file, const json_t *shape,
                               struct tensor *tensor, struct fault *fault)
{
    size_t dims = json_array_size(shape);
    if (!json_is_array(shape))
        return entry_fault(file, tensor->name, "its shape is not a list", fault);
#ifndef POLDER_PLANT_BUG
    if (dims > SAFETENSORS_DIMS_MAX)
        return entry_fault(file, tensor->name, "it has more than 8 dimensions", fault);
#endif
    size_t elements = 1;
    for (size_t i = 0; i < dims; i++) {
        if (!json_u64(json_array_get(shape, i), &tensor->shape[i]))
            return entry_fault(file, tensor->name, "its shape is not made of natural numbers",
                               fault);
        if (!mul_size(elements, (size_t)tensor->shape[i], &elements))
            return entry_fault(file, tensor->name, "its shape is too large", fault);
    }
    tensor->dims = (uint32_t)dims;
    tensor->elements = elements;
    return STATUS_OK;
}

static enum status parse_entry(const struct safetensors *file, const char *name,
                               const json_t *entry, uint64_t data_begin, struct tensor *tensor,
                               struct fault *fault)
{
    *tensor = (struct tensor){.name = name};
    if (!json_is_object(entry))
        return entry_fault(file, name, "its entry is not an object", fault);
    enum status status = parse_type(file, name, json_string_value(json_object_get(entry, "dtype")),
                                    &tensor->type, fault);
    if (!status)
        status = parse_shape(file, json_object_get(entry, "shape"), tensor, fault);
    if (status)
        return status;
    const json_t *offsets = json_object_get(entry, "data_offsets");
    uint64_t begin = 0, end = 0;
    if (json_array_size(offsets) != 2 || !json_u64(json_array_get(offsets, 0), &begin) ||
        !json_u64(json_array_get(offsets, 1), &end) || begin > end)
        return entry_fault(file, name, "its data_offsets are not [begin, end]", fault);
    size_t bytes = 0;
    if (!mul_size((size_t)tensor->elements, tensor_type_bytes(tensor->type), &bytes) ||
        bytes != end - begin)
        return entry_fault(file, name, "its shape and dtype do not need as many bytes as it has",
                           fault);
    if (end > file->reader->size - data_begin)
        return entry_fault(file, name, "it ends beyond the file (truncated?)", fault);
    tensor->bytes = bytes;
    tensor->offset = data_begin + begin;
    return STATUS_OK;
}

static int compare_offset(const void *a, const void *b)
{
    const struct tensor *x = a, *y = b;
    if (x->offset != y->offset)
        return x->offset < y->offset ? -1 : 1;
    if (x->bytes != y->bytes)
        return x->bytes < y->bytes ? -1 : 1;
    return strcmp(x->name, y->name);
}

static int compare_name(const void *a, const void *b)
{
    const struct tensor *const *x = a, *const *y = b;
    return strcmp((*x)->name, (*y)->name);
}

// Invariant 1: no overlap, no hole, the whole file.
static enum status check_cover(const struct safetensors *file, uint64_t data_begin,
                               struct fault *fault)
{
    uint64_t at = data_begin;
    for (size_t i = 0; i < file->count; i++) {
        const struct tensor *tensor = &file->tensors[i];
        if (tensor->offset != at)
            return entry_fault(file, tensor->name,
                               tensor->offset < at ? "its data overlaps another tensor's"
                                                   : "there is a hole before its data",
                               fault);
        at += tensor->bytes;
    }
    if (at != file->reader->size)
        return corrupt(file, "the tensors do not cover the file exactly", fault);
    return STATUS_OK;
}

static enum status check_metadata(const struct safetensors *file, const json_t *metadata,
                                  struct fault *fault)
{
    const char *key;
    json_t *value;
    if (!json_is_object(metadata))
        return corrupt(file, "__metadata__ is not an object", fault);
    json_object_foreach((json_t *)metadata, key, value)
    {
        if (!json_is_string(value))
            return corrupt(file, "__metadata__ holds something that is not a string", fault);
    }
    return STATUS_OK;
}

static enum status parse_header(struct safetensors *file, uint64_t data_begin, struct fault *fault)
{
    size_t capacity = json_object_size(file->header);
    file->tensors = calloc(capacity + 1, sizeof *file->tensors);
    file->by_name = calloc(capacity + 1, sizeof *file->by_name);
    if (!file->tensors || !file->by_name)
        return fault_set(fault, STATUS_NO_MEMORY, "out of memory while reading %s.", file->label);
    const char *name;
    json_t *entry;
    json_object_foreach(file->header, name, entry)
    {
        enum status status =
            !strcmp(name, "__metadata__")
                ? check_metadata(file, entry, fault)
                : parse_entry(file, name, entry, data_begin, &file->tensors[file->count++], fault);
        if (status)
            return status;
    }
    qsort(file->tensors, file->count, sizeof *file->tensors, compare_offset);
    for (size_t i = 0; i < file->count; i++)
        file->by_name[i] = &file->tensors[i];
    qsort(file->by_name, file->count, sizeof *file->by_name, compare_name);
    return check_cover(file, data_begin, fault);
}

enum status safetensors_open(struct reader *reader, const char *label, struct safetensors **out,
                             struct fault *fault)
{
    struct safetensors *file = calloc(1, sizeof *file);
    if (!file)
        return fault_set(fault, STATUS_NO_MEMORY, "out of memory while reading %s.", label);
    file->reader = reader;
    (void)strncpy(file->label, label, sizeof file->label - 1);
    uint64_t data_begin = 0;
    enum status status = read_header(file, &data_begin, fault);
    if (!status)
        status = parse_header(file, data_begin, fault);
    if (status) {
        safetensors_close(file);
        return status;
    }
    *out = file;
    return STATUS_OK;
}

void safetensors_close(struct safetensors *file)
{
    if (!file)
        return;
    json_decref(file->header);
    free(file->tensors);
    free(file->by_name);
    free(file);
}

size_t safetensors_count(const struct safetensors *file)
{
    return file->count;
}

const struct tensor *safetensors_at(const struct safetensors *file, size_t index)
{
    CHECK(index < file->count);
    return &file->tensors[index];
}

const struct tensor *safetensors_find(const struct safetensors *file, const char *name)
{
    const struct tensor key = {.name = name}, *pointer = &key;
    const struct tensor *const *found =
        bsearch(&pointer, file->by_name, file->count, sizeof *file->by_name, compare_name);
    return found ? *found : NULL;
}

const char *safetensors_metadata(const struct safetensors *file, const char *key)
{
    return json_string_value(json_object_get(json_object_get(file->header, "__metadata__"), key));
}

// ---- the data ----

enum status safetensors_read(const struct safetensors *file, const struct tensor *tensor,
                             uint64_t begin, void *out, size_t bytes, struct fault *fault)
{
    CHECK(begin <= tensor->bytes && bytes <= tensor->bytes - begin);
    enum status status = reader_read(file->reader, tensor->offset + begin, out, bytes);
    if (status)
        return fault_set(fault, status, "reading tensor \"%.100s\" of %s failed.", tensor->name,
                         file->label);
    return STATUS_OK;
}

static float f32_from_bits(uint32_t bits)
{
    float value;
    memcpy(&value, &bits, sizeof value);
    return value;
}

static float f32_from_f16(uint16_t half)
{
    uint32_t sign = (uint32_t)(half & 0x8000u) << 16, exponent = half >> 10 & 31u;
    uint32_t fraction = half & 0x3ffu;
    if (exponent == 0) { // subnormal: fraction * 2^-24 is exact
        float value = (float)fraction * 0x1p-24f;
        return sign ? -value : value;
    }
    uint32_t wide = exponent == 31 ? 255 : exponent + 112;
    return f32_from_bits(sign | wide << 23 | fraction << 13);
}

// Round to nearest even; the caller has refused NaN. A value beyond the largest bf16 becomes
// infinite.
static uint16_t bf16_bits(float value)
{
    uint32_t bits;
    memcpy(&bits, &value, sizeof bits);
    return (uint16_t)((bits + 0x7fffu + (bits >> 16 & 1u)) >> 16);
}

static enum status numeric(const struct safetensors *file, const struct tensor *tensor,
                           struct fault *fault)
{
    return fault_set(fault, STATUS_NUMERIC,
                     "%s: tensor \"%.100s\" holds a value that is not a finite number.",
                     file->label, tensor->name);
}

// Checks that [first, first + count) can be converted.
static enum status check_range(const struct safetensors *file, const struct tensor *tensor,
                               uint64_t first, size_t count, struct fault *fault)
{
    CHECK(first <= tensor->elements && count <= tensor->elements - first);
    if (tensor->type == TENSOR_F32 || tensor->type == TENSOR_F16 || tensor->type == TENSOR_BF16)
        return STATUS_OK;
    return fault_set(fault, STATUS_UNSUPPORTED,
                     "%s: tensor \"%.100s\" has dtype %s; weights are read from F32, F16 and BF16.",
                     file->label, tensor->name, tensor_type_name(tensor->type));
}

enum status safetensors_read_f32(const struct safetensors *file, const struct tensor *tensor,
                                 uint64_t first, float *out, size_t count, struct fault *fault)
{
    enum status status = check_range(file, tensor, first, count, fault);
    uint16_t half[CONVERT_ELEMENTS];
    size_t size = tensor_type_bytes(tensor->type);
    for (size_t done = 0; !status && done < count;) {
        size_t n = min_size(count - done, CONVERT_ELEMENTS);
        void *to = size == 4 ? (void *)(out + done) : (void *)half;
        status = safetensors_read(file, tensor, (first + done) * size, to, n * size, fault);
        if (status)
            break;
        uint32_t bad = 0;
        for (size_t i = 0; i < n; i++) {
            if (tensor->type == TENSOR_BF16)
                out[done + i] = f32_from_bits((uint32_t)half[i] << 16);
            else if (tensor->type == TENSOR_F16)
                out[done + i] = f32_from_f16(half[i]);
            bad |= isfinite(out[done + i]) ? 0u : 1u;
        }
        if (bad)
            status = numeric(file, tensor, fault);
        done += n;
    }
    return status;
}

enum status safetensors_read_bf16(const struct safetensors *file, const struct tensor *tensor,
                                  uint64_t first, uint16_t *out, size_t count, struct fault *fault)
{
    enum status status = check_range(file, tensor, first, count, fault);
    float wide[CONVERT_ELEMENTS];
    for (size_t done = 0; !status && done < count;) {
        size_t n = min_size(count - done, CONVERT_ELEMENTS);
        if (tensor->type == TENSOR_BF16) {
            n = count - done;
            status = safetensors_read(file, tensor, (first + done) * 2, out + done, n * 2, fault);
        } else {
            status = safetensors_read_f32(file, tensor, first + done, wide, n, fault);
            for (size_t i = 0; !status && i < n; i++)
                out[done + i] = bf16_bits(wide[i]);
        }
        uint32_t bad = 0;
        for (size_t i = 0; !status && i < n; i++)
            bad |= (out[done + i] & 0x7f80u) == 0x7f80u ? 1u : 0u;
        if (bad)
            status = numeric(file, tensor, fault);
        done += n;
    }
    return status;
}

// F32 that are bf16 values become those, in place.
static bool narrow(uint8_t *chunk, size_t bytes)
{
    for (size_t i = 0; i < bytes / 4; i++) {
        uint32_t bits;
        memcpy(&bits, chunk + 4 * i, sizeof bits);
        uint16_t half = (uint16_t)(bits >> 16);
        memcpy(chunk + 2 * i, &half, sizeof half);
        if (bits & 0xffff)
            return false;
    }
    return true;
}

enum status safetensors_digest(const struct safetensors *file, const struct tensor *tensor,
                               const char *name, enum tensor_type type,
                               void (*progress)(void *context, uint64_t bytes), void *context,
                               struct digest *out, struct fault *fault)
{
    bool narrows = type != tensor->type;
    CHECK(!narrows || (type == TENSOR_BF16 && tensor->type == TENSOR_F32));
    uint8_t *chunk = malloc(DIGEST_CHUNK);
    if (!chunk)
        return fault_set(fault, STATUS_NO_MEMORY, "out of memory while reading %s.", file->label);
    enum status status = STATUS_OK;
    const char *type_name = tensor_type_name(type);
    uint64_t dims = tensor->dims;
    struct hash_stream stream;
    hash_begin(&stream, NULL);
    hash_update(&stream, name, strlen(name) + 1);
    hash_update(&stream, type_name, strlen(type_name) + 1);
    hash_update(&stream, &dims, sizeof dims);
    hash_update(&stream, tensor->shape, tensor->dims * sizeof tensor->shape[0]);
    for (uint64_t at = 0; at < tensor->bytes && !status;) {
        size_t n = min_size((size_t)(tensor->bytes - at), DIGEST_CHUNK);
        status = safetensors_read(file, tensor, at, chunk, n, fault);
        if (!status && narrows && !narrow(chunk, n))
            status = STATUS_INVALID;
        if (!status)
            hash_update(&stream, chunk, narrows ? n / 2 : n);
        if (progress)
            progress(context, n);
        at += n;
    }
    free(chunk);
    *out = hash_end(&stream);
    return status;
}
