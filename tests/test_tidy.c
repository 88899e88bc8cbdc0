// SPDX-License-Identifier: Apache-2.0
// The house rules that a program can keep: includes go down only, functions up to 70 lines, files
// up to 800, lines up to 100 columns, an SPDX line first, no unfinished words, no mutable globals
// outside base/log.c, no source file that no CMakeLists.txt or .cmake names. Reads the tree as it
// is.
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <setjmp.h>
#include <cmocka.h>

#include <dirent.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { FUNCTION_LINES = 70, FILE_LINES = 800, COLUMNS = 100 };

static const struct {
    const char *folder, *may; // space separated, with a space at both ends
} LAYERS[] = {
    {"base", " base "},
    {"kernels", " base kernels "},
    {"unified_pool", " base kernels unified_pool "},
    {"experts", " base kernels unified_pool experts "},
    {"adapters", " base kernels unified_pool adapters "},
    {"tenants", " base tenants "},
    {"runtime", " base kernels unified_pool experts adapters tenants runtime clients "},
    {"clients", " clients "},
};

static const char *const FOLDERS[] = {"base",    "kernels", "unified_pool", "experts", "adapters",
                                      "tenants", "runtime", "clients",      "tests",   "bench"};

struct tally {
    int offences, files;
    char *build_files; // all CMakeLists.txt and .cmake texts, for the dead-file rule
};

static void offend(struct tally *tally, const char *path, int line, const char *what)
{
    (void)fprintf(stderr, "%s:%d: %s\n", path, line, what);
    tally->offences++;
}

static void check_include(struct tally *tally, const char *path, int number, const char *line)
{
    const char *quote = strstr(line, "#include \"");
    if (!quote)
        return;
    char folder[64] = " ";
    const char *name = quote + 10, *slash = strchr(name, '/');
    if (!slash) {
        // Clients are copied out of the tree, tests keep their helpers beside them.
        if (strncmp(path, "tests/", 6) != 0 && strncmp(path, "clients/", 8) != 0)
            offend(tally, path, number, "includes are written from the root");
        return;
    }
    size_t length = (size_t)(slash - name) < 60 ? (size_t)(slash - name) : 60;
    memcpy(folder + 1, name, length);
    folder[length + 1] = ' ';
    folder[length + 2] = 0;
    for (size_t i = 0; i < sizeof LAYERS / sizeof *LAYERS; i++) {
        size_t n = strlen(LAYERS[i].folder);
        if (!strncmp(path, LAYERS[i].folder, n) && path[n] == '/' && !strstr(LAYERS[i].may, folder))
            offend(tally, path, number, "this include goes upwards or sideways");
    }
}

static void check_words(struct tally *tally, const char *path, int number, const char *line)
{
    // Written in halves, so that this file does not offend itself.
    static const char *const banned[] = {"TO"
                                         "DO",
                                         "FIX"
                                         "ME",
                                         "XX"
                                         "X ",
                                         "HA"
                                         "CK",
                                         "/wo"
                                         "rk/",
                                         "not implemented"
                                         " yet",
                                         "for"
                                         " now,"};
    for (size_t i = 0; i < sizeof banned / sizeof *banned; i++) {
        if (strstr(line, banned[i]))
            offend(tally, path, number, "an unfinished word or a path of a machine");
    }
}

static size_t columns(const char *line)
{
    size_t n = 0;
    for (; *line && *line != '\n'; line++)
        n += ((unsigned char)*line & 0xc0) != 0x80;
    return n;
}

// A mutable object at file scope: starts in column 0 with static, is no function, has no const.
static bool is_global(const char *line)
{
    if (strncmp(line, "static ", 7) != 0 || strchr(line, '(') || strstr(line, "const "))
        return false;
    return strchr(line, '=') || strchr(line, ';') || strchr(line, '[');
}

struct scan {
    int line, function_start;
    bool header;
};

static void check_line(struct tally *tally, const char *path, struct scan *scan, const char *line)
{
    int number = ++scan->line;
    if (number == 1 && strncmp(line, "// SPDX-License-Identifier: Apache-2.0", 38) != 0)
        offend(tally, path, number, "the first line is the SPDX line");
    if (columns(line) > COLUMNS)
        offend(tally, path, number, "longer than 100 columns");
    check_include(tally, path, number, line);
    check_words(tally, path, number, line);
    if (is_global(line) && strcmp(path, "base/log.c") != 0 && strncmp(path, "tests/", 6) != 0)
        offend(tally, path, number, "a mutable global");
    if (line[0] == '{')
        scan->function_start = number;
    if (line[0] == '}' && scan->function_start) {
        if (number - scan->function_start > FUNCTION_LINES)
            offend(tally, path, number, "this function is longer than 70 lines");
        scan->function_start = 0;
    }
}

static void check_file(struct tally *tally, const char *path, const char *name)
{
    FILE *file = fopen(path, "r");
    assert_non_null(file);
    struct scan scan = {0};
    char line[4096];
    while (fgets(line, sizeof line, file))
        check_line(tally, path, &scan, line);
    (void)fclose(file);
    if (scan.line > FILE_LINES)
        offend(tally, path, scan.line, "longer than 800 lines");
    size_t length = strlen(name);
    bool source = length > 2 && !strcmp(name + length - 2, ".c");
    char stem[256];
    (void)snprintf(stem, sizeof stem, "%.*s", (int)(source ? length - 2 : length), name);
    if (source && !strstr(tally->build_files, stem))
        offend(tally, path, 0, "no CMakeLists.txt names this file");
    tally->files++;
}

typedef void (*visit)(struct tally *tally, const char *path, const char *name);

static void walk(struct tally *tally, const char *folder, visit each)
{
    DIR *directory = opendir(folder);
    for (struct dirent *entry; directory && (entry = readdir(directory));) {
        char path[1024];
        if (entry->d_name[0] == '.')
            continue;
        (void)snprintf(path, sizeof path, "%s/%s", folder, entry->d_name);
        if (entry->d_type == DT_DIR)
            walk(tally, path, each);
        else
            each(tally, path, entry->d_name);
    }
    if (directory)
        (void)closedir(directory);
}

static void visit_source(struct tally *tally, const char *path, const char *name)
{
    const char *dot = strrchr(name, '.');
    if (dot &&
        (!strcmp(dot, ".c") || !strcmp(dot, ".h") || !strcmp(dot, ".cu") || !strcmp(dot, ".cuh")))
        check_file(tally, path, name);
}

static void visit_build_file(struct tally *tally, const char *path, const char *name)
{
    const char *dot = strrchr(name, '.');
    if (strcmp(name, "CMakeLists.txt") != 0 && (!dot || strcmp(dot, ".cmake") != 0))
        return;
    FILE *file = fopen(path, "r");
    assert_non_null(file);
    size_t used = strlen(tally->build_files);
    used += fread(tally->build_files + used, 1, (1 << 20) - used - 1, file);
    tally->build_files[used] = 0;
    (void)fclose(file);
}

static void test_tidy_tree_keeps_the_house_rules(void **state)
{
    (void)state;
    struct tally tally = {.build_files = calloc(1, 1 << 20)};
    assert_non_null(tally.build_files);
    for (size_t i = 0; i < sizeof FOLDERS / sizeof *FOLDERS; i++)
        walk(&tally, FOLDERS[i], visit_build_file);
    for (size_t i = 0; i < sizeof FOLDERS / sizeof *FOLDERS; i++)
        walk(&tally, FOLDERS[i], visit_source);
    free(tally.build_files);
    (void)printf("%d files read, %d offences\n", tally.files, tally.offences);
    assert_true(tally.files > 100);
    assert_int_equal(tally.offences, 0);
}

int main(void)
{
    const struct CMUnitTest tests[] = {cmocka_unit_test(test_tidy_tree_keeps_the_house_rules)};
    return cmocka_run_group_tests(tests, NULL, NULL);
}
