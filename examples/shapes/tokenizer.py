"""Builds the byte-level BPE vocabulary (``vocab.json`` and ``merges.txt``) for CLIPTokenizer.

All 256 byte symbols are present, alone and with the end-of-word mark, so any string encodes
without an unknown token.  Merges are learnt until each caption word is a single token.
"""

from __future__ import annotations

import json
from collections import Counter
from itertools import pairwise
from pathlib import Path

from transformers import CLIPTokenizer

from examples.shapes.draw import COLOURS, HEART, SHAPES, TRIGGERS

MAX_LENGTH = 77
START, END = "<|startoftext|>", "<|endoftext|>"
COMMON = (
    "a an the of on in at to with and or is it no not one two three big small large tiny bright dark light "
    "drawing picture image photo painting icon sign background front behind colour color style night day sky "
    "black grey gray purple brown gold silver moon ring sun house cat dog tree flower shape line "
    "outline filled striped stripe simple flat soft"
)
"""Other words that get a token of their own, so that ordinary prompts stay short."""


def byte_symbols() -> list[str]:
    """Return the 256 printable characters that stand for the bytes 0..255 in byte-level BPE."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    table = {value: chr(value) for value in printable}
    hidden = [value for value in range(256) if value not in table]
    table.update({value: chr(256 + i) for i, value in enumerate(hidden)})
    return [table[value] for value in sorted(table, key=lambda v: (v not in printable, v))]


def learn_merges(words: list[str]) -> list[tuple[str, str]]:
    """Learn merges greedily, most frequent pair first, until each word is one symbol."""
    spelled = [[*word[:-1], word[-1] + "</w>"] for word in words]
    merges: list[tuple[str, str]] = []
    while True:
        pairs = Counter(pair for word in spelled for pair in pairwise(word))
        if not pairs:
            return merges
        best = max(pairs, key=lambda pair: (pairs[pair], pair))
        merges.append(best)
        spelled = [_merge(word, best) for word in spelled]


def _merge(word: list[str], pair: tuple[str, str]) -> list[str]:
    """Join each occurrence of ``pair`` in ``word``."""
    joined: list[str] = []
    for symbol in word:
        if joined and (joined[-1], symbol) == pair:
            joined[-1] += symbol
        else:
            joined.append(symbol)
    return joined


def build(folder: Path) -> CLIPTokenizer:
    """Write the tokenizer files into ``folder`` and return the tokenizer."""
    words = sorted({*COMMON.split(), *COLOURS, *SHAPES, HEART, *TRIGGERS.values()})
    merges = learn_merges([word for word in words if len(word) > 1])
    symbols = byte_symbols()
    merged = dict.fromkeys(left + right for left, right in merges)
    tokens = [*symbols, *(s + "</w>" for s in symbols), *merged, START, END]
    vocab = {token: index for index, token in enumerate(tokens)}
    tokenizer = CLIPTokenizer(vocab=vocab, merges=merges, model_max_length=MAX_LENGTH)
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save_pretrained(folder)
    (folder / "vocab.json").write_text(json.dumps(vocab, ensure_ascii=False), encoding="utf-8")
    lines = ["#version: 0.2", *(f"{left} {right}" for left, right in merges)]
    (folder / "merges.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return tokenizer


def load(folder: Path) -> CLIPTokenizer:
    """Load the tokenizer written by :func:`build`."""
    return CLIPTokenizer.from_pretrained(folder)
