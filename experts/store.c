// SPDX-License-Identifier: Apache-2.0
// The expert store file (docs/formats.md): one header page, then layers x experts records of
// pages_per_expert pages, little-endian.
//
//   header page: struct store_header, rest zero
//   record (layer, expert) at page 1 + (layer * experts + expert) * pages_per_expert:
//     gate+up tiles interleaved | down tiles from tile down_tile on | zeros to the end of the page
//
// It owns the layout and the atomic appearance: everything is written under a temporary name beside
// the target; the header page goes last; then fdatasync, rename, fsync of the directory. A file
// that has the right name, size and a header whose digest fits is complete. It does not decide
// where stores live or what they are called (runtime/model).
#include "experts/experts.h"

#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "base/arith.h"
#include "base/check.h"
#include "base/files.h"
#include "experts/layout.h"

static const char STORE_MAGIC[8] = {'P', 'L', 'D', 'R', 'E', 'X', 'P', 'T'};
enum { STORE_VERSION = 1, PATH_BYTES = 4096 };

struct store_header {
    char magic[8];
    uint32_t version, dtype;
    uint32_t layers, experts, hidden, intermediate;
    uint64_t page_bytes;
    uint32_t pages_per_expert, down_tile;
    struct digest base;
    struct digest self; // of the bytes before it
};

_Static_assert(sizeof(struct store_header) == 112, "no padding: this struct is the file format");

struct expert_store_writer {
    struct expert_shape shape;
    struct digest base;
    int descriptor;
    uint64_t records; // written so far
    uint8_t *record;  // one expert, record_bytes
    size_t record_bytes;
    char path[PATH_BYTES], temporary[PATH_BYTES + 32];
};

void expert_shape_complete(struct expert_shape *shape)
{
    size_t gate_up =
        tile_count(shape->dtype, tile_interleaved_rows(shape->intermediate), shape->hidden);
    size_t down = tile_count(shape->dtype, shape->hidden, shape->intermediate);
    CHECK(is_power_of_two(shape->page_bytes) && shape->page_bytes >= TILE_BYTES);
    shape->down_tile = (uint32_t)gate_up;
    shape->pages_per_expert = (uint32_t)div_up((gate_up + down) * TILE_BYTES, shape->page_bytes);
}

uint64_t expert_store_offset(const struct expert_shape *shape, uint32_t layer, uint32_t expert)
{
    uint64_t record = (uint64_t)layer * shape->experts + expert;
    return (1 + record * shape->pages_per_expert) * shape->page_bytes;
}

static uint64_t store_bytes(const struct expert_shape *shape)
{
    return expert_store_offset(shape, shape->layers, 0);
}

static struct store_header make_header(const struct expert_shape *shape, const struct digest *base)
{
    struct store_header header = {.version = STORE_VERSION,
                                  .dtype = (uint32_t)shape->dtype,
                                  .layers = shape->layers,
                                  .experts = shape->experts,
                                  .hidden = shape->hidden,
                                  .intermediate = shape->intermediate,
                                  .page_bytes = shape->page_bytes,
                                  .pages_per_expert = shape->pages_per_expert,
                                  .down_tile = shape->down_tile,
                                  .base = *base};
    memcpy(header.magic, STORE_MAGIC, sizeof header.magic);
    header.self = hash_bytes(NULL, &header, offsetof(struct store_header, self));
    return header;
}

static enum status write_at(int descriptor, uint64_t offset, const void *data, size_t bytes)
{
    return file_write_at(descriptor, data, bytes, offset) ? STATUS_OK : STATUS_IO;
}

static enum status write_fault(const struct expert_store_writer *writer, const char *what,
                               struct fault *fault)
{
    return fault_set(fault, STATUS_IO, "%s the expert store %.150s failed: %s.", what, writer->path,
                     strerror(errno));
}

enum status expert_store_create(const char *path, const struct expert_shape *shape,
                                const struct digest *base, struct expert_store_writer **out,
                                struct fault *fault)
{
    if (strlen(path) >= PATH_BYTES)
        return fault_set(fault, STATUS_INVALID, "the path of the expert store is too long.");
    struct expert_store_writer *writer = calloc(1, sizeof *writer);
    size_t record_bytes = shape->pages_per_expert * shape->page_bytes;
    uint8_t *record = malloc(record_bytes);
    if (!writer || !record) {
        free(writer);
        free(record);
        return fault_set(fault, STATUS_NO_MEMORY, "out of memory for the expert store writer.");
    }
    writer->shape = *shape;
    writer->base = *base;
    writer->record = record;
    writer->record_bytes = record_bytes;
    (void)snprintf(writer->path, sizeof writer->path, "%s", path);
    (void)snprintf(writer->temporary, sizeof writer->temporary, "%s.%ld.tmp", path, (long)getpid());
    writer->descriptor =
        open(writer->temporary, O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC | O_NOFOLLOW, 0600);
    if (writer->descriptor < 0) {
        enum status status = write_fault(writer, "creating", fault);
        free(record);
        free(writer);
        return status;
    }
    *out = writer;
    return STATUS_OK;
}

enum status expert_store_put(struct expert_store_writer *writer, uint32_t layer, uint32_t expert,
                             const void *gate, const void *up, const void *down,
                             struct fault *fault)
{
    const struct expert_shape *shape = &writer->shape;
    CHECK(layer < shape->layers && expert < shape->experts);
    memset(writer->record, 0, writer->record_bytes);
    tile_pack(shape->dtype, gate, shape->intermediate, shape->hidden, 0, writer->record);
    tile_pack(shape->dtype, up, shape->intermediate, shape->hidden, 1, writer->record);
    tile_pack(shape->dtype, down, shape->hidden, shape->intermediate, -1,
              writer->record + (size_t)shape->down_tile * TILE_BYTES);
    if (write_at(writer->descriptor, expert_store_offset(shape, layer, expert), writer->record,
                 writer->record_bytes))
        return write_fault(writer, "writing", fault);
    writer->records++;
    return STATUS_OK;
}

static void sync_directory_of(const char *path)
{
    char directory[PATH_BYTES];
    (void)snprintf(directory, sizeof directory, "%s", path);
    char *slash = strrchr(directory, '/');
    if (slash)
        slash[slash == directory] = 0;
    int descriptor = open(slash ? directory : ".", O_RDONLY | O_DIRECTORY | O_CLOEXEC);
    if (descriptor >= 0) {
        (void)fsync(descriptor); // best effort: a lost name only means that the store is made anew
        (void)close(descriptor);
    }
}

enum status expert_store_finish(struct expert_store_writer *writer, struct fault *fault)
{
    CHECK(writer->records == (uint64_t)writer->shape.layers * writer->shape.experts);
    struct store_header header = make_header(&writer->shape, &writer->base);
    enum status status = STATUS_OK;
    if (write_at(writer->descriptor, 0, &header, sizeof header) || fdatasync(writer->descriptor) ||
        rename(writer->temporary, writer->path))
        status = write_fault(writer, "finishing", fault);
    else
        sync_directory_of(writer->path);
    expert_store_abandon(writer); // after the rename there is no temporary file any more
    return status;
}

void expert_store_abandon(struct expert_store_writer *writer)
{
    if (!writer)
        return;
    (void)close(writer->descriptor);
    (void)unlink(writer->temporary);
    free(writer->record);
    free(writer);
}

enum status expert_store_open(const char *path, const struct expert_shape *shape,
                              const struct digest *base, struct reader **out, struct fault *fault)
{
    struct reader *reader = NULL;
    enum status status = reader_open(path, &reader, fault);
    if (status)
        return status;
    struct store_header header, expected = make_header(shape, base);
    status = reader_read(reader, 0, &header, sizeof header);
    if (status || memcmp(&header, &expected, sizeof header) || reader->size != store_bytes(shape)) {
        reader_close(reader);
        return fault_set(fault, STATUS_CORRUPT,
                         "the expert store %.150s is damaged, or was made for another model, type "
                         "or page size.",
                         path);
    }
    *out = reader;
    return STATUS_OK;
}
