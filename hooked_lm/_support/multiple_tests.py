"""p-values of several tests at once."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

__all__ = ["holm_adjusted"]


def holm_adjusted(p: Float[Tensor, "*batch test"]) -> Float[Tensor, "*batch test"]:
    """Return p-values adjusted for all tests of the last axis (Holm 1979).

    A test whose adjusted value is at most `a` is rejected by Holm's procedure at level `a`, which rejects any true
    hypothesis with probability at most `a`, however the tests depend on each other.

    Args:
        p: the p-values.
    """
    n_tests = p.shape[-1]
    ordered, order = p.sort(dim=-1)
    steps = (ordered * torch.arange(n_tests, 0, -1, device=p.device)).clamp(max=1.0)
    return torch.empty_like(p).scatter_(-1, order, steps.cummax(-1).values)
