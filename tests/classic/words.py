"""A tokenizer of forty words, built the same way in both environments."""

from __future__ import annotations

import functools
import tempfile
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

SPECIAL = ["<bos>", "<eos>", "<pad>", "<unk>"]
PIECES = [
    *("▁the", "▁cat", "▁dog", "▁sat", "▁saw", "▁ran", "▁on", "▁a", "▁mat", "▁When", "▁John", "▁and", "▁Mary", "▁went"),
    *("▁to", "▁store", "▁gave", "▁drink", "▁0", "▁1", "▁2", "▁3", "s", "ed", ".", ",", "!", "?", "▁"),
    *("the", "cat", "John", "Mary", "a", "b", "c"),
]


def word_tokenizer(**changes: Any) -> PreTrainedTokenizerBase:
    """Return a tokenizer whose pieces know the space before them; with BOS, EOS and padding, and puts none by itself.

    It is read from files, since both libraries read a tokenizer anew from where it came.

    Args:
        changes: special tokens set otherwise (`bos_token=None`, ...), or `padding_side`.
    """
    return AutoTokenizer.from_pretrained(Path(_folder().name) / _saved(tuple(sorted(changes.items()))))


@functools.cache
def _folder() -> tempfile.TemporaryDirectory[str]:
    return tempfile.TemporaryDirectory()


@functools.cache
def _saved(changes: tuple[tuple[str, Any], ...]) -> str:
    fields = {"bos_token": "<bos>", "eos_token": "<eos>", "pad_token": "<pad>", "unk_token": "<unk>", **dict(changes)}
    name = "-".join(["words", *(f"{key}-{value}" for key, value in changes)]).replace("<", "").replace(">", "")
    PreTrainedTokenizerFast(tokenizer_object=_words(), **fields).save_pretrained(Path(_folder().name) / name)
    return name


def _words() -> Tokenizer:
    vocabulary = [(piece, 0.0) for piece in SPECIAL] + [(piece, -float(len(piece) < 3) - 1) for piece in PIECES]
    tokenizer = Tokenizer(models.Unigram(vocabulary, unk_id=3, byte_fallback=False))
    tokenizer.normalizer = normalizers.Replace(" ", "▁")
    tokenizer.pre_tokenizer = pre_tokenizers.Split("▁", behavior="merged_with_next")
    tokenizer.decoder = decoders.Replace("▁", " ")
    return tokenizer
