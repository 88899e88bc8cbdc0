// SPDX-License-Identifier: Apache-2.0
#include "fakes.h"

#include <string.h>

#include "base/check.h"

static enum status move_part(const struct copy_chunk *chunk, size_t begin, size_t end)
{
    if (chunk->resource == COPY_READ)
        return reader_read(chunk->file, chunk->offset + begin, (uint8_t *)chunk->to + begin,
                           end - begin);
    memcpy((uint8_t *)chunk->to + begin, (const uint8_t *)chunk->from + begin, end - begin);
    return STATUS_OK;
}

static void fake_start(struct link *link, const struct copy_chunk *chunk)
{
    struct fake_link *fake = (struct fake_link *)link;
    CHECK(!fake->flying[chunk->resource].is_busy);
    fake->log[fake->chunks++ % FAKE_LOG] = *chunk;
    uint64_t spread = fake->delay_max_us - fake->delay_min_us;
    uint64_t delay = fake->delay_min_us + rng_below(&fake->rng, spread + 1);
    fake->flying[chunk->resource].chunk = *chunk;
    fake->flying[chunk->resource].ready_us = *fake->now_us + delay;
    fake->flying[chunk->resource].is_busy = true;
    bool lost = fake->lose_at && fake->chunks >= fake->lose_at && chunk->resource != COPY_READ;
    bool fail = lost || fake->chunks == fake->fail_at ||
                rng_below(&fake->rng, 1000) < fake->fail_per_mille ||
                move_part(chunk, 0, chunk->bytes / 16 * 8) != STATUS_OK;
    fake->flying[chunk->resource].will_fail = fail;
    fake->flying[chunk->resource].is_lost = lost;
}

static bool fake_poll(struct link *link, enum copy_resource resource, enum status *status)
{
    struct fake_link *fake = (struct fake_link *)link;
    *status = STATUS_OK;
    if (!fake->flying[resource].is_busy)
        return true;
    if (fake->held[resource] || *fake->now_us < fake->flying[resource].ready_us)
        return false;
    const struct copy_chunk *chunk = &fake->flying[resource].chunk;
    fake->flying[resource].is_busy = false;
    if (fake->flying[resource].will_fail ||
        move_part(chunk, chunk->bytes / 16 * 8, chunk->bytes) != STATUS_OK) {
        *status = fake->flying[resource].is_lost ? STATUS_DEVICE : STATUS_IO;
        fake->is_lost = fake->is_lost || fake->flying[resource].is_lost;
        fake->failed++;
    }
    return true;
}

static void fake_destroy(struct link *link)
{
    (void)link;
}

void fake_link_init(struct fake_link *fake, uint64_t seed, const uint64_t *now_us)
{
    *fake = (struct fake_link){
        .link = {.start = fake_start, .poll = fake_poll, .destroy = fake_destroy},
        .now_us = now_us,
        .rng = {.seed = seed}};
}

void fake_content(uint64_t seed, uint64_t offset, void *out, size_t bytes)
{
    CHECK(offset % 8 == 0 && bytes % 8 == 0);
    for (size_t i = 0; i < bytes; i += 8) {
        uint64_t word = rng_mix(seed + offset + i);
        memcpy((uint8_t *)out + i, &word, 8);
    }
}

bool fake_content_is(uint64_t seed, uint64_t offset, const void *data, size_t bytes)
{
    for (size_t i = 0; i < bytes; i += 8) {
        uint64_t word = rng_mix(seed + offset + i);
        if (memcmp((const uint8_t *)data + i, &word, 8) != 0)
            return false;
    }
    return true;
}

static enum status fake_read_at(struct reader *reader, uint64_t offset, void *out, size_t bytes)
{
    struct fake_reader *fake = (struct fake_reader *)reader;
    if (++fake->reads == fake->fail_at)
        return STATUS_IO;
    fake_content(fake->seed, offset, out, bytes);
    return STATUS_OK;
}

static void fake_close(struct reader *reader)
{
    (void)reader;
}

void fake_reader_init(struct fake_reader *fake, uint64_t seed, uint64_t size)
{
    *fake = (struct fake_reader){
        .reader = {.read_at = fake_read_at, .close = fake_close, .size = size}, .seed = seed};
}

static size_t kv_place(size_t page_bytes, const struct kv_shape *shape, const uint32_t *pages,
                       uint32_t position, uint32_t layer)
{
    uint32_t block = position / shape->block_tokens, row = position % shape->block_tokens;
    uint32_t page = pages[block * shape->pages_per_block + layer / shape->layers_per_page];
    size_t row_bytes = shape->part_bytes / (2 * shape->kv_heads * shape->block_tokens);
    return page * page_bytes + layer % shape->layers_per_page * shape->part_bytes + row * row_bytes;
}

void fake_kv_write(uint8_t *arena, size_t page_bytes, const struct kv_shape *shape,
                   const uint32_t *pages, uint32_t position, uint64_t value)
{
    for (uint32_t layer = 0; layer < shape->layers; layer++) {
        uint64_t word = value + layer;
        memcpy(arena + kv_place(page_bytes, shape, pages, position, layer), &word, 8);
    }
}

bool fake_kv_is(const uint8_t *arena, size_t page_bytes, const struct kv_shape *shape,
                const uint32_t *pages, uint32_t position, uint64_t value)
{
    for (uint32_t layer = 0; layer < shape->layers; layer++) {
        uint64_t word;
        memcpy(&word, arena + kv_place(page_bytes, shape, pages, position, layer), 8);
        if (word != value + layer)
            return false;
    }
    return true;
}
