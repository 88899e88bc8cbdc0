// SPDX-License-Identifier: Apache-2.0
// Shared inside runtime/cli only: the two faces of polder adapter, and what both print.
#ifndef POLDER_RUNTIME_CLI_ADAPTER_H
#define POLDER_RUNTIME_CLI_ADAPTER_H

#include "adapters/adapters.h"
#include "runtime/cli/options.h"

// The words were checked by command_adapter. Exit codes as in commands.h.
int adapter_remote(const struct settings *settings);
int adapter_offline(const struct settings *settings);

// A JSON object: what a registration says to its client.
void adapter_report_json(const struct adapter_report *report, char *out, size_t room);
// "applied to N of M matrices, rank r, bytes" and the rest of it.
void adapter_report_line(const struct adapter_report *report, char *out, size_t room);

#endif
