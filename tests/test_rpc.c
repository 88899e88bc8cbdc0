// SPDX-License-Identifier: Apache-2.0
// runtime/server/scan.h and params.h: limits to the byte, every prefix, agreement with msgpack-c,
// linear work.
#include <setjmp.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <cmocka.h>
#include <msgpack.h>

#include "base/check.h"
#include "base/rng.h"
#include "runtime/server/params.h"
#include "runtime/server/scan.h"

static const struct scan_limits wide = {
    .frame_bytes = 1 << 20, .string_bytes = 1 << 20, .items = 1 << 20};

static enum scan_result scan_all(const struct scan_limits *limits, const void *bytes, size_t count,
                                 struct scanner *scanner)
{
    scan_begin(scanner, limits);
    return scan_run(scanner, bytes, count);
}

#define FRAME(text) (text), sizeof(text) - 1

static void test_rpc_scan_table(void **state)
{
    (void)state;
    static const struct {
        const char *bytes;
        size_t count;
        enum scan_result result;
        size_t at;
    } rows[] = {
        {FRAME("\x94\x00\x01\xa4ping\x90"), SCAN_COMPLETE, 9},
        {FRAME("\x94\x00\x01\xa4ping\x90\x94\x00"), SCAN_COMPLETE, 9},
        {FRAME("\x93\x02\xa1x\x90"), SCAN_COMPLETE, 5},
        {FRAME("\x94\x01\x01\xc0\xc0"), SCAN_COMPLETE, 5},
        {FRAME("\xdc\x00\x04\xcc\x00\xcd\x00\x01\xd9\x01x\xdc\x00\x00"), SCAN_COMPLETE, 14},
        {FRAME("\xdd\x00\x00\x00\x03\xcf\0\0\0\0\0\0\0\x02\xc0\xc0"), SCAN_COMPLETE, 16},
        {FRAME("\x94\x00\x01\xa1x\x91\x82\xa1"
               "a\xca\0\0\0\0\xa1"
               "b\xcb\0\0\0\0\0\0\0\0"),
         SCAN_COMPLETE, 25},
        {FRAME("\x94\x00\x01\xc4\x02\xff\xff\x90"), SCAN_COMPLETE, 8},
        {FRAME("\x94\x00\xd3\xff\xff\xff\xff\xff\xff\xff\xff\xe0\xc2"), SCAN_COMPLETE, 13},
        {FRAME(""), SCAN_MORE, 0},
        {FRAME("\x94"), SCAN_MORE, 1},
        {FRAME("\xdd\x00\x00\x00"), SCAN_MORE, 0},
        {FRAME("\x94\x00\x01\xa4pin"), SCAN_MORE, 3},
        {FRAME("\x90"), SCAN_BAD, 0},
        {FRAME("\x92"), SCAN_BAD, 0},
        {FRAME("\x95"), SCAN_BAD, 0},
        {FRAME("\x83"), SCAN_BAD, 0},
        {FRAME("\xc0"), SCAN_BAD, 0},
        {FRAME("\xdd\xff\xff\xff\xff"), SCAN_BAD, 0},
        {FRAME("\x94\x03"), SCAN_BAD, 1},
        {FRAME("\x94\x02"), SCAN_BAD, 1},
        {FRAME("\x93\x00"), SCAN_BAD, 1},
        {FRAME("\x94\xd0\x00"), SCAN_BAD, 1},
        {FRAME("\x94\x00\x01\xc1"), SCAN_BAD, 3},
        {FRAME("\x94\x00\x01\xc7"), SCAN_BAD, 3},
        {FRAME("\x94\x00\x01\xd4"), SCAN_BAD, 3},
        {FRAME("\x94\x00\x01\xdd\xff\xff\xff\xff"), SCAN_BAD, 3},
        {FRAME("\x94\x00\x01\xdf\xff\xff\xff\xff"), SCAN_BAD, 3},
        {FRAME("\x94\x00\x01\xdb\xff\xff\xff\xff"), SCAN_BAD, 3},
        {FRAME("\x94\x00\x01\x81\x01"), SCAN_BAD, 4},
        {FRAME("\x94\x00\x01\x82\xa1"
               "a\xc0\xa1"
               "a"),
         SCAN_BAD, 7},
        {FRAME("\x94\x00\x01\x82\xa1"
               "a\x81\xa1"
               "a\xc0\xa1"
               "b\xc0\xc0"),
         SCAN_COMPLETE, 14},
        {FRAME("\x94\x00\x01\xa1\xff"), SCAN_BAD, 3},
    };
    struct scanner scanner;
    for (size_t i = 0; i < ARRAY_COUNT(rows); i++) {
        enum scan_result result = scan_all(&wide, rows[i].bytes, rows[i].count, &scanner);
        if (result != rows[i].result || scanner.at != rows[i].at)
            fail_msg("row %zu: result %d at %zu", i, (int)result, scanner.at);
        assert_int_equal(result == SCAN_BAD, scanner.reason != NULL);
    }
}

static void test_rpc_utf8(void **state)
{
    (void)state;
    static const struct {
        const char *text;
        bool valid;
    } rows[] = {
        {"", true},
        {"abc", true},
        {"\xc2\x80", true},
        {"\xdf\xbf", true},
        {"\xe0\xa0\x80", true},
        {"\xed\x9f\xbf", true},
        {"\xee\x80\x80", true},
        {"\xf0\x90\x80\x80", true},
        {"\xf4\x8f\xbf\xbf", true},
        {"\x80", false},
        {"\xc0\x80", false},
        {"\xc1\xbf", false},
        {"\xc2", false},
        {"\xc2\x41", false},
        {"\xe0\x9f\xbf", false},
        {"\xed\xa0\x80", false},
        {"\xf0\x8f\xbf\xbf", false},
        {"\xf4\x90\x80\x80", false},
        {"\xf5\x80\x80\x80", false},
        {"\xff", false},
        {"\xe2\x82", false},
        {"a\xe2\x82"
         "b",
         false},
    };
    for (size_t i = 0; i < ARRAY_COUNT(rows); i++)
        assert_int_equal(utf8_is_valid((const uint8_t *)rows[i].text, strlen(rows[i].text)),
                         rows[i].valid);
}

static void test_rpc_utf8_lossy_as_unicode_says(void **state)
{
    (void)state;
#define X "\xef\xbf\xbd"
    static const struct {
        const char *text, *lossy;
    } rows[] = {
        // Unicode 15, tables 3-8 to 3-11
        {"\xc0\xaf\xe0\x80\xbf\xf0\x81\x82\x41", X X X X X X X X "A"},
        {"\xed\xa0\x80\xed\xbf\xbf\xed\xaf\x41", X X X X X X X X "A"},
        {"\xf4\x91\x92\x93\xff\x41\x80\xbf\x42", X X X X X "A" X X "B"},
        {"\xe1\x80\xe2\xf0\x91\x92\xf1\xbf\x41", X X X X "A"},
        {"zw\xc3\xb6lf", "zw\xc3\xb6lf"},
        {"", ""},
    };
#undef X
    for (size_t i = 0; i < ARRAY_COUNT(rows); i++) {
        char out[64];
        size_t length = utf8_lossy((const uint8_t *)rows[i].text, strlen(rows[i].text), out);
        assert_int_equal(length, strlen(rows[i].lossy));
        assert_memory_equal(out, rows[i].lossy, length);
    }
}

static size_t packed_list(msgpack_sbuffer *out, size_t items)
{
    msgpack_packer packer;
    msgpack_sbuffer_clear(out);
    msgpack_packer_init(&packer, out, msgpack_sbuffer_write);
    msgpack_pack_array(&packer, 3);
    msgpack_pack_int(&packer, 2);
    msgpack_pack_nil(&packer);
    msgpack_pack_array(&packer, items);
    for (size_t i = 0; i < items; i++)
        msgpack_pack_nil(&packer);
    return out->size;
}

static void test_rpc_limits_to_the_byte(void **state)
{
    (void)state;
    msgpack_sbuffer frame;
    struct scanner scanner;
    msgpack_sbuffer_init(&frame);
    size_t bytes = packed_list(&frame, 100);
    struct scan_limits limits = {.frame_bytes = bytes, .string_bytes = 10, .items = 104};
    assert_int_equal(scan_all(&limits, frame.data, bytes, &scanner), SCAN_COMPLETE);
    limits.frame_bytes--;
    assert_int_equal(scan_all(&limits, frame.data, bytes, &scanner), SCAN_BAD);
    limits.frame_bytes++;
    limits.items--;
    assert_int_equal(scan_all(&limits, frame.data, bytes, &scanner), SCAN_BAD);
    limits.items++;
    assert_int_equal(scan_all(&limits,
                              FRAME("\x93\x02\xaa"
                                    "0123456789\xc0"),
                              &scanner),
                     SCAN_COMPLETE);
    assert_int_equal(scan_all(&limits,
                              FRAME("\x93\x02\xab"
                                    "0123456789a\xc0"),
                              &scanner),
                     SCAN_BAD);
    msgpack_sbuffer_destroy(&frame);
}

static void test_rpc_map_keys(void **state)
{
    (void)state;
    msgpack_sbuffer frame;
    msgpack_packer packer;
    struct scanner scanner;
    msgpack_sbuffer_init(&frame);
    for (int keys = SCAN_KEYS_MAX; keys <= SCAN_KEYS_MAX + 1; keys++) {
        msgpack_sbuffer_clear(&frame);
        msgpack_packer_init(&packer, &frame, msgpack_sbuffer_write);
        msgpack_pack_array(&packer, 3);
        msgpack_pack_int(&packer, 2);
        for (int map = 0; map < 2; map++) { // the keys of a closed map make room again
            msgpack_pack_map(&packer, (size_t)keys);
            for (int i = 0; i < keys; i++) {
                char key[16];
                int length = snprintf(key, sizeof key, "key%d", i);
                msgpack_pack_str_with_body(&packer, key, (size_t)length);
                msgpack_pack_nil(&packer);
            }
        }
        assert_int_equal(scan_all(&wide, frame.data, frame.size, &scanner),
                         keys == SCAN_KEYS_MAX ? SCAN_COMPLETE : SCAN_BAD);
    }
    msgpack_sbuffer_destroy(&frame);
}

// A random value that the protocol allows.
static void pack_random(msgpack_packer *packer, struct rng *rng, int depth)
{
    static const char *const texts[] = {"", "a", "prompt", "zw\xc3\xb6lf", "\xf0\x9f\x8c\x8d"};
    const char *text = texts[rng_below(rng, ARRAY_COUNT(texts))];
    size_t count = rng_below(rng, 5);
    switch (rng_below(rng, depth > 4 ? 8 : 10)) {
    case 0:
        msgpack_pack_nil(packer);
        break;
    case 1:
        msgpack_pack_true(packer);
        break;
    case 2:
        msgpack_pack_uint64(packer, rng_next(rng) >> rng_below(rng, 64));
        break;
    case 3:
        msgpack_pack_int64(packer, -(int64_t)(rng_next(rng) >> (1 + rng_below(rng, 63))));
        break;
    case 4:
        msgpack_pack_double(packer, (double)rng_next(rng));
        break;
    case 5:
        msgpack_pack_float(packer, (float)rng_next(rng));
        break;
    case 6:
        msgpack_pack_bin_with_body(packer, text, strlen(text));
        break;
    case 7:
        msgpack_pack_str_with_body(packer, text, strlen(text));
        break;
    case 8:
        msgpack_pack_array(packer, count);
        for (size_t i = 0; i < count; i++)
            pack_random(packer, rng, depth + 1);
        break;
    default:
        msgpack_pack_map(packer, count);
        for (size_t i = 0; i < count; i++) {
            char key[2] = {(char)('a' + i), 0};
            msgpack_pack_str_with_body(packer, key, 1);
            pack_random(packer, rng, depth + 1);
        }
    }
}

static void random_frame(msgpack_sbuffer *out, struct rng *rng)
{
    msgpack_packer packer;
    msgpack_sbuffer_clear(out);
    msgpack_packer_init(&packer, out, msgpack_sbuffer_write);
    uint64_t type = rng_below(rng, 3);
    msgpack_pack_array(&packer, type == 2 ? 3 : 4);
    msgpack_pack_uint64(&packer, type);
    for (int i = 0; i < (type == 2 ? 2 : 3); i++)
        pack_random(&packer, rng, 1);
}

// msgpack-c's opinion: does one object end exactly at `count`?
static bool decodes(const char *bytes, size_t count)
{
    msgpack_unpacked message;
    size_t used = 0;
    msgpack_unpacked_init(&message);
    bool good = msgpack_unpack_next(&message, bytes, count, &used) == MSGPACK_UNPACK_SUCCESS &&
                used == count;
    msgpack_unpacked_destroy(&message);
    return good;
}

static void test_rpc_agrees_with_msgpack_on_good_frames(void **state)
{
    (void)state;
    struct rng rng = {.seed = 1};
    msgpack_sbuffer frame;
    struct scanner whole, steps;
    msgpack_sbuffer_init(&frame);
    for (int round = 0; round < 20000; round++) {
        random_frame(&frame, &rng);
        assert_int_equal(scan_all(&wide, frame.data, frame.size, &whole), SCAN_COMPLETE);
        assert_int_equal(whole.at, frame.size);
        assert_true(decodes(frame.data, frame.size));
        scan_begin(&steps, &wide);
        for (size_t count = 0; count < frame.size; count += 1 + rng_below(&rng, 7))
            assert_int_equal(scan_run(&steps, (const uint8_t *)frame.data, count), SCAN_MORE);
        assert_int_equal(scan_run(&steps, (const uint8_t *)frame.data, frame.size), SCAN_COMPLETE);
        assert_int_equal(steps.at, frame.size);
        assert_int_equal(steps.items, whole.items);
    }
    msgpack_sbuffer_destroy(&frame);
}

// Broken frames: what the scanner lets through, msgpack-c must decode to the same length.
static void test_rpc_never_lets_through_what_msgpack_refuses(void **state)
{
    (void)state;
    struct rng rng = {.seed = 2};
    msgpack_sbuffer frame;
    struct scanner scanner;
    uint32_t complete = 0, bad = 0, more = 0;
    msgpack_sbuffer_init(&frame);
    for (int round = 0; round < 100000; round++) {
        random_frame(&frame, &rng);
        for (uint64_t flips = 1 + rng_below(&rng, 3); flips; flips--)
            frame.data[rng_below(&rng, frame.size)] = (char)rng_next(&rng);
        enum scan_result result = scan_all(&wide, frame.data, frame.size, &scanner);
        if (result == SCAN_COMPLETE)
            assert_true(decodes(frame.data, scanner.at));
        complete += result == SCAN_COMPLETE;
        bad += result == SCAN_BAD;
        more += result == SCAN_MORE;
    }
    print_message("broken frames: %u complete, %u bad, %u unfinished\n", complete, bad, more);
    assert_true(complete > 1000 && bad > 1000 && more > 1000);
    msgpack_sbuffer_destroy(&frame);
}

// A megabyte that comes byte by byte: with work quadratic in the bytes this would take hours.
static void test_rpc_work_is_linear(void **state)
{
    (void)state;
    msgpack_sbuffer frame;
    struct scanner scanner;
    struct scan_limits limits = {.frame_bytes = 2 << 20, .string_bytes = 2 << 20, .items = 2 << 20};
    msgpack_sbuffer_init(&frame);
    size_t bytes = packed_list(&frame, 1000000);
    scan_begin(&scanner, &limits);
    for (size_t count = 0; count < bytes; count++)
        assert_true(scan_run(&scanner, (const uint8_t *)frame.data, count) == SCAN_MORE);
    assert_int_equal(scan_run(&scanner, (const uint8_t *)frame.data, bytes), SCAN_COMPLETE);
    memset(frame.data, 'x', bytes);
    memcpy(frame.data, "\x93\x02\xdb\x00\x0f\x42\x40", 7);
    scan_begin(&scanner, &limits);
    for (size_t count = 0; count <= 1000007; count++)
        assert_true(scan_run(&scanner, (const uint8_t *)frame.data, count) == SCAN_MORE);
    assert_int_equal(scan_run(&scanner, (const uint8_t *)frame.data, 1000008), SCAN_COMPLETE);
    msgpack_sbuffer_destroy(&frame);
}

static void test_rpc_params_keep_what_is_missing(void **state)
{
    (void)state;
    msgpack_unpacked message;
    struct params params;
    msgpack_unpacked_init(&message);
    size_t at = 0;
    assert_int_equal(msgpack_unpack_next(&message,
                                         FRAME("\x91\x83\xa1"
                                               "a\x05\xa1"
                                               "b\xc0\xa1"
                                               "c\xff"),
                                         &at),
                     MSGPACK_UNPACK_SUCCESS);
    assert_true(params_open(&params, &message.data));
    uint64_t value = 77;
    assert_true(params_u64(&params, "missing", 0, 9, &value) && value == 77);
    assert_true(params_u64(&params, "b", 0, 9, &value) && value == 77);
    assert_true(params_u64(&params, "a", 0, 9, &value) && value == 5);
    assert_false(params_u64(&params, "a", 6, 9, &value));
    assert_string_equal(params.fault.text, "a must be an integer from 6 to 9.");
    assert_false(params_u64(&params, "c", 0, 9, &value));
    assert_true(value == 5);
    float number = 2;
    assert_true(params_float(&params, "c", -3, 1, &number) && number == -1);
    msgpack_unpacked_destroy(&message);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_rpc_scan_table),
        cmocka_unit_test(test_rpc_utf8),
        cmocka_unit_test(test_rpc_utf8_lossy_as_unicode_says),
        cmocka_unit_test(test_rpc_limits_to_the_byte),
        cmocka_unit_test(test_rpc_map_keys),
        cmocka_unit_test(test_rpc_agrees_with_msgpack_on_good_frames),
        cmocka_unit_test(test_rpc_never_lets_through_what_msgpack_refuses),
        cmocka_unit_test(test_rpc_work_is_linear),
        cmocka_unit_test(test_rpc_params_keep_what_is_missing),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
