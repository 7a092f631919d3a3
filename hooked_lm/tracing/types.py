"""TensorType: what is known of a value before anything has run: its axes, their sizes and the kind of its numbers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from hooked_lm._support.integers import integer, is_integer

__all__ = ["Kind", "TensorType", "broadcast_shapes", "broadcast_types"]

Kind = Literal["float", "int", "bool"]
_RANK: dict[Kind, int] = {"bool": 0, "int": 1, "float": 2}


@dataclass(frozen=True)
class TensorType:
    """The type of a value of a trace.

    Attributes:
        axes: a name for every axis; empty strings for axes without one.
        shape: their sizes.
        kind: whether the entries are real numbers, integers or truth values.
    """

    axes: tuple[str, ...]
    shape: tuple[int, ...]
    kind: Kind = "float"

    @property
    def numel(self) -> int:
        """How many entries there are."""
        count = 1
        for size in self.shape:
            count *= size
        return count

    def __str__(self) -> str:
        named = (f"{axis} {size}" if axis else str(size) for axis, size in zip(self.axes, self.shape, strict=True))
        return f"[{', '.join(named)}]"

    def axis(self, axis: object) -> int:
        """Return the index of an axis, counted from the first.

        Args:
            axis: its name, or an index; negative counts from the last.

        Raises:
            ValueError: there is no such axis, or several of that name.
        """
        if isinstance(axis, str):
            found = [index for index, name in enumerate(self.axes) if name == axis]
            if len(found) != 1 or not axis:
                how_many = "several axes" if found else "no axis"
                raise ValueError(f"a value with axes {self} has {how_many} {axis!r}")
            return found[0]
        if not is_integer(axis):
            raise ValueError(f"an axis is a name or an index, got {axis!r}")
        index = integer(axis, "axis")
        if not -len(self.shape) <= index < len(self.shape):
            raise ValueError(f"a value with axes {self} has no axis {index}")
        return index % len(self.shape)

    def without(self, dropped: Sequence[int], keep: bool = False) -> TensorType:
        """Return the type without some axes, or with size 1 there.

        Args:
            dropped: indices of the axes.
            keep: leave them, with size 1.
        """
        if keep:
            shape = tuple(1 if index in dropped else size for index, size in enumerate(self.shape))
            return TensorType(self.axes, shape, self.kind)
        kept = [index for index in range(len(self.shape)) if index not in dropped]
        return TensorType(tuple(self.axes[i] for i in kept), tuple(self.shape[i] for i in kept), self.kind)


def broadcast_shapes(*shapes: tuple[int, ...]) -> tuple[int, ...]:
    """Return the shape of tensors that are broadcast against each other.

    Args:
        *shapes: of the tensors.

    Raises:
        ValueError: they do not fit.
    """
    n_axes = max(map(len, shapes))
    padded = [(1,) * (n_axes - len(shape)) + shape for shape in shapes]
    sizes = []
    for column in zip(*padded, strict=True):
        wide = {size for size in column if size != 1}
        if len(wide) > 1:
            raise ValueError(f"shapes {' and '.join(map(str, shapes))} do not broadcast")
        sizes.append(wide.pop() if wide else 1)
    return tuple(sizes)


def broadcast_types(*types: TensorType, kind: Kind | None = None) -> TensorType:
    """Return the type of an operation entry by entry.

    An axis takes its name from the operands in which it is not of size 1; operands that disagree leave it without one.

    Args:
        *types: of the operands.
        kind: of the result; by default the widest of the operands.

    Raises:
        ValueError: the shapes do not broadcast.
    """
    shape = broadcast_shapes(*(one.shape for one in types))
    axes = []
    for index in range(-len(shape), 0):
        there = [one for one in types if len(one.shape) >= -index]
        wide = [one for one in there if one.shape[index] == shape[index]]
        names = {one.axes[index] for one in wide} - {""}
        axes.append(names.pop() if len(names) == 1 else "")
    widest = max((one.kind for one in types), key=_RANK.__getitem__)
    return TensorType(tuple(axes), shape, kind or widest)
