// SPDX-License-Identifier: Apache-2.0
// What giving an adapter back would cost (folder-internal): pure functions over numbers (DESIGN.md
// 9).
#ifndef POLDER_ADAPTERS_PRICE_H
#define POLDER_ADAPTERS_PRICE_H

#include <stdint.h>

// A count of uses in which a use loses half its weight every ADAPTER_HALF_LIFE_US. `level` is log2
// of the count, moved to time 0: it orders adapters by their heat at any one time, without a clock.
// All zero: never used.
struct adapter_heat {
    double uses, level;
    uint64_t at_us;
};

// 60 s: about the time in which interactive tenants come back. The horizon is that of all kinds
// (POOL_HORIZON_US).
enum { ADAPTER_HALF_LIFE_US = 60000000 };

void adapter__heat_add(struct adapter_heat *heat, uint64_t now_us);  // a request arrived
void adapter__heat_keep(struct adapter_heat *heat, uint64_t now_us); // in use: it does not cool
double adapter__heat_at(const struct adapter_heat *heat, uint64_t now_us);

// (probability of use within the horizon) x (time to bring it back) / bytes, in microseconds per
// byte. An adapter that `users` admitted requests hold will be used for certain, and each of them
// would wait.
float adapter__price(const struct adapter_heat *heat, uint32_t users, float fetch_us_per_byte,
                     uint64_t now_us);

// That an adapter without users gets one within the horizon.
double adapter__idle_likely(const struct adapter_heat *heat, uint64_t now_us);
// That a part which no step has used for so many is used within the horizon, if its adapter is.
float adapter__part_likely(uint64_t idle_steps);

#endif
