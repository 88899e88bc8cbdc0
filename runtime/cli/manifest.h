// SPDX-License-Identifier: Apache-2.0
// Shared inside runtime/cli only: adapters.yaml, and the run over its entries.
//
//   adapters:
//     - name: dictionary
//       path: adapters/gcide-attn-r16   # absolute, or from the manifest's directory
//       owner: acme                     # offline; without it --owner, or the operator
//
// The whole file is checked before the first entry is registered. Then every entry is tried; what
// fails is listed at the end and the rest goes on. Registering what is registered with the same
// content changes nothing, so a run that was interrupted is run again.
#ifndef POLDER_RUNTIME_CLI_MANIFEST_H
#define POLDER_RUNTIME_CLI_MANIFEST_H

#include "adapters/adapters.h"
#include "runtime/cli/options.h"

struct manifest_entry {
    const char *name, *path, *owner; // owner may be NULL
    int line;
};

enum manifest_result { MANIFEST_ADDED, MANIFEST_UNCHANGED, MANIFEST_FAILED, MANIFEST_STOP };

// Registers one entry. `line`: what to say of it, a sentence when it failed. MANIFEST_STOP: failed,
// and so would everything after it.
typedef enum manifest_result (*manifest_add)(void *context, const struct manifest_entry *entry,
                                             char *line, size_t room);

// Exit code: 0 when all are registered, else 1. A progress line for each entry goes to standard
// error, the sum and what failed to standard output.
int manifest_run(const char *path, manifest_add add, void *context);

#endif
