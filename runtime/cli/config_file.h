// SPDX-License-Identifier: Apache-2.0
// The --config file: a flat YAML map whose keys are option names; a list gives several values.
#ifndef POLDER_RUNTIME_CLI_CONFIG_FILE_H
#define POLDER_RUNTIME_CLI_CONFIG_FILE_H

#include "base/status.h"

typedef enum status (*config_file_value)(void *context, const char *where, const char *key,
                                         const char *text, struct fault *fault);

// Calls `value` for each scalar, `where` being "file:line". The texts live until
// config_file_free(*owned).
MUST_USE enum status config_file_read(const char *path, config_file_value value, void *context,
                                      void **owned, struct fault *fault);
void config_file_free(void *owned);

#endif
