// SPDX-License-Identifier: Apache-2.0
// The registry of files: what a name in adapters/ means, one writer at a time, and what gc takes.
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <setjmp.h>
#include <cmocka.h>

#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "adapters/registry.h"
#include "tests/test_adapters_tool.h"

static void touch(const char *state, const char *file)
{
    char path[REGISTRY_PATH];
    (void)snprintf(path, sizeof path, "%s/adapters/%s", state, file);
    tool_file_write(path, "x", 1);
}

static bool is_there(const char *state, const char *file)
{
    char path[REGISTRY_PATH];
    (void)snprintf(path, sizeof path, "%s/adapters/%s", state, file);
    return access(path, F_OK) == 0;
}

static void test_adapters_registry_names(void **state)
{
    (void)state;
    static const struct {
        const char *file, *name, *tenant; // name NULL: no adapter's file
    } cases[] = {
        {"a.adapter", "a", ""},
        {"a.b.adapter", "a.b", ""},
        {"a.adapter.adapter", "a.adapter", ""},
        {"a@t.adapter", "a", "t"},
        {"a@t@u.adapter", "a", "t@u"}, // no valid tenant: not listed
        {"@t.adapter", "", "t"},
        {"a@.adapter", NULL, NULL},
        {".adapter", NULL, NULL},
        {"adapter", NULL, NULL},
        {"a.adapter.new", NULL, NULL},
        {"a.adapter.x.part", NULL, NULL},
        {"", NULL, NULL},
    };
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        struct registry_entry entry;
        assert_int_equal(registry_parse(cases[i].file, &entry), cases[i].name != NULL);
        if (!cases[i].name)
            continue;
        assert_string_equal(entry.name, cases[i].name);
        assert_string_equal(entry.tenant, cases[i].tenant);
    }
    char longer[100];
    struct registry_entry entry;
    memset(longer, 'a', sizeof longer);
    strcpy(longer + ADAPTER_NAME_MAX - 1, ".adapter");
    assert_true(registry_parse(longer, &entry));
    memset(longer, 'a', sizeof longer);
    strcpy(longer + ADAPTER_NAME_MAX, ".adapter");
    assert_false(registry_parse(longer, &entry));
}

static void test_adapters_registry_one_writer(void **state)
{
    struct fault fault = {.text = ""};
    int first = -1, second = -1;
    assert_int_equal(registry_make(*state, &fault), STATUS_OK);
    assert_int_equal(registry_make(*state, &fault), STATUS_OK);
    assert_int_equal(registry_lock(*state, &first, &fault), STATUS_OK);
    assert_int_equal(registry_lock(*state, &second, &fault), STATUS_BUSY);
    assert_non_null(strstr(fault.text, "in use by a server or by polder adapter"));
    (void)close(first);
    assert_int_equal(registry_lock(*state, &second, &fault), STATUS_OK);
    (void)close(second);
    assert_int_equal(registry_lock("/nowhere/at/all", &first, &fault), STATUS_IO);
}

static void test_adapters_registry_finds_and_lists(void **state)
{
    struct fault fault;
    struct registry_entry entry, *list;
    size_t count;
    assert_int_equal(registry_list("/nowhere/at/all", &list, &count, &fault), STATUS_OK);
    assert_int_equal(count, 0);
    assert_int_equal(registry_make(*state, &fault), STATUS_OK);
    const char *const files[] = {"b@u.adapter", "b.adapter",  "a@t.adapter", "c@u.adapter",
                                 "c@v.adapter", "@t.adapter", "x.part",      "a@t@u.adapter"};
    for (size_t i = 0; i < sizeof files / sizeof *files; i++)
        touch(*state, files[i]);
    assert_int_equal(registry_list(*state, &list, &count, &fault), STATUS_OK);
    static const char *const names[] = {"a t", "b ", "b u", "c u", "c v"};
    assert_int_equal(count, 5);
    for (size_t i = 0; i < count; i++) {
        char both[2 * ADAPTER_NAME_MAX + 2];
        (void)snprintf(both, sizeof both, "%s %s", list[i].name, list[i].tenant);
        assert_string_equal(both, names[i]);
    }
    free(list);
    static const char *const found[][3] = {{"b", "u", "u"},  {"b", "v", ""},  {"b", NULL, ""},
                                           {"a", NULL, "t"}, {"a", "u", "t"}, {"c", "v", "v"}};
    for (size_t i = 0; i < sizeof found / sizeof *found; i++) {
        assert_int_equal(registry_find(*state, found[i][0], found[i][1], &entry), STATUS_OK);
        assert_string_equal(entry.tenant, found[i][2]);
    }
    assert_int_equal(registry_find(*state, "d", "t", &entry), STATUS_NOT_FOUND);
    assert_int_equal(registry_find(*state, "../a", NULL, &entry), STATUS_NOT_FOUND);
    assert_int_equal(registry_find(*state, "a", "../t", &entry), STATUS_NOT_FOUND);
}

static void test_adapters_registry_commits_and_removes(void **state)
{
    struct fault fault = {.text = ""};
    struct registry_entry entry = {.name = "one", .tenant = "acme"};
    char path[REGISTRY_PATH];
    bool changed = false;
    assert_int_equal(registry_make(*state, &fault), STATUS_OK);
    touch(*state, "one-1.adapter.new");
    (void)snprintf(path, sizeof path, "%s/adapters/one-1.adapter.new", (char *)*state);
    assert_int_equal(registry_commit(*state, path, &entry, &changed, &fault), STATUS_OK);
    assert_true(changed && is_there(*state, "one@acme.adapter"));
    assert_false(is_there(*state, "one-1.adapter.new"));
    assert_int_equal(registry_commit(*state, path, &entry, &changed, &fault), STATUS_IO);
    assert_true(!changed && strstr(fault.text, "one could not be kept"));
    assert_int_equal(registry_remove(*state, &entry, &changed, &fault), STATUS_OK);
    assert_int_equal(registry_remove(*state, &entry, &changed, &fault), STATUS_NOT_FOUND);
    assert_false(changed || is_there(*state, "one@acme.adapter"));
}

static void count_told(void *context, const struct registry_leftover *leftover)
{
    uint64_t *told = context;
    told[!leftover->removed] += leftover->bytes;
}

static void test_adapters_registry_collects(void **state)
{
    struct fault fault;
    char mine[128], mine_part[128];
    uint64_t told[2] = {0, 0};
    assert_int_equal(registry_make(*state, &fault), STATUS_OK);
    (void)snprintf(mine, sizeof mine, "a-%d.adapter.new", (int)getpid());
    (void)snprintf(mine_part, sizeof mine_part, "%s.aaaaaa.part", mine);
    // The pid of nobody: beyond what the kernel gives.
    const char *const gone[] = {"a.adapter.abcdef.part", "a-0123456789abcdef.adapter.new",
                                "a-4194305.adapter.new", "a-12x.adapter.new", "b.part"};
    const char *const kept[] = {"a.adapter", "a@t.adapter", mine, mine_part, "note"};
    for (size_t i = 0; i < 5; i++) {
        touch(*state, gone[i]);
        touch(*state, kept[i]);
    }
    assert_int_equal(registry_collect(*state, count_told, told, &fault), STATUS_OK);
    assert_int_equal(told[0], 5);
    assert_int_equal(told[1], 1); // the note
    for (size_t i = 0; i < 5; i++) {
        assert_false(is_there(*state, gone[i]));
        assert_true(is_there(*state, kept[i]));
    }
    assert_int_equal(registry_collect("/nowhere/at/all", count_told, told, &fault), STATUS_OK);
}

static int setup(void **state)
{
    *state = tool_scratch();
    return 0;
}

static int teardown(void **state)
{
    tool_scratch_remove(*state);
    return 0;
}

#define TEST(f) cmocka_unit_test_setup_teardown(f, setup, teardown)

int main(void)
{
    const struct CMUnitTest tests[] = {
        TEST(test_adapters_registry_names),
        TEST(test_adapters_registry_one_writer),
        TEST(test_adapters_registry_finds_and_lists),
        TEST(test_adapters_registry_commits_and_removes),
        TEST(test_adapters_registry_collects),
    };
    return cmocka_run_group_tests_name("adapters_registry", tests, NULL, NULL);
}
