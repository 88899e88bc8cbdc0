// SPDX-License-Identifier: Apache-2.0
// What the expert GEMMs (moe_gemm.c) and their LoRA (moe_lora.c) share.
#ifndef POLDER_KERNELS_CPU_MOE_GEMM_H
#define POLDER_KERNELS_CPU_MOE_GEMM_H

#include "kernels/cpu/cpu.h"

enum { UNITS = TILE_ROWS / 2 }; // units of a gate+up row block

// One of the two GEMMs, in the same words.
struct side {
    const uint8_t *x;     // act rows of the operand
    uint32_t pairs_per_x; // pairs that share a row of x: top_k for gate+up, 1 for down
    size_t in, out;       // columns and rows of the weight
    size_t first_tile, lora_out;
    enum lora_module module; // its first LoRA module
    uint32_t modules;
};

static inline struct side cpu__moe_side(const struct moe_gemm_args *a, bool down)
{
    if (down)
        return (struct side){a->work.hidden,    1,      a->intermediate, a->dim,
                             a->view.down_tile, a->dim, LORA_DOWN,       1};
    return (struct side){a->x, a->top_k,        a->dim,    tile_interleaved_rows(a->intermediate),
                         0,    a->intermediate, LORA_GATE, 2};
}

struct expert_task {
    uint32_t expert, block, first, count; // pairs order[first .. first + count)
};

// moe_lora.c: records what comes before the GEMM of one side; nothing without LoRA.
void cpu__moe_lora_record(struct stream *stream, const struct moe_gemm_args *a, bool down);
// Adds the LoRA of the task's pairs to their rows of 64 in slot->out.
void cpu__moe_lora_add(struct cpu_stream *s, struct slot *slot, const struct moe_gemm_args *a,
                       const struct expert_task *t, const struct side *side);

#endif
