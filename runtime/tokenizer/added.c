// SPDX-License-Identifier: Apache-2.0
// Added tokens: reading them, and finding them in text.
//
// The package ignores the ids in the file and deals them out again (the model's id if the content
// is in the vocabulary, else the next free one). A file in which that gives other ids than it says
// is refused.
//
// Finding is leftmost, then longest, as the package's Aho-Corasick automaton does. The tokens are
// sorted by text; at each position the range of tokens that agree with the text so far is narrowed
// byte by byte.
#include "runtime/tokenizer/internal.h"

#include <stdlib.h>
#include <string.h>

#include "base/arith.h"
#include "base/check.h"

enum { ADDED_MAX = 65536 };

static int compare_bytes(const uint8_t *a, size_t a_bytes, const uint8_t *b, size_t b_bytes)
{
    int order = memcmp(a, b, min_size(a_bytes, b_bytes));
    return order ? order : (a_bytes > b_bytes) - (a_bytes < b_bytes);
}

static int compare_added(const void *left, const void *right)
{
    const struct added_token *a = left, *b = right;
    return compare_bytes(a->text, a->bytes, b->text, b->bytes);
}

// The first token of [low, high) whose byte at `depth` is at least `byte`; shorter ones come first.
static size_t lower_bound(const struct added_set *set, size_t low, size_t high, size_t depth,
                          unsigned byte)
{
    while (low < high) {
        size_t middle = (low + high) / 2;
        const struct added_token *token = &set->tokens[middle];
        if (token->bytes <= depth || token->text[depth] < byte)
            low = middle + 1;
        else
            high = middle;
    }
    return low;
}

static const struct added_token *longest_at(const struct added_set *set, const uint8_t *text,
                                            size_t bytes)
{
    const struct added_token *best = NULL;
    size_t low = set->first[text[0]], high = set->first[text[0] + 1];
    for (size_t depth = 1; low < high; depth++) {
        if (set->tokens[low].bytes == depth)
            best = &set->tokens[low++];
        if (depth == bytes)
            break;
        low = lower_bound(set, low, high, depth, text[depth]);
        high = lower_bound(set, low, high, depth, text[depth] + 1u);
    }
    return best;
}

bool tokenizer__find_added(const struct added_set *set, const uint8_t *text, size_t bytes,
                           size_t from, size_t *begin, const struct added_token **found)
{
    if (!set->count)
        return false;
    for (size_t i = from; i < bytes; i++) {
        if (set->first[text[i]] == set->first[text[i] + 1])
            continue;
        *found = longest_at(set, text + i, bytes - i);
        if (*found) {
            *begin = i;
            return true;
        }
    }
    return false;
}

struct added_item {
    const char *content;
    size_t bytes;
    uint32_t id;
    bool special, lstrip, rstrip, single_word, normalized;
};

static enum status read_item(const struct json *value, struct added_item *item, struct fault *fault)
{
    static const char *const known[] = {"id",     "content", "single_word", "lstrip",
                                        "rstrip", "special", "normalized"};
    enum status status = tokenizer__known(value, "added token", known, ARRAY_COUNT(known), fault);
    if (!status)
        status = json_get_u32(value, "id", &item->id, fault);
    if (!status)
        status = json_get_string(value, "content", &item->content, fault);
    if (!status)
        status = json_get_bool(value, "single_word", &item->single_word, fault);
    if (!status)
        status = json_get_bool(value, "lstrip", &item->lstrip, fault);
    if (!status)
        status = json_get_bool(value, "rstrip", &item->rstrip, fault);
    if (!status)
        status = json_get_bool(value, "normalized", &item->normalized, fault);
    if (!status)
        status = json_get_bool(value, "special", &item->special, fault);
    if (status)
        return status;
    item->bytes = strlen(item->content);
    if (!item->bytes || item->bytes > TOKEN_BYTES_MAX)
        return fault_set(fault, STATUS_CORRUPT, "added token %u must have 1 to %d bytes", item->id,
                         TOKEN_BYTES_MAX);
    if (item->id >= TOKENIZER_IDS_MAX)
        return fault_set(fault, STATUS_CORRUPT, "the id of '%.80s' must be below %d", item->content,
                         TOKENIZER_IDS_MAX);
    return STATUS_OK;
}

static enum status reserve_id(struct tokenizer *t, uint32_t id)
{
    if (id < t->id_limit)
        return STATUS_OK;
    struct token_entry *entries = realloc(t->entries, (id + 1) * sizeof *entries);
    if (!entries)
        return STATUS_NO_MEMORY;
    memset(entries + t->id_limit, 0, (id + 1 - t->id_limit) * sizeof *entries);
    t->entries = entries;
    t->id_limit = id + 1;
    return STATUS_OK;
}

// The text that is looked for: the content, in the tokenizer's normal forms if the token asks for
// it.
static enum status wanted_text(const struct tokenizer *t, const struct added_item *item,
                               struct token_scratch *scratch, struct buffer *out)
{
    enum status status = buffer__append(out, item->content, item->bytes);
    for (size_t i = 0; !status && item->normalized && i < t->form_count; i++) {
        struct buffer next = {0};
        status = tokenizer__normalize(t->forms[i], scratch, out->bytes, out->count, &next);
        free(out->bytes);
        *out = next;
    }
    return status;
}

static enum status add_item(struct tokenizer *t, const struct added_item *item, bool in_model,
                            const struct buffer *text, struct fault *fault)
{
    enum status status = reserve_id(t, item->id);
    if (status)
        return status;
    struct token_entry *entry = &t->entries[item->id];
    bool ordinary = entry->flags & TOKEN_ORDINARY;
    if (entry->flags & TOKEN_ADDED || (entry->flags && !in_model))
        return fault_set(fault, STATUS_CORRUPT, "two tokens have the id %u, one is '%.80s'",
                         item->id, item->content);
    if (!text->count || text->count > TOKEN_BYTES_MAX)
        return fault_set(fault, STATUS_CORRUPT, "added token %u must have 1 to %d bytes", item->id,
                         TOKEN_BYTES_MAX);
    if (ordinary && compare_bytes(t->blob + entry->offset, entry->bytes, text->bytes, text->count))
        return fault_set(fault, STATUS_UNSUPPORTED,
                         "the added token '%.80s' has the id of other bytes (%u)", item->content,
                         item->id);
    unsigned flags =
        (ordinary ? TOKEN_ORDINARY : 0u) | TOKEN_ADDED | (item->special ? TOKEN_SPECIAL : 0u);
    struct added_set *set = item->normalized ? &t->normalized : &t->raw;
    uint8_t *copy = malloc(text->count);
    if (!copy)
        return STATUS_NO_MEMORY;
    memcpy(copy, text->bytes, text->count);
    set->tokens[set->count++] = (struct added_token){.text = copy,
                                                     .bytes = text->count,
                                                     .id = item->id,
                                                     .special = item->special,
                                                     .lstrip = item->lstrip,
                                                     .rstrip = item->rstrip,
                                                     .single_word = item->single_word};
    return tokenizer__set_bytes(t, item->id, text->bytes, text->count, flags);
}

static enum status index_set(struct added_set *set, struct fault *fault)
{
    if (set->count)
        qsort(set->tokens, set->count, sizeof *set->tokens, compare_added);
    size_t next = 0;
    for (unsigned byte = 0; byte <= 256; byte++) {
        while (next < set->count && set->tokens[next].text[0] < byte)
            next++;
        set->first[byte] = (uint32_t)next;
    }
    for (size_t i = 1; i < set->count; i++)
        if (compare_added(&set->tokens[i - 1], &set->tokens[i]) == 0)
            return fault_set(fault, STATUS_CORRUPT, "the added token '%.*s' is listed twice",
                             (int)min_size(set->tokens[i].bytes, 80),
                             (const char *)set->tokens[i].text);
    return STATUS_OK;
}

// Nothing that ordinary text gives may be special.
static enum status guard_special(const struct tokenizer *t, struct fault *fault)
{
    uint32_t bad = UINT32_MAX;
    for (unsigned byte = 0; byte < 256; byte++)
        if (t->entries[t->byte_ids[byte]].flags & TOKEN_SPECIAL)
            bad = t->byte_ids[byte];
    for (size_t i = 0; i <= t->merges_mask; i++)
        if (t->merges[i].rank != UINT32_MAX && t->entries[t->merges[i].id].flags & TOKEN_SPECIAL)
            bad = t->merges[i].id;
    if (bad == UINT32_MAX)
        return STATUS_OK;
    return fault_set(fault, STATUS_UNSUPPORTED,
                     "the special token with id %u can be made from ordinary text", bad);
}

static enum status load_items(struct tokenizer *t, const struct json *list,
                              const struct json *vocabulary, struct token_scratch *scratch,
                              struct fault *fault)
{
    uint32_t next_id = (uint32_t)json_count(vocabulary);
    for (size_t i = 0; i < json_count(list); i++) {
        struct added_item item;
        enum status status = read_item(json_at(list, i), &item, fault);
        if (status)
            return status;
        uint32_t id;
        bool in_model = json_as_u32(json_find(vocabulary, item.content), &id);
        if (!in_model)
            id = next_id++;
        if (id != item.id)
            return fault_set(fault, STATUS_CORRUPT,
                             "the added token '%.80s' says id %u but the package gives it %u",
                             item.content, item.id, id);
        struct buffer text = {0};
        status = wanted_text(t, &item, scratch, &text);
        if (!status)
            status = add_item(t, &item, in_model, &text, fault);
        free(text.bytes);
        if (status)
            return status;
    }
    return STATUS_OK;
}

enum status tokenizer__load_added(struct tokenizer *t, const struct json *list,
                                  const struct json *vocabulary, struct fault *fault)
{
    size_t count = json_count(list);
    if (count > ADDED_MAX)
        return fault_set(fault, STATUS_LIMIT, "%zu added tokens, at most %d are supported", count,
                         ADDED_MAX);
    t->raw.tokens = calloc(count + 1, sizeof *t->raw.tokens);
    t->normalized.tokens = calloc(count + 1, sizeof *t->normalized.tokens);
    struct token_scratch *scratch = NULL;
    if (!t->raw.tokens || !t->normalized.tokens)
        return STATUS_NO_MEMORY;
    enum status status = token_scratch_create(&scratch);
    if (!status)
        status = load_items(t, list, vocabulary, scratch, fault);
    if (!status)
        status = index_set(&t->raw, fault);
    if (!status)
        status = index_set(&t->normalized, fault);
    if (!status)
        status = guard_special(t, fault);
    if (!status)
        status = tokenizer__compile_class("word", &t->word_character, fault);
    token_scratch_destroy(scratch);
    return status;
}

static void free_set(struct added_set *set)
{
    for (size_t i = 0; i < set->count; i++)
        free((void *)(uintptr_t)set->tokens[i].text);
    free(set->tokens);
}

void tokenizer__free_added(struct tokenizer *t)
{
    free_set(&t->raw);
    free_set(&t->normalized);
}
