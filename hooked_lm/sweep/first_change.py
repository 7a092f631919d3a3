"""From which position on a cell changes the run, as its values show; its selections only say from where it may.

Clean and corrupted prompts mostly share a beginning. A patch there replaces an activation by the same one, and changes
nothing; a patch of a whole head changes nothing before the prompts part.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from hooked_lm.hooks import HookPoint
from hooked_lm.interventions import Intervention
from hooked_lm.sweep.plan import SweepCell

__all__ = ["from_first_change", "is_compared"]

# Two ways of computing one activation (attention fused or not) differ by some forty roundings of an entry, or of one of
# middling size at its position.
_ROUNDINGS = 48


def is_compared(point: HookPoint) -> bool:
    """Return whether an edit there is compared with the base run: not where recording costs more than it may save.

    Nor behind the last block, where the base run need not go.
    """
    axes = point.axes
    return "pos" in axes and not point.on_demand and str(point.name).startswith("blocks.")


def from_first_change(cell: SweepCell, base: Mapping[str, Tensor], points: Mapping[str, HookPoint]) -> SweepCell | None:
    """Return the cell with the first position that it changes, or None if it changes nothing.

    As long as no edit changes a position, all activations there are the base run's; so it is enough to make each edit
    on the base run's activation.

    Args:
        cell: planned from its selections.
        base: the base run's activations [batch pos ...].
        points: the model's hook points by name.
    """
    firsts = []
    for one in (*cell.at_entry, *cell.on_the_way):
        if not is_compared(points[one.site]):
            return cell
        first = _first_change(one, base[one.site], points[one.site].axes)
        if first is not None:
            firsts.append(first)
    return replace(cell, first=min(firsts)) if firsts else None


def _first_change(one: Intervention, activation: Tensor, axes: Sequence[str]) -> int | None:
    edited = one.apply(activation, axes)[0]
    different = edited != activation
    if one.operation == "replace" and activation.dtype in (torch.float32, torch.float64):
        sizes = activation.abs()
        middling = sizes.flatten(2).median(-1).values.reshape(*sizes.shape[:2], *(1,) * (sizes.ndim - 2))
        rounding = _ROUNDINGS * torch.finfo(activation.dtype).eps * torch.maximum(sizes, middling)
        different &= ~((edited - activation).abs() <= rounding)
    changed = different.flatten(2).any(-1).any(0).nonzero()
    return int(changed[0]) if len(changed) else None
