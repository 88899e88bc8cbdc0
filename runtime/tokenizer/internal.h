// SPDX-License-Identifier: Apache-2.0
// Inside runtime/tokenizer only: the tokenizer's body and what its files share.
//
//   load.c      tokenizer.json, its parts and what is refused      model.c   vocabulary and merges
//   added.c     added tokens: reading and finding                  split.c   pre-tokenizer stages
//   regex.c     Oniguruma patterns as PCRE2                        unicode.c where the two differ
//   normalize.c UTF-8 and normal forms                             bpe.c     words into ids
//   encode.c    the way from text to ids                           decode.c  the way back
#ifndef POLDER_RUNTIME_TOKENIZER_INTERNAL_H
#define POLDER_RUNTIME_TOKENIZER_INTERNAL_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#define PCRE2_CODE_UNIT_WIDTH 8
#include <pcre2.h>

#include "base/json.h"
#include "base/status.h"
#include "runtime/tokenizer/tokenizer.h"

enum { STAGES_MAX = 16, FORMS_MAX = 8, TEMPLATE_MAX = 16, NO_ID = -1 };

enum token_flags {
    TOKEN_PRESENT = 1,
    TOKEN_ORDINARY = 2, // spelled in the byte-level alphabet: BPE can make it
    TOKEN_ADDED = 4,
    TOKEN_SPECIAL = 8
};

struct token_entry {
    uint32_t offset; // into blob
    uint16_t bytes;
    uint8_t flags;
};

// A pair of ids and what it merges to. Open addressing; rank UINT32_MAX marks a free slot.
struct merge_slot {
    uint64_t pair;
    uint32_t rank, id;
};

struct added_token {
    const uint8_t *text; // what is looked for: the content, normalized if the token says so
    size_t bytes;
    uint32_t id;
    bool special, lstrip, rstrip, single_word;
};

// Sorted by text; first[b] .. first[b + 1] begin with byte b.
struct added_set {
    struct added_token *tokens;
    size_t count;
    uint32_t first[257];
};

enum stage_kind { STAGE_SPLIT, STAGE_PREFIX_SPACE };
enum split_behavior {
    SPLIT_ISOLATED,
    SPLIT_REMOVED,
    SPLIT_CONTIGUOUS,
    SPLIT_MERGED_WITH_PREVIOUS,
    SPLIT_MERGED_WITH_NEXT
};

struct stage {
    enum stage_kind kind;
    enum split_behavior behavior;
    bool invert;
    pcre2_code *code; // of STAGE_SPLIT
};

enum normal_form { FORM_NFC, FORM_NFD, FORM_NFKC, FORM_NFKD };

struct tokenizer {
    struct token_entry *entries; // id_limit of them
    uint32_t id_limit, count;
    uint8_t *blob; // the bytes of all tokens
    size_t blob_bytes, blob_capacity;

    uint32_t byte_ids[256];
    struct merge_slot *merges;
    size_t merges_mask;
    uint32_t *words; // ordinary tokens by hash of their bytes: id + 1, 0 is free
    size_t words_mask;
    bool ignore_merges;

    enum normal_form forms[FORMS_MAX];
    size_t form_count;
    struct stage stages[STAGES_MAX];
    size_t stage_count;
    struct added_set raw, normalized; // found before and after the normalizer
    pcre2_code *word_character;       // for single_word

    uint32_t before[TEMPLATE_MAX], after[TEMPLATE_MAX];
    size_t before_count, after_count;
};

struct buffer {
    uint8_t *bytes;
    size_t count, capacity;
};

struct bpe_symbol {
    uint32_t id, previous, next;
};

struct token_scratch {
    pcre2_match_data *match;
    pcre2_match_context *context;
    pcre2_jit_stack *stack;
    struct buffer normalized[2], prefixed;
    int32_t *points; // of the normalizer
    size_t points_capacity;
    struct bpe_symbol *symbols;
    size_t symbols_capacity;
    uint64_t *heap; // rank << 32 | position
    size_t heap_capacity;
};

// Makes room for `count` items of `item_bytes`; *capacity counts items. NO_MEMORY leaves all as it
// was.
MUST_USE enum status tokenizer__grow(void **items, size_t *capacity, size_t count,
                                     size_t item_bytes);
MUST_USE enum status buffer__append(struct buffer *buffer, const void *bytes, size_t count);

// ---- load.c ----
// UNSUPPORTED when the object has a key that is not known.
MUST_USE enum status tokenizer__known(const struct json *object, const char *what,
                                      const char *const *known, size_t count, struct fault *fault);

// ---- model.c ----
MUST_USE enum status tokenizer__load_model(struct tokenizer *t, const struct json *model,
                                           struct fault *fault);
// Stores bytes in the blob as the meaning of an id.
MUST_USE enum status tokenizer__set_bytes(struct tokenizer *t, uint32_t id, const uint8_t *bytes,
                                          size_t count, unsigned flags);
bool tokenizer__find_ordinary(const struct tokenizer *t, const uint8_t *bytes, size_t count,
                              uint32_t *id);
const struct merge_slot *tokenizer__find_merge(const struct tokenizer *t, uint32_t a, uint32_t b);

// ---- added.c ----
MUST_USE enum status tokenizer__load_added(struct tokenizer *t, const struct json *list,
                                           const struct json *vocabulary, struct fault *fault);
void tokenizer__free_added(struct tokenizer *t);
// The leftmost, then longest added token in text[from, bytes); false when there is none.
bool tokenizer__find_added(const struct added_set *set, const uint8_t *text, size_t bytes,
                           size_t from, size_t *begin, const struct added_token **found);

// ---- regex.c ----
// Compiles an Oniguruma (Ruby syntax) pattern; UNSUPPORTED when it could mean something else in
// PCRE2.
MUST_USE enum status tokenizer__compile(const char *pattern, size_t bytes, pcre2_code **out,
                                        struct fault *fault);
MUST_USE enum status tokenizer__compile_literal(const char *text, size_t bytes, pcre2_code **out,
                                                struct fault *fault);
// One character of a class of unicode.c.
MUST_USE enum status tokenizer__compile_class(const char *name, pcre2_code **out,
                                              struct fault *fault);

// ---- split.c ----
MUST_USE enum status tokenizer__load_splits(struct tokenizer *t, const struct json *pre_tokenizer,
                                            struct fault *fault);

struct word_sink {
    enum status (*word)(void *context, const uint8_t *bytes, size_t count);
    void *context;
};
// Runs all stages over one piece of valid UTF-8.
MUST_USE enum status tokenizer__split(const struct tokenizer *t, struct token_scratch *scratch,
                                      const uint8_t *text, size_t bytes, bool prefix_space,
                                      const struct word_sink *sink);

// ---- unicode.c ----
const char *tokenizer__class(const char *name, size_t bytes); // members for a PCRE2 class, or NULL
bool tokenizer__inert(int32_t point);                         // unknown to the package's normalizer

// ---- normalize.c ----
// Length of the character at the start; 0 when the text ends inside it; -n when its first n bytes
// are a maximal broken part.
int utf8__scan(const uint8_t *text, size_t bytes);
int32_t utf8__point(const uint8_t *text); // of a valid sequence
// Text in the normal form, appended to `out`. The text is valid UTF-8.
MUST_USE enum status tokenizer__normalize(enum normal_form form, struct token_scratch *scratch,
                                          const uint8_t *text, size_t bytes, struct buffer *out);

// ---- bpe.c ----
MUST_USE enum status tokenizer__merge(const struct tokenizer *t, struct token_scratch *scratch,
                                      const uint8_t *word, size_t bytes, size_t *count);

#endif
