// SPDX-License-Identifier: Apache-2.0
// What kernels read of adapters. It is device memory, which the host may not be able to touch:
//   views       [adapters_max], a row written once, at registration
//   pairs       one block per adapter, uploaded at registration, released with the slot; and with
//               expert LoRA one that says which pages each (layer, expert) needs
//   page_table  [slots of the pool]: an adapter's page numbers stand where the pool keeps its slots
// Only the page table changes while segments run, and only by adapters_flush, in the order of the
// stream. What stands there of a trunk that is not resident is of no meaning; of a part it is
// PAGE_NONE. A slot is freed when nothing pins it, so no segment in flight reads what is released
// or written anew.
#include <stdlib.h>
#include <string.h>

#include "adapters/internal.h"
#include "base/check.h"

void adapter__tables_release(struct adapters *adapters, struct adapter *adapter)
{
    struct device *device = adapters->options.device;
    if (adapter->pairs)
        device->table->release(device, adapter->pairs);
    if (adapter->ranges_device)
        device->table->release(device, adapter->ranges_device);
    free(adapter->ranges);
    adapter->pairs = NULL;
    adapter->ranges = adapter->ranges_device = NULL;
}

// The parts' table, and that none of their pages is there.
static enum status ranges_upload(struct adapters *adapters, struct adapter *adapter)
{
    struct device *device = adapters->options.device;
    size_t ranges = (size_t)adapters->options.base.layers * adapter->store.experts;
    adapter->ranges = adapter->store.parts; // it needs them at gates
    adapter->store.parts = NULL;
    uint32_t *absent = malloc(((size_t)adapter->part_count + 1) * sizeof *absent);
    if (!absent)
        return STATUS_NO_MEMORY;
    memset(absent, 0xff, adapter->part_count * sizeof *absent); // PAGE_NONE
    enum status status = device->table->alloc(device, ranges * sizeof *adapter->ranges,
                                              (void **)&adapter->ranges_device);
    if (!status)
        status = device->table->upload(device, adapter->ranges_device, adapter->ranges,
                                       ranges * sizeof *adapter->ranges);
    if (!status && adapter->part_count)
        status = device->table->upload(device, adapters->page_table + adapter->first_part, absent,
                                       adapter->part_count * sizeof *absent);
    free(absent);
    return status;
}

// What kernels read of this adapter, but for the page numbers: its pairs and its row of views.
enum status adapter__tables_upload(struct adapters *adapters, struct adapter *adapter,
                                   uint32_t slot, struct fault *fault)
{
    struct device *device = adapters->options.device;
    size_t bytes = lora_pair_rows(adapters->options.base.layers) * adapter->store.experts *
                   sizeof *adapter->pairs;
    enum status status = device->table->alloc(device, bytes, (void **)&adapter->pairs);
    if (status)
        return fault_set(fault, status, "no device memory for the table of adapter \"%s\".",
                         adapter->name);
    struct lora_adapter_view view = {
        .pages = adapters->page_table + pool_first_slot(adapters->options.pool, adapter->object),
        .pairs = adapter->pairs,
        .experts = adapter->store.experts};
    if (adapter->store.parts)
        status = ranges_upload(adapters, adapter);
    view.parts = adapter->ranges_device;
    if (!status)
        status = device->table->upload(device, adapter->pairs, adapter->store.pairs, bytes);
    if (!status)
        status = device->table->upload(device, &adapters->views[slot], &view, sizeof view);
    if (status)
        return fault_set(fault, status, "the table of adapter \"%s\" did not reach the device.",
                         adapter->name);
    adapter__store_clear(&adapter->store); // 36 bytes for every (layer, module, expert)
    return STATUS_OK;
}

static void loads_add(struct adapter_loads *loads, uint64_t us)
{
    loads->loads++;
    loads->load_us += us;
    loads->load_us_max = us > loads->load_us_max ? us : loads->load_us_max;
}

void adapters_flush(struct adapters *adapters, struct stream *stream)
{
    struct pool *pool = adapters->options.pool;
    uint32_t *index = adapters->flush + (size_t)adapters->flush_next * 2 * adapters->flush_words;
    uint32_t *value = index + adapters->flush_words, count = 0;
    for (uint32_t i = 0; i < adapters->arriving_count;) {
        struct adapter *adapter = &adapters->slots[adapters->arriving[i]];
        if (pool_is_fetching(pool, adapter->object)) {
            i++;
            continue;
        }
        adapter->arriving = false;
        adapters->arriving[i] = adapters->arriving[--adapters->arriving_count];
        if (!pool_is_resident(pool, adapter->object))
            continue; // the fetch failed, or its pages were given back
        uint64_t us = clock_now_us(&adapters->options.clock) - adapter->fetch_us;
        loads_add(&adapter->loads, us);
        loads_add(&adapters->loads, us);
        uint32_t first = pool_first_slot(pool, adapter->object);
        const uint32_t *pages = pool_device_pages(pool, adapter->object);
        CHECK(adapter->store.trunk_pages <= adapters->flush_words - count);
        for (uint32_t slot = 0; slot < adapter->store.trunk_pages; slot++, count++) {
            index[count] = first + slot;
            value[count] = pages[slot];
        }
    }
    count +=
        adapter__parts_flush(adapters, index + count, value + count, adapters->flush_words - count);
    if (!count)
        return;
    adapters->flush_next = (adapters->flush_next + 1) % FLUSHES_ALIVE;
    stream->device->table->scatter(
        stream, &(struct scatter_args){
                    .table = adapters->page_table, .index = index, .value = value, .count = count});
}

const struct lora_adapter_view *adapters_views(const struct adapters *adapters)
{
    return adapters->views;
}
