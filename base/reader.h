// SPDX-License-Identifier: Apache-2.0
// The storage seam: positioned reads from an open file. The real one is pread on a descriptor that
// stays open (a file replaced while serving does not change what we read); the simulator has a
// fake.
#ifndef POLDER_BASE_READER_H
#define POLDER_BASE_READER_H

#include <stddef.h>
#include <stdint.h>

#include "base/status.h"

struct reader {
    // Reads exactly `bytes` at `offset`; STATUS_IO on error or end of file. Any thread.
    enum status (*read_at)(struct reader *reader, uint64_t offset, void *out, size_t bytes);
    void (*close)(struct reader *reader);
    uint64_t size;
};

// Opens a regular file read-only. The caller closes with reader_close.
MUST_USE enum status reader_open(const char *path, struct reader **out, struct fault *fault);
// The same, `name` being confined to the directory (no "..", no absolute path, no symlink leaving
// it).
MUST_USE enum status reader_open_in(const char *directory, const char *name, struct reader **out,
                                    struct fault *fault);
MUST_USE enum status reader_read(struct reader *reader, uint64_t offset, void *out, size_t bytes);
void reader_close(struct reader *reader);

// Reads a whole text file of at most `limit` bytes; adds a final NUL. The caller frees *out.
MUST_USE enum status reader_slurp_in(const char *directory, const char *name, size_t limit,
                                     char **out, size_t *bytes, struct fault *fault);

#endif
