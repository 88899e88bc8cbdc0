# SPDX-License-Identifier: Apache-2.0
"""Writes runtime/tokenizer/unicode.c: where the `tokenizers` package knows other characters than our libraries.

Usage: python tools/goldens/tokenizer_unicode.py > runtime/tokenizer/unicode.c
Needs Python 3.11 (its unicodedata is Unicode 14, as is PCRE2 10.42 of Debian 12) and tokenizers 0.23.3
(Oniguruma with Unicode 16, Rust std with Unicode 17, its normalizer crate with Unicode 9).
"""
import unicodedata

from tokenizers import AddedToken, Regex, Tokenizer, models, normalizers, pre_tokenizers

assert unicodedata.unidata_version.startswith("14.")
POINTS = [c for c in range(0x110000) if not 0xD800 <= c <= 0xDFFF]
TEXT = "".join(map(chr, POINTS))
CLASSES = "L Lu Ll Lt Lm Lo M Mc Me N Nd Nl No P Pc Pd Ps Pe Pi Pf Po S Sm Sc Sk So Z Zs Zl Zp".split()


def matched(pattern):
    split = pre_tokenizers.Split(Regex(pattern + "+"), "removed", invert=True)
    return {c for _, (a, b) in split.pre_tokenize_str(TEXT) for c in POINTS[a:b]}


def numeric():
    found, inside = set(), False
    for piece, (a, b) in pre_tokenizers.Digits(False).pre_tokenize_str(TEXT):
        inside = inside or piece[0] == "0"
        if inside:
            found.update(POINTS[a:b])
        inside = not inside
    return found


def word():
    tokenizer = Tokenizer(models.WordLevel({"[UNK]": 0}, unk_token="[UNK]"))
    tokenizer.add_tokens([AddedToken("tok", single_word=True, normalized=False)])
    found = set()
    for k in range(0, len(POINTS), 20000):
        part = POINTS[k:k + 20000]
        encoding = tokenizer.encode("".join(" tok" + chr(c) + "!" for c in part))
        hits = {o[0] for i, o in zip(encoding.ids, encoding.offsets) if i == 1}
        found.update(c for j, c in enumerate(part) if j * 6 + 1 not in hits)
    return found


def ours(name):
    return {c for c in POINTS if unicodedata.category(chr(c)).startswith(name)}


def inert():
    """Code points that the normalizer crate (Unicode 9) does not know and a newer library would change."""
    forms = [("NFC", normalizers.NFC()), ("NFD", normalizers.NFD()), ("NFKC", normalizers.NFKC()),
             ("NFKD", normalizers.NFKD())]
    found = set()
    for c in POINTS:
        ch = chr(c)
        for form, normalizer in forms:
            if normalizer.normalize_str(ch) != unicodedata.normalize(form, ch):
                found.add(c)
        if unicodedata.combining(ch) and c != 0x301:
            low, high = "a" + ch + "\u0334", "a\u0301" + ch
            nfd = normalizers.NFD()
            if nfd.normalize_str(ch) == ch and nfd.normalize_str(low) == low and \
                    nfd.normalize_str(high) == high and unicodedata.combining(ch) not in (230,):
                found.add(c)
            if unicodedata.combining(ch) == 230 and nfd.normalize_str(low) == low:
                found.add(c)
    # Blocks and characters of Unicode 13 (the parts of U+11938) and 15 to 17.
    for a, b in [(0x11930, 0x11930), (0x11935, 0x11935), (0x897, 0x897), (0x1ACF, 0x1AEB), (0xA7F1, 0xA7F1),
                 (0x105C0, 0x105F3), (0x10D40, 0x10D8F), (0x10EFA, 0x10EFF), (0x11380, 0x113E2),
                 (0x11F00, 0x11F5A), (0x16100, 0x16139), (0x16D40, 0x16D79), (0x1CC00, 0x1CCF9),
                 (0x1E030, 0x1E08F), (0x1E4D0, 0x1E4F9), (0x1E5D0, 0x1E5FF), (0x1E6C0, 0x1E6FF)]:
        found.update(range(a, b + 1))
    return found


def ranges(points):
    out = []
    for c in sorted(points):
        if out and out[-1][1] == c - 1:
            out[-1][1] = c
        else:
            out.append([c, c])
    return out


def pcre(points):
    return "".join(f"\\\\x{{{a:X}}}" + (f"-\\\\x{{{b:X}}}" if b > a else "") for a, b in ranges(points))


def literal(text, indent):
    lines, line = [], ""
    for part in text.replace("\\\\x", "\n\\\\x").replace("-\n", "-").split("\n"):
        if len(line) + len(part) > 94 - indent:
            lines.append(line)
            line = ""
        line += part
    lines.append(line)
    return ("\n" + " " * indent).join(f'"{one}"' for one in lines)


def main():
    print("""// SPDX-License-Identifier: Apache-2.0
// Written by tools/goldens/tokenizer_unicode.py; do not edit. What the `tokenizers` package
// (Oniguruma with Unicode 16, Rust with 16 and 17, its normalizer with Unicode 9) knows beside
// Unicode 14 of PCRE2 10.42 and Unicode 15 of utf8proc 2.8. Adding a range that the library knows
// already changes nothing, so newer libraries stay right.
#include "runtime/tokenizer/internal.h"

#include <string.h>

struct class_entry {
    const char *name, *members;
};

// clang-format off
static const struct class_entry classes[] = {""")
    for name in CLASSES:
        theirs, mine = matched("\\p{%s}" % name), ours(name)
        assert not mine - theirs, (name, mine - theirs)
        print(f'    {{"{name}",\n     {literal(f"[[p{{{name}}}" .replace("[[", chr(92) * 2) + pcre(theirs - mine), 5)}}},')
    print(f'    {{"d",\n     {literal(chr(92) * 2 + "p{Nd}" + pcre(matched(chr(92) + "d") - ours("Nd")), 5)}}},')
    print(f'    {{"numeric",\n     {literal(chr(92) * 2 + "p{N}" + pcre(numeric() - ours("N")), 5)}}},')
    # The word characters of Rust's regex: Alphabetic, M, Nd, Pc, Join_Control. Python has no Alphabetic, so the
    # additions are those beyond Unicode 14's assigned characters.
    words = {c for c in word() if unicodedata.category(chr(c)) == "Cn"}
    start = "\\\\p{Alphabetic}\\\\p{M}\\\\p{Nd}\\\\p{Pc}\\\\p{Join_Control}"
    print(f'    {{"word",\n     {literal(start + pcre(words), 5)}}},')
    print("""};

static const int32_t inert[][2] = {""")
    for a, b in ranges(inert()):
        print(f"    {{0x{a:X}, 0x{b:X}}},")
    print("""};
// clang-format on

const char *tokenizer__class(const char *name, size_t bytes)
{
    for (size_t i = 0; i < sizeof classes / sizeof classes[0]; i++)
        if (strlen(classes[i].name) == bytes && memcmp(classes[i].name, name, bytes) == 0)
            return classes[i].members;
    return NULL;
}

bool tokenizer__inert(int32_t point)
{
    size_t low = 0, high = sizeof inert / sizeof inert[0];
    while (low < high) {
        size_t middle = (low + high) / 2;
        if (inert[middle][1] < point)
            low = middle + 1;
        else
            high = middle;
    }
    return low < sizeof inert / sizeof inert[0] && inert[low][0] <= point;
}""")


main()
