"""HookPoint: an identity that costs one call until something listens.

Whatever listens sees tensors under one contract:

* the first hook to see a tensor may write to it in place; once any hook has seen it, later hooks are handed a copy.
  So a cache never changes, and a copy is made only when a second listener could write;
* a returned tensor replaces the activation and must have its shape, dtype and device.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import reduce
from typing import Any, Literal, NoReturn

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef

from hooked_lm.names import layer_of

HookFunction = Callable[..., Any]
Direction = Literal["fwd", "bwd", "both"]


class _SeenStorages:
    """The memory that hooks have been shown. Weak: it keeps no data alive, and an address is not reused under it.

    A compiled graph knows nothing of memory: there, all of it counts as shown.
    """

    def __init__(self) -> None:
        self._refs: set[StorageWeakRef] = set()
        self._limit = 256

    def add(self, tensor: Tensor) -> None:
        if torch.compiler.is_compiling():
            return
        self._refs.add(StorageWeakRef(tensor.untyped_storage()))
        if len(self._refs) > self._limit:
            self._refs = {ref for ref in self._refs if not ref.expired()}
            self._limit = max(256, 2 * len(self._refs))

    def __contains__(self, tensor: Tensor) -> bool:
        return torch.compiler.is_compiling() or StorageWeakRef(tensor.untyped_storage()) in self._refs


_seen = _SeenStorages()


def protect(tensor: Tensor) -> Tensor:
    """Mark memory that a hook must not write to (a parameter, a caller's tensor): hooks are handed a copy of it."""
    _seen.add(tensor)
    return tensor


class HookHandle:
    """One hook on one hook point.

    Attributes:
        hook: the function, called as `hook(activation, hook_point)`.
        is_permanent: survives `reset_hooks` unless that is told otherwise.
        context_level: how many `hooks()` contexts were open when it was added; None if added at no level.
        reads_only: promises not to write; it is then shown the tensor itself, never a copy.
        fired: whether it has run since it was attached.
        by_keyword: whether it is called with `hook=`; found out from its signature, if that is not said.
    """

    def __init__(
        self,
        point: HookPoint,
        hook: HookFunction,
        dir: Direction = "fwd",
        is_permanent: bool = False,
        level: int | None = None,
        reads_only: bool = False,
        by_keyword: bool | None = None,
    ) -> None:
        if not callable(hook):
            raise TypeError(f"the hook for {point.name!r} is not callable: {hook!r}")
        if dir not in ("fwd", "bwd"):
            raise ValueError(f"a hook runs in direction 'fwd' or 'bwd', not {dir!r}")
        if dir == "bwd" and not point.differentiable:
            raise ValueError(f"no backward hook can run at {point.name!r}: its activation holds integers")
        self.point, self.hook, self.dir = point, hook, dir
        self.is_permanent, self.context_level, self.reads_only = is_permanent, level, reads_only
        self.fired = False
        # To look at a signature takes longer than most hooks do, so who knows it says it.
        self.by_keyword = _takes_hook_keyword(hook, point.name) if by_keyword is None else by_keyword

    def __call__(self, x: Tensor) -> Tensor:
        """Show `x` to the hook; return what the model goes on with."""
        # A graph may have saved x for the backward pass, so a hook that may write gets a copy there too.
        if not self.reads_only and (x in _seen or (x.requires_grad and torch.is_grad_enabled()) or self.dir == "bwd"):
            x = x.clone()
        self.fired = True
        returned = self.hook(x, hook=self.point) if self.by_keyword else self.hook(x, self.point)
        _seen.add(x)
        if returned is None or returned is x:
            return x
        if self.dir == "bwd" and isinstance(returned, tuple) and len(returned) == 1:
            returned = returned[0]
        self._check(returned, x)
        _seen.add(returned)
        return returned

    def _check(self, returned: object, x: Tensor) -> None:
        where = f"the {'backward ' if self.dir == 'bwd' else ''}hook at {self.point.name!r}"
        if not isinstance(returned, Tensor):
            raise TypeError(f"{where} returned {type(returned).__name__}: return a tensor, or None to change nothing")
        for what in ("shape", "dtype", "device"):
            came, expected = getattr(returned, what), getattr(x, what)
            if came != expected:
                if what == "shape":
                    came, expected = tuple(came), tuple(expected)
                raise ValueError(f"{where} returned {what} {came}, but the activation has {what} {expected}")

    def attach(self, prepend: bool = False) -> None:
        """Put this handle on its hook point, first in line if `prepend`."""
        handles = self._line()
        handles.insert(0 if prepend else len(handles), self)

    def remove(self) -> None:
        """Take this handle off its hook point; harmless when it is gone already."""
        handles = self._line()
        if self in handles:
            handles.remove(self)

    def _line(self) -> list[HookHandle]:
        return self.point.fwd_hooks if self.dir == "fwd" else self.point.bwd_hooks


def _takes_hook_keyword(function: HookFunction, name: str) -> bool:
    """Whether to pass the hook point as `hook=`: then partials that fill other arguments work in any order.

    Raises:
        TypeError: the function can be called neither so nor with two positional arguments.
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


class HookPoint(nn.Module):
    """An identity that hands its input to whatever listens, and passes on what comes back.

    Args:
        axes: the names of the activation's axes, from `names.AXES` (`"batch pos head d_head"`), for position slices.
        on_demand: computed only when asked for by name, so left out when everything is cached.
        differentiable: False for integer activations, which have no gradient.

    Attributes:
        name: the full hook name, given by `HookedRootModule.setup`.
        ctx: a dictionary for hooks to keep things in between calls.
        fwd_hooks, bwd_hooks: the `HookHandle`s in the order they run.
    """

    def __init__(self, axes: str | None = None, on_demand: bool = False, differentiable: bool = True) -> None:
        super().__init__()
        self.axes = axes
        self.on_demand = on_demand
        self.differentiable = differentiable
        self.name: str = ""
        self.ctx: dict[Any, Any] = {}
        self.fwd_hooks: list[HookHandle] = []
        self.bwd_hooks: list[HookHandle] = []

    def __call__(self, x: Tensor) -> Tensor:
        # Past torch's own call, which looks for hooks of its own and costs ten times this.
        return self.forward(x) if self.fwd_hooks or self.bwd_hooks else x

    def forward(self, x: Tensor) -> Tensor:
        """Return the activation as the hooks leave it."""
        for handle in tuple(self.fwd_hooks):
            x = handle(x)
        if self.bwd_hooks:
            self._watch_gradient(x)
        return x

    def _watch_gradient(self, x: Tensor) -> None:
        # The handles of now: a graph built under a hook runs it, also when the context has closed by then.
        handles = tuple(self.bwd_hooks)
        if x.requires_grad:
            x.register_hook(lambda grad: reduce(lambda g, handle: handle(g), handles, grad))
        elif any(not handle.reads_only for handle in handles):
            raise RuntimeError(
                f"the backward hook at {self.name!r} can never run: the activation does not require a gradient "
                "(is this under torch.no_grad(), or are the parameters frozen?)"
            )

    @property
    def live(self) -> bool:
        """Whether anything listens here."""
        return bool(self.fwd_hooks or self.bwd_hooks)

    @property
    def edits(self) -> bool:
        """Whether a listener may change the activation or its gradient."""
        return bool(self.bwd_hooks) or any(not handle.reads_only for handle in self.fwd_hooks)

    @property
    def on_path(self) -> bool:
        """Whether the activation itself must carry the computation: someone may edit it, or differentiate by it."""
        return self.live and (torch.is_grad_enabled() or self.edits)

    def add_hook(
        self,
        hook: HookFunction,
        dir: Direction = "fwd",
        is_permanent: bool = False,
        level: int | None = None,
        prepend: bool = False,
        reads_only: bool = False,
    ) -> HookHandle:
        """Add a hook here and return its handle.

        Args:
            hook: `hook(activation, hook_point) -> tensor | None`; None keeps the activation, in-place edits included.
            dir: `"fwd"` for the activation, `"bwd"` for its gradient.
            is_permanent: keep it through `reset_hooks`.
            level: the depth of `hooks()` contexts it belongs to.
            prepend: run it before the hooks that are here already.
            reads_only: the hook promises not to write, and is never handed a copy.
        """
        handle = HookHandle(self, hook, dir, is_permanent, level, reads_only)
        handle.attach(prepend)
        return handle

    def add_perma_hook(self, hook: HookFunction, dir: Direction = "fwd") -> HookHandle:
        """Add a hook that `reset_hooks` leaves in place.

        Args:
            hook, dir: as for `add_hook`.
        """
        return self.add_hook(hook, dir, is_permanent=True)

    def register_forward_hook(self, *args: Any, **kwargs: Any) -> NoReturn:
        """Refuse: a hook point has hooks of its own, and torch's would never run.

        Raises:
            TypeError: always.
        """
        raise TypeError(f"torch's hooks do not run at {self.name!r}: use add_hook")

    register_forward_pre_hook = register_full_backward_hook = register_full_backward_pre_hook = register_forward_hook
    register_backward_hook = register_forward_hook

    def remove_hooks(self, dir: Direction = "fwd", including_permanent: bool = False, level: int | None = None) -> None:
        """Remove the hooks of a direction; permanent ones only if asked, and of one context level only if given.

        Args:
            dir: `"fwd"`, `"bwd"` or `"both"`.
            including_permanent: permanent ones too.
            level: only hooks added in `hooks` contexts of this depth; None for any.

        Raises:
            ValueError: another direction.
        """
        if dir not in ("fwd", "bwd", "both"):
            raise ValueError(f"direction {dir!r} is none of 'fwd', 'bwd', 'both'")

        def stays(handle: HookHandle) -> bool:
            kept = handle.is_permanent and not including_permanent
            return kept or (level is not None and handle.context_level != level)

        if dir in ("fwd", "both"):
            self.fwd_hooks[:] = filter(stays, self.fwd_hooks)
        if dir in ("bwd", "both"):
            self.bwd_hooks[:] = filter(stays, self.bwd_hooks)

    def has_hooks(self, dir: Direction = "both", including_permanent: bool = True, level: int | None = None) -> bool:
        """Whether hooks of this direction (and level) are here.

        Args:
            dir: `"fwd"`, `"bwd"`, or `"both"` for either.
            including_permanent: whether permanent ones count.
            level: only hooks added in `hooks` contexts of this depth; None for any.
        """
        handles = [handle for handle in (*self.fwd_hooks, *self.bwd_hooks) if dir in ("both", handle.dir)]
        return any(
            (including_permanent or not handle.is_permanent) and (level is None or handle.context_level == level)
            for handle in handles
        )

    def clear_context(self) -> None:
        """Forget what hooks have kept in `ctx`."""
        self.ctx.clear()

    def layer(self) -> int:
        """Return the block this hook point is in.

        Raises:
            ValueError: it is in none, like `hook_embed`.
        """
        layer = layer_of(self.name)
        if layer is None:
            raise ValueError(f"{self.name!r} is in no block, so it has no layer")
        return layer

    def axis(self, name: str) -> int:
        """Return where an axis of the activation is, counted from the end, so that a missing batch is harmless.

        Raises:
            ValueError: the activation has no such axis.
        """
        axes = (self.axes or "").split()
        if name not in axes:
            raise ValueError(f"{self.name!r} has no axis {name!r}; its axes are {self.axes!r}")
        return axes.index(name) - len(axes)

    def extra_repr(self) -> str:
        """Return the axes, for the printed model."""
        return repr(self.axes) if self.axes else ""
