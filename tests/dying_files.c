// SPDX-License-Identifier: Apache-2.0
// Files on which the process dies: linked beside the objects of the binary `polder` with --wrap, so
// that everything is the product but that the n-th file operation ends it with SIGKILL
// (tests/test_adapter_kill.py). Said by the environment, which only this file reads:
//   DYING_FILE  counting begins once this file exists; it holds n. The process dies before its n-th
//               operation; of a write, half is done.
// Counted: open, openat, mkdir, flock, mkostemps, pwrite, write (to files), fsync, fdatasync,
// rename, unlink, unlinkat, rmdir. Before it dies it says "dies at N: OPERATION" on standard error.
#include <fcntl.h>
#include <pthread.h>
#include <signal.h>
#include <stdarg.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/file.h>
#include <sys/stat.h>
#include <unistd.h>

int __real_open(const char *path, int flags, ...);
int __real_openat(int directory, const char *path, int flags, ...);
ssize_t __real_write(int descriptor, const void *from, size_t bytes);
int __real_rmdir(const char *path);
int __real_mkdir(const char *path, mode_t mode);
int __real_flock(int descriptor, int operation);
int __real_mkostemps(char *template, int suffix, int flags);
ssize_t __real_pwrite(int descriptor, const void *from, size_t bytes, off_t offset);
int __real_fsync(int descriptor);
int __real_fdatasync(int descriptor);
int __real_rename(const char *from, const char *to);
int __real_unlink(const char *path);
int __real_unlinkat(int directory, const char *path, int flags);
int __wrap_open(const char *path, int flags, ...);
int __wrap_openat(int directory, const char *path, int flags, ...);
ssize_t __wrap_write(int descriptor, const void *from, size_t bytes);
int __wrap_rmdir(const char *path);
int __wrap_mkdir(const char *path, mode_t mode);
int __wrap_flock(int descriptor, int operation);
int __wrap_mkostemps(char *template, int suffix, int flags);
ssize_t __wrap_pwrite(int descriptor, const void *from, size_t bytes, off_t offset);
int __wrap_fsync(int descriptor);
int __wrap_fdatasync(int descriptor);
int __wrap_rename(const char *from, const char *to);
int __wrap_unlink(const char *path);
int __wrap_unlinkat(int directory, const char *path, int flags);

// Several threads of a server come here.
static struct {
    pthread_mutex_t lock;
    bool armed;
    unsigned left, at;
} dying = {.lock = PTHREAD_MUTEX_INITIALIZER};

static void arm(void)
{
    char text[32];
    const char *path = getenv("DYING_FILE");
    int file = path ? __real_open(path, O_RDONLY | O_CLOEXEC) : -1;
    if (file < 0)
        return;
    ssize_t n = read(file, text, sizeof text - 1);
    (void)close(file);
    if (n <= 0)
        return;
    text[n] = 0;
    dying.armed = true;
    dying.left = dying.at = (unsigned)strtoul(text, NULL, 10);
}

// Is this operation the one?
static bool comes(void)
{
    (void)pthread_mutex_lock(&dying.lock);
    if (!dying.armed)
        arm();
    bool now = dying.armed && dying.left && --dying.left == 0;
    (void)pthread_mutex_unlock(&dying.lock);
    return now;
}

static void die(const char *operation)
{
    (void)fprintf(stderr, "dies at %u: %s\n", dying.at, operation);
    (void)raise(SIGKILL);
}

int __wrap_open(const char *path, int flags, ...)
{
    va_list list;
    va_start(list, flags);
    mode_t mode = flags & O_CREAT ? va_arg(list, mode_t) : 0;
    va_end(list);
    if (comes())
        die("open");
    return __real_open(path, flags, mode);
}

int __wrap_mkdir(const char *path, mode_t mode)
{
    if (comes())
        die("mkdir");
    return __real_mkdir(path, mode);
}

int __wrap_flock(int descriptor, int operation)
{
    if (comes())
        die("flock");
    return __real_flock(descriptor, operation);
}

int __wrap_mkostemps(char *template, int suffix, int flags)
{
    if (comes())
        die("mkostemps");
    return __real_mkostemps(template, suffix, flags);
}

ssize_t __wrap_pwrite(int descriptor, const void *from, size_t bytes, off_t offset)
{
    if (comes()) {
        (void)!__real_pwrite(descriptor, from, bytes / 2, offset);
        die("pwrite");
    }
    return __real_pwrite(descriptor, from, bytes, offset);
}

int __wrap_fsync(int descriptor)
{
    if (comes())
        die("fsync");
    return __real_fsync(descriptor);
}

int __wrap_fdatasync(int descriptor)
{
    if (comes())
        die("fdatasync");
    return __real_fdatasync(descriptor);
}

int __wrap_rename(const char *from, const char *to)
{
    if (comes())
        die("rename");
    return __real_rename(from, to);
}

int __wrap_unlink(const char *path)
{
    if (comes())
        die("unlink");
    return __real_unlink(path);
}

int __wrap_unlinkat(int directory, const char *path, int flags)
{
    if (comes())
        die("unlinkat");
    return __real_unlinkat(directory, path, flags);
}

int __wrap_openat(int directory, const char *path, int flags, ...)
{
    va_list list;
    va_start(list, flags);
    mode_t mode = flags & O_CREAT ? va_arg(list, mode_t) : 0;
    va_end(list);
    if (comes())
        die("openat");
    return __real_openat(directory, path, flags, mode);
}

// Sockets and eventfds are written to by the same call.
ssize_t __wrap_write(int descriptor, const void *from, size_t bytes)
{
    struct stat info;
    if (fstat(descriptor, &info) == 0 && S_ISREG(info.st_mode) && comes()) {
        (void)!__real_write(descriptor, from, bytes / 2);
        die("write");
    }
    return __real_write(descriptor, from, bytes);
}

int __wrap_rmdir(const char *path)
{
    if (comes())
        die("rmdir");
    return __real_rmdir(path);
}
