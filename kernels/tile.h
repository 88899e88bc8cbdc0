// SPDX-License-Identifier: Apache-2.0
// Tile-major weights: the one format that CPU and GPU kernels read (DESIGN.md 5).
//
// A tile is 64 rows x 128 bytes = 8 KiB: 64 columns of bf16, 32 of f32. Tiles stand in order of row
// block, then column block. Inside a tile: core matrices of 8 rows x 16 bytes (128 contiguous
// bytes), in the same order (row block of 8, then 16-byte column block). Rows and columns are
// padded with zeros to whole tiles. Gate and up rows are interleaved in blocks of 8 (8 gate rows,
// then the same 8 up rows). Any thread; nothing here allocates.
#ifndef POLDER_KERNELS_TILE_H
#define POLDER_KERNELS_TILE_H

#include <stddef.h>
#include <stdint.h>

#include "base/arith.h"

enum dtype { DTYPE_BF16 = 0, DTYPE_F32 = 1 };

enum { TILE_BYTES = 8192, TILE_ROWS = 64, TILE_ROW_BYTES = 128, CORE_ROWS = 8, CORE_BYTES = 128 };

static inline size_t dtype_bytes(enum dtype dtype)
{
    return dtype == DTYPE_BF16 ? 2 : 4;
}

static inline size_t tile_cols(enum dtype dtype)
{
    return TILE_ROW_BYTES / dtype_bytes(dtype);
}

static inline size_t tile_count(enum dtype dtype, size_t rows, size_t cols)
{
    return div_up(rows, TILE_ROWS) * div_up(cols, tile_cols(dtype));
}

// Byte offset of element (row, col) in a contiguous tile-major matrix of `cols` columns.
static inline size_t tile_offset(enum dtype dtype, size_t cols, size_t row, size_t col)
{
    size_t per = tile_cols(dtype), element = dtype_bytes(dtype), in_core = 16 / element;
    size_t tile = row / TILE_ROWS * div_up(cols, per) + col / per;
    size_t core = row % TILE_ROWS / CORE_ROWS * (TILE_ROW_BYTES / 16) + col % per / in_core;
    return tile * TILE_BYTES + core * CORE_BYTES + row % CORE_ROWS * 16 + col % in_core * element;
}

// Where a row of a gate (half 0) or up (half 1) matrix stands in the interleaved matrix.
static inline size_t tile_interleaved_row(size_t row, size_t half)
{
    return row / 8 * 16 + half * 8 + row % 8;
}

// Rows of the interleaved gate+up matrix of an MLP with `intermediate` units (padded to blocks of
// 8).
static inline size_t tile_interleaved_rows(size_t intermediate)
{
    return round_up(intermediate, 8) * 2;
}

// Packs rows [0, rows) of a row-major source matrix [rows][cols] into tiles at `out`, which holds
// tile_count(...) * TILE_BYTES bytes, zeroed by the caller. half < 0: plain; else row r of the
// source goes to tile_interleaved_row(r, half).
void tile_pack(enum dtype dtype, const void *source, size_t rows, size_t cols, int half, void *out);

// bf16 with round to nearest even; NaN stays NaN.
uint16_t bf16_from_f32(float value);

static inline float bf16_to_f32(uint16_t value)
{
    union {
        uint32_t bits;
        float number;
    } u = {.bits = (uint32_t)value << 16};
    return u.number;
}

#endif
