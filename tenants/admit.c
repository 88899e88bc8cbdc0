// SPDX-License-Identifier: Apache-2.0
// Admission: arithmetic on counters, nothing else. No clock, no allocation, no table.
//
// The window: one counter per second of the clock, 61 of them. A request counts from its second up
// to and including the 60th second after it, so that no 60 s, wherever they start, hold more than
// rpm_limit; the price is that an entry leaves up to one second late.
//
//   second:   s-60  s-59 ...  s-1    s      sum of all 61 = used
//             leaves at (s-60) + 61 seconds
#include <string.h>

#include "tenants/tenants.h"

enum { SLOTS = TENANT_WINDOW_SECONDS + 1 };

static const uint64_t second_us = 1000000;

// Forgets the seconds that left the window. A clock that stands still or goes back forgets nothing.
static void window_advance(struct tenant_window *window, uint64_t second)
{
    if (second <= window->second)
        return;
    uint64_t gone = second - window->second;
    if (gone >= SLOTS)
        memset(window->per_second, 0, sizeof window->per_second);
    for (uint64_t i = 1; i <= gone && gone < SLOTS; i++)
        window->per_second[(window->second + i) % SLOTS] = 0;
    window->second = second;
}

static uint64_t window_used(const struct tenant_window *window)
{
    uint64_t used = 0;
    for (int i = 0; i < SLOTS; i++)
        used += window->per_second[i];
    return used;
}

// Milliseconds until the oldest entry leaves.
static uint64_t window_retry_ms(const struct tenant_window *window, uint64_t now_us)
{
    for (uint64_t age = SLOTS; age-- > 0;) {
        if (age > window->second || !window->per_second[(window->second - age) % SLOTS])
            continue;
        uint64_t leaves_us = (window->second - age + SLOTS) * second_us;
        return leaves_us > now_us ? (leaves_us - now_us + 999) / 1000 : 1;
    }
    return 1;
}

static bool refuse(struct tenant_counters *counters, struct tenant_refusal *refusal,
                   enum tenant_limit kind, uint64_t limit, uint64_t used, uint64_t retry_after_ms)
{
    counters->refused++;
    *refusal = (struct tenant_refusal){.kind = kind,
                                       .limit = limit,
                                       .remaining = used < limit ? limit - used : 0,
                                       .retry_after_ms = retry_after_ms};
    return false;
}

bool tenants_admit(const struct tenant *tenant, struct tenant_counters *counters,
                   const struct tenant_ask *ask, uint64_t now_us, struct tenant_refusal *refusal)
{
    uint64_t context = (uint64_t)ask->prompt_tokens + ask->max_tokens;
    if (tenant->max_tokens && ask->max_tokens > tenant->max_tokens)
        return refuse(counters, refusal, TENANT_LIMIT_MAX_TOKENS, tenant->max_tokens, 0, 0);
    if (tenant->max_context_tokens && context > tenant->max_context_tokens)
        return refuse(counters, refusal, TENANT_LIMIT_CONTEXT, tenant->max_context_tokens,
                      ask->prompt_tokens, 0);
    window_advance(&counters->requests, now_us / second_us);
    uint64_t used = window_used(&counters->requests);
    if (tenant->rpm_limit && used >= tenant->rpm_limit)
        return refuse(counters, refusal, TENANT_LIMIT_RPM, tenant->rpm_limit, used,
                      window_retry_ms(&counters->requests, now_us));
    if ((uint64_t)counters->parallel + ask->sequences > tenant->max_parallel_requests)
        return refuse(counters, refusal, TENANT_LIMIT_PARALLEL, tenant->max_parallel_requests,
                      counters->parallel, 0);
    if ((uint64_t)counters->waiting + ask->sequences > tenant->max_queue)
        return refuse(counters, refusal, TENANT_LIMIT_QUEUE, tenant->max_queue, counters->waiting,
                      0);
    counters->requests.per_second[counters->requests.second % SLOTS]++;
    counters->parallel += ask->sequences;
    counters->waiting += ask->sequences;
    counters->admitted++;
    return true;
}

bool tenants_admit_change(const struct tenant *tenant, struct tenant_counters *counters,
                          uint64_t now_us, struct tenant_refusal *refusal)
{
    struct tenant_window *window = &counters->changes;
    window_advance(window, now_us / second_us);
    uint64_t used = window_used(window), limit = tenant->adapter_rpm_limit;
    if (limit && used >= limit)
        return refuse(counters, refusal, TENANT_LIMIT_ADAPTER_RPM, limit, used,
                      window_retry_ms(window, now_us));
    window->per_second[window->second % SLOTS]++;
    return true;
}

void tenant_sequence_started(struct tenant_counters *counters)
{
    counters->waiting--;
}

void tenant_sequence_ended(struct tenant_counters *counters, bool started)
{
    counters->parallel--;
    if (!started)
        counters->waiting--;
}

const char *tenant_limit_name(enum tenant_limit kind)
{
    static const char *const names[TENANT_LIMIT_COUNT] = {
        "none",       "rpm_limit",          "max_parallel_requests", "max_queue",
        "max_tokens", "max_context_tokens", "adapter_rpm_limit"};
    return (unsigned)kind < TENANT_LIMIT_COUNT ? names[kind] : "none";
}

int tenant_order(const struct tenant_place *a, const struct tenant_place *b)
{
    if (a->class != b->class)
        return a->class < b->class ? -1 : 1;
    return (a->arrival > b->arrival) - (a->arrival < b->arrival);
}
