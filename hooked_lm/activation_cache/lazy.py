"""LazyActivations: the activations of a run, computed when they are read from one kept residual per layer."""

from __future__ import annotations

from collections.abc import Callable, ItemsView, Iterable, Iterator, MutableMapping, ValuesView
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from hooked_lm.activation_cache.replay import ReplayableRun, Segment, fingerprint, segment_of
from hooked_lm.hooks import KeptPositions, recorded_part
from hooked_lm.hooks.point import HookPoint
from hooked_lm.slicing import Slice

__all__ = ["Change", "LazyActivations", "Moved", "Part"]

Change = Callable[[str, Tensor], Tensor]


@dataclass(frozen=True)
class Part:
    """The part of an activation that a cache keeps: some positions, with or without the batch axis, on some device."""

    points: dict[str, HookPoint]
    positions: Slice
    remove_batch_dim: bool
    device: torch.device | str | None
    kept: KeptPositions | None = None

    def __call__(self, name: str, x: Tensor) -> Tensor:
        kept = self.kept if name.startswith("unembed.") else None
        return recorded_part(x, self.points[name], self.positions, self.remove_batch_dim, kept).to(device=self.device)


@dataclass(frozen=True)
class Moved:
    """A change that moves each activation to a device."""

    device: torch.device | str

    def __call__(self, name: str, x: Tensor) -> Tensor:
        return x.to(self.device)


class LazyActivations(MutableMapping[str, Tensor]):
    """Activations by name, computed when they are read. Assigned and prefetched activations are held.

    Several threads may read, and run the model, at the same time.

    Args:
        run: the kept tensors of the run.
        names: of the activations in the cache.
        changes: made, in order, to each activation before it is returned.
    """

    def __init__(self, run: ReplayableRun, names: Iterable[str], changes: tuple[Change, ...] = ()) -> None:
        self.run, self.names, self.changes = run, dict.fromkeys(names), changes
        self.own: dict[str, Tensor] = {}

    def __getitem__(self, name: str) -> Tensor:
        if name in self.own:
            return self.own[name]
        if name not in self.names:
            raise KeyError(name)
        held = self.run.held(name)
        return self._changed(name, self.run.compute(segment_of(name), [name])[name] if held is None else held)

    def __setitem__(self, name: str, value: Tensor) -> None:
        self.names[name] = None
        self.own[name] = value

    def __delitem__(self, name: str) -> None:
        del self.names[name]
        self.own.pop(name, None)

    def __contains__(self, name: object) -> bool:
        return name in self.names

    def __iter__(self) -> Iterator[str]:
        return iter(self.names)

    def __len__(self) -> int:
        return len(self.names)

    def _changed(self, name: str, x: Tensor) -> Tensor:
        for change in self.changes:
            x = change(name, x)
        return x

    def pairs(self, names: Iterable[str] | None = None) -> Iterator[tuple[str, Tensor]]:
        """Yield names and activations, all by default, in order, running each block once."""
        order = list(self.names if names is None else names)
        missing = [name for name in order if name not in self.own and self.run.held(name) is None]
        groups: dict[Segment, list[str]] = {}
        for name in missing:
            groups.setdefault(segment_of(name), []).append(name)
        # Computed but not yet yielded activations: those of one segment, if each segment's names are adjacent.
        found: dict[str, Tensor] = {}
        for name in order:
            if name not in found and segment_of(name) in groups and name in groups[segment_of(name)]:
                found |= self.run.compute(segment_of(name), groups.pop(segment_of(name)))
            yield name, self._changed(name, found.pop(name)) if name in found else self[name]

    def prefetch(self, names: Iterable[str]) -> None:
        """Compute activations and hold them."""
        self.own |= dict(self.pairs(names))

    def then(self, change: Change) -> LazyActivations:
        """Return the same activations with one more change made to each."""
        changed = LazyActivations(self.run, self.names, (*self.changes, change))
        changed.own = {name: change(name, value) for name, value in self.own.items()}
        return changed

    def moved(self, device: torch.device | str) -> LazyActivations:
        """Return the same activations on a device, with the kept tensors moved there too."""
        residuals = {layer: x.to(device) for layer, x in self.run.residuals.items()}
        edits = {name: x.to(device) for name, x in self.run.edits.items()}
        moved = self.then(Moved(device))
        mark = fingerprint(self.run.model, residuals, edits)
        moved.run = replace(self.run, residuals=residuals, edits=edits, fingerprint=mark)
        return moved

    def items(self) -> ItemsView[str, Tensor]:
        return _Items(self)

    def values(self) -> ValuesView[Tensor]:
        return _Values(self)

    def kept(self) -> Iterator[Tensor]:
        """Yield every tensor that is held."""
        yield from self.run.residuals.values()
        yield from self.run.edits.values()
        yield from self.own.values()


class _Items(ItemsView[str, Tensor]):
    """Names and activations, block by block."""

    def __init__(self, activations: LazyActivations) -> None:
        super().__init__(activations)
        self.activations = activations

    def __iter__(self) -> Iterator[tuple[str, Tensor]]:
        return self.activations.pairs()


class _Values(ValuesView[Tensor]):
    """Activations, block by block."""

    def __init__(self, activations: LazyActivations) -> None:
        super().__init__(activations)
        self.activations = activations

    def __iter__(self) -> Iterator[Tensor]:
        return (x for _, x in self.activations.pairs())
