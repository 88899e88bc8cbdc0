// SPDX-License-Identifier: Apache-2.0
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <setjmp.h>
#include <cmocka.h>

#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include "base/arith.h"
#include "base/clock.h"
#include "base/hash.h"
#include "base/reader.h"
#include "base/ring.h"
#include "base/rng.h"
#include "base/sort.h"

static void test_ring_keeps_records_in_order(void **state)
{
    (void)state;
    struct ring *ring;
    assert_int_equal(ring_create(5000, &ring), STATUS_OK);
    struct rng rng = {.seed = 7};
    uint8_t bytes[700];
    uint32_t sent = 0, seen = 0;
    for (int round = 0; round < 200000; round++) {
        if (rng_below(&rng, 2)) {
            size_t n = 4 + rng_below(&rng, 600);
            memset(bytes, (int)(sent & 0xff), n);
            memcpy(bytes, &sent, 4);
            size_t room = ring_room(ring);
            enum status status = ring_push(ring, bytes, n);
            if (n <= room / 8 * 8)
                assert_int_equal(status, STATUS_OK);
            sent += status == STATUS_OK;
        } else {
            const void *record;
            size_t n;
            if (!ring_peek(ring, &record, &n))
                continue;
            uint32_t number;
            memcpy(&number, record, 4);
            assert_int_equal(number, seen);
            assert_int_equal(((const uint8_t *)record)[n - 1],
                             n > 4 ? (seen & 0xff) : ((const uint8_t *)&seen)[3]);
            seen++;
            ring_pop(ring);
        }
    }
    assert_true(seen > 1000);
    assert_int_equal(ring_push(ring, bytes, 1 << 20), STATUS_INVALID);
    ring_destroy(ring);
}

static void *produce(void *argument)
{
    struct ring *ring = argument;
    for (uint64_t i = 0; i < 300000;) {
        uint64_t record[3] = {i, i * 3, i * 7};
        i += ring_push(ring, record, 8 * (1 + i % 3)) == STATUS_OK;
    }
    return NULL;
}

static void test_ring_between_two_threads(void **state)
{
    (void)state;
    struct ring *ring;
    assert_int_equal(ring_create(4096, &ring), STATUS_OK);
    pthread_t thread;
    assert_int_equal(pthread_create(&thread, NULL, produce, ring), 0);
    for (uint64_t i = 0; i < 300000;) {
        const void *record;
        size_t n;
        if (!ring_peek(ring, &record, &n))
            continue;
        uint64_t got[3] = {0};
        memcpy(got, record, n);
        assert_int_equal(n, 8 * (1 + i % 3));
        assert_int_equal(got[0], i);
        assert_true(n < 16 || got[1] == i * 3);
        ring_pop(ring);
        i++;
    }
    (void)pthread_join(thread, NULL);
    ring_destroy(ring);
}

static int compare_u32(const void *a, const void *b)
{
    uint32_t x = *(const uint32_t *)a, y = *(const uint32_t *)b;
    return x < y ? -1 : x > y;
}

static void test_sort_agrees_with_qsort(void **state)
{
    (void)state;
    struct rng rng = {.seed = 3};
    for (size_t n = 0; n < 200; n++) {
        uint32_t a[200], b[200];
        for (size_t i = 0; i < n; i++)
            a[i] = b[i] = (uint32_t)rng_below(&rng, 50);
        sort_in_place(a, n, sizeof *a, compare_u32);
        qsort(b, n, sizeof *b, compare_u32);
        assert_memory_equal(a, b, n * sizeof *a);
    }
}

static void test_reader_stays_in_its_directory(void **state)
{
    (void)state;
    char directory[] = "/tmp/polder-base-XXXXXX";
    assert_non_null(mkdtemp(directory));
    char path[256];
    (void)snprintf(path, sizeof path, "%s/inside", directory);
    FILE *file = fopen(path, "w");
    assert_non_null(file);
    (void)fputs("hello", file);
    (void)fclose(file);
    char link[256];
    (void)snprintf(link, sizeof link, "%s/link", directory);
    assert_int_equal(symlink("/etc/passwd", link), 0);
    struct reader *reader;
    struct fault fault;
    assert_int_equal(reader_open_in(directory, "inside", &reader, &fault), STATUS_OK);
    char text[6] = {0};
    assert_int_equal(reader_read(reader, 0, text, 5), STATUS_OK);
    assert_string_equal(text, "hello");
    assert_int_equal(reader_read(reader, 1, text, 5), STATUS_IO);
    assert_int_equal(reader_read(reader, UINT64_MAX, text, 5), STATUS_IO);
    reader_close(reader);
    const char *bad[] = {"../inside", "/etc/passwd", "a/../../etc/passwd", "", "link",
                         "..",        "a//b"};
    for (size_t i = 0; i < sizeof bad / sizeof *bad; i++)
        assert_int_not_equal(reader_open_in(directory, bad[i], &reader, &fault), STATUS_OK);
    (void)unlink(link);
    (void)unlink(path);
    (void)rmdir(directory);
}

static void test_hash_is_keyed_and_streams(void **state)
{
    (void)state;
    struct digest key = {.bytes = {1}}, plain = hash_bytes(NULL, "abc", 3);
    struct digest keyed = hash_bytes(&key, "abc", 3);
    assert_false(digest_equal(&plain, &keyed));
    struct hash_stream stream;
    hash_begin(&stream, &key);
    hash_update(&stream, "a", 1);
    hash_update(&stream, "bc", 2);
    struct digest streamed = hash_end(&stream);
    assert_true(digest_equal(&keyed, &streamed));
    char hex[2 * DIGEST_BYTES + 1];
    struct digest back;
    digest_hex(&plain, hex);
    // BLAKE2b-256("abc"), from the reference implementation
    assert_string_equal(hex, "bddd813c634239723171ef3fee98579b94964e3bb1cb3e427262c8c068d52319");
    assert_true(digest_from_hex(hex, &back) && digest_equal(&plain, &back));
    assert_false(digest_from_hex("zz", &back));
}

static void test_rng_depends_on_seed_stream_and_counter(void **state)
{
    (void)state;
    double sum = 0;
    for (uint64_t i = 0; i < 100000; i++) {
        float u = rng_uniform(1, 2, i);
        assert_true(u >= 0.0f && u < 1.0f);
        sum += u;
    }
    assert_true(sum > 49500 && sum < 50500);
    assert_true(rng_at(1, 2, 3) == rng_at(1, 2, 3));
    assert_true(rng_at(1, 2, 3) != rng_at(1, 3, 2) && rng_at(1, 2, 3) != rng_at(2, 2, 3));
}

// What hash_pieces says is what its definition says, whatever goes at once.
static void test_hash_pieces_do_not_depend_on_the_width(void **state)
{
    enum { BYTES = 21 * HASH_PIECE + 77 };
    (void)state;
    uint8_t *bytes = malloc(BYTES);
    struct rng rng = {.seed = 5};
    assert_non_null(bytes);
    for (size_t i = 0; i < BYTES; i++)
        bytes[i] = (uint8_t)rng_below(&rng, 256);
    const size_t sizes[] = {0,    1,     127,   128,   4095,  4096,      4097,
                            8192, 12288, 16384, 20480, 28672, BYTES - 1, BYTES};
    for (size_t s = 0; s < sizeof sizes / sizeof *sizes; s++) {
        struct hash_stream want;
        hash_begin(&want, NULL);
        for (size_t at = 0; at < sizes[s]; at += HASH_PIECE) {
            size_t n = sizes[s] - at < HASH_PIECE ? sizes[s] - at : HASH_PIECE;
            struct digest piece = hash_bytes(NULL, bytes + at, n);
            hash_update(&want, &piece, sizeof piece);
        }
        struct digest wanted = hash_end(&want);
        for (int width = HASH_ONE; width <= (int)hash_width_here(); width++) {
            struct hash_stream stream;
            hash_begin(&stream, NULL);
            hash_pieces_as(&stream, bytes, sizes[s], (enum hash_width)width);
            struct digest got = hash_end(&stream);
            assert_true(digest_equal(&got, &wanted));
        }
    }
    free(bytes);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_ring_keeps_records_in_order),
        cmocka_unit_test(test_ring_between_two_threads),
        cmocka_unit_test(test_sort_agrees_with_qsort),
        cmocka_unit_test(test_reader_stays_in_its_directory),
        cmocka_unit_test(test_hash_is_keyed_and_streams),
        cmocka_unit_test(test_rng_depends_on_seed_stream_and_counter),
        cmocka_unit_test(test_hash_pieces_do_not_depend_on_the_width),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
