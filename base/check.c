// SPDX-License-Identifier: Apache-2.0
#include "base/check.h"

#include <stdio.h>
#include <stdlib.h>

void check_failed(const char *file, int line, const char *what)
{
    (void)fprintf(stderr, "polder: bug: CHECK(%s) failed at %s:%d\n", what, file, line);
    abort();
}
