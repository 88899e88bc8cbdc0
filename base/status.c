// SPDX-License-Identifier: Apache-2.0
#include "base/status.h"

#include <stdarg.h>
#include <stdio.h>

const char *status_code(enum status status)
{
    static const char *const codes[] = {
#define X(name, code, sentence) code,
        STATUS_LIST(X)
#undef X
    };
    return (unsigned)status < STATUS_COUNT ? codes[status] : "internal";
}

const char *status_sentence(enum status status)
{
    static const char *const sentences[] = {
#define X(name, code, sentence) sentence,
        STATUS_LIST(X)
#undef X
    };
    return (unsigned)status < STATUS_COUNT ? sentences[status] : "an error inside the server";
}

enum status fault_set(struct fault *fault, enum status status, const char *format, ...)
{
    if (fault) {
        fault->status = status;
        va_list list;
        va_start(list, format);
        (void)vsnprintf(fault->text, sizeof fault->text, format, list);
        va_end(list);
    }
    return status;
}
