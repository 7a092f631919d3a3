"""The options that functions hand on to `sweep`."""

from __future__ import annotations

from typing import TypedDict

from jaxtyping import Int
from torch import Tensor

__all__ = ["DEFAULT_MEMORY_BUDGET", "SweepOptions"]

DEFAULT_MEMORY_BUDGET = 2**29  # bytes: 512 MiB


class SweepOptions(TypedDict, total=False):
    """The options of everything that is one sweep, as keyword arguments.

    Attributes:
        attention_mask: [batch pos], 0 at padding, of clean and corrupted prompts given as tokens.
        per_prompt: keep the prompts apart, as a last axis; needs a metric of `hooked_lm.metrics`.
        memory_budget: bytes that a sweep's activations may take, roughly.
        verbose: show a progress bar.
    """

    attention_mask: Int[Tensor, "batch pos"] | None
    per_prompt: bool
    memory_budget: int
    verbose: bool
