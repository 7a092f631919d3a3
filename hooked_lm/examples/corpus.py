"""A corpus in batches: texts, or rows of tokens, as tokens padded on the right."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from itertools import islice

import numpy as np
import torch
from jaxtyping import Bool, Int
from torch import Tensor

from hooked_lm._support.integers import entries_of, integer, is_integer
from hooked_lm.hooked_model import HookedModel

__all__ = ["Corpus", "batches", "read_batch", "scored_tokens"]

# Texts, or the tokens of each text.
Corpus = Iterable[str] | Iterable[Sequence[int]] | Iterable[Tensor] | Iterable[np.ndarray] | Tensor


def batches(corpus: Corpus, batch_size: int) -> Iterator[list[str] | list[list[int]]]:
    """Yield batches of texts, or of rows of tokens.

    Args:
        corpus: any iterable of either, read lazily.
        batch_size: of all but the last batch.

    Raises:
        TypeError: the corpus is one string, or a batch has anything else or both.
    """
    if isinstance(corpus, str):
        raise TypeError(f"a corpus is an iterable of texts, and this is one text: give [{corpus[:20]!r}...]")
    entries = iter(corpus)
    while batch := list(islice(entries, batch_size)):
        texts = [one for one in batch if isinstance(one, str)]
        rows = [entries_of(one) for one in batch if not isinstance(one, str)]
        if texts and not rows:
            yield texts
        elif not texts and all(row is not None and all(map(is_integer, row)) for row in rows):
            yield [[integer(token, "token") for token in row or ()] for row in rows]
        else:
            kinds = ", ".join(sorted({type(one).__name__ for one in batch}))
            raise TypeError(
                f"a corpus has texts, or rows of tokens; this one has {kinds}. Of a data set give a column, "
                "(row['text'] for row in dataset)"
            )


def read_batch(
    model: HookedModel,
    batch: list[str] | list[list[int]],
    first: int,
    prepend_bos: bool | None,
    max_tokens: int | None,
) -> tuple[Int[Tensor, "batch pos"], Int[Tensor, "batch pos"], list[int]] | None:
    """Return the tokens of a batch padded on the right, their mask, and the number of each text.

    Empty texts are left out; None if all are.

    Args:
        model: a `HookedTransformer`.
        batch: texts, or rows of tokens.
        first: the number of the batch's first text in the corpus.
        prepend_bos, max_tokens: as for `max_activating`.

    Raises:
        ValueError: a text that is too long, or tokens that seem padded.
    """
    numbers = [first + index for index, entry in enumerate(batch) if entry]
    texts = [one for one in batch if one and isinstance(one, str)]
    rows = [one for one in batch if one and isinstance(one, list)]
    if not numbers:
        return None
    if texts:
        tokens, mask = model.tokens_and_mask(texts, prepend_bos=prepend_bos, padding_side="right")
        mask = torch.ones_like(tokens) if mask is None else mask
    else:
        tokens, mask = _padded(model, rows, numbers)
    tokens, mask = tokens[:, :max_tokens], mask[:, :max_tokens]
    if tokens.shape[1] > model.cfg.n_ctx:
        longest = numbers[int(mask.sum(1).argmax())]
        raise ValueError(
            f"text {longest} has {tokens.shape[1]} tokens, more than this model's n_ctx of {model.cfg.n_ctx}: cut it "
            f"into parts, or give max_tokens={model.cfg.n_ctx} to read its beginning"
        )
    return tokens, mask, numbers


def _padded(
    model: HookedModel, rows: list[list[int]], numbers: list[int]
) -> tuple[Int[Tensor, "batch pos"], Int[Tensor, "batch pos"]]:
    pad = None if model.tokenizer is None else model.tokenizer.pad_token_id
    for number, row in zip(numbers, rows, strict=True):
        # One such token may be BOS or the text's end.
        if pad is not None and len(row) > 1 and (row[:2] == [pad, pad] or row[-2:] == [pad, pad]):
            raise ValueError(
                f"text {number} begins or ends with padding tokens ({pad}): give rows of tokens without padding, of "
                "any lengths"
            )
    longest = max(map(len, rows))
    tokens, _ = model.tokens_and_mask([row + [0] * (longest - len(row)) for row in rows], padding_side="right")
    lengths = torch.tensor([len(row) for row in rows], device=tokens.device)
    return tokens, (torch.arange(longest, device=tokens.device) < lengths[:, None]).to(tokens)


def scored_tokens(
    model: HookedModel, tokens: Int[Tensor, "batch pos"], mask: Int[Tensor, "batch pos"]
) -> Bool[Tensor, "batch pos"]:
    """Return which tokens count: all but padding and BOS, wherever BOS stands.

    Args:
        model: a `HookedTransformer`.
        tokens: of a batch.
        mask: 0 at padding.
    """
    bos = None if model.tokenizer is None else model.tokenizer.bos_token_id
    return mask.bool() if bos is None else mask.bool() & (tokens != bos)
