"""Padded prompts, and the activations of each put back together as a batch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

POSITIONS = ("pos", "query", "key")


@dataclass(frozen=True)
class Batch:
    """Prompts, padded to one length.

    Attributes:
        tokens: [batch pos].
        starts, ends: for each prompt, where its real tokens begin and end.
    """

    tokens: Tensor
    starts: tuple[int, ...]
    ends: tuple[int, ...]

    @property
    def length(self) -> int:
        return self.tokens.shape[1]

    @property
    def padded(self) -> bool:
        return any(self.starts) or any(end < self.length for end in self.ends)

    @property
    def mask(self) -> Tensor:
        mask = torch.zeros_like(self.tokens)
        for row, start, end in zip(mask, self.starts, self.ends, strict=True):
            row[start:end] = 1
        return mask

    def real(self, prompt: int) -> slice:
        return slice(self.starts[prompt], self.ends[prompt])

    def together(self, rows: Sequence[Tensor], axes: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Return an activation of all prompts [batch ...], and where it is one of real tokens.

        Args:
            rows: the activation of each prompt, at its real tokens.
            axes: of the batched activation.
        """
        shape = [len(rows), *rows[0].shape]
        for axis, name in enumerate(axes):
            if name in POSITIONS:
                shape[axis] = self.length
        whole, real = rows[0].new_zeros(shape), torch.zeros(shape, dtype=torch.bool)
        for prompt, row in enumerate(rows):
            there = tuple(self.real(prompt) if name in POSITIONS else slice(None) for name in axes[1:])
            whole[(prompt, *there)], real[(prompt, *there)] = row, True
        return whole, real
