"""`model.spread`: the blocks of a model on several devices, in one process."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Self

import torch
from torch import Tensor, nn

from hooked_lm.components.spread import Spread, layers_by_device
from hooked_lm.weights.views import WeightViews

__all__ = ["Spreading"]


class Spreading(WeightViews):
    """Where a `HookedTransformer` is: on one device, or spread over several.

    Attributes:
        spread_over: the devices of a spread model; None for a model on one device.
    """

    spread_over: Spread | None = None

    def spread(
        self, devices: Sequence[torch.device | str] | Mapping[str, int], *, home: torch.device | str | None = None
    ) -> Self:
        """Put the blocks on several devices, one after the other, for a model that does not fit on one; return it.

        Everything else works as before: hooks and interventions act where their block is, tokens go in and logits,
        residual streams and cached activations come out on the first device. The embeddings, the final norm and the
        unembedding are there too, so that what a user combines is on one device. `model.to(device)` undoes it.

        Args:
            devices: in the order of the blocks, which are divided so that the fullest device holds as little as
                possible; or device -> how many blocks it gets.
            home: the device of everything but the blocks; by default the first of `devices`.

        Raises:
            ValueError: no device, one that is given twice, or numbers that are not those of the blocks.
        """
        if self.ranks is not None:
            raise ValueError("a model whose heads are shared out among processes is not spread over devices too")
        names = [torch.device(one) for one in devices]
        if not names or len(set(names)) < len(names):
            raise ValueError(f"spread takes one device or more, each of them once; got {[str(one) for one in names]}")
        together = [self.cfg.within_pair(layer) for layer in range(len(self.blocks))]
        first = names[0] if home is None else torch.device(home)
        if isinstance(devices, Mapping):
            placed = _counted(list(devices.values()), names, together)
        else:
            sizes = [_bytes(block) for block in self.blocks]
            # Only a first device that is home too holds the rest.
            rest = _bytes(self) - sum(sizes) if first == names[0] else 0
            placed = layers_by_device(sizes, rest, names, together)
        for name, module in self.named_children():
            if name != "blocks":
                module.to(first)
        for block, device in zip(self.blocks, placed, strict=True):
            block.to(device)
        self._note_place()
        return self

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """Note dtype and devices after `.to()`, `.half()`, `.cuda()` and similar calls."""
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        if hasattr(self, "unembed"):
            self._note_place()
        return self

    def _note_place(self) -> None:
        """Write down where the parameters are, and in which precision."""
        self.cfg.set_unlocked(dtype=self.W_U.dtype, device=str(self.W_U.device))
        self.spread_over = Spread.of(self.embed.W_E, self.blocks)


def _bytes(module: nn.Module) -> int:
    return sum(one.numel() * one.element_size() for one in module.parameters())


def _counted(counts: Sequence[int], devices: Sequence[torch.device], together: Sequence[bool]) -> list[torch.device]:
    """Return a device for each block, as many to each device as was asked for."""
    if sum(counts) != len(together) or min(counts) < 0:
        raise ValueError(f"the model has {len(together)} blocks; the numbers of blocks given are {list(counts)}")
    placed = [device for device, count in zip(devices, counts, strict=True) for _ in range(count)]
    for layer, bound in enumerate(together):
        if bound and placed[layer] != placed[layer - 1]:
            raise ValueError(f"blocks {layer - 1} and {layer} run together: put them on one device")
    return placed
