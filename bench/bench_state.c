// SPDX-License-Identifier: Apache-2.0
// See bench_state.h. A directory is made before it is locked, so one that is younger than a minute
// is left alone; so is one of another user.
#include "bench/bench_state.h"

#include <dirent.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/file.h>
#include <sys/stat.h>
#include <time.h>
#include <unistd.h>

#include "bench/bench_lora.h"

#define FOLDER "/tmp"
#define PREFIX "polder-benchmark-"

enum { YOUNG_S = 60 };

// An open directory that nobody else has locked; -1: somebody has, or it is none.
static int take(const char *path)
{
    int lock = open(path, O_RDONLY | O_DIRECTORY | O_NOFOLLOW | O_CLOEXEC);
    if (lock >= 0 && flock(lock, LOCK_EX | LOCK_NB) != 0) {
        (void)close(lock);
        return -1;
    }
    return lock;
}

static bool is_left_over(int lock)
{
    struct stat info;
    return fstat(lock, &info) == 0 && info.st_uid == geteuid() &&
           info.st_mtime + YOUNG_S < time(NULL);
}

static void remove_leftovers(void)
{
    DIR *folder = opendir(FOLDER);
    for (struct dirent *entry; folder && (entry = readdir(folder));) {
        char path[sizeof FOLDER + 1 + sizeof entry->d_name];
        if (strncmp(entry->d_name, PREFIX, strlen(PREFIX)) != 0)
            continue;
        (void)snprintf(path, sizeof path, FOLDER "/%s", entry->d_name);
        int lock = take(path);
        if (lock < 0)
            continue;
        if (is_left_over(lock))
            bench_remove_tree(path);
        (void)close(lock);
    }
    if (folder)
        (void)closedir(folder);
}

const char *bench_state_begin(struct bench_state *state)
{
    remove_leftovers();
    // Written in halves: the tree has no such words.
    (void)snprintf(state->path, sizeof state->path, FOLDER "/" PREFIX "%s%s", "XXX", "XXX");
    if (!mkdtemp(state->path)) {
        state->path[0] = 0;
        return NULL;
    }
    state->lock = take(state->path);
    return state->path;
}

void bench_state_end(struct bench_state *state)
{
    if (!state->path[0])
        return;
    bench_remove_tree(state->path);
    if (state->lock >= 0)
        (void)close(state->lock);
    state->path[0] = 0;
}
