"""ReplayableRun: the tensors that a lazy cache keeps of a run, and how other activations are computed from them.

The activations of block `l` are a function of the residual stream at its input. So any of them can be computed again
from that residual, at the cost of running one block. Activations that hooks or interventions changed are kept too, and
put back when the block runs again; the hooks themselves are not called a second time, so that counters and random
draws stay as they were.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from types import FunctionType
from typing import TypedDict, cast

import torch
from torch import Tensor, nn
from torch.amp import is_autocast_available

from hooked_lm._support.checksums import checksums
from hooked_lm._support.torch_internals import times_written
from hooked_lm.components.stock import not_stock
from hooked_lm.hooked_model import HookedModel
from hooked_lm.hooks import HookHandle, HookPoint, ModelOutput, carries_run
from hooked_lm.kv_cache import HookedTransformerKeyValueCache
from hooked_lm.names import layer_of
from hooked_lm.tokenization import PaddingSide, Prompts

__all__ = ["Fingerprint", "ForwardCall", "ReplayableRun", "Segment", "fingerprint", "record_run", "segment_of"]

Segment = int | str
# The hook points that have a copy of the stream per head.
HEAD_COPIES = ("hook_attn_in", "hook_q_input", "hook_k_input", "hook_v_input")
Fingerprint = tuple[object, ...]


class ForwardCall(TypedDict):
    """The arguments of a call of `HookedTransformer.forward`, by name."""

    input: Prompts
    return_type: str | None
    loss_per_token: bool
    prepend_bos: bool | None
    padding_side: PaddingSide | None
    start_at_layer: int | None
    tokens: Tensor | None
    attention_mask: Tensor | None
    stop_at_layer: int | None
    past_kv_cache: HookedTransformerKeyValueCache | None
    logits_to_keep: int | slice | Tensor | None


def segment_of(name: str) -> Segment:
    """Return the segment of the model that computes a hook point: a block's number, `"embed"` or `"final"`."""
    layer = layer_of(name)
    if layer is not None:
        return layer
    return "final" if name.startswith(("ln_final.", "unembed.")) else "embed"


def fingerprint(model: HookedModel, *kept: Mapping[int, Tensor] | Mapping[str, Tensor]) -> Fingerprint:
    """Return what differs once the model, or a kept tensor, has changed.

    That is the address and write count of each parameter and kept tensor, every number, name and function among the
    modules' attributes, the config's fields that may be assigned, and whether all components are stock. Writes that
    torch does not count, through `.data` or numpy, are seen by `ReplayableRun.checksums`.
    """
    tensors = [*model.parameters(), *(one for tensors in kept for one in tensors.values())]
    settings = [
        value
        for module in model.modules()
        for name, value in vars(module).items()
        if isinstance(value, (int, float, str, FunctionType)) and name != "training"
    ]
    cfg = model.cfg
    return (
        *((one.data_ptr(), times_written(one)) for one in tensors),
        *settings,
        (cfg.attn_scores_soft_cap, cfg.output_logits_soft_cap, cfg.attention_dir),
        not_stock(cast(nn.Module, model)),
    )


@dataclass(frozen=True, eq=False)
class ReplayableRun:
    """The tensors kept of a run, and the methods that run a segment of it again.

    Attributes:
        model: the model that ran.
        first, last: blocks `first` to `last - 1` ran.
        tokens, mask: the input, [batch pos]; no tokens for a run that began with a residual, no mask for a run without
            padding.
        residuals: block number -> the residual stream at its input; under `last`, the residual after the last block.
        edits: hook name -> the activation after its hooks.
        ends: whether final norm and unembedding belong to the run.
        logits_to_keep: the positions that were unembedded, as given to `forward`.
        autocast: whether it ran under autocast, and in which dtype.
        fingerprint: of the weights and kept tensors, right after the run.
        checksums: of the contents of the weights and kept tensors from which activations may be computed, by name.
    """

    model: HookedModel
    first: int
    last: int
    tokens: Tensor | None
    mask: Tensor | None
    residuals: dict[int, Tensor]
    edits: dict[str, Tensor]
    ends: bool
    logits_to_keep: int | slice | Tensor | None
    autocast: tuple[bool, torch.dtype | None]
    fingerprint: Fingerprint
    checksums: dict[str, int]

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
            return self._residual_after(place)
        return None

    def _residual_after(self, layer: int) -> Tensor | None:
        """Residual after block `layer` (-1: embeddings); None if a hook edited it at the next hook_resid_pre."""
        if f"blocks.{layer + 1}.hook_resid_pre" in self.edits:
            return None
        return self.residuals.get(layer + 1)

    def compute(self, place: Segment, names: Iterable[str]) -> dict[str, Tensor]:
        """Return the named activations of one segment, by running it once.

        Args:
            place: a block's number, `"embed"` or `"final"`.
            names: hook names of that segment.

        Raises:
            RuntimeError: the weights or the kept tensors have changed since the run.
        """
        names, found = set(names), {}
        self.check(self.read_by(place, names))

        def record(x: Tensor, hook: HookPoint) -> None:
            found[hook.name] = x

        points = self.model.hook_dict
        handles = [HookHandle(points[name], _Put(value), "fwd") for name, value in self.edits.items()]
        handles += [HookHandle(points[name], record, "fwd", reads_only=True) for name in names]
        enabled, dtype = self.autocast
        kind = self._device.type
        precision = torch.autocast(kind, dtype, enabled) if is_autocast_available(kind) else nullcontext()
        # Not under inference mode: tensors made there cannot be used with gradients later.
        with torch.inference_mode(False), torch.no_grad(), precision, self.model.only_hooks(handles):
            left = self._run(place, names)
        last = -1 if place == "embed" else self.model.cfg.pair_of(place)[-1] if isinstance(place, int) else None
        expected = None if last is None else self._residual_after(last)
        if left is not None and expected is not None and not _agree(left, expected, (enabled and dtype) or left.dtype):
            raise RuntimeError(_CHANGED)
        return found

    def read_by(self, place: Segment, names: Iterable[str]) -> dict[str, Tensor]:
        """Return the weights, buffers and kept tensors from which activations of one segment are computed, by name.

        Args:
            place: a block's number, `"embed"` or `"final"`.
            names: hook names of that segment.
        """
        # The unembedding is the largest matrix of many a model, and the final norm's activations are not made by it.
        unembeds = place != "final" or any(name.startswith("unembed.") for name in names)
        read = {
            **self._weights(place, unembeds),
            **{f"{name} as edited": self.edits[name] for name in self.edits if self._runs_with(name, place)},
        }
        if place == "embed" and self.tokens is not None:
            return read
        stream = self.last if place == "final" else self.first
        stream = self.model.cfg.pair_of(place)[0] if isinstance(place, int) else stream
        # The run of a model without blocks keeps no residual.
        kept = {f"residual {stream}": self.residuals[stream]} if stream in self.residuals else self.read_by("embed", ())
        return read | kept

    def _runs_with(self, name: str, place: Segment) -> bool:
        """Whether what has this name is in a segment, or in a layer that runs with it."""
        other = segment_of(name)
        if isinstance(place, int) and isinstance(other, int):
            return other in self.model.cfg.pair_of(place)
        return other == place

    def _weights(self, place: Segment, unembeds: bool) -> dict[str, Tensor]:
        model = cast(nn.Module, self.model)
        named = {**dict(model.named_parameters(remove_duplicate=False)), **dict(model.named_buffers())}
        if unembeds:
            named["unembed.W_U"] = self.model.W_U  # no parameter if the embeddings are tied
        found = {
            name: value
            for name, value in named.items()
            if self._runs_with(name, place) and (unembeds or not name.startswith("unembed."))
        }
        tokens = self.edits.get("hook_tokens", self.tokens)
        if "embed.W_E" in found and tokens is not None and tokens.numel() < len(found["embed.W_E"]):
            W_E = found.pop("embed.W_E").detach()
            found["embed.W_E of the prompt"] = W_E[tokens.to(W_E.device)]
        return found

    def check(self, read: Mapping[str, Tensor] | None = None) -> None:
        """Check that weights and kept tensors are where they were, and that the contents of some are unchanged.

        Args:
            read: name -> a weight or kept tensor whose contents are compared with those of the run; None for no such
                comparison.

        Raises:
            RuntimeError: one of them has been written to or moved since the run.
        """
        if fingerprint(self.model, self.residuals, self.edits) != self.fingerprint:
            raise RuntimeError(_CHANGED)
        found = contents(read or {})
        if found != {name: self.checksums[name] for name in found}:
            raise RuntimeError(_CHANGED)

    def _run(self, place: Segment, names: set[str]) -> Tensor | None:
        """Run a segment, and return the residual stream after it; None after `"final"`."""
        if isinstance(place, int):
            layers = self.model.cfg.pair_of(place)
            left: Tensor = self.model(
                self._stream(layers[0]),
                start_at_layer=layers[0],
                stop_at_layer=layers[-1] + 1,
                attention_mask=self.mask,
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
        # The run of a model without blocks keeps no residual.
        return self.residuals[layer].to(self._device) if layer in self.residuals else self._embedded()

    @property
    def _device(self) -> torch.device:
        return next(self.model.parameters()).device

    # The tensors of a copy have other addresses, so its fingerprint is taken anew.

    def __getstate__(self) -> dict[str, object]:
        self.check()
        return {name: value for name, value in self.__dict__.items() if name != "fingerprint"}

    def __setstate__(self, state: dict[str, object]) -> None:
        self.__dict__.update(state)
        self.__dict__["fingerprint"] = fingerprint(self.model, self.residuals, self.edits)


def contents(tensors: Mapping[str, Tensor]) -> dict[str, int]:
    """Return a checksum of each tensor that has contents, by name; one that is there under two names is read once."""
    there = {name: one for name, one in tensors.items() if not one.is_meta}
    places = {name: (one.data_ptr(), one.shape, one.stride(), one.dtype) for name, one in there.items()}
    distinct = {places[name]: one for name, one in there.items()}
    sums = dict(zip(distinct, checksums(list(distinct.values())), strict=True))
    return {name: sums[place] for name, place in places.items()}


_CHANGED = (
    "the model does not compute what it did in the run: its weights, or a residual that this cache returned, have "
    "been changed or moved since. A lazy cache computes activations from them: read or prefetch activations before "
    "such a change, clone a tensor before writing to it, or cache without lazy=True"
)


class _Put:
    """A hook that replaces the activation by the kept one."""

    edits_in_place = False

    def __init__(self, value: Tensor) -> None:
        self.value = value

    def __call__(self, x: Tensor, hook: HookPoint) -> Tensor:
        return self.value.to(x.device)


def _agree(left: Tensor, expected: Tensor, dtype: torch.dtype) -> bool:
    """Return whether two residuals agree, up to the order of sums in fused attention, in this precision."""
    if left.is_meta:
        return True
    expected = expected.to(left)
    largest = float(expected.nan_to_num(0.0, 0.0, 0.0).abs().max()) if expected.numel() else 0.0
    tolerance = min(2**10 * torch.finfo(dtype).eps, 0.1)
    return torch.allclose(left, expected, rtol=0.0, atol=tolerance * max(largest, 1e-30), equal_nan=True)


# Recording


def record_run(
    model: HookedModel,
    call: ForwardCall,
    device: torch.device | str | None,
    names: Sequence[str],
    clear_contexts: bool = False,
) -> tuple[ModelOutput, ReplayableRun]:
    """Run a model; return its output and the kept tensors from which its segments can be run again.

    Args:
        model: a `HookedTransformer`.
        call: the arguments of its `forward`, all of them by name.
        device: where to keep tensors; None for where they are.
        names: the activations that will be computed; what they are computed from is guarded by checksums.
        clear_contexts: empty the `ctx` of every hook point afterwards.

    Raises:
        ValueError: the run has a key-value cache, or edits both a norm and single heads' copies of what it reads.
        RuntimeError: hooks were added or removed during the run.
    """
    _check_keepable(model, call)
    call = call.copy()
    tokens, mask = _tokens_and_mask(model, call)
    first, last = model.layer_range(call["start_at_layer"], call["stop_at_layer"])
    streams = {layer: f"blocks.{layer}.hook_resid_pre" for layer in range(first, last)}
    residuals: dict[int, Tensor] = {}
    if first < last:
        streams[last] = f"blocks.{last - 1}.hook_resid_post"
    elif call["start_at_layer"] is not None:
        residuals[first] = cast(Tensor, call["input"]).detach().clone()
    keep = call["logits_to_keep"]
    edited = [name for name, point in model.hook_dict.items() if _may_change(point)]
    output, seen, edits = _recorded(model, call, list(streams.values()), edited, device, clear_contexts)
    residuals |= {layer: seen[name] for layer, name in streams.items()}
    kind = model.embed.W_E.device.type
    autocast = is_autocast_available(kind)
    run = ReplayableRun(
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
        checksums={},
    )
    wanted: dict[Segment, list[str]] = {}
    for name in filter(run.covers, names):
        wanted.setdefault(segment_of(name), []).append(name)
    read = [run.read_by(place, those) for place, those in wanted.items()]
    run.checksums.update(contents({name: one for those in read for name, one in those.items()}))
    return output, run


def _check_keepable(model: HookedModel, call: ForwardCall) -> None:
    if call["past_kv_cache"] is not None:
        raise ValueError("a key-value cache grows after the run, so a lazy cache cannot be computed from it")


def _check_edits(edited: Sequence[str]) -> None:
    """Refuse edits at a block's first norm together with edits at the copies that heads read through it.

    The norm's hooks then act on each copy, and only what they have made of the stream can be kept.
    """
    heads = {name.rpartition(".")[0] for name in edited if name.endswith(HEAD_COPIES)}
    norms = {name.partition(".ln1.")[0] for name in edited if ".ln1." in name}
    if heads & norms:
        raise ValueError(
            f"hooks edit the norm and single heads' inputs in {min(heads & norms)}, which a lazy cache cannot put "
            "back: cache without lazy=True"
        )


def _may_change(point: HookPoint) -> bool:
    """Return whether hooks may change an activation, or make the run compute it by another path."""
    return point.edited_forward or (point.on_demand and carries_run(point, torch.is_grad_enabled()))


def _recorded(
    model: HookedModel,
    call: ForwardCall,
    streams: Sequence[str],
    edited: Sequence[str],
    device: torch.device | str | None,
    clear_contexts: bool,
) -> tuple[ModelOutput, dict[str, Tensor], dict[str, Tensor]]:
    """Run, and return the output; the streams by name; and, by name, the activations that hooks have changed."""
    seen: dict[str, Tensor] = {}
    before: dict[str, Tensor] = {}
    edits: dict[str, Tensor] = {}
    changed: list[str] = []

    def look(x: Tensor, hook: HookPoint) -> None:
        before[hook.name] = x.detach().clone()

    def keep(x: Tensor, hook: HookPoint) -> None:
        x = x.detach()
        if hook.name in streams:
            seen[hook.name] = x.to(device=device)
        if hook.name not in edited:
            return
        same = hook.name in before and torch.equal(before.pop(hook.name), x)
        if not same:
            changed.append(hook.name)
        if hook.on_demand or not same:
            edits[hook.name] = x.to(device=device)

    handles = _acting(model)
    looking = [HookHandle(model.hook_dict[name], look, "fwd", reads_only=True, this_thread=True) for name in edited]
    for handle in looking:
        handle.attach(prepend=True)
    try:
        with model.attached(model.recording_handles([(n, keep) for n in {*streams, *edited}], (), this_thread=True)):
            output = model(**call)
    finally:
        for handle in looking:
            handle.remove()
        if clear_contexts:
            model.clear_contexts()
    if handles != _acting(model):
        raise RuntimeError(
            "hooks were added or removed while the model ran, so a lazy cache cannot compute the same activations again"
        )
    _check_edits(changed)
    return output, seen, edits


def _acting(model: HookedModel) -> list[HookHandle]:
    """Return the forward hooks that act in this thread, in the order of their hook points."""
    return [handle for point in model.hook_points() for handle in tuple(point.fwd_hooks) if handle.acts]


def _tokens_and_mask(model: HookedModel, call: ForwardCall) -> tuple[Tensor | None, Tensor | None]:
    """Return copies of a call's tokens and mask, and put them into the call; no tokens if it begins with a residual."""
    how = call["attention_mask"], call["prepend_bos"], call["padding_side"]
    if call["start_at_layer"] is None:
        tokens, mask = model.tokens_and_mask(call["input"], *how)
        call["input"] = tokens = tokens.clone()
        # An explicit mask, so that forward does not infer padding a second time.
        call["attention_mask"] = torch.ones_like(tokens) if mask is None else mask
        return tokens, _own(mask)
    if call["tokens"] is not None:
        call["attention_mask"] = model.tokens_and_mask(call["tokens"], *how)[1]
    return None, _own(call["attention_mask"])


def _own(mask: Tensor | None) -> Tensor | None:
    """Return a copy of a mask. Anything but a tensor is returned as it is, and `forward` raises on it."""
    return mask.clone() if isinstance(mask, Tensor) else mask
