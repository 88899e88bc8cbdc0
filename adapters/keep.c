// SPDX-License-Identifier: Apache-2.0
// Residency on somebody's word: load, unload, and pinning for a tenant.
//
// Pinning says that an adapter stays on the device until it is unpinned by everybody who pinned it
// (each tenant has a claim of its own), removed or replaced. Its
// pages are never offered under pressure, so whoever plans with the pool counts
// adapters_kept_pages as not there. This file does not decide whether they may be taken: what the
// pool can spare is the engine's business, what a tenant may have its quota's. A pinned adapter
// whose pages are not there (no room at that moment) is fetched by adapters_fetch_kept at every
// turn; one whose file cannot be read is not tried again until somebody asks for it.
#include <math.h>

#include "adapters/internal.h"
#include "base/check.h"

enum status adapter_load(struct adapters *adapters, adapter_id id)
{
    const struct adapter *adapter = adapter__of(adapters, id);
    if (pool_is_resident(adapters->options.pool, adapter->object) && adapter_is_whole(adapters, id))
        return STATUS_OK;
    enum status status = adapter_fetch(adapters, id, COPY_STANDARD, COPY_ADAPTER);
    if (status)
        return status;
    adapter_used(adapters, id);
    uint32_t next = 0;
    (void)adapter_fetch_parts(adapters, id, COPY_STANDARD, 1, &next); // as far as it goes now
    return STATUS_OK;
}

enum status adapter_unload(struct adapters *adapters, adapter_id id, struct fault *fault)
{
    struct adapter *adapter = adapter__of(adapters, id);
    struct pool *pool = adapters->options.pool;
    if (adapter->keeper != NO_PLACE)
        return fault_set(fault, STATUS_BUSY, "adapter \"%s\" is pinned: unpin it first.",
                         adapter->name);
    if (adapter->users || pool_pins(pool, adapter->object) ||
        pool_is_fetching(pool, adapter->object) || !adapter__parts_unload(adapters, adapter))
        return fault_set(fault, STATUS_BUSY,
                         "adapter \"%s\" is in use or on its way: try again later.", adapter->name);
    if (!pool_is_resident(pool, adapter->object))
        return STATUS_OK;
    adapter__warm_remove(adapters, adapter);
    pool_drop_device(pool, adapter->object);
    return STATUS_OK;
}

// ---- claims ----

static uint32_t slot_of(const struct adapters *adapters, adapter_id id)
{
    return (uint32_t)(adapter__of((struct adapters *)adapters, id) - adapters->slots);
}

uint32_t adapter_keeper(const struct adapters *adapters, adapter_id id, uint32_t n)
{
    uint32_t slot = slot_of(adapters, id);
    for (uint32_t i = 0; i < adapters->claims_count; i++)
        if (adapters->claims[i].slot == slot && !n--)
            return adapters->claims[i].keeper;
    return ADAPTER_NO_KEEPER;
}

bool adapter_is_kept(const struct adapters *adapters, adapter_id id)
{
    return adapters->slots[slot_of(adapters, id)].keeper != NO_PLACE;
}

bool adapter_is_kept_by(const struct adapters *adapters, adapter_id id, uint32_t keeper)
{
    uint32_t slot = slot_of(adapters, id);
    for (uint32_t i = 0; i < adapters->claims_count; i++)
        if (adapters->claims[i].slot == slot && adapters->claims[i].keeper == keeper)
            return true;
    return false;
}

enum status adapter_keep(struct adapters *adapters, adapter_id id, uint32_t keeper)
{
    struct adapter *adapter = adapter__of(adapters, id);
    uint32_t slot = slot_of(adapters, id);
    CHECK(adapter->state == STATE_NAMED && keeper != NO_PLACE);
    if (adapter_is_kept_by(adapters, id, keeper))
        return STATUS_OK;
    if (adapters->claims_count == adapters->claims_max)
        return STATUS_LIMIT;
    adapters->claims[adapters->claims_count++] = (struct adapter_claim){slot, keeper};
    if (adapter->keeper != NO_PLACE)
        return STATUS_OK;
    adapter->keeper = keeper;
    adapter->forgiven = true;
    adapters->kept[adapters->kept_count++] = slot;
    adapters->kept_pages += adapter->store.pages;
    adapter__parts_relist(adapters, adapter);
    return STATUS_OK;
}

// Takes back the claims on a slot: of one keeper, or all (NO_PLACE).
static void claims_drop(struct adapters *adapters, uint32_t slot, uint32_t keeper)
{
    uint32_t left = 0;
    for (uint32_t i = 0; i < adapters->claims_count; i++) {
        struct adapter_claim claim = adapters->claims[i];
        if (claim.slot != slot || (keeper != NO_PLACE && claim.keeper != keeper))
            adapters->claims[left++] = claim;
    }
    adapters->claims_count = left;
}

static void let_go(struct adapters *adapters, struct adapter *adapter, uint32_t keeper)
{
    uint32_t slot = (uint32_t)(adapter - adapters->slots), at = 0;
    if (adapter->keeper == NO_PLACE)
        return;
    claims_drop(adapters, slot, keeper);
    adapter->keeper = adapter_keeper(adapters, adapter__id(adapters, slot), 0);
    if (adapter->keeper != NO_PLACE)
        return; // somebody else's too
    while (adapters->kept[at] != slot)
        at++;
    adapters->kept[at] = adapters->kept[--adapters->kept_count];
    adapters->kept_pages -= adapter->store.pages;
    adapter__parts_relist(adapters, adapter);
}

void adapter__let_go(struct adapters *adapters, struct adapter *adapter)
{
    let_go(adapters, adapter, NO_PLACE);
}

void adapter_let_go(struct adapters *adapters, adapter_id id, uint32_t keeper)
{
    let_go(adapters, adapter__of(adapters, id), keeper);
}

uint64_t adapters_kept_pages(const struct adapters *adapters)
{
    return adapters->kept_pages;
}

uint64_t adapters_kept_pages_of(const struct adapters *adapters, uint32_t keeper)
{
    uint64_t pages = 0;
    for (uint32_t i = 0; i < adapters->claims_count; i++)
        if (adapters->claims[i].keeper == keeper)
            pages += adapters->slots[adapters->claims[i].slot].store.pages;
    return pages;
}

void adapters_fetch_kept(struct adapters *adapters)
{
    struct pool *pool = adapters->options.pool;
    for (uint32_t i = 0; i < adapters->kept_count; i++) {
        const struct adapter *adapter = &adapters->slots[adapters->kept[i]];
        adapter_id id = adapter__id(adapters, adapters->kept[i]);
        bool is_trunk_here =
            pool_is_resident(pool, adapter->object) || pool_is_fetching(pool, adapter->object);
        bool is_here =
            is_trunk_here && adapter->parts_resident + adapter->parts_coming == adapter->part_count;
        if (is_here || adapter->part_status == STATUS_IO ||
            adapter_fetch_status(adapters, id) == STATUS_IO)
            continue;
        if (!is_trunk_here && adapter_fetch(adapters, id, COPY_STANDARD, COPY_ADAPTER))
            return; // no room: the next turn tries again
        uint32_t next = 0;
        (void)adapter_fetch_parts(adapters, id, COPY_STANDARD, INFINITY, &next);
    }
}
