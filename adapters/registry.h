// SPDX-License-Identifier: Apache-2.0
// The registry of adapters on disk: which files of a state directory are registered adapters, who
// may change them, and what is left over. The server and the offline tool go through here, so both
// mean the same by a name.
//
//   <state>/lock                          flock: one writer, a server or a tool
//   <state>/adapters/NAME.adapter         the operator's
//   <state>/adapters/NAME@TENANT.adapter  a tenant's
//
// A name is registered when its file is there: the rename of a finished store file onto it is the
// one step that registers, its unlink the one that removes. Nothing else is kept. Any thread.
#ifndef POLDER_ADAPTERS_REGISTRY_H
#define POLDER_ADAPTERS_REGISTRY_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "adapters/adapters.h"

enum { REGISTRY_PATH = 1024 };
#define REGISTRY_UPLOADS "uploads" // <state>/uploads/<16 hex>/: adapters that a server is sent

struct registry_entry {
    char name[ADAPTER_NAME_MAX];
    char tenant[ADAPTER_NAME_MAX]; // "": the operator's
};

// Makes <state>/adapters and what is above it, mode 0700.
MUST_USE enum status registry_make(const char *state_directory, struct fault *fault);
// Takes the lock; BUSY when someone has it. The caller closes *out, which gives it back; so does
// the end of the process.
MUST_USE enum status registry_lock(const char *state_directory, int *out, struct fault *fault);

// The file of an entry. INVALID when the path is too long.
MUST_USE enum status registry_path(const char *state_directory, const struct registry_entry *entry,
                                   char out[REGISTRY_PATH], struct fault *fault);
// Is `file` (a name without directory) one of a registered adapter? Fills *out. Its parts may still
// be no valid names.
bool registry_parse(const char *file, struct registry_entry *out);

// All entries with valid names, by name, then tenant. The caller frees *out. A directory that is
// not there has none.
MUST_USE enum status registry_list(const char *state_directory, struct registry_entry **out,
                                   size_t *count, struct fault *fault);
// The entry of a name: that of `tenant` if there is one, else the operator's, else any. NOT_FOUND
// without a sentence.
MUST_USE enum status registry_find(const char *state_directory, const char *name,
                                   const char *tenant, struct registry_entry *out);

// Renames a finished store file (in the same directory) onto the entry's file, or unlinks that;
// then syncs the directory. *changed (may be NULL): the first was done. With a failure it means
// that the sync was not: it holds after a restart, but the loss of power may undo it.
MUST_USE enum status registry_commit(const char *state_directory, const char *store_path,
                                     const struct registry_entry *entry, bool *changed,
                                     struct fault *fault);
MUST_USE enum status registry_remove(const char *state_directory,
                                     const struct registry_entry *entry, bool *changed,
                                     struct fault *fault);

// Removes what unfinished work has left: "*.part" and "*.adapter.new" in adapters/, uploads,
// temporary expert stores of processes that are gone. Only for the holder of the lock. `told` (may
// be NULL) hears of each file: removed, or left alone because nobody knows what it is.
struct registry_leftover {
    const char *file; // below the state directory
    uint64_t bytes;
    bool removed;
};
MUST_USE enum status registry_collect(const char *state_directory,
                                      void (*told)(void *context,
                                                   const struct registry_leftover *leftover),
                                      void *context, struct fault *fault);

#endif
