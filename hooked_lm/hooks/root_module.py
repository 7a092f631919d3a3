"""HookRegistry: the hook points of any `nn.Module` by name, and the hooks that are attached to them."""

from __future__ import annotations

import threading
from collections.abc import Generator, Iterable, Sequence
from contextlib import contextmanager
from itertools import chain
from typing import Any, Self
from weakref import WeakKeyDictionary

from torch import nn

from hooked_lm.config.defaults import report_silent_hook
from hooked_lm.hooks.handle import Direction, HookFunction, HookHandle, check_selection
from hooked_lm.hooks.holder import HookHolder
from hooked_lm.hooks.listing import HookListing
from hooked_lm.hooks.point import HookPoint
from hooked_lm.hooks.thread import Token, only
from hooked_lm.names import NamesFilter, is_pattern, select_names

__all__ = ["HookRegistry", "HookSpec", "ModelOutput"]

HookSpec = tuple[NamesFilter, HookFunction]
# Any: a call of the model returns whatever its forward does, which may depend on arguments (`return_type`).
ModelOutput = Any


class _Levels(threading.local):
    """How many `hooks()` contexts of each model are open in a thread."""

    def __init__(self) -> None:
        self.of: WeakKeyDictionary[nn.Module, int] = WeakKeyDictionary()


_open_contexts = _Levels()


class HookRegistry(HookListing):
    """The part of `HookedRootModule` that finds hook points, adds and removes hooks, and runs the module under them."""

    mod_dict: dict[str, nn.Module]

    @property
    def context_level(self) -> int:
        """How many `hooks()` contexts are open in this thread."""
        return _open_contexts.of.get(self, 0)

    def setup(self) -> None:
        """Name every hook point by its path in the module tree, and index them by name."""
        # Plain dictionaries, so that torch does not register the modules a second time.
        self.mod_dict = {name: module for name, module in self.named_modules() if name}
        self.hook_dict = {name: module for name, module in self.mod_dict.items() if isinstance(module, HookPoint)}
        for name, point in self.hook_dict.items():
            point.name = name
            parent, _, attribute = name.rpartition(".")
            holder = self.get_submodule(parent)
            if isinstance(holder, HookHolder):
                holder.keep_at_hand(attribute, point)

    # Adding and removing

    def add_hook(
        self,
        name: NamesFilter,
        hook: HookFunction,
        dir: Direction = "fwd",
        is_permanent: bool = False,
        level: int | None = None,
        prepend: bool = False,
    ) -> list[HookHandle]:
        """Add a hook at every hook point that matches; return the handles.

        Args:
            name: a hook name, a glob, a list of either, or a predicate of names.
            hook, dir, is_permanent, level, prepend: as for `HookPoint.add_hook`.

        Raises:
            UnknownHookError: an entry of `name` matches no hook point. Nothing has been added then.
        """
        handles = self.plan_hooks([(name, hook)], dir, is_permanent=is_permanent, level=level)
        for handle in handles:
            handle.attach(prepend)
        return handles

    def add_perma_hook(self, name: NamesFilter, hook: HookFunction, dir: Direction = "fwd") -> list[HookHandle]:
        """Add a hook that `reset_hooks` leaves in place.

        Args:
            name, hook, dir: as for `add_hook`.

        Raises:
            UnknownHookError: as `add_hook`.
        """
        return self.add_hook(name, hook, dir, is_permanent=True)

    def reset_hooks(
        self,
        clear_contexts: bool = True,
        direction: Direction = "both",
        including_permanent: bool = False,
        level: int | None = None,
    ) -> None:
        """Remove hooks: all that are not permanent, or those of one direction or context level.

        Args:
            clear_contexts: also empty the `ctx` of every hook point.
            direction: `"fwd"`, `"bwd"` or `"both"`.
            including_permanent: remove permanent hooks too.
            level: only hooks added in `hooks` contexts of this depth; None for any.

        Raises:
            ValueError: another direction.
        """
        check_selection(direction, level)
        for point in self.hook_points():
            point.remove_hooks(direction, including_permanent, level)
        if clear_contexts:
            self.clear_contexts()

    def remove_all_hook_fns(
        self, direction: Direction = "both", including_permanent: bool = False, level: int | None = None
    ) -> None:
        """Remove hooks, but leave every `ctx` as it is.

        Args:
            direction, including_permanent, level: as for `reset_hooks`.
        """
        self.reset_hooks(False, direction, including_permanent, level)

    def clear_contexts(self) -> None:
        """Empty the `ctx` of every hook point."""
        for point in self.hook_points():
            point.clear_context()

    def plan_hooks(
        self,
        specs: Iterable[HookSpec],
        dir: Direction,
        is_permanent: bool = False,
        level: int | None = None,
        this_thread: bool = False,
    ) -> list[HookHandle]:
        """Return checked handles for (filter, function) pairs, without attaching them.

        Args:
            specs: the pairs.
            dir, is_permanent, level: as for `add_hook`.
            this_thread: the hooks act in this thread only.

        Raises:
            UnknownHookError: a filter matches nothing.
            TypeError: an entry is no such pair, or its function cannot be called as a hook.
        """
        handles = []
        for spec in specs:
            if not isinstance(spec, (tuple, list)) or len(spec) != 2:
                raise TypeError(f"a hook is given as (name, function), got {spec!r}")
            names_filter, function = spec
            points = [self.hook_dict[name] for name in self.hook_names(names_filter)]
            if dir == "bwd" and is_pattern(names_filter):
                points = [point for point in points if point.differentiable]
            by_keyword: bool | None = None
            for point in points:
                handle = HookHandle(
                    point, function, dir, is_permanent, level, by_keyword=by_keyword, this_thread=this_thread
                )
                handles.append(handle)
                by_keyword = handle.by_keyword
        return handles

    @contextmanager
    def hooks(
        self,
        fwd_hooks: Sequence[HookSpec] = (),
        bwd_hooks: Sequence[HookSpec] = (),
        reset_hooks_end: bool = True,
        clear_contexts: bool = False,
    ) -> Generator[Self, None, None]:
        """Add hooks for the length of a `with` block. They act in this thread.

        Args:
            fwd_hooks: (name, glob, list of names or predicate; function) pairs on activations.
            bwd_hooks: the same on gradients. They act in every backward pass through activations computed in the block.
            reset_hooks_end: False leaves the hooks in place afterwards.
            clear_contexts: also empty the `ctx` of every hook point afterwards.

        Raises:
            UnknownHookError: before anything is added, if any entry matches nothing.
        """
        level = self.context_level + 1
        handles = self.plan_hooks(fwd_hooks, "fwd", level=level, this_thread=reset_hooks_end)
        handles += self.plan_hooks(bwd_hooks, "bwd", level=level, this_thread=reset_hooks_end)
        with self.attached(handles, reset_hooks_end, clear_contexts):
            yield self

    @contextmanager
    def attached(
        self, handles: Sequence[HookHandle], reset_hooks_end: bool = True, clear_contexts: bool = False
    ) -> Generator[None, None, None]:
        """Attach handles for the length of a `with` block.

        Args:
            handles: as `plan_hooks` returns them.
            reset_hooks_end, clear_contexts: as for `hooks`.
        """
        levels = _open_contexts.of
        levels[self] = self.context_level + 1
        try:
            for handle in handles:
                handle.attach()
            yield
        finally:
            levels[self] -= 1
            if reset_hooks_end:
                for handle in handles:
                    handle.remove()
                if clear_contexts:
                    self.clear_contexts()

    @contextmanager
    def only_hooks(self, handles: Iterable[HookHandle]) -> Generator[None, None, None]:
        """Within a `with` block, only these hooks act in this thread; other threads are not affected.

        Args:
            handles: as `plan_hooks` returns them, not attached.
        """
        handles, scope = list(handles), Token()
        for handle in handles:
            handle.scope = scope
        try:
            for handle in handles:
                handle.attach()
            with only(scope):
                yield
        finally:
            for handle in handles:
                handle.remove()
                handle.scope = None

    # Running

    def run_with_hooks(
        self,
        *model_args: object,
        fwd_hooks: Sequence[HookSpec] = (),
        bwd_hooks: Sequence[HookSpec] = (),
        reset_hooks_end: bool = True,
        clear_contexts: bool = False,
        **model_kwargs: object,
    ) -> ModelOutput:
        """Run the model once under hooks and return its output.

        Args:
            *model_args, **model_kwargs: go to the model.
            fwd_hooks, bwd_hooks, reset_hooks_end, clear_contexts: as for `hooks`.

        Raises:
            UnknownHookError: before the run, if any entry matches nothing.
            RuntimeError: after the run, if a forward hook never ran, for example beyond `stop_at_layer`.
        """
        level, fwd_hooks = self.context_level + 1, list(fwd_hooks)
        planned = [self.plan_hooks([spec], "fwd", level=level, this_thread=reset_hooks_end) for spec in fwd_hooks]
        backward = self.plan_hooks(bwd_hooks, "bwd", level=level, this_thread=reset_hooks_end)
        handles = [*chain.from_iterable(planned), *backward]
        with self.attached(handles, reset_hooks_end, clear_contexts):
            output = self(*model_args, **model_kwargs)
        for spec, group in zip(fwd_hooks, planned, strict=True):
            self.check_fired(spec[0], group)
        return output

    @staticmethod
    def check_fired(names_filter: NamesFilter, handles: Sequence[HookHandle]) -> None:
        """Check that every hook given by its plain name has run, and at least one hook of each pattern.

        Args:
            names_filter: the filter that the hooks were given by.
            handles: the hooks.

        Raises:
            RuntimeError: a hook did not run; only a warning with the classic library's defaults.
        """
        entries = [names_filter] if names_filter is None or callable(names_filter) else names_filter
        for entry in [entries] if isinstance(entries, str) else entries:
            if entry is None or callable(entry):
                matched = list(handles)
            else:
                names = set(select_names(entry, [handle.point.name for handle in handles]))
                matched = [handle for handle in handles if handle.point.name in names]
            silent = [handle for handle in matched if not handle.fired]
            if silent and (not is_pattern(entry) or len(silent) == len(matched)):
                report_silent_hook(
                    f"the hook at {silent[0].point.name!r} never ran: the model did not compute that activation in "
                    "this run (start_at_layer and stop_at_layer leave layers out)"
                )
