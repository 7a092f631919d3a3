"""Devices that only this process knows: a forgotten move between them is an error, as on two accelerators.

The tensors are all in ordinary memory, so that every number can be compared. Within `logical_devices()` each tensor
has the device that it was made on or moved to, `"cpu:0"` or `"cpu:1"`, says so when it is asked, and does not combine
with one on another device. A number (no axes) combines with anything, and so does a tensor made outside, which has no
device yet.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

__all__ = ["logical_devices"]

_PLACE = "logical_device"
_INDEXES = {Tensor.__getitem__, Tensor.__setitem__}
_TAKES_ANY = {torch._has_compatible_shallow_copy_type, Tensor.copy_, Tensor.data.__set__, Tensor.grad.__set__}  # type: ignore[attr-defined]
_MAKES = {"arange", "empty", "eye", "full", "linspace", "ones", "rand", "randint", "randn", "randperm", "zeros"}


@contextmanager
def logical_devices() -> Generator[None]:
    """Within a `with` block, tensors have logical devices."""
    with _Devices():
        yield


def _place(tensor: Tensor) -> torch.device | None:
    found: torch.device | None = getattr(tensor, _PLACE, None)
    return found


def _put(result: object, place: torch.device | None) -> None:
    if place is not None:
        for one in tree_leaves(result):
            if isinstance(one, Tensor):
                setattr(one, _PLACE, place)


def _asked(args: Iterable[object]) -> torch.device | None:
    """The device among the arguments of `to`."""
    for one in args:
        if isinstance(one, torch.device):
            return one
        if isinstance(one, str):
            return torch.device(one)
        if isinstance(one, Tensor):
            return _place(one)
    return None


class _Devices(TorchFunctionMode):
    # Any: the arguments of any function of torch.
    def __torch_function__(
        self, func: Callable[..., Any], types: Iterable[type], args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        if func == Tensor.device.__get__:  # type: ignore[attr-defined]
            return _place(args[0]) or func(*args)
        if name in ("to", "as_tensor", "cpu") and args and isinstance(args[0], Tensor):
            return _moved(func, name, args, kwargs)
        if name == "grad" and func is torch.autograd.grad:
            return _gradients(func, args, kwargs)
        result = func(*args, **kwargs)
        if func in _TAKES_ANY:
            if name == "__set__":
                _put(args[0], _place(args[1]) if isinstance(args[1], Tensor) else None)
            return result
        asked = kwargs.get("device")
        if asked is not None:
            _put(result, torch.device(asked))
        elif name in _MAKES or (name == "tensor" and func is torch.tensor):
            _put(result, torch.device("cpu"))
        else:
            _put(result, _common(func, [one for one in tree_leaves((args, kwargs)) if isinstance(one, Tensor)]))
        return result


def _moved(func: Callable[..., Any], name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    before = _place(args[0])
    asked = torch.device("cpu") if name == "cpu" else _asked([kwargs.get("device"), kwargs.get("other"), *args[1:]])
    place = before if asked is None else asked
    result: Tensor = func(*args, **kwargs)
    if result is args[0] and place != before:
        result = result.clone()
    _put(result, place)
    return result


def _gradients(func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    # Views: here a move is no copy backwards, so that two inputs can have one tensor as their gradient.
    result = tuple(None if one is None else one.view_as(one) for one in func(*args, **kwargs))
    inputs = args[1] if len(args) > 1 else kwargs["inputs"]
    for one, gradient in zip([inputs] if isinstance(inputs, Tensor) else inputs, result, strict=True):
        _put(gradient, _place(one))
    return result


def _common(func: Callable[..., Any], tensors: list[Tensor]) -> torch.device | None:
    places = {_place(one) for one in tensors if one.ndim} - {None}
    if func in _INDEXES and len(places) > 1:
        places.discard(torch.device("cpu"))  # an index may be in ordinary memory
    if len(places) > 1:
        raise RuntimeError(
            f"{getattr(func, '__name__', func)}: expected all tensors on one device, found {sorted(map(str, places))}"
        )
    if places:
        return places.pop()
    return next((place for one in tensors if (place := _place(one)) is not None), None)
