// SPDX-License-Identifier: Apache-2.0
// The bench of the KV tests: the real pool and KV cache on a fake link and clock. KV is faked: each
// position holds a value made of all tokens up to it, so that a wrong page, block or order shows.
#ifndef POLDER_TESTS_TEST_KV_RIG_H
#define POLDER_TESTS_TEST_KV_RIG_H

#include <stdbool.h>
#include <stdint.h>

#include "fakes.h"
#include "runtime/kv/kv.h"
#include "unified_pool/pool.h"

enum { PAGE = 32 << 10, BLOCKS = 64, TOKENS = 512 };

struct bench {
    uint64_t now;
    struct fake_link link;
    struct copy_queues *copies;
    uint8_t *device, *host;
    struct pool *pool;
    struct kv *kv;
    struct kv_shape shape;
    struct digest root;
    uint32_t copied_pages;
};

struct sizes {
    uint32_t layers, device, host, objects;
};

struct bench *bench_open_sized(struct sizes sizes);
struct bench *bench_open(uint32_t device, uint32_t host);
void bench_check(struct bench *bench);
void bench_close(struct bench *bench);
void make_tokens(int32_t *tokens, uint32_t count, uint32_t text);
uint64_t value_at(const int32_t *tokens, uint32_t position);
kv_sequence open_as(struct bench *bench, uint32_t owner, const struct digest *root);
kv_sequence open_sequence(struct bench *bench);
void pages_of(struct bench *bench, kv_sequence sequence, uint32_t *pages);
enum status try_reserve(struct bench *bench, kv_sequence sequence, uint32_t tokens);
void compute(struct bench *bench, kv_sequence sequence, const int32_t *tokens, uint32_t from,
             uint32_t count);
void assert_holds(struct bench *bench, kv_sequence sequence, const int32_t *tokens, uint32_t count);
enum kv_state wait_while(struct bench *bench, kv_sequence sequence, enum kv_state state);
void drain(struct bench *bench);
struct kv_stats stats_of(struct bench *bench);
uint32_t free_pages(struct bench *bench);
uint32_t match(struct bench *bench, kv_sequence sequence, const int32_t *tokens, uint32_t count);

#endif
