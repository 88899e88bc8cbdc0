// SPDX-License-Identifier: Apache-2.0
// The store file: the same adapter gives the same bytes, every lie in it is refused, and only for
// its own base.
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <setjmp.h>
#include <cmocka.h>

#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "adapters/store.h"
#include "base/hash.h"
#include "base/rng.h"
#include "tests/test_adapters_tool.h"

enum { PAGE = 32768, PAGES = 1, LIST_AT = (1 + PAGES) * PAGE };
enum { AT_SEAL = 776, AT_RECORDS = 848, RECORD = 48, HEADER_END = 848 + 4 * 48 };

struct made {
    char path[TOOL_PATH], broken[TOOL_PATH];
    uint8_t *bytes;
    size_t count;
    struct adapter_report report;
    struct tool_rig rig;
    struct adapter_base base;
};

static void make(struct made *made, const char *scratch)
{
    struct tool_adapter adapter;
    tool_adapter_begin(&adapter, scratch);
    tool_adapter_write(&adapter);
    made->base = tool_base(DTYPE_BF16);
    (void)snprintf(made->path, sizeof made->path, "%s/good.adapter", scratch);
    (void)snprintf(made->broken, sizeof made->broken, "%s/broken.adapter", scratch);
    assert_int_equal(
        adapter_convert(adapter.directory, &made->base, PAGE, made->path, &made->report, NULL),
        STATUS_OK);
    made->bytes = tool_file_read(made->path, &made->count);
    assert_int_equal(made->count, LIST_AT + PAGES * DIGEST_BYTES);
    tool_rig_make(&made->rig, &made->base, PAGE, 4, 4, 4);
}

static void unmake(struct made *made)
{
    tool_rig_clear(&made->rig);
    free(made->bytes);
}

static void seal(uint8_t *bytes)
{
    memset(bytes + AT_SEAL, 0, DIGEST_BYTES);
    struct digest digest = hash_bytes(NULL, bytes, PAGE);
    memcpy(bytes + AT_SEAL, digest.bytes, DIGEST_BYTES);
}

// Registers the file made of `bytes`; nothing of a refused one may stay in registry or pool.
static enum status try_bytes(struct made *made, const uint8_t *bytes, size_t count,
                             struct fault *fault)
{
    adapter_id id;
    tool_file_write(made->broken, bytes, count);
    *fault = (struct fault){.text = ""};
    enum status status =
        adapter_register(made->rig.adapters, "broken", made->broken, 0, &id, fault);
    if (!status)
        assert_int_equal(adapter_remove(made->rig.adapters, "broken"), STATUS_OK);
    assert_int_equal(adapters_count(made->rig.adapters), 0);
    return status;
}

static void put_u32(uint8_t *at, uint32_t value)
{
    memcpy(at, &value, 4);
}

static void test_adapters_store_is_reproducible(void **state)
{
    struct made made;
    struct adapter_report report;
    struct tool_adapter adapter;
    struct fault fault;
    char path[TOOL_PATH];
    make(&made, *state);
    assert_int_equal(adapter_verify(made.path, &made.base, PAGE, &fault), STATUS_OK);
    tool_adapter_begin(&adapter, *state);
    adapter.seed--; // the values of the first one
    tool_adapter_write(&adapter);
    (void)snprintf(path, sizeof path, "%s/again.adapter", (char *)*state);
    assert_int_equal(adapter_convert(adapter.directory, &made.base, PAGE, path, &report, &fault),
                     STATUS_OK);
    size_t count;
    uint8_t *bytes = tool_file_read(path, &count);
    assert_int_equal(count, made.count);
    assert_memory_equal(bytes, made.bytes, count);
    free(bytes);
    adapter.seed += 100; // one other value is another content
    tool_adapter_write(&adapter);
    assert_int_equal(adapter_convert(adapter.directory, &made.base, PAGE, path, &report, &fault),
                     STATUS_OK);
    assert_false(digest_equal(&report.digest, &made.report.digest));
    unmake(&made);
}

static void test_adapters_store_other_base(void **state)
{
    struct made made;
    struct fault fault;
    make(&made, *state);
    struct adapter_base other = made.base;
    other.digest.bytes[0] ^= 1;
    assert_int_equal(adapter_verify(made.path, &other, PAGE, &fault), STATUS_DENIED);
    assert_non_null(strstr(fault.text, "was made for another base model"));
    other = made.base;
    other.hidden = 128; // the digest alone is not believed
    assert_int_equal(adapter_verify(made.path, &other, PAGE, &fault), STATUS_DENIED);
    other = tool_base(DTYPE_F32);
    assert_int_equal(adapter_verify(made.path, &other, PAGE, &fault), STATUS_INVALID);
    assert_non_null(strstr(fault.text, "another element type"));
    assert_int_equal(adapter_verify(made.path, &made.base, 2 * PAGE, &fault), STATUS_INVALID);
    assert_non_null(strstr(fault.text, "has pages of 32768 bytes; the pool has pages of 65536"));
    unmake(&made);
}

static void test_adapters_store_every_header_byte_counts(void **state)
{
    struct made made;
    struct fault fault;
    make(&made, *state);
    for (size_t i = 0; i < PAGE; i += i < HEADER_END + 64 ? 1 : 509) {
        made.bytes[i] ^= 0x10;
        if (!try_bytes(&made, made.bytes, made.count, &fault))
            fail_msg("byte %zu was changed and believed", i);
        assert_true(fault.text[0]);
        made.bytes[i] ^= 0x10;
    }
    assert_int_equal(try_bytes(&made, made.bytes, made.count, &fault), STATUS_OK);
    unmake(&made);
}

// What comes of bringing the pages of the broken file, as registered, to the device.
static enum status bring(struct made *made)
{
    adapter_id id;
    struct fault fault;
    struct adapters *adapters = made->rig.adapters;
    assert_int_equal(adapter_register(adapters, "broken", made->broken, 0, &id, &fault), STATUS_OK);
    adapter_acquire(adapters, id);
    assert_int_equal(adapter_fetch(adapters, id, COPY_STANDARD, COPY_ADAPTER), STATUS_OK);
    tool_rig_settle(&made->rig);
    enum status status = adapter_fetch_status(adapters, id);
    assert_true(adapter_is_resident(adapters, id) == !status);
    adapter_release(adapters, id);
    assert_int_equal(adapter_remove(adapters, "broken"), STATUS_OK);
    tool_rig_settle(&made->rig);
    return status;
}

static void test_adapters_store_every_page_byte_counts(void **state)
{
    struct made made;
    struct fault fault;
    make(&made, *state);
    for (size_t i = PAGE; i < made.count; i += i < LIST_AT - 64 ? 97 : 1) {
        made.bytes[i] ^= 0x10;
        tool_file_write(made.broken, made.bytes, made.count);
        assert_int_equal(adapter_verify(made.broken, &made.base, PAGE, &fault), STATUS_CORRUPT);
        assert_non_null(strstr(fault.text, "pages"));
        if (i < LIST_AT)
            assert_int_equal(bring(&made), STATUS_IO);
        else
            assert_int_equal(try_bytes(&made, made.bytes, made.count, &fault), STATUS_CORRUPT);
        made.bytes[i] ^= 0x10;
    }
    tool_file_write(made.broken, made.bytes, made.count);
    assert_int_equal(bring(&made), STATUS_OK);
    unmake(&made);
}

// Reads of any length, as chunks of the copy queues may be.
static void test_adapters_store_reads_in_parts(void **state)
{
    struct made made;
    struct fault fault;
    struct reader *file, *pages;
    struct adapter_store store;
    struct rng rng = {.seed = 6};
    uint8_t *read = malloc(PAGE);
    make(&made, *state);
    for (int damaged = 0; damaged < 2; damaged++) {
        assert_int_equal(reader_open(made.path, &file, &fault), STATUS_OK);
        assert_int_equal(adapter__store_open(file, "x", &made.base, PAGE, &store, &fault),
                         STATUS_OK);
        assert_int_equal(adapter__store_reader(file, "x", &store, &pages, &fault), STATUS_OK);
        for (int i = 0; i < 200; i++) {
            size_t at = rng_next(&rng) % PAGE, bytes = 1 + rng_next(&rng) % (PAGE - at);
            assert_int_equal(reader_read(pages, PAGE + at, read, bytes),
                             damaged ? STATUS_IO : STATUS_OK);
            if (!damaged)
                assert_memory_equal(read, made.bytes + PAGE + at, bytes);
        }
        assert_int_equal(reader_read(pages, PAGE - 1, read, 2), STATUS_IO);
        assert_int_equal(reader_read(pages, LIST_AT - 1, read, 2), STATUS_IO);
        reader_close(pages);
        adapter__store_clear(&store);
        made.bytes[LIST_AT - 1] ^= 1;
        tool_file_write(made.path, made.bytes, made.count);
    }
    free(read);
    unmake(&made);
}

static void test_adapters_store_wrong_length(void **state)
{
    struct made made;
    struct fault fault;
    make(&made, *state);
    uint8_t *more = calloc(1, made.count + 1);
    memcpy(more, made.bytes, made.count);
    for (size_t i = 0; i < made.count; i += i < 1200 ? 13 : 1021)
        assert_int_equal(try_bytes(&made, made.bytes, i, &fault), STATUS_CORRUPT);
    assert_int_equal(try_bytes(&made, more, made.count + 1, &fault), STATUS_CORRUPT);
    assert_non_null(strstr(fault.text, "which is not what it says"));
    assert_int_equal(try_bytes(&made, made.bytes, 0, &fault), STATUS_CORRUPT);
    assert_non_null(strstr(fault.text, "too short"));
    free(more);
    unmake(&made);
}

// Headers whose seal is right and whose content is not.
static void test_adapters_store_lies(void **state)
{
    static const struct {
        size_t at; // from the beginning of record 1
        uint32_t value;
        const char *what;
    } lies[] = {
        {0, 2, "layer beyond the base"},
        {0, 0xffffffff, "layer beyond all"},
        {4, 7, "embed_tokens in a layer"},
        {4, 9, "module"},
        {8, 1, "expert of a dense matrix"},
        {12, 0x7fc00000, "scale NaN"},
        {12, 0x7f800000, "scale infinite"},
        {16, 1, "slot beyond the pages"},
        {16, 0xffffffff, "slot that overflows"},
        {20, 32, "unaligned first byte"},
        {20, PAGE, "first byte beyond the page"},
        {20, PAGE - 64, "rows that run over the last page"},
        {24, 64, "row shorter than d_in"},
        {24, 0, "no row"},
        {24, 0x80000000, "huge row"},
        {28, 0, "rank 0"},
        {28, 5, "ranks of A and B differ"},
        {28, 513, "rank beyond the limit"},
        {28, 0xffffffff, "rank that overflows"},
        {44, 3, "ranks of A and B differ"},
    };
    struct made made;
    struct fault fault;
    make(&made, *state);
    uint8_t *record = made.bytes + AT_RECORDS + RECORD;
    for (size_t i = 0; i < sizeof lies / sizeof *lies; i++) {
        uint32_t good;
        memcpy(&good, record + lies[i].at, 4);
        put_u32(record + lies[i].at, lies[i].value);
        seal(made.bytes);
        if (try_bytes(&made, made.bytes, made.count, &fault) != STATUS_CORRUPT ||
            !strstr(fault.text, "record 1 of 4 is wrong"))
            fail_msg("%s: %s", lies[i].what, fault.text);
        put_u32(record + lies[i].at, good);
    }
    memcpy(record, record - RECORD, RECORD); // the same matrix twice
    seal(made.bytes);
    assert_int_equal(try_bytes(&made, made.bytes, made.count, &fault), STATUS_CORRUPT);
    unmake(&made);
}

static void test_adapters_store_lying_summary(void **state)
{
    struct made made;
    struct fault fault;
    make(&made, *state);
    for (size_t at = 108; at < 136; at += 4) { // applied, possible, rank_min, rank_max, bytes
        if (at == 124)                         // nothing
            continue;
        made.bytes[at] ^= 1;
        seal(made.bytes);
        assert_int_equal(try_bytes(&made, made.bytes, made.count, &fault), STATUS_CORRUPT);
        assert_non_null(strstr(fault.text, "summary does not fit"));
        made.bytes[at] ^= 1;
    }
    memset(made.bytes + 136, 'x', 64); // layout without an end
    seal(made.bytes);
    assert_int_equal(try_bytes(&made, made.bytes, made.count, &fault), STATUS_CORRUPT);
    assert_non_null(strstr(fault.text, "text without an end"));
    unmake(&made);
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

// A server of before has written others: they are refused by name, also when nothing else is wrong.
static void test_adapters_store_other_versions(void **state)
{
    struct made made;
    struct fault fault;
    make(&made, *state);
    for (uint32_t version = 0; version < 7; version++) {
        put_u32(made.bytes + 8, version);
        seal(made.bytes);
        enum status status = try_bytes(&made, made.bytes, made.count, &fault);
        assert_int_equal(status, version == 5 ? STATUS_OK : STATUS_CORRUPT);
        assert_true(version == 5 || strstr(fault.text, "of version 5: register the adapter again"));
    }
    unmake(&made);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_adapters_store_is_reproducible),
        cmocka_unit_test(test_adapters_store_other_base),
        cmocka_unit_test(test_adapters_store_every_header_byte_counts),
        cmocka_unit_test(test_adapters_store_every_page_byte_counts),
        cmocka_unit_test(test_adapters_store_reads_in_parts),
        cmocka_unit_test(test_adapters_store_wrong_length),
        cmocka_unit_test(test_adapters_store_lies),
        cmocka_unit_test(test_adapters_store_lying_summary),
        cmocka_unit_test(test_adapters_store_other_versions),
    };
    return cmocka_run_group_tests_name("adapters_store", tests, setup, teardown);
}
