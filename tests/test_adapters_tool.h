// SPDX-License-Identifier: Apache-2.0
// What the tests of adapters/ share: a tiny base, adapter directories made on the spot, and a rig
// of device, pool, copy queues, link and clock.
#ifndef POLDER_TESTS_TEST_ADAPTERS_TOOL_H
#define POLDER_TESTS_TEST_ADAPTERS_TOOL_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "adapters/adapters.h"
#include "kernels/device.h"
#include "tests/fakes.h"
#include "unified_pool/copy.h"
#include "unified_pool/pool.h"

enum { TOOL_TENSORS = 128, TOOL_PATH = 256 };

// hidden 64, 4 heads of 16, 2 KV heads, 2 layers: 0 dense (96 units), 1 with 4 experts of 24 units.
struct adapter_base tool_base(enum dtype dtype);

struct tool_tensor {
    char name[160];
    uint32_t dims;
    uint64_t shape[3];
};

// An adapter directory in the making.
struct tool_adapter {
    char directory[TOOL_PATH];
    char config[8192];
    const char *type; // "F32", "BF16", "F16", "F64"
    float poison;     // not 0: written over the middle element of the last tensor
    uint32_t seed, count;
    struct tool_tensor tensors[TOOL_TENSORS];
};

// A fresh directory under `scratch`; rank 4, alpha 8, q_proj and v_proj of both layers.
void tool_adapter_begin(struct tool_adapter *adapter, const char *scratch);
void tool_tensor_add(struct tool_adapter *adapter, const char *name, uint32_t dims, uint64_t a,
                     uint64_t b, uint64_t c);
// "base_model.model.model." + module + ".lora_A.weight" [rank, d_in] and lora_B [d_out, rank].
void tool_pair_add(struct tool_adapter *adapter, const char *module, uint64_t rank, uint64_t d_in,
                   uint64_t d_out);
// {"peft_type": "LORA", "r": 4, "lora_alpha": 8, REST}
void tool_config(struct tool_adapter *adapter, const char *rest);
// Writes both files.
void tool_adapter_write(const struct tool_adapter *adapter);

char *tool_scratch(void); // a directory for this program; the caller frees
void tool_scratch_remove(char *scratch);
void tool_file_write(const char *path, const void *bytes, size_t count);
void *tool_file_read(const char *path, size_t *count); // the caller frees

struct tool_rig {
    uint64_t now_us;
    struct device *device; // CPU
    struct stream *stream;
    struct fake_link link;
    struct copy_queues *copies;
    struct pool *pool;
    struct adapters *adapters;
    uint8_t *device_arena, *host_arena;
    size_t page_bytes;
};
void tool_rig_make(struct tool_rig *rig, const struct adapter_base *base, size_t page_bytes,
                   uint32_t device_pages, uint32_t host_pages, uint32_t adapters_max);
void tool_rig_clear(struct tool_rig *rig);
// Polls until no copy is left, then runs a segment that tells the tables of the device.
void tool_rig_settle(struct tool_rig *rig);

// The bytes between the elements of a row and its end are zero.
bool tool_padding_is_zero(const struct tool_rig *rig, const struct adapter_base *base,
                          const struct lora_adapter_view *view, const struct lora_slice *slice,
                          uint32_t row, uint32_t dim);
// Element i of row j of a resident slice.
float tool_element(const struct tool_rig *rig, const struct adapter_base *base,
                   const struct lora_adapter_view *view, const struct lora_slice *slice,
                   uint32_t row, uint32_t i);

// Fetches all of an adapter, parts too, and waits for it; the page table knows it then.
void tool_rig_bring(struct tool_rig *rig, adapter_id id);

#endif
