"""`run_with_cache` of the model: everything in memory, one residual per layer, or on disk."""

from __future__ import annotations

import inspect
from collections.abc import MutableMapping
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from hooked_lm.activation_cache import ActivationCache
from hooked_lm.cached_activations import CacheModel
from hooked_lm.hooks import HookHandle, HookPoint, recorded_part
from hooked_lm.intervening import Intervening
from hooked_lm.lazy_cache import KeptRun, LazyActivations, fingerprint
from hooked_lm.names import NamesFilter
from hooked_lm.offloaded_cache import Offloading
from hooked_lm.slicing import Slice
from hooked_lm.text_interface import TextInterface


class Caching(TextInterface, Intervening):
    """The caching method of `HookedTransformer`."""

    def _cache(self, activations: MutableMapping[str, Tensor], remove_batch_dim: bool) -> ActivationCache:
        return ActivationCache(activations, cast(CacheModel, self), has_batch_dim=not remove_batch_dim)

    def run_with_cache(
        self,
        *model_args: Any,
        return_cache_object: bool = True,
        remove_batch_dim: bool = False,
        lazy: bool = False,
        offload: str | Path | None = None,
        **kwargs: Any,
    ) -> tuple[Any, Any]:
        """Run the model and return its output with an `ActivationCache` of what was computed on the way.

        Args:
            return_cache_object: False returns a plain dictionary of tensors.
            remove_batch_dim: drop the batch axis of the cached tensors; the batch must be 1.
            lazy: keep the stream that enters each block (and what hooks and interventions have changed), and compute
                any other activation when it is read, for the work of its block. Names, values and methods are those of
                a full cache. What is read is not held, unless `cache.prefetch(names)` is asked to. Activations of a
                lazy cache carry no graph, and cannot be read once the weights have changed.
            offload: a file to write the activations to as they are computed, in safetensors format. The cache then
                holds no memory of its own: its tensors are maps of that file, without a graph.
                `ActivationCache.load` opens it again.
            model_args, kwargs: those of `HookedRootModule.run_with_cache` (`names_filter`, `device`, `incl_bwd`,
                `pos_slice`, ...) and of the model.

        Raises:
            ValueError: options that exclude each other.
        """
        if lazy:
            if offload is not None or not return_cache_object:
                other = "offload" if offload is not None else "return_cache_object=False"
                raise ValueError(f"a lazy cache computes what is read from it, which does not go with {other}")
            return self._run_with_lazy_cache(model_args, kwargs, remove_batch_dim)
        if offload is not None:
            names = self.names_to_cache(kwargs.get("names_filter"))
            with Offloading(offload, names, has_batch_dim=not remove_batch_dim) as store:
                output, _ = super().run_with_cache(
                    *model_args, remove_batch_dim=remove_batch_dim, store=store, **kwargs
                )
            cache: Any = ActivationCache.load(offload, cast(CacheModel, self))
            return output, cache if return_cache_object else cache.cache_dict
        output, cache = super().run_with_cache(*model_args, remove_batch_dim=remove_batch_dim, **kwargs)
        if return_cache_object:
            cache = self._cache(cache, remove_batch_dim)
        return output, cache

    def _run_with_lazy_cache(
        self, model_args: tuple[Any, ...], kwargs: dict[str, Any], remove_batch_dim: bool
    ) -> tuple[Any, ActivationCache]:
        names_filter: NamesFilter = kwargs.pop("names_filter", None)
        names = self.names_to_cache(names_filter)
        device, positions = kwargs.pop("device", None), Slice.unwrap(kwargs.pop("pos_slice", None))
        clear_contexts = kwargs.pop("clear_contexts", False)
        if kwargs.pop("incl_bwd", False) or not kwargs.pop("reset_hooks_end", True):
            raise ValueError("a lazy cache has no gradients and leaves no hooks: no incl_bwd, no reset_hooks_end=False")
        call = inspect.signature(self.forward).bind(*model_args, **kwargs)
        call.apply_defaults()
        output, run = _kept_run(self, call.arguments, device, clear_contexts)
        handles = [HookHandle(self.hook_dict[name], _read, "fwd") for name in names]
        for handle in handles:
            handle.fired = run.covers(handle.point.name)
        self._check_fired(names_filter if names_filter is not None else "*", handles)

        def kept_part(name: str, x: Tensor) -> Tensor:
            return recorded_part(x, self.hook_dict[name], positions, remove_batch_dim).to(device=device)

        activations = LazyActivations(run, [one.point.name for one in handles if one.fired], (kept_part,))
        return output, self._cache(activations, remove_batch_dim)


def _kept_run(model: Any, call: dict[str, Any], device: Any, clear_contexts: bool) -> tuple[Any, KeptRun]:
    """Run the model as `forward` was called, and keep what its parts can be run again from."""
    if call["past_kv_cache"] is not None:
        raise ValueError("a key-value cache moves on after the run, so a lazy cache cannot be computed from it")
    tokens, mask = _what_is_read(model, call)
    first, last = model._layer_range(call["start_at_layer"], call["stop_at_layer"])
    streams = {layer: f"blocks.{layer}.hook_resid_pre" for layer in range(first, last)}
    residuals: dict[int, Tensor] = {}
    if first < last:
        streams[last] = f"blocks.{last - 1}.hook_resid_post"
    elif call["start_at_layer"] is not None:
        residuals[first] = call["input"].detach().clone()
    edited = [name for name, point in model.hook_dict.items() if any(not one.reads_only for one in point.fwd_hooks)]
    seen: dict[str, Tensor] = {}

    def keep(x: Tensor, hook: HookPoint) -> None:
        seen[hook.name] = x.detach().to(device=device)

    recorders = model._recording_handles([(name, keep) for name in {*streams.values(), *edited}], ())
    with model._attached(recorders, clear_contexts=clear_contexts):
        output = model(**call)
    residuals |= {layer: seen[name] for layer, name in streams.items()}
    edits = {name: seen[name] for name in edited if name in seen}
    return output, KeptRun(
        model=model,
        first=first,
        last=last,
        tokens=tokens,
        mask=mask,
        residuals=residuals,
        edits=edits,
        ends=call["stop_at_layer"] is None,
        logits_to_keep=call["logits_to_keep"],
        fingerprint=fingerprint(model, residuals, edits),
    )


def _what_is_read(model: Any, call: dict[str, Any]) -> tuple[Tensor | None, Tensor | None]:
    """Tokens and mask of a call, as copies; no tokens if it begins with a residual. The call then has them."""
    options = call["prepend_bos"], call["padding_side"], call["attention_mask"], None
    if call["start_at_layer"] is None:
        tokens, mask = model._read(call["input"], *options)
        call["input"] = tokens = tokens.clone()
        # Said outright, so that padding is not looked for again.
        call["attention_mask"] = torch.ones_like(tokens) if mask is None else mask.clone()
        return tokens, None if mask is None else call["attention_mask"]
    if call["tokens"] is not None:
        prepend_bos, padding_side, mask, past = options
        tokens = model._check_tokens(call["tokens"])
        call["attention_mask"] = model._infer_mask(tokens, mask, prepend_bos, padding_side, past)
    mask = call["attention_mask"]
    return None, None if mask is None else mask.clone()


def _read(x: Tensor, hook: HookPoint) -> None:
    """What listens without doing anything."""
