// SPDX-License-Identifier: Apache-2.0
// Shared inside runtime/cli only: the commands. Each takes parsed settings and returns the exit
// code of the process: 0 done, 1 failed (a sentence went to standard error), 2 wrong usage, 3 the
// device failed.
#ifndef POLDER_RUNTIME_CLI_COMMANDS_H
#define POLDER_RUNTIME_CLI_COMMANDS_H

#include "runtime/cli/options.h"

enum { EXIT_DONE = 0, EXIT_FAILED = 1, EXIT_USAGE = 2, EXIT_DEVICE = 3 };

int command_serve(const struct settings *settings);
int command_check_config(const struct settings *settings);
int command_generate(const struct settings *settings);
int command_chat(const struct settings *settings);
int command_call(const struct settings *settings);
int command_stats(const struct settings *settings);
int command_adapter(const struct settings *settings);
int command_synth(const struct settings *settings);

// "polder: " sentence to standard error; returns EXIT_FAILED, or EXIT_DEVICE for STATUS_DEVICE.
int complain(const struct fault *fault);

#endif
