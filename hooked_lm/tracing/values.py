"""Value: something that a trace will compute. Its axes and sizes are known; its numbers are not there yet."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, NoReturn, Self, TypeAlias

import numpy as np
import torch
from torch import Tensor

from hooked_lm._support.integers import entries_of, integer, is_integer
from hooked_lm.tracing.errors import TraceError, calling_line
from hooked_lm.tracing.types import TensorType

if TYPE_CHECKING:
    from hooked_lm.tracing.trace import Trace

__all__ = ["Value", "ValueLike", "plain_params"]

# What operations take: a value of the trace, or a tensor, an array or a number as it is.
ValueLike: TypeAlias = "Value | Tensor | np.ndarray | float"

# What torch calls the operators of a tensor with a value on its right.
_OPERATORS = frozenset(
    {"add", "sub", "rsub", "mul", "div", "truediv", "matmul", "lt", "le", "gt", "ge", "eq", "ne", "pow"}
)


class Value:
    """Something that a trace will compute.

    It takes arithmetic, comparisons, `@`, indexing and the methods below; each gives another value. What was saved is
    `value` once the trace has run.

    Attributes:
        trace: the trace that it belongs to.
        type: its axes, their sizes and the kind of its entries.
    """

    __array_ufunc__ = None  # NumPy arrays leave operators to this class
    __hash__ = object.__hash__

    def __init__(self, trace: Trace, node: int, type: TensorType) -> None:
        self.trace, self.type = trace, type
        self._node: int | None = node
        self._name: str | None = None

    # What is known

    @property
    def node(self) -> int:
        """The index of its node in the graph."""
        assert self._node is not None
        return self._node

    @property
    def shape(self) -> tuple[int, ...]:
        """The sizes of its axes."""
        return self.type.shape

    @property
    def axes(self) -> tuple[str, ...]:
        """The names of its axes; empty strings for axes without one."""
        return self.type.axes

    @property
    def ndim(self) -> int:
        """How many axes there are."""
        return len(self.type.shape)

    def __repr__(self) -> str:
        return f"Value{self.type}"

    # Results

    def save(self, name: str | None = None) -> Self:
        """Keep the value, so that it is there once the trace has run; return it.

        Args:
            name: under which `trace.results` has it; by default a number.

        Raises:
            TraceError: the name is taken, or the trace has run.
        """
        self._name = self.trace.save_node(self.node, name)
        return self

    @property
    def value(self) -> Tensor:
        """The tensor, after the trace has run.

        Raises:
            TraceError: the value was not saved, or the trace has not run.
        """
        if self._name is None:
            raise TraceError("this value was not saved: call .save() on it within the trace")
        return self.trace.result(self._name)

    # Python needs the numbers for these, and nothing has run.

    def _no_numbers(self, what: str) -> TraceError:
        return TraceError(
            f"{what} of a value of a trace: its numbers are not there before the trace has run. "
            "t.where(condition, a, b) chooses between values; .save() and .value give the tensor afterwards",
            calling_line(),
        )

    def __bool__(self) -> bool:
        raise self._no_numbers("the truth")

    def __float__(self) -> float:
        raise self._no_numbers("the number")

    def __int__(self) -> int:
        raise self._no_numbers("the number")

    __index__ = __int__

    def __iter__(self) -> NoReturn:
        raise self._no_numbers("iteration over the entries")

    def __contains__(self, item: object) -> bool:
        raise self._no_numbers("a search among the entries")

    def __len__(self) -> int:
        raise self._no_numbers("the length (value.shape[0] is known)")

    def __array__(self, *args: object, **kwargs: object) -> NoReturn:
        raise self._no_numbers("the array")

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., object], types: object, args: Sequence[object] = (), kwargs: object = None
    ) -> object:
        name = getattr(func, "__name__", str(func))
        if args and isinstance(args[0], Tensor) and name.strip("_") in _OPERATORS:
            return NotImplemented  # a tensor's operator: Python asks this class next
        raise TraceError(
            f"torch.{name} takes tensors, and a value of a trace has no numbers before the trace has run: use the "
            f"value's own methods, t.op(name, ...) for any of tracing.OPS, or torch.{name} on what was saved",
            calling_line(),
        )

    # Operations

    def _op(self, name: str, *others: ValueLike, **params: object) -> Value:
        return self.trace.op(name, self, *others, **params)

    def _reversed(self, name: str, other: ValueLike) -> Value:
        return self.trace.op(name, other, self)

    # misc: torch and NumPy annotate their operators as taking anything, so mypy cannot tell whose runs.

    def __add__(self, other: ValueLike) -> Value:
        return self._op("add", other)

    def __radd__(self, other: ValueLike) -> Value:  # type: ignore[misc]
        return self._reversed("add", other)

    def __sub__(self, other: ValueLike) -> Value:
        return self._op("sub", other)

    def __rsub__(self, other: ValueLike) -> Value:  # type: ignore[misc]
        return self._reversed("sub", other)

    def __mul__(self, other: ValueLike) -> Value:
        return self._op("mul", other)

    def __rmul__(self, other: ValueLike) -> Value:  # type: ignore[misc]
        return self._reversed("mul", other)

    def __truediv__(self, other: ValueLike) -> Value:
        return self._op("div", other)

    def __rtruediv__(self, other: ValueLike) -> Value:  # type: ignore[misc]
        return self._reversed("div", other)

    def __pow__(self, other: ValueLike) -> Value:
        return self._op("pow", other)

    def __matmul__(self, other: ValueLike) -> Value:
        return self._op("matmul", other)

    def __rmatmul__(self, other: ValueLike) -> Value:
        return self._reversed("matmul", other)

    def __neg__(self) -> Value:
        return self._op("neg")

    def __abs__(self) -> Value:
        return self._op("abs")

    def __eq__(self, other: ValueLike) -> Value:  # type: ignore[override]
        return self._op("eq", other)

    def __ne__(self, other: ValueLike) -> Value:  # type: ignore[override]
        return self._op("ne", other)

    def __lt__(self, other: ValueLike) -> Value:  # type: ignore[misc]
        return self._op("lt", other)

    def __le__(self, other: ValueLike) -> Value:  # type: ignore[misc]
        return self._op("le", other)

    def __gt__(self, other: ValueLike) -> Value:  # type: ignore[misc]
        return self._op("gt", other)

    def __ge__(self, other: ValueLike) -> Value:  # type: ignore[misc]
        return self._op("ge", other)

    def __getitem__(self, index: object) -> Value:
        """Return entries by axis: integers, which drop the axis, slices and lists of integers."""
        parts = list(index) if isinstance(index, tuple) else [index]
        if any(isinstance(part, (Value, str, bool)) or part is None for part in parts):
            raise TraceError(
                f"a value is indexed by integers, slices and lists of integers, got {index!r}; "
                ".gather(index, axis) takes entries at indices that a trace computes",
                calling_line(),
            )
        if Ellipsis in parts:
            place = parts.index(Ellipsis)
            parts[place : place + 1] = [slice(None)] * (self.ndim - len(parts) + 1)
        if len(parts) > self.ndim:
            raise TraceError(f"an index of {len(parts)} entries; the value has axes {self.type}", calling_line())
        chosen: Value = self
        axis = 0
        for part in parts:
            if isinstance(part, slice):
                if part != slice(None):
                    chosen = chosen.select(axis, list(range(chosen.shape[axis])[part]))
                axis += 1
                continue
            several = entries_of(part)
            chosen = chosen.select(axis, part if several is None else list(several))
            axis += several is not None
        return chosen

    def select(self, axis: str | int, entries: object) -> Value:
        """Return entries along one axis.

        Args:
            axis: a name or an index.
            entries: an integer, which drops the axis, or several.

        Raises:
            TraceError: no such axis or entry.
        """
        several = entries_of(entries)
        found = [entries] if several is None else list(several)
        if not all(is_integer(one) for one in found):
            raise TraceError(f"entries along an axis are integers, got {entries!r}", calling_line())
        whole: list[object] = [integer(one, "an entry") for one in found]
        return self._op("select", axis=axis, entries=whole[0] if several is None else whole)

    def gather(self, index: ValueLike, axis: str | int) -> Value:
        """Return entries along an axis at indices.

        Args:
            index: integers, with the value's other axes (one entry each), or with as many axes as the value.
            axis: a name or an index.
        """
        return self._op("gather", index, axis=axis)

    def sum(self, axis: object = None, keep: bool = False) -> Value:
        """Return the sum over axes.

        Args:
            axis: a name, an index or several; None for all.
            keep: leave the axes, with size 1.
        """
        return self._op("sum", axis=_plain(axis), keep=keep)

    def mean(self, axis: object = None, keep: bool = False) -> Value:
        """Return the mean over axes.

        Args:
            axis, keep: as for `sum`.
        """
        return self._op("mean", axis=_plain(axis), keep=keep)

    def var(self, axis: object = None, keep: bool = False) -> Value:
        """Return the variance over axes: the mean squared distance from the mean.

        Args:
            axis, keep: as for `sum`.
        """
        return self._op("var", axis=_plain(axis), keep=keep)

    def norm(self, axis: object = None, keep: bool = False) -> Value:
        """Return the Euclidean norm over axes.

        Args:
            axis, keep: as for `sum`.
        """
        return self._op("norm", axis=_plain(axis), keep=keep)

    def amax(self, axis: object = None, keep: bool = False) -> Value:
        """Return the largest entry over axes.

        Args:
            axis, keep: as for `sum`.
        """
        return self._op("amax", axis=_plain(axis), keep=keep)

    def logsumexp(self, axis: object, keep: bool = False) -> Value:
        """Return the logarithm of the sum of exponentials over axes.

        Args:
            axis, keep: as for `sum`.
        """
        return self._op("logsumexp", axis=_plain(axis), keep=keep)

    def argmax(self, axis: str | int) -> Value:
        """Return the index of the largest entry along an axis.

        Args:
            axis: a name or an index.
        """
        return self._op("argmax", axis=axis)

    def topk(self, k: int, axis: str | int = -1) -> tuple[Value, Value]:
        """Return the k largest entries along an axis, and their indices.

        Args:
            k: how many.
            axis: a name or an index.
        """
        return self._op("topk_values", k=k, axis=axis), self._op("topk_indices", k=k, axis=axis)

    def cumsum(self, axis: str | int) -> Value:
        """Return running sums along an axis.

        Args:
            axis: a name or an index.
        """
        return self._op("cumsum", axis=axis)

    def softmax(self, axis: str | int) -> Value:
        """Return the softmax along an axis.

        Args:
            axis: a name or an index.
        """
        return self._op("softmax", axis=axis)

    def log_softmax(self, axis: str | int) -> Value:
        """Return the logarithm of the softmax along an axis.

        Args:
            axis: a name or an index.
        """
        return self._op("log_softmax", axis=axis)

    def exp(self) -> Value:
        """Return the exponential of every entry."""
        return self._op("exp")

    def log(self) -> Value:
        """Return the natural logarithm of every entry."""
        return self._op("log")

    def sqrt(self) -> Value:
        """Return the square root of every entry."""
        return self._op("sqrt")

    def abs(self) -> Value:
        """Return every entry without its sign."""
        return self._op("abs")

    def relu(self) -> Value:
        """Return every entry, or 0 where it is negative."""
        return self._op("relu")

    def gelu(self) -> Value:
        """Return GELU of every entry (the exact one)."""
        return self._op("gelu")

    def sigmoid(self) -> Value:
        """Return the logistic function of every entry."""
        return self._op("sigmoid")

    def tanh(self) -> Value:
        """Return the hyperbolic tangent of every entry."""
        return self._op("tanh")

    def clamp(self, least: float | None = None, most: float | None = None) -> Value:
        """Return every entry, or the bound that it lies beyond.

        Args:
            least, most: the bounds; None for no bound.
        """
        return self._op("clamp", least=least, most=most)

    def split(self, axis: str | int, sizes: Sequence[int]) -> Value:
        """Return the value with one axis written as several.

        Args:
            axis: a name or an index.
            sizes: of the new axes.
        """
        return self._op("split", axis=axis, sizes=list(sizes))

    def merge(self, first: str | int, last: str | int) -> Value:
        """Return the value with neighbouring axes written as one.

        Args:
            first, last: names or indices of the first and the last of them.
        """
        return self._op("merge", first=first, last=last)

    def move(self, *order: str | int) -> Value:
        """Return the value with its axes in another order.

        Args:
            *order: names or indices of all axes.
        """
        return self._op("move", order=list(order))

    def expand(self, *shape: int) -> Value:
        """Return the value repeated to a shape that it broadcasts to.

        Args:
            *shape: the sizes.
        """
        return self._op("expand", shape=list(shape))

    def cast(self, dtype: str | torch.dtype) -> Value:
        """Return the value in another precision.

        Args:
            dtype: `"float32"`, `"float64"`, `"bfloat16"`, `"float16"`, `"int64"` or `"bool"`.
        """
        return self._op("cast", dtype=str(dtype).removeprefix("torch."))


def _plain(axis: object) -> object:
    several = entries_of(axis)
    return list(several) if several is not None else axis


def plain_params(op: str, params: Mapping[str, object], types: Sequence[TensorType]) -> dict[str, object]:
    """Return an operation's parameters with names of axes turned into indices, and NumPy's integers into Python's.

    Args:
        op: the name of the operation.
        params: as they were given.
        types: of the operands.

    Raises:
        ValueError: the first operand has no such axis.
    """
    made: dict[str, object] = {}
    for name, given in params.items():
        if name in ("axis", "first", "last", "order") and types and op != "stack":
            made[name] = _axes(given, types[0])
        elif isinstance(given, (list, tuple)):
            made[name] = [integer(one, name) if is_integer(one) else one for one in given]
        else:
            made[name] = integer(given, name) if is_integer(given) else given
    return made


def _axes(given: object, type: TensorType) -> object:
    if given is None:
        return None
    if isinstance(given, (list, tuple)):
        return [type.axis(one) for one in given]
    return type.axis(given)
