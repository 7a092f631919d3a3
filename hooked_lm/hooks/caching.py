"""HookedRootModule: any `nn.Module` with hook points, whose activations can be recorded."""

from __future__ import annotations

from collections.abc import MutableMapping, Sequence

import torch
from torch import Tensor

from hooked_lm.hooks.handle import Direction, HookFunction, HookHandle
from hooked_lm.hooks.point import HookPoint
from hooked_lm.hooks.recorder import Recorder
from hooked_lm.hooks.root_module import HookRegistry, ModelOutput
from hooked_lm.names import NamesFilter
from hooked_lm.slicing import Slice

__all__ = ["HookedRootModule"]


class HookedRootModule(HookRegistry):
    """An `nn.Module` that finds its hook points by name. Call `setup()` at the end of `__init__`.

    Hooks that are added by `add_hook` act in every thread; those of a `with` block (`hooks`), or of one run
    (`run_with_hooks`, `run_with_cache`), act in the thread that added them.
    """

    def get_caching_hooks(
        self,
        names_filter: NamesFilter = None,
        incl_bwd: bool = False,
        device: torch.device | str | None = None,
        remove_batch_dim: bool = False,
        cache: MutableMapping[str, Tensor] | None = None,
        pos_slice: object = None,
        keep_graph: bool = False,
    ) -> tuple[MutableMapping[str, Tensor], list[tuple[str, HookFunction]], list[tuple[str, HookFunction]]]:
        """Return an empty cache and the (name, function) pairs that fill it, as (cache, fwd_hooks, bwd_hooks).

        Args:
            names_filter: which activations; None for those of `names_to_cache`.
            incl_bwd: also record gradients, under the name with `_grad` appended.
            device: where to keep the tensors; None leaves them where they are.
            remove_batch_dim: drop the batch axis, which must have length 1.
            cache: an existing dictionary to fill.
            pos_slice: the positions to keep (anything `Slice` takes); query positions for attention patterns.
            keep_graph: record tensors through which gradients flow to the activations before them. Otherwise the
                recorded tensors are detached.
        """
        store: MutableMapping[str, Tensor] = {} if cache is None else cache
        how = (Slice.unwrap(pos_slice), remove_batch_dim, device, keep_graph)
        names = self.names_to_cache(names_filter)
        fwd: list[tuple[str, HookFunction]] = [(name, Recorder(store, "", *how)) for name in names]
        bwd: list[tuple[str, HookFunction]] = [
            (name, Recorder(store, "_grad", *how)) for name in names if self.hook_dict[name].differentiable
        ]
        return store, fwd, bwd if incl_bwd else []

    def names_to_cache(self, names_filter: NamesFilter = None) -> list[str]:
        """Return the names of the activations to cache.

        Args:
            names_filter: as for `hook_names`; None for all that are recorded by default. Activations that hold integers
                or are computed on demand are not.

        Raises:
            UnknownHookError: a name or pattern matches nothing.
        """
        names = self.hook_names(names_filter)
        if names_filter is not None:
            return names
        return [name for name in names if self.is_recorded_by_default(self.hook_dict[name])]

    def is_recorded_by_default(self, point: HookPoint) -> bool:
        """Return whether a cache without `names_filter` records the activation of a hook point.

        Args:
            point: the hook point.
        """
        return point.flag is None and point.differentiable and not point.on_demand

    def add_caching_hooks(
        self,
        names_filter: NamesFilter = None,
        incl_bwd: bool = False,
        device: torch.device | str | None = None,
        remove_batch_dim: bool = False,
        cache: MutableMapping[str, Tensor] | None = None,
        keep_graph: bool = False,
    ) -> MutableMapping[str, Tensor]:
        """Add hooks that fill a dictionary on every run until they are reset, and return that dictionary.

        Args:
            names_filter, incl_bwd, device, remove_batch_dim, keep_graph: as for `get_caching_hooks`.
            cache: an existing dictionary to fill.

        Raises:
            UnknownHookError: a name or pattern matches nothing.
        """
        store, fwd, bwd = self.get_caching_hooks(
            names_filter, incl_bwd, device, remove_batch_dim, cache, keep_graph=keep_graph
        )
        for handle in self.recording_handles(fwd, bwd):
            handle.attach()
        return store

    def cache_all(
        self,
        cache: MutableMapping[str, Tensor] | None,
        incl_bwd: bool = False,
        device: torch.device | str | None = None,
        remove_batch_dim: bool = False,
        keep_graph: bool = False,
    ) -> MutableMapping[str, Tensor]:
        """Record every activation into `cache` on every run until the hooks are reset.

        Args:
            cache: the dictionary to fill; None for a new one, which is returned.
            incl_bwd, device, remove_batch_dim, keep_graph: as for `get_caching_hooks`.
        """
        return self.add_caching_hooks(None, incl_bwd, device, remove_batch_dim, cache, keep_graph)

    def cache_some(
        self,
        cache: MutableMapping[str, Tensor] | None,
        names: NamesFilter,
        incl_bwd: bool = False,
        device: torch.device | str | None = None,
        remove_batch_dim: bool = False,
        keep_graph: bool = False,
    ) -> MutableMapping[str, Tensor]:
        """Record the named activations into `cache` on every run until the hooks are reset.

        Args:
            cache: the dictionary to fill; None for a new one, which is returned.
            names: which activations, as `names_filter` of `get_caching_hooks`.
            incl_bwd, device, remove_batch_dim, keep_graph: as for `get_caching_hooks`.

        Raises:
            UnknownHookError: a name or pattern matches nothing.
        """
        return self.add_caching_hooks(names, incl_bwd, device, remove_batch_dim, cache, keep_graph)

    def recording_handles(
        self,
        fwd: Sequence[tuple[str, HookFunction]],
        bwd: Sequence[tuple[str, HookFunction]],
        level: int | None = None,
        this_thread: bool = False,
    ) -> list[HookHandle]:
        """Return handles for (name, function) pairs that only read, without attaching them.

        Args:
            fwd, bwd: as `get_caching_hooks` returns them.
            level, this_thread: as for `plan_hooks`.
        """
        directions: tuple[tuple[Direction, Sequence[tuple[str, HookFunction]]], ...] = (("fwd", fwd), ("bwd", bwd))
        return [
            HookHandle(
                self.hook_dict[name], function, dir, False, level, True, by_keyword=False, this_thread=this_thread
            )
            for dir, pairs in directions
            for name, function in pairs
        ]

    def run_with_cache(
        self,
        *model_args: object,
        names_filter: NamesFilter = None,
        device: torch.device | str | None = None,
        remove_batch_dim: bool = False,
        incl_bwd: bool = False,
        reset_hooks_end: bool = True,
        clear_contexts: bool = False,
        pos_slice: object = None,
        store: dict[str, Tensor] | None = None,
        keep_graph: bool = False,
        **model_kwargs: object,
    ) -> tuple[ModelOutput, dict[str, Tensor]]:
        """Run the model once; return its output and a dictionary of its activations.

        A cached tensor is never changed by a later hook or run. Entries with the same tensor share its memory.

        Args:
            *model_args, **model_kwargs: go to the model.
            names_filter, incl_bwd, device, remove_batch_dim, pos_slice, keep_graph: as for `get_caching_hooks`. With
                `incl_bwd` the output must be a scalar (`return_type="loss"`), and its backward pass is run too.
            reset_hooks_end: False leaves the hooks that record in place afterwards.
            clear_contexts: also empty the `ctx` of every hook point afterwards.
            store: an existing dictionary to fill.

        Raises:
            UnknownHookError: before the run, if a name or pattern matches nothing.
            RuntimeError: after the run, if a named activation was not computed in it.
        """
        recorded: dict[str, Tensor] = {} if store is None else store
        _, fwd, bwd = self.get_caching_hooks(
            names_filter, incl_bwd, device, remove_batch_dim, recorded, pos_slice, keep_graph
        )
        handles = self.recording_handles(fwd, bwd, self.context_level + 1, this_thread=reset_hooks_end)
        with self.attached(handles, reset_hooks_end, clear_contexts):
            output = self(*model_args, **model_kwargs)
            if incl_bwd:
                _check_scalar(output)
                output.backward()
        self.check_fired(names_filter, [handle for handle in handles if handle.dir == "fwd"])
        if store is not None:
            return output, store
        result = dict(recorded)
        if reset_hooks_end:
            # The graph refers to its backward hooks and these to `recorded`, a reference cycle: empty it.
            recorded.clear()
        return output, result


def _check_scalar(output: object) -> None:
    if not isinstance(output, Tensor) or output.numel() != 1 or not output.requires_grad:
        came = f"shape {tuple(output.shape)}" if isinstance(output, Tensor) else type(output).__name__
        raise ValueError(
            f"incl_bwd runs the backward pass, so the model must return a scalar with a gradient "
            f"(return_type='loss'); it returned {came}"
        )
