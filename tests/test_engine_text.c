// SPDX-License-Identifier: Apache-2.0
// Text output: stop strings across token borders, what is held back, random pieces against a naive
// search.
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <setjmp.h>
#include <cmocka.h>

#include <string.h>

#include "base/rng.h"
#include "runtime/engine/text.h"

static void add_stop(struct text_output *o, const char *stop)
{
    size_t bytes = strlen(stop);
    memcpy(o->stop[o->stops], stop, bytes);
    o->stop_bytes[o->stops++] = (uint16_t)bytes;
}

// Adds a piece; `given` collects what may be given out. True when a stop string was found.
static bool piece(struct text_output *o, const char *text, char *given)
{
    size_t ready = 0, at = strlen(given);
    bool stopped = text_add(o, text, strlen(text), &ready);
    memcpy(given + at, o->held, ready);
    given[at + ready] = 0;
    text_consume(o, ready);
    return stopped;
}

static void test_engine_text_without_stops(void **state)
{
    (void)state;
    struct text_output o = {.stops = 0};
    char given[64] = "";
    assert_false(piece(&o, "hel", given));
    assert_false(piece(&o, "", given));
    assert_false(piece(&o, "lo", given));
    assert_string_equal(given, "hello");
    assert_int_equal(o.held_bytes, 0);
}

static void test_engine_text_stop_across_tokens(void **state)
{
    (void)state;
    struct text_output o = {.stops = 0};
    char given[64] = "";
    add_stop(&o, "</end>");
    assert_false(piece(&o, "abc<", given));
    assert_string_equal(given, "abc");
    assert_false(piece(&o, "/e", given));
    assert_string_equal(given, "abc");
    assert_true(piece(&o, "nd> more", given));
    assert_string_equal(given, "abc");
    assert_int_equal(o.held_bytes, 0);
}

static void test_engine_text_gives_what_was_no_stop(void **state)
{
    (void)state;
    struct text_output o = {.stops = 0};
    char given[64] = "";
    add_stop(&o, "abab!");
    assert_false(piece(&o, "ab", given));
    assert_string_equal(given, "");
    assert_false(piece(&o, "abab", given)); // "ababab": the last four may still begin a stop
    assert_string_equal(given, "ab");
    assert_int_equal(o.held_bytes, 4);
    assert_false(piece(&o, "x", given));
    assert_string_equal(given, "abababx");
}

static void test_engine_text_earliest_stop_wins(void **state)
{
    (void)state;
    struct text_output o = {.stops = 0};
    char given[64] = "";
    add_stop(&o, "world");
    add_stop(&o, "lo w");
    add_stop(&o, "o");
    assert_true(piece(&o, "hello world", given));
    assert_string_equal(given, "hel");
}

static void test_engine_text_stop_of_one_byte_is_not_held(void **state)
{
    (void)state;
    struct text_output o = {.stops = 0};
    char given[64] = "";
    add_stop(&o, "\n");
    assert_false(piece(&o, "line", given));
    assert_string_equal(given, "line");
    assert_true(piece(&o, "\nnext", given));
    assert_string_equal(given, "line");
}

// A stop string that shares its first byte with other characters: they come out whole, since the
// decoder gives whole characters and the next one settles it.
static void test_engine_text_utf8(void **state)
{
    (void)state;
    struct text_output o = {.stops = 0};
    char given[64] = "";
    add_stop(&o, "\xc3\xa9!"); // e acute and an exclamation mark
    assert_false(piece(&o, "caf\xc3\xa9", given));
    assert_string_equal(given, "caf");
    assert_false(piece(&o, "\xc3\xa8", given)); // e grave: shares the first byte of the stop
    assert_string_equal(given, "caf\xc3\xa9\xc3\xa8");
    assert_true(piece(&o, "\xc3\xa9!", given));
    assert_string_equal(given, "caf\xc3\xa9\xc3\xa8");
}

static const char *naive(const char *whole, const struct text_output *o)
{
    const char *first = NULL;
    for (uint32_t i = 0; i < o->stops; i++) {
        const char *at = strstr(whole, o->stop[i]);
        first = at && (!first || at < first) ? at : first;
    }
    return first;
}

// After every piece: what was given out is a prefix, nothing of a stop string was given out, and no
// more is held back than could become one.
static void test_engine_text_random_pieces(void **state)
{
    (void)state;
    struct rng rng = {.seed = 11};
    for (int run = 0; run < 20000; run++) {
        struct text_output o = {.stops = 0};
        char whole[256] = "", given[256] = "";
        uint32_t stops = 1 + (uint32_t)rng_below(&rng, 3);
        for (uint32_t i = 0; i < stops; i++) {
            char stop[8] = "";
            for (uint64_t n = 1 + rng_below(&rng, 5); n--;)
                stop[strlen(stop)] = (char)('a' + rng_below(&rng, 3));
            add_stop(&o, stop);
        }
        for (int n = 0; n < 30; n++) {
            char part[8] = "";
            for (uint64_t i = rng_below(&rng, 4); i--;)
                part[strlen(part)] = (char)('a' + rng_below(&rng, 3));
            strcat(whole, part);
            bool stopped = piece(&o, part, given);
            const char *at = naive(whole, &o);
            assert_int_equal(stopped, at != NULL);
            if (stopped) {
                assert_int_equal(strlen(given), at - whole);
                assert_memory_equal(given, whole, strlen(given));
                break;
            }
            assert_memory_equal(given, whole, strlen(given));
            assert_int_equal(strlen(given) + o.held_bytes, strlen(whole));
            assert_true(o.held_bytes < 5);
        }
    }
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_engine_text_without_stops),
        cmocka_unit_test(test_engine_text_stop_across_tokens),
        cmocka_unit_test(test_engine_text_gives_what_was_no_stop),
        cmocka_unit_test(test_engine_text_earliest_stop_wins),
        cmocka_unit_test(test_engine_text_stop_of_one_byte_is_not_held),
        cmocka_unit_test(test_engine_text_utf8),
        cmocka_unit_test(test_engine_text_random_pieces),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
