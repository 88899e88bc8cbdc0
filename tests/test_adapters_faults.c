// SPDX-License-Identifier: Apache-2.0
// Converting and registering while the n-th allocation, read, write, sync or rename fails, for
// every n: there is a status and a sentence, the old store file stands as it was or the new one is
// whole, nothing else is left in the directory, no descriptor stays open. The linker puts the
// __wrap_ functions in front (adapters.cmake).
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <setjmp.h>
#include <cmocka.h>

#include <dirent.h>
#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include "adapters/registry.h"
#include "tests/test_adapters_tool.h"

enum { PAGE = 32768 };

// Calls left until one fails; 0: none does. The wrappers count only while a test has armed them.
static uint64_t countdown, calls;
static bool armed;

static bool fails(void)
{
    if (!armed)
        return false;
    calls++;
    return countdown && --countdown == 0;
}

void *__real_malloc(size_t bytes);
void *__real_calloc(size_t count, size_t bytes);
void *__real_realloc(void *old, size_t bytes);
void *__real_aligned_alloc(size_t alignment, size_t bytes);
char *__real_strdup(const char *text);
ssize_t __real_pread(int descriptor, void *out, size_t bytes, off_t offset);
ssize_t __real_pwrite(int descriptor, const void *from, size_t bytes, off_t offset);
int __real_fsync(int descriptor);
int __real_rename(const char *from, const char *to);
int __real_mkostemps(char *template, int suffix, int flags);
void *__wrap_malloc(size_t bytes);
void *__wrap_calloc(size_t count, size_t bytes);
void *__wrap_realloc(void *old, size_t bytes);
void *__wrap_aligned_alloc(size_t alignment, size_t bytes);
char *__wrap_strdup(const char *text);
ssize_t __wrap_pread(int descriptor, void *out, size_t bytes, off_t offset);
ssize_t __wrap_pwrite(int descriptor, const void *from, size_t bytes, off_t offset);
int __wrap_fsync(int descriptor);
int __wrap_rename(const char *from, const char *to);
int __wrap_mkostemps(char *template, int suffix, int flags);

void *__wrap_malloc(size_t bytes)
{
    return fails() ? NULL : __real_malloc(bytes);
}

void *__wrap_calloc(size_t count, size_t bytes)
{
    return fails() ? NULL : __real_calloc(count, bytes);
}

void *__wrap_realloc(void *old, size_t bytes)
{
    return fails() ? NULL : __real_realloc(old, bytes);
}

void *__wrap_aligned_alloc(size_t alignment, size_t bytes)
{
    return fails() ? NULL : __real_aligned_alloc(alignment, bytes);
}

char *__wrap_strdup(const char *text)
{
    return fails() ? NULL : __real_strdup(text);
}

static int io_error(void)
{
    errno = EIO;
    return -1;
}

ssize_t __wrap_pread(int descriptor, void *out, size_t bytes, off_t offset)
{
    return fails() ? io_error() : __real_pread(descriptor, out, bytes, offset);
}

ssize_t __wrap_pwrite(int descriptor, const void *from, size_t bytes, off_t offset)
{
    return fails() ? io_error() : __real_pwrite(descriptor, from, bytes, offset);
}

int __wrap_fsync(int descriptor)
{
    return fails() ? io_error() : __real_fsync(descriptor);
}

int __wrap_rename(const char *from, const char *to)
{
    return fails() ? io_error() : __real_rename(from, to);
}

int __wrap_mkostemps(char *template, int suffix, int flags)
{
    return fails() ? io_error() : __real_mkostemps(template, suffix, flags);
}

static uint32_t entries_of(const char *path)
{
    uint32_t count = 0;
    DIR *directory = opendir(path);
    assert_non_null(directory);
    while (readdir(directory))
        count++;
    (void)closedir(directory);
    return count;
}

static void test_adapters_faults_convert(void **state)
{
    struct tool_adapter adapter;
    struct adapter_base base = tool_base(DTYPE_BF16);
    struct adapter_report report;
    char path[TOOL_PATH + 64], folder[TOOL_PATH];
    size_t new_count, count;
    tool_adapter_begin(&adapter, *state);
    tool_config(&adapter, "\"target_modules\": [\"q_proj\", \"v_proj\"], \"rank_pattern\": "
                          "{\"(o)_proj\": 2}, \"task_type\": \"CAUSAL_LM\"");
    tool_adapter_write(&adapter);
    (void)snprintf(folder, sizeof folder, "%s/out", (char *)*state);
    (void)snprintf(path, sizeof path, "%s/x.adapter", folder);
    assert_int_equal(mkdir(folder, 0700), 0);
    assert_int_equal(adapter_convert(adapter.directory, &base, PAGE, path, &report, NULL),
                     STATUS_OK);
    uint8_t *new = tool_file_read(path, &new_count);
    uint32_t files = entries_of("/proc/self/fd");
    uint64_t refused = 0;
    for (uint64_t n = 1;; n++) {
        struct fault fault = {.text = ""};
        tool_file_write(path, "old", 3);
        countdown = n;
        calls = 0;
        armed = true;
        enum status status = adapter_convert(adapter.directory, &base, PAGE, path, &report, &fault);
        armed = false;
        uint8_t *now = tool_file_read(path, &count);
        bool is_new = count == new_count && memcmp(now, new, count) == 0;
        assert_true(is_new || (count == 3 && memcmp(now, "old", 3) == 0));
        free(now);
        assert_int_equal(entries_of(folder), 3);
        assert_int_equal(entries_of("/proc/self/fd"), files);
        if (calls < n) { // nothing failed any more
            assert_int_equal(status, STATUS_OK);
            assert_true(is_new);
            break;
        }
        assert_true(status == STATUS_NO_MEMORY || status == STATUS_IO);
        assert_true(fault.status == status && fault.text[0]);
        refused++;
    }
    (void)printf("convert: %llu calls failed, one at a time\n", (unsigned long long)refused);
    assert_true(refused > 40);
    free(new);
}

static void test_adapters_faults_register(void **state)
{
    struct tool_adapter adapter;
    struct adapter_base base = tool_base(DTYPE_BF16);
    struct adapter_report report;
    struct tool_rig rig;
    char path[TOOL_PATH + 64];
    adapter_id id;
    tool_adapter_begin(&adapter, *state);
    tool_adapter_write(&adapter);
    (void)snprintf(path, sizeof path, "%s/y.adapter", (char *)*state);
    assert_int_equal(adapter_convert(adapter.directory, &base, PAGE, path, &report, NULL),
                     STATUS_OK);
    tool_rig_make(&rig, &base, PAGE, 4, 4, 2);
    uint32_t files = entries_of("/proc/self/fd");
    for (uint64_t n = 1;; n++) {
        struct fault fault = {.text = ""};
        countdown = n;
        calls = 0;
        armed = true;
        enum status status = adapter_register(rig.adapters, "y", path, 0, &id, &fault);
        armed = false;
        if (calls < n) {
            assert_int_equal(status, STATUS_OK);
            assert_true(n > 4);
            break;
        }
        assert_true(status == STATUS_NO_MEMORY || status == STATUS_IO);
        assert_true(fault.status == status && fault.text[0]);
        assert_int_equal(adapters_count(rig.adapters), 0);
        assert_int_equal(entries_of("/proc/self/fd"), files);
        pool_check(rig.pool);
    }
    tool_rig_clear(&rig);
}

static void test_adapters_faults_create(void **state)
{
    struct adapter_base base = tool_base(DTYPE_BF16);
    struct tool_rig rig;
    (void)state;
    tool_rig_make(&rig, &base, PAGE, 4, 4, 2);
    struct adapter_options options = {.pool = rig.pool,
                                      .device = rig.device,
                                      .base = base,
                                      .clock = clock_fake(&rig.now_us),
                                      .adapters_max = 8};
    for (uint64_t n = 1;; n++) {
        struct adapters *more = NULL;
        countdown = n;
        calls = 0;
        armed = true;
        enum status status = adapters_create(&options, &more);
        armed = false;
        if (!status) {
            assert_int_equal(n, 21);
            adapters_destroy(more);
            break;
        }
        assert_int_equal(status, STATUS_NO_MEMORY);
    }
    options.adapters_max = 65535;
    assert_int_equal(adapters_create(&options, &rig.adapters), STATUS_LIMIT);
    tool_rig_clear(&rig);
}

// Registering and removing change the directory before they sync it, and say how far they came.
static void test_adapters_faults_registry(void **state)
{
    struct registry_entry entry = {.name = "one"};
    struct fault fault = {.text = ""};
    char new[REGISTRY_PATH], path[REGISTRY_PATH];
    bool changed = true;
    assert_int_equal(registry_make(*state, &fault), STATUS_OK);
    assert_int_equal(registry_path(*state, &entry, path, &fault), STATUS_OK);
    (void)snprintf(new, sizeof new, "%s/adapters/one-1.adapter.new", (char *)*state);
    for (uint64_t n = 1; n <= 2; n++) {
        FILE *file = fopen(new, "w");
        assert_non_null(file);
        assert_int_equal(fclose(file), 0);
        countdown = n;
        armed = true;
        enum status status = registry_commit(*state, new, &entry, &changed, &fault);
        armed = false;
        assert_true(status == STATUS_IO && changed == (n == 2));
        assert_int_equal(access(path, F_OK) == 0, changed);
        assert_int_equal(access(new, F_OK) == 0, !changed);
    }
    assert_non_null(strstr(fault.text, "syncing"));
    changed = false;
    countdown = 1;
    armed = true;
    enum status status = registry_remove(*state, &entry, &changed, &fault);
    armed = false;
    assert_true(status == STATUS_IO && changed && access(path, F_OK) != 0);
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

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_adapters_faults_convert),
        cmocka_unit_test(test_adapters_faults_register),
        cmocka_unit_test(test_adapters_faults_create),
        cmocka_unit_test(test_adapters_faults_registry),
    };
    return cmocka_run_group_tests_name("adapters_faults", tests, setup, teardown);
}
