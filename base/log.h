// SPDX-License-Identifier: Apache-2.0
// Log lines go to standard error, one write per line, control characters escaped (log injection).
// The level is the one process-wide setting of the project: it is set once by the command line
// before any thread starts and only read afterwards. Any thread.
#ifndef POLDER_BASE_LOG_H
#define POLDER_BASE_LOG_H

#include "base/status.h"

enum log_level { LOG_DEBUG, LOG_INFO, LOG_WARN, LOG_ERROR };

void log_set_level(enum log_level level);
void log_line(enum log_level level, const char *format, ...) PRINTF_LIKE(2, 3);

#endif
