// SPDX-License-Identifier: Apache-2.0
// Shared inside runtime/cli only: adapters.upload as a client sees it.
#ifndef POLDER_RUNTIME_CLI_ADAPTER_UPLOAD_H
#define POLDER_RUNTIME_CLI_ADAPTER_UPLOAD_H

#include "adapters/adapters.h"
#include "clients/c/polder_client.h"

// Sends both files of `directory`; *upload is then to be committed. -1 with *error, which also
// tells of files here that cannot be read.
int adapter_upload(struct polder_client *client, const char *name, const char *directory,
                   uint64_t *upload, struct polder_error *error);

#endif
