// SPDX-License-Identifier: Apache-2.0
// Patterns of tokenizer.json, written for Oniguruma (Ruby syntax), as PCRE2 code that matches the
// same.
//
// The pattern is read and written anew. Every literal becomes a code point, every class of
// characters is spelled out with what Oniguruma's newer Unicode adds (unicode.c) and without what
// PCRE2 adds (\s has no U+180E). What the two engines read differently, or what we have not
// compared, is refused by name: anchors, \w \W \b \h \R, scripts, && and [[:x:]] and nested
// classes, groups that capture by name or set options, {n}? {n,m}+ {,n}, back references, and in
// (?i:...) all but ASCII without ligatures (Oniguruma folds "ss" to sharp s).
#include "runtime/tokenizer/internal.h"

#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { PATTERN_MAX = 4096, OUTPUT_MAX = 256 << 10, NEST_MAX = 64 };

static const char space_members[] = "\\x{9}-\\x{D}\\x{20}\\x{85}\\x{A0}\\x{1680}\\x{2000}-\\x{200A}"
                                    "\\x{2028}\\x{2029}\\x{202F}\\x{205F}\\x{3000}";
static const char other_members[] =
    "\\x{0}-\\x{8}\\x{E}-\\x{1F}\\x{21}-\\x{84}\\x{86}-\\x{9F}\\x{A1}-\\x{167F}\\x{1681}-\\x{1FFF}"
    "\\x{200B}-\\x{2027}\\x{202A}-\\x{202E}\\x{2030}-\\x{205E}\\x{2060}-\\x{2FFF}\\x{3001}-\\x{"
    "D7FF}"
    "\\x{E000}-\\x{10FFFF}";

struct translation {
    const char *pattern;
    size_t bytes, at;
    char *out;
    size_t out_bytes;
    int depth;
    int caseless;         // depth at which (?i: was opened, 0 when none is open
    bool folds_with_next; // caseless: the last atom could begin a ligature
    struct fault *fault;
};

static enum status refuse(const struct translation *x, const char *what)
{
    return fault_set(x->fault, STATUS_UNSUPPORTED,
                     "pattern '%.120s': %s is not supported (byte %zu)", x->pattern, what, x->at);
}

static enum status put(struct translation *x, const char *format, ...) PRINTF_LIKE(2, 3);
static enum status put(struct translation *x, const char *format, ...)
{
    va_list list;
    va_start(list, format);
    int n = vsnprintf(x->out + x->out_bytes, OUTPUT_MAX - x->out_bytes, format, list);
    va_end(list);
    if (n < 0 || (size_t)n >= OUTPUT_MAX - x->out_bytes)
        return fault_set(x->fault, STATUS_LIMIT, "pattern '%.120s' is too long", x->pattern);
    x->out_bytes += (size_t)n;
    return STATUS_OK;
}

static char peek(const struct translation *x, size_t ahead)
{
    return x->at + ahead < x->bytes ? x->pattern[x->at + ahead] : '\0';
}

static bool alphanumeric(int32_t c)
{
    return (c >= '0' && c <= '9') || (c >= 'a' && c <= 'z') || (c >= 'A' && c <= 'Z');
}

static int hex_value(char c)
{
    if (c >= '0' && c <= '9')
        return c - '0';
    c = (char)(c | 0x20);
    return c >= 'a' && c <= 'f' ? c - 'a' + 10 : -1;
}

// Up to digits_max hexadecimal digits at x->at; false when there is none.
static bool read_hex(struct translation *x, int digits_max, int32_t *out)
{
    int digits = 0;
    for (*out = 0; digits < digits_max && hex_value(peek(x, 0)) >= 0; digits++)
        *out = *out * 16 + hex_value(x->pattern[x->at++]);
    return digits > 0;
}

// \x41, \x{1F600}, \u0041; x->at is at the letter.
static enum status read_hex_escape(struct translation *x, int32_t *point)
{
    bool braces = peek(x, 0) == 'x' && peek(x, 1) == '{', wide = peek(x, 0) == 'u';
    size_t begin = x->at += 1 + braces;
    if (!read_hex(x, braces ? 7 : wide ? 4 : 2, point) || (wide && x->at - begin != 4))
        return refuse(x, "this escape");
    if (braces && peek(x, 0) != '}')
        return refuse(x, "this escape");
    x->at += braces;
    if (*point > 0x10ffff || (*point >= 0xd800 && *point <= 0xdfff))
        return refuse(x, "a code point beyond Unicode");
    if (!braces && !wide && *point > 0x7f)
        return refuse(x, "a byte above 0x7f");
    return STATUS_OK;
}

// One literal character, escaped or not; x->at is at it. An escape that is a class or an anchor is
// refused.
static enum status read_point(struct translation *x, int32_t *point)
{
    static const char letters[] = "rntfvae", codes[] = "\r\n\t\f\v\a\x1b";
    if (peek(x, 0) != '\\') {
        const uint8_t *p = (const uint8_t *)x->pattern + x->at;
        *point = utf8__point(p);
        x->at += (size_t)utf8__scan(p, x->bytes - x->at);
        return STATUS_OK;
    }
    x->at++;
    char c = peek(x, 0);
    if (c == 'x' || c == 'u')
        return read_hex_escape(x, point);
    const char *known = c ? strchr(letters, c) : NULL;
    if (known)
        *point = codes[known - letters];
    else if (c > 0x20 && c < 0x7f && !alphanumeric(c))
        *point = c;
    else
        return refuse(x, "this escape");
    x->at++;
    return STATUS_OK;
}

static enum status put_point(struct translation *x, int32_t point)
{
    if (x->caseless && point > 0x7f)
        return refuse(x, "a character beyond ASCII in (?i:)");
    return alphanumeric(point) ? put(x, "%c", (char)point) : put(x, "\\x{%X}", (unsigned)point);
}

// Ligatures of two ASCII letters: ff fi fl ss st.
static enum status guard_fold(struct translation *x, int32_t point)
{
    int32_t lower = point | 0x20;
    if (x->folds_with_next &&
        (lower == 's' || lower == 't' || lower == 'f' || lower == 'i' || lower == 'l'))
        return refuse(x, "a pair of letters with a ligature in (?i:)");
    return STATUS_OK;
}

static bool starts_ligature(int32_t point)
{
    return (point | 0x20) == 's' || (point | 0x20) == 'f';
}

// The name of \p{...}; x->at is at the p. Sets the members of the class.
static enum status read_property(struct translation *x, const char **members)
{
    if (x->caseless)
        return refuse(x, "a class of characters in (?i:)");
    const char *name = x->pattern + x->at + 2;
    const char *end = peek(x, 1) == '{' ? memchr(name, '}', x->bytes - x->at - 2) : NULL;
    *members = end ? tokenizer__class(name, (size_t)(end - name)) : NULL;
    if (!*members || name[0] < 'A' || name[0] > 'Z')
        return refuse(x, "this property");
    x->at += (size_t)(end - name) + 3;
    return STATUS_OK;
}

// \s \S \d \D \p{} \P{} at x->at (the letter); *members is NULL when it is none of them.
static enum status read_class_escape(struct translation *x, const char **members, bool *negated)
{
    char c = peek(x, 0);
    *members = NULL;
    *negated = c == 'D' || c == 'P';
    if (c == 'p' || c == 'P')
        return read_property(x, members);
    if (c != 's' && c != 'S' && c != 'd' && c != 'D')
        return STATUS_OK;
    if (x->caseless)
        return refuse(x, "a class of characters in (?i:)");
    x->at++;
    *members = c == 's' ? space_members : c == 'S' ? other_members : tokenizer__class("d", 1);
    return STATUS_OK;
}

// A member or a range of a bracketed class.
static enum status class_range(struct translation *x, bool first, bool *ligature)
{
    int32_t low, high;
    bool dash = peek(x, 0) == '-';
    enum status status = read_point(x, &low);
    if (status)
        return status;
    if (dash && !first && peek(x, 0) != ']')
        return refuse(x, "a bare - inside a class");
    high = low;
    bool range = !dash && peek(x, 0) == '-' && peek(x, 1) != ']';
    if (range) {
        x->at++;
        if (peek(x, 0) == '[')
            return refuse(x, "a class inside a class");
        status = read_point(x, &high);
        if (!status && high < low)
            status = refuse(x, "an empty range");
    }
    for (int32_t c = low; x->caseless && !status && c <= high && c < 0x80; c++) {
        status = guard_fold(x, c);
        *ligature = *ligature || starts_ligature(c);
    }
    if (!status)
        status = put_point(x, low);
    if (!status && range) {
        status = put(x, "-");
        if (!status)
            status = put_point(x, high);
    }
    return status;
}

static enum status class_member(struct translation *x, bool first, bool *ligature)
{
    char c = peek(x, 0);
    if (c == '[')
        return refuse(x, "a class inside a class");
    if (c == '&' && peek(x, 1) == '&')
        return refuse(x, "&&");
    if (c == '\\') {
        const char *members;
        bool negated;
        x->at++;
        enum status status = read_class_escape(x, &members, &negated);
        if (status)
            return status;
        if (members && (negated || (peek(x, 0) == '-' && peek(x, 1) != ']')))
            return refuse(x, "this use of a class of characters");
        if (members)
            return put(x, "%s", members);
        x->at--;
    }
    return class_range(x, first, ligature);
}

static enum status translate_class(struct translation *x)
{
    bool ligature = false;
    x->at++;
    bool negated = peek(x, 0) == '^';
    x->at += negated;
    if (negated && x->caseless)
        return refuse(x, "a negated class in (?i:)");
    if (peek(x, 0) == ']')
        return refuse(x, "an empty class");
    enum status status = put(x, negated ? "[^" : "[");
    for (bool first = true; !status; first = false) {
        if (x->at >= x->bytes)
            return refuse(x, "a class without end");
        if (!first && peek(x, 0) == ']')
            break;
        status = class_member(x, first, &ligature);
    }
    if (status)
        return status;
    x->at++;
    x->folds_with_next = ligature;
    return put(x, "]");
}

static enum status translate_escape(struct translation *x)
{
    const char *members;
    bool negated;
    x->at++;
    enum status status = read_class_escape(x, &members, &negated);
    if (status)
        return status;
    if (members)
        return put(x, negated ? "[^%s]" : "[%s]", members);
    x->at--;
    int32_t point;
    status = read_point(x, &point);
    if (!status && x->caseless)
        status = guard_fold(x, point);
    x->folds_with_next = starts_ligature(point);
    return status ? status : put_point(x, point);
}

static enum status open_group(struct translation *x)
{
    static const char *const kinds[] = {"(?:", "(?i:", "(?=", "(?!", "(?<=", "(?<!", "(?>"};
    if (x->caseless)
        return refuse(x, "a group inside (?i:)");
    if (++x->depth > NEST_MAX)
        return refuse(x, "such deep nesting");
    if (peek(x, 1) != '?' && peek(x, 1) != '*') { // captures, and nothing can refer to it
        x->at++;
        return put(x, "(?:");
    }
    for (size_t i = 0; i < sizeof kinds / sizeof kinds[0]; i++) {
        size_t length = strlen(kinds[i]);
        if (length <= x->bytes - x->at && memcmp(kinds[i], x->pattern + x->at, length) == 0) {
            x->at += length;
            x->caseless = kinds[i][2] == 'i' ? x->depth : 0;
            x->folds_with_next = false;
            return put(x, "%s", kinds[i]);
        }
    }
    return refuse(x, "this kind of group");
}

// What follows * + ? or {n,m}: lazy or possessive, but no second repetition.
static enum status end_repeat(struct translation *x, bool may_be_possessive, bool may_be_lazy)
{
    char c = peek(x, 0);
    if ((c == '?' && may_be_lazy) || (c == '+' && may_be_possessive)) {
        enum status status = put(x, "%c", c);
        x->at++;
        if (status)
            return status;
        c = peek(x, 0);
    }
    if (c == '*' || c == '+' || c == '?' || (c == '{' && hex_value(peek(x, 1)) >= 0))
        return refuse(x, "this repetition of a repetition");
    return STATUS_OK;
}

// {n}, {n,}, {n,m}; any other brace is a literal.
static enum status translate_brace(struct translation *x)
{
    int n = 0, m = 0, used = 0;
    char text[24];
    (void)snprintf(text, sizeof text, "%.*s", (int)(x->bytes - x->at < 23 ? x->bytes - x->at : 23),
                   x->pattern + x->at);
    if (peek(x, 1) == ',')
        return refuse(x, "{,n}");
    if (peek(x, 1) < '0' || peek(x, 1) > '9') {
        x->at++;
        return put_point(x, '{');
    }
    bool exact = sscanf(text, "{%4d}%n", &n, &used) == 1 && used;
    bool open = !exact && sscanf(text, "{%4d,}%n", &n, &used) == 1 && used;
    bool range = !exact && !open && sscanf(text, "{%4d,%4d}%n", &n, &m, &used) == 2 && used;
    if (!exact && !open && !range)
        return refuse(x, "this brace");
    if (n > 1000 || m > 1000 || (range && m < n))
        return refuse(x, "this count");
    x->at += (size_t)used;
    enum status status = exact  ? put(x, "{%d}", n)
                         : open ? put(x, "{%d,}", n)
                                : put(x, "{%d,%d}", n, m);
    return status ? status : end_repeat(x, false, !exact);
}

static enum status translate_repeat(struct translation *x)
{
    if (x->caseless)
        return refuse(x, "a repetition inside (?i:)");
    if (peek(x, 0) == '{')
        return translate_brace(x);
    enum status status = put(x, "%c", peek(x, 0));
    x->at++;
    return status ? status : end_repeat(x, true, true);
}

static enum status translate_atom(struct translation *x)
{
    switch (peek(x, 0)) {
    case '\\':
        return translate_escape(x);
    case '[':
        return translate_class(x);
    case '(':
        return open_group(x);
    case ')':
        if (!x->depth)
            return refuse(x, "a ) without (");
        x->caseless = x->caseless == x->depth ? 0 : x->caseless;
        x->depth--;
        x->at++;
        return put(x, ")");
    case '|':
        x->folds_with_next = false;
        x->at++;
        return put(x, "|");
    case '.':
        x->at++;
        return x->caseless ? refuse(x, ". in (?i:)") : put(x, "[^\\x{A}]");
    case '*':
    case '+':
    case '?':
    case '{':
        return translate_repeat(x);
    case '^':
    case '$':
        return refuse(x, "an anchor");
    default:
        break;
    }
    int32_t point;
    enum status status = read_point(x, &point);
    if (!status && x->caseless)
        status = guard_fold(x, point);
    x->folds_with_next = starts_ligature(point);
    return status ? status : put_point(x, point);
}

static enum status compile(const char *translated, size_t bytes, const char *shown,
                           pcre2_code **out, struct fault *fault)
{
    int error;
    PCRE2_SIZE offset;
    PCRE2_UCHAR sentence[120];
    *out = pcre2_compile((PCRE2_SPTR)translated, bytes,
                         PCRE2_UTF | PCRE2_UCP | PCRE2_NEVER_BACKSLASH_C, &error, &offset, NULL);
    if (*out) {
        (void)pcre2_jit_compile(*out, PCRE2_JIT_COMPLETE); // without a JIT the interpreter serves
        return STATUS_OK;
    }
    if (error == PCRE2_ERROR_NOMEMORY)
        return STATUS_NO_MEMORY;
    (void)pcre2_get_error_message(error, sentence, sizeof sentence);
    return fault_set(fault, STATUS_UNSUPPORTED, "pattern '%.120s': %s", shown,
                     (const char *)sentence);
}

enum status tokenizer__compile(const char *pattern, size_t bytes, pcre2_code **out,
                               struct fault *fault)
{
    if (bytes > PATTERN_MAX)
        return fault_set(fault, STATUS_LIMIT, "pattern '%.120s' is longer than %d bytes", pattern,
                         PATTERN_MAX);
    struct translation x = {.pattern = pattern, .bytes = bytes, .fault = fault};
    x.out = malloc(OUTPUT_MAX);
    if (!x.out)
        return STATUS_NO_MEMORY;
    enum status status = STATUS_OK;
    while (!status && x.at < x.bytes)
        status = translate_atom(&x);
    if (!status && x.depth)
        status = refuse(&x, "a ( without )");
    if (!status)
        status = compile(x.out, x.out_bytes, pattern, out, fault);
    free(x.out);
    return status;
}

enum status tokenizer__compile_literal(const char *text, size_t bytes, pcre2_code **out,
                                       struct fault *fault)
{
    struct translation x = {.pattern = text, .bytes = bytes, .fault = fault};
    if (bytes > PATTERN_MAX)
        return fault_set(fault, STATUS_LIMIT, "pattern '%.120s' is longer than %d bytes", text,
                         PATTERN_MAX);
    x.out = malloc(OUTPUT_MAX);
    if (!x.out)
        return STATUS_NO_MEMORY;
    enum status status = STATUS_OK;
    while (!status && x.at < bytes) {
        const uint8_t *p = (const uint8_t *)text + x.at;
        status = put_point(&x, utf8__point(p));
        x.at += (size_t)utf8__scan(p, bytes - x.at);
    }
    if (!status)
        status = compile(x.out, x.out_bytes, text, out, fault);
    free(x.out);
    return status;
}

enum status tokenizer__compile_class(const char *name, pcre2_code **out, struct fault *fault)
{
    char pattern[4096];
    (void)snprintf(pattern, sizeof pattern, "[%s]", tokenizer__class(name, strlen(name)));
    return compile(pattern, strlen(pattern), name, out, fault);
}
