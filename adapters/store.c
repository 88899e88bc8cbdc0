// SPDX-License-Identifier: Apache-2.0
// Writing an adapter store file: rows are packed into pages one after another, full pages are
// handed over (store_pages.c hashes and writes them), the header comes last.
//
// The file grows under a temporary name in the same directory ("PATH.??????.part"), is synced,
// renamed, and the directory is synced: after a crash at any moment PATH is the old file, the new
// file or absent, and a left-over ".part" means nothing. This file does not decide what is written
// (convert.c) nor what is accepted when reading (store_header.c).
//
// Invariants: 1. of the open page `used` bytes are taken and written, padding too; the rest becomes
// zero when it is closed. 2. pages [0, count) have been handed over. 3. a row never straddles a
// page: when it does not fit, the page is closed.
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
#include "base/files.h"

struct adapter_writer {
    const struct adapter_base *base;
    char *path, *part;
    int descriptor;
    size_t page_bytes, header_bytes;
    uint32_t records_expected, records_count, count;
    struct adapter_record *records;
    struct adapter_pages *pages; // NULL: before the first, and after the last
    uint8_t *page;               // the open one, or NULL
    size_t used;
};

static enum status write_fault(const struct adapter_writer *writer, const char *what,
                               struct fault *fault)
{
    const char *slash = strrchr(writer->path, '/'); // where the operator keeps it is his business
    return fault_set(fault, STATUS_IO, "%s the store file %s failed: %s.", what,
                     slash ? slash + 1 : writer->path, strerror(errno));
}

static void writer_free(struct adapter_writer *writer)
{
    if (writer->pages)
        adapter__pages_abandon(writer->pages);
    if (writer->descriptor >= 0)
        (void)close(writer->descriptor);
    free(writer->path);
    free(writer->part);
    free(writer->records);
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
    if (!writer->path || !writer->records ||
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
    if (adapter__pages_begin(writer->descriptor, writer->header_bytes, page_bytes,
                             &writer->pages)) {
        adapter__store_abandon(writer);
        return fault_set(fault, STATUS_NO_MEMORY, "out of memory or threads while writing %s.",
                         path);
    }
    *out = writer;
    return STATUS_OK;
}

// Takes back what was handed over: why could a page not be written?
static enum status pages_fault(struct adapter_writer *writer, struct fault *fault)
{
    struct digest none;
    struct adapter_pages *pages = writer->pages;
    writer->pages = NULL;
    writer->page = NULL;
    CHECK(adapter__pages_end(pages, &none));
    return write_fault(writer, "writing", fault);
}

static enum status page_open(struct adapter_writer *writer, struct fault *fault)
{
    if (writer->count == UINT32_MAX - 1)
        return fault_set(fault, STATUS_LIMIT, "the adapter needs more than 2^32 pages.");
    writer->page = adapter__pages_next(writer->pages);
    writer->used = 0;
    return writer->page ? STATUS_OK : pages_fault(writer, fault);
}

static void page_close(struct adapter_writer *writer)
{
    memset(writer->page + writer->used, 0, writer->page_bytes - writer->used);
    writer->page = NULL;
    writer->count++;
    adapter__pages_put(writer->pages);
}

enum status adapter__store_put(struct adapter_writer *writer, const struct adapter_side *side,
                               adapter_row_source source, const void *context,
                               struct lora_slice *out, struct fault *fault)
{
    uint32_t row_bytes = side->row_bytes;
    size_t element = dtype_bytes(writer->base->dtype);
    if (row_bytes > writer->page_bytes)
        return fault_set(fault, STATUS_UNSUPPORTED,
                         "a row of %u bytes does not fit a page of %zu: use a larger page size.",
                         row_bytes, writer->page_bytes);
    size_t gap = writer->page ? round_up(writer->used, ADAPTER_ROW_ALIGN) - writer->used : 0;
    if (gap) { // after rows by token
        memset(writer->page + writer->used, 0, gap);
        writer->used += gap;
    }
    for (uint32_t row = 0; row < side->rows;) {
        enum status status = STATUS_OK;
        if (writer->page && writer->page_bytes - writer->used < row_bytes)
            page_close(writer);
        if (!writer->page)
            status = page_open(writer, fault);
        if (status)
            return status;
        if (row == 0)
            *out = (struct lora_slice){.first_slot = writer->count,
                                       .first_byte = (uint32_t)writer->used,
                                       .row_bytes = row_bytes,
                                       .rank = side->rank};
        size_t fit = (writer->page_bytes - writer->used) / row_bytes;
        uint32_t rows = (uint32_t)min_size(fit, side->rows - row);
        uint8_t *at = writer->page + writer->used;
        source(context, side, row, rows, at);
        for (uint32_t i = 0; i < rows; i++) {
            size_t bytes = adapter__side_elements(side, row + i) * element;
            memset(at + (size_t)i * row_bytes + bytes, 0, row_bytes - bytes);
        }
        writer->used += (size_t)rows * row_bytes;
        row += rows;
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
                                const struct digest *pages, struct fault *fault)
{
    report->bytes = (uint64_t)writer->count * writer->page_bytes;
    report->digest =
        adapter__content_digest(writer->base, writer->records, writer->records_count, pages);
    struct adapter_header header = {.report = *report,
                                    .base = writer->base->digest,
                                    .pages_digest = *pages,
                                    .header_bytes = writer->header_bytes,
                                    .page_bytes = writer->page_bytes,
                                    .pages = writer->count,
                                    .records = writer->records_count};
    uint8_t *bytes = calloc(1, writer->header_bytes);
    if (!bytes)
        return fault_set(fault, STATUS_NO_MEMORY, "out of memory while writing %s.", writer->path);
    adapter__header_encode(&header, writer->base, writer->records, bytes);
    bool good = file_write_at(writer->descriptor, bytes, writer->header_bytes, 0);
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
    struct digest digest;
    bool renamed = false;
    CHECK(writer->records_count == writer->records_expected);
    if (writer->page)
        page_close(writer);
    struct adapter_pages *pages = writer->pages;
    writer->pages = NULL;
    enum status status = adapter__pages_end(pages, &digest)
                             ? write_fault(writer, "writing", fault)
                             : header_write(writer, report, &digest, fault);
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
