"""Logits, and metrics of them written out by hand."""

from __future__ import annotations

import math
from typing import Any

import torch
from hypothesis import settings
from hypothesis import strategies as st
from torch import Tensor

EXACT: dict[str, Any] = {"atol": 1e-12, "rtol": 0.0}
BATCH, POS, VOCAB = 3, 4, 6


def some_logits(seed: int = 0, batch: int = BATCH, pos: int = POS, vocab: int = VOCAB) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return 3 * torch.randn(batch, pos, vocab, generator=generator, dtype=torch.float64)


def numbers(values: list[float]) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def log_probs_by_hand(row: list[float]) -> list[float]:
    highest = max(row)
    total = math.log(math.fsum(math.exp(score - highest) for score in row)) + highest
    return [score - total for score in row]


def kl_by_hand(reference: list[float], row: list[float]) -> float:
    pairs = zip(log_probs_by_hand(reference), log_probs_by_hand(row), strict=True)
    return math.fsum(math.exp(wanted) * (wanted - got) for wanted, got in pairs)


quick = settings(max_examples=60)
# Multiples of a half, so that ties are frequent and sums of two are exact.
halves = st.integers(-20, 20).map(lambda one: one / 2)


@st.composite
def cases(draw: st.DrawFn, unequal: bool = False) -> tuple[Tensor, list[int], int]:
    """Logits [batch pos vocab], an answer for each prompt, and a position; a row's logits differ if `unequal`."""
    batch, pos, vocab = (draw(st.integers(low, high)) for low, high in ((1, 3), (1, 3), (2, 6)))
    rows = st.lists(halves, min_size=vocab, max_size=vocab, unique=unequal)
    drawn = draw(st.lists(rows, min_size=batch * pos, max_size=batch * pos))
    answers = draw(st.lists(st.integers(0, vocab - 1), min_size=batch, max_size=batch))
    return numbers(drawn).reshape(batch, pos, vocab), answers, draw(st.integers(-pos, pos - 1))  # type: ignore[arg-type]
