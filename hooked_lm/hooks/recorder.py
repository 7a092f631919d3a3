"""Recorder: the hook that puts an activation, or some positions of it, into a cache."""

from __future__ import annotations

from collections.abc import MutableMapping
from dataclasses import dataclass

import torch
from torch import Tensor

from hooked_lm.hooks.point import HookPoint
from hooked_lm.hooks.thread import KeptPositions, current_pass
from hooked_lm.names import selected_axis
from hooked_lm.slicing import Slice

__all__ = ["Recorder", "recorded_part"]


@dataclass(frozen=True, eq=False)
class Recorder:
    """A hook that stores the activation in a dictionary, under the hook point's name.

    Attributes:
        store: the dictionary.
        suffix: added to the name: `"_grad"` for gradients.
        positions: the positions to keep.
        remove_batch_dim: drop the batch axis, which must have length 1.
        device: where to keep the tensors; None leaves them where they are.
        keep_graph: store tensors that gradients flow through. Otherwise a stored tensor is detached; it shares the
            memory of the run's tensor.
    """

    store: MutableMapping[str, Tensor]
    suffix: str
    positions: Slice
    remove_batch_dim: bool
    device: torch.device | str | None
    keep_graph: bool = False

    reads_only = True

    def __call__(self, x: Tensor, hook: HookPoint) -> None:
        # Always detached: a tensor of forward-mode differentiation carries a derivative and requires no gradient.
        x = x if self.keep_graph else x.detach()
        part = recorded_part(x, hook, self.positions, self.remove_batch_dim, current_pass().kept)
        self.store[hook.name + self.suffix] = part if self.device is None else part.to(self.device)


def recorded_part(
    x: Tensor, hook: HookPoint, positions: Slice, remove_batch_dim: bool, kept: KeptPositions | None = None
) -> Tensor:
    """Return the part of an activation that a cache keeps: some positions (of queries, for patterns).

    A single position keeps its axis, of length 1.

    Args:
        x: the activation.
        hook: its hook point, for the axes.
        positions: the positions to keep.
        remove_batch_dim: drop the batch axis.
        kept: the positions of the pass that `x` has; None for all.

    Raises:
        ValueError: `remove_batch_dim` with a batch that is not 1, or a position that `x` lacks.
    """
    if not positions.is_identity:
        axis = selected_axis(hook.axes, "pos")
        along = hook.axis("pos" if axis is None else hook.axes[axis])  # raises ValueError where there are no positions
        if kept is None and len(positions.indices(x.shape[along])) == 0:
            raise ValueError(
                f"pos_slice {positions.slice} picks none of the {x.shape[along]} positions of {hook.name!r}"
            )
        several = Slice([positions.slice]) if positions.mode == "int" else positions
        # A copy, since a view of the few positions would keep the whole activation in memory.
        x = (several if kept is None else _among(kept, several, hook.name)).apply(x, dim=along).clone()
    if not remove_batch_dim:
        return x
    if x.shape[0] != 1:
        raise ValueError(f"remove_batch_dim needs a batch of 1; {hook.name!r} has shape {tuple(x.shape)}")
    return x[0]


def _among(kept: KeptPositions, positions: Slice, name: str) -> Slice:
    """Positions of a pass as positions among those kept.

    Raises:
        ValueError: one is not kept.
    """
    wanted = positions.indices(kept.n_positions).tolist()
    places = [kept.places_of(one)[:1] for one in wanted]
    missing = [one for one, place in zip(wanted, places, strict=True) if not place]
    if missing:
        raise ValueError(
            f"pos_slice selects position {missing[0]}, and {name!r} has only those that logits_to_keep keeps: "
            f"{list(kept.positions)}"
        )
    return Slice([place for (place,) in places])
