// SPDX-License-Identifier: Apache-2.0
// Pages of a store file on their way from the disk: each block of them is compared with the digest
// that the file's last part lists, before anybody computes with it. What does not agree is an error
// of the read: the requests of that adapter end, and nothing of it reaches the prefix cache.
//
// Blocks, not pages, so that a chunk of the copy queues (1 MiB) always holds whole ones. A read
// that does not (tests have smaller chunks) reads the blocks around it once more.
//
// Invariant: the list agreed with the pages digest of the sealed header when it was read.
#include <inttypes.h>
#include <stdatomic.h>
#include <stdlib.h>
#include <string.h>

#include "adapters/store.h"
#include "base/arith.h"
#include "base/check.h"
#include "base/log.h"

struct checked {
    struct reader reader;
    struct reader *file; // owned
    uint64_t begin, end; // of the pages in the file
    size_t block;
    _Atomic bool said; // the log has one line of each file
    char label[ADAPTER_NAME_MAX];
    struct digest digests[];
};

static uint32_t count_blocks(const struct adapter_store *store)
{
    return store->pages * (uint32_t)(store->page_bytes / adapter__block_bytes(store->page_bytes));
}

struct digest adapter__block_digest(const void *block, size_t bytes)
{
    struct hash_stream stream;
    hash_begin(&stream, NULL);
    hash_pieces(&stream, block, bytes);
    return hash_end(&stream);
}

static enum status damaged(const char *label, struct fault *fault)
{
    return fault_set(fault, STATUS_CORRUPT,
                     "the pages of %s are damaged: register the adapter again.", label);
}

// The list of a file, of count_blocks digests.
static enum status list_read(struct reader *file, const char *label,
                             const struct adapter_store *store, struct digest *out,
                             struct fault *fault)
{
    size_t bytes = count_blocks(store) * sizeof *out;
    uint64_t at = store->header_bytes + (uint64_t)store->pages * store->page_bytes;
    enum status status = reader_read(file, at, out, bytes);
    if (status)
        return fault_set(fault, status, "reading %s failed.", label);
    struct digest digest = hash_bytes(NULL, out, bytes);
    return digest_equal(&digest, &store->pages_digest) ? STATUS_OK : damaged(label, fault);
}

static bool agrees(struct checked *checked, uint64_t at, const uint8_t *block)
{
    struct digest digest = adapter__block_digest(block, checked->block);
    if (digest_equal(&digest, &checked->digests[(at - checked->begin) / checked->block]))
        return true;
    if (!atomic_exchange(&checked->said, true))
        log_line(LOG_ERROR,
                 "adapter %s: its store file is damaged at byte %" PRIu64
                 "; its requests end until it is registered again.",
                 checked->label, at);
    return false;
}

// [offset, offset + bytes) lies in the block at `at`, and is not all of it.
static enum status read_part(struct checked *checked, uint64_t at, uint64_t offset, void *out,
                             size_t bytes)
{
    uint8_t *block = malloc(checked->block);
    enum status status =
        block ? reader_read(checked->file, at, block, checked->block) : STATUS_NO_MEMORY;
    if (!status && !agrees(checked, at, block))
        status = STATUS_IO;
    if (!status)
        memcpy(out, block + (offset - at), bytes);
    free(block);
    return status;
}

static enum status checked_read(struct reader *reader, uint64_t offset, void *out, size_t bytes)
{
    struct checked *checked = (struct checked *)reader;
    uint8_t *to = out;
    if (offset < checked->begin || offset + bytes > checked->end)
        return STATUS_IO;
    while (bytes) {
        uint64_t skipped = (offset - checked->begin) % checked->block, at = offset - skipped;
        size_t n = min_size(bytes, checked->block - skipped);
        enum status status;
        if (n < checked->block)
            status = read_part(checked, at, offset, to, n);
        else
            status = reader_read(checked->file, offset, to, n);
        if (!status && n == checked->block && !agrees(checked, at, to))
            status = STATUS_IO;
        if (status)
            return status;
        offset += n;
        to += n;
        bytes -= n;
    }
    return STATUS_OK;
}

static void checked_close(struct reader *reader)
{
    struct checked *checked = (struct checked *)reader;
    reader_close(checked->file);
    free(checked);
}

enum status adapter__store_reader(struct reader *file, const char *label,
                                  const struct adapter_store *store, struct reader **out,
                                  struct fault *fault)
{
    size_t list = count_blocks(store) * sizeof(struct digest);
    struct checked *checked = calloc(1, sizeof *checked + list);
    if (!checked)
        return fault_set(fault, STATUS_NO_MEMORY, "out of memory for %s.", label);
    enum status status = list_read(file, label, store, checked->digests, fault);
    if (status) {
        free(checked);
        return status;
    }
    checked->reader =
        (struct reader){.read_at = checked_read, .close = checked_close, .size = file->size};
    checked->file = file;
    checked->begin = store->header_bytes;
    checked->end = store->header_bytes + (uint64_t)store->pages * store->page_bytes;
    checked->block = adapter__block_bytes(store->page_bytes);
    (void)strncpy(checked->label, label, sizeof checked->label - 1);
    *out = &checked->reader;
    return STATUS_OK;
}

enum status adapter__store_verify(struct reader *reader, const char *label,
                                  const struct adapter_store *store, struct fault *fault)
{
    size_t bytes = adapter__block_bytes(store->page_bytes);
    uint32_t blocks = count_blocks(store);
    uint8_t *block = malloc(bytes);
    struct digest *list = calloc(blocks, sizeof *list);
    enum status status = block && list ? list_read(reader, label, store, list, fault)
                                       : fault_set(fault, STATUS_NO_MEMORY,
                                                   "out of memory while verifying %s.", label);
    for (uint32_t i = 0; i < blocks && !status; i++) {
        status = reader_read(reader, store->header_bytes + (uint64_t)i * bytes, block, bytes);
        if (status) {
            (void)fault_set(fault, status, "reading %s failed.", label);
            break;
        }
        struct digest digest = adapter__block_digest(block, bytes);
        status = digest_equal(&digest, &list[i]) ? STATUS_OK : damaged(label, fault);
    }
    free(block);
    free(list);
    return status;
}
