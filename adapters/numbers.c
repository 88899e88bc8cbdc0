// SPDX-License-Identifier: Apache-2.0
// What the registry of adapters says of itself: see adapters.h.
#include <string.h>

#include "adapters/internal.h"

uint32_t adapters_count(const struct adapters *adapters)
{
    return adapters->count;
}

uint32_t adapters_behind(const struct adapters *adapters, const char *name)
{
    uint32_t low = 0, high = adapters->count;
    while (low < high) {
        uint32_t middle = low + (high - low) / 2;
        if (strcmp(adapters->slots[adapters->order[middle]].name, name) <= 0)
            low = middle + 1;
        else
            high = middle;
    }
    return low;
}

bool adapter_at(const struct adapters *adapters, uint32_t index, struct adapter_info *out)
{
    if (index >= adapters->count)
        return false;
    const struct adapter *adapter = &adapters->slots[adapters->order[index]];
    bool resident = pool_is_resident(adapters->options.pool, adapter->object);
    *out = (struct adapter_info){
        .owner = adapter->owner,
        .resident = resident,
        .pages = adapter->store.pages,
        .trunk_pages = adapter->store.trunk_pages,
        .device_pages = (resident ? adapter->store.trunk_pages : 0) + adapter->parts_resident,
        .host_pages = pool_host_pages(adapters->options.pool, adapter->object),
        .users = adapter->users,
        .id = adapter__id(adapters, adapters->order[index]),
        .report = adapter->store.report,
        .loads = adapter->loads,
    };
    memcpy(out->name, adapter->name, sizeof out->name);
    return true;
}

struct adapters_owned adapters_owned(const struct adapters *adapters, uint32_t owner,
                                     const char *but)
{
    struct adapters_owned owned = {.count_max = adapters->options.adapters_max,
                                   .pages_max = adapters->options.slots_max};
    for (uint32_t i = 0; i < adapters->count; i++) {
        const struct adapter *adapter = &adapters->slots[adapters->order[i]];
        if (adapter->owner != owner || !strcmp(adapter->name, but))
            continue;
        owned.count++;
        owned.pages += adapter->store.pages;
    }
    return owned;
}

void adapters_stats(const struct adapters *adapters, struct adapters_stats *out)
{
    *out =
        (struct adapters_stats){.registered = adapters->count,
                                .leaving = adapters->options.adapters_max - adapters->free_count -
                                           adapters->count - adapters->graves_count,
                                .kept = adapters->kept_count,
                                .kept_pages = adapters->kept_pages,
                                .fetches = adapters->fetches,
                                .given_back = adapters->given_back,
                                .parts_resident = adapters->parts.resident,
                                .parts_given_back = adapters->parts.given_back,
                                .loads = adapters->loads};
    for (uint32_t i = 0; i < adapters->warm_count; i++) {
        const struct adapter *adapter = &adapters->slots[adapters->warm[i]];
        out->fetching += pool_is_fetching(adapters->options.pool, adapter->object);
        if (pool_is_resident(adapters->options.pool, adapter->object)) {
            out->resident++;
            out->resident_pages += adapter->store.trunk_pages;
        }
    }
    out->resident_pages += adapters->parts.resident;
}
