// SPDX-License-Identifier: Apache-2.0
// What the MoE kernels share: the list of experts to run, written by the map and read by the
// expert GEMMs of the same layer, and the address of an expert's tile.
//
// The list stands at the start of l->work, which nobody else uses between a map and the moe_down
// of its layer. Behind it, from MOE_HIDDEN_AT on, the hidden vectors of expert LoRA.
#pragma once

#include "kernels/cuda/common.cuh"

struct moe_run {
    uint32_t expert, begin, count, reserved; // pairs order[begin .. begin + count)
};

// Experts in state 1, ascending.
struct moe_list {
    uint32_t count, reserved[3];
    struct moe_run run[EXPERTS_MAX];
};

enum { MOE_HIDDEN_AT = 32 << 10 };
static_assert(sizeof(struct moe_list) <= MOE_HIDDEN_AT, "the list stands before the hidden");

// Tile `tile` of expert `expert`; per_page: tiles of a page.
__device__ __forceinline__ const uint8_t *
expert_tile(const struct expert_view &view, uint32_t per_page, uint32_t expert, uint32_t tile)
{
    uint32_t page = view.pages[(uint64_t)expert * view.pages_per_expert + tile / per_page];
    return view.arena + (uint64_t)page * view.page_bytes + (uint64_t)(tile % per_page) * TILE_BYTES;
}

// moe_gemm_wide.cu; down: the second of the two GEMMs.
void cuda__moe_wide(const struct cuda_launch *l, const struct moe_gemm_args *a, bool down);
enum status cuda__moe_wide_prepare(struct cuda_device *device);
