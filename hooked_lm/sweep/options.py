"""The options that functions hand on to `sweep`."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TypedDict

from jaxtyping import Int
from torch import Tensor

__all__ = ["DEFAULT_MEMORY_BUDGET", "SweepOptions", "check_options"]

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


def check_options(names: Iterable[str]) -> None:
    """Check names of options before anything runs.

    Args:
        names: as they were given.

    Raises:
        TypeError: one is no option of a sweep.
    """
    known = list(SweepOptions.__annotations__)
    unknown = [name for name in names if name not in known]
    if unknown:
        raise TypeError(f"no option {unknown[0]!r}: there are {', '.join(known)}")
