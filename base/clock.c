// SPDX-License-Identifier: Apache-2.0
#include "base/clock.h"

#include <time.h>

static uint64_t monotonic_us(void *context)
{
    (void)context;
    struct timespec t;
    (void)clock_gettime(CLOCK_MONOTONIC, &t);
    return (uint64_t)t.tv_sec * 1000000u + (uint64_t)t.tv_nsec / 1000u;
}

static uint64_t fake_us(void *context)
{
    return *(uint64_t *)context;
}

struct clock clock_monotonic(void)
{
    return (struct clock){.now_us = monotonic_us};
}

struct clock clock_fake(uint64_t *now_us)
{
    return (struct clock){.now_us = fake_us, .context = now_us};
}
