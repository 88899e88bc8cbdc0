// SPDX-License-Identifier: Apache-2.0
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <setjmp.h>
#include <cmocka.h>

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "base/safetensors.h"

// A file in memory. Its bytes are an exact-size allocation, so that the address sanitizer sees
// every read past the end.
struct memory {
    struct reader reader;
    uint8_t *bytes;
};

static enum status memory_read(struct reader *reader, uint64_t offset, void *out, size_t bytes)
{
    memcpy(out, ((struct memory *)reader)->bytes + offset, bytes);
    return STATUS_OK;
}

static struct memory make(uint64_t claimed, const char *header, size_t header_bytes, size_t data)
{
    size_t size = 8 + header_bytes + data;
    struct memory memory = {.reader = {.read_at = memory_read, .size = size},
                            .bytes = malloc(size)};
    assert_non_null(memory.bytes);
    for (int i = 0; i < 8; i++)
        memory.bytes[i] = (uint8_t)(claimed >> 8 * i);
    memcpy(memory.bytes + 8, header, header_bytes);
    for (size_t i = 0; i < data; i++)
        memory.bytes[8 + header_bytes + i] = (uint8_t)i;
    return memory;
}

static enum status open_text(const char *header, size_t data, struct fault *fault)
{
    struct memory memory = make(strlen(header), header, strlen(header), data);
    struct safetensors *file = NULL;
    enum status status = safetensors_open(&memory.reader, "test.safetensors", &file, fault);
    safetensors_close(file);
    free(memory.bytes);
    return status;
}

static void test_safetensors_accepts_what_the_reference_accepts(void **state)
{
    (void)state;
    static const struct {
        const char *header;
        size_t data;
    } good[] = {
        {"{}", 0},
        {"{\"__metadata__\":{\"format\":\"pt\"}}   ", 0},
        {"{\"a\":{\"dtype\":\"F32\",\"shape\":[],\"data_offsets\":[0,4]}}", 4},
        {"{\"a\":{\"dtype\":\"BF16\",\"shape\":[3,0],\"data_offsets\":[0,0]}}", 0},
        {"{\"a\":{\"dtype\":\"U8\",\"shape\":[1],\"data_offsets\":[0,1]},"
         "\"b\":{\"dtype\":\"F32\",\"shape\":[2],\"data_offsets\":[1,9]}}",
         9},
        {"{\"b\":{\"dtype\":\"I64\",\"shape\":[1],\"data_offsets\":[2,10]},"
         "\"a\":{\"dtype\":\"F8_E4M3\",\"shape\":[2,1],\"data_offsets\":[0,2]}}",
         10},
        {"{\"a\":{\"dtype\":\"BOOL\",\"shape\":[1,1,1,1,1,1,1,1],\"data_offsets\":[0,1]}}", 1},
        {"{\"z\":{\"dtype\":\"U8\",\"shape\":[0],\"data_offsets\":[2,2]},"
         "\"a\":{\"dtype\":\"U8\",\"shape\":[2],\"data_offsets\":[0,2]}}",
         2},
    };
    for (size_t i = 0; i < sizeof good / sizeof *good; i++) {
        struct fault fault = {0};
        if (open_text(good[i].header, good[i].data, &fault))
            fail_msg("%s: %s", good[i].header, fault.text);
    }
}

#define ENTRY(dtype, shape, offsets)                                                               \
    "{\"a\":{\"dtype\":\"" dtype "\",\"shape\":" shape ",\"data_offsets\":" offsets "}}"

static void test_safetensors_refuses_lies_by_name(void **state)
{
    (void)state;
    static const struct {
        const char *header;
        size_t data;
        enum status status;
        const char *says;
    } bad[] = {
        {" {}", 0, STATUS_CORRUPT, "begin with"},
        {"[]", 0, STATUS_CORRUPT, "begin with"},
        {"{", 0, STATUS_CORRUPT, "header"},
        {"{} x", 0, STATUS_CORRUPT, "header"},
        {"{\"a\\ud800\":1}", 0, STATUS_CORRUPT, "header"},
        {"{\"a\xff\":1}", 0, STATUS_CORRUPT, "header"},
        {"{\"a\":1}", 0, STATUS_CORRUPT, "not an object"},
        {"{\"__metadata__\":{\"a\":1}}", 0, STATUS_CORRUPT, "__metadata__"},
        {"{\"__metadata__\":[]}", 0, STATUS_CORRUPT, "__metadata__"},
        {ENTRY("F32", "[1]", "[0,4]") "x", 4, STATUS_CORRUPT, "header"},
        {"{\"a\":{\"dtype\":\"U8\",\"shape\":[1],\"data_offsets\":[0,1]},"
         "\"a\":{\"dtype\":\"U8\",\"shape\":[1],\"data_offsets\":[0,1]}}",
         1, STATUS_CORRUPT, "duplicate"},
        {ENTRY("F16", "[3]", "[0,4]"), 4, STATUS_CORRUPT, "as many bytes"},
        {ENTRY("F32", "[1]", "[0,4]"), 3, STATUS_CORRUPT, "beyond the file"},
        {ENTRY("F32", "[1]", "[0,4]"), 5, STATUS_CORRUPT, "exactly"},
        {ENTRY("F32", "[1]", "[4,8]"), 8, STATUS_CORRUPT, "hole"},
        {ENTRY("F32", "[1]", "[4,0]"), 4, STATUS_CORRUPT, "data_offsets"},
        {ENTRY("F32", "[1]", "[-4,0]"), 4, STATUS_CORRUPT, "data_offsets"},
        {ENTRY("F32", "[1]", "[0,4,8]"), 4, STATUS_CORRUPT, "data_offsets"},
        {ENTRY("F32", "[1]", "[0,4.0]"), 4, STATUS_CORRUPT, "data_offsets"},
        {ENTRY("F32", "[-1]", "[0,4]"), 4, STATUS_CORRUPT, "natural"},
        {ENTRY("F32", "[1.5]", "[0,4]"), 4, STATUS_CORRUPT, "natural"},
        {ENTRY("F32", "4", "[0,4]"), 4, STATUS_CORRUPT, "not a list"},
        {ENTRY("F32", "[4611686018427387904,4]", "[0,0]"), 0, STATUS_CORRUPT, "too large"},
        {ENTRY("F32", "[4611686018427387905]", "[0,4]"), 4, STATUS_CORRUPT, "as many bytes"},
        {ENTRY("F32", "[99999999999999999999]", "[0,4]"), 4, STATUS_CORRUPT, "header"},
        {ENTRY("U8", "[1,1,1,1,1,1,1,1,1]", "[0,1]"), 1, STATUS_CORRUPT, "8 dimensions"},
        {ENTRY("F4", "[2]", "[0,1]"), 1, STATUS_UNSUPPORTED, "F4"},
        {ENTRY("F6_E2M3", "[4]", "[0,3]"), 3, STATUS_UNSUPPORTED, "F6_E2M3"},
        {ENTRY("Q9", "[1]", "[0,1]"), 1, STATUS_CORRUPT, "Q9"},
        {"{\"a\":{\"shape\":[1],\"data_offsets\":[0,1]}}", 1, STATUS_CORRUPT, "no dtype"},
        {"{\"a\":{\"dtype\":\"U8\",\"shape\":[2],\"data_offsets\":[0,2]},"
         "\"b\":{\"dtype\":\"U8\",\"shape\":[2],\"data_offsets\":[1,3]}}",
         3, STATUS_CORRUPT, "overlaps"},
    };
    for (size_t i = 0; i < sizeof bad / sizeof *bad; i++) {
        struct fault fault = {0};
        enum status status = open_text(bad[i].header, bad[i].data, &fault);
        if (status != bad[i].status || !strstr(fault.text, bad[i].says))
            fail_msg("%s: status %s, \"%s\"", bad[i].header, status_code(status), fault.text);
    }
}

static void test_safetensors_refuses_header_lengths(void **state)
{
    (void)state;
    static const uint64_t lengths[] = {0, 1, 3, 100000001, UINT64_MAX, UINT64_MAX - 7, 1ull << 63};
    for (size_t i = 0; i < sizeof lengths / sizeof *lengths; i++) {
        struct memory memory = make(lengths[i], "{}", 2, 0);
        struct safetensors *file = NULL;
        struct fault fault;
        assert_int_equal(safetensors_open(&memory.reader, "x", &file, &fault), STATUS_CORRUPT);
        free(memory.bytes);
    }
    struct memory memory = make(2, "{}", 2, 0);
    for (memory.reader.size = 0; memory.reader.size < 10; memory.reader.size++) {
        struct safetensors *file = NULL;
        assert_int_equal(safetensors_open(&memory.reader, "x", &file, NULL), STATUS_CORRUPT);
    }
    free(memory.bytes);
}

// Every truncation of a good file is refused; so is every file with a byte more.
static void test_safetensors_refuses_every_truncation(void **state)
{
    (void)state;
    static const char header[] =
        "{\"a\":{\"dtype\":\"F32\",\"shape\":[2,2],\"data_offsets\":[0,16]},"
        "\"b\":{\"dtype\":\"BF16\",\"shape\":[3],\"data_offsets\":[16,22]}}";
    struct memory memory = make(sizeof header - 1, header, sizeof header - 1, 22);
    uint64_t whole = memory.reader.size;
    for (uint64_t size = 0; size <= whole; size++) {
        struct safetensors *file = NULL;
        memory.reader.size = size;
        enum status status = safetensors_open(&memory.reader, "x", &file, NULL);
        assert_int_equal(status, size == whole ? STATUS_OK : STATUS_CORRUPT);
        safetensors_close(file);
    }
    free(memory.bytes);
}

static void test_safetensors_finds_and_reads(void **state)
{
    (void)state;
    static const char header[] = "{\"__metadata__\":{\"format\":\"pt\"},"
                                 "\"w\":{\"dtype\":\"U8\",\"shape\":[2,3],\"data_offsets\":[1,7]},"
                                 "\"a\":{\"dtype\":\"U8\",\"shape\":[1],\"data_offsets\":[0,1]}}";
    struct memory memory = make(sizeof header - 1, header, sizeof header - 1, 7);
    struct safetensors *file = NULL;
    assert_int_equal(safetensors_open(&memory.reader, "x", &file, NULL), STATUS_OK);
    assert_int_equal(safetensors_count(file), 2);
    assert_string_equal(safetensors_at(file, 0)->name, "a");
    assert_string_equal(safetensors_metadata(file, "format"), "pt");
    assert_null(safetensors_metadata(file, "other"));
    assert_null(safetensors_find(file, "__metadata__"));
    assert_null(safetensors_find(file, "b"));
    const struct tensor *tensor = safetensors_find(file, "w");
    assert_non_null(tensor);
    assert_int_equal(tensor->dims, 2);
    assert_int_equal(tensor->shape[1], 3);
    uint8_t bytes[3];
    assert_int_equal(safetensors_read(file, tensor, 2, bytes, 3, NULL), STATUS_OK);
    assert_int_equal(bytes[0], 3);
    assert_int_equal(bytes[2], 5);
    struct fault fault = {0};
    float value;
    assert_int_equal(safetensors_read_f32(file, tensor, 0, &value, 1, &fault), STATUS_UNSUPPORTED);
    assert_non_null(strstr(fault.text, "U8"));
    safetensors_close(file);
    free(memory.bytes);
}

// Opens a file of one tensor "a" with these bytes as its data.
static struct safetensors *open_data(struct memory *memory, const char *dtype, const void *data,
                                     size_t count, size_t size)
{
    char header[160];
    int n = snprintf(header, sizeof header,
                     "{\"a\":{\"dtype\":\"%s\",\"shape\":[%zu],\"data_offsets\":[0,%zu]}}", dtype,
                     count, count * size);
    *memory = make((uint64_t)n, header, (size_t)n, count * size);
    memcpy(memory->bytes + 8 + n, data, count * size);
    struct safetensors *file = NULL;
    assert_int_equal(safetensors_open(&memory->reader, "x", &file, NULL), STATUS_OK);
    return file;
}

static void test_safetensors_converts_every_f16_exactly(void **state)
{
    (void)state;
    enum { COUNT = 0x7c00 }; // every finite value that is not negative
    static uint16_t half[2 * COUNT];
    static float wide[2 * COUNT];
    for (uint32_t i = 0; i < COUNT; i++) {
        half[2 * i] = (uint16_t)i;
        half[2 * i + 1] = (uint16_t)(i | 0x8000u);
    }
    struct memory memory;
    struct safetensors *file = open_data(&memory, "F16", half, 2 * COUNT, 2);
    const struct tensor *tensor = safetensors_at(file, 0);
    assert_int_equal(safetensors_read_f32(file, tensor, 0, wide, 2 * COUNT, NULL), STATUS_OK);
    for (uint32_t i = 0; i < COUNT; i++) {
        uint32_t exponent = i >> 10, fraction = i & 0x3ff;
        double value =
            exponent ? ldexp(1024.0 + fraction, (int)exponent - 25) : ldexp(fraction, -24);
        assert_true((double)wide[2 * i] == value && (double)wide[2 * i + 1] == -value);
    }
    // A part that begins and ends in the middle is the same numbers.
    static float part[5000];
    assert_int_equal(safetensors_read_f32(file, tensor, 4097, part, 5000, NULL), STATUS_OK);
    assert_memory_equal(part, wide + 4097, sizeof part);
    safetensors_close(file);
    free(memory.bytes);
}

static void test_safetensors_rounds_to_nearest_even(void **state)
{
    (void)state;
    static const struct {
        float from;
        uint16_t to;
    } cases[] = {
        {1.0f, 0x3f80},         {1.00390625f, 0x3f80}, // a tie, to even
        {1.01171875f, 0x3f82},                         // a tie, to even
        {1.00390637f, 0x3f81},                         // just above the tie
        {-1.00390625f, 0xbf80}, {0x1.fep127f, 0x7f7f}, // the largest bf16
        {0x1p-133f, 0x0001},                           // the smallest subnormal
        {-0.0f, 0x8000},
    };
    enum { COUNT = sizeof cases / sizeof *cases };
    float from[COUNT];
    uint16_t to[COUNT];
    for (size_t i = 0; i < COUNT; i++)
        from[i] = cases[i].from;
    struct memory memory;
    struct safetensors *file = open_data(&memory, "F32", from, COUNT, 4);
    assert_int_equal(safetensors_read_bf16(file, safetensors_at(file, 0), 0, to, COUNT, NULL),
                     STATUS_OK);
    for (size_t i = 0; i < COUNT; i++)
        assert_int_equal(to[i], cases[i].to);
    safetensors_close(file);
    free(memory.bytes);
}

static void test_safetensors_refuses_values_that_are_not_finite(void **state)
{
    (void)state;
    static float f32[6000];
    static uint16_t f16[6000], bf16[6000], narrow[6000];
    static float wide[6000];
    const float bad32[] = {NAN, INFINITY, -INFINITY, 0x1.ffp127f};
    for (size_t k = 0; k < 4; k++) {
        for (size_t where = 0; where < 6000; where += 1999) {
            f32[where] = bad32[k];
            f16[where] = k == 0 ? 0x7e01 : 0x7c00;
            bf16[where] = k == 0 ? 0x7f81 : 0xff80;
            const struct {
                const char *dtype;
                const void *data;
                size_t size;
            } forms[] = {{"F32", f32, 4}, {"F16", f16, 2}, {"BF16", bf16, 2}};
            for (size_t i = 0; i < 3; i++) {
                struct memory memory;
                struct fault fault = {0};
                struct safetensors *file =
                    open_data(&memory, forms[i].dtype, forms[i].data, 6000, forms[i].size);
                const struct tensor *tensor = safetensors_at(file, 0);
                assert_int_equal(safetensors_read_bf16(file, tensor, 0, narrow, 6000, &fault),
                                 STATUS_NUMERIC);
                assert_non_null(strstr(fault.text, "\"a\""));
                // 0x1.ffp127 is a finite float: only its bf16 is not.
                enum status expected = k == 3 && i == 0 ? STATUS_OK : STATUS_NUMERIC;
                assert_int_equal(safetensors_read_f32(file, tensor, 0, wide, 6000, NULL), expected);
                safetensors_close(file);
                free(memory.bytes);
            }
            f32[where] = 0;
            f16[where] = bf16[where] = 0;
        }
    }
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_safetensors_accepts_what_the_reference_accepts),
        cmocka_unit_test(test_safetensors_refuses_lies_by_name),
        cmocka_unit_test(test_safetensors_refuses_header_lengths),
        cmocka_unit_test(test_safetensors_refuses_every_truncation),
        cmocka_unit_test(test_safetensors_finds_and_reads),
        cmocka_unit_test(test_safetensors_converts_every_f16_exactly),
        cmocka_unit_test(test_safetensors_rounds_to_nearest_even),
        cmocka_unit_test(test_safetensors_refuses_values_that_are_not_finite),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
