#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Trains the byte-level BPE on the base kinds and writes every kind as token ids.

    make_tokens.py DIR           reads DIR/txt, writes DIR/tokenizer.json and DIR/tokens.npz.xz

The withheld kinds have no part in the tokenizer, so that every token is met in base training.
tokens.npz holds per kind the uint16 arrays KIND.train and KIND.val; each document is followed by
token 0, <|end|>. KIND.val_bytes is the held-out text's size in bytes (UTF-8), for bits per byte.
"""
import lzma
import random
import sys

import numpy as np
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from tokenizers import trainers

from prepare_text import SEPARATOR, package_list, withheld_kinds

VOCABULARY = 8192
END = "<|end|>"
VAL_BYTES_MAX = 400_000
TRAIN_TOKENS_MAX = {"c": 24_000_000, "gcide": 6_000_000, "elisp": 5_000_000}
WORDS = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
         r"|\s*[\r\n]+|\s+(?!\S)|\s+")  # Qwen2's and Qwen3's
SAMPLE_BYTES = {"c": 9e6, "kernel-doc": 6e6, "man-en": 7e6, "manuals": 7e6, "python": 6e6}


def read_documents(root, kind, part):
    with open(f"{root}/txt/{kind}.{part}", newline="") as f:
        return f.read().split(SEPARATOR)


def train_tokenizer(root, kinds):
    tokenizer = Tokenizer(models.BPE(byte_fallback=False))
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Split(Regex(WORDS), "isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    sample = []
    for kind in kinds:
        room = SAMPLE_BYTES.get(kind, 4e6)
        for document in read_documents(root, kind, "train"):
            sample.append(document[:20_000])
            room -= len(sample[-1])
            if room < 0:
                break
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY, special_tokens=[END], show_progress=False, max_token_length=24,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet())
    tokenizer.train_from_iterator(sample, trainer)
    return tokenizer


def encode(tokenizer, documents):
    ids = []
    for start in range(0, len(documents), 2000):
        for one in tokenizer.encode_batch_fast(documents[start:start + 2000]):
            ids.append(np.array(one.ids + [0], dtype=np.uint16))
    return np.concatenate(ids)


def main():
    root = sys.argv[1]
    random.seed(0)
    withheld = withheld_kinds()
    kinds = list(package_list())
    tokenizer = train_tokenizer(root, [k for k in kinds if k not in withheld])
    tokenizer.save(f"{root}/tokenizer.json")
    arrays = {}
    for kind in kinds:
        train = read_documents(root, kind, "train")
        random.shuffle(train)
        held_out, size = [], 0
        for document in read_documents(root, kind, "val"):
            document = document[:60_000]
            held_out.append(document)
            size += len(document.encode())
            if size > VAL_BYTES_MAX:
                break
        train, val = encode(tokenizer, train), encode(tokenizer, held_out)
        train = train[:TRAIN_TOKENS_MAX.get(kind)]
        arrays |= {kind + ".train": train, kind + ".val": val, kind + ".val_bytes": size}
        print(f"{kind:12} train {len(train):9} val {len(val):7} tokens, "
              f"{size / len(val):.2f} bytes per token", flush=True)
    with lzma.open(f"{root}/tokens.npz.xz", "wb") as f:
        np.savez(f, **arrays)


if __name__ == "__main__":
    main()
