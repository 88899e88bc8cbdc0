// SPDX-License-Identifier: Apache-2.0
// Files are opened through openat2(RESOLVE_BENEATH | RESOLVE_NO_MAGICLINKS) where the kernel has
// it, so that a name out of an index file or a request cannot leave its directory; names are
// checked first, so that an old kernel is safe as well.
#include "base/reader.h"

#include <errno.h>
#include <fcntl.h>
#include <linux/openat2.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <unistd.h>

struct file_reader {
    struct reader reader;
    int descriptor;
};

static enum status file_read_at(struct reader *reader, uint64_t offset, void *out, size_t bytes)
{
    struct file_reader *file = (struct file_reader *)reader;
    char *at = out;
    while (bytes) {
        ssize_t n = pread(file->descriptor, at, bytes, (off_t)offset);
        if (n < 0 && errno == EINTR)
            continue;
        if (n <= 0)
            return STATUS_IO;
        at += n;
        offset += (uint64_t)n;
        bytes -= (size_t)n;
    }
    return STATUS_OK;
}

static void file_close(struct reader *reader)
{
    struct file_reader *file = (struct file_reader *)reader;
    (void)close(file->descriptor);
    free(file);
}

static enum status wrap(int descriptor, const char *name, struct reader **out, struct fault *fault)
{
    struct stat info;
    if (fstat(descriptor, &info) != 0 || !S_ISREG(info.st_mode)) {
        (void)close(descriptor);
        return fault_set(fault, STATUS_INVALID, "%s is not a regular file.", name);
    }
    struct file_reader *file = calloc(1, sizeof *file);
    if (!file) {
        (void)close(descriptor);
        return fault_set(fault, STATUS_NO_MEMORY, "out of memory while opening %s.", name);
    }
    file->reader = (struct reader){
        .read_at = file_read_at, .close = file_close, .size = (uint64_t)info.st_size};
    file->descriptor = descriptor;
    *out = &file->reader;
    return STATUS_OK;
}

static enum status open_fault(const char *name, struct fault *fault)
{
    enum status status = errno == ENOENT                    ? STATUS_NOT_FOUND
                         : errno == EXDEV || errno == ELOOP ? STATUS_INVALID
                                                            : STATUS_IO;
    return fault_set(fault, status, "cannot open %s: %s.", name, strerror(errno));
}

enum status reader_open(const char *path, struct reader **out, struct fault *fault)
{
    int descriptor = open(path, O_RDONLY | O_CLOEXEC | O_NONBLOCK);
    if (descriptor < 0)
        return open_fault(path, fault);
    return wrap(descriptor, path, out, fault);
}

static int is_confined(const char *name)
{
    if (!*name || *name == '/')
        return 0;
    for (const char *part = name; part;) {
        const char *slash = strchr(part, '/');
        size_t length = slash ? (size_t)(slash - part) : strlen(part);
        if (length == 0 || (length == 2 && !memcmp(part, "..", 2)))
            return 0;
        part = slash ? slash + 1 : NULL;
    }
    return 1;
}

enum status reader_open_in(const char *directory, const char *name, struct reader **out,
                           struct fault *fault)
{
    if (!is_confined(name))
        return fault_set(fault, STATUS_INVALID, "the file name \"%s\" leaves its directory.", name);
    int at = open(directory, O_RDONLY | O_CLOEXEC | O_DIRECTORY);
    if (at < 0)
        return open_fault(directory, fault);
    struct open_how how = {.flags = O_RDONLY | O_CLOEXEC | O_NONBLOCK,
                           .resolve = RESOLVE_BENEATH | RESOLVE_NO_MAGICLINKS};
    int descriptor = (int)syscall(SYS_openat2, at, name, &how, sizeof how);
    if (descriptor < 0 && (errno == ENOSYS || errno == EPERM))
        descriptor = openat(at, name, O_RDONLY | O_CLOEXEC | O_NONBLOCK | O_NOFOLLOW);
    if (descriptor < 0) {
        enum status status = open_fault(name, fault);
        (void)close(at);
        return status;
    }
    (void)close(at);
    return wrap(descriptor, name, out, fault);
}

enum status reader_read(struct reader *reader, uint64_t offset, void *out, size_t bytes)
{
    if (offset > reader->size || bytes > reader->size - offset)
        return STATUS_IO;
    return reader->read_at(reader, offset, out, bytes);
}

void reader_close(struct reader *reader)
{
    if (reader)
        reader->close(reader);
}

enum status reader_slurp_in(const char *directory, const char *name, size_t limit, char **out,
                            size_t *bytes, struct fault *fault)
{
    struct reader *reader = NULL;
    enum status status = reader_open_in(directory, name, &reader, fault);
    if (status)
        return status;
    char *text = NULL;
    if (reader->size > limit) {
        status = fault_set(fault, STATUS_LIMIT, "%s has %llu bytes; at most %zu are read.", name,
                           (unsigned long long)reader->size, limit);
        goto done;
    }
    text = malloc((size_t)reader->size + 1);
    if (!text) {
        status = fault_set(fault, STATUS_NO_MEMORY, "out of memory while reading %s.", name);
        goto done;
    }
    status = reader_read(reader, 0, text, (size_t)reader->size);
    if (status) {
        status = fault_set(fault, status, "reading %s failed.", name);
        goto done;
    }
    text[reader->size] = 0;
    *out = text;
    *bytes = (size_t)reader->size;
    text = NULL;
done:
    free(text);
    reader_close(reader);
    return status;
}
