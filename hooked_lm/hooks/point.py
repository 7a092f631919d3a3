"""HookPoint: an identity that costs one call until something observes or edits it.

Hooks see tensors under one contract:

* a hook that only reads is shown the activation itself, and what it keeps never changes afterwards;
* hooks that may edit share one tensor, a copy that is private to this point and this run, and the run goes on with it.
  So a tensor that one hook keeps is the one through which the next hook's gradient flows;
* a returned tensor replaces the activation. It must have its shape (the batch axis apart), dtype and device.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from hooked_lm.hooks.handle import Direction, HookFunction, HookHandle, changing_hooks
from hooked_lm.names import layer_of


class HookPoint(nn.Module):
    """An identity that hands its input to its hooks, and passes on what they return.

    Args:
        axes: the names of the activation's axes, from `names.AXES` or of one's own: `"batch pos head d_head"`, or a
            sequence of names. Position slices and interventions select along them.
        on_demand: computed only when asked for by name, so left out when everything is cached.
        differentiable: False for integer activations, which have no gradient.

    Attributes:
        axes: the names as a tuple; empty if none were given.
        name: the full hook name, given by `HookedRootModule.setup`.
        ctx: a dictionary for hooks to keep things in between calls.
        fwd_hooks, bwd_hooks: the `HookHandle`s in the order they run.
    """

    # Whether calls go through torch: its own hooks were registered, or a subclass has a forward of its own.
    _always_runs = False

    def __init__(
        self, axes: str | Sequence[str] | None = None, on_demand: bool = False, differentiable: bool = True
    ) -> None:
        super().__init__()
        self.axes = tuple(axes.split()) if isinstance(axes, str) else tuple(axes or ())
        self.on_demand = on_demand
        self.differentiable = differentiable
        self.name: str = ""
        self.ctx: dict[Any, Any] = {}
        self.fwd_hooks: list[HookHandle] = []
        self.bwd_hooks: list[HookHandle] = []

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        cls._always_runs = cls.forward is not HookPoint.forward

    def __call__(self, x: Tensor) -> Tensor:
        # Past torch's own call, which looks for hooks of its own and costs ten times this.
        if self._always_runs:
            return super().__call__(x)  # type: ignore[no-any-return]
        return self.forward(x) if self.fwd_hooks or self.bwd_hooks else x

    def forward(self, x: Tensor) -> Tensor:
        """Return the activation as the hooks leave it."""
        x = _through(self.fwd_hooks, x)
        handles = [handle for handle in tuple(self.bwd_hooks) if handle.acts]
        return self._watched(x, handles) if handles else x

    def _watched(self, x: Tensor, handles: list[HookHandle]) -> Tensor:
        """The activation, with backward hooks on its gradient."""
        if x.requires_grad:
            # A view of its own: two points may be shown one tensor, and the gradient passes the later point first.
            x = x.view_as(x)
            # The handles of now: a graph built under a hook runs it, also when the context has closed by then.
            x.register_hook(lambda grad: _through(handles, grad, check_acts=False))
        elif any(not handle.reads_only for handle in handles):
            raise RuntimeError(
                f"the backward hook at {self.name!r} can never run: the activation does not require a gradient "
                "(is this under torch.no_grad(), or are the parameters frozen?)"
            )
        return x

    @property
    def live(self) -> bool:
        """Whether a hook here acts in this thread."""
        if not (self.fwd_hooks or self.bwd_hooks or self._always_runs):
            return False
        return self._always_runs or any(handle.acts for handle in (*self.fwd_hooks, *self.bwd_hooks))

    @property
    def edited_forward(self) -> bool:
        """Whether a hook may change the activation."""
        return self._always_runs or any(handle.acts and not handle.reads_only for handle in tuple(self.fwd_hooks))

    @property
    def edits(self) -> bool:
        """Whether a hook may change the activation or its gradient."""
        return self.edited_forward or any(handle.acts for handle in tuple(self.bwd_hooks))

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
            hook: `hook(activation, hook_point) -> tensor | None`; None keeps the activation, in-place edits included.
            dir: `"fwd"` for the activation, `"bwd"` for its gradient.
            is_permanent: keep it through `reset_hooks`.
            level: the depth of `hooks()` contexts it belongs to.
            prepend: run it before the hooks that are here already.
            reads_only: the hook promises not to write, and is shown the activation itself; by default what its own
                `reads_only` attribute says.
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
        """Remove the hooks of a direction; permanent ones only if asked, and of one context level only if given.

        Hooks of another thread's `with` blocks stay.

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
            return kept or not handle.acts or (level is not None and handle.context_level != level)

        with changing_hooks:
            if dir in ("fwd", "both"):
                self.fwd_hooks[:] = [handle for handle in self.fwd_hooks if stays(handle)]
            if dir in ("bwd", "both"):
                self.bwd_hooks[:] = [handle for handle in self.bwd_hooks if stays(handle)]

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
        if name not in self.axes:
            raise ValueError(f"{self.name!r} has no axis {name!r}; its axes are {' '.join(self.axes)!r}")
        return self.axes.index(name) - len(self.axes)

    def extra_repr(self) -> str:
        """Return the axes, for the printed model."""
        return repr(" ".join(self.axes)) if self.axes else ""

    # Torch's own hooks run here as at any module: from the first one on, calls go through torch.

    def register_forward_hook(self, *args: Any, **kwargs: Any) -> RemovableHandle:
        """Register a hook of torch's, called as `hook(module, args, output)`."""
        self._always_runs = True
        return super().register_forward_hook(*args, **kwargs)

    def register_forward_pre_hook(self, *args: Any, **kwargs: Any) -> RemovableHandle:
        """Register a hook of torch's, called as `hook(module, args)`."""
        self._always_runs = True
        return super().register_forward_pre_hook(*args, **kwargs)

    def register_full_backward_hook(self, *args: Any, **kwargs: Any) -> RemovableHandle:
        """Register a hook of torch's, called as `hook(module, grad_input, grad_output)`."""
        self._always_runs = True
        return super().register_full_backward_hook(*args, **kwargs)

    def register_full_backward_pre_hook(self, *args: Any, **kwargs: Any) -> RemovableHandle:
        """Register a hook of torch's, called as `hook(module, grad_output)`."""
        self._always_runs = True
        return super().register_full_backward_pre_hook(*args, **kwargs)


def _through(handles: Sequence[HookHandle], x: Tensor, check_acts: bool = True) -> Tensor:
    """Return an activation, or a gradient, as hooks leave it."""
    private = False  # whether x is the copy that editing hooks share, which nothing else holds
    for handle in tuple(handles):
        if check_acts and not handle.acts:
            continue
        if handle.edits_in_place and not private:
            x, private = x.clone(), True
        returned = handle(x)
        # A hook that reads may keep the tensor, and one that returns a tensor may have it from anywhere.
        private = private and returned is x and not handle.reads_only
        x = returned
    return x


# A module of another kind may stand in a hook point's place: it always runs, and may do anything.


def is_live(point: nn.Module) -> bool:
    """Whether a hook acts at a hook point in this thread, or a module of another kind stands in its place."""
    if isinstance(point, HookPoint):
        return point.live if point.fwd_hooks or point.bwd_hooks or point._always_runs else False
    return True


def any_live(points: Iterable[nn.Module]) -> bool:
    """Whether `is_live` of any of some hook points."""
    for point in points:
        if not isinstance(point, HookPoint) or (
            (point.fwd_hooks or point.bwd_hooks or point._always_runs) and point.live
        ):
            return True
    return False


def may_edit_forward(point: nn.Module) -> bool:
    """Whether a hook, or a module in the hook point's place, may change the activation."""
    return point.edited_forward if isinstance(point, HookPoint) else True


def carries_run(point: nn.Module, gradients: bool) -> bool:
    """Whether the run must go on with what a hook point returns: it may be edited, or differentiated by.

    Args:
        point: a hook point, or a module in its place.
        gradients: whether gradients are recorded.
    """
    if isinstance(point, HookPoint):
        return point.live and (gradients or point.edits)
    return True
