// SPDX-License-Identifier: Apache-2.0
// Packing into tiles, and the one conversion from fp32 to bf16 that every backend agrees on. A row
// of 16 bytes of a core matrix is contiguous in source and target, so packing moves 16 bytes at a
// time.
#include "kernels/tile.h"

#include <string.h>

void tile_pack(enum dtype dtype, const void *source, size_t rows, size_t cols, int half, void *out)
{
    size_t element = dtype_bytes(dtype), step = 16 / element;
    for (size_t r = 0; r < rows; r++) {
        size_t row = half < 0 ? r : tile_interleaved_row(r, (size_t)half);
        const uint8_t *from = (const uint8_t *)source + r * cols * element;
        for (size_t c = 0; c < cols; c += step) {
            uint8_t *to = (uint8_t *)out + tile_offset(dtype, cols, row, c);
            memcpy(to, from + c * element, min_size(step, cols - c) * element);
        }
    }
}

uint16_t bf16_from_f32(float value)
{
    union {
        float number;
        uint32_t bits;
    } u = {.number = value};
    if ((u.bits & 0x7fffffffu) > 0x7f800000u)
        return (uint16_t)(u.bits >> 16 | 0x40u); // stays a NaN, quiet, whatever its payload
    return (uint16_t)((u.bits + 0x7fffu + (u.bits >> 16 & 1u)) >> 16);
}
