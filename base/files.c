// SPDX-License-Identifier: Apache-2.0
#include "base/files.h"

#include <errno.h>
#include <unistd.h>

bool file_write(int descriptor, const void *from, size_t bytes)
{
    const char *at = from;
    while (bytes) {
        ssize_t n = write(descriptor, at, bytes);
        if (n < 0 && errno == EINTR)
            continue;
        if (n == 0)
            errno = EIO;
        if (n <= 0)
            return false;
        at += n;
        bytes -= (size_t)n;
    }
    return true;
}

bool file_write_at(int descriptor, const void *from, size_t bytes, uint64_t offset)
{
    const char *at = from;
    while (bytes) {
        ssize_t n = pwrite(descriptor, at, bytes, (off_t)offset);
        if (n < 0 && errno == EINTR)
            continue;
        if (n == 0)
            errno = EIO;
        if (n <= 0)
            return false;
        at += n;
        offset += (uint64_t)n;
        bytes -= (size_t)n;
    }
    return true;
}
