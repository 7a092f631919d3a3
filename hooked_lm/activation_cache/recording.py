"""`run_with_cache` of the model: everything in memory, one residual per layer, or on disk."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Literal, cast, overload

import torch
from torch import Tensor

from hooked_lm._support.torch_internals import transforms_active
from hooked_lm.activation_cache.decomposition import ActivationCache
from hooked_lm.activation_cache.file import Offloading
from hooked_lm.activation_cache.lazy import LazyActivations, Part
from hooked_lm.activation_cache.mapping import CacheModel
from hooked_lm.activation_cache.of_model import sizes_of
from hooked_lm.activation_cache.replay import ForwardCall, record_run
from hooked_lm.components.sequence import kept_positions
from hooked_lm.components.spread import Spread
from hooked_lm.components.stock import not_stock
from hooked_lm.hooked_model import HookedModel
from hooked_lm.hooks import HookHandle, HookPoint, ModelOutput, passes_begun
from hooked_lm.interventions.running import Intervening
from hooked_lm.names import NamesFilter
from hooked_lm.slicing import Slice
from hooked_lm.tokenization.methods import TextInterface

__all__ = ["Caching"]


class Caching(TextInterface, Intervening):
    """`run_with_cache` of `HookedTransformer`."""

    spread_over: Spread | None

    @overload  # type: ignore[override]  # unlike the base, it returns an ActivationCache by default
    def run_with_cache(
        self,
        *model_args: object,
        return_cache_object: Literal[True] = True,
        names_filter: NamesFilter = None,
        device: torch.device | str | None = None,
        remove_batch_dim: bool = False,
        incl_bwd: bool = False,
        reset_hooks_end: bool = True,
        clear_contexts: bool = False,
        pos_slice: object = None,
        store: dict[str, Tensor] | None = None,
        lazy: bool = False,
        offload: str | Path | None = None,
        keep_graph: bool = False,
        **model_kwargs: object,
    ) -> tuple[ModelOutput, ActivationCache]: ...

    @overload
    def run_with_cache(
        self,
        *model_args: object,
        return_cache_object: Literal[False],
        names_filter: NamesFilter = None,
        device: torch.device | str | None = None,
        remove_batch_dim: bool = False,
        incl_bwd: bool = False,
        reset_hooks_end: bool = True,
        clear_contexts: bool = False,
        pos_slice: object = None,
        store: dict[str, Tensor] | None = None,
        lazy: bool = False,
        offload: str | Path | None = None,
        keep_graph: bool = False,
        **model_kwargs: object,
    ) -> tuple[ModelOutput, dict[str, Tensor]]: ...

    def run_with_cache(
        self,
        *model_args: object,
        return_cache_object: bool = True,
        names_filter: NamesFilter = None,
        device: torch.device | str | None = None,
        remove_batch_dim: bool = False,
        incl_bwd: bool = False,
        reset_hooks_end: bool = True,
        clear_contexts: bool = False,
        pos_slice: object = None,
        store: dict[str, Tensor] | None = None,
        lazy: bool = False,
        offload: str | Path | None = None,
        keep_graph: bool = False,
        **model_kwargs: object,
    ) -> tuple[ModelOutput, ActivationCache | dict[str, Tensor]]:
        """Run the model and return its output with an `ActivationCache` of the activations it computed.

        Args:
            *model_args, **model_kwargs: go to the model.
            return_cache_object: False returns a plain dictionary of tensors.
            names_filter, device, incl_bwd, reset_hooks_end, clear_contexts, pos_slice, store, keep_graph: as for
                `HookedRootModule.run_with_cache`: the tensors are detached unless `keep_graph`. Without
                `names_filter` the cache has every activation but integers (`hook_tokens`, `hook_expert_indices`) and
                what a flag of the config asks for: `use_attn_result`, `use_split_qkv_input`, `use_attn_in`,
                `use_hook_mlp_in`, `use_hook_tokens`.
            remove_batch_dim: drop the batch axis of the cached tensors; the batch must be 1.
            lazy: keep the residual stream at the input of each block, and every activation that hooks or interventions
                have changed. Every other activation is computed when it is read, at the cost of running its block once.
                Names, values and methods are those of a full cache. An activation that was read is not held, unless
                `cache.prefetch(names)` asked for it. Activations of a lazy cache carry no graph, and cannot be read
                once the weights have changed.
            offload: a file to write the activations to as they are computed, in safetensors format. The cache then
                holds no memory of its own: its tensors are maps of that file, without a graph.
                `ActivationCache.load` opens it again.

        Raises:
            ValueError: options that exclude each other, or `lazy` or `offload` under `torch.func`.
        """
        if device is None and self.spread_over is not None:
            device = self.spread_over.home
        if lazy or offload is not None:
            _check_values_suffice(lazy, keep_graph)
        if names_filter is not None and not isinstance(names_filter, str) and not callable(names_filter):
            names_filter = list(names_filter)  # an iterator can be read only once, and the filter is read twice
        if lazy:
            excluded = {"offload": offload is not None, "store": store is not None}
            _check_lazy({**excluded, "return_cache_object=False": not return_cache_object}, incl_bwd, reset_hooks_end)
            part = Part(self.hook_dict, Slice.unwrap(pos_slice), remove_batch_dim, device)
            return self._run_with_lazy_cache(model_args, model_kwargs, names_filter, part, clear_contexts)
        file: Offloading | None = None
        if offload is not None:
            if store is not None:
                raise ValueError("the activations go to one place: give offload or store, not both")
            if not reset_hooks_end:
                raise ValueError("an offloaded cache is complete when the run ends: no reset_hooks_end=False")
            store = file = self._offloading(Path(offload), names_filter, incl_bwd, remove_batch_dim)
        with nullcontext() if file is None else file, passes_begun() as passes:
            output, recorded = super().run_with_cache(
                *model_args,
                names_filter=names_filter,
                device=device,
                remove_batch_dim=remove_batch_dim,
                incl_bwd=incl_bwd,
                reset_hooks_end=reset_hooks_end,
                clear_contexts=clear_contexts,
                pos_slice=pos_slice,
                store=store,
                keep_graph=keep_graph,
                **model_kwargs,
            )
            mask = _mask_of(passes[0].mask if passes else None, Slice.unwrap(pos_slice), device)
            if file is not None:
                file.attention_mask = mask
        if file is not None:
            cache = cast(ActivationCache, file.read)
            return output, cache if return_cache_object else dict(cache)
        if not return_cache_object:
            return output, recorded
        return output, ActivationCache(recorded, cast(CacheModel, self), not remove_batch_dim, mask)

    def is_recorded_by_default(self, point: HookPoint) -> bool:
        """Return whether a cache without `names_filter` records a hook point's activation; see `run_with_cache`.

        Args:
            point: the hook point.
        """
        asked = point.flag is not None and bool(getattr(self.cfg, point.flag))
        return asked or super().is_recorded_by_default(point)

    def _offloading(self, path: Path, names_filter: NamesFilter, incl_bwd: bool, remove_batch_dim: bool) -> Offloading:
        """Return the file for the activations of one run, which opens it as a cache before it gets its name."""
        names = self.names_to_cache(names_filter)
        names += [f"{name}_grad" for name in names] if incl_bwd else []
        return Offloading(
            path,
            names,
            has_batch_dim=not remove_batch_dim,
            sizes=sizes_of(self.cfg),
            reader=lambda written: ActivationCache.load(written, cast(CacheModel, self)),
        )

    def _run_with_lazy_cache(
        self,
        model_args: tuple[object, ...],
        model_kwargs: dict[str, object],
        names_filter: NamesFilter,
        part: Part,
        clear_contexts: bool,
    ) -> tuple[ModelOutput, ActivationCache]:
        names = self.names_to_cache(names_filter)
        changed = not_stock(self)
        if changed is not None:
            raise ValueError(
                "a lazy cache runs blocks again from the residual stream at their inputs, as the components of "
                f"hooked_lm do, and {changed}: cache without lazy=True"
            )
        call = inspect.signature(self.forward).bind(*model_args, **model_kwargs)
        call.apply_defaults()
        arguments = cast(ForwardCall, call.arguments)
        output, run = record_run(cast(HookedModel, self), arguments, part.device, names, clear_contexts)
        handles = [HookHandle(self.hook_dict[name], _no_op, "fwd") for name in names]
        for handle in handles:
            handle.fired = run.covers(handle.point.name)
        self.check_fired(names_filter, handles)
        for stream in list(run.residuals.values())[:1]:
            part = replace(part, kept=kept_positions(run.logits_to_keep, stream.shape[1]))
        # A position or batch that does not fit raises now, and not when an activation is read.
        for layer, stream in list(run.residuals.items())[:1]:
            part(f"blocks.{min(layer, run.last - 1)}.hook_resid_pre" if run.first < run.last else "hook_embed", stream)
        activations = LazyActivations(run, [one.point.name for one in handles if one.fired], (part,))
        mask = _mask_of(run.mask, part.positions, part.device)
        return output, ActivationCache(activations, cast(CacheModel, self), not part.remove_batch_dim, mask)


def _check_lazy(excluded: Mapping[str, bool], incl_bwd: bool, reset_hooks_end: bool) -> None:
    """Raise ValueError if options do not go with a lazy cache; `excluded` has those that never do."""
    given = [name for name, there in excluded.items() if there]
    if given:
        raise ValueError(f"a lazy cache computes an activation when it is read, which does not go with {given[0]}")
    if incl_bwd or not reset_hooks_end:
        raise ValueError("a lazy cache has no gradients and leaves no hooks: no incl_bwd, no reset_hooks_end=False")


def _mask_of(mask: Tensor | None, positions: Slice, device: torch.device | str | None) -> Tensor | None:
    """Return the mask of the positions that a cache keeps, [batch pos]; None if none of them is padding."""
    if mask is None:
        return None
    kept = (positions if positions.mode != "int" else Slice([positions.slice])).apply(mask, dim=1).long()
    return None if bool(kept.all()) else kept.to(device)


def _no_op(x: Tensor, hook: HookPoint) -> None:
    """No-op hook: attached to no run, only so that the never-ran check counts this site."""


def _check_values_suffice(lazy: bool, keep_graph: bool) -> None:
    """Raise ValueError where a lazy or offloaded cache, which keeps values alone, is asked for more."""
    if not (keep_graph or transforms_active()):
        return
    wanted = "with keep_graph=True" if keep_graph else "under torch.func or forward-mode differentiation"
    raise ValueError(
        f"{wanted} an activation has more than its values, and "
        f"{'a lazy cache computes it from them' if lazy else 'a file holds only them'}: cache without "
        f"{'lazy=True' if lazy else 'offload='}"
    )
