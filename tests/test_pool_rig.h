// SPDX-License-Identifier: Apache-2.0
// The bench of the pool tests: a pool on a fake link, clock and file, and three synthetic kinds
// that offer their objects in the order of given prices.
#ifndef POLDER_TESTS_TEST_POOL_RIG_H
#define POLDER_TESTS_TEST_POOL_RIG_H

#include <stdbool.h>
#include <stdint.h>

#include "fakes.h"
#include "unified_pool/pool.h"

enum { PAGE = 32 << 10, OFFERS = 512, OWNERS = 4 };

// A kind that offers its objects in the order of their prices.
struct kind {
    struct bench *bench;
    struct {
        pool_object object;
        float price;
        uint32_t id;
    } list[OFFERS];
    uint32_t count;
    uint32_t gone[OFFERS], gone_count; // ids in the order they left
    bool destroys;
};

struct bench {
    uint64_t now;
    struct fake_link link;
    struct copy_queues *copies;
    struct fake_reader file;
    uint8_t *device, *host;
    struct pool *pool;
    struct kind kinds[PAGE_KINDS];
};

struct sizes {
    uint32_t device, host, objects, slots, copies;
};

void kind_offer(struct bench *bench, enum page_kind which, pool_object object, float price,
                uint32_t id);
// On the fake link and clock of the bench when link is NULL.
struct bench *bench_open_on(struct sizes sizes, struct link *link, struct clock clock);
struct bench *bench_open_sized(struct sizes sizes);
struct bench *bench_open(uint32_t device, uint32_t host);
void bench_close(struct bench *bench);
pool_object make(struct bench *bench, enum page_kind kind, uint32_t owner, uint32_t slots);
pool_object make_filed(struct bench *bench, enum page_kind kind, uint32_t owner, uint32_t slots,
                       uint64_t first_page);
pool_object make_reserved(struct bench *bench, enum page_kind kind, uint32_t owner, uint32_t slots);
uint8_t *slot_memory(struct bench *bench, pool_object object, uint32_t slot);
void assert_file_content(struct bench *bench, pool_object object);
void settle(struct bench *bench);
struct pool_stats stats_of(struct bench *bench);
bool is_zero(const uint8_t *memory);

#endif
