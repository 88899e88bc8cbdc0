// SPDX-License-Identifier: Apache-2.0
// See registry.h. Everything is a question to the directory: there is no index that could disagree
// with it.
//
// A file belongs to unfinished work, and not to a process that still runs, when
//   it ends in ".part"          (store.c before its rename) or
//   it ends in ".adapter.new"   (a conversion that the engine has not taken yet) or
//   it is "experts-*.tmp"       (an expert store before its rename) or
//   it stands in a directory of uploads/
// and, where the name carries the number of a process (".adapter.new" of polder generate,
// "experts-*.store.PID.tmp"), there is no such process. A server's own carry none: whoever holds
// the lock knows that no server runs.
#include "adapters/registry.h"

#include <ctype.h>
#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/file.h>
#include <sys/stat.h>
#include <unistd.h>

#define SUFFIX ".adapter"

static enum status make_directory(const char *path, struct fault *fault)
{
    char part[REGISTRY_PATH];
    if (snprintf(part, sizeof part, "%s", path) >= (int)sizeof part)
        return fault_set(fault, STATUS_INVALID, "the path %.200s is too long.", path);
    for (char *at = part + 1;; at++) {
        if (*at && *at != '/')
            continue;
        char kept = *at;
        *at = 0;
        if (mkdir(part, 0700) != 0 && errno != EEXIST)
            return fault_set(fault, STATUS_IO, "cannot make the directory %.200s: %s.", part,
                             strerror(errno));
        if (!kept)
            return STATUS_OK;
        *at = kept;
    }
}

static enum status folder_of(const char *state_directory, char out[REGISTRY_PATH],
                             struct fault *fault)
{
    int n = snprintf(out, REGISTRY_PATH, "%s/adapters", state_directory);
    if (n >= REGISTRY_PATH)
        return fault_set(fault, STATUS_INVALID, "the path of the state directory is too long.");
    return STATUS_OK;
}

enum status registry_make(const char *state_directory, struct fault *fault)
{
    char folder[REGISTRY_PATH];
    enum status status = folder_of(state_directory, folder, fault);
    return status ? status : make_directory(folder, fault);
}

enum status registry_lock(const char *state_directory, int *out, struct fault *fault)
{
    char path[REGISTRY_PATH];
    if (snprintf(path, sizeof path, "%s/lock", state_directory) >= (int)sizeof path)
        return fault_set(fault, STATUS_INVALID, "the path of the state directory is too long.");
    int lock = open(path, O_RDWR | O_CREAT | O_CLOEXEC, 0600);
    if (lock < 0)
        return fault_set(fault, STATUS_IO, "cannot write to the state directory %.160s: %s.",
                         state_directory, strerror(errno));
    if (flock(lock, LOCK_EX | LOCK_NB) != 0) {
        (void)close(lock);
        return fault_set(fault, STATUS_BUSY,
                         "the state directory %.120s is in use by a server or by polder adapter: "
                         "ask that server (--connect), wait until it ends, or give another "
                         "--state-dir.",
                         state_directory);
    }
    *out = lock;
    return STATUS_OK;
}

// ---- names of files ----

enum status registry_path(const char *state_directory, const struct registry_entry *entry,
                          char out[REGISTRY_PATH], struct fault *fault)
{
    int n = snprintf(out, REGISTRY_PATH, "%s/adapters/%s%s%s" SUFFIX, state_directory, entry->name,
                     entry->tenant[0] ? "@" : "", entry->tenant);
    if (n >= REGISTRY_PATH)
        return fault_set(fault, STATUS_INVALID, "the path of the state directory is too long.");
    return STATUS_OK;
}

static bool ends_with(const char *text, const char *end)
{
    size_t length = strlen(text), n = strlen(end);
    return length > n && !strcmp(text + length - n, end);
}

bool registry_parse(const char *file, struct registry_entry *out)
{
    *out = (struct registry_entry){.name = ""};
    if (!ends_with(file, SUFFIX))
        return false;
    size_t length = strlen(file) - strlen(SUFFIX);
    const char *at = memchr(file, '@', length);
    size_t name = at ? (size_t)(at - file) : length;
    size_t tenant = at ? length - name - 1 : 0;
    if (name >= sizeof out->name || tenant >= sizeof out->tenant || (at && !tenant))
        return false;
    memcpy(out->name, file, name);
    memcpy(out->tenant, at ? at + 1 : "", tenant);
    return true;
}

static bool is_registered(const char *file, struct registry_entry *out)
{
    return registry_parse(file, out) && adapter_name_is_valid(out->name) &&
           (!out->tenant[0] || adapter_name_is_valid(out->tenant));
}

static int entry_order(const void *a, const void *b)
{
    const struct registry_entry *x = a, *y = b;
    int order = strcmp(x->name, y->name);
    return order ? order : strcmp(x->tenant, y->tenant);
}

// *out NULL: it cannot be read, or (STATUS_OK) there is none.
static enum status folder_open(const char *folder, DIR **out, struct fault *fault)
{
    *out = opendir(folder);
    if (*out || errno == ENOENT)
        return STATUS_OK;
    return fault_set(fault, STATUS_IO, "cannot read the directory %.200s: %s.", folder,
                     strerror(errno));
}

enum status registry_list(const char *state_directory, struct registry_entry **out, size_t *count,
                          struct fault *fault)
{
    char folder[REGISTRY_PATH];
    struct registry_entry *list = NULL, entry;
    size_t n = 0, room = 0;
    *out = NULL;
    *count = 0;
    DIR *directory = NULL;
    enum status status = folder_of(state_directory, folder, fault);
    if (!status)
        status = folder_open(folder, &directory, fault);
    if (!directory)
        return status;
    for (struct dirent *file; (file = readdir(directory)) && !status;) {
        if (!is_registered(file->d_name, &entry))
            continue;
        if (n == room) {
            room = room ? 2 * room : 64;
            struct registry_entry *more = realloc(list, room * sizeof *more);
            if (!more) {
                status = fault_set(fault, STATUS_NO_MEMORY, "out of memory for the registry.");
                break;
            }
            list = more;
        }
        list[n++] = entry;
    }
    (void)closedir(directory);
    if (status) {
        free(list);
        return status;
    }
    if (n)
        qsort(list, n, sizeof *list, entry_order);
    *out = list;
    *count = n;
    return STATUS_OK;
}

static bool exists(const char *state_directory, const struct registry_entry *entry)
{
    char path[REGISTRY_PATH];
    struct stat info;
    return !registry_path(state_directory, entry, path, NULL) && lstat(path, &info) == 0;
}

static void entry_set(struct registry_entry *entry, const char *name, const char *tenant)
{
    *entry = (struct registry_entry){.name = ""};
    (void)snprintf(entry->name, sizeof entry->name, "%s", name);
    (void)snprintf(entry->tenant, sizeof entry->tenant, "%s", tenant ? tenant : "");
}

enum status registry_find(const char *state_directory, const char *name, const char *tenant,
                          struct registry_entry *out)
{
    struct registry_entry *list = NULL;
    size_t count = 0;
    if (!adapter_name_is_valid(name) || (tenant && *tenant && !adapter_name_is_valid(tenant)))
        return STATUS_NOT_FOUND;
    entry_set(out, name, tenant);
    if (exists(state_directory, out))
        return STATUS_OK;
    entry_set(out, name, NULL);
    if (exists(state_directory, out))
        return STATUS_OK;
    enum status status = registry_list(state_directory, &list, &count, NULL);
    if (status)
        return status;
    status = STATUS_NOT_FOUND;
    for (size_t i = 0; i < count && status; i++) {
        if (strcmp(list[i].name, name) != 0)
            continue;
        *out = list[i];
        status = STATUS_OK;
    }
    free(list);
    return status;
}

// ---- changes ----

static enum status sync_folder(const char *state_directory, bool *changed, struct fault *fault)
{
    char folder[REGISTRY_PATH];
    if (changed)
        *changed = true;
    enum status status = folder_of(state_directory, folder, fault);
    if (status)
        return status;
    int directory = open(folder, O_RDONLY | O_DIRECTORY | O_CLOEXEC);
    bool good = directory >= 0 && (fsync(directory) == 0 || errno == EINVAL);
    if (!good)
        status = fault_set(fault, STATUS_IO, "syncing the registry's directory failed: %s.",
                           strerror(errno));
    if (directory >= 0)
        (void)close(directory);
    return status;
}

enum status registry_commit(const char *state_directory, const char *store_path,
                            const struct registry_entry *entry, bool *changed, struct fault *fault)
{
    char path[REGISTRY_PATH];
    enum status status = registry_path(state_directory, entry, path, fault);
    if (changed)
        *changed = false;
    if (status)
        return status;
    if (rename(store_path, path) != 0)
        return fault_set(fault, STATUS_IO, "the store file of adapter %s could not be kept: %s.",
                         entry->name, strerror(errno));
    return sync_folder(state_directory, changed, fault);
}

enum status registry_remove(const char *state_directory, const struct registry_entry *entry,
                            bool *changed, struct fault *fault)
{
    char path[REGISTRY_PATH];
    enum status status = registry_path(state_directory, entry, path, fault);
    if (changed)
        *changed = false;
    if (status)
        return status;
    if (unlink(path) != 0)
        return fault_set(fault, errno == ENOENT ? STATUS_NOT_FOUND : STATUS_IO,
                         "the store file of adapter %s could not be removed: %s.", entry->name,
                         strerror(errno));
    return sync_folder(state_directory, changed, fault);
}

// ---- what is left over ----

// The digits before `end`, which the name ends in (or contains last), as a process; 0: none.
static pid_t process_of(const char *file, const char *end)
{
    const char *at = strstr(file, end), *first = at;
    while (first && first > file && isdigit((unsigned char)first[-1]))
        first--;
    if (!first || first == at || at - first > 9 || first == file ||
        (first[-1] != '-' && first[-1] != '.'))
        return 0;
    return (pid_t)strtol(first, NULL, 10);
}

static bool is_running(pid_t process)
{
    return process && (kill(process, 0) == 0 || errno == EPERM);
}

enum verdict { KEEP, UNKNOWN, LEFTOVER };

static enum verdict judge_adapter(const char *file)
{
    struct registry_entry entry;
    if (is_registered(file, &entry))
        return KEEP;
    if (!ends_with(file, ".part") && !ends_with(file, SUFFIX ".new"))
        return UNKNOWN;
    return is_running(process_of(file, SUFFIX ".new")) ? KEEP : LEFTOVER;
}

static enum verdict judge_state(const char *file)
{
    if (strncmp(file, "experts-", 8) != 0 || !ends_with(file, ".tmp"))
        return KEEP;
    return is_running(process_of(file, ".tmp")) ? KEEP : LEFTOVER;
}

static enum status collect_in(const char *folder, const char *label,
                              enum verdict (*judge)(const char *file),
                              void (*told)(void *, const struct registry_leftover *), void *context,
                              struct fault *fault)
{
    DIR *directory;
    enum status status = folder_open(folder, &directory, fault);
    if (!directory)
        return status;
    for (struct dirent *file; (file = readdir(directory)) && !status;) {
        struct stat info;
        char path[REGISTRY_PATH];
        enum verdict verdict = judge(file->d_name);
        if (verdict == KEEP || !strcmp(file->d_name, ".") || !strcmp(file->d_name, "..") ||
            fstatat(dirfd(directory), file->d_name, &info, AT_SYMLINK_NOFOLLOW) != 0)
            continue;
        bool removed = verdict == LEFTOVER && !S_ISDIR(info.st_mode);
        if (removed && unlinkat(dirfd(directory), file->d_name, 0) != 0)
            status = fault_set(fault, STATUS_IO, "cannot remove %.120s: %s.", file->d_name,
                               strerror(errno));
        (void)snprintf(path, sizeof path, "%s%s", label, file->d_name);
        struct registry_leftover leftover = {
            .file = path, .bytes = (uint64_t)info.st_size, .removed = removed};
        if (told && !status)
            told(context, &leftover);
    }
    (void)closedir(directory);
    return status;
}

static enum verdict judge_upload(const char *file)
{
    (void)file;
    return LEFTOVER;
}

// A server's uploads, each a directory of files: whoever has the lock knows that they are nobody's.
static enum status collect_uploads(const char *state_directory,
                                   void (*told)(void *, const struct registry_leftover *),
                                   void *context, struct fault *fault)
{
    char folder[REGISTRY_PATH], path[REGISTRY_PATH + 300], label[300];
    (void)snprintf(folder, sizeof folder, "%s/" REGISTRY_UPLOADS, state_directory);
    DIR *directory = opendir(folder);
    enum status status = STATUS_OK;
    for (struct dirent *file; directory && !status && (file = readdir(directory));) {
        struct stat info;
        if (file->d_name[0] == '.' ||
            fstatat(dirfd(directory), file->d_name, &info, AT_SYMLINK_NOFOLLOW) != 0 ||
            !S_ISDIR(info.st_mode)) // a link would lead out
            continue;
        (void)snprintf(path, sizeof path, "%s/%s", folder, file->d_name);
        (void)snprintf(label, sizeof label, REGISTRY_UPLOADS "/%s/", file->d_name);
        status = collect_in(path, label, judge_upload, told, context, fault);
        if (!status)
            (void)rmdir(path); // stays when something in it was no file
    }
    if (directory)
        (void)closedir(directory);
    return status;
}

enum status registry_collect(const char *state_directory,
                             void (*told)(void *context, const struct registry_leftover *leftover),
                             void *context, struct fault *fault)
{
    char folder[REGISTRY_PATH];
    enum status status = folder_of(state_directory, folder, fault);
    if (!status)
        status = collect_in(folder, "adapters/", judge_adapter, told, context, fault);
    if (!status)
        status = collect_in(state_directory, "", judge_state, told, context, fault);
    if (!status)
        status = collect_uploads(state_directory, told, context, fault);
    return status;
}
