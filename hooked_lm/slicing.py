"""Slice: one small object for "all of it, this one, this range, these" along an axis."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from hooked_lm._support.integers import integer, is_integer

__all__ = ["Slice", "SliceInput"]

SliceInput = "None | int | tuple[int | None, ...] | list[int] | slice | torch.Tensor | np.ndarray | Slice"


class Slice:
    """An index along one axis, applied to whichever axis a tensor keeps it on.

    Args:
        input_slice: None keeps everything; an int picks one and drops the axis; a tuple is `slice(*tuple)`; a list,
            range, array or tensor of integers picks several; a `slice` is taken as it is; a `Slice` is copied.

    Raises:
        TypeError: anything else.
        ValueError: an empty list, or a step that is not positive.

    >>> Slice((2, 5)).apply(torch.arange(10))
    tensor([2, 3, 4])
    """

    def __init__(self, input_slice: object = None) -> None:
        self.mode, self.slice = self._parse(input_slice)

    @staticmethod
    def _parse(given: object) -> tuple[str, slice | int | torch.Tensor]:
        if isinstance(given, Slice):
            return given.mode, given.slice
        if given is None:
            return "identity", slice(None)
        if isinstance(given, bool):
            raise TypeError(f"a slice is not a bool (got {given!r})")
        if isinstance(given, (int, np.integer)):
            return "int", int(given)
        if isinstance(given, slice):
            return "slice", _range(given)
        if isinstance(given, tuple):
            if not 1 <= len(given) <= 3 or not all(part is None or is_integer(part) for part in given):
                raise TypeError(
                    f"a tuple slice is (stop,), (start, stop) or (start, stop, step) of integers or None, got "
                    f"{given!r}; several single entries go in a list"
                )
            return "slice", _range(slice(*given))
        if isinstance(given, range):
            given = list(given)
        if isinstance(given, (list, np.ndarray, torch.Tensor)):
            if np.prod(np.shape(given)) == 0:
                raise ValueError(f"an empty index, {given!r}, picks nothing: give one entry at least, or None for all")
            index = torch.as_tensor(given).clone()
            if index.ndim == 0 and not index.is_floating_point():
                return "int", int(index)
            if index.ndim != 1 or index.is_floating_point() or index.dtype == torch.bool:
                raise TypeError(f"an index list is one-dimensional and of integers, got {given!r}")
            return "array", index
        raise TypeError(f"cannot slice with {given!r}: give None, an int, a tuple, a slice or a list of integers")

    def apply(self, tensor: torch.Tensor, dim: int = 0) -> torch.Tensor:
        """Return `tensor` indexed along `dim`; an int drops that axis, every other index keeps it.

        Args:
            tensor: any.
            dim: the axis; negative counts from the last.

        Raises:
            IndexError: there is no such axis, or no such entry along it.
        """
        if not -tensor.ndim <= dim < tensor.ndim:
            raise IndexError(f"axis {dim} of a tensor with shape {tuple(tensor.shape)}")
        dim = dim % tensor.ndim
        index = self.slice.to(tensor.device) if isinstance(self.slice, torch.Tensor) else self.slice
        if not isinstance(index, slice) and not torch.compiler.is_compiling():
            size, entries = tensor.shape[dim], [index] if isinstance(index, int) else index.tolist()
            outside = [one for one in entries if not -size <= one < size]
            if outside:
                raise IndexError(
                    f"index {outside[0]} is out of bounds for dimension {dim} with size {size}: its entries are "
                    f"0-{size - 1}, or -{size} to -1 from the end"
                )
        return tensor[(slice(None),) * dim + (index,)]

    def indices(self, max_ctx: int | None = None) -> np.ndarray:
        """Return the positions this picks among `max_ctx`, as an integer array.

        Raises:
            ValueError: a range, and no length of the axis is given.
        """
        if max_ctx is not None:
            return np.atleast_1d(self.apply(torch.arange(max_ctx)).numpy())
        if self.mode == "int":
            return np.array([self.slice])
        raise ValueError("indices() of a range needs max_ctx, the length of the axis")

    @property
    def is_identity(self) -> bool:
        """Whether this keeps everything."""
        return self.mode == "identity"

    def __repr__(self) -> str:
        return f"Slice({self.slice!r})"

    @classmethod
    def unwrap(cls, given: "object | Sequence[int]") -> "Slice":
        """Return `given` as a Slice, whatever form it came in."""
        return given if isinstance(given, Slice) else cls(given)


def _range(given: slice) -> slice:
    """A slice with Python's integers, checked."""
    parts = (given.start, given.stop, given.step)
    start, stop, step = (None if part is None else integer(part, "the part of a slice") for part in parts)
    if step is not None and step < 1:
        raise ValueError(f"the step of a slice is at least 1, got {given}: for another order give a list of entries")
    return slice(start, stop, step)
