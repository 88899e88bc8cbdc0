// SPDX-License-Identifier: Apache-2.0
// runtime/tokenizer against the `tokenizers` package: 20,000 generated strings, and every code
// point, for the tokenizers of tests/golden/tokenizer (made by tools/goldens/tokenizer.py, which
// has the same generator). Compared per string: a hash of the ids and of the text they decode to.
// The text is decoded by the stream, one id at a time, and checked to be whole characters after
// every id; the raw bytes must be the text itself where the tokenizer changes nothing.
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <cmocka.h>

#include "base/reader.h"
#include "base/rng.h"
#include "runtime/tokenizer/tokenizer.h"

#define DIRECTORY POLDER_SOURCE_DIR "/tests/golden/tokenizer"

enum {
    STRINGS = 20000,
    SEED = 20261123,
    POINTS_PER_STRING = 64,
    TEXT_MAX = 1 << 16,
    ATOMS_MAX = 4096
};

struct atoms {
    char *text; // decoded in place
    const uint8_t *atom[ATOMS_MAX];
    size_t bytes[ATOMS_MAX];
    size_t count;
};

struct text {
    uint8_t bytes[TEXT_MAX];
    size_t count;
};

// Fills the caller's variable: of one that is returned gcc 12 fears that it points to itself.
static void slurp(const char *name, char **text, size_t *bytes)
{
    struct fault fault = {0};
    if (reader_slurp_in(DIRECTORY, name, 1 << 24, text, bytes, &fault))
        fail_msg("%s: %s", name, fault.text);
}

static unsigned hex_digit(char c)
{
    return (unsigned)(c <= '9' ? c - '0' : c - 'a' + 10);
}

static void load_atoms(struct atoms *atoms)
{
    size_t bytes;
    slurp("atoms.txt", &atoms->text, &bytes);
    atoms->count = 0;
    for (char *line = strtok(atoms->text, "\n"); line; line = strtok(NULL, "\n")) {
        size_t n = strlen(line) / 2;
        for (size_t i = 0; i < n; i++)
            line[i] = (char)(hex_digit(line[2 * i]) << 4 | hex_digit(line[2 * i + 1]));
        assert_true(atoms->count < ATOMS_MAX);
        atoms->atom[atoms->count] = (const uint8_t *)line;
        atoms->bytes[atoms->count++] = n;
    }
}

static void add_bytes(struct text *text, const uint8_t *bytes, size_t count)
{
    assert_true(text->count + count <= TEXT_MAX);
    memcpy(text->bytes + text->count, bytes, count);
    text->count += count;
}

static void add_point(struct text *text, uint32_t point)
{
    uint8_t b[4];
    size_t n = point < 0x80 ? 1 : point < 0x800 ? 2 : point < 0x10000 ? 3 : 4;
    static const uint8_t lead[] = {0, 0, 0xc0, 0xe0, 0xf0};
    for (size_t i = n - 1; i > 0; i--, point >>= 6)
        b[i] = (uint8_t)(0x80 | (point & 0x3f));
    b[0] = (uint8_t)(lead[n] | point);
    add_bytes(text, b, n);
}

// make_string of tools/goldens/tokenizer.py
static void make_string(const struct atoms *atoms, size_t index, struct text *text)
{
    struct rng rng = {.seed = SEED + index};
    text->count = 0;
    for (uint64_t parts = 1 + rng_below(&rng, 10); parts > 0; parts--) {
        uint64_t kind = rng_below(&rng, 10), which, times = 1;
        if (kind == 6) {
            add_point(text, ' ');
        } else if (kind == 7) {
            uint32_t point = (uint32_t)rng_below(&rng, 0x110000);
            add_point(text, point - (point >= 0xd800 && point <= 0xdfff ? 0xd800 : 0));
        } else if (kind == 8) {
            add_point(text, (uint32_t)rng_below(&rng, 0x3000));
        } else {
            which = rng_below(&rng, atoms->count);
            times = kind == 9 ? 1 + rng_below(&rng, 24) : 1;
            while (times--)
                add_bytes(text, atoms->atom[which], atoms->bytes[which]);
        }
    }
}

static void make_points(size_t index, struct text *text)
{
    text->count = 0;
    for (size_t i = index * POINTS_PER_STRING; i < (index + 1) * POINTS_PER_STRING; i++) {
        size_t point = i < 0xd800 ? i : i + 0x800;
        if (point < 0x110000)
            add_point(text, (uint32_t)point);
    }
}

static uint64_t hash_more(uint64_t h, const void *data, size_t bytes)
{
    const uint8_t *p = data;
    for (size_t i = 0; i < bytes; i++)
        h = (h ^ p[i]) * 0x100000001b3u;
    return h;
}

// Independent of the library: is this exactly a row of whole characters?
static bool whole_characters(const uint8_t *p, size_t bytes)
{
    for (size_t i = 0; i < bytes;) {
        uint8_t b = p[i++];
        if (b >= 0x80 && b < 0xc2)
            return false;
        int more = b < 0x80 ? 0 : b < 0xe0 ? 1 : b < 0xf0 ? 2 : 3;
        uint32_t point = more == 0 ? b : more == 1 ? b & 0x1f : more == 2 ? b & 0x0f : b & 0x07;
        for (; more > 0; more--, i++) {
            if (i == bytes || (p[i] & 0xc0) != 0x80)
                return false;
            point = point << 6 | (p[i] & 0x3f);
        }
        if (point > 0x10ffff || (point >= 0xd800 && point <= 0xdfff))
            return false;
    }
    return true;
}

struct config {
    const char *name, *tokenizer;
    unsigned flags;
    bool every_point;
    bool same_bytes; // nothing is normalized, removed or put in front
};

static uint32_t check_string(const struct tokenizer *t, struct token_scratch *scratch,
                             const struct config *config, const struct text *text)
{
    struct token_list list = {0};
    struct fault fault = {0};
    if (tokenizer_encode(t, scratch, text->bytes, text->count, config->flags, SIZE_MAX, &list,
                         &fault))
        fail_msg("%s", fault.text);
    uint64_t h = hash_more(0xcbf29ce484222325u, list.ids, list.count * sizeof *list.ids);
    struct token_stream stream = {.keep_special = true};
    for (size_t i = 0; i <= list.count; i++) {
        char out[TOKEN_STREAM_ROOM];
        size_t n = i < list.count ? token_stream_push(t, &stream, list.ids[i], out)
                                  : token_stream_flush(&stream, out);
        assert_true(whole_characters((const uint8_t *)out, n));
        h = hash_more(h, out, n);
    }
    if (config->same_bytes) {
        static uint8_t bytes[2 * TEXT_MAX];
        bool template = config->flags & TOKENIZE_TEMPLATE; // one BOS
        size_t n = tokenizer_decode(t, list.ids + template, list.count - template, false, bytes,
                                    sizeof bytes);
        assert_int_equal(n, text->count);
        assert_memory_equal(bytes, text->bytes, n);
    }
    token_list_clear(&list);
    return (uint32_t)(h ^ h >> 32);
}

static void check_config(const struct config *config)
{
    static struct atoms atoms;
    static struct text text;
    char name[64];
    struct tokenizer *t;
    struct token_scratch *scratch;
    struct fault fault = {0};
    size_t bytes, wrong = 0;
    (void)snprintf(name, sizeof name, "%s.json", config->tokenizer);
    char *json;
    slurp(name, &json, &bytes);
    if (tokenizer_load(name, json, bytes, &t, &fault))
        fail_msg("%s", fault.text);
    free(json);
    (void)snprintf(name, sizeof name, "%s.u32", config->name);
    char *expected;
    slurp(name, &expected, &bytes);
    size_t count = bytes / 4, points = config->every_point ? 17376 : 0;
    assert_int_equal(count, STRINGS + points);
    assert_int_equal(token_scratch_create(&scratch), STATUS_OK);
    load_atoms(&atoms);
    for (size_t i = 0; i < count; i++) {
        uint32_t want;
        if (i < STRINGS)
            make_string(&atoms, i, &text);
        else
            make_points(i - STRINGS, &text);
        memcpy(&want, expected + 4 * i, 4);
        if (check_string(t, scratch, config, &text) != want && wrong++ < 20)
            print_error("%s: string %zu differs\n", config->name, i);
    }
    print_message("%s: %zu strings compared, %zu differ\n", config->name, count, wrong);
    assert_int_equal(wrong, 0);
    token_scratch_destroy(scratch);
    tokenizer_free(t);
    free(expected);
    free(atoms.text);
}

#define CONFIGS(X)                                                                                 \
    X(qwen, "qwen", TOKENIZE_SPECIAL, true, false)                                                 \
    X(qwen_plain, "qwen", 0, false, false)                                                         \
    X(gpt2, "gpt2", TOKENIZE_SPECIAL, true, true)                                                  \
    X(gpt2_prefix, "gpt2_prefix", TOKENIZE_SPECIAL, false, false)                                  \
    X(gpt2_prefix_plain, "gpt2_prefix", 0, false, false)                                           \
    X(llama, "llama", TOKENIZE_SPECIAL | TOKENIZE_TEMPLATE, true, true)                            \
    X(llama_plain, "llama", TOKENIZE_TEMPLATE, false, true)                                        \
    X(deepseek, "deepseek", TOKENIZE_SPECIAL, true, false)                                         \
    X(o200k, "o200k", TOKENIZE_SPECIAL, true, false)                                               \
    X(odd, "odd", TOKENIZE_SPECIAL, true, false)                                                   \
    X(odd_plain, "odd", 0, false, false)                                                           \
    X(previous, "previous", TOKENIZE_SPECIAL, false, true)                                         \
    X(next, "next", TOKENIZE_SPECIAL, false, true)                                                 \
    X(contiguous, "contiguous", TOKENIZE_SPECIAL, false, true)                                     \
    X(empty, "empty", TOKENIZE_SPECIAL, false, true)

#define X(label, file, flags, every_point, same_bytes)                                             \
    static void test_tokenizer_equals_package_##label(void **state)                                \
    {                                                                                              \
        (void)state;                                                                               \
        check_config(&(struct config){#label, file, flags, every_point, same_bytes});              \
    }
CONFIGS(X)
#undef X

// A tokenizer with one Split stage that leaves only what the class matches.
static struct tokenizer *load_class(const char *json, const char *class)
{
    static const char key[] = "\"pre_tokenizer\":", behind[] = ",\"post_processor\":";
    const char *begin = strstr(json, key), *end = strstr(json, behind);
    assert_true(begin && end);
    size_t room = strlen(json) + 1024;
    char *text = malloc(room);
    assert_non_null(text);
    (void)snprintf(text, room,
                   "%.*s%s{\"type\":\"Sequence\",\"pretokenizers\":[{\"type\":\"Split\","
                   "\"pattern\":{\"Regex\":\"\\%s\"},\"behavior\":\"Removed\",\"invert\":true},"
                   "{\"type\":\"ByteLevel\",\"add_prefix_space\":false,\"use_regex\":false}]}%s",
                   (int)(begin - json), json, key, class, end);
    struct tokenizer *t;
    struct fault fault = {0};
    if (tokenizer_load(class, text, strlen(text), &t, &fault))
        fail_msg("%s", fault.text);
    free(text);
    return t;
}

static uint64_t hash_class(const struct tokenizer *t)
{
    static struct text text;
    struct token_scratch *scratch;
    uint64_t h = 0xcbf29ce484222325u;
    assert_int_equal(token_scratch_create(&scratch), STATUS_OK);
    for (size_t i = 0; i < 17376; i++) {
        struct token_list list = {0};
        uint8_t bytes[4 * POINTS_PER_STRING];
        make_points(i, &text);
        assert_int_equal(
            tokenizer_encode(t, scratch, text.bytes, text.count, 0, SIZE_MAX, &list, NULL),
            STATUS_OK);
        h = hash_more(h, bytes,
                      tokenizer_decode(t, list.ids, list.count, false, bytes, sizeof bytes));
        token_list_clear(&list);
    }
    token_scratch_destroy(scratch);
    return h;
}

static void test_tokenizer_classes_have_the_packages_members(void **state)
{
    (void)state;
    size_t bytes;
    int classes = 0;
    char *json, *lines, class[32];
    unsigned long long want;
    slurp("llama.json", &json, &bytes);
    slurp("classes.txt", &lines, &bytes);
    for (char *line = strtok(lines, "\n"); line; line = strtok(NULL, "\n"), classes++) {
        assert_int_equal(sscanf(line, "%31s %llx", class, &want), 2);
        if (class[0] == '.')
            (void)strcpy(class, "u002E"); // load_class puts a backslash in front
        struct tokenizer *t = load_class(json, class);
        if (hash_class(t) != want)
            fail_msg("the class %s has other members", class);
        tokenizer_free(t);
    }
    print_message("%d classes compared over all code points\n", classes);
    free(json);
    free(lines);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_tokenizer_classes_have_the_packages_members),
#define X(label, file, flags, every_point, same_bytes)                                             \
    cmocka_unit_test(test_tokenizer_equals_package_##label),
        CONFIGS(X)
#undef X
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
