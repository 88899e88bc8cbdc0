// SPDX-License-Identifier: Apache-2.0
// Fakes for tests and simulators: a link on a fake clock that delays, fails and logs, a file whose
// content is a formula, and KV that can be told by its token ids. The structs live in the test;
// nothing here allocates.
#ifndef POLDER_TESTS_FAKES_H
#define POLDER_TESTS_FAKES_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "base/reader.h"
#include "base/rng.h"
#include "kernels/attention.h"
#include "unified_pool/copy.h"

enum { FAKE_LOG = 256 };

// Copies the first half of a chunk when it starts and the second when it is done, so that a page
// that is given away in between shows. A failed chunk writes half and answers IO; or DEVICE, when
// the device is lost.
struct fake_link {
    struct link link;
    const uint64_t *now_us;
    struct rng rng;
    uint64_t delay_min_us, delay_max_us;
    uint64_t fail_at;          // the n-th chunk started fails, from 1; 0: none
    uint64_t lose_at;          // from the n-th on, those that are not reads find no device; 0: none
    bool is_lost;              // one has
    uint32_t fail_per_mille;   // and this share of all
    bool held[COPY_RESOURCES]; // chunks of it do not end before this is false again
    uint64_t chunks, failed;   // started; failed
    struct {
        struct copy_chunk chunk;
        uint64_t ready_us;
        bool is_busy, will_fail, is_lost;
    } flying[COPY_RESOURCES];
    struct copy_chunk log[FAKE_LOG]; // of started chunks: chunk n (from 0) at n % FAKE_LOG
};

// `now_us` is the fake clock's variable. Delays are 0 until set.
void fake_link_init(struct fake_link *fake, uint64_t seed, const uint64_t *now_us);

// A file of `size` bytes: the 8 bytes at offset o are rng_mix(seed + o), o a multiple of 8.
struct fake_reader {
    struct reader reader;
    uint64_t seed, fail_at;
    _Atomic uint64_t reads; // several threads may read
};
void fake_reader_init(struct fake_reader *fake, uint64_t seed, uint64_t size);

// offset and bytes are multiples of 8.
void fake_content(uint64_t seed, uint64_t offset, void *out, size_t bytes);
bool fake_content_is(uint64_t seed, uint64_t offset, const void *data, size_t bytes);

// Stands for the KV of one position: 8 bytes made of `value` in its K row of every layer. `pages`
// are the page numbers of the sequence's blocks, as kv_fill_pages gives them.
void fake_kv_write(uint8_t *arena, size_t page_bytes, const struct kv_shape *shape,
                   const uint32_t *pages, uint32_t position, uint64_t value);
bool fake_kv_is(const uint8_t *arena, size_t page_bytes, const struct kv_shape *shape,
                const uint32_t *pages, uint32_t position, uint64_t value);

#endif
