// SPDX-License-Identifier: Apache-2.0
// Writing an adapter store file: rows are packed into pages one after another, pages are written
// and hashed as they fill, the header comes last.
//
// The file grows under a temporary name in the same directory ("PATH.??????.part"), is synced,
// renamed, and the directory is synced: after a crash at any moment PATH is the old file, the new
// file or absent, and a left-over ".part" means nothing. This file does not decide what is written
// (convert.c) nor what is accepted when reading (store_header.c).
//
// Invariants: 1. `used` bytes of the open page are taken, the rest is zero. 2. pages [0, pages) are
// on disk and in the hash. 3. a row never straddles a page: when it does not fit, the page is
// closed.
#include "adapters/store.h"

#include <errno.h>
#include <fcntl.h>
#include <libgen.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include "base/arith.h"
#include "base/check.h"

struct adapter_writer {
    const struct adapter_base *base;
    char *path, *part;
    int descriptor;
    size_t page_bytes, header_bytes;
    uint32_t records_expected, records_count, pages;
    struct adapter_record *records;
    uint8_t *page;
    size_t used;
    struct hash_stream hash;
};

static enum status write_fault(const struct adapter_writer *writer, const char *what,
                               struct fault *fault)
{
    const char *slash = strrchr(writer->path, '/'); // where the operator keeps it is his business
    return fault_set(fault, STATUS_IO, "%s the store file %s failed: %s.", what,
                     slash ? slash + 1 : writer->path, strerror(errno));
}

static bool write_all(int descriptor, const uint8_t *at, size_t bytes, uint64_t offset)
{
    while (bytes) {
        ssize_t n = pwrite(descriptor, at, bytes, (off_t)offset);
        if (n < 0 && errno == EINTR)
            continue;
        if (n <= 0)
            return false;
        at += n;
        offset += (uint64_t)n;
        bytes -= (size_t)n;
    }
    return true;
}

static void writer_free(struct adapter_writer *writer)
{
    if (writer->descriptor >= 0)
        (void)close(writer->descriptor);
    free(writer->path);
    free(writer->part);
    free(writer->records);
    free(writer->page);
    free(writer);
}

void adapter__store_abandon(struct adapter_writer *writer)
{
    if (!writer)
        return;
    if (writer->descriptor >= 0)
        (void)unlink(writer->part);
    writer_free(writer);
}

enum status adapter__store_create(const char *path, const struct adapter_base *base,
                                  size_t page_bytes, uint32_t records, struct adapter_writer **out,
                                  struct fault *fault)
{
    struct adapter_writer *writer = calloc(1, sizeof *writer);
    if (!writer)
        return fault_set(fault, STATUS_NO_MEMORY, "out of memory while writing %s.", path);
    writer->descriptor = -1;
    writer->base = base;
    writer->page_bytes = page_bytes;
    writer->records_expected = records;
    writer->header_bytes = adapter__header_bytes(records, page_bytes);
    writer->path = strdup(path);
    writer->records = calloc(records, sizeof *writer->records);
    writer->page = calloc(1, page_bytes);
    if (!writer->path || !writer->records || !writer->page ||
        asprintf(&writer->part,
                 "%s."
                 "XX"
                 "XX"
                 "XX"
                 ".part",
                 path) < 0) {
        writer->part = NULL;
        writer_free(writer);
        return fault_set(fault, STATUS_NO_MEMORY, "out of memory while writing %s.", path);
    }
    writer->descriptor = mkostemps(writer->part, 5, O_CLOEXEC);
    if (writer->descriptor < 0) {
        enum status status = write_fault(writer, "creating", fault);
        writer_free(writer);
        return status;
    }
    hash_begin(&writer->hash, NULL);
    *out = writer;
    return STATUS_OK;
}

// Writes the open page and begins the next.
static enum status page_close(struct adapter_writer *writer, struct fault *fault)
{
    uint64_t offset = writer->header_bytes + (uint64_t)writer->pages * writer->page_bytes;
    if (writer->pages == UINT32_MAX - 1)
        return fault_set(fault, STATUS_LIMIT, "the adapter needs more than 2^32 pages.");
    if (!write_all(writer->descriptor, writer->page, writer->page_bytes, offset))
        return write_fault(writer, "writing", fault);
    hash_update(&writer->hash, writer->page, writer->page_bytes);
    memset(writer->page, 0, writer->page_bytes);
    writer->pages++;
    writer->used = 0;
    return STATUS_OK;
}

enum status adapter__store_put(struct adapter_writer *writer, const struct adapter_side *side,
                               adapter_row_source source, const void *context,
                               struct lora_slice *out, struct fault *fault)
{
    uint32_t row_bytes = side->row_bytes;
    if (row_bytes > writer->page_bytes)
        return fault_set(fault, STATUS_UNSUPPORTED,
                         "a row of %u bytes does not fit a page of %zu: use a larger page size.",
                         row_bytes, writer->page_bytes);
    writer->used = round_up(writer->used, ADAPTER_ROW_ALIGN); // after rows by token
    for (uint32_t row = 0; row < side->rows; row++) {
        if (writer->page_bytes - writer->used < row_bytes) {
            enum status status = page_close(writer, fault);
            if (status)
                return status;
        }
        if (row == 0)
            *out = (struct lora_slice){.first_slot = writer->pages,
                                       .first_byte = (uint32_t)writer->used,
                                       .row_bytes = row_bytes,
                                       .rank = side->rank};
        source(context, side, row, writer->page + writer->used);
        writer->used += row_bytes;
    }
    return STATUS_OK;
}

enum status adapter__store_record(struct adapter_writer *writer,
                                  const struct adapter_record *record, struct fault *fault)
{
    if (writer->records_count == writer->records_expected)
        return fault_set(fault, STATUS_INTERNAL, "more matrices than announced for %s.",
                         writer->path);
    writer->records[writer->records_count++] = *record;
    return STATUS_OK;
}

static enum status header_write(struct adapter_writer *writer, struct adapter_report *report,
                                struct fault *fault)
{
    struct digest pages = hash_end(&writer->hash);
    report->bytes = (uint64_t)writer->pages * writer->page_bytes;
    report->digest =
        adapter__content_digest(writer->base, writer->records, writer->records_count, &pages);
    struct adapter_header header = {.report = *report,
                                    .base = writer->base->digest,
                                    .pages_digest = pages,
                                    .header_bytes = writer->header_bytes,
                                    .page_bytes = writer->page_bytes,
                                    .pages = writer->pages,
                                    .records = writer->records_count};
    uint8_t *bytes = calloc(1, writer->header_bytes);
    if (!bytes)
        return fault_set(fault, STATUS_NO_MEMORY, "out of memory while writing %s.", writer->path);
    adapter__header_encode(&header, writer->base, writer->records, bytes);
    bool good = write_all(writer->descriptor, bytes, writer->header_bytes, 0);
    free(bytes);
    return good ? STATUS_OK : write_fault(writer, "writing", fault);
}

static enum status directory_sync(const struct adapter_writer *writer, struct fault *fault)
{
    char *copy = strdup(writer->path);
    if (!copy)
        return fault_set(fault, STATUS_NO_MEMORY, "out of memory while writing %s.", writer->path);
    int directory = open(dirname(copy), O_RDONLY | O_DIRECTORY | O_CLOEXEC);
    free(copy);
    if (directory < 0)
        return write_fault(writer, "syncing the directory of", fault);
    int result = fsync(directory);
    enum status status = result == 0 || errno == EINVAL
                             ? STATUS_OK
                             : write_fault(writer, "syncing the directory of", fault);
    (void)close(directory);
    return status;
}

enum status adapter__store_finish(struct adapter_writer *writer, struct adapter_report *report,
                                  struct fault *fault)
{
    enum status status = STATUS_OK;
    bool renamed = false;
    CHECK(writer->records_count == writer->records_expected);
    if (writer->used)
        status = page_close(writer, fault);
    if (!status)
        status = header_write(writer, report, fault);
    if (!status && fsync(writer->descriptor) != 0)
        status = write_fault(writer, "syncing", fault);
    if (!status) {
        renamed = rename(writer->part, writer->path) == 0;
        status = renamed ? directory_sync(writer, fault) : write_fault(writer, "renaming", fault);
    }
    if (!renamed)
        (void)unlink(writer->part);
    writer_free(writer);
    return status;
}
