// SPDX-License-Identifier: Apache-2.0
// The way from text to ids: runs of valid UTF-8, added tokens, normalizer, added tokens again,
// stages, BPE. Everything a call needs lies in its token_scratch; the tokenizer is only read.
#include <stdlib.h>
#include <string.h>

#include "base/arith.h"
#include "base/check.h"
#include "runtime/tokenizer/internal.h"

enum { KEEP_BYTES = 1 << 20, JIT_STACK_BYTES = 512 << 10 };

struct encoder {
    const struct tokenizer *tokenizer;
    struct token_scratch *scratch;
    struct token_list *list;
    size_t list_max;
    bool special;
    bool prefix_space; // of the piece at hand
};

enum status tokenizer__grow(void **items, size_t *capacity, size_t count, size_t item_bytes)
{
    if (count <= *capacity)
        return STATUS_OK;
    size_t wanted = max_size(count, *capacity + *capacity / 2 + 64), bytes;
    if (!mul_size(wanted, item_bytes, &bytes))
        return STATUS_NO_MEMORY;
    void *moved = realloc(*items, bytes);
    if (!moved)
        return STATUS_NO_MEMORY;
    *items = moved;
    *capacity = wanted;
    return STATUS_OK;
}

enum status buffer__append(struct buffer *buffer, const void *bytes, size_t count)
{
    enum status status =
        tokenizer__grow((void **)&buffer->bytes, &buffer->capacity, buffer->count + count, 1);
    if (status || !count)
        return status;
    memcpy(buffer->bytes + buffer->count, bytes, count);
    buffer->count += count;
    return STATUS_OK;
}

enum status token_scratch_create(struct token_scratch **out)
{
    struct token_scratch *scratch = calloc(1, sizeof *scratch);
    *out = NULL;
    if (!scratch)
        return STATUS_NO_MEMORY;
    scratch->match = pcre2_match_data_create(1, NULL);
    scratch->context = pcre2_match_context_create(NULL);
    scratch->stack = pcre2_jit_stack_create(32 << 10, JIT_STACK_BYTES, NULL);
    if (!scratch->match || !scratch->context) {
        token_scratch_destroy(scratch);
        return STATUS_NO_MEMORY;
    }
    if (scratch->stack) // there is none when PCRE2 was built without its JIT
        pcre2_jit_stack_assign(scratch->context, NULL, scratch->stack);
    pcre2_set_heap_limit(scratch->context, 64 << 10); // KiB
    *out = scratch;
    return STATUS_OK;
}

static void drop(void **items, size_t *capacity)
{
    free(*items);
    *items = NULL;
    *capacity = 0;
}

// Gives back what one long text made grow.
static void scratch_trim(struct token_scratch *s, size_t keep_bytes)
{
    if (s->symbols_capacity * sizeof *s->symbols > keep_bytes)
        drop((void **)&s->symbols, &s->symbols_capacity);
    if (s->heap_capacity * sizeof *s->heap > keep_bytes)
        drop((void **)&s->heap, &s->heap_capacity);
    if (s->points_capacity * sizeof *s->points > keep_bytes)
        drop((void **)&s->points, &s->points_capacity);
    struct buffer *const buffers[] = {&s->normalized[0], &s->normalized[1], &s->prefixed};
    for (size_t i = 0; i < ARRAY_COUNT(buffers); i++)
        if (buffers[i]->capacity > keep_bytes)
            drop((void **)&buffers[i]->bytes, &buffers[i]->capacity);
}

void token_scratch_destroy(struct token_scratch *scratch)
{
    if (!scratch)
        return;
    scratch_trim(scratch, 0);
    pcre2_jit_stack_free(scratch->stack);
    pcre2_match_context_free(scratch->context);
    pcre2_match_data_free(scratch->match);
    free(scratch);
}

void token_list_clear(struct token_list *list)
{
    free(list->ids);
    *list = (struct token_list){0};
}

static enum status append_id(struct encoder *e, uint32_t id)
{
    struct token_list *list = e->list;
    if (list->count >= e->list_max)
        return STATUS_LIMIT;
    enum status status =
        tokenizer__grow((void **)&list->ids, &list->capacity, list->count + 1, sizeof *list->ids);
    if (!status)
        list->ids[list->count++] = id;
    return status;
}

static enum status encode_word(void *context, const uint8_t *word, size_t bytes)
{
    struct encoder *e = context;
    const struct tokenizer *t = e->tokenizer;
    uint32_t id;
    if (t->ignore_merges && tokenizer__find_ordinary(t, word, bytes, &id) &&
        (e->special || !(t->entries[id].flags & TOKEN_SPECIAL)))
        return append_id(e, id);
    size_t count = 1;
    enum status status = tokenizer__merge(t, e->scratch, word, bytes, &count);
    for (size_t i = 0; !status && i < count; i++)
        status = append_id(e, e->scratch->symbols[i].id);
    return status;
}

static bool is_word(const struct encoder *e, const uint8_t *text, size_t bytes)
{
    return pcre2_match(e->tokenizer->word_character, text, bytes, 0,
                       PCRE2_NO_UTF_CHECK | PCRE2_ANCHORED, e->scratch->match,
                       e->scratch->context) >= 0;
}

static size_t last_character(const uint8_t *text, size_t bytes)
{
    size_t begin = bytes - 1;
    while (begin && (text[begin] & 0xc0) == 0x80)
        begin--;
    return begin;
}

// Unicode's White_Space, as Rust's regex has \s.
static bool is_space(int32_t c)
{
    return (c >= 9 && c <= 13) || c == 0x20 || c == 0x85 || c == 0xa0 || c == 0x1680 ||
           (c >= 0x2000 && c <= 0x200a) || c == 0x2028 || c == 0x2029 || c == 0x202f ||
           c == 0x205f || c == 0x3000;
}

// May this added token stand at text[begin, end)?
static bool stands_alone(const struct encoder *e, const struct added_token *token,
                         const uint8_t *text, size_t bytes, size_t begin)
{
    size_t end = begin + token->bytes;
    if (!token->single_word)
        return true;
    if (end < bytes && is_word(e, text + end, bytes - end))
        return false;
    if (!begin)
        return true;
    size_t last = last_character(text, begin);
    return !is_word(e, text + last, begin - last);
}

typedef enum status (*plain_text)(struct encoder *e, const uint8_t *text, size_t bytes);

// Cuts the text at the added tokens of one set; what lies between goes to `plain`.
static enum status cut_added(struct encoder *e, const struct added_set *set, const uint8_t *text,
                             size_t bytes, plain_text plain)
{
    const struct added_token *token;
    size_t done = 0, from = 0, begin;
    enum status status = STATUS_OK;
    bool prefix_space = e->prefix_space;
    while (!status && tokenizer__find_added(set, text, bytes, from, &begin, &token)) {
        size_t end = from = begin + token->bytes;
        if ((token->special && !e->special) || !stands_alone(e, token, text, bytes, begin))
            continue;
        while (token->lstrip && begin) {
            size_t last = last_character(text, begin);
            if (!is_space(utf8__point(text + last)))
                break;
            begin = last;
        }
        while (token->rstrip && end < bytes && is_space(utf8__point(text + end)))
            end += (size_t)utf8__scan(text + end, bytes - end);
        e->prefix_space = prefix_space;
        if (done < begin)
            status = plain(e, text + done, begin - done);
        if (!status)
            status = append_id(e, token->id);
        done = end;
        prefix_space = true;
    }
    e->prefix_space = prefix_space;
    return status || done >= bytes ? status : plain(e, text + done, bytes - done);
}

static enum status encode_plain(struct encoder *e, const uint8_t *text, size_t bytes)
{
    struct word_sink sink = {.word = encode_word, .context = e};
    return tokenizer__split(e->tokenizer, e->scratch, text, bytes, e->prefix_space, &sink);
}

static enum status encode_normalized(struct encoder *e, const uint8_t *text, size_t bytes)
{
    const struct tokenizer *t = e->tokenizer;
    enum status status = STATUS_OK;
    for (size_t i = 0; !status && i < t->form_count; i++) {
        struct buffer *out = &e->scratch->normalized[i & 1];
        out->count = 0;
        status = tokenizer__normalize(t->forms[i], e->scratch, text, bytes, out);
        text = out->bytes;
        bytes = out->count;
    }
    return status ? status : cut_added(e, &t->normalized, text, bytes, encode_plain);
}

// Runs of valid UTF-8 go the whole way, runs of other bytes are words.
static enum status encode_runs(struct encoder *e, const uint8_t *text, size_t bytes)
{
    enum status status = STATUS_OK;
    for (size_t begin = 0; !status && begin < bytes;) {
        size_t end = begin;
        bool valid = utf8__scan(text + begin, bytes - begin) > 0;
        while (end < bytes) {
            int length = utf8__scan(text + end, bytes - end);
            if ((length > 0) != valid)
                break;
            end = length == 0 ? bytes : end + (size_t)(length < 0 ? -length : length);
        }
        e->prefix_space = begin == 0;
        status =
            valid ? cut_added(e, &e->tokenizer->raw, text + begin, end - begin, encode_normalized)
                  : encode_word(e, text + begin, end - begin);
        begin = end;
    }
    return status;
}

static enum status append_ids(struct encoder *e, const uint32_t *ids, size_t count)
{
    enum status status = STATUS_OK;
    for (size_t i = 0; !status && i < count; i++)
        status = append_id(e, ids[i]);
    return status;
}

enum status tokenizer_encode(const struct tokenizer *t, struct token_scratch *scratch,
                             const void *text, size_t bytes, unsigned flags, size_t list_max,
                             struct token_list *list, struct fault *fault)
{
    struct encoder e = {.tokenizer = t,
                        .scratch = scratch,
                        .list = list,
                        .list_max = list_max,
                        .special = flags & TOKENIZE_SPECIAL};
    bool template = flags & TOKENIZE_TEMPLATE;
    size_t before = list->count;
    if (bytes > TOKENIZER_TEXT_MAX)
        return fault_set(fault, STATUS_LIMIT, "the text has %zu bytes, at most %d are encoded",
                         bytes, TOKENIZER_TEXT_MAX);
    enum status status = append_ids(&e, t->before, template ? t->before_count : 0);
    if (!status)
        status = encode_runs(&e, text, bytes);
    if (!status)
        status = append_ids(&e, t->after, template ? t->after_count : 0);
    scratch_trim(scratch, KEEP_BYTES);
    if (!status)
        return STATUS_OK;
    bool full = list->count >= list_max;
    list->count = before;
    if (status == STATUS_LIMIT && full)
        return fault_set(fault, status, "the text has more than %zu tokens", list_max - before);
    if (status == STATUS_LIMIT)
        return fault_set(fault, status, "the pre-tokenizer's pattern gave up on this text");
    return fault_set(fault, status, "encoding failed: %s", status_sentence(status));
}
