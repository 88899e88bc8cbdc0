// SPDX-License-Identifier: Apache-2.0
// Counts and places memory with the same code: a layout function runs once with base NULL (it only
// counts), then once more on the block that was allocated for it. Whoever allocates frees the
// block.
#ifndef POLDER_UNIFIED_POOL_PLACE_H
#define POLDER_UNIFIED_POOL_PLACE_H

#include <stddef.h>
#include <stdint.h>

#include "base/arith.h"
#include "base/check.h"

enum { PLACE_ALIGN = 64 }; // one cache line

struct placer {
    uint8_t *base; // NULL: count only
    size_t used;
};

// An array of `count` elements, aligned to PLACE_ALIGN; NULL while counting.
static inline void *place(struct placer *placer, size_t count, size_t element)
{
    size_t at = round_up(placer->used, PLACE_ALIGN), bytes;
    CHECK(mul_size(count, element, &bytes) && add_size(at, bytes, &placer->used));
    return placer->base ? placer->base + at : NULL;
}

#endif
