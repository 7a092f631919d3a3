"""The activations of a run of which one residual per layer was kept: any other is computed when it is read.

A block is a function of the stream that enters it, so from what entered block `l` everything in it can be had again for
the work of that one block. Where hooks or interventions changed an activation, what they left is kept as well and put
back in its place; they themselves are not called again, whatever they count or draw.
"""

from __future__ import annotations

from collections.abc import Callable, ItemsView, Iterable, Iterator, Mapping, MutableMapping, ValuesView
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
from torch import Tensor

from hooked_lm.config import HookedTransformerConfig
from hooked_lm.hook_point import HookHandle, HookPoint
from hooked_lm.names import layer_of

Place = int | str
Fingerprint = tuple[tuple[int, int], ...]
Change = Callable[[str, Tensor], Tensor]


class Runnable(Protocol):
    """What running a part of a model again needs of it."""

    cfg: HookedTransformerConfig
    hook_dict: dict[str, HookPoint]

    def __call__(self, input: Any, **kwargs: Any) -> Any: ...

    def parameters(self) -> Iterator[Tensor]: ...

    def only_hooks(self, handles: Iterable[HookHandle]) -> AbstractContextManager[Any]: ...

    def logits_of(self, residual: Tensor, logits_to_keep: Any) -> Tensor: ...


def place_of(name: str) -> Place:
    """Return what has to run again for a hook point: a block's number, `"embed"` or `"final"`."""
    layer = layer_of(name)
    if layer is not None:
        return layer
    return "final" if name.startswith(("ln_final.", "unembed.")) else "embed"


@dataclass(frozen=True, eq=False)
class KeptRun:
    """What is kept of a run, and how parts of it are run again.

    Attributes:
        model: that ran.
        first, last: blocks `first` to `last - 1` ran.
        tokens, mask: what it read, [batch pos]; no tokens for a run that began with a residual, no mask for one
            without padding.
        residuals: by block, the stream that entered it; under `last`, the stream that left the last.
        edits: by hook name, the activation as hooks left it.
        ends: whether final norm and unembedding belong to the run.
        logits_to_keep: the positions that were unembedded, as they were asked for.
        fingerprint: tells whether the weights and what is kept are still as they were in the run.
    """

    model: Runnable
    first: int
    last: int
    tokens: Tensor | None
    mask: Tensor | None
    residuals: dict[int, Tensor]
    edits: dict[str, Tensor]
    ends: bool
    logits_to_keep: Any
    fingerprint: Fingerprint

    def covers(self, name: str) -> bool:
        """Return whether a hook point was part of the run."""
        place = place_of(name)
        if isinstance(place, int):
            return self.first <= place < self.last
        if place == "final":
            return self.ends
        # Shortformer's positions are made in every run.
        shortformer = self.model.cfg.positional_embedding_type == "shortformer"
        return self.tokens is not None or (name == "hook_pos_embed" and shortformer)

    def held(self, name: str) -> Tensor | None:
        """Return an activation if it is one of those that were kept."""
        if name in self.edits:
            return self.edits[name]
        place = place_of(name)
        if isinstance(place, int) and name.endswith(".hook_resid_pre"):
            return self.residuals[place]
        left = isinstance(place, int) and name.endswith(".hook_resid_post")
        # What hooks made of the stream as it entered the next block is not what left this one.
        if left and f"blocks.{place + 1}.hook_resid_pre" not in self.edits:  # type: ignore[operator]
            return self.residuals[place + 1]  # type: ignore[operator]
        return None

    def compute(self, place: Place, names: Iterable[str]) -> dict[str, Tensor]:
        """Return the named activations of one place, from one run of it.

        Raises:
            RuntimeError: the weights are not those of the run any more.
        """
        self.check()
        found: dict[str, Tensor] = {}

        def record(x: Tensor, hook: HookPoint) -> None:
            found[hook.name] = x

        points = self.model.hook_dict
        handles = [HookHandle(points[name], _Put(value), "fwd") for name, value in self.edits.items()]
        handles += [HookHandle(points[name], record, "fwd", reads_only=True) for name in names]
        with torch.no_grad(), self.model.only_hooks(handles):
            self._run(place)
        return found

    def check(self) -> None:
        """Raise RuntimeError if weights, or what is kept, are not as they were in the run."""
        if fingerprint(self.model, self.residuals, self.edits) != self.fingerprint:
            raise RuntimeError(
                "the model's weights, or a stream that this cache has given out, have been changed or moved since the "
                "run, and a lazy cache computes with them: read or prefetch what is needed before, clone what is to be "
                "written to, or cache without lazy=True"
            )

    def _run(self, place: Place) -> None:
        if place == "final":
            self.model.logits_of(self._stream(self.last), self.logits_to_keep)
        elif isinstance(place, int):
            self.model(self._stream(place), start_at_layer=place, stop_at_layer=place + 1, attention_mask=self.mask)
        elif self.tokens is not None:
            mask = torch.ones_like(self.tokens) if self.mask is None else self.mask
            self.model(self.tokens, stop_at_layer=0, attention_mask=mask)
        else:
            begin = self.first
            self.model(self._stream(begin), start_at_layer=begin, stop_at_layer=begin, attention_mask=self.mask)

    def _stream(self, layer: int) -> Tensor:
        if layer not in self.residuals:  # a model without blocks
            return self.model(self.tokens, stop_at_layer=0, attention_mask=self.mask)
        return self.residuals[layer].to(next(self.model.parameters()).device)


class _Put:
    """A hook that puts a kept activation back in its place."""

    def __init__(self, value: Tensor) -> None:
        self.value = value

    def __call__(self, x: Tensor, hook: HookPoint) -> Tensor:
        return self.value.to(x.device)


def fingerprint(model: Runnable, *kept: Mapping[Any, Tensor]) -> Fingerprint:
    """Return where each parameter and kept tensor is, and how often it was written to: what changes when they do."""
    tensors = [*model.parameters(), *(one for tensors in kept for one in tensors.values())]
    return tuple((one.data_ptr(), 0 if one.is_inference() else one._version) for one in tensors)


class LazyActivations(MutableMapping[str, Tensor]):
    """Activations by name, computed when they are read. What is assigned or prefetched is held.

    Args:
        run: what was kept.
        names: of the activations there are.
        changes: made to each activation before it is given out: positions picked, moved, without the batch axis.
    """

    def __init__(self, run: KeptRun, names: Iterable[str], changes: tuple[Change, ...] = ()) -> None:
        self.run, self.names, self.changes = run, dict.fromkeys(names), changes
        self.own: dict[str, Tensor] = {}

    def __getitem__(self, name: str) -> Tensor:
        if name in self.own:
            return self.own[name]
        if name not in self.names:
            raise KeyError(name)
        held = self.run.held(name)
        return self._changed(name, self.run.compute(place_of(name), [name])[name] if held is None else held)

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
        """Yield names and activations, all by default, running each block once and holding none of it."""
        groups: dict[Place, list[str]] = {}
        for name in self.names if names is None else names:
            groups.setdefault(place_of(name), []).append(name)
        for place, group in groups.items():
            missing = [name for name in group if name not in self.own and self.run.held(name) is None]
            found = self.run.compute(place, missing) if missing else {}
            for name in group:
                yield name, self._changed(name, found.pop(name)) if name in missing else self[name]

    def prefetch(self, names: Iterable[str]) -> None:
        """Compute activations and hold them."""
        self.own |= dict(self.pairs(list(names)))

    def then(self, change: Change) -> LazyActivations:
        """Return the same activations with one more change made to each."""
        changed = LazyActivations(self.run, self.names, (*self.changes, change))
        changed.own = {name: change(name, value) for name, value in self.own.items()}
        return changed

    def moved(self, device: torch.device | str) -> LazyActivations:
        """Return the same activations on a device, with what is kept moved there."""
        self.run.check()
        residuals = {layer: x.to(device) for layer, x in self.run.residuals.items()}
        edits = {name: x.to(device) for name, x in self.run.edits.items()}
        run = replace(
            self.run, residuals=residuals, edits=edits, fingerprint=fingerprint(self.run.model, residuals, edits)
        )
        moved = self.then(lambda name, x: x.to(device))
        moved.run = run
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
