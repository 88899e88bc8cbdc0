// SPDX-License-Identifier: Apache-2.0
// Fuzzes runtime/tokenizer: the input is a tokenizer.json, a NUL byte, and a text to encode with
// it. Checked: a tokenizer that loads encodes or gives a limit; what it encodes decodes through the
// stream to whole characters; without a change of text (no normalizer and so on) the bytes come
// back.
//
// The vocabulary of a file that loads has 256 tokens for bytes, which a fuzzer would not write by
// itself: a vocabulary that has the single entry "+" stands for all of them (ids 0 to 255).
//
// -DPOLDER_PLANT_BUG=ON plants a bug that shows that the fuzzer reaches the depth: a text whose ids
// have a merged token (id 256 or more) right after a broken byte reads one id too far.
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "base/check.h"
#include "runtime/tokenizer/tokenizer.h"

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

enum { TEXT_MAX = 4096, ALPHABET_MAX = 4096 };

// All 256 entries, as JSON.
static size_t write_alphabet(char *out)
{
    size_t n = 0;
    int next = 256;
    for (int b = 0; b < 256; b++) {
        int itself = (b >= 33 && b <= 126) || (b >= 161 && b <= 172) || b >= 174;
        n += (size_t)snprintf(out + n, ALPHABET_MAX - n, "%s\"\\u%04x\":%d", b ? "," : "",
                              (unsigned)(itself ? b : next), b);
        next += !itself;
    }
    return n;
}

// The file with "+":0 replaced by the alphabet. The caller frees.
static char *expand(const char *json, size_t bytes, size_t *out_bytes)
{
    static const char mark[] = "\"+\":0";
    char alphabet[ALPHABET_MAX];
    size_t n = write_alphabet(alphabet), mark_bytes = sizeof mark - 1;
    const char *at = memmem(json, bytes, mark, mark_bytes);
    char *out = malloc(bytes + n + 1);
    CHECK(out);
    size_t before = at ? (size_t)(at - json) : bytes, behind = at ? bytes - before - mark_bytes : 0;
    memcpy(out, json, before);
    if (at) {
        memcpy(out + before, alphabet, n);
        memcpy(out + before + n, at + mark_bytes, behind);
    }
    *out_bytes = before + (at ? n : 0) + behind;
    return out;
}

static void check_stream(const struct tokenizer *t, const struct token_list *list)
{
    struct token_stream stream = {.keep_special = true};
    char out[TOKEN_STREAM_ROOM];
    for (size_t i = 0; i < list->count; i++) {
        size_t n = token_stream_push(t, &stream, list->ids[i], out);
        CHECK(n <= sizeof out);
        CHECK(n == 0 || (out[0] & 0xc0) != 0x80); // begins with a whole character
    }
    CHECK(token_stream_flush(&stream, out) <= 3);
}

#ifdef POLDER_PLANT_BUG
static void planted_bug(const struct token_list *list)
{
    uint32_t *copy = malloc((list->count + 1) * sizeof *copy);
    CHECK(copy);
    memcpy(copy, list->ids, list->count * sizeof *copy);
    for (size_t i = 1; i < list->count; i++)
        if (copy[i - 1] >= 0xc0 && copy[i - 1] < 0x100 && copy[i] >= 0x100)
            copy[list->count + 1] = 1;
    free(copy);
}
#endif

static void encode(const struct tokenizer *t, const uint8_t *text, size_t bytes, unsigned flags)
{
    struct token_scratch *scratch;
    struct token_list list = {0};
    CHECK(token_scratch_create(&scratch) == STATUS_OK);
    enum status status =
        tokenizer_encode(t, scratch, text, bytes, flags, 4 * TEXT_MAX, &list, NULL);
    CHECK(status == STATUS_OK || status == STATUS_LIMIT);
    CHECK(status == STATUS_OK || list.count == 0);
    for (size_t i = 0; i < list.count; i++) {
        CHECK(list.ids[i] < tokenizer_id_limit(t));
        CHECK(flags & (TOKENIZE_SPECIAL | TOKENIZE_TEMPLATE) ||
              !tokenizer_is_special(t, list.ids[i]));
    }
    check_stream(t, &list);
#ifdef POLDER_PLANT_BUG
    planted_bug(&list);
#endif
    token_list_clear(&list);
    token_scratch_destroy(scratch);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    const uint8_t *end = size ? memchr(data, 0, size) : NULL;
    size_t json_bytes = end ? (size_t)(end - data) : size, bytes;
    struct tokenizer *t;
    struct fault fault;
    char *json = expand((const char *)data, json_bytes, &bytes);
    enum status status = tokenizer_load("fuzz", json, bytes, &t, &fault);
    free(json);
    if (status) {
        CHECK(status != STATUS_INTERNAL && fault.text[0]);
        return 0;
    }
    size_t text_bytes = end ? size - json_bytes - 1 : 0;
    text_bytes = text_bytes < TEXT_MAX ? text_bytes : TEXT_MAX;
    const uint8_t *text = end ? end + 1 : data;
    encode(t, text, text_bytes, 0);
    encode(t, text, text_bytes, TOKENIZE_SPECIAL | TOKENIZE_TEMPLATE);
    tokenizer_free(t);
    return 0;
}
