// SPDX-License-Identifier: Apache-2.0
// Python regular expressions for the three uses PEFT makes of them, on PCRE2.
//
// Most patterns in the wild are plain names ("q_proj", "layers.3.mlp.down_proj"): letters, digits,
// "_" and ".", where "." is any character. Those are matched by hand, which is exact because such a
// pattern has a fixed length; the rest is compiled.
//
// What is compiled is rewritten first, by a list of what means the same in both dialects: the names
// are letters, digits, "_" and ".", so that newlines and Unicode make no difference. "{,n}" becomes
// "{0,n}", and a "{" that Python's re takes literally gets a backslash, because PCRE2 10.43 repeats
// by "{ 1,2 }" too. All the rest is refused by name: what only PCRE2 knows ("\Q", "(*ACCEPT)",
// "[[:alpha:]]", "(?R)"), and what no pattern of names has a use for (conditions, comments, octal
// numbers).
//
// The text is an outsider's, so its length, the steps of a match and the depth are bounded. A match
// that runs into the bound is not "no": the answer is unknown, and whoever asked must refuse the
// adapter (peft_config.c).
#define PCRE2_CODE_UNIT_WIDTH 8
#include <pcre2.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "adapters/peft.h"
#include "base/check.h"

enum { PATTERN_BYTES_MAX = 4096, MATCH_STEPS_MAX = 4000, MATCH_DEPTH_MAX = 1000 };

struct peft_pattern {
    enum peft_match match;
    const char *what;
    char *text;
    bool is_plain; // matched by hand; nothing below is set
    size_t length;
    pcre2_code *code;
    pcre2_match_data *data;
    pcre2_match_context *context;
};

static bool is_plain(const char *text)
{
    if (!*text)
        return false;
    for (; *text; text++)
        if (!((*text >= 'a' && *text <= 'z') || (*text >= 'A' && *text <= 'Z') ||
              (*text >= '0' && *text <= '9') || *text == '_' || *text == '.'))
            return false;
    return true;
}

// ---- from Python's dialect to PCRE2's ----

struct rewriting {
    const char *at;
    const char *flags_at; // "(?i)" may stand here alone
    char *out;            // room for twice the text
    bool looks_around;
    char refused[8]; // what is not supported, when it is
};

static void copy(struct rewriting *r, size_t count)
{
    memcpy(r->out, r->at, count);
    r->out += count;
    r->at += count;
}

static bool refuse(struct rewriting *r, size_t count)
{
    (void)snprintf(r->refused, sizeof r->refused, "%.*s", (int)count, r->at);
    return false;
}

static bool is_alphanumeric(char c)
{
    return (c >= 'a' && c <= 'z') || (c >= 'A' && c <= 'Z') || (c >= '0' && c <= '9');
}

// A "\": what follows is no letter or digit, or one of those that mean the same.
static bool escape(struct rewriting *r, bool in_class)
{
    static const char hex[] = "0123456789abcdefABCDEF";
    const char *letters = in_class ? "dDsSwWbaftnrv" : "dDsSwWbaftnrvABZ";
    char c = r->at[1];
    if (c == 'x' && r->at[2] && strchr(hex, r->at[2]) && r->at[3] && strchr(hex, r->at[3])) {
        copy(r, 4);
        return true;
    }
    // of more digits PCRE2 makes a back reference where Python makes a character
    bool refers = !in_class && c >= '1' && c <= '9' && !(r->at[2] >= '0' && r->at[2] <= '9');
    if (!c || (is_alphanumeric(c) && !strchr(letters, c) && !refers))
        return refuse(r, 2);
    copy(r, 2);
    return true;
}

// A "[" and what follows up to its "]". One that has no end is left to PCRE2 to refuse.
static bool class(struct rewriting *r)
{
    copy(r, r->at[1] == '^' ? 2 : 1);
    if (*r->at == ']') // the first is a character of the class
        copy(r, 1);
    while (*r->at && *r->at != ']') {
        if (*r->at == '\\') {
            if (!escape(r, true))
                return false;
            continue;
        }
        if (*r->at == '[' && r->at[1] && strchr(":.=", r->at[1]))
            return refuse(r, 2);
        copy(r, 1);
    }
    if (*r->at)
        copy(r, 1);
    return true;
}

// A "(" with all that says what group it opens.
static bool group(struct rewriting *r)
{
    static const char *const kinds[] = {"(?:", "(?=", "(?!", "(?<=", "(?<!", "(?P<", "(?P=", "(?>"};
    if (r->at[1] == '*')
        return refuse(r, 2);
    if (r->at[1] != '?') {
        copy(r, 1);
        return true;
    }
    for (size_t i = 0; i < ARRAY_COUNT(kinds); i++)
        if (strncmp(r->at, kinds[i], strlen(kinds[i])) == 0) {
            r->looks_around |= strpbrk(kinds[i], "=!") != NULL; // (?P= too, which costs little
            copy(r, strlen(kinds[i]));
            return true;
        }
    size_t on = strspn(r->at + 2, "ims"), off = r->at[2 + on] == '-';
    off += off ? strspn(r->at + 2 + on + 1, "ims") : 0;
    char end = r->at[2 + on + off];
    if ((end == ':' && on + off) || (end == ')' && on && !off && r->at == r->flags_at)) {
        copy(r, 2 + on + off + 1);
        return true;
    }
    return refuse(r, 3);
}

// A "{": Python repeats by {n}, {n,}, {,m}, {n,m} and {,}; all else is the character.
static void brace(struct rewriting *r)
{
    static const char digits[] = "0123456789";
    size_t low = strspn(r->at + 1, digits), length = 1 + low;
    bool has_comma = r->at[length] == ',';
    if (has_comma)
        length += 1 + strspn(r->at + length + 1, digits);
    if (r->at[length] != '}' || (!low && !has_comma)) {
        *r->out++ = '\\';
        copy(r, 1);
        return;
    }
    copy(r, 1);
    if (!low)
        *r->out++ = '0';
    copy(r, length);
}

static bool rewrite(struct rewriting *r)
{
    for (const char *at = r->at; *at; at++)
        if ((unsigned char)*at >= 0x80) { // in no name, and letters fold to ASCII by other rules
            r->at = at;
            return refuse(r, (unsigned char)*at >= 0xf0 ? 4 : (unsigned char)*at >= 0xe0 ? 3 : 2);
        }
    while (*r->at) {
        bool good = true;
        if (*r->at == '\\')
            good = escape(r, false);
        else if (*r->at == '[')
            good = class(r);
        else if (*r->at == '(')
            good = group(r);
        else if (*r->at == '{')
            brace(r);
        else
            copy(r, 1);
        if (!good)
            return false;
    }
    *r->out = 0;
    return true;
}

// The whole is rewritten, not the text: a text may go on what stands before it ("?:a" as a key).
static enum status compile(struct peft_pattern *pattern, struct fault *fault)
{
    static const char *const before[] = {"", "(.*\\.)?(", "(?:^|.*?\\.)"};
    static const char *const after[] = {"", ")$", "\\.(?P<idx>\\d+)\\."};
    char whole[PATTERN_BYTES_MAX + 64], rewritten[2 * sizeof whole];
    int error;
    PCRE2_SIZE at;
    (void)snprintf(whole, sizeof whole, "%s%s%s", before[pattern->match], pattern->text,
                   after[pattern->match]);
    struct rewriting r = {
        .at = whole, .flags_at = whole + strlen(before[pattern->match]), .out = rewritten};
    // A repeat that begins a layers_pattern is of the group before it, where "^" is empty: which
    // number is then found first differs.
    bool repeats = pattern->match == PEFT_MATCH_LAYER && strcspn(pattern->text, "*+?{") == 0 &&
                   pattern->text[0];
    if (repeats)
        r.at = r.flags_at;
    if (repeats ? !refuse(&r, 1) : !rewrite(&r))
        return fault_set(fault, STATUS_UNSUPPORTED,
                         "%s: \"%.100s\" has \"%s\", which is not supported in a pattern; write it "
                         "without.",
                         pattern->what, pattern->text, r.refused);
    // without auto-possession: 10.42 takes the repeat before "(?:a?|b){0,2}+" for one that never
    // gives back
    uint32_t options = PCRE2_ANCHORED | PCRE2_UTF | PCRE2_NEVER_BACKSLASH_C | PCRE2_NO_AUTO_POSSESS;
    if (pattern->match == PEFT_MATCH_FULL)
        options |= PCRE2_ENDANCHORED;
    // PCRE2 10.42 counts a letter twice that is both ahead and matched: "(?=a).*(?i:a)" against "a"
    if (r.looks_around)
        options |= PCRE2_NO_START_OPTIMIZE;
    pattern->code = pcre2_compile((PCRE2_SPTR)rewritten, (PCRE2_SIZE)(r.out - rewritten), options,
                                  &error, &at, NULL);
    if (!pattern->code) {
        PCRE2_UCHAR message[120] = "";
        (void)pcre2_get_error_message(error, message, sizeof message);
        return fault_set(fault, STATUS_INVALID, "%s: \"%.100s\" is no regular expression: %s.",
                         pattern->what, pattern->text, (const char *)message);
    }
    pattern->data = pcre2_match_data_create_from_pattern(pattern->code, NULL);
    pattern->context = pcre2_match_context_create(NULL);
    if (!pattern->data || !pattern->context)
        return fault_set(fault, STATUS_NO_MEMORY, "out of memory for a pattern of %s.",
                         pattern->what);
    (void)pcre2_set_match_limit(pattern->context, MATCH_STEPS_MAX);
    (void)pcre2_set_depth_limit(pattern->context, MATCH_DEPTH_MAX);
    return STATUS_OK;
}

// ---- life and questions ----

enum status peft__pattern_create(const char *text, enum peft_match match, const char *what,
                                 struct peft_pattern **out, struct fault *fault)
{
    if (strlen(text) > PATTERN_BYTES_MAX)
        return fault_set(fault, STATUS_LIMIT, "%s: a pattern has more than %d bytes.", what,
                         PATTERN_BYTES_MAX);
    struct peft_pattern *pattern = calloc(1, sizeof *pattern);
    if (!pattern)
        return fault_set(fault, STATUS_NO_MEMORY, "out of memory for a pattern of %s.", what);
    pattern->match = match;
    pattern->what = what;
    pattern->length = strlen(text);
    pattern->is_plain = match != PEFT_MATCH_LAYER && is_plain(text);
    pattern->text = strdup(text);
    enum status status = STATUS_OK;
    if (!pattern->text)
        status = fault_set(fault, STATUS_NO_MEMORY, "out of memory for a pattern of %s.", what);
    else if (!pattern->is_plain)
        status = compile(pattern, fault);
    if (status)
        peft__pattern_destroy(pattern);
    else
        *out = pattern;
    return status;
}

void peft__pattern_destroy(struct peft_pattern *pattern)
{
    if (!pattern)
        return;
    free(pattern->text);
    pcre2_match_context_free(pattern->context);
    pcre2_match_data_free(pattern->data);
    pcre2_code_free(pattern->code);
    free(pattern);
}

static bool plain_matches(const struct peft_pattern *pattern, const char *name)
{
    size_t length = strlen(name);
#ifndef POLDER_PLANT_BUG // without it the fuzzer must find the names that are shorter
    if (length < pattern->length)
        return false;
#endif
    size_t skipped = length - pattern->length;
    if (skipped && (pattern->match == PEFT_MATCH_FULL || name[skipped - 1] != '.'))
        return false;
    for (size_t i = 0; i < pattern->length; i++)
        if (pattern->text[i] != '.' && pattern->text[i] != name[skipped + i])
            return false;
    return true;
}

enum peft_found peft__pattern_matches(struct peft_pattern *pattern, const char *name,
                                      uint32_t *layer)
{
    if (pattern->is_plain)
        return plain_matches(pattern, name) ? PEFT_FOUND : PEFT_FOUND_NOT;
    int found = pcre2_match(pattern->code, (PCRE2_SPTR)name, strlen(name), 0, 0, pattern->data,
                            pattern->context);
    if (found < 0)
        return found == PCRE2_ERROR_NOMATCH ? PEFT_FOUND_NOT : PEFT_FOUND_UNKNOWN;
    if (pattern->match == PEFT_MATCH_LAYER) {
        PCRE2_UCHAR digits[12];
        PCRE2_SIZE length = sizeof digits;
        if (pcre2_substring_copy_byname(pattern->data, (PCRE2_SPTR) "idx", digits, &length) != 0)
            return PEFT_FOUND_NOT;
        *layer = (uint32_t)strtoul((const char *)digits, NULL, 10);
    }
    return PEFT_FOUND;
}

enum status peft__pattern_unknown(const struct peft_pattern *pattern, struct fault *fault)
{
    return fault_set(fault, STATUS_LIMIT,
                     "%s: \"%.100s\" takes more than %d steps to match; write it more simply.",
                     pattern->what, pattern->text, MATCH_STEPS_MAX);
}
