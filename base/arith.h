// SPDX-License-Identifier: Apache-2.0
// Checked arithmetic for sizes that come from outside, and small integer helpers.
#ifndef POLDER_BASE_ARITH_H
#define POLDER_BASE_ARITH_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

static inline bool mul_size(size_t a, size_t b, size_t *out)
{
    return !__builtin_mul_overflow(a, b, out);
}

static inline bool add_size(size_t a, size_t b, size_t *out)
{
    return !__builtin_add_overflow(a, b, out);
}

static inline size_t div_up(size_t a, size_t b)
{
    return a / b + (a % b != 0);
}

static inline size_t round_up(size_t a, size_t multiple)
{
    return div_up(a, multiple) * multiple;
}

static inline size_t min_size(size_t a, size_t b)
{
    return a < b ? a : b;
}

static inline size_t max_size(size_t a, size_t b)
{
    return a > b ? a : b;
}

static inline bool is_power_of_two(size_t a)
{
    return a && !(a & (a - 1));
}

#endif
