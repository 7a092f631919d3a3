"""Adjusted p-values: by Holm for the chance of any false finding, by Benjamini and Hochberg for their share."""

from __future__ import annotations

from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from hooked_lm._support.multiple_tests import holm_adjusted

__all__ = ["CORRECTIONS", "Correction", "adjusted"]

Correction = Literal["holm", "bh"]
CORRECTIONS = ("holm", "bh")


def adjusted(p_values: Float[Tensor, "*cell"], correction: Correction | None = "holm") -> Float[Tensor, "*cell"]:
    """Return adjusted p-values: those below `alpha` are findings.

    With m tests and p(1) <= ... <= p(m): Holm's (1979) is the running maximum of (m - i + 1) p(i), and holds the chance
    of any false finding at alpha, whatever the tests' dependence. Benjamini and Hochberg's (1995) is the running
    minimum from the end of m p(i) / i, and holds the expected share of false findings, for independent tests and those
    that depend positively.

    Args:
        p_values: of the tests.
        correction: `"holm"`, `"bh"`, or None to leave them as they are.

    Raises:
        ValueError: there is no such correction, or a p-value is not between 0 and 1.
    """
    if correction is not None and correction not in CORRECTIONS:
        raise ValueError(f"correction is 'holm', 'bh' or None, got {correction!r}")
    if not bool(((p_values >= 0) & (p_values <= 1)).all()):
        raise ValueError("p-values are between 0 and 1")
    if correction is None or p_values.numel() < 2:
        return p_values
    if correction == "holm":
        return holm_adjusted(p_values.flatten()).reshape(p_values.shape)
    ordered, order = p_values.flatten().sort()
    m = len(ordered)
    rank = torch.arange(1, m + 1, dtype=ordered.dtype, device=ordered.device)
    found = (m * ordered / rank).flip(0).cummin(0).values.flip(0)
    return torch.empty_like(ordered).scatter_(0, order, found.clamp(max=1.0)).reshape(p_values.shape)
