// SPDX-License-Identifier: Apache-2.0
// Shared inside runtime/cli only: talking to the server that --connect names.
#ifndef POLDER_RUNTIME_CLI_REMOTE_H
#define POLDER_RUNTIME_CLI_REMOTE_H

#include "clients/c/polder_client.h"
#include "clients/c/polder_client_json.h"
#include "runtime/cli/options.h"

// Connects with the key of --api-key or --api-key-file. NULL: the reason went to standard error.
struct polder_client *remote_open(const struct settings *settings);
// "polder: CODE: sentence" to standard error; returns EXIT_FAILED.
int remote_complain(const struct polder_error *error);
// One call; the result as JSON on standard output, streamed texts before it. An exit code.
int remote_call(const struct settings *settings, const char *method, const char *params);

#endif
