"""Rows of tokens to train on: documents of every task, packed one after another."""

from __future__ import annotations

import random
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from jaxtyping import Float, Int
from torch import Tensor

from hooked_lm.tasks import capitals, greater_than, ioi, prose, relations, repeated_tokens
from hooked_lm.tokenization import Tokenizer, encode

__all__ = ["DOCUMENTS", "EARLY_SHARES", "SHARES", "TaskBatches"]

DOCUMENTS = {
    "ioi": ioi.document,
    "capitals": capitals.document,
    "relations": relations.document,
    "greater_than": greater_than.document,
    "prose": prose.document,
}
# The number of documents of each kind in 100. Those of random tokens and of capitals are the longest.
SHARES = {"ioi": 36, "capitals": 10, "relations": 28, "greater_than": 10, "prose": 6, "repeated_tokens": 10}
# At the start of training more repeats: skills that use the context alone are learned later than facts.
EARLY_SHARES = {"ioi": 18, "capitals": 4, "relations": 10, "greater_than": 4, "prose": 4, "repeated_tokens": 60}


@dataclass(frozen=True)
class TaskBatches:
    """Batches of training rows, each a function of the seed and the step, so that a run can start again anywhere.

    Attributes:
        tokenizer: with a BOS token, which stands before every document.
        rows, width: rows in a batch, and tokens in a row.
        seed: of the data.
        shares: the proportion of documents of each kind.
        early_steps, early_shares: the first `early_steps` steps have these shares instead.
        early_tokens: in these steps random tokens are drawn from `early_alphabet`, at least
            this many evenly spaced tokens of the vocabulary.

    Raises:
        ValueError: an unknown kind of document, or rows without room for one.
    """

    tokenizer: Tokenizer
    rows: int = 24
    width: int = 128
    seed: int = 0
    shares: Mapping[str, int | float] = field(default_factory=lambda: SHARES)
    early_steps: int = 0
    early_shares: Mapping[str, int | float] = field(default_factory=lambda: EARLY_SHARES)
    early_tokens: int = 96

    def __post_init__(self) -> None:
        unknown = sorted({*self.shares, *self.early_shares} - {*DOCUMENTS, repeated_tokens.NAME})
        if unknown:
            raise ValueError(f"unknown documents {unknown}: there are {sorted({*DOCUMENTS, repeated_tokens.NAME})}")
        if self.rows < 1 or self.width < 16:
            raise ValueError(f"a batch has 1 row of 16 tokens at least, not {self.rows} of {self.width}")
        if not max(repeated_tokens.LENGTHS) <= self.early_tokens < len(self.tokenizer):
            raise ValueError(
                f"early_tokens is at least {max(repeated_tokens.LENGTHS)}, the longest block's length, and at most "
                f"{len(self.tokenizer) - 1}, the tokenizer's tokens without BOS; got {self.early_tokens}"
            )

    @property
    def early_alphabet(self) -> range:
        """The choice of random tokens in the early steps: evenly spaced in the vocabulary, without BOS, which is 0."""
        return range(1, len(self.tokenizer), len(self.tokenizer) // self.early_tokens)

    def __call__(self, step: int) -> tuple[Int[Tensor, "batch pos"], Float[Tensor, "batch pos"]]:
        """Return a step's tokens [batch pos], and each token's weight in the loss [batch pos].

        The weight is 0 for random tokens that the tokens before do not determine, and for the row's first; otherwise 1.
        """
        rng = random.Random(f"{self.seed} {step}")
        early = step < self.early_steps
        alphabet = self.early_alphabet if early else range(1, len(self.tokenizer))
        rows = [self._row(rng, self.early_shares if early else self.shares, alphabet) for _ in range(self.rows)]
        return torch.tensor([tokens for tokens, _ in rows]), torch.tensor([weights for _, weights in rows])

    def _row(
        self, rng: random.Random, shares: Mapping[str, int | float], alphabet: range
    ) -> tuple[list[int], list[float]]:
        tokens: list[int] = []
        weights: list[float] = []
        while len(tokens) < self.width:
            (kind,) = rng.choices(list(shares), list(shares.values()))
            drawn, counts = self._document(rng, kind, self.width - len(tokens), alphabet)
            tokens += [self.tokenizer.bos_token_id, *drawn]
            weights += [1.0 if weights else 0.0, *counts]
        return tokens[: self.width], weights[: self.width]

    def _document(self, rng: random.Random, kind: str, left: int, alphabet: range) -> tuple[list[int], list[float]]:
        if kind != repeated_tokens.NAME:
            tokens = encode(self.tokenizer, DOCUMENTS[kind](rng))
            return tokens, [1.0] * len(tokens)
        # With little room left, the row ends within the first block, before any token is determined by those before it.
        drawn, determined = repeated_tokens.draw_tokens(rng, alphabet, max(left - 1, 16))
        return drawn, [float(known) for known in determined]
