// SPDX-License-Identifier: Apache-2.0
#include <math.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdlib.h>
#include <string.h>

#include <cmocka.h>

#include "base/check.h"
#include "kernels/tile.h"

static void test_tile_offset_is_a_bijection_onto_the_tiles(void **state)
{
    (void)state;
    static const size_t shapes[][2] = {{64, 64}, {1, 1}, {40, 96}, {130, 200}};
    for (size_t i = 0; i < ARRAY_COUNT(shapes); i++)
        for (int d = 0; d < 2; d++) {
            enum dtype dtype = d ? DTYPE_F32 : DTYPE_BF16;
            size_t rows = round_up(shapes[i][0], 64),
                   cols = round_up(shapes[i][1], tile_cols(dtype));
            size_t bytes = tile_count(dtype, rows, cols) * TILE_BYTES, element = dtype_bytes(dtype);
            assert_int_equal(bytes, rows * cols * element);
            char *seen = calloc(1, bytes);
            for (size_t r = 0; r < rows; r++)
                for (size_t c = 0; c < cols; c++) {
                    size_t at = tile_offset(dtype, cols, r, c);
                    assert_true(at + element <= bytes && at % element == 0 && !seen[at]);
                    seen[at] = 1;
                }
            free(seen);
        }
}

static void test_tile_core_matrices_stand_as_said(void **state)
{
    (void)state;
    assert_int_equal(tile_offset(DTYPE_BF16, 64, 0, 8), 128);
    assert_int_equal(tile_offset(DTYPE_BF16, 64, 1, 0), 16);
    assert_int_equal(tile_offset(DTYPE_BF16, 64, 8, 0), 1024);
    assert_int_equal(tile_offset(DTYPE_BF16, 128, 0, 64), 8192);
    assert_int_equal(tile_offset(DTYPE_BF16, 128, 64, 0), 16384);
    assert_int_equal(tile_offset(DTYPE_F32, 64, 0, 4), 128);
    assert_int_equal(tile_offset(DTYPE_F32, 64, 0, 32), 8192);
}

static void test_tile_pack_puts_every_element(void **state)
{
    (void)state;
    static const size_t shapes[][2] = {{1, 1}, {40, 96}, {72, 40}, {65, 129}, {24, 200}};
    for (size_t i = 0; i < ARRAY_COUNT(shapes); i++) {
        size_t rows = shapes[i][0], cols = shapes[i][1];
        uint16_t *source = malloc(rows * cols * 2);
        for (size_t j = 0; j < rows * cols; j++)
            source[j] = (uint16_t)(j + 1);
        for (int half = -1; half < 2; half++) {
            size_t all = half < 0 ? rows : tile_interleaved_rows(rows);
            size_t bytes = tile_count(DTYPE_BF16, all, cols) * TILE_BYTES, found = 0;
            uint8_t *out = calloc(1, bytes);
            tile_pack(DTYPE_BF16, source, rows, cols, half, out);
            for (size_t r = 0; r < rows; r++)
                for (size_t c = 0; c < cols; c++) {
                    size_t row = half < 0 ? r : tile_interleaved_row(r, (size_t)half);
                    uint16_t value;
                    memcpy(&value, out + tile_offset(DTYPE_BF16, cols, row, c), 2);
                    assert_int_equal(value, source[r * cols + c]);
                }
            for (size_t j = 0; j < bytes; j += 2)
                found += out[j] || out[j + 1];
            assert_int_equal(found, rows * cols); // and nothing else
            free(out);
        }
        free(source);
    }
}

static void test_tile_interleaves_blocks_of_eight(void **state)
{
    (void)state;
    assert_int_equal(tile_interleaved_row(0, 0), 0);
    assert_int_equal(tile_interleaved_row(7, 1), 15);
    assert_int_equal(tile_interleaved_row(8, 0), 16);
    assert_int_equal(tile_interleaved_rows(24), 48);
    assert_int_equal(tile_interleaved_rows(25), 64);
}

static void test_bf16_rounds_to_nearest_even_and_keeps_nan(void **state)
{
    (void)state;
    assert_int_equal(bf16_from_f32(1.0f), 0x3f80);
    assert_int_equal(bf16_from_f32(1.0f + 1.0f / 256), 0x3f80); // half way: to even
    assert_int_equal(bf16_from_f32(1.0f + 3.0f / 256), 0x3f82); // half way: to even
    assert_int_equal(bf16_from_f32(1.0f + 1.1f / 256), 0x3f81);
    assert_int_equal(bf16_from_f32(-0.0f), 0x8000);
    assert_int_equal(bf16_from_f32(INFINITY), 0x7f80);
    assert_int_equal(bf16_from_f32(3.4e38f), 0x7f80);
    assert_true(isnan(bf16_to_f32(bf16_from_f32(NAN))));
    union {
        uint32_t bits;
        float number;
    } payload = {.bits = 0x7f800001u};
    assert_true(isnan(bf16_to_f32(bf16_from_f32(payload.number))));
    for (uint32_t h = 0; h < 0x10000; h++)
        if (!isnan(bf16_to_f32((uint16_t)h)))
            assert_int_equal(bf16_from_f32(bf16_to_f32((uint16_t)h)), h);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_tile_offset_is_a_bijection_onto_the_tiles),
        cmocka_unit_test(test_tile_core_matrices_stand_as_said),
        cmocka_unit_test(test_tile_pack_puts_every_element),
        cmocka_unit_test(test_tile_interleaves_blocks_of_eight),
        cmocka_unit_test(test_bf16_rounds_to_nearest_even_and_keeps_nan),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
