"""`run_with_cache` of the model: everything in memory, one residual per layer, or on disk."""

from __future__ import annotations

import inspect
from collections.abc import MutableMapping
from pathlib import Path
from typing import Any, ClassVar, cast

from torch import Tensor

from hooked_lm.activation_cache.decomposition import ActivationCache
from hooked_lm.activation_cache.file import Offloading
from hooked_lm.activation_cache.lazy import LazyActivations, Part
from hooked_lm.activation_cache.mapping import CacheModel
from hooked_lm.activation_cache.replay import record_run
from hooked_lm.components.stock import not_stock
from hooked_lm.hooked_model import HookedModel
from hooked_lm.hooks import HookHandle, HookPoint
from hooked_lm.interventions.running import Intervening
from hooked_lm.names import NamesFilter
from hooked_lm.slicing import Slice
from hooked_lm.tokenization.methods import TextInterface


class Caching(TextInterface, Intervening):
    """The caching method of `HookedTransformer`."""

    # The class whose forward pass the caches know: `HookedTransformer`, in subclasses of it too.
    stock_class: ClassVar[type]

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
        names_filter = kwargs.get("names_filter")
        if names_filter is not None and not isinstance(names_filter, str) and not callable(names_filter):
            kwargs["names_filter"] = list(names_filter)  # what can be read only once is read more often
        if lazy:
            if offload is not None or not return_cache_object:
                other = "offload" if offload is not None else "return_cache_object=False"
                raise ValueError(f"a lazy cache computes what is read from it, which does not go with {other}")
            return self._run_with_lazy_cache(model_args, kwargs, remove_batch_dim)
        if offload is not None:
            output, cache = self._run_with_offloaded_cache(Path(offload), model_args, kwargs, remove_batch_dim)
            return output, cache if return_cache_object else cache.cache_dict
        output, cache = super().run_with_cache(*model_args, remove_batch_dim=remove_batch_dim, **kwargs)
        if return_cache_object:
            cache = self._cache(cache, remove_batch_dim)
        return output, cache

    def _run_with_offloaded_cache(
        self, path: Path, model_args: tuple[Any, ...], kwargs: dict[str, Any], remove_batch_dim: bool
    ) -> tuple[Any, ActivationCache]:
        if not kwargs.get("reset_hooks_end", True):
            raise ValueError("an offloaded cache is complete when the run ends: no reset_hooks_end=False")
        names = self.names_to_cache(kwargs.get("names_filter"))
        if kwargs.get("incl_bwd", False):
            names += [f"{name}_grad" for name in names]
        with Offloading(path, names, has_batch_dim=not remove_batch_dim) as store:
            output, _ = super().run_with_cache(*model_args, remove_batch_dim=remove_batch_dim, store=store, **kwargs)
        return output, ActivationCache.load(store.path, cast(CacheModel, self))

    def _run_with_lazy_cache(
        self, model_args: tuple[Any, ...], kwargs: dict[str, Any], remove_batch_dim: bool
    ) -> tuple[Any, ActivationCache]:
        names_filter: NamesFilter = kwargs.pop("names_filter", None)
        names = self.names_to_cache(names_filter)
        device, positions = kwargs.pop("device", None), Slice.unwrap(kwargs.pop("pos_slice", None))
        clear_contexts = kwargs.pop("clear_contexts", False)
        if kwargs.pop("incl_bwd", False) or not kwargs.pop("reset_hooks_end", True):
            raise ValueError("a lazy cache has no gradients and leaves no hooks: no incl_bwd, no reset_hooks_end=False")
        changed = not_stock(self, self.stock_class)
        if changed is not None:
            raise ValueError(
                "a lazy cache computes blocks again from the streams that entered them, as the components of hooked_lm "
                f"do, and {changed}: cache without lazy=True"
            )
        call = inspect.signature(self.forward).bind(*model_args, **kwargs)
        call.apply_defaults()
        output, run = record_run(cast(HookedModel, self), call.arguments, device, clear_contexts)
        handles = [HookHandle(self.hook_dict[name], _read, "fwd") for name in names]
        for handle in handles:
            handle.fired = run.covers(handle.point.name)
        self.check_fired(names_filter, handles)
        part = Part(self.hook_dict, positions, remove_batch_dim, device)
        # What does not fit is said now and not when it is read.
        for layer, stream in list(run.residuals.items())[:1]:
            part(f"blocks.{min(layer, run.last - 1)}.hook_resid_pre" if run.first < run.last else "hook_embed", stream)
        activations = LazyActivations(run, [one.point.name for one in handles if one.fired], (part,))
        return output, self._cache(activations, remove_batch_dim)


def _read(x: Tensor, hook: HookPoint) -> None:
    """What listens without doing anything."""
