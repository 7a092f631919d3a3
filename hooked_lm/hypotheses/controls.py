"""Controls: the same measurement where no effect is expected, on random heads or shuffled labels."""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch

from hooked_lm._support.integers import at_least_one, integer
from hooked_lm.hooked_model import HookedModel
from hooked_lm.hypotheses.permutation import ALTERNATIVES, Alternative

__all__ = ["ControlTest", "Head", "against_controls", "control_heads", "shuffled"]

Head = tuple[int, int]
GivenLabel = TypeVar("GivenLabel")


@dataclass(frozen=True)
class ControlTest:
    """An effect beside those of controls.

    Attributes:
        effect: that is tested.
        controls: the same measurement on each control.
        kind: what the controls are, in the plural: `"random heads"`.
        alternative: what counts as an effect as large: `"two-sided"` compares sizes.
        n_reached: how many controls have an effect as large.
        p: (1 + n_reached) / (1 + number of controls).
    """

    effect: float
    controls: tuple[float, ...]
    kind: str
    alternative: Alternative
    n_reached: int
    p: float

    @property
    def verdict(self) -> str:
        """How the effect compares, in words."""
        n = len(self.controls)
        if self.n_reached == 0:
            return f"larger than that of all {n} {self.kind} (p = {self.p:.3g})"
        return f"{self.n_reached} of {n} {self.kind} have as large a one (p = {self.p:.3g})"

    def __str__(self) -> str:
        return f"{self.effect:+.4g}: {self.verdict}"


def against_controls(
    effect: float, controls: Sequence[float], alternative: Alternative = "two-sided", kind: str = "controls"
) -> ControlTest:
    """Return how an effect compares with the effects of controls.

    Args:
        effect: that is tested.
        controls: the same measurement on each control; 19 or more reach p = 0.05.
        alternative: `"two-sided"` compares sizes, `"greater"` and `"less"` numbers.
        kind: what the controls are, in the plural, for the words.

    Raises:
        ValueError: there is no control, a number is not finite, or there is no such alternative.
    """
    if alternative not in ALTERNATIVES:
        raise ValueError(f"alternative is 'two-sided', 'greater' or 'less', got {alternative!r}")
    numbers = tuple(float(one) for one in controls)
    if not numbers or not all(map(math.isfinite, (*numbers, effect))):
        raise ValueError("an effect is compared with one control or more, all of them finite numbers")

    def in_direction(number: float) -> float:
        return abs(number) if alternative == "two-sided" else number if alternative == "greater" else -number

    reached = sum(in_direction(one) >= in_direction(effect) for one in numbers)
    return ControlTest(float(effect), numbers, kind, alternative, int(reached), (1 + reached) / (1 + len(numbers)))


def control_heads(model: HookedModel, heads: Sequence[Head], n: int = 20, seed: int = 0) -> list[tuple[Head, ...]]:
    """Return `n` random choices of other heads, as many in each layer as are given.

    A layer whose heads leave too few others has its places filled from the other layers. Choices may come twice.

    Args:
        model: whose heads they are.
        heads: (layer, head), which no control has.
        n: how many choices.
        seed: of the draws.

    Raises:
        ValueError: no head is given, one is not the model's or comes twice, or too few others are left.
    """
    given = _checked_heads(model, heads)
    at_least_one(n, "n")
    others = [
        (layer, head)
        for layer in range(model.cfg.n_layers)
        for head in range(model.cfg.n_heads)
        if (layer, head) not in given
    ]
    if len(others) < len(given):
        raise ValueError(f"the model has {len(others)} other heads, and {len(given)} are needed for a control")
    generator = torch.Generator().manual_seed(seed)
    found = []
    for _ in range(n):
        order = [others[i] for i in torch.randperm(len(others), generator=generator).tolist()]
        chosen: list[Head] = []
        for layer in sorted({layer for layer, _ in given}):
            wanted = sum(one == layer for one, _ in given)
            chosen += [head for head in order if head[0] == layer][:wanted]
        chosen += [head for head in order if head not in chosen][: len(given) - len(chosen)]
        found.append(tuple(sorted(chosen)))
    return found


def _checked_heads(model: HookedModel, heads: Sequence[Head]) -> list[Head]:
    given = [(integer(layer, "layer"), integer(head, "head")) for layer, head in heads]
    wrong = [one for one in given if not (0 <= one[0] < model.cfg.n_layers and 0 <= one[1] < model.cfg.n_heads)]
    if not given or wrong or len(set(given)) < len(given):
        raise ValueError(
            f"heads are different pairs (layer, head), of {model.cfg.n_layers} layers with {model.cfg.n_heads} heads; "
            f"got {list(heads)}"
        )
    return given


def shuffled(
    labels: Sequence[GivenLabel], n: int = 20, groups: Sequence[Hashable] | None = None, seed: int = 0
) -> list[list[GivenLabel]]:
    """Return `n` random orders of labels.

    Args:
        labels: of the examples.
        n: how many orders.
        groups: one for each label; labels change places within their group only.
        seed: of the draws.

    Raises:
        ValueError: fewer than two labels, all the same, or groups that are not as many.
    """
    entries = list(labels)
    group_of = [None] * len(entries) if groups is None else list(groups)
    at_least_one(n, "n")
    if len(group_of) != len(entries):
        raise ValueError(f"groups are one for each of the {len(entries)} labels, got {len(group_of)}")
    places: dict[Hashable, list[int]] = {}
    for index, group in enumerate(group_of):
        places.setdefault(group, []).append(index)
    if all(all(entries[one] == entries[within[0]] for one in within) for within in places.values()):
        raise ValueError("shuffling changes nothing: within each group all labels are the same")
    generator = torch.Generator().manual_seed(seed)
    found = []
    for _ in range(n):
        order = list(entries)
        for within in places.values():
            for place, source in zip(within, torch.randperm(len(within), generator=generator).tolist(), strict=True):
                order[place] = entries[within[source]]
        found.append(order)
    return found
