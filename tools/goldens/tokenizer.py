# SPDX-License-Identifier: Apache-2.0
"""Makes tests/golden/tokenizer: small tokenizers, and what the `tokenizers` package gives for 20,000 strings.

Usage: python tools/goldens/tokenizer.py [--show CONFIG INDEX]     (needs: pip install tokenizers==0.23.3)

  atoms.txt        pieces of text, one per line in hexadecimal
  <name>.json      tokenizers, trained here on files of this machine
  classes.txt      which code points the classes of patterns have
  <config>.u32     for each string: FNV-1a 64 over the ids (as u32) and the decoded text, folded to 32 bits

String i is made of atoms by the generator `make_string`, which tests/test_tokenizer_golden.c repeats.
Strings 20,000 and up of the configs in EVERY_POINT: all code points, 64 to a string.
"""
import glob
import json
import random
import struct
import sys
import unicodedata
from pathlib import Path

from tokenizers import (AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors,
                        trainers)

OUT = Path(__file__).resolve().parents[2] / "tests/golden/tokenizer"
STRINGS, SEED, POINTS_PER_STRING = 20000, 20261123, 64
MASK = (1 << 64) - 1

QWEN = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
        r"|\s+(?!\S)|\s+")
LLAMA = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
         r"|\s*[\r\n]+|\s+(?!\S)|\s+")
DEEPSEEK = [r"\p{N}{1,3}", "[一-龥぀-ゟ゠-ヿ]+",
            r"[!\"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+"
            r"| ?[\p{P}\p{S}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"]
O200K = (r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
         r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
         r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+")

# ---- the generator of strings, the same in tests/test_tokenizer_golden.c ----


def mix(z):
    z = (z + 0x9E3779B97F4A7C15) & MASK
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & MASK
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & MASK
    return z ^ (z >> 31)


class Rng:
    def __init__(self, seed):
        self.seed, self.counter = seed, 0

    def below(self, n):
        value = mix(mix(mix(self.seed)) ^ self.counter)
        self.counter += 1
        return value % n


def make_string(atoms, index):
    rng = Rng(SEED + index)
    out = b""
    for _ in range(1 + rng.below(10)):
        kind = rng.below(10)
        if kind < 6:
            out += atoms[rng.below(len(atoms))]
        elif kind == 6:
            out += b" "
        elif kind == 7:
            point = rng.below(0x110000)
            out += chr(point if not 0xD800 <= point <= 0xDFFF else point - 0xD800).encode()
        elif kind == 8:
            out += chr(rng.below(0x3000)).encode()
        else:
            out += atoms[rng.below(len(atoms))] * (1 + rng.below(24))
    return out


def point_strings():
    points = [c for c in range(0x110000) if not 0xD800 <= c <= 0xDFFF]
    return ["".join(map(chr, points[i:i + POINTS_PER_STRING])).encode()
            for i in range(0, len(points), POINTS_PER_STRING)]


# ---- atoms ----

SENTENCES = """The quick brown fox didn't jump; it's we'll they've I'M HE'S you'Re.|Zwölf Boxkämpfer jagen Viktor quer
|über den großen Sylter Deich.|Voix ambiguë d'un cœur qui au zéphyr préfère les jattes de kiwis.|Pchnąć w tę łódź jeża.
|Съешь ещё этих мягких французских булок.|Ξεσκεπάζω τὴν ψυχοφθόρα βδελυγμία.|いろはにほへと ちりぬるを。カタカナ混じり
|我能吞下玻璃而不伤身体。繁體字也可以。|나는 유리를 먹을 수 있어요.|أنا قادر على أكل الزجاج|אני יכול לאכול זכוכית|मैं काँच खा सकता हूँ
|நான் கண்ணாடி சாப்பிடுவேன்|ฉันกินกระจกได้|Tôi có thể ăn thủy tinh|მინას ვჭამ|Կրնամ ապակի ուտել|ኣነ ጥርሙዝ ምብላዕ
|İstanbul'da IŞIK ışık|for (int i = 0; i < n; ++i) { sum += a[i]; }|x = {"a": [1, 2.5e-3, null]}|https://example.org/a?b=c&d=%20#e
|3.14159265358979|1234567890|１２３４５|٣٤٥٦|Ⅷ½²③|0x1F600|don’t|'ſ 'S 'K 'K 'LL|Straße STRASSE|ŉ ǰ ﬀ ﬁ ﬆ|e\u0301 é ë\u0323\u0307"""
SPECIAL = ["<|im_start|>", "<|im_end|>", "<|endoftext|>", "<think>", "</think>", "<|begin_of_text|>", "<|eot_id|>",
           "<｜User｜>", "<|im_", "[MASK]", "[MA", "word", "sword", "<s>", "<s", "</s>", "naïve", "nai\u0308ve", "<a><b>"]
ODD = ["\u180e", "\x85", "\ufeff", "\u200b", "\u200d", "\u00a0", "\u2028", "\u2029", "\u3000", "\u202f", "\x00", "\x1b[0m",
       "\x7f", "\r\n", "\n\n\n", "\r", "\t\t", " \n ", "    ", "\x0b\x0c", "\x1c", "\u1680", "\u00ad", "\u034f", "\ufffd",
       "\u0345\u0301", "\u1100\u1161\u11a8", "\uac00\u11a8", "\u2126", "\u212b", "\u1e9b\u0323", "\u0344", "\u0958",
       "\ufb1d", "\u09c7\u09be", "\u1025\u102e", "'", "''", "'s", "'S", "'ſ", "'Ve", "’s", "_", "__init__", "..", "…", "-",
       "👨‍👩‍👧‍👦", "🏳️‍🌈", "👍🏽", "🇳🇱🇩🇪", "1️⃣", "😀", "❤️", "\U0001f9d1\U0001f3ff\u200d\U0001f52c", "a" * 200, " " * 200,
       "9" * 50, "\n" * 30, "=" * 80, "中" * 60, "ab" * 100, "A1b2C3", "camelCaseWord", "ALLCAPS", "MiXeD", "\U00011938",
       "\U00011935\U00011930", "\u1ac1\u0334", "\U0001133b\u0334", "\u07fd\u0334", "ﷺ", "㍿", "ｶﾞ", "ﬃ", "™", "①"]


def make_atoms():
    random.seed(1)
    atoms = [s.strip("\n") for s in SENTENCES.replace("\n|", "|").split("|")]
    atoms += [word for sentence in atoms for word in (sentence, " " + sentence)[0].split(" ")][:220]
    atoms += SPECIAL * 2 + ODD
    assigned = [c for c in range(0x20000) if unicodedata.category(chr(c)) not in ("Cn", "Cs", "Co")]
    for k in range(0, len(assigned), 160):  # words of every script
        near = assigned[k:k + 160]
        atoms.append("".join(chr(random.choice(near)) for _ in range(random.randint(1, 6))))
    marks = [c for c in range(0x20000) if unicodedata.combining(chr(c))]
    for _ in range(120):  # marks in any order
        atoms.append(random.choice("aeouAEOUäxй한가क") + "".join(chr(random.choice(marks))
                                                               for _ in range(random.randint(1, 4))))
    return [a.encode() for a in atoms if a]


# ---- tokenizers ----


def training_text(atoms):
    random.seed(2)
    files = sorted(glob.glob("/usr/share/common-licenses/*") + glob.glob("/usr/include/*.h")
                   + glob.glob("/usr/lib/python3*/[a-m]*.py"))
    text = [Path(f).read_text(errors="replace")[:40000] for f in files[:120]]
    return text + [" ".join(a.decode() for a in random.sample(atoms, 80)) for _ in range(200)]


def train(name, text, size, normalizer, splits, special, added, prefix_space=None, use_regex=False, **model):
    tokenizer = Tokenizer(models.BPE(**model))
    if normalizer:
        tokenizer.normalizer = normalizer
    level = pre_tokenizers.ByteLevel(add_prefix_space=bool(prefix_space), use_regex=use_regex)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(splits + [level]) if splits else level
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=size, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
                                  show_progress=False, max_token_length=24)
    tokenizer.train_from_iterator(text, trainer)
    tokenizer.add_special_tokens([AddedToken(s, special=True, normalized=False) if isinstance(s, str) else s
                                  for s in special])
    tokenizer.add_tokens(added)
    return name, tokenizer


def make_tokenizers(text):
    split = pre_tokenizers.Split
    qwen = train("qwen", text, 3000, normalizers.NFC(), [split(Regex(QWEN), "isolated")],
                 ["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
                 [AddedToken("<think>", normalized=False), AddedToken("</think>", normalized=False)])
    gpt2 = train("gpt2", text, 2000, None, [], ["<|endoftext|>"], [], use_regex=True)
    prefix = train("gpt2_prefix", text, 1000, None, [], ["<|endoftext|>", AddedToken("<s>", lstrip=True, special=True)],
                   [AddedToken("word", single_word=True, normalized=False)], prefix_space=True, use_regex=True)
    llama = train("llama", text, 2500, None, [split(Regex(LLAMA), "isolated")],
                  ["<|begin_of_text|>", "<|eot_id|>", "<|endoftext|>"], [], ignore_merges=True)
    llama[1].post_processor = processors.Sequence([
        processors.ByteLevel(trim_offsets=False),
        processors.TemplateProcessing(single="<|begin_of_text|> $A", pair="<|begin_of_text|> $A $B",
                                      special_tokens=[("<|begin_of_text|>", llama[1].token_to_id("<|begin_of_text|>"))])])
    deepseek = train("deepseek", text, 1000, normalizers.Sequence([]), [split(Regex(p), "isolated") for p in DEEPSEEK]
                     + [pre_tokenizers.Digits(True)], ["<｜User｜>"], [AddedToken("[MASK]", rstrip=True, lstrip=True)])
    o200k = train("o200k", text, 1000, normalizers.NFD(), [split(Regex(O200K), "removed", invert=True)],
                  ["<|endoftext|>"], [AddedToken("naïve", normalized=True), AddedToken("word", single_word=True)])
    odd = train("odd", text, 800, normalizers.Sequence([normalizers.NFKD(), normalizers.NFKC()]),
                [split("\n", "merged_with_previous"), split(Regex(r"\p{Lu}"), "merged_with_next"),
                 split(Regex(r"[aeiou]|"), "contiguous"), split(Regex(r"\d+?\P{N}|\u0020{2,}"), "isolated"),
                 split("=", "removed"), pre_tokenizers.Digits(False)],
                [AddedToken("[MASK]", lstrip=True, rstrip=True, single_word=True, special=True, normalized=False)],
                [AddedToken("word", rstrip=True, single_word=True), AddedToken("<a>", normalized=False),
                 AddedToken("<a><b>", lstrip=True, normalized=False), AddedToken("①", normalized=True)], prefix_space=True)
    made = [qwen, gpt2, prefix, llama, deepseek, o200k, odd]
    # Behaviours one by one, on merges that were learned without them: every border shows.
    level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    for name, pattern, behavior, invert in JOINS:
        made.append(train(name, text, 700, None, [], [], []))
        made[-1][1].pre_tokenizer = pre_tokenizers.Sequence([split(pattern, behavior, invert), level])
    return dict(made)


JOINS = [("previous", Regex("[aeiou ]"), "merged_with_previous", False),
         ("next", Regex(r"[\p{Lu}aeiou ]"), "merged_with_next", False),
         ("contiguous", Regex("[aeiou ]"), "contiguous", True),
         ("empty", Regex("[ei]|(?=n)|(?<=t)"), "contiguous", False)]


def write_classes():
    """Which code points each class of a pattern has: FNV-1a 64 of their UTF-8, in order."""
    text = "".join(s.decode() for s in point_strings())
    lines = []
    for pattern in [r"\s", r"\S", r"\d", r"\D", "."] + [r"\p{%s}" % name for name in
                    "L Lu Ll Lt Lm Lo M Mc Me N Nd Nl No P Pc Pd Ps Pe Pi Pf Po S Sm Sc Sk So Z Zs Zl Zp".split()]:
        stage = pre_tokenizers.Split(Regex(pattern + "+"), "removed", invert=True)
        h = 0xCBF29CE484222325
        for byte in "".join(piece for piece, _ in stage.pre_tokenize_str(text)).encode():
            h = ((h ^ byte) * 0x100000001B3) & MASK
        lines.append(f"{pattern} {h:016x}\n")
    (OUT / "classes.txt").write_text("".join(lines))


CONFIGS = {  # name: (tokenizer, special tokens recognised, template, every code point too)
    "qwen": ("qwen", True, False, True), "qwen_plain": ("qwen", False, False, False),
    "gpt2": ("gpt2", True, False, True), "gpt2_prefix": ("gpt2_prefix", True, False, False),
    "gpt2_prefix_plain": ("gpt2_prefix", False, False, False), "llama": ("llama", True, True, True),
    "llama_plain": ("llama", False, True, False), "deepseek": ("deepseek", True, False, True),
    "o200k": ("o200k", True, False, True), "odd": ("odd", True, False, True), "odd_plain": ("odd", False, False, False),
    **{name: (name, True, False, False) for name in ("previous", "next", "contiguous", "empty")},
}


def digest(ids, text):
    h = 0xCBF29CE484222325
    for byte in struct.pack(f"<{len(ids)}I", *ids) + text.encode():
        h = ((h ^ byte) * 0x100000001B3) & MASK
    return (h ^ (h >> 32)) & 0xFFFFFFFF


def encode(tokenizer, special, template, text):
    tokenizer.encode_special_tokens = not special
    ids = tokenizer.encode(text, add_special_tokens=template).ids
    return ids, tokenizer.decode(ids, skip_special_tokens=False)


def show(config, index):
    atoms = [bytes.fromhex(line) for line in (OUT / "atoms.txt").read_text().split()]
    name, special, template, _ = CONFIGS[config]
    text = make_string(atoms, index) if index < STRINGS else point_strings()[index - STRINGS]
    ids, decoded = encode(Tokenizer.from_file(str(OUT / f"{name}.json")), special, template, text.decode())
    print(ascii(text.decode()), ids, ascii(decoded), sep="\n")


def main():
    if sys.argv[1:2] == ["--show"]:
        return show(sys.argv[2], int(sys.argv[3]))
    OUT.mkdir(parents=True, exist_ok=True)
    write_classes()
    atoms = make_atoms()
    (OUT / "atoms.txt").write_text("".join(a.hex() + "\n" for a in atoms))
    strings = [make_string(atoms, i).decode() for i in range(STRINGS)]
    points = [s.decode() for s in point_strings()]
    made = make_tokenizers(training_text(atoms))
    for name, tokenizer in made.items():
        text = json.dumps(json.loads(tokenizer.to_str()), ensure_ascii=False, separators=(",", ":"))
        (OUT / f"{name}.json").write_text(text)
    for config, (name, special, template, every) in CONFIGS.items():
        tokenizer = Tokenizer.from_file(str(OUT / f"{name}.json"))
        digests = [digest(*encode(tokenizer, special, template, s)) for s in strings + (points if every else [])]
        (OUT / f"{config}.u32").write_bytes(struct.pack(f"<{len(digests)}I", *digests))
        print(config, len(digests), tokenizer.get_vocab_size())


main()
