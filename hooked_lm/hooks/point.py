"""HookPoint: an identity module that calls the hooks attached to it.

Hooks get tensors under one contract:

* a hook that only reads gets the activation itself, and a tensor that it keeps never changes afterwards;
* hooks that may edit share one tensor, a copy that is private to this point and this run, and the run continues with
  it. So the gradient of the next hook flows through the tensor that an earlier hook kept;
* a returned tensor replaces the activation. It must have its shape (the batch axis apart), dtype and device; under
  autocast a float of another dtype is cast to the activation's.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, Protocol

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from hooked_lm._support.precision import autocasts
from hooked_lm._support.torch_internals import has_any_module_hooks, in_backward
from hooked_lm.hooks.handle import Direction, HookFunction, HookHandle, changing_hooks, check_selection
from hooked_lm.hooks.thread import here
from hooked_lm.names import layer_of

__all__ = ["HookPoint", "TorchHook", "any_live", "carries_run", "is_live", "may_edit_forward"]

# Any: torch gives its hooks the arguments and outputs of the module, of whatever types.
TorchHook = Callable[..., Any]


class Shares(Protocol):
    """How an activation of which this process has a part is made whole, and the part taken again."""

    def whole(self, x: Tensor) -> Tensor: ...

    def part(self, x: Tensor) -> Tensor: ...


class HookPoint(nn.Module):
    """An identity module that passes its input through its hooks.

    Args:
        axes: the names of the activation's axes, from `names.AXES` or others: `"batch pos head d_head"`, or a
            sequence of names. Position slices and interventions select along them.
        on_demand: computed only when a hook is attached.
        differentiable: False for integer activations, which have no gradient.
        flag: the field of the config with which a cache without `names_filter` records the activation. Without a flag
            such a cache records it unless it is on demand or holds integers.

    Attributes:
        axes: the names as a tuple; empty if none were given.
        name: the full hook name, given by `HookedRootModule.setup`.
        ctx: a dictionary in which hooks may keep values between calls.
        fwd_hooks, bwd_hooks: the `HookHandle`s, in the order in which they run.
    """

    # Whether calls go through torch's module call: torch's own hooks were registered, or a subclass overrides forward.
    _always_runs = False
    # Where processes share out an axis of the activation: how hooks get the whole of it.
    shares: Shares | None = None

    def __init__(
        self,
        axes: str | Sequence[str] | None = None,
        on_demand: bool = False,
        differentiable: bool = True,
        flag: str | None = None,
    ) -> None:
        super().__init__()
        self.axes = tuple(axes.split()) if isinstance(axes, str) else tuple(axes or ())
        self.on_demand = on_demand
        self.differentiable = differentiable
        self.flag = flag
        self.name: str = ""
        self.ctx: dict[object, Any] = {}  # Any: hooks store values of any type
        self.fwd_hooks: list[HookHandle] = []
        self.bwd_hooks: list[HookHandle] = []

    def __init_subclass__(cls, **kwargs: object) -> None:
        super().__init_subclass__(**kwargs)
        cls._always_runs = cls.forward is not HookPoint.forward

    def __call__(self, x: Tensor) -> Tensor:
        # Skip torch's module call, which looks for torch's own hooks and takes ten times as long.
        if self._always_runs:
            return super().__call__(x)  # type: ignore[no-any-return]
        return self.forward(x) if self.fwd_hooks or self.bwd_hooks else x

    def forward(self, x: Tensor) -> Tensor:
        """Return the activation after its hooks."""
        if self.shares is None:
            return self._hooked(x)
        # Every process has the same hooks, so all of them gather here or none does.
        return self.shares.part(self._hooked(self.shares.whole(x))) if self.live else x

    def _hooked(self, x: Tensor) -> Tensor:
        x = _through(self.fwd_hooks, x)
        handles = [handle for handle in tuple(self.bwd_hooks) if handle.acts]
        return self._watched(x, handles) if handles else x

    def _watched(self, x: Tensor, handles: list[HookHandle]) -> Tensor:
        """The activation, with backward hooks on its gradient."""
        if x.requires_grad:
            # A view of its own: two points may be shown one tensor, and the gradient passes the later point first.
            x = x.view_as(x)
            # The present handles: backward runs them even if their `with` block has ended by then.
            switch = here.gradient_switch
            mixed = autocasts(x)  # of this run: backward itself is not under autocast
            x.register_hook(
                lambda grad: (
                    grad if switch and not switch.on else _through(handles, grad, check_acts=False, mixed=mixed)
                )
            )
        elif any(not handle.reads_only for handle in handles):
            raise RuntimeError(
                f"the backward hook at {self.name!r} can never run: the activation does not require a gradient "
                "(is this under torch.no_grad() or checkpoint(..., use_reentrant=True), or are the parameters frozen?)"
            )
        return x

    @property
    def live(self) -> bool:
        """Whether a hook here acts in this thread."""
        if not (self.fwd_hooks or self.bwd_hooks or self._always_runs):
            return False
        if self._runs_anyway():
            return True
        for handle in (*self.fwd_hooks, *self.bwd_hooks):
            if handle.acts:
                return True
            _refuse_recomputation(handle)
        return False

    def _runs_anyway(self) -> bool:
        """Whether something besides hooks of ours runs here: hooks of torch's, or another forward."""
        if not self._always_runs:
            return False
        return type(self)._always_runs or "forward" in vars(self) or has_any_module_hooks(self)

    @property
    def edited_forward(self) -> bool:
        """Whether a hook may change the activation."""
        return self._runs_anyway() or any(handle.acts and not handle.reads_only for handle in tuple(self.fwd_hooks))

    @property
    def edits(self) -> bool:
        """Whether a hook may change the activation or its gradient."""
        return self.edited_forward or any(handle.acts for handle in tuple(self.bwd_hooks))

    @property
    def keeps_graph(self) -> bool:
        """Whether gradients may have to flow through a tensor that a hook keeps."""
        return any(handle.acts and handle.keep_graph for handle in tuple(self.fwd_hooks))

    def add_hook(
        self,
        hook: HookFunction,
        dir: Direction = "fwd",
        is_permanent: bool = False,
        level: int | None = None,
        prepend: bool = False,
        reads_only: bool | None = None,
    ) -> HookHandle:
        """Add a hook here, for every thread, and return its handle.

        Args:
            hook: `hook(activation, hook_point) -> tensor | None`; None keeps the activation, with in-place edits.
            dir: `"fwd"` for the activation, `"bwd"` for its gradient.
            is_permanent: keep it through `reset_hooks`.
            level: the depth of the `hooks()` context it belongs to.
            prepend: run it before the hooks attached earlier.
            reads_only: the hook does not write to the activation, and gets it without a copy; by default the hook's own
                `reads_only` attribute.
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

    def remove_hooks(self, dir: Direction = "fwd", including_permanent: bool = False, level: int | None = None) -> None:
        """Remove the hooks of a direction; permanent ones only with `including_permanent`.

        Hooks of another thread's `with` blocks stay.

        Args:
            dir: `"fwd"`, `"bwd"` or `"both"`.
            including_permanent: remove permanent hooks too.
            level: only hooks added in `hooks` contexts of this depth; None for any.

        Raises:
            ValueError: another direction.
            TypeError: a level that is no integer.
        """
        check_selection(dir, level)

        def stays(handle: HookHandle) -> bool:
            kept = handle.is_permanent and not including_permanent
            return kept or not handle.acts or (level is not None and handle.context_level != level)

        with changing_hooks:
            if dir in ("fwd", "both"):
                self.fwd_hooks[:] = [handle for handle in self.fwd_hooks if stays(handle)]
            if dir in ("bwd", "both"):
                self.bwd_hooks[:] = [handle for handle in self.bwd_hooks if stays(handle)]

    def has_hooks(self, dir: Direction = "both", including_permanent: bool = True, level: int | None = None) -> bool:
        """Return whether hooks of this direction (and level) are attached.

        Args:
            dir: `"fwd"`, `"bwd"`, or `"both"` for either.
            including_permanent: count permanent hooks too.
            level: only hooks added in `hooks` contexts of this depth; None for any.

        Raises:
            ValueError: another direction.
            TypeError: a level that is no integer.
        """
        return bool(self.attached_hooks(dir, including_permanent, level))

    def attached_hooks(
        self, dir: Direction = "both", including_permanent: bool = True, level: int | None = None
    ) -> list[HookHandle]:
        """Return the hooks that act in this thread, forward hooks first.

        Args:
            dir, including_permanent, level: as for `has_hooks`.

        Raises:
            ValueError: another direction.
            TypeError: a level that is no integer.
        """
        check_selection(dir, level)
        return [
            handle
            for handle in (*self.fwd_hooks, *self.bwd_hooks)
            if handle.acts
            and dir in ("both", handle.dir)
            and (including_permanent or not handle.is_permanent)
            and (level is None or handle.context_level == level)
        ]

    def clear_context(self) -> None:
        """Empty `ctx`."""
        self.ctx.clear()

    def layer(self) -> int:
        """Return the number of the block of this hook point.

        Raises:
            ValueError: it is in no block, like `hook_embed`.
        """
        layer = layer_of(self.name)
        if layer is None:
            raise ValueError(f"{self.name!r} is in no block, so it has no layer")
        return layer

    def axis(self, name: str) -> int:
        """Return the index of an axis of the activation, counted from the end: the same with or without a batch axis.

        Args:
            name: of the axis.

        Raises:
            ValueError: the activation has no such axis.
        """
        if name not in self.axes:
            raise ValueError(f"{self.name!r} has no axis {name!r}; its axes are {' '.join(self.axes)!r}")
        return self.axes.index(name) - len(self.axes)

    def extra_repr(self) -> str:
        """Return the axes, for the printed model."""
        return repr(" ".join(self.axes)) if self.axes else ""

    # Torch's own hooks run as at any module: once one is registered, calls go through torch's module call.

    def register_forward_hook(
        self, hook: TorchHook, *, prepend: bool = False, with_kwargs: bool = False, always_call: bool = False
    ) -> RemovableHandle:
        """Register a hook of torch's, called as `hook(module, args, output)`.

        Args:
            hook, prepend, with_kwargs, always_call: as for `torch.nn.Module.register_forward_hook`.
        """
        self._always_runs = True
        return super().register_forward_hook(hook, prepend=prepend, with_kwargs=with_kwargs, always_call=always_call)

    def register_forward_pre_hook(
        self, hook: TorchHook, *, prepend: bool = False, with_kwargs: bool = False
    ) -> RemovableHandle:
        """Register a hook of torch's, called as `hook(module, args)`.

        Args:
            hook, prepend, with_kwargs: as for `torch.nn.Module.register_forward_pre_hook`.
        """
        self._always_runs = True
        return super().register_forward_pre_hook(hook, prepend=prepend, with_kwargs=with_kwargs)

    def register_full_backward_hook(self, hook: TorchHook, prepend: bool = False) -> RemovableHandle:
        """Register a hook of torch's, called as `hook(module, grad_input, grad_output)`.

        Args:
            hook, prepend: as for `torch.nn.Module.register_full_backward_hook`.
        """
        self._always_runs = True
        return super().register_full_backward_hook(hook, prepend)

    register_backward_hook = register_full_backward_hook

    def register_full_backward_pre_hook(self, hook: TorchHook, prepend: bool = False) -> RemovableHandle:
        """Register a hook of torch's, called as `hook(module, grad_output)`.

        Args:
            hook, prepend: as for `torch.nn.Module.register_full_backward_pre_hook`.
        """
        self._always_runs = True
        return super().register_full_backward_pre_hook(hook, prepend)


def _through(handles: Sequence[HookHandle], x: Tensor, check_acts: bool = True, mixed: bool = False) -> Tensor:
    """Return an activation, or a gradient, after hooks."""
    private = False  # whether x is the copy that editing hooks share
    shared = False  # whether an editing hook may hold x, and write to it later
    for handle in tuple(handles):
        if check_acts and not handle.acts:
            _refuse_recomputation(handle)
            continue
        if handle.edits_in_place and not private:
            x, private = x.clone(), True
        if handle.reads_only:
            # A gradient may have to flow through what is kept; then it is the tensor itself, also if it is shared.
            if shared and not (handle.keep_graph and x.requires_grad):
                handle(x.clone(), mixed)
            else:
                handle(x, mixed)
                private = False
            continue
        returned = handle(x, mixed)
        # A returned tensor may be referenced elsewhere.
        private, shared = private and returned is x, True
        x = returned
    return x


def _refuse_recomputation(handle: HookHandle) -> None:
    """Raise where autograd recomputes a run in a thread in which the run's hooks do not act.

    Raises:
        RuntimeError: this is one of autograd's own threads, or a thread that has only called `backward`.
    """
    if handle.thread is None or here.runs_models or not in_backward():
        return
    if handle.thread is not here.identity:
        raise RuntimeError(
            f"the hook at {handle.point.name!r} belongs to a `with` block of another thread, and checkpointing "
            "recomputes the run in this one, without it: add hooks with add_hook, which act in every thread"
        )


# A hook point may be replaced by a module of another class, which always runs and may do anything.


def is_live(point: nn.Module) -> bool:
    """Return whether a hook acts at a hook point in this thread, or a module of another class replaces it.

    Args:
        point: a hook point, or a module in its place.
    """
    if isinstance(point, HookPoint):
        return point.live if point.fwd_hooks or point.bwd_hooks or point._always_runs else False
    return True


def any_live(points: Iterable[nn.Module]) -> bool:
    """Return whether `is_live` is true of any of the hook points.

    Args:
        points: hook points, or modules in their places.
    """
    for point in points:
        if not isinstance(point, HookPoint) or (
            (point.fwd_hooks or point.bwd_hooks or point._always_runs) and point.live
        ):
            return True
    return False


def may_edit_forward(point: nn.Module) -> bool:
    """Return whether a hook, or a module in the hook point's place, may change the activation.

    Args:
        point: a hook point, or a module in its place.
    """
    return point.edited_forward if isinstance(point, HookPoint) else True


def carries_run(point: nn.Module, gradients: bool) -> bool:
    """Return whether the run must use a hook point's output: it may be edited, or kept with its graph.

    Args:
        point: a hook point, or a module in its place.
        gradients: whether gradients are recorded.
    """
    if isinstance(point, HookPoint):
        return point.live and (point.edits or (gradients and point.keeps_graph))
    return True
