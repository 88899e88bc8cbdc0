// SPDX-License-Identifier: Apache-2.0
// base/yaml.h: what is read, what is refused, and that every refusal names its line.
#include <setjmp.h>
#include <stdarg.h>
#include <stdlib.h>
#include <string.h>

#include <cmocka.h>

#include "base/check.h"
#include "base/yaml.h"

static struct yaml_tree *parsed(const char *text)
{
    struct yaml_tree *tree = NULL;
    struct fault fault = {0};
    if (yaml_tree_parse("t.yaml", text, strlen(text), &tree, &fault))
        fail_msg("%s", fault.text);
    return tree;
}

static void test_yaml_reads_nested_values(void **state)
{
    (void)state;
    struct yaml_tree *tree =
        parsed("# a comment\nname: demo\nlist:\n  - a\n  - {x: 1, y: [2, 3]}\n"
               "big: 18446744073709551615\nrate: -1.5e3\non: true\nq: \"5\"\n");
    const struct yaml_node *root = yaml_tree_root(tree);
    struct fault fault = {0};
    const char *text = NULL;
    uint64_t number = 7;
    double real = 0;
    bool flag = false;
    const struct yaml_node *list = NULL;
    assert_int_equal(yaml_map_string(root, "name", 64, &text, &fault), 0);
    assert_string_equal(text, "demo");
    assert_int_equal(yaml_map_u64(root, "big", 0, UINT64_MAX, &number, &fault), 0);
    assert_true(number == UINT64_MAX);
    assert_int_equal(yaml_map_u64(root, "missing", 0, 1, &number, &fault), 0);
    assert_true(number == UINT64_MAX);
    assert_int_equal(yaml_map_double(root, "rate", -2000, 0, &real, &fault), 0);
    assert_true(real == -1500);
    assert_int_equal(yaml_map_bool(root, "on", &flag, &fault), 0);
    assert_true(flag);
    assert_int_equal(yaml_map_list(root, "list", &list, &fault), 0);
    assert_int_equal(yaml_node_count(list), 2);
    const struct yaml_node *y = yaml_node_get(yaml_node_at(list, 1), "y");
    assert_int_equal(yaml_node_count(y), 2);
    assert_int_equal(yaml_node_line(y), 5);
    assert_string_equal(yaml_node_key(y), "y");
    assert_null(yaml_node_at(list, 2));
    yaml_tree_free(tree);
}

static void test_yaml_empty_documents_are_empty_maps(void **state)
{
    (void)state;
    static const char *const texts[] = {"", "# nothing\n", "---\n", "---\n...\n"};
    for (size_t i = 0; i < ARRAY_COUNT(texts); i++) {
        struct yaml_tree *tree = parsed(texts[i]);
        assert_int_equal(yaml_node_kind(yaml_tree_root(tree)), YAML_KIND_MAP);
        assert_int_equal(yaml_node_count(yaml_tree_root(tree)), 0);
        yaml_tree_free(tree);
    }
}

static void test_yaml_refuses_with_line(void **state)
{
    (void)state;
    static const struct {
        const char *text, *sentence;
    } rows[] = {
        {"a: &x 1\n", "t.yaml:1:4: anchors (&name) are not supported."},
        {"a: 1\nb: *x\n", "t.yaml:2:4: aliases (*name) are not supported."},
        {"a: !!int 1\n", "t.yaml:1:4: tags (!name) are not supported."},
        {"a: !x [1]\n", "t.yaml:1:4: tags (!name) are not supported."},
        {"a: 1\nb: 2\na: 3\n", "t.yaml:3:4: the key \"a\" is there twice (first in line 1)."},
        {"a: 1\n---\nb: 2\n", "t.yaml:2:1: only one document per file is supported."},
        {"%YAML 1.1\n---\na: 1\n", "t.yaml:1:1: directives (%YAML, %TAG) are not supported."},
        {"? [a]\n: 1\n", "t.yaml:1:3: a key must be a plain word, not a list or a map."},
        {"a: \"x\\0y\"\n", "t.yaml:1:4: a text may not contain the character NUL."},
        {"a: b: c\n", "t.yaml:1:5: mapping values are not allowed in this context."},
        {"a: [1\n", "t.yaml:2:1: did not find expected ',' or ']'."},
        {"a: \xff\n", "t.yaml:1:1: invalid leading UTF-8 octet (byte 3)."},
        {"[[[[[[[[[[[[[[[[[1]]]]]]]]]]]]]]]]]",
         "t.yaml:1:17: the nesting is deeper than 16 levels."},
    };
    for (size_t i = 0; i < ARRAY_COUNT(rows); i++) {
        struct yaml_tree *tree = NULL;
        struct fault fault = {0};
        assert_int_equal(
            yaml_tree_parse("t.yaml", rows[i].text, strlen(rows[i].text), &tree, &fault),
            STATUS_INVALID);
        assert_string_equal(fault.text, rows[i].sentence);
        assert_null(tree);
    }
}

static void test_yaml_limits(void **state)
{
    (void)state;
    size_t bytes = YAML_BYTES_MAX + 1;
    char *text = malloc(bytes);
    assert_non_null(text);
    struct yaml_tree *tree = NULL;
    struct fault fault = {0};
    memset(text, '\n', bytes);
    assert_int_equal(yaml_tree_parse("t", text, bytes, &tree, &fault), STATUS_INVALID);
    assert_int_equal(yaml_tree_parse("t", text, bytes - 1, &tree, &fault), STATUS_OK);
    yaml_tree_free(tree);
    for (size_t i = 0; i + 1 < bytes; i += 2)
        memcpy(text + i, i ? "1," : "[1", 2);
    text[1] = ' ';
    assert_int_equal(yaml_tree_parse("t", text, bytes - 1, &tree, &fault), STATUS_INVALID);
    assert_non_null(strstr(fault.text, "too many values"));
    free(text);
}

static void test_yaml_typed_getters_refuse(void **state)
{
    (void)state;
    struct yaml_tree *tree =
        parsed("a: 5x\nb: -1\nc: \"5\"\nd: 18446744073709551616\ne: yes\nf: [1]\n"
               "g: nan\nh: 1e999\ni: ~\nj: 12\nk: 0x10\n");
    const struct yaml_node *root = yaml_tree_root(tree);
    struct fault fault = {0};
    uint64_t number = 3;
    double real = 3;
    bool flag = true;
    const char *text = NULL;
    static const char *const bad[] = {"a", "b", "c", "d", "e", "f", "g", "h", "i", "k"};
    for (size_t i = 0; i < ARRAY_COUNT(bad); i++)
        assert_int_equal(yaml_map_u64(root, bad[i], 0, UINT64_MAX, &number, &fault),
                         STATUS_INVALID);
    assert_true(number == 3);
    assert_int_equal(yaml_map_u64(root, "j", 13, 20, &number, &fault), STATUS_INVALID);
    assert_string_equal(fault.text,
                        "t.yaml:10:4: j must be a whole number from 13 to 20; it is 12.");
    assert_int_equal(yaml_map_double(root, "g", -1, 1, &real, &fault), STATUS_INVALID);
    assert_int_equal(yaml_map_double(root, "h", -1, 1e300, &real, &fault), STATUS_INVALID);
    assert_int_equal(yaml_map_bool(root, "e", &flag, &fault), STATUS_INVALID);
    assert_string_equal(fault.text, "t.yaml:5:4: e must be true or false; it is yes.");
    assert_int_equal(yaml_map_string(root, "i", 8, &text, &fault), STATUS_INVALID);
    assert_int_equal(yaml_map_string(root, "d", 8, &text, &fault), STATUS_INVALID);
    const struct yaml_node *list = NULL;
    assert_int_equal(yaml_map_list(root, "j", &list, &fault), STATUS_INVALID);
    static const char *const known[] = {"a", "b"};
    assert_int_equal(yaml_map_known(root, known, 2, &fault), STATUS_INVALID);
    assert_string_equal(fault.text, "t.yaml:3:4: unknown key \"c\"; known: a, b.");
    yaml_tree_free(tree);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_yaml_reads_nested_values),
        cmocka_unit_test(test_yaml_empty_documents_are_empty_maps),
        cmocka_unit_test(test_yaml_refuses_with_line),
        cmocka_unit_test(test_yaml_limits),
        cmocka_unit_test(test_yaml_typed_getters_refuse),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
