"""The parts of a run that a lazy cache keeps, and how the other activations are computed from them again.

A block is a function of the residual stream that enters it. So any activation of block `l` can be computed again from
that stream, for the work of one block. Activations that hooks or interventions have changed are kept too and put back
when the block runs again; the hooks themselves are not called a second time, so counters and random draws stay as they
were.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.amp import is_autocast_available

from hooked_lm._support.torch_internals import times_written
from hooked_lm.hooked_model import HookedModel
from hooked_lm.hooks import HookHandle, HookPoint, carries_run
from hooked_lm.names import layer_of

Segment = int | str
Fingerprint = tuple[tuple[int, int], ...]


def segment_of(name: str) -> Segment:
    """Return what has to run again for a hook point: a block's number, `"embed"` or `"final"`."""
    layer = layer_of(name)
    if layer is not None:
        return layer
    return "final" if name.startswith(("ln_final.", "unembed.")) else "embed"


def fingerprint(model: HookedModel, *kept: Mapping[Any, Tensor]) -> Fingerprint:
    """Return where each parameter and kept tensor is, and how often it was written to: what changes when they do."""
    tensors = [*model.parameters(), *(one for tensors in kept for one in tensors.values())]
    return tuple((one.data_ptr(), times_written(one)) for one in tensors)


@dataclass(frozen=True, eq=False)
class ReplayableRun:
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
        autocast: whether it ran under autocast, and in which dtype.
        fingerprint: tells whether the weights and what is kept are still as they were in the run.
    """

    model: HookedModel
    first: int
    last: int
    tokens: Tensor | None
    mask: Tensor | None
    residuals: dict[int, Tensor]
    edits: dict[str, Tensor]
    ends: bool
    logits_to_keep: Any
    autocast: tuple[bool, torch.dtype | None]
    fingerprint: Fingerprint

    def covers(self, name: str) -> bool:
        """Return whether a hook point was part of the run."""
        place = segment_of(name)
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
        place = segment_of(name)
        if isinstance(place, int) and name.endswith(".hook_resid_pre"):
            return self.residuals[place]
        if isinstance(place, int) and name.endswith(".hook_resid_post"):
            return self._left(place)
        return None

    def _left(self, layer: int) -> Tensor | None:
        """What left a block, or the embeddings (-1); None if hooks changed it on its way into the next."""
        if f"blocks.{layer + 1}.hook_resid_pre" in self.edits:
            return None
        return self.residuals.get(layer + 1)

    def compute(self, place: Segment, names: Iterable[str]) -> dict[str, Tensor]:
        """Return the named activations of one place, from one run of it.

        Raises:
            RuntimeError: the model does not compute what it did in the run: its weights, or what is kept, have been
                changed.
        """
        self.check()
        names, found = set(names), {}

        def record(x: Tensor, hook: HookPoint) -> None:
            found[hook.name] = x

        points = self.model.hook_dict
        handles = [HookHandle(points[name], _Put(value), "fwd") for name, value in self.edits.items()]
        handles += [HookHandle(points[name], record, "fwd", reads_only=True) for name in names]
        enabled, dtype = self.autocast
        kind = self._device.type
        precision = torch.autocast(kind, dtype, enabled) if is_autocast_available(kind) else nullcontext()
        # Not under inference mode: what it makes could not be used with gradients later.
        with torch.inference_mode(False), torch.no_grad(), precision, self.model.only_hooks(handles):
            left = self._run(place, names)
        expected = None if place == "final" else self._left(-1 if place == "embed" else int(place))
        if left is not None and expected is not None and not _agree(left, expected, (enabled and dtype) or left.dtype):
            raise RuntimeError(_CHANGED)
        return found

    def check(self) -> None:
        """Raise RuntimeError if weights, or what is kept, are not where and as they were in the run."""
        if fingerprint(self.model, self.residuals, self.edits) != self.fingerprint:
            raise RuntimeError(_CHANGED)

    def _run(self, place: Segment, names: set[str]) -> Tensor | None:
        """Run a place, and return the stream that leaves it."""
        if isinstance(place, int):
            left: Tensor = self.model(
                self._stream(place), start_at_layer=place, stop_at_layer=place + 1, attention_mask=self.mask
            )
            return left
        if place == "final":
            stream = self._stream(self.last)
            if any(name.startswith("unembed.") for name in names):
                self.model.logits_of(stream, self.logits_to_keep)
            else:
                self.model.ln_final(stream)
            return None
        if self.tokens is not None:
            embedded = self._embedded()
            return embedded if self.first == 0 < self.last else None
        begin = self.first
        self.model(self._stream(begin), start_at_layer=begin, stop_at_layer=begin, attention_mask=self.mask)
        return None

    def _embedded(self) -> Tensor:
        assert self.tokens is not None
        mask = torch.ones_like(self.tokens) if self.mask is None else self.mask
        embedded: Tensor = self.model(self.tokens, stop_at_layer=0, attention_mask=mask)
        return embedded

    def _stream(self, layer: int) -> Tensor:
        # A model without blocks has kept no stream.
        return self.residuals[layer].to(self._device) if layer in self.residuals else self._embedded()

    @property
    def _device(self) -> torch.device:
        return next(self.model.parameters()).device

    # A copy has its own tensors in other places.

    def __getstate__(self) -> dict[str, Any]:
        self.check()
        return {name: value for name, value in self.__dict__.items() if name != "fingerprint"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self.__dict__["fingerprint"] = fingerprint(self.model, self.residuals, self.edits)


_CHANGED = (
    "the model does not compute what it did in the run: its weights, or a stream that this cache has given out, have "
    "been changed or moved since. A lazy cache computes with them: read or prefetch what is needed before, clone what "
    "is to be written to, or cache without lazy=True"
)


class _Put:
    """A hook that puts a kept activation back in its place."""

    edits_in_place = False

    def __init__(self, value: Tensor) -> None:
        self.value = value

    def __call__(self, x: Tensor, hook: HookPoint) -> Tensor:
        return self.value.to(x.device)


def _agree(left: Tensor, expected: Tensor, dtype: torch.dtype) -> bool:
    """Whether a stream is the one that was kept, up to the order of sums in fused attention, in this precision."""
    if left.is_meta:
        return True
    expected = expected.to(left)
    largest = float(expected.nan_to_num(0.0, 0.0, 0.0).abs().max()) if expected.numel() else 0.0
    tolerance = min(2**10 * torch.finfo(dtype).eps, 0.1)
    return torch.allclose(left, expected, rtol=0.0, atol=tolerance * max(largest, 1e-30), equal_nan=True)


# Recording


def record_run(
    model: HookedModel, call: dict[str, Any], device: torch.device | str | None, clear_contexts: bool = False
) -> tuple[Any, ReplayableRun]:
    """Run a model and keep what its parts can be run again from; return its output and what is kept.

    Args:
        model: a `HookedTransformer`.
        call: the arguments of its `forward`, all of them by name.
        device: where to keep tensors; None for where they are.
        clear_contexts: empty the `ctx` of every hook point afterwards.

    Raises:
        ValueError: the run has a key-value cache, or torch's own hooks, that cannot be kept.
        RuntimeError: hooks were added or removed during the run.
    """
    _check_keepable(model, call)
    call = dict(call)
    tokens, mask = _what_is_read(model, call)
    first, last = model.layer_range(call["start_at_layer"], call["stop_at_layer"])
    streams = {layer: f"blocks.{layer}.hook_resid_pre" for layer in range(first, last)}
    residuals: dict[int, Tensor] = {}
    if first < last:
        streams[last] = f"blocks.{last - 1}.hook_resid_post"
    elif call["start_at_layer"] is not None:
        residuals[first] = call["input"].detach().clone()
    keep = call["logits_to_keep"]
    edited = [name for name, point in model.hook_dict.items() if _may_change(point)]
    seen, edits = _recorded(model, call, list(streams.values()), edited, device, clear_contexts)
    residuals |= {layer: seen[name] for layer, name in streams.items()}
    kind = model.W_E.device.type
    autocast = is_autocast_available(kind)
    return seen["output"], ReplayableRun(
        model=model,
        first=first,
        last=last,
        tokens=tokens,
        mask=mask,
        residuals=residuals,
        edits=edits,
        ends=call["stop_at_layer"] is None,
        logits_to_keep=keep.clone() if isinstance(keep, Tensor) else keep,
        autocast=(autocast and torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind) if autocast else None),
        fingerprint=fingerprint(model, residuals, edits),
    )


def _check_keepable(model: HookedModel, call: dict[str, Any]) -> None:
    if call["past_kv_cache"] is not None:
        raise ValueError("a key-value cache moves on after the run, so a lazy cache cannot be computed from it")


def _may_change(point: HookPoint) -> bool:
    """Whether hooks may change an activation, or make the run take another way to it."""
    return point.edited_forward or (point.on_demand and carries_run(point, torch.is_grad_enabled()))


def _recorded(
    model: HookedModel,
    call: dict[str, Any],
    streams: Sequence[str],
    edited: Sequence[str],
    device: torch.device | str | None,
    clear_contexts: bool,
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Run, and return the streams and the output by name, and what hooks have changed."""
    seen: dict[str, Any] = {}
    before: dict[str, Tensor] = {}
    edits: dict[str, Tensor] = {}

    def look(x: Tensor, hook: HookPoint) -> None:
        before[hook.name] = x.detach().clone()

    def keep(x: Tensor, hook: HookPoint) -> None:
        x = x.detach()
        if hook.name in streams:
            seen[hook.name] = x.to(device=device)
        untouched = hook.name in before and not hook.on_demand and torch.equal(before.pop(hook.name), x)
        if hook.name in edited and not untouched:
            edits[hook.name] = x.to(device=device)

    handles = _acting(model)
    looking = [HookHandle(model.hook_dict[name], look, "fwd", reads_only=True, this_thread=True) for name in edited]
    for handle in looking:
        handle.attach(prepend=True)
    try:
        with model.attached(model.recording_handles([(n, keep) for n in {*streams, *edited}], (), this_thread=True)):
            seen["output"] = model(**call)
    finally:
        for handle in looking:
            handle.remove()
        if clear_contexts:
            model.clear_contexts()
    if handles != _acting(model):
        raise RuntimeError("hooks were added or removed while the model ran, which a lazy cache cannot follow")
    return seen, edits


def _acting(model: HookedModel) -> list[HookHandle]:
    """The forward hooks that act in this thread, in the order of their hook points."""
    return [handle for point in model.hook_points() for handle in tuple(point.fwd_hooks) if handle.acts]


def _what_is_read(model: HookedModel, call: dict[str, Any]) -> tuple[Tensor | None, Tensor | None]:
    """Tokens and mask of a call, as copies; no tokens if it begins with a residual. The call then has them."""
    how = call["attention_mask"], call["prepend_bos"], call["padding_side"]
    if call["start_at_layer"] is None:
        tokens, mask = model.tokens_and_mask(call["input"], *how)
        call["input"] = tokens = tokens.clone()
        # Said outright, so that padding is not looked for again.
        call["attention_mask"] = torch.ones_like(tokens) if mask is None else mask
        return tokens, _own(mask)
    if call["tokens"] is not None:
        call["attention_mask"] = model.tokens_and_mask(call["tokens"], *how)[1]
    return None, _own(call["attention_mask"])


def _own(mask: Any) -> Any:
    """A copy of a mask; what is none is left to the model, which says so."""
    return mask.clone() if isinstance(mask, Tensor) else mask
