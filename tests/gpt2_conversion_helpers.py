"""GPT-2 of transformers and of this package."""

from __future__ import annotations

from torch import Tensor

from tests.helpers import VOCAB, tiny_tokens


def tokens() -> Tensor:
    return tiny_tokens(batch=2, pos=9, vocab=VOCAB)


def assert_same(ours: Tensor, theirs: Tensor, tolerance: float) -> None:
    assert ours.shape == theirs.shape
    assert ours.dtype == theirs.dtype
    assert (ours - theirs).abs().max().item() < tolerance
