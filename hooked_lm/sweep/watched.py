"""WatchedLogits: logits that note which positions a metric reads, so that a sweep computes no others.

A metric is any function of logits [batch pos vocab], and most read one position. Called on watched logits it sees a
tensor of that shape; indexing and other operations that only select are followed without reading, and every other
operation reads the positions of what it is given. A sweep learns from the base run which positions a metric reads,
gives it later logits that have those positions only, and computes the whole logits where it reads another one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Self
from weakref import WeakSet, ref

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map

from hooked_lm._support.torch_internals import without_torch_functions
from hooked_lm.metrics import one_number

__all__ = ["UnreadError", "Watched", "WatchedLogits", "watched_score"]

# Operations whose result has some of the entries of the first argument, in some order, whatever their values are.
_SELECTING = frozenset(
    function
    for name in (
        *("__getitem__", "select", "narrow", "index_select", "gather", "take_along_dim", "unbind", "split", "chunk"),
        *("squeeze", "unsqueeze", "flatten", "unflatten", "reshape", "view", "permute", "transpose", "swapaxes"),
        *("movedim", "expand", "diagonal"),
    )
    for function in (getattr(Tensor, name, None), getattr(torch, name, None))
    if function is not None
) | {getattr(Tensor, name).__get__ for name in ("T", "mT")}
# Operations whose result has the same entries in the same places, as values of another precision or in other memory.
_COPYING = frozenset(
    function
    for name in ("detach", "clone", "contiguous", "float", "double", "half", "bfloat16", "to", "cpu", "alias")
    for function in (getattr(Tensor, name, None), getattr(torch, name, None))
    if function is not None
)
# Operations that mix entries along one axis, given as the second argument or as `dim`.
_ALONG_ONE_AXIS = frozenset(
    (Tensor.softmax, Tensor.log_softmax, torch.softmax, torch.log_softmax, F.softmax, F.log_softmax)
)
# What is asked of a tensor without reading an entry.
_ASKING = frozenset(
    getattr(Tensor, name).__get__
    for name in ("shape", "dtype", "device", "ndim", "layout", "requires_grad", "is_cuda", "is_leaf", "grad_fn")
) | {Tensor.size, Tensor.dim, Tensor.numel, Tensor.is_floating_point, Tensor.__len__, Tensor.stride}
# Values that hold no memory of a tensor's.
_WITHOUT_MEMORY = (bool, int, float, complex, str, bytes, type(None), torch.dtype, torch.device, torch.layout)


class UnreadError(Exception):
    """A metric reads a position whose logits have not been computed, or changes the shape of what it reads in place."""


class _Watch:
    """The positions that a metric has read.

    Attributes:
        read: those positions.
        allowed: the positions that there are logits of; None for all.
        missed: it has read another one.
        memory: where the logits are.
        views: watched tensors that are still in use.
        arrays: what it has been given of numpy's in the memory of the logits, perhaps no longer in use.
        shared: it has been given something else that is not watched in the memory of the logits.
    """

    def __init__(self, logits: Tensor, allowed: frozenset[int] | None) -> None:
        self.read: set[int] = set()
        self.allowed, self.missed = allowed, False
        self.memory, self.shared = logits.untyped_storage().data_ptr(), False
        self.views: WeakSet[WatchedLogits] = WeakSet()
        self.arrays: list[ref[object]] = []

    @property
    def in_use(self) -> bool:
        """Whether the memory of the logits may still be read or written to by the metric."""
        return self.shared or bool(self.views) or any(one() is not None for one in self.arrays)

    def note_result(self, result: object) -> None:
        """Note what an operation that reads has returned."""
        for one in tree_leaves(result):
            if isinstance(one, Tensor):
                self.shared |= one.untyped_storage().data_ptr() == self.memory
            elif isinstance(one, np.ndarray):
                # Its views keep it alive.
                self.arrays.append(ref(one))
            else:
                self.shared |= not isinstance(one, _WITHOUT_MEMORY)

    def note(self, positions: Tensor) -> None:
        """Note that entries at these positions are read."""
        # Along an expanded axis all entries are one.
        once = positions[tuple(slice(0, 1) if stride == 0 else slice(None) for stride in positions.stride())]
        if once.numel() == 0:
            return
        least, most = once.aminmax()
        found = {int(least)} if bool(least == most) else set(once.unique().tolist())
        self.read |= found
        if self.allowed is not None and not found <= self.allowed:
            self.missed = True
            raise UnreadError(
                f"logits of positions {sorted(found - self.allowed)} are read, and a sweep has computed those of "
                f"{sorted(self.allowed)}, which the metric has read so far"
            )


class WatchedLogits(Tensor):
    """Logits, or a selection of them, with the position of every entry."""

    entries: Tensor
    positions: Tensor
    watch: _Watch

    @classmethod
    def of(cls, entries: Tensor, positions: Tensor, watch: _Watch) -> Self:
        """Return watched entries.

        Args:
            entries: the values; memory is shared.
            positions: of each entry, in the same shape.
            watch: notes what is read.
        """
        watched = entries.as_subclass(cls)
        watched.entries, watched.positions, watched.watch = entries, positions, watch
        watch.views.add(watched)
        return watched

    def __hash__(self) -> int:
        return id(self)

    # Any: the arguments of any function of torch.
    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: Iterable[type], args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        with without_torch_functions():
            if func in _ASKING:
                args, kwargs = tree_map(_plain, (args, kwargs))
                return func(*args, **kwargs)
            others = [one for one in tree_leaves((args[1:], kwargs)) if isinstance(one, WatchedLogits)]
            if args and isinstance(args[0], WatchedLogits) and not others:
                followed = _followed(func, args[0], args[1:], kwargs)
                if followed is not None:
                    return followed
            return _read(func, args, kwargs)

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Callable[..., Any], types: Iterable[type], args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """Compute for a caller that does not ask `__torch_function__`: scripted functions, `vmap`."""
        return _read(func, args, kwargs or {})


def _read(func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Return a function of plain tensors in place of watched ones, all of whose positions are read."""
    watched = [one for one in tree_leaves((args, kwargs)) if isinstance(one, WatchedLogits)]
    for one in watched:
        one.watch.note(one.positions)
    args, kwargs = tree_map(_plain, (args, kwargs))
    before = [_form(one.entries) for one in watched]
    result = func(*args, **kwargs)
    for one, form in zip(watched, before, strict=True):
        one.watch.note_result(result)
        if _form(one.entries) != form:
            one.watch.missed = True
            raise UnreadError(f"{func} changes the shape or precision of logits in place: their positions are unknown")
    return result


def _form(entries: Tensor) -> tuple[object, ...]:
    return entries.shape, entries.stride(), entries.dtype


def _plain(value: object) -> object:
    return value.entries if isinstance(value, WatchedLogits) else value


def _followed(func: Callable[..., Any], first: WatchedLogits, rest: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Return the result of an operation that reads nothing, watched; None for another operation."""
    if func in _SELECTING:
        entries = func(first.entries, *rest, **kwargs)
        try:
            positions = func(first.positions, *rest, **kwargs)
        except (RuntimeError, TypeError):
            return None  # with `out=`, or a view that the positions' strides do not allow
        if isinstance(positions, Tensor) and (positions.dtype != torch.long or positions.shape != entries.shape):
            return None  # a view as another type
    elif func in _COPYING or (func in _ALONG_ONE_AXIS and _mixes_one_position(first.positions, *rest[:1], **kwargs)):
        entries, positions = func(first.entries, *rest, **kwargs), first.positions
    else:
        return None
    if isinstance(entries, Tensor):
        return WatchedLogits.of(entries, positions, first.watch)
    parts = zip(entries, positions, strict=True)
    return tuple(WatchedLogits.of(entry, position, first.watch) for entry, position in parts)


def _mixes_one_position(positions: Tensor, dim: int | None = None, **kwargs: object) -> bool:
    """Return whether along an axis all entries are of one position."""
    return isinstance(dim, int) and -positions.ndim <= dim < positions.ndim and positions.stride(dim) == 0


@dataclass(frozen=True)
class Watched:
    """A metric of logits.

    Attributes:
        score: one number.
        read: the positions that the metric has read.
        untouched: the metric has not written to the logits, and holds no part of them.
    """

    score: Float[Tensor, ""]
    read: frozenset[int]
    untouched: bool


def watched_score(
    metric: Callable[[Tensor], object], logits: Float[Tensor, "batch pos vocab"], positions: Iterable[int] | None = None
) -> Watched:
    """Return a metric of logits, and which positions it has read.

    Args:
        metric: a function of the logits. It may keep them and write to them.
        logits: the logits.
        positions: the positions that hold logits; None for all.

    Raises:
        UnreadError: it reads a position besides `positions`.
        ValueError: the metric returns something other than a number.
    """
    watch = _Watch(logits, None if positions is None else frozenset(positions))
    there = torch.arange(logits.shape[1], device=logits.device)[None, :, None].expand(logits.shape)

    def number(whole: Tensor) -> object:
        score = metric(WatchedLogits.of(whole, there, watch))
        if isinstance(score, WatchedLogits):
            watch.note(score.positions)
            return score.entries
        return score

    # A copy: the score may be in the memory of the logits.
    score = one_number(number, logits).clone()
    if watch.missed:
        # The metric has caught the error itself.
        raise UnreadError("a position that has not been computed")
    return Watched(score, frozenset(watch.read), not watch.in_use)
