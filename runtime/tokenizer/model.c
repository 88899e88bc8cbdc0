// SPDX-License-Identifier: Apache-2.0
// The model of tokenizer.json: vocabulary, merges, and the tables BPE works on.
//
// A vocabulary entry is spelled in GPT-2's byte-level alphabet, one character for each byte; it is
// kept as the bytes it stands for. An entry with any other character can never come out of BPE; it
// is kept as it is spelled (that is what the package's decoder makes of it). Refused: two entries
// with one id, ids beyond TOKENIZER_IDS_MAX, a byte without an entry, merges that name unknown
// entries or give an unknown one.
#include "runtime/tokenizer/internal.h"

#include <stdlib.h>
#include <string.h>

#include "base/arith.h"
#include "base/check.h"

// Does this byte stand for itself in the alphabet? Printable Latin-1 without space and soft hyphen.
static bool stands_for_itself(unsigned byte)
{
    return (byte >= 0x21 && byte <= 0x7e) || (byte >= 0xa1 && byte <= 0xac) || byte >= 0xae;
}

// The byte an alphabet character means, -1 for other characters. The bytes that do not stand for
// themselves are 256, 257, ... in order: 0..32, 127..160, 173.
static int alphabet_byte(int32_t point)
{
    if (point < 256)
        return stands_for_itself((unsigned)point) ? (int)point : -1;
    int32_t k = point - 256;
    if (k <= 32)
        return (int)k;
    if (k < 33 + 34)
        return (int)(k - 33 + 127);
    return k == 67 ? 173 : -1;
}

// Writes the bytes of a spelling; false when a character is outside of the alphabet. `out` has room
// for `bytes` bytes.
static bool spell(const char *text, size_t bytes, uint8_t *out, size_t *count)
{
    *count = 0;
    const uint8_t *p = (const uint8_t *)text;
    for (size_t i = 0; i < bytes;) {
        int length = utf8__scan(p + i, bytes - i);
        int byte = length > 0 ? alphabet_byte(utf8__point(p + i)) : -1;
        if (byte < 0)
            return false;
        out[(*count)++] = (uint8_t)byte;
        i += (size_t)length;
    }
    return true;
}

enum status tokenizer__set_bytes(struct tokenizer *t, uint32_t id, const uint8_t *bytes,
                                 size_t count, unsigned flags)
{
    CHECK(id < t->id_limit && count <= TOKEN_BYTES_MAX);
    enum status status =
        tokenizer__grow((void **)&t->blob, &t->blob_capacity, t->blob_bytes + count, 1);
    if (status)
        return status;
    memcpy(t->blob + t->blob_bytes, bytes, count);
    t->count += !(t->entries[id].flags & TOKEN_PRESENT);
    t->entries[id] = (struct token_entry){.offset = (uint32_t)t->blob_bytes,
                                          .bytes = (uint16_t)count,
                                          .flags = (uint8_t)(flags | TOKEN_PRESENT)};
    t->blob_bytes += count;
    return STATUS_OK;
}

static size_t hash_word(const uint8_t *bytes, size_t count)
{
    uint64_t h = 0xcbf29ce484222325u;
    for (size_t i = 0; i < count; i++)
        h = (h ^ bytes[i]) * 0x100000001b3u;
    return (size_t)(h ^ h >> 29);
}

bool tokenizer__find_ordinary(const struct tokenizer *t, const uint8_t *bytes, size_t count,
                              uint32_t *id)
{
    if (count > TOKEN_BYTES_MAX)
        return false;
    for (size_t i = hash_word(bytes, count) & t->words_mask; t->words[i];
         i = (i + 1) & t->words_mask) {
        const struct token_entry *entry = &t->entries[t->words[i] - 1];
        if (entry->bytes == count && memcmp(t->blob + entry->offset, bytes, count) == 0) {
            *id = t->words[i] - 1;
            return true;
        }
    }
    return false;
}

// A power of two with at most half of the slots in use.
static size_t table_slots(size_t count)
{
    size_t slots = 16;
    while (slots < 2 * count)
        slots *= 2;
    return slots;
}

static enum status index_words(struct tokenizer *t)
{
    size_t slots = table_slots(t->count);
    t->words = calloc(slots, sizeof *t->words);
    if (!t->words)
        return STATUS_NO_MEMORY;
    t->words_mask = slots - 1;
    for (uint32_t id = 0; id < t->id_limit; id++) {
        const struct token_entry *entry = &t->entries[id];
        if (!(entry->flags & TOKEN_ORDINARY))
            continue;
        size_t i = hash_word(t->blob + entry->offset, entry->bytes) & t->words_mask;
        while (t->words[i])
            i = (i + 1) & t->words_mask;
        t->words[i] = id + 1;
    }
    return STATUS_OK;
}

static enum status measure_ids(struct tokenizer *t, const struct json *vocabulary,
                               struct fault *fault)
{
    uint32_t limit = 0;
    for (struct json_pair pair = {0}; json_next(vocabulary, &pair);) {
        uint32_t id;
        if (!json_as_u32(pair.value, &id) || id >= TOKENIZER_IDS_MAX)
            return fault_set(fault, STATUS_CORRUPT, "the id of '%.80s' must be an integer below %d",
                             pair.key, TOKENIZER_IDS_MAX);
        if (pair.key_bytes > TOKEN_BYTES_MAX)
            return fault_set(fault, STATUS_LIMIT, "token %u is longer than %d bytes", id,
                             TOKEN_BYTES_MAX);
        limit = id >= limit ? id + 1 : limit;
    }
    t->entries = calloc(limit ? limit : 1, sizeof *t->entries);
    if (!t->entries)
        return STATUS_NO_MEMORY;
    t->id_limit = limit;
    return STATUS_OK;
}

static enum status load_vocabulary(struct tokenizer *t, const struct json *vocabulary,
                                   struct fault *fault)
{
    enum status status = measure_ids(t, vocabulary, fault);
    for (struct json_pair pair = {0}; !status && json_next(vocabulary, &pair);) {
        uint32_t id = 0;
        uint8_t bytes[TOKEN_BYTES_MAX];
        size_t count;
        CHECK(json_as_u32(pair.value, &id)); // measure_ids has looked
        if (t->entries[id].flags)
            return fault_set(fault, STATUS_CORRUPT, "two tokens have the id %u, one is '%.80s'", id,
                             pair.key);
        if (spell(pair.key, pair.key_bytes, bytes, &count) && count)
            status = tokenizer__set_bytes(t, id, bytes, count, TOKEN_ORDINARY);
        else
            status = tokenizer__set_bytes(t, id, (const uint8_t *)pair.key, pair.key_bytes, 0);
    }
    if (!status)
        status = index_words(t);
    for (unsigned byte = 0; !status && byte < 256; byte++) {
        uint8_t one = (uint8_t)byte;
        if (!tokenizer__find_ordinary(t, &one, 1, &t->byte_ids[byte]))
            return fault_set(fault, STATUS_UNSUPPORTED,
                             "the vocabulary has no token for the byte 0x%02x: not a complete "
                             "byte-level vocabulary",
                             byte);
    }
    return status;
}

static uint64_t mix_pair(uint64_t pair)
{
    pair *= 0x9e3779b97f4a7c15u;
    return pair ^ pair >> 32;
}

static struct merge_slot *merge_slot(const struct tokenizer *t, uint64_t pair)
{
    size_t i = mix_pair(pair) & t->merges_mask;
    while (t->merges[i].rank != UINT32_MAX && t->merges[i].pair != pair)
        i = (i + 1) & t->merges_mask;
    return &t->merges[i];
}

const struct merge_slot *tokenizer__find_merge(const struct tokenizer *t, uint32_t a, uint32_t b)
{
    const struct merge_slot *slot = merge_slot(t, (uint64_t)a << 32 | b);
    return slot->rank == UINT32_MAX ? NULL : slot;
}

struct spelled_pair {
    const char *a, *b;
    size_t a_bytes, b_bytes;
};

// A merge is "a b" with exactly one space, or [a, b].
static bool read_pair(const struct json *value, struct spelled_pair *pair)
{
    if (json_kind_of(value) == JSON_KIND_ARRAY)
        return json_count(value) == 2 &&
               json_as_bytes(json_at(value, 0), &pair->a, &pair->a_bytes) &&
               json_as_bytes(json_at(value, 1), &pair->b, &pair->b_bytes);
    const char *text;
    size_t bytes;
    if (!json_as_bytes(value, &text, &bytes))
        return false;
    const char *space = memchr(text, ' ', bytes);
    if (!space)
        return false;
    pair->a = text;
    pair->a_bytes = (size_t)(space - text);
    pair->b = space + 1;
    pair->b_bytes = bytes - pair->a_bytes - 1;
    return !memchr(pair->b, ' ', pair->b_bytes);
}

static enum status add_merge(struct tokenizer *t, const struct json *vocabulary,
                             const struct json *value, uint32_t rank, struct fault *fault)
{
    struct spelled_pair pair;
    char joined[2 * TOKEN_BYTES_MAX];
    uint32_t a, b, id;
    if (!read_pair(value, &pair))
        return fault_set(fault, STATUS_CORRUPT, "merge %u is not a pair of tokens", rank);
    if (pair.a_bytes > TOKEN_BYTES_MAX || pair.b_bytes > TOKEN_BYTES_MAX ||
        !json_as_u32(json_find_bytes(vocabulary, pair.a, pair.a_bytes), &a) ||
        !json_as_u32(json_find_bytes(vocabulary, pair.b, pair.b_bytes), &b))
        return fault_set(fault, STATUS_CORRUPT,
                         "merge %u ('%.60s') names a token that is not in the vocabulary", rank,
                         pair.a);
    memcpy(joined, pair.a, pair.a_bytes);
    memcpy(joined + pair.a_bytes, pair.b, pair.b_bytes);
    if (!json_as_u32(json_find_bytes(vocabulary, joined, pair.a_bytes + pair.b_bytes), &id))
        return fault_set(fault, STATUS_CORRUPT,
                         "merge %u ('%.60s') gives a token that is not in the vocabulary", rank,
                         pair.a);
    uint64_t key = (uint64_t)a << 32 | b;
    *merge_slot(t, key) = (struct merge_slot){.pair = key, .rank = rank, .id = id};
    return STATUS_OK;
}

// A pair listed twice counts where it stands last, and "#version" lines are no merges, as in the
// package.
static enum status load_merges(struct tokenizer *t, const struct json *vocabulary,
                               const struct json *merges, struct fault *fault)
{
    size_t count = json_count(merges), slots = table_slots(count);
    t->merges = malloc(slots * sizeof *t->merges);
    if (!t->merges)
        return STATUS_NO_MEMORY;
    t->merges_mask = slots - 1;
    for (size_t i = 0; i < slots; i++)
        t->merges[i].rank = UINT32_MAX;
    enum json_kind kind = json_kind_of(json_at(merges, 0));
    for (size_t i = 0; i < count; i++) {
        const struct json *value = json_at(merges, i);
        const char *text;
        if (json_kind_of(value) != kind)
            return fault_set(fault, STATUS_CORRUPT, "merges must be all strings or all pairs");
        if (json_as_string(value, &text) && strncmp(text, "#version", 8) == 0)
            continue;
        enum status status = add_merge(t, vocabulary, value, (uint32_t)i, fault);
        if (status)
            return status;
    }
    return STATUS_OK;
}

// Settings that change how BPE works and that we do not do. unk_token and fuse_unk can stay: with
// all 256 bytes in the vocabulary nothing is ever unknown.
static enum status refuse_settings(const struct json *model, struct fault *fault)
{
    static const char *const affixes[] = {"continuing_subword_prefix", "end_of_word_suffix"};
    double dropout;
    bool fallback;
    enum status status = json_get_double_or(model, "dropout", 0, &dropout, fault);
    if (!status)
        status = json_get_bool_or(model, "byte_fallback", false, &fallback, fault);
    if (status)
        return status;
    if (dropout != 0)
        return fault_set(fault, STATUS_UNSUPPORTED, "model.dropout is not supported");
    if (fallback)
        return fault_set(fault, STATUS_UNSUPPORTED, "model.byte_fallback is not supported");
    for (size_t i = 0; i < ARRAY_COUNT(affixes); i++) {
        const char *affix;
        status = json_get_string_or(model, affixes[i], "", &affix, fault);
        if (status)
            return status;
        if (*affix)
            return fault_set(fault, STATUS_UNSUPPORTED, "model.%s is not supported", affixes[i]);
    }
    return STATUS_OK;
}

enum status tokenizer__load_model(struct tokenizer *t, const struct json *model,
                                  struct fault *fault)
{
    static const char *const known[] = {
        "type",         "dropout",       "unk_token",
        "vocab",        "merges",        "continuing_subword_prefix",
        "fuse_unk",     "byte_fallback", "end_of_word_suffix",
        "ignore_merges"};
    const char *type;
    const struct json *vocabulary, *merges;
    enum status status = json_get_string_or(model, "type", "BPE", &type, fault);
    if (!status && strcmp(type, "BPE") != 0)
        return fault_set(fault, STATUS_UNSUPPORTED, "the model type '%.80s' is not supported",
                         type);
    if (!status)
        status = tokenizer__known(model, "model", known, ARRAY_COUNT(known), fault);
    if (!status)
        status = refuse_settings(model, fault);
    if (!status)
        status = json_get_bool_or(model, "ignore_merges", false, &t->ignore_merges, fault);
    if (!status)
        status = json_get_object(model, "vocab", &vocabulary, fault);
    if (!status)
        status = json_get_array(model, "merges", &merges, fault);
    if (!status)
        status = load_vocabulary(t, vocabulary, fault);
    if (!status)
        status = load_merges(t, vocabulary, merges, fault);
    return status;
}
