# SPDX-License-Identifier: Apache-2.0
"""Writes tests/corpus/fuzz_tokenizer: small tokenizer.json files ("+" stands for all bytes), NUL, a text."""
import json
from pathlib import Path

OUT = Path(__file__).resolve().parents[2] / "tests/corpus/fuzz_tokenizer"
LEVEL = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
QWEN = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
        r"|\s+(?!\S)|\s+")


def split(pattern, behavior="Isolated", invert=False, kind="Regex"):
    return {"type": "Split", "pattern": {kind: pattern}, "behavior": behavior, "invert": invert}


def sequence(*stages):
    return {"type": "Sequence", "pretokenizers": list(stages)}


def added(id, content, **flags):
    token = {"id": id, "content": content, "single_word": False, "lstrip": False, "rstrip": False,
             "normalized": False, "special": False}
    return {**token, **flags}


def file(**parts):
    model = {"type": "BPE", "dropout": None, "unk_token": None, "fuse_unk": False, "byte_fallback": False,
             "ignore_merges": False, "vocab": {"+": 0, "ab": 256, "abc": 257, "Ġa": 258},
             "merges": ["a b", "ab c", "Ġ a"]}
    model.update(parts.pop("model", {}))
    whole = {"version": "1.0", "truncation": None, "padding": None, "added_tokens": [], "normalizer": None,
             "pre_tokenizer": LEVEL, "post_processor": None, "decoder": LEVEL, "model": model}
    return {**whole, **parts}


TEMPLATE = {"type": "TemplateProcessing", "single": [{"SpecialToken": {"id": "<s>", "type_id": 0}},
                                                     {"Sequence": {"id": "A", "type_id": 0}}], "pair": [],
            "special_tokens": {"<s>": {"id": "<s>", "ids": [259], "tokens": ["<s>"]}}}
SEEDS = {
    "plain": (file(), b"abc ab\xffa"),
    "qwen": (file(normalizer={"type": "NFC"}, pre_tokenizer=sequence(split(QWEN), LEVEL),
                  added_tokens=[added(259, "<s>", special=True)]), "It's e\u0301 <s> 42\n\nabc".encode()),
    "gpt2": (file(pre_tokenizer={**LEVEL, "use_regex": True, "add_prefix_space": True}), b"abc  def's 12"),
    "llama": (file(model={"ignore_merges": True, "merges": [["a", "b"], ["ab", "c"]]}, added_tokens=[
        added(259, "<s>", special=True), added(260, "wo", single_word=True, lstrip=True, rstrip=True)],
        post_processor={"type": "Sequence", "processors": [LEVEL, TEMPLATE]}), b"abc wo word <s>"),
    "digits": (file(pre_tokenizer=sequence(split("a", "Removed", kind="String"), split("[b-d]|", "Contiguous", True),
                                           split("x", "MergedWithNext"), split("y", "MergedWithPrevious"),
                                           {"type": "Digits", "individual_digits": True}, LEVEL)), b"axybcd123"),
    "forms": (file(normalizer={"type": "Sequence", "normalizers": [{"type": "NFKD"}, {"type": "NFC"}]},
                   added_tokens=[added(259, "x\u00e9", normalized=True)]), "\ufb01 xe\u0301\u0323 \ud55c".encode()),
}

OUT.mkdir(parents=True, exist_ok=True)
for name, (whole, text) in SEEDS.items():
    (OUT / name).write_bytes(json.dumps(whole, separators=(",", ":"), ensure_ascii=False).encode() + b"\0" + text)
