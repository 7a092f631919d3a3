"""Examples in groups: which groups are held out, and the interval of a share of examples whose groups are drawn."""

from __future__ import annotations

from collections.abc import Hashable, Sequence

import numpy as np
import torch
from jaxtyping import Bool, Int
from torch import Tensor

from hooked_lm.patching.statistics import bootstrap_interval

__all__ = ["Entries", "grouped_interval", "hold_out", "listed", "numbered"]

# Anything that can be compared, one for each example or prompt.
Entries = Sequence[Hashable] | Tensor | np.ndarray


def listed(entries: Sequence[object] | Tensor | np.ndarray) -> list[object]:
    """Return entries as a list of plain values: tensors and arrays among them are compared by value, not as objects.

    Args:
        entries: a sequence, tensor or array.
    """
    return [one.tolist() if isinstance(one, (Tensor, np.ndarray, np.generic)) else one for one in entries]


def numbered(entries: Entries, n_examples: int, what: str) -> Int[Tensor, " example"]:
    """Return a number for each entry, the same for equal ones, in order of first occurrence.

    Args:
        entries: one for each example.
        n_examples: how many there are.
        what: the entries are; for the message.

    Raises:
        ValueError: there are more entries or fewer.
    """
    given: list[Hashable] = listed(entries)
    if len(given) != n_examples:
        raise ValueError(f"{len(given)} {what} came for {n_examples} examples: give one for each")
    numbers: dict[Hashable, int] = {}
    return torch.tensor([numbers.setdefault(one, len(numbers)) for one in given])


def hold_out(
    groups: Int[Tensor, " example"], test_share: float, generator: torch.Generator
) -> Bool[Tensor, " example"]:
    """Return which examples are held out: random groups of them, until they are the share asked for.

    Args:
        groups: of the examples, numbered from 0.
        test_share: the share of the examples, between 0 and 1.
        generator: of the order of the groups.

    Raises:
        ValueError: a share that is none, or fewer than two groups on either side.
    """
    if not 0 < test_share < 1:
        raise ValueError(f"test_share is between 0 and 1, got {test_share}")
    sizes = groups.bincount()
    order = torch.randperm(len(sizes), generator=generator)
    # A group is held out if those before it, in random order, are still too few; two groups stay on either side.
    before = sizes[order].cumsum(0) - sizes[order]
    n_chosen = int((before < test_share * len(groups)).sum())
    if len(sizes) < 4:
        raise ValueError(f"{len(sizes)} groups cannot be divided: two or more are fitted and two or more are held out")
    chosen = order[: min(max(n_chosen, 2), len(sizes) - 2)]
    return torch.isin(groups, chosen)


def grouped_interval(
    correct: Bool[Tensor, " example"],
    groups: Int[Tensor, " example"],
    confidence: float,
    n_resamples: int,
    seed: int,
) -> tuple[float, float]:
    """Return the ends of the bootstrap interval of the share of examples that are correct; groups are drawn.

    Args:
        correct: of each example.
        groups: of the examples, numbered from 0; some numbers may have none.
        confidence, n_resamples, seed: as for `patching.bootstrap_interval`.

    Raises:
        ValueError: fewer than two groups, or a setting out of range.
    """
    sizes = groups.bincount().double()
    right, there = groups.bincount(weights=correct.double()), sizes > 0
    low, high = bootstrap_interval(right[there] / sizes[there], confidence, n_resamples, seed, weights=sizes[there])
    return float(low), float(high)
