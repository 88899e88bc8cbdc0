// SPDX-License-Identifier: Apache-2.0
// UTF-8, and the Unicode normal forms as the package's normalizer gives them.
//
// The package's normalizer knows Unicode 9. Characters that came later and that utf8proc would
// change or reorder are `inert` (unicode.c): they are copied and nothing composes or reorders
// across them, which is how Unicode treats unassigned characters.
//
// Text is handled in pieces that cannot influence each other: a piece begins at an ASCII character
// or at an inert one. Decomposition is utf8proc's, one character at a time; marks are put in order
// here, by a counting sort, because utf8proc's is quadratic in the length of a run of marks;
// composition is utf8proc's.
#include "runtime/tokenizer/internal.h"

#include <string.h>

#include <utf8proc.h>

int utf8__scan(const uint8_t *text, size_t bytes)
{
    uint8_t first = text[0], low = 0x80, high = 0xbf;
    int need;
    if (first < 0x80)
        return 1;
    if (first >= 0xc2 && first <= 0xdf) {
        need = 1;
    } else if (first >= 0xe0 && first <= 0xef) {
        need = 2;
        low = first == 0xe0 ? 0xa0 : low;
        high = first == 0xed ? 0x9f : high;
    } else if (first >= 0xf0 && first <= 0xf4) {
        need = 3;
        low = first == 0xf0 ? 0x90 : low;
        high = first == 0xf4 ? 0x8f : high;
    } else {
        return -1;
    }
    for (int i = 1; i <= need; i++) {
        if ((size_t)i == bytes)
            return 0;
        if (text[i] < low || text[i] > high)
            return -i;
        low = 0x80;
        high = 0xbf;
    }
    return need + 1;
}

int32_t utf8__point(const uint8_t *text)
{
    uint32_t b = text[0];
    if (b < 0x80)
        return (int32_t)b;
    if (b < 0xe0)
        return (int32_t)((b & 0x1f) << 6 | (text[1] & 0x3fu));
    if (b < 0xf0)
        return (int32_t)((b & 0x0f) << 12 | (text[1] & 0x3fu) << 6 | (text[2] & 0x3fu));
    return (int32_t)((b & 0x07) << 18 | (text[1] & 0x3fu) << 12 | (text[2] & 0x3fu) << 6 |
                     (text[3] & 0x3fu));
}

static utf8proc_option_t form_options(enum normal_form form)
{
    utf8proc_option_t options = UTF8PROC_STABLE;
    if (form == FORM_NFC || form == FORM_NFKC)
        options |= UTF8PROC_COMPOSE;
    else
        options |= UTF8PROC_DECOMPOSE;
    if (form == FORM_NFKC || form == FORM_NFKD)
        options |= UTF8PROC_COMPAT;
    return options;
}

static int combining_class(int32_t point)
{
    return (int)utf8proc_get_property(point)->combining_class;
}

// Stable counting sort of a run of marks by combining class. `spare` has room for the run.
static void order_marks(int32_t *run, size_t count, int32_t *spare)
{
    size_t start[257] = {0};
    for (size_t i = 0; i < count; i++)
        start[combining_class(run[i]) + 1]++;
    for (int c = 0; c < 256; c++)
        start[c + 1] += start[c];
    for (size_t i = 0; i < count; i++)
        spare[start[combining_class(run[i])]++] = run[i];
    memcpy(run, spare, count * sizeof *run);
}

static void order_all(int32_t *points, size_t count, int32_t *spare)
{
    for (size_t i = 0; i < count;) {
        size_t end = i;
        while (end < count && combining_class(points[end]))
            end++;
        if (end - i > 1)
            order_marks(points + i, end - i, spare);
        i = end + 1;
    }
}

static enum status append_points(struct buffer *out, const int32_t *points, size_t count)
{
    for (size_t i = 0; i < count; i++) {
        uint8_t bytes[4];
        utf8proc_ssize_t length = utf8proc_encode_char(points[i], bytes);
        enum status status = buffer__append(out, bytes, (size_t)length);
        if (status)
            return status;
    }
    return STATUS_OK;
}

// One piece that nothing outside influences.
static enum status normalize_piece(utf8proc_option_t options, struct token_scratch *scratch,
                                   const uint8_t *text, size_t bytes, struct buffer *out)
{
    size_t count = 0;
    for (size_t i = 0; i < bytes;) {
        // The longest decomposition in Unicode is 18 characters; twice the room, for order_marks.
        enum status status = tokenizer__grow((void **)&scratch->points, &scratch->points_capacity,
                                             2 * (count + 32), sizeof *scratch->points);
        if (status)
            return status;
        int boundary = 0;
        utf8proc_ssize_t n = utf8proc_decompose_char(utf8__point(text + i), scratch->points + count,
                                                     32, options, &boundary);
        if (n < 0 || n > 32)
            return STATUS_INTERNAL;
        count += (size_t)n;
        i += (size_t)utf8__scan(text + i, bytes - i);
    }
    order_all(scratch->points, count, scratch->points + count);
    utf8proc_ssize_t left =
        utf8proc_normalize_utf32(scratch->points, (utf8proc_ssize_t)count, options);
    return left < 0 ? STATUS_INTERNAL : append_points(out, scratch->points, (size_t)left);
}

// Where the piece that starts at `begin` ends, given that it does not start with an inert
// character.
static size_t piece_end(const uint8_t *text, size_t bytes, size_t begin)
{
    size_t end = begin;
    do
        end += (size_t)utf8__scan(text + end, bytes - end);
    while (end < bytes && text[end] >= 0x80 && !tokenizer__inert(utf8__point(text + end)));
    return end;
}

static size_t ascii_run(const uint8_t *text, size_t bytes)
{
    size_t run = 0;
    while (run < bytes && text[run] < 0x80)
        run++;
    return run;
}

enum status tokenizer__normalize(enum normal_form form, struct token_scratch *scratch,
                                 const uint8_t *text, size_t bytes, struct buffer *out)
{
    utf8proc_option_t options = form_options(form);
    enum status status = STATUS_OK;
    for (size_t begin = 0, end; !status && begin < bytes; begin = end) {
        // The last of a run of ASCII may compose with what follows; those before it are copied.
        size_t run = ascii_run(text + begin, bytes - begin);
        size_t plain = begin + run == bytes ? run : run - (run > 0);
        if (!plain && !run && tokenizer__inert(utf8__point(text + begin)))
            plain = (size_t)utf8__scan(text + begin, bytes - begin);
        end = plain ? begin + plain : piece_end(text, bytes, begin);
        if (plain)
            status = buffer__append(out, text + begin, plain);
        else
            status = normalize_piece(options, scratch, text + begin, end - begin, out);
    }
    return status;
}
