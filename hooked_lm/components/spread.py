"""Spread: which device each block of a model is on, and the moves between them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor, nn

from hooked_lm.components.sequence import SequenceLayout
from hooked_lm.names import layer_of

__all__ = ["Spread", "applied", "layers_by_device"]


@dataclass(frozen=True)
class Spread:
    """The devices of a model that is on several.

    Attributes:
        home: the device of everything but the blocks. Tokens go in there; logits and cached activations come out there.
        blocks: the device of each block.
    """

    home: torch.device
    blocks: tuple[torch.device, ...]

    @classmethod
    def of(cls, home: nn.Parameter, blocks: Iterable[nn.Module]) -> Spread | None:
        """Return where a model's parameters are; None if all are on one device.

        Args:
            home: a parameter that belongs to no block.
            blocks: the blocks.
        """
        devices = tuple(next((one.device for one in block.parameters()), home.device) for block in blocks)
        return cls(home.device, devices) if set(devices) - {home.device} else None

    def of_site(self, name: str) -> torch.device:
        """Return the device of an activation.

        Args:
            name: the full name of its hook point.
        """
        layer = layer_of(name)
        return self.home if layer is None else self.blocks[layer]

    def at_sites(self, activations: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return activations, by full hook name, each on the device of its site."""
        return {name: x.to(self.of_site(name)) for name, x in activations.items()}

    def entering(
        self, layer: int, residual: Tensor, layout: SequenceLayout, shortformer_pos: Tensor | None
    ) -> tuple[Tensor, SequenceLayout, Tensor | None]:
        """Return what a block takes, on its device.

        Args:
            layer: the block.
            residual: the stream before it.
            layout: of the pass, on any device.
            shortformer_pos: positions for queries and keys.
        """
        device = self.blocks[layer]
        moved_pos = None if shortformer_pos is None else shortformer_pos.to(device)
        return residual.to(device), layout.on(device), moved_pos


def layers_by_device(
    sizes: Sequence[int], at_home: int, devices: Sequence[torch.device], together: Sequence[bool]
) -> list[torch.device]:
    """Return a device for each block, in the order of the devices, so that the fullest holds as little as possible.

    Args:
        sizes: bytes of each block.
        at_home: bytes of everything else, which the first device holds.
        devices: the devices.
        together: whether a block has to be where the one before it is.
    """
    starts = [layer for layer, bound in enumerate(together) if not bound]
    pieces = [range(start, stop) for start, stop in pairwise([*starts, len(sizes)])]
    weights = [sum(sizes[layer] for layer in piece) for piece in pieces]

    def filled(capacity: int) -> list[int] | None:
        """The device of each piece, each device filled up to the capacity; None if they do not fit."""
        found, device, used = [], 0, at_home
        for weight in weights:
            while used + weight > capacity:
                device, used = device + 1, 0
                if device == len(devices):
                    return None
            found.append(device)
            used += weight
        return found

    low, high = max([at_home, *weights]), at_home + sum(weights)
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if filled(middle) is not None else (middle + 1, high)
    chosen = filled(low)
    assert chosen is not None
    return [devices[device] for device, piece in zip(chosen, pieces, strict=True) for _ in piece]


def applied(module: nn.Module, x: Tensor, method: Callable[[Tensor], Tensor] | None = None) -> Tensor:
    """Return what a part of a model makes of a tensor: computed where the part is, returned where the tensor is.

    Args:
        module: the part.
        x: the tensor.
        method: of the part; by default its forward.
    """
    here = next((one.device for one in module.parameters()), x.device)
    made: Tensor = (method or module)(x.to(here))
    return made.to(x.device)
