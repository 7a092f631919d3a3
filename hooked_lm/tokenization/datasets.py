"""From a data set of texts to rows of tokens of one length."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch

from hooked_lm.tokenization.functions import Tokenizer, bos_id, encode

__all__ = ["TextDataset", "keep_single_column", "tokenize_and_concatenate"]

# Any: a `datasets.Dataset` in gives one out, and the `datasets` package is not a dependency.
TextDataset = Any


def keep_single_column(dataset: TextDataset, col_name: str) -> TextDataset:
    """Return a `datasets.Dataset` with one column only.

    Args:
        dataset: a HuggingFace `Dataset` or `IterableDataset`.
        col_name: the column to keep.

    Raises:
        ValueError: there is no such column.
    """
    names = list(dataset.column_names or [])
    if names and col_name not in names:
        raise ValueError(f"the data set has no column {col_name!r}; it has {', '.join(names)}")
    others = [name for name in names if name != col_name]
    return dataset.remove_columns(others) if others else dataset


def tokenize_and_concatenate(
    dataset: TextDataset,
    tokenizer: Tokenizer,
    streaming: bool = False,
    max_length: int = 1024,
    column_name: str = "text",
    add_bos_token: bool = True,
    num_proc: int | None = 10,
    set_format: bool = True,
) -> TextDataset:
    """Turn a `datasets.Dataset` of texts, or an iterable of strings, into rows of `max_length` tokens.

    Texts are joined with the end-of-sequence token between them and cut into equal rows, each starting with BOS if
    `add_bos_token`. The last, incomplete row is dropped. A streamed data set is read no further than the rows that are
    taken from the result need.

    Args:
        dataset: a HuggingFace `Dataset` or `IterableDataset` with a text column, or an iterable of strings.
        tokenizer: its `eos_token` and, with `add_bos_token`, its `bos_token` are used.
        streaming, num_proc: accepted for compatibility, without effect; texts are read in one process, and whether a
            data set is streamed is seen from its class.
        max_length: tokens per row, BOS included.
        column_name: the text column.
        add_bos_token: start each row with BOS.
        set_format: rows of a data set are tensors; False leaves them lists, or arrays.

    Returns:
        A `Dataset` with a `tokens` column for a `Dataset`, an `IterableDataset` for one; otherwise a tensor
        [row max_length].

    Raises:
        ValueError: no room for a token in `max_length`; fewer tokens than one row, unless streamed; or the tokenizer
            lacks one of these tokens, for which no other stands in.
    """
    bos = [bos_id(tokenizer, "add_bos_token=True")] if add_bos_token else []
    if tokenizer.eos_token_id is None:
        raise ValueError("tokenize_and_concatenate puts eos_token between texts, and this tokenizer has none: set it")
    if max_length <= len(bos):
        raise ValueError(f"max_length {max_length} leaves no room for a token in a row")
    is_dataset = hasattr(dataset, "column_names")
    if is_dataset and not hasattr(dataset, "__len__"):

        def examples() -> Iterator[dict[str, list[int]]]:
            texts = (example[column_name] for example in dataset)
            return ({"tokens": row} for row in _rows(texts, tokenizer, max_length, bos))

        streamed = type(dataset).from_generator(examples)
        return streamed.with_format("torch") if set_format else streamed
    rows = list(_rows(dataset[column_name] if is_dataset else dataset, tokenizer, max_length, bos))
    if not rows:
        raise ValueError(f"the texts have less than one row of {max_length - len(bos)} tokens")
    tokens = torch.tensor(rows)
    if not is_dataset:
        return tokens
    made = type(dataset).from_dict({"tokens": tokens.numpy()})
    return made.with_format("torch") if set_format else made


def _rows(texts: Iterable[str], tokenizer: Tokenizer, length: int, bos: list[int]) -> Iterator[list[int]]:
    """Yield the rows of the texts, joined; each as soon as it is full."""
    width, pending, separator = length - len(bos), list[int](), list[int]()
    for text in texts:
        pending += separator + encode(tokenizer, text)
        separator = [tokenizer.eos_token_id]
        full = len(pending) - len(pending) % width
        for start in range(0, full, width):
            yield bos + pending[start : start + width]
        pending = pending[full:]
