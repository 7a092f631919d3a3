"""from_first_change: the first position at which a cell changes the run, found from its values.

Clean and corrupted prompts mostly share a beginning. A patch there replaces an activation by an equal one; a patch of a
whole head changes nothing before the first position at which the prompts differ.
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

# Two ways of computing an activation (fused and eager attention) differ by some forty roundings of an entry, or of the
# median entry at its position.
_ROUNDINGS = 48


def is_compared(point: HookPoint) -> bool:
    """Return whether an edit at a hook point is compared with the base run.

    Not at on-demand hook points, where recording costs more than it may save, nor after the last block, which the base
    run may not compute.

    Args:
        point: the hook point.
    """
    axes = point.axes
    return "pos" in axes and not point.on_demand and str(point.name).startswith("blocks.")


def from_first_change(cell: SweepCell, base: Mapping[str, Tensor], points: Mapping[str, HookPoint]) -> SweepCell | None:
    """Return the cell with `first` set to the first position that it changes, or None if it changes nothing.

    Up to the first changed position all activations are the base run's, so each edit is tried on the base run's
    activation.

    Args:
        cell: a cell of `plan_cell`.
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
        median = sizes.flatten(2).median(-1).values.reshape(*sizes.shape[:2], *(1,) * (sizes.ndim - 2))
        rounding = _ROUNDINGS * torch.finfo(activation.dtype).eps * torch.maximum(sizes, median)
        different &= ~((edited - activation).abs() <= rounding)
    changed = different.flatten(2).any(-1).any(0).nonzero()
    return int(changed[0]) if len(changed) else None
