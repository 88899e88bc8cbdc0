// SPDX-License-Identifier: Apache-2.0
// base/json: what is refused and where the sentence points, typed getters, limits, iteration.
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#include <cmocka.h>

#include "base/json.h"

static struct json *parse(const char *text)
{
    struct json *root;
    struct fault fault = {0};
    if (json_parse("t", text, strlen(text), NULL, &root, &fault))
        fail_msg("%s", fault.text);
    return root;
}

static void test_json_refuses_what_is_not_strict(void **state)
{
    (void)state;
    static const struct {
        const char *text, *where;
    } cases[] = {
        {"", "t:1:"},
        {"{", "t:1:"},
        {"{\"a\":1,}", "t:1:"},
        {"{\"a\":1}\n x", "t:2:"},
        {"{\"a\":1,\n\"a\":2}", "t:2:"},
        {"[NaN]", "t:1:"},
        {"[Infinity]", "t:1:"},
        {"[1e999]", "t:1:"},
        {"[99999999999999999999]", "t:1:"},
        {"[01]", "t:1:"},
        {"['a']", "t:1:"},
        {"[\"\\ud800\"]", "t:1:"},
        {"[\"\xff\"]", "t:1:"},
        {"[\"\xed\xa0\x80\"]", "t:1:"},
        {"[\"a\nb\"]", "t:1:"},
        {"{\"a\\u0000b\":1}", "t:1:"},
        {"[1] // no", "t:1:"},
        {"\xef\xbb\xbf[]", "t:1:"},
    };
    for (size_t i = 0; i < sizeof cases / sizeof cases[0]; i++) {
        struct json *root;
        struct fault fault = {0};
        enum status status =
            json_parse("t", cases[i].text, strlen(cases[i].text), NULL, &root, &fault);
        if (status != STATUS_INVALID || root || strncmp(fault.text, cases[i].where, 4) != 0)
            fail_msg("%s: %s %s", cases[i].text, status_code(status), fault.text);
    }
}

static void test_json_keeps_limits(void **state)
{
    (void)state;
    struct json *root;
    struct fault fault;
    const struct json_limits limits = {.bytes_max = 10, .depth_max = 3};
    assert_int_equal(json_parse("t", "[[[1]]]", 7, &limits, &root, &fault), STATUS_OK);
    json_free(root);
    assert_int_equal(json_parse("t", "[[[[]]]]", 8, &limits, &root, &fault), STATUS_LIMIT);
    assert_int_equal(json_parse("t", "[\"[[[[\"]", 8, &limits, &root, &fault), STATUS_OK);
    json_free(root);
    assert_int_equal(json_parse("t", "[\"\\\"[[[[\"", 9, &limits, &root, &fault), STATUS_INVALID);
    assert_int_equal(json_parse("t", "           ", 11, &limits, &root, &fault), STATUS_LIMIT);
    char *deep = malloc(1 << 20);
    memset(deep, '[', 1 << 20);
    assert_int_equal(json_parse("t", deep, 1 << 20, NULL, &root, &fault), STATUS_LIMIT);
    free(deep);
}

static void test_json_getters_never_convert(void **state)
{
    (void)state;
    struct json *root =
        parse("{\"i\":7,\"n\":-1,\"big\":4294967296,\"r\":1.0,\"s\":\"7\",\"b\":true,"
              "\"z\":null,\"nul\":\"a\\u0000b\",\"o\":{},\"l\":[1,2]}");
    struct fault fault;
    uint32_t u32 = 0;
    uint64_t u64 = 0;
    int64_t i64 = 0;
    double d = 0;
    bool b = false;
    const char *s = NULL;
    const struct json *v = NULL;
    size_t n = 0;
    assert_int_equal(json_get_u32(root, "i", &u32, &fault), STATUS_OK);
    assert_int_equal(u32, 7);
    assert_int_equal(json_get_double(root, "i", &d, &fault), STATUS_OK);
    assert_true(d == 7);
    assert_int_equal(json_get_u32(root, "big", &u32, &fault), STATUS_INVALID);
    assert_string_equal(fault.text,
                        "'big' must be an integer from 0 to 4294967295, not an integer");
    assert_int_equal(json_get_u64(root, "big", &u64, &fault), STATUS_OK);
    assert_int_equal(json_get_u64(root, "n", &u64, &fault), STATUS_INVALID);
    assert_int_equal(json_get_i64(root, "n", &i64, &fault), STATUS_OK);
    assert_int_equal(json_get_u32(root, "r", &u32, &fault), STATUS_INVALID);
    assert_int_equal(json_get_u32(root, "s", &u32, &fault), STATUS_INVALID);
    assert_int_equal(json_get_bool(root, "i", &b, &fault), STATUS_INVALID);
    assert_int_equal(json_get_bool(root, "b", &b, &fault), STATUS_OK);
    assert_true(b);
    assert_int_equal(json_get_string(root, "s", &s, &fault), STATUS_OK);
    assert_string_equal(s, "7");
    assert_int_equal(json_get_string(root, "nul", &s, &fault), STATUS_INVALID);
    assert_true(json_as_bytes(json_find(root, "nul"), &s, &n) && n == 3);
    assert_int_equal(json_get_u32(root, "none", &u32, &fault), STATUS_INVALID);
    assert_string_equal(fault.text, "'none' is missing");
    assert_int_equal(json_get_u32(root, "z", &u32, &fault), STATUS_INVALID);
    assert_int_equal(json_get_u32_or(root, "z", 5, &u32, &fault), STATUS_OK);
    assert_int_equal(u32, 5);
    assert_int_equal(json_get_u32_or(root, "none", 6, &u32, &fault), STATUS_OK);
    assert_int_equal(u32, 6);
    assert_int_equal(json_get_u32_or(root, "s", 6, &u32, &fault), STATUS_INVALID);
    assert_int_equal(json_get_object(root, "l", &v, &fault), STATUS_INVALID);
    assert_int_equal(json_get_array(root, "l", &v, &fault), STATUS_OK);
    assert_int_equal(json_count(v), 2);
    assert_null(json_at(v, 2));
    assert_int_equal(json_get_object_or_null(root, "z", &v, &fault), STATUS_OK);
    assert_null(v);
    assert_int_equal(json_fault_within(&fault, "f.json", STATUS_INVALID), STATUS_INVALID);
    assert_int_equal(strncmp(fault.text, "f.json: '", 9), 0);
    json_free(root);
}

static void test_json_iterates_in_file_order(void **state)
{
    (void)state;
    static const char *const known[] = {"b", "a"};
    struct json *root = parse("{\"b\":1,\"a\":2,\"c\":3}");
    char order[8] = "";
    for (struct json_pair pair = {0}; json_next(root, &pair);)
        (void)strcat(order, pair.key);
    assert_string_equal(order, "bac");
    assert_string_equal(json_unknown_key(root, known, 2), "c");
    assert_null(json_unknown_key(json_find(root, "c"), known, 2)); // not an object: no keys
    assert_null(json_find(NULL, "a"));
    assert_int_equal(json_kind_of(NULL), JSON_KIND_NULL);
    json_free(root);
    json_free(NULL);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_json_refuses_what_is_not_strict),
        cmocka_unit_test(test_json_keeps_limits),
        cmocka_unit_test(test_json_getters_never_convert),
        cmocka_unit_test(test_json_iterates_in_file_order),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
