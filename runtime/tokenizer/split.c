// SPDX-License-Identifier: Apache-2.0
// The pre-tokenizer: a row of stages, each of which cuts every piece it is given into smaller ones;
// what comes out of the last is a word. ByteLevel must be the last (its alphabet is not applied
// here: BPE works on bytes); it contributes a stage that puts a space in front and, with use_regex,
// GPT-2's pattern.
//
// A piece is handed on as soon as it is known, so no list of pieces exists. Matches are walked as
// the package does (rust-onig's find_iter: no empty match directly after a match) and joined by the
// five behaviours with one piece of delay.
#include "runtime/tokenizer/internal.h"

#include <string.h>

#include "base/arith.h"
#include "base/check.h"

static const char gpt2_pattern[] =
    "'s|'t|'re|'ve|'m|'ll|'d| ?\\p{L}+| ?\\p{N}+| ?[^\\s\\p{L}\\p{N}]+|\\s+(?!\\S)|\\s+";

// ---- reading ----

static enum status new_stage(struct tokenizer *t, struct stage **out, struct fault *fault)
{
    if (t->stage_count == STAGES_MAX)
        return fault_set(fault, STATUS_LIMIT, "more than %d pre-tokenizer stages", STAGES_MAX);
    *out = &t->stages[t->stage_count++];
    return STATUS_OK;
}

static enum status load_byte_level(struct tokenizer *t, const struct json *value,
                                   struct fault *fault)
{
    static const char *const known[] = {"type", "add_prefix_space", "trim_offsets", "use_regex"};
    bool prefix_space, use_regex;
    struct stage *stage = NULL;
    enum status status =
        tokenizer__known(value, "ByteLevel pre-tokenizer", known, ARRAY_COUNT(known), fault);
    if (!status)
        status = json_get_bool(value, "add_prefix_space", &prefix_space, fault);
    if (!status)
        status = json_get_bool_or(value, "use_regex", true, &use_regex, fault);
    if (!status && prefix_space) {
        status = new_stage(t, &stage, fault);
        if (!status)
            stage->kind = STAGE_PREFIX_SPACE;
    }
    if (!status && use_regex) {
        status = new_stage(t, &stage, fault);
        if (!status)
            status = tokenizer__compile(gpt2_pattern, sizeof gpt2_pattern - 1, &stage->code, fault);
    }
    return status;
}

static enum status load_digits(struct tokenizer *t, const struct json *value, struct fault *fault)
{
    static const char *const known[] = {"type", "individual_digits"};
    bool individual;
    struct stage *stage = NULL;
    enum status status =
        tokenizer__known(value, "Digits pre-tokenizer", known, ARRAY_COUNT(known), fault);
    if (!status)
        status = json_get_bool(value, "individual_digits", &individual, fault);
    if (!status)
        status = new_stage(t, &stage, fault);
    if (status)
        return status;
    stage->behavior = individual ? SPLIT_ISOLATED : SPLIT_CONTIGUOUS;
    return tokenizer__compile_class("numeric", &stage->code, fault);
}

static enum status read_behavior(const struct json *value, enum split_behavior *out,
                                 struct fault *fault)
{
    static const char *const names[] = {"Isolated", "Removed", "Contiguous", "MergedWithPrevious",
                                        "MergedWithNext"};
    const char *name;
    enum status status = json_get_string(value, "behavior", &name, fault);
    for (size_t i = 0; !status && i < ARRAY_COUNT(names); i++)
        if (strcmp(name, names[i]) == 0) {
            *out = (enum split_behavior)i;
            return STATUS_OK;
        }
    return status ? status
                  : fault_set(fault, STATUS_UNSUPPORTED,
                              "the Split behavior '%.80s' is not supported", name);
}

static enum status load_split(struct tokenizer *t, const struct json *value, struct fault *fault)
{
    static const char *const known[] = {"type", "pattern", "behavior", "invert"};
    static const char *const kinds[] = {"Regex", "String"};
    const struct json *pattern;
    const char *text;
    size_t bytes;
    struct stage *stage = NULL;
    enum status status =
        tokenizer__known(value, "Split pre-tokenizer", known, ARRAY_COUNT(known), fault);
    if (!status)
        status = json_get_object(value, "pattern", &pattern, fault);
    if (!status)
        status = tokenizer__known(pattern, "Split pattern", kinds, ARRAY_COUNT(kinds), fault);
    if (!status)
        status = new_stage(t, &stage, fault);
    if (!status)
        status = read_behavior(value, &stage->behavior, fault);
    if (!status)
        status = json_get_bool(value, "invert", &stage->invert, fault);
    if (status)
        return status;
    struct json_pair pair = {0};
    if (json_count(pattern) != 1 || !json_next(pattern, &pair) ||
        !json_as_bytes(pair.value, &text, &bytes) || !bytes || strlen(text) != bytes)
        return fault_set(fault, STATUS_CORRUPT, "a Split pattern must be one Regex or String");
    return pair.key[0] == 'R' ? tokenizer__compile(text, bytes, &stage->code, fault)
                              : tokenizer__compile_literal(text, bytes, &stage->code, fault);
}

// One pre-tokenizer that is no Sequence. *ended: ByteLevel was seen, nothing may follow.
static enum status load_one(struct tokenizer *t, const struct json *value, bool *ended,
                            struct fault *fault)
{
    const char *type;
    enum status status = json_get_string(value, "type", &type, fault);
    if (status)
        return status;
    if (*ended)
        return fault_set(fault, STATUS_UNSUPPORTED,
                         "the pre-tokenizer %.80s after ByteLevel is not supported", type);
    if (strcmp(type, "Split") == 0)
        return load_split(t, value, fault);
    if (strcmp(type, "Digits") == 0)
        return load_digits(t, value, fault);
    if (strcmp(type, "ByteLevel") == 0) {
        *ended = true;
        return load_byte_level(t, value, fault);
    }
    return fault_set(fault, STATUS_UNSUPPORTED, "the pre-tokenizer '%.80s' is not supported", type);
}

enum status tokenizer__load_splits(struct tokenizer *t, const struct json *pre_tokenizer,
                                   struct fault *fault)
{
    static const char *const known[] = {"type", "pretokenizers"};
    const char *type = "none";
    const struct json *list;
    bool byte_level = false;
    enum status status = STATUS_OK;
    if (json_kind_of(pre_tokenizer) != JSON_KIND_NULL)
        status = json_get_string(pre_tokenizer, "type", &type, fault);
    if (!status && strcmp(type, "Sequence") == 0) {
        status = tokenizer__known(pre_tokenizer, "Sequence", known, ARRAY_COUNT(known), fault);
        if (!status)
            status = json_get_array(pre_tokenizer, "pretokenizers", &list, fault);
        for (size_t i = 0; !status && i < json_count(list); i++)
            status = load_one(t, json_at(list, i), &byte_level, fault);
    } else if (!status && json_kind_of(pre_tokenizer) != JSON_KIND_NULL) {
        status = load_one(t, pre_tokenizer, &byte_level, fault);
    }
    if (!status && !byte_level)
        status = fault_set(fault, STATUS_UNSUPPORTED,
                           "a pre-tokenizer without ByteLevel ('%.80s') is not supported", type);
    return status;
}

// ---- running ----

struct splitter {
    const struct tokenizer *tokenizer;
    struct token_scratch *scratch;
    const struct word_sink *sink;
    bool prefix_space;
};

struct piece {
    size_t begin, end;
    bool match;
};

static enum status run_stages(const struct splitter *s, size_t first, const uint8_t *text,
                              size_t bytes);

// The next match at or after *from; *last_end is the end of the match before (SIZE_MAX at first).
// STATUS_NOT_FOUND when there is none.
static enum status next_match(const struct splitter *s, const struct stage *stage,
                              const uint8_t *text, size_t bytes, size_t *from, size_t *last_end,
                              struct piece *found)
{
    while (*from <= bytes) {
        int n = pcre2_match(stage->code, text, bytes, *from, PCRE2_NO_UTF_CHECK, s->scratch->match,
                            s->scratch->context);
        if (n == PCRE2_ERROR_NOMATCH)
            break;
        if (n == PCRE2_ERROR_NOMEMORY)
            return STATUS_NO_MEMORY;
        if (n < 0)
            return STATUS_LIMIT;
        const PCRE2_SIZE *ends = pcre2_get_ovector_pointer(s->scratch->match);
        *found = (struct piece){.begin = ends[0], .end = ends[1], .match = true};
        if (found->begin > found->end)
            return STATUS_LIMIT;
        if (found->begin == found->end && found->end == *last_end) {
            *from += *from < bytes ? (size_t)utf8__scan(text + *from, bytes - *from) : 1;
            continue;
        }
        *from = *last_end = found->end;
        return STATUS_OK;
    }
    return STATUS_NOT_FOUND;
}

// Joins pieces by the stage's behaviour. Empty matches take part in joining but give no word.
struct joiner {
    const struct splitter *splitter;
    const uint8_t *text;
    size_t next_stage;
    enum split_behavior behavior;
    bool invert, waiting, previous_match;
    struct piece piece; // valid when waiting
};

static enum status hand_on(const struct joiner *j, const struct piece *piece)
{
    if (piece->begin == piece->end || (j->behavior == SPLIT_REMOVED && piece->match))
        return STATUS_OK;
    return run_stages(j->splitter, j->next_stage, j->text + piece->begin,
                      piece->end - piece->begin);
}

static enum status join(struct joiner *j, struct piece piece)
{
    bool glue = false;
    piece.match ^= j->invert;
    if (j->behavior == SPLIT_CONTIGUOUS)
        glue = piece.match == j->previous_match;
    else if (j->behavior == SPLIT_MERGED_WITH_PREVIOUS)
        glue = piece.match && !j->previous_match;
    else if (j->behavior == SPLIT_MERGED_WITH_NEXT)
        glue = !piece.match && j->previous_match;
    j->previous_match = piece.match;
    if (glue && j->waiting) {
        j->piece.end = piece.end;
        return STATUS_OK;
    }
    enum status status = j->waiting ? hand_on(j, &j->piece) : STATUS_OK;
    j->piece = piece;
    j->waiting = true;
    return status;
}

static enum status run_split(const struct splitter *s, size_t index, const uint8_t *text,
                             size_t bytes)
{
    const struct stage *stage = &s->tokenizer->stages[index];
    struct joiner j = {.splitter = s,
                       .text = text,
                       .next_stage = index + 1,
                       .behavior = stage->behavior,
                       .invert = stage->invert};
    size_t from = 0, last_end = SIZE_MAX, done = 0;
    struct piece found;
    enum status status;
    while (!(status = next_match(s, stage, text, bytes, &from, &last_end, &found))) {
        if (done != found.begin)
            status = join(&j, (struct piece){.begin = done, .end = found.begin});
        if (!status)
            status = join(&j, found);
        if (status)
            return status;
        done = found.end;
    }
    if (status != STATUS_NOT_FOUND)
        return status;
    status = STATUS_OK;
    if (done != bytes)
        status = join(&j, (struct piece){.begin = done, .end = bytes});
    return !status && j.waiting ? hand_on(&j, &j.piece) : status;
}

static enum status run_prefix(const struct splitter *s, size_t index, const uint8_t *text,
                              size_t bytes)
{
    struct buffer *copy = &s->scratch->prefixed; // free to use: this stage occurs at most once
    if (!s->prefix_space || text[0] == ' ')
        return run_stages(s, index + 1, text, bytes);
    copy->count = 0;
    enum status status = buffer__append(copy, " ", 1);
    if (!status)
        status = buffer__append(copy, text, bytes);
    return status ? status : run_stages(s, index + 1, copy->bytes, copy->count);
}

// Recursion is as deep as there are stages.
static enum status run_stages(const struct splitter *s, size_t first, const uint8_t *text,
                              size_t bytes)
{
    if (first == s->tokenizer->stage_count)
        return s->sink->word(s->sink->context, text, bytes);
    if (s->tokenizer->stages[first].kind == STAGE_PREFIX_SPACE)
        return run_prefix(s, first, text, bytes);
    return run_split(s, first, text, bytes);
}

enum status tokenizer__split(const struct tokenizer *t, struct token_scratch *scratch,
                             const uint8_t *text, size_t bytes, bool prefix_space,
                             const struct word_sink *sink)
{
    struct splitter splitter = {
        .tokenizer = t, .scratch = scratch, .sink = sink, .prefix_space = prefix_space};
    // In proportion to the text, so that a legitimate run of 1 MB passes and a pattern that
    // explodes ends.
    size_t limit = 1000000 + 64 * bytes;
    pcre2_set_match_limit(scratch->context, (uint32_t)min_size(limit, UINT32_MAX));
    return bytes ? run_stages(&splitter, 0, text, bytes) : STATUS_OK;
}
