// SPDX-License-Identifier: Apache-2.0
// Time is passed in: everything above base takes a `struct clock`, so that the simulator can own
// time.
#ifndef POLDER_BASE_CLOCK_H
#define POLDER_BASE_CLOCK_H

#include <stdint.h>

struct clock {
    uint64_t (*now_us)(void *context); // monotonic microseconds
    void *context;
};

struct clock clock_monotonic(void);

// A clock that stands still until it is moved; `context` of the result points at *now_us.
struct clock clock_fake(uint64_t *now_us);

static inline uint64_t clock_now_us(const struct clock *clock)
{
    return clock->now_us(clock->context);
}

#endif
