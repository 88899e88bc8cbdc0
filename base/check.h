// SPDX-License-Identifier: Apache-2.0
// CHECK is for bugs and stays on in release builds: a broken invariant must not serve wrong
// answers. Expected trouble (full, bad file, lost device) is a status instead.
#ifndef POLDER_BASE_CHECK_H
#define POLDER_BASE_CHECK_H

__attribute__((noreturn)) void check_failed(const char *file, int line, const char *what);

#define CHECK(condition)                                                                           \
    do {                                                                                           \
        if (__builtin_expect(!(condition), 0))                                                     \
            check_failed(__FILE__, __LINE__, #condition);                                          \
    } while (0)

#define ARRAY_COUNT(a) (sizeof(a) / sizeof((a)[0]))

#endif
