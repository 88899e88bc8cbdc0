// SPDX-License-Identifier: Apache-2.0
// runtime/tokenizer on its own: what is refused, bytes that are not text, special tokens, limits,
// streams, words of a megabyte, failing allocations. Equality with the package is
// test_tokenizer_golden.c. The program is linked with --wrap for malloc, calloc and realloc, so
// that the n-th one can fail.
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <pthread.h>
#include <time.h>

#include <cmocka.h>

#include "base/reader.h"
#include "base/rng.h"
#include "runtime/tokenizer/tokenizer.h"

#define DIRECTORY POLDER_SOURCE_DIR "/tests/golden/tokenizer"

#if defined(__SANITIZE_ADDRESS__) || defined(__SANITIZE_THREAD__)
#define SLOW_BUILD true
#else
#define SLOW_BUILD false
#endif

// ---- allocations that fail ----

void *__real_malloc(size_t bytes);
void *__real_calloc(size_t count, size_t bytes);
void *__real_realloc(void *old, size_t bytes);
void *__wrap_malloc(size_t bytes);
void *__wrap_calloc(size_t count, size_t bytes);
void *__wrap_realloc(void *old, size_t bytes);

static long allocations_left = -1; // negative: none fails

static bool fails_now(void)
{
    if (allocations_left > 0)
        allocations_left--;
    return allocations_left == 0;
}

void *__wrap_malloc(size_t bytes)
{
    return fails_now() ? NULL : __real_malloc(bytes);
}

void *__wrap_calloc(size_t count, size_t bytes)
{
    return fails_now() ? NULL : __real_calloc(count, bytes);
}

void *__wrap_realloc(void *old, size_t bytes)
{
    return fails_now() ? NULL : __real_realloc(old, bytes);
}

// ---- a small file, one part of which a test replaces ----

struct spec {
    const char *vocab; // more entries, each beginning with a comma
    const char *merges, *settings, *added, *normalizer, *pre_tokenizer, *processor, *decoder, *top;
    int missing_byte; // 1 + the byte left out
};

static const char *or_else(const char *text, const char *fallback)
{
    return text ? text : fallback;
}

static int alphabet(int byte)
{
    int next = 256;
    for (int b = 0; b < 256; b++) {
        bool itself = (b >= 33 && b <= 126) || (b >= 161 && b <= 172) || b >= 174;
        if (b == byte)
            return itself ? b : next;
        next += !itself;
    }
    return 0;
}

static const char byte_level[] =
    "{\"type\":\"ByteLevel\",\"add_prefix_space\":false,\"trim_offsets\":true,\"use_regex\":false}";

// ids: bytes 0..255, then what spec->vocab says. The caller frees.
static char *make_json(const struct spec *spec, size_t *bytes)
{
    char *text = NULL;
    FILE *file = open_memstream(&text, bytes);
    (void)fprintf(file, "{\"version\":\"1.0\",%s\"added_tokens\":[%s],\"normalizer\":%s,",
                  or_else(spec->top, ""), or_else(spec->added, ""),
                  or_else(spec->normalizer, "null"));
    (void)fprintf(file, "\"pre_tokenizer\":%s,\"post_processor\":%s,\"decoder\":%s,",
                  or_else(spec->pre_tokenizer, byte_level), or_else(spec->processor, "null"),
                  or_else(spec->decoder, byte_level));
    (void)fprintf(file, "\"model\":{\"type\":\"BPE\",%s\"vocab\":{", or_else(spec->settings, ""));
    for (int byte = 0, first = 1; byte < 256; byte++)
        if (byte + 1 != spec->missing_byte) {
            (void)fprintf(file, "%s\"\\u%04x\":%d", first ? "" : ",", (unsigned)alphabet(byte),
                          byte);
            first = 0;
        }
    (void)fprintf(file, "%s},\"merges\":[%s]}}", or_else(spec->vocab, ""),
                  or_else(spec->merges, ""));
    (void)fclose(file);
    return text;
}

static enum status try_load(const struct spec *spec, struct tokenizer **out, struct fault *fault)
{
    size_t bytes;
    char *json = make_json(spec, &bytes);
    enum status status = tokenizer_load("t.json", json, bytes, out, fault);
    free(json);
    return status;
}

static struct tokenizer *load(const struct spec *spec)
{
    struct tokenizer *t;
    struct fault fault = {0};
    if (try_load(spec, &t, &fault))
        fail_msg("%s", fault.text);
    return t;
}

static struct tokenizer *load_file(const char *name)
{
    char *json;
    size_t bytes;
    struct tokenizer *t = NULL;
    struct fault fault = {0};
    if (reader_slurp_in(DIRECTORY, name, 1 << 24, &json, &bytes, &fault) ||
        tokenizer_load(name, json, bytes, &t, &fault))
        fail_msg("%s", fault.text);
    free(json);
    return t;
}

static struct token_list encode(const struct tokenizer *t, const void *text, size_t bytes,
                                unsigned flags)
{
    struct token_scratch *scratch;
    struct token_list list = {0};
    struct fault fault = {0};
    assert_int_equal(token_scratch_create(&scratch), STATUS_OK);
    if (tokenizer_encode(t, scratch, text, bytes, flags, SIZE_MAX, &list, &fault))
        fail_msg("%s", fault.text);
    token_scratch_destroy(scratch);
    return list;
}

static void assert_ids(const struct tokenizer *t, const char *text, unsigned flags, size_t count,
                       const uint32_t *ids)
{
    struct token_list list = encode(t, text, strlen(text), flags);
    assert_int_equal(list.count, count);
    assert_memory_equal(list.ids, ids, count * sizeof *ids);
    token_list_clear(&list);
}

#define IDS(...)                                                                                   \
    sizeof((uint32_t[]){__VA_ARGS__}) / 4, (uint32_t[])                                            \
    {                                                                                              \
        __VA_ARGS__                                                                                \
    }

static const char abc_vocab[] = ",\"ab\":256,\"abc\":257,\"bc\":258";

static void test_tokenizer_merges_as_strings_or_pairs(void **state)
{
    (void)state;
    const char *const merges[] = {"\"#version: 0.2\",\"b c\",\"a b\",\"a bc\"",
                                  "[\"b\",\"c\"],[\"a\",\"b\"],[\"a\",\"bc\"]"};
    for (int i = 0; i < 2; i++) {
        struct tokenizer *t = load(&(struct spec){.vocab = abc_vocab, .merges = merges[i]});
        assert_ids(t, "abc", 0, IDS(257));
        assert_ids(t, "ababcb", 0, IDS(256, 257, 'b'));
        assert_ids(t, "", 0, 0, NULL);
        tokenizer_free(t);
    }
    struct tokenizer *t = load(&(struct spec){.vocab = abc_vocab, .merges = "\"a b\""});
    assert_ids(t, "abc", 0, IDS(256, 'c'));
    tokenizer_free(t);
    t = load(&(struct spec){.vocab = abc_vocab, .settings = "\"ignore_merges\":true,"});
    assert_ids(t, "abc", 0, IDS(257));
    assert_ids(t, "abcb", 0, IDS('a', 'b', 'c', 'b'));
    tokenizer_free(t);
}

#define ADDED(id, content, flags)                                                                  \
    "{\"id\":" #id ",\"content\":\"" content "\",\"single_word\":false,\"lstrip\":false,"          \
    "\"rstrip\":false," flags "}"
#define SPECIAL "\"normalized\":false,\"special\":true"
#define PLAIN "\"normalized\":false,\"special\":false"
#define SEQUENCE(list) "{\"type\":\"Sequence\",\"pretokenizers\":[" list "]}"
#define LEVEL                                                                                      \
    "{\"type\":\"ByteLevel\",\"add_prefix_space\":false,\"trim_offsets\":true,\"use_regex\":"      \
    "false}"

struct refusal {
    struct spec spec;
    enum status status;
    const char *says;
};

static const struct refusal refusals[] = {
    {{.settings = "\"dropout\":0.1,"}, STATUS_UNSUPPORTED, "dropout"},
    {{.settings = "\"byte_fallback\":true,"}, STATUS_UNSUPPORTED, "byte_fallback"},
    {{.settings = "\"end_of_word_suffix\":\"</w>\","}, STATUS_UNSUPPORTED, "end_of_word_suffix"},
    {{.settings = "\"continuing_subword_prefix\":\"##\","}, STATUS_UNSUPPORTED, "continuing_"},
    {{.settings = "\"surprise\":1,"}, STATUS_UNSUPPORTED, "surprise"},
    {{.settings = "\"ignore_merges\":1,"}, STATUS_CORRUPT, "ignore_merges"},
    {{.settings = "\"type\":\"BPE\","}, STATUS_CORRUPT, "duplicate"},
    {{.settings = "\"dropout\":NaN,"}, STATUS_CORRUPT, "t.json:1:"},
    {{.top = "\"truncation\":{},"}, STATUS_UNSUPPORTED, "truncation"},
    {{.top = "\"padding\":{},"}, STATUS_UNSUPPORTED, "padding"},
    {{.top = "\"novelty\":{},"}, STATUS_UNSUPPORTED, "novelty"},
    {{.normalizer = "{\"type\":\"Lowercase\"}"}, STATUS_UNSUPPORTED, "Lowercase"},
    {{.normalizer = "7"}, STATUS_CORRUPT, "type"},
    {{.pre_tokenizer = "null"}, STATUS_UNSUPPORTED, "without ByteLevel"},
    {{.pre_tokenizer = "{\"type\":\"Metaspace\"}"}, STATUS_UNSUPPORTED, "Metaspace"},
    {{.pre_tokenizer = SEQUENCE("")}, STATUS_UNSUPPORTED, "without ByteLevel"},
    {{.pre_tokenizer = SEQUENCE(LEVEL "," LEVEL)}, STATUS_UNSUPPORTED, "after ByteLevel"},
    {{.decoder = "null"}, STATUS_UNSUPPORTED, "decoder"},
    {{.decoder = "{\"type\":\"Fuse\"}"}, STATUS_UNSUPPORTED, "Fuse"},
    {{.processor = "{\"type\":\"BertProcessing\"}"}, STATUS_UNSUPPORTED, "BertProcessing"},
    {{.processor = "{\"type\":\"TemplateProcessing\",\"single\":[],\"special_tokens\":{}}"},
     STATUS_UNSUPPORTED,
     "without the text"},
    {{.vocab = ",\"ab\":255"}, STATUS_CORRUPT, "id 255"},
    {{.vocab = ",\"ab\":-1"}, STATUS_CORRUPT, "'ab'"},
    {{.vocab = ",\"ab\":2097152"}, STATUS_CORRUPT, "'ab'"},
    {{.vocab = ",\"ab\":4294967296"}, STATUS_CORRUPT, "'ab'"},
    {{.vocab = ",\"ab\":256.0"}, STATUS_CORRUPT, "'ab'"},
    {{.vocab = ",\"ab\":null"}, STATUS_CORRUPT, "'ab'"},
    {{.vocab = ",\"ab\":99999999999999999999"}, STATUS_CORRUPT, "t.json:1:"},
    {{.vocab = ",\"a\":256"}, STATUS_CORRUPT, "duplicate"},
    {{.missing_byte = 1 + 0xc3}, STATUS_UNSUPPORTED, "0xc3"},
    {{.merges = "\"a b\""}, STATUS_CORRUPT, "gives a token"},
    {{.merges = "\"a bc\""}, STATUS_CORRUPT, "names a token"},
    {{.merges = "\"ab\""}, STATUS_CORRUPT, "not a pair"},
    {{.merges = "\"a b c\""}, STATUS_CORRUPT, "not a pair"},
    {{.merges = "[\"a\"]"}, STATUS_CORRUPT, "not a pair"},
    {{.merges = "7"}, STATUS_CORRUPT, "not a pair"},
    {{.vocab = abc_vocab, .merges = "\"a b\",[\"b\",\"c\"]"}, STATUS_CORRUPT, "all strings"},
    {{.added = ADDED(300, "<s>", SPECIAL)}, STATUS_CORRUPT, "gives it 256"},
    {{.added = ADDED(256, "", SPECIAL)}, STATUS_CORRUPT, "1 to 1024"},
    {{.added = ADDED(98, "a", PLAIN)}, STATUS_CORRUPT, "gives it 97"},
    {{.added = ADDED(256, "<s>", SPECIAL) "," ADDED(257, "<s>", SPECIAL)}, STATUS_CORRUPT, "twice"},
    {{.added = ADDED(97, "a", SPECIAL)}, STATUS_UNSUPPORTED, "ordinary text"},
    {{.vocab = abc_vocab, .merges = "\"a b\"", .added = ADDED(256, "ab", SPECIAL)},
     STATUS_UNSUPPORTED,
     "ordinary text"},
    {{.added = ADDED(233, "\\u00e9", PLAIN)}, STATUS_UNSUPPORTED, "other bytes"},
    {{.added = "{\"id\":256,\"content\":\"<s>\"}"}, STATUS_CORRUPT, "missing"},
    {{.added = ADDED(256, "x\\u0000y", PLAIN)}, STATUS_CORRUPT, "content"},
    {{.added = "17"}, STATUS_CORRUPT, "missing"},
};

static void test_tokenizer_refuses_by_name(void **state)
{
    (void)state;
    for (size_t i = 0; i < sizeof refusals / sizeof refusals[0]; i++) {
        struct tokenizer *t;
        struct fault fault = {0};
        enum status status = try_load(&refusals[i].spec, &t, &fault);
        if (status != refusals[i].status || !strstr(fault.text, refusals[i].says))
            fail_msg("refusal %zu: %s, '%s' (wanted %s, '%s')", i, status_code(status), fault.text,
                     status_code(refusals[i].status), refusals[i].says);
        assert_null(t);
        assert_int_equal(strncmp(fault.text, "t.json", 6), 0);
    }
    print_message("%zu files refused\n", sizeof refusals / sizeof refusals[0]);
}

static void test_tokenizer_survives_nasty_json(void **state)
{
    (void)state;
    size_t bytes, full;
    struct tokenizer *t;
    struct fault fault;
    char *deep = malloc(200000), *json = make_json(&(struct spec){.vocab = abc_vocab}, &full);
    memset(deep, '[', 100000);
    memset(deep + 100000, ']', 100000);
    assert_int_equal(tokenizer_load("deep", deep, 200000, &t, &fault), STATUS_LIMIT);
    for (bytes = 0; bytes < full; bytes += 7)
        assert_int_equal(tokenizer_load("cut", json, bytes, &t, &fault), STATUS_CORRUPT);
    assert_int_equal(tokenizer_load("null", "null", 4, &t, &fault), STATUS_CORRUPT);
    assert_int_equal(tokenizer_load("list", "[]", 2, &t, &fault), STATUS_CORRUPT);
    assert_int_equal(tokenizer_load("map", "{}", 2, &t, &fault), STATUS_CORRUPT);
    assert_int_equal(tokenizer_load_in("/nonexistent", &t, NULL), STATUS_NOT_FOUND);
    free(json);
    free(deep);
}

static enum status load_pattern(const char *pattern, struct tokenizer **t, struct fault *fault)
{
    char split[2048];
    (void)snprintf(split, sizeof split,
                   SEQUENCE("{\"type\":\"Split\",\"pattern\":{\"Regex\":\"%s\"},"
                            "\"behavior\":\"Isolated\",\"invert\":false}," LEVEL),
                   pattern);
    return try_load(&(struct spec){.pre_tokenizer = split}, t, fault);
}

static void test_tokenizer_refuses_patterns_that_mean_something_else(void **state)
{
    (void)state;
    static const char *const patterns[] = {
        "^a",
        "a$",
        "\\\\ba",
        "\\\\w+",
        "[\\\\w]",
        "\\\\h",
        "\\\\R",
        "\\\\p{Han}",
        "\\\\p{Mn}",
        "\\\\p{^L}",
        "\\\\pL",
        "[[:alpha:]]",
        "[a&&b]",
        "[a[b]]",
        "[]a]",
        "[a",
        "a]b)",
        "(a",
        "(?<n>a)",
        "(?i)a",
        "(?m:a)",
        "(?i:ss)",
        "(?i:[sf]t)",
        "(?i:\\u00e9)",
        "(?i:a+)",
        "(?i:[^a])",
        "(?i:(?:a))",
        "(?#c)",
        "(*ACCEPT)",
        "a{2}?",
        "a{1,2}+",
        "a{,2}",
        "a{2,1}",
        "a{1001}",
        "a**",
        "a+?+",
        "a{2}{3}",
        "\\\\1",
        "\\\\k<n>",
        "\\\\xff",
        "\\\\x{110000}",
        "\\\\ud800",
        "[\\\\P{L}]",
        "[\\\\s-x]",
        "[z-a]",
        "[a-\\\\p{L}]",
        "*a",
        "\\\\Qa\\\\E",
        "(?<=a+)b",
        "\\\\",
        "[a-c-e]",
        "\\\\C",
        "\\\\K",
        "(?R)",
    };
    size_t count = sizeof patterns / sizeof patterns[0];
    for (size_t i = 0; i < count; i++) {
        struct tokenizer *t;
        struct fault fault = {0};
        enum status status = load_pattern(patterns[i], &t, &fault);
        if (status != STATUS_UNSUPPORTED || !strstr(fault.text, "pattern"))
            fail_msg("pattern %s: %s %s", patterns[i], status_code(status), fault.text);
    }
    print_message("%zu patterns refused\n", count);
}

static void test_tokenizer_ends_patterns_that_explode(void **state)
{
    (void)state;
    struct tokenizer *t;
    struct fault fault = {0};
    struct token_scratch *scratch;
    struct token_list list = {0};
    char text[4000];
    memset(text, 'a', sizeof text);
    assert_int_equal(load_pattern("(?:a|aa)+[bc]", &t, &fault), STATUS_OK);
    assert_int_equal(token_scratch_create(&scratch), STATUS_OK);
    assert_int_equal(tokenizer_encode(t, scratch, text, sizeof text, 0, SIZE_MAX, &list, &fault),
                     STATUS_LIMIT);
    assert_non_null(strstr(fault.text, "gave up"));
    assert_int_equal(list.count, 0);
    token_list_clear(&list);
    token_scratch_destroy(scratch);
    tokenizer_free(t);
}

static void test_tokenizer_makes_special_tokens_only_when_asked(void **state)
{
    (void)state;
    struct tokenizer *t =
        load(&(struct spec){.vocab = ",\"<s>\":256",
                            .settings = "\"ignore_merges\":true,",
                            .added = ADDED(256, "<s>", SPECIAL) "," ADDED(
                                257, "<t>", PLAIN) "," ADDED(258, "<s><t>", SPECIAL)});
    uint32_t id;
    assert_ids(t, "a<s>b", TOKENIZE_SPECIAL, IDS('a', 256, 'b'));
    assert_ids(t, "a<s>b", 0, IDS('a', '<', 's', '>', 'b'));
    assert_ids(t, "<s>", 0, IDS('<', 's', '>')); // in spite of ignore_merges
    assert_ids(t, "<t>", 0, IDS(257));           // added, but not special
    assert_ids(t, "<s><t>", TOKENIZE_SPECIAL, IDS(258));
    assert_ids(t, "<s><s>", TOKENIZE_SPECIAL, IDS(256, 256));
    assert_true(tokenizer_is_special(t, 256));
    assert_false(tokenizer_is_special(t, 257));
    assert_false(tokenizer_is_special(t, UINT32_MAX));
    assert_true(tokenizer_find(t, "<s>", 3, &id) && id == 256);
    assert_true(tokenizer_find(t, "a", 1, &id) && id == 'a');
    assert_false(tokenizer_find(t, "<u>", 3, &id));
    assert_int_equal(tokenizer_count(t), 259);
    assert_int_equal(tokenizer_id_limit(t), 259);
    tokenizer_free(t);
}

// Text of any bytes comes back as it was; through the stream it comes as whole characters.
static void check_bytes(const struct tokenizer *t, const uint8_t *text, size_t bytes)
{
    uint8_t back[512];
    struct token_list list = encode(t, text, bytes, TOKENIZE_SPECIAL);
    assert_int_equal(tokenizer_decode(t, list.ids, list.count, false, back, sizeof back), bytes);
    assert_memory_equal(back, text, bytes);
    token_list_clear(&list);
}

static void test_tokenizer_gives_back_broken_utf8(void **state)
{
    (void)state;
    static const char *const nasty[] = {"\xff",
                                        "\x80",
                                        "a\xc3",
                                        "\xe4\xb8",
                                        "\xf0\x9f\x98",
                                        "\xc0\x80",
                                        "\xed\xa0\x80",
                                        "\xf4\x90\x80\x80",
                                        "caf\xc3 \xa9",
                                        "\xe4\xb8\xad\xe4\xb8",
                                        "<|endof\xfftext|>",
                                        "\xff<|endoftext|>\xff",
                                        "\xef\xbf\xbd",
                                        "\xc3\xc3\xa9",
                                        "\xf8\x88\x80\x80\x80",
                                        "e\xcc\x81\xcc"};
    const char *const files[] = {"gpt2.json", "llama.json"};
    static const uint8_t pool[] = {'a',  ' ',  '\n', 0x80, 0xbf, 0xc3, 0xa9,
                                   0xe4, 0xb8, 0xad, 0xf0, 0x9f, 0x98, 0};
    for (int k = 0; k < 2; k++) {
        struct tokenizer *t = load_file(files[k]);
        struct rng rng = {.seed = 5};
        for (size_t i = 0; i < sizeof nasty / sizeof nasty[0]; i++)
            check_bytes(t, (const uint8_t *)nasty[i], strlen(nasty[i]));
        for (int i = 0; i < 20000; i++) {
            uint8_t text[64];
            size_t n = rng_below(&rng, sizeof text);
            for (size_t j = 0; j < n; j++)
                text[j] =
                    i & 1 ? (uint8_t)rng_below(&rng, 256) : pool[rng_below(&rng, sizeof pool)];
            check_bytes(t, text, n);
        }
        tokenizer_free(t);
    }
    // A run of bad bytes is a word of its own; the text beside it is encoded as if it stood alone.
    struct tokenizer *t = load(&(struct spec){.vocab = abc_vocab, .merges = "\"a b\""});
    assert_ids(t,
               "ab\xff\xfe"
               "ab",
               0, IDS(256, 0xff, 0xfe, 256));
    tokenizer_free(t);
}

static void test_token_stream_holds_back_half_characters(void **state)
{
    (void)state;
    struct tokenizer *t = load(&(struct spec){.added = ADDED(256, "<s>", SPECIAL)});
    struct token_stream stream = {0};
    char out[TOKEN_STREAM_ROOM];
    const uint32_t smile[] = {0xf0, 0x9f, 0x98};
    for (int i = 0; i < 3; i++)
        assert_int_equal(token_stream_push(t, &stream, smile[i], out), 0);
    assert_int_equal(token_stream_push(t, &stream, 0x80, out), 4);
    assert_memory_equal(out, "\xf0\x9f\x98\x80", 4);
    assert_int_equal(token_stream_flush(&stream, out), 0);
    assert_int_equal(token_stream_push(t, &stream, 0xe4, out), 0);
    assert_int_equal(token_stream_push(t, &stream, 'a', out), 4); // U+FFFD, then a
    assert_memory_equal(out,
                        "\xef\xbf\xbd"
                        "a",
                        4);
    assert_int_equal(token_stream_push(t, &stream, 256, out), 0); // special
    assert_int_equal(token_stream_push(t, &stream, 100000, out), 0);
    stream.keep_special = true;
    assert_int_equal(token_stream_push(t, &stream, 256, out), 3);
    assert_int_equal(token_stream_push(t, &stream, 0xc3, out), 0);
    assert_int_equal(token_stream_flush(&stream, out), 3);
    assert_memory_equal(out, "\xef\xbf\xbd", 3);
    assert_int_equal(token_stream_flush(&stream, out), 0);
    tokenizer_free(t);
}

static void test_tokenizer_keeps_limits(void **state)
{
    (void)state;
    struct tokenizer *t = load(&(struct spec){0});
    struct token_scratch *scratch;
    struct token_list list = {0};
    struct fault fault;
    assert_int_equal(token_scratch_create(&scratch), STATUS_OK);
    assert_int_equal(tokenizer_encode(t, scratch, "abc", 3, 0, 3, &list, &fault), STATUS_OK);
    assert_int_equal(list.count, 3);
    assert_int_equal(tokenizer_encode(t, scratch, "de", 2, 0, 4, &list, &fault), STATUS_LIMIT);
    assert_int_equal(list.count, 3);
    assert_int_equal(tokenizer_encode(t, scratch, "d", 1, 0, 4, &list, &fault), STATUS_OK);
    assert_int_equal(list.count, 4);
    assert_int_equal(tokenizer_encode(t, scratch, "", TOKENIZER_TEXT_MAX + 1u, 0, 4, &list, &fault),
                     STATUS_LIMIT);
    uint8_t two[2] = {0};
    assert_int_equal(tokenizer_decode(t, list.ids, list.count, false, two, 2), 4);
    assert_memory_equal(two, "ab", 2);
    token_list_clear(&list);
    token_scratch_destroy(scratch);
    tokenizer_free(t);
}

static void fill(char *text, size_t bytes, const char *unit)
{
    size_t n = strlen(unit);
    for (size_t i = 0; i < bytes; i++)
        text[i] = unit[i % n];
}

// Of this thread: the machine may be busy with other things.
static uint64_t cpu_us(void)
{
    struct timespec now;
    (void)clock_gettime(CLOCK_THREAD_CPUTIME_ID, &now);
    return (uint64_t)now.tv_sec * 1000000 + (uint64_t)now.tv_nsec / 1000;
}

static void test_tokenizer_encodes_a_megabyte_word_in_a_second(void **state)
{
    (void)state;
    static const char *const units[] = {"a",
                                        "ab",
                                        "the",
                                        " ",
                                        "\n",
                                        " \n",
                                        "7",
                                        "=",
                                        "\xe4\xb8\xad",
                                        "'s",
                                        "\xcc\x81\xcc\xa3",
                                        "\xff",
                                        "\xe2\x80\x8d",
                                        "<|im_start",
                                        "A\xcc\x81"};
    const char *const files[] = {"qwen.json", "llama.json", "odd.json"};
    enum { BYTES = 1 << 20 };
    char *text = malloc(BYTES);
    uint64_t slowest = 0;
    for (size_t k = 0; k < 3; k++) {
        struct tokenizer *t = load_file(files[k]);
        for (size_t i = 0; i <= sizeof units / sizeof units[0]; i++) {
            struct rng rng = {.seed = 9};
            if (i < sizeof units / sizeof units[0])
                fill(text, BYTES - BYTES % strlen(units[i]), units[i]);
            for (size_t j = 0; i == sizeof units / sizeof units[0] && j < BYTES; j++)
                text[j] = (char)('a' + rng_below(&rng, 26)); // a word of random letters
            uint64_t before = cpu_us();
            struct token_list list = encode(t, text, BYTES, 0);
            uint64_t us = cpu_us() - before;
            slowest = us > slowest ? us : slowest;
            token_list_clear(&list);
        }
        tokenizer_free(t);
    }
    print_message("slowest word of 1 MiB: %.0f ms\n", (double)slowest / 1000);
    if (!SLOW_BUILD)
        assert_true(slowest < 1000000);
    free(text);
}

struct worker {
    const struct tokenizer *tokenizer;
    uint64_t sum;
};

static void *work(void *argument)
{
    struct worker *worker = argument;
    struct token_scratch *scratch;
    struct token_list list = {0};
    if (token_scratch_create(&scratch))
        return NULL;
    for (int i = 0; i < 300; i++) {
        char text[160];
        int n = snprintf(text, sizeof text, "Thread-safe %d? It's <|im_start|> e\xcc\x81 %d\n\n", i,
                         i * i);
        if (tokenizer_encode(worker->tokenizer, scratch, text, (size_t)n, TOKENIZE_SPECIAL,
                             SIZE_MAX, &list, NULL))
            break;
    }
    for (size_t i = 0; i < list.count; i++)
        worker->sum = worker->sum * 31 + list.ids[i];
    token_list_clear(&list);
    token_scratch_destroy(scratch);
    return NULL;
}

static void test_tokenizer_serves_threads_at_once(void **state)
{
    (void)state;
    struct tokenizer *t = load_file("qwen.json");
    struct worker workers[4];
    pthread_t threads[4];
    for (int i = 0; i < 4; i++) {
        workers[i] = (struct worker){.tokenizer = t};
        assert_int_equal(pthread_create(&threads[i], NULL, work, &workers[i]), 0);
    }
    for (int i = 0; i < 4; i++) {
        assert_int_equal(pthread_join(threads[i], NULL), 0);
        assert_true(workers[i].sum != 0 && workers[i].sum == workers[0].sum);
    }
    tokenizer_free(t);
}

static void test_tokenizer_survives_failing_allocations(void **state)
{
    (void)state;
    const struct spec spec = {.vocab = abc_vocab,
                              .merges = "\"a b\"",
                              .normalizer = "{\"type\":\"NFC\"}",
                              .added =
                                  ADDED(259, "e\\u0301", "\"normalized\":true,\"special\":false")};
    size_t bytes;
    char *json = make_json(&spec, &bytes);
    long n = 0;
    for (enum status status = STATUS_NO_MEMORY; status; n++) {
        struct tokenizer *t = NULL;
        struct token_scratch *scratch = NULL;
        struct token_list list = {0};
        allocations_left = n + 1;
        status = tokenizer_load("t.json", json, bytes, &t, NULL);
        if (!status)
            status = token_scratch_create(&scratch);
        if (!status)
            status = tokenizer_encode(t, scratch, "ab e\xcc\x81x\xff", 8, 0, SIZE_MAX, &list, NULL);
        allocations_left = -1;
        assert_true(status == STATUS_OK || status == STATUS_NO_MEMORY);
        token_list_clear(&list);
        token_scratch_destroy(scratch);
        tokenizer_free(t);
    }
    print_message("each of %ld allocations failed once\n", n - 1);
    assert_true(n > 15);
    free(json);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_tokenizer_merges_as_strings_or_pairs),
        cmocka_unit_test(test_tokenizer_refuses_by_name),
        cmocka_unit_test(test_tokenizer_survives_nasty_json),
        cmocka_unit_test(test_tokenizer_refuses_patterns_that_mean_something_else),
        cmocka_unit_test(test_tokenizer_ends_patterns_that_explode),
        cmocka_unit_test(test_tokenizer_makes_special_tokens_only_when_asked),
        cmocka_unit_test(test_tokenizer_gives_back_broken_utf8),
        cmocka_unit_test(test_token_stream_holds_back_half_characters),
        cmocka_unit_test(test_tokenizer_keeps_limits),
        cmocka_unit_test(test_tokenizer_encodes_a_megabyte_word_in_a_second),
        cmocka_unit_test(test_tokenizer_serves_threads_at_once),
        cmocka_unit_test(test_tokenizer_survives_failing_allocations),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
