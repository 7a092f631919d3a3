"""HookHandle: one hook on one hook point, and where it acts."""

from __future__ import annotations

import inspect
import threading
from collections.abc import Callable
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

from hooked_lm._support.inference import as_differentiable
from hooked_lm._support.integers import integer
from hooked_lm._support.precision import autocasts
from hooked_lm.hooks.thread import Token, here

if TYPE_CHECKING:
    from hooked_lm.hooks.point import HookPoint

__all__ = ["Direction", "HookFunction", "HookHandle", "changing_hooks", "check_selection"]

HookFunction = Callable[..., object]
Direction = Literal["fwd", "bwd", "both"]


def check_selection(direction: object, level: object = None) -> None:
    """Check the options that select hooks.

    Args:
        direction: `"fwd"`, `"bwd"` or `"both"`.
        level: a context's depth; None for any.

    Raises:
        ValueError: another direction.
        TypeError: a level that is no integer.
    """
    if direction not in ("fwd", "bwd", "both"):
        raise ValueError(f"direction {direction!r} is none of 'fwd', 'bwd', 'both'")
    if level is not None:
        integer(level, "level")


# Held while a list of hooks changes. One for all models: a lock cannot be copied with a model.
changing_hooks = threading.RLock()


class HookHandle:
    """One hook on one hook point.

    Two attributes of the function save a copy of the activation: `reads_only = True`, it never changes its argument;
    `edits_in_place = False`, it returns a new tensor rather than write to its argument. With `keep_graph = False` a
    function that only reads keeps no graph, and may be given a copy of what an earlier hook can still write to.

    Attributes:
        hook: the function, called as `hook(activation, hook_point)`.
        is_permanent: kept by `reset_hooks`, unless with `including_permanent`.
        context_level: how many `hooks()` contexts were open when it was added; None if added at no level.
        reads_only: it never changes the activation, and gets the tensor itself, never a copy.
        edits_in_place: it may write to its argument.
        keep_graph: gradients have to flow through a tensor that it keeps.
        thread: the thread in which it acts; None for all threads.
        scope: acts only in `only` blocks of this scope; None for outside of them.
        fired: whether it has run since it was attached.
        by_keyword: whether it is called with `hook=`; found from its signature if not given.
    """

    def __init__(
        self,
        point: HookPoint,
        hook: HookFunction,
        dir: Direction = "fwd",
        is_permanent: bool = False,
        level: int | None = None,
        reads_only: bool | None = None,
        by_keyword: bool | None = None,
        this_thread: bool = False,
        scope: Token | None = None,
    ) -> None:
        if not callable(hook):
            raise TypeError(f"the hook for {point.name!r} is not callable: {hook!r}")
        if dir not in ("fwd", "bwd"):
            raise ValueError(f"a hook runs in direction 'fwd' or 'bwd', not {dir!r}")
        if level is not None:
            integer(level, "level")
        if dir == "bwd" and not point.differentiable:
            raise ValueError(f"no backward hook can run at {point.name!r}: its activation holds integers")
        self.point, self.hook, self.dir = point, hook, dir
        self.is_permanent, self.context_level = is_permanent, level
        self.reads_only = bool(getattr(hook, "reads_only", False)) if reads_only is None else reads_only
        self.edits_in_place = not self.reads_only and bool(getattr(hook, "edits_in_place", True))
        self.keep_graph = bool(getattr(hook, "keep_graph", True))
        self.thread = here.identity if this_thread else None
        self.scope = scope
        self.fired = False
        # Inspecting a signature takes longer than most hooks, so `plan_hooks` passes the result of the first.
        self.by_keyword = _takes_hook_keyword(hook, point.name) if by_keyword is None else by_keyword

    @property
    def user_hook(self) -> HookFunction:
        """The function, under the name that it has in the classic library."""
        return self.hook

    @property
    def acts(self) -> bool:
        """Whether it acts in the current thread and `with` block."""
        if self.reads_only and self.point in here.edits_only:
            return False
        return (self.thread is None or self.thread is here.identity) and self.scope is here.scope

    def __call__(self, x: Tensor, mixed: bool = False) -> Tensor:
        """Call the hook with `x`; return the tensor with which the run continues.

        Args:
            x: the activation, or its gradient.
            mixed: the run is in mixed precision, besides one under autocast now: a float of another dtype is cast.
        """
        self.fired = True
        returned = self.hook(x, hook=self.point) if self.by_keyword else self.hook(x, self.point)
        if returned is None or returned is x or self.reads_only:
            return x
        if self.dir == "bwd" and isinstance(returned, tuple) and len(returned) == 1:
            returned = returned[0]
        return as_differentiable(self._checked(returned, x, mixed))

    def _checked(self, returned: object, x: Tensor, mixed: bool) -> Tensor:
        where = f"the {'backward ' if self.dir == 'bwd' else ''}hook at {self.point.name!r}"
        if not isinstance(returned, Tensor):
            raise TypeError(f"{where} returned {type(returned).__name__}: return a tensor, or None to change nothing")
        came, expected = tuple(returned.shape), tuple(x.shape)
        # A forward hook may change the number of prompts.
        if self.dir == "fwd" and self.point.axes[:1] == ("batch",) and came and expected:
            came, expected = came[1:], expected[1:]
        if came != expected:
            raise ValueError(
                f"{where} returned shape {tuple(returned.shape)}, but the activation has shape {tuple(x.shape)}"
            )
        if returned.dtype != x.dtype and (mixed or autocasts(x)):
            # A product before the hook is in low precision, and what the hook adds to it in float32.
            returned = _cast(returned, x.dtype)
        for what in ("dtype", "device"):
            if getattr(returned, what) != getattr(x, what):
                raise ValueError(
                    f"{where} returned {what} {getattr(returned, what)}, but the activation has {what} "
                    f"{getattr(x, what)}"
                )
        return returned

    def attach(self, prepend: bool = False) -> None:
        """Attach this handle to its hook point, in front of the others if `prepend`."""
        with changing_hooks:
            handles = self._line()
            handles.insert(0 if prepend else len(handles), self)

    def remove(self) -> None:
        """Remove this handle from its hook point; nothing happens if it is not attached."""
        with changing_hooks:
            handles = self._line()
            if self in handles:
                handles.remove(self)

    def _line(self) -> list[HookHandle]:
        return self.point.fwd_hooks if self.dir == "fwd" else self.point.bwd_hooks


def _cast(returned: Tensor, dtype: torch.dtype) -> Tensor:
    return returned.to(dtype) if returned.is_floating_point() and dtype.is_floating_point else returned


def _takes_hook_keyword(function: HookFunction, name: str) -> bool:
    """Return whether to pass the hook point as `hook=`, which lets partials fill other arguments in any order.

    Raises:
        TypeError: the function can be called neither with `hook=` nor with two positional arguments.
    """
    try:
        signature = inspect.signature(function)
    except (TypeError, ValueError):  # builtins without a signature
        return False
    for by_keyword in (True, False):
        try:
            signature.bind(None, hook=None) if by_keyword else signature.bind(None, None)
        except TypeError:
            continue
        return by_keyword
    raise TypeError(f"the hook for {name!r} takes {signature}; it is called with (activation, hook)")
