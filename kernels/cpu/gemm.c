// SPDX-License-Identifier: Apache-2.0
// y[row][j] = sum_k x[row][k] * W[j][k], W tile-major and contiguous. Task: one row block of 64
// weight rows (or a half or a quarter of it, when there are few) x at most TOKENS_CHUNK tokens.
// Bound by memory up to about 8 tokens (every weight is read once), by the dot unit above. Bits of
// one result: 4 lanes over ascending columns (micro.h), whatever the split.
#include <string.h>

#include "kernels/cpu/cpu.h"

static void gemm_task(struct cpu_stream *s, struct slot *slot, struct command *c, uint32_t task)
{
    const struct gemm_args *a = &c->a.gemm;
    enum dtype dtype = cpu__device(s)->dtype;
    size_t part = task % c->parts * (TILE_ROWS / c->parts), block = task / c->parts / c->split;
    size_t chunk = cpu__chunk_size(a->rows, c->split);
    size_t row = task / c->parts % c->split * chunk, col = block * TILE_ROWS + part;
    if (row >= a->rows || col >= a->n)
        return;
    size_t tokens = min_size(chunk, a->rows - row), stride = cpu__act_row_bytes(dtype, a->k);
    size_t cols = min_size(TILE_ROWS / c->parts, a->n - col);
    size_t k_tiles = div_up(a->k, tile_cols(dtype));
    const uint8_t *tile = (const uint8_t *)a->weight + block * k_tiles * TILE_BYTES;
    for (size_t i = 0; i < 2 * k_tiles; i++)
        slot->tiles[i] = tile + i * TILE_BYTES;
    for (size_t t = 0; t < tokens; t++)
        slot->x[t] = (const uint8_t *)a->x + (row + t) * stride;
    cpu__kernel(s)->strip(&(struct strip){.tiles = slot->tiles,
                                          .k_tiles = k_tiles,
                                          .x = slot->x,
                                          .tokens = (uint32_t)tokens,
                                          .first = (uint32_t)part,
                                          .rows = (uint32_t)cols,
                                          .out = slot->out});
    for (size_t t = 0; t < tokens; t++) {
        float *y = a->y + (row + t) * a->y_stride + col;
        const float *out = slot->out + t * TILE_ROWS + part;
        if (a->add)
            for (size_t j = 0; j < cols; j++)
                y[j] += out[j];
        else
            memcpy(y, out, cols * sizeof(float));
    }
}

static const struct operation gemm_operation = {.task = gemm_task};

void cpu__gemm(struct stream *s, const struct gemm_args *a)
{
    enum dtype dtype = ((struct cpu_device *)s->device)->dtype;
    CHECK(a->k && div_up(a->k, tile_cols(dtype)) <= TILES_MAX && a->y_stride >= a->n);
    if (!a->rows || !a->n)
        return;
    uint32_t chunks = (uint32_t)div_up(a->rows, TOKENS_CHUNK);
    uint32_t blocks = (uint32_t)div_up(a->n, TILE_ROWS);
    uint32_t parts = cpu__parts(s->device, blocks * chunks, div_up(a->k, tile_cols(dtype)));
    struct command *c = cpu__record(s, &gemm_operation, blocks * chunks * parts);
    c->a.gemm = *a;
    c->split = chunks;
    c->parts = parts;
    size_t x_bytes = cpu__act_row_bytes(dtype, a->k);
    cpu__reads(c, a->x, x_bytes, x_bytes, a->rows);
    cpu__writes(c, a->y, a->n * sizeof(float), a->y_stride * sizeof(float), a->rows);
    cpu__record_end(s, c);
}
