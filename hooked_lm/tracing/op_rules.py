"""The rules of single operations of a trace: the type of the result, and its computation."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from hooked_lm.tracing.types import Kind, TensorType, broadcast_shapes, broadcast_types

__all__ = [
    "DTYPES",
    "Operand",
    "Params",
    "as_int",
    "as_ints",
    "as_tensor",
    "as_tensors",
    "axes_of",
    "axis_indices",
    "cast_type",
    "cat_type",
    "choose",
    "clamp",
    "clamp_type",
    "contract",
    "draw",
    "einsum_type",
    "expand_type",
    "gather",
    "gather_type",
    "matmul_type",
    "merge_type",
    "move_type",
    "norm_over",
    "randn_type",
    "select",
    "select_type",
    "split_type",
    "stack_type",
    "sum_over",
    "topk_type",
    "where_type",
]

# A number takes the precision of the tensor that it is combined with.
Operand = Tensor | float | int | bool
Params = Mapping[str, object]

DTYPES: dict[str, tuple[torch.dtype, Kind]] = {
    "float32": (torch.float32, "float"),
    "float64": (torch.float64, "float"),
    "bfloat16": (torch.bfloat16, "float"),
    "float16": (torch.float16, "float"),
    "int64": (torch.int64, "int"),
    "bool": (torch.bool, "bool"),
}


# Reading parameters


def axes_of(type: TensorType, given: object) -> list[int]:
    """Return the axes that a parameter names, counted from the first; None for all.

    Args:
        type: of the operand.
        given: an axis, a list of axes or None.

    Raises:
        ValueError: no such axis, or one twice.
    """
    if given is None:
        return list(range(len(type.shape)))
    axes = [type.axis(one) for one in (given if isinstance(given, (list, tuple)) else [given])]
    if len(set(axes)) < len(axes):
        raise ValueError(f"axes {given!r} name one twice")
    return axes


def as_tensor(operand: Operand, like: Tensor | None = None) -> Tensor:
    if isinstance(operand, Tensor):
        return operand
    if like is None or (isinstance(operand, float) and not like.is_floating_point()):
        return torch.as_tensor(operand, device=None if like is None else like.device)
    return torch.as_tensor(operand, dtype=like.dtype, device=like.device)


def as_tensors(operands: Sequence[Operand]) -> list[Tensor]:
    """The operands as tensors; numbers take the precision of the first tensor."""
    like = next((one for one in operands if isinstance(one, Tensor)), None)
    return [as_tensor(one, like) for one in operands]


def axis_indices(x: Tensor, given: object) -> list[int]:
    """Axes as indices. Names were turned into indices when the operation was recorded."""
    if given is None:
        return list(range(x.ndim))
    return [as_int(one) for one in given] if isinstance(given, (list, tuple)) else [as_int(given)]


def as_int(given: object) -> int:
    assert isinstance(given, int)
    return given


# Single operations


def clamp_type(types: Sequence[TensorType], params: Params) -> TensorType:
    bounds = [params["least"], params["most"]]
    if bounds == [None, None] or any(
        isinstance(one, bool) or not isinstance(one, int | float | None) for one in bounds
    ):
        raise ValueError(f"clamp needs least=, most= or both, as numbers; got {bounds}")
    return types[0]


def clamp(operands: Sequence[Operand], params: Params) -> Tensor:
    return as_tensor(operands[0]).clamp(_bound(params["least"]), _bound(params["most"]))


def _bound(given: object) -> float | None:
    assert given is None or isinstance(given, (int, float))
    return given


def where_type(types: Sequence[TensorType], params: Params) -> TensorType:
    if types[0].kind != "bool":
        raise ValueError(f"the condition of where holds truth values, got {types[0].kind}: compare first")
    chosen = broadcast_types(*types[1:])
    return replace(broadcast_types(*types), kind=chosen.kind)


def choose(operands: Sequence[Operand], params: Params) -> Tensor:
    one, other = as_tensors(operands[1:])
    return torch.where(as_tensor(operands[0]), one, other)


def topk_type(types: Sequence[TensorType], params: Params) -> TensorType:
    axis, k = types[0].axis(params["axis"]), params["k"]
    if not isinstance(k, int) or isinstance(k, bool) or not 1 <= k <= types[0].shape[axis]:
        raise ValueError(f"k is 1 to {types[0].shape[axis]}, the size of the axis; got {k!r}")
    shape = (*types[0].shape[:axis], k, *types[0].shape[axis + 1 :])
    axes = (*types[0].axes[:axis], "", *types[0].axes[axis + 1 :])
    return TensorType(axes, shape, types[0].kind)


def matmul_type(types: Sequence[TensorType], params: Params) -> TensorType:
    left, right = types
    if len(left.shape) < 2 or len(right.shape) < 1:
        raise ValueError(f"matmul takes [..., a, b] and [..., b, c] or [b], got {left} and {right}")
    vector = len(right.shape) == 1
    inner = right.shape[0] if vector else right.shape[-2]
    if left.shape[-1] != inner:
        raise ValueError(f"matmul takes [..., a, b] and [..., b, c] or [b], got {left} and {right}")
    if left.kind != right.kind or left.kind == "bool":
        raise ValueError(f"matmul takes two operands of one kind, got {left.kind} and {right.kind}")
    if vector:
        return TensorType(left.axes[:-1], left.shape[:-1], left.kind)
    outer = broadcast_types(left.without([len(left.shape) - 2, len(left.shape) - 1]), _outer(right))
    return TensorType(
        (*outer.axes, left.axes[-2], right.axes[-1]), (*outer.shape, left.shape[-2], right.shape[-1]), left.kind
    )


def _outer(type: TensorType) -> TensorType:
    return type.without([len(type.shape) - 2, len(type.shape) - 1])


def einsum_type(types: Sequence[TensorType], params: Params) -> TensorType:
    equation = params["equation"]
    if not isinstance(equation, str) or "->" not in equation:
        raise ValueError(f"the equation names axes, 'batch d_model, vocab d_model -> batch vocab'; got {equation!r}")
    before, after = equation.split("->", 1)
    terms, result = [term.split() for term in before.split(",")], after.split()
    if len(terms) != len(types):
        raise ValueError(f"the equation {equation!r} has {len(terms)} operands, got {len(types)}")
    sizes: dict[str, int] = {}
    for term, type in zip(terms, types, strict=True):
        if len(term) != len(type.shape) or len(set(term)) < len(term) or not all(name.isidentifier() for name in term):
            raise ValueError(f"{' '.join(term)!r} names each axis once; the operand has axes {type}")
        for name, size in zip(term, type.shape, strict=True):
            if sizes.setdefault(name, size) != size:
                raise ValueError(f"the axis {name!r} of {equation!r} has sizes {sizes[name]} and {size}")
    if len(set(result)) < len(result) or not set(result) <= set(sizes):
        raise ValueError(f"the result of {equation!r} names axes of the operands, each once")
    if len({type.kind for type in types}) > 1:
        raise ValueError("the operands of einsum are all real or all integers: cast them first")
    if len(sizes) > 52:
        raise ValueError(f"the equation {equation!r} has more than 52 axes")
    return TensorType(tuple(result), tuple(sizes[name] for name in result), types[0].kind)


def contract(operands: Sequence[Operand], params: Params) -> Tensor:
    before, after = str(params["equation"]).split("->", 1)
    terms, result = [term.split() for term in before.split(",")], after.split()
    letters: dict[str, int] = {}
    for term in (*terms, result):
        for name in term:
            letters.setdefault(name, len(letters))
    flat: list[object] = []
    for operand, term in zip(operands, terms, strict=True):
        flat += [as_tensor(operand), [letters[name] for name in term]]
    made: Tensor = torch.einsum(*flat, [letters[name] for name in result])
    return made


def gather_type(types: Sequence[TensorType], params: Params) -> TensorType:
    """Entries of the first operand along an axis, at the indices of the second, which has the other axes."""
    x, index = types
    axis = x.axis(params["axis"])
    if index.kind != "int":
        raise ValueError(f"gather takes indices, got {index.kind} values")
    if len(index.shape) == len(x.shape) - 1:
        if index.shape != x.without([axis]).shape:
            raise ValueError(f"one index for each entry of {x.without([axis])}, got {index}")
        return replace(index, kind=x.kind, axes=x.without([axis]).axes)
    if len(index.shape) != len(x.shape) or index.without([axis]).shape != x.without([axis]).shape:
        raise ValueError(f"the indices have the axes of {x}, but along {params['axis']!r}; got {index}")
    axes = tuple("" if i == axis else name for i, name in enumerate(x.axes))
    return TensorType(axes, index.shape, x.kind)


def gather(operands: Sequence[Operand], params: Params) -> Tensor:
    x, index = as_tensor(operands[0]), as_tensor(operands[1])
    axis = as_int(params["axis"])
    if index.ndim < x.ndim:
        return x.gather(axis, index.unsqueeze(axis)).squeeze(axis)
    return x.gather(axis, index)


def stack_type(types: Sequence[TensorType], params: Params) -> TensorType:
    axis = params["axis"]
    if not isinstance(axis, int) or isinstance(axis, bool) or not 0 <= axis <= len(types[0].shape):
        raise ValueError(f"stack puts the new axis at 0 to {len(types[0].shape)}, got {axis!r}")
    for other in types[1:]:
        if other.shape != types[0].shape or other.kind != types[0].kind:
            raise ValueError(f"stack takes values of one shape and kind, got {types[0]} and {other}")
    same = [names if len(set(names)) == 1 else ("",) for names in zip(*(one.axes for one in types), strict=True)]
    names = [one[0] for one in same]
    shape = list(types[0].shape)
    return TensorType((*names[:axis], "", *names[axis:]), (*shape[:axis], len(types), *shape[axis:]), types[0].kind)


def cat_type(types: Sequence[TensorType], params: Params) -> TensorType:
    axis = types[0].axis(params["axis"])
    for other in types[1:]:
        fits = len(other.shape) == len(types[0].shape) and other.kind == types[0].kind
        if not fits or other.without([axis]).shape != types[0].without([axis]).shape:
            raise ValueError(f"cat takes values that differ along one axis only, got {types[0]} and {other}")
    shape = list(types[0].shape)
    shape[axis] = sum(one.shape[axis] for one in types)
    return TensorType(types[0].axes, tuple(shape), types[0].kind)


def split_type(types: Sequence[TensorType], params: Params) -> TensorType:
    axis, sizes = types[0].axis(params["axis"]), _whole(params["sizes"], "sizes", least=1)
    if math.prod(sizes) != types[0].shape[axis]:
        raise ValueError(f"the axis has {types[0].shape[axis]} entries, and the sizes {sizes} make {math.prod(sizes)}")
    shape, axes = types[0].shape, types[0].axes
    return TensorType(
        (*axes[:axis], *("" for _ in sizes), *axes[axis + 1 :]),
        (*shape[:axis], *sizes, *shape[axis + 1 :]),
        types[0].kind,
    )


def merge_type(types: Sequence[TensorType], params: Params) -> TensorType:
    first, last = types[0].axis(params["first"]), types[0].axis(params["last"])
    if first >= last:
        raise ValueError(f"merge joins the axes from first to last, in this order; got {first} and {last}")
    shape, axes = types[0].shape, types[0].axes
    size = math.prod(shape[first : last + 1])
    return TensorType((*axes[:first], "", *axes[last + 1 :]), (*shape[:first], size, *shape[last + 1 :]), types[0].kind)


def move_type(types: Sequence[TensorType], params: Params) -> TensorType:
    order = _whole(params["order"], "order", least=0)
    if sorted(order) != list(range(len(types[0].shape))):
        raise ValueError(f"order names each of the axes {types[0]} once, got {order}")
    return TensorType(tuple(types[0].axes[i] for i in order), tuple(types[0].shape[i] for i in order), types[0].kind)


def expand_type(types: Sequence[TensorType], params: Params) -> TensorType:
    shape = tuple(_whole(params["shape"], "shape", least=0))
    if broadcast_shapes(types[0].shape, shape) != shape:
        raise ValueError(f"a value with axes {types[0]} does not broadcast to {shape}")
    return TensorType((*("" for _ in shape[len(types[0].shape) :]), *types[0].axes), shape, types[0].kind)


def cast_type(types: Sequence[TensorType], params: Params) -> TensorType:
    if params["dtype"] not in DTYPES:
        raise ValueError(f"dtype {params['dtype']!r} is none of {', '.join(DTYPES)}")
    return replace(types[0], kind=DTYPES[str(params["dtype"])][1])


def randn_type(types: Sequence[TensorType], params: Params) -> TensorType:
    shape, seed = tuple(_whole(params["shape"], "shape", least=1)), params["seed"]
    if not isinstance(seed, int) or isinstance(seed, bool) or not 0 <= seed < 2**63:
        raise ValueError(f"seed is an integer from 0 to 2**63 - 1, got {seed!r}")
    return TensorType(("",) * len(shape), shape)


def draw(operands: Sequence[Operand], params: Params) -> Tensor:
    generator = torch.Generator().manual_seed(as_int(params["seed"]))
    return torch.randn(_whole(params["shape"], "shape", least=1), generator=generator)


def select_type(types: Sequence[TensorType], params: Params) -> TensorType:
    """Entries by axis: an integer, which drops the axis, or a list of integers."""
    axis, entries = types[0].axis(params["axis"]), params["entries"]
    size = types[0].shape[axis]
    several = entries if isinstance(entries, (list, tuple)) else [entries]
    chosen = _whole(several, "entries", least=-size)
    if not chosen or max(chosen) >= size:
        raise ValueError(f"the axis has entries 0-{size - 1}, got {entries!r}")
    if several is entries:
        shape = (*types[0].shape[:axis], len(chosen), *types[0].shape[axis + 1 :])
        return replace(types[0], shape=shape)
    return types[0].without([axis])


def select(operands: Sequence[Operand], params: Params) -> Tensor:
    x, axis, entries = as_tensor(operands[0]), as_int(params["axis"]), params["entries"]
    if isinstance(entries, (list, tuple)):
        chosen = [as_int(one) % x.shape[axis] for one in entries]
        return x.index_select(axis, torch.tensor(chosen, device=x.device))
    return x.select(axis, as_int(entries))


def _whole(given: object, what: str, least: int) -> list[int]:
    if not isinstance(given, (list, tuple)) or any(not isinstance(one, int) or isinstance(one, bool) for one in given):
        raise ValueError(f"{what} is a list of integers, got {given!r}")
    whole = as_ints(given)
    if any(one < least for one in whole):
        raise ValueError(f"{what} has entries of {least} or more, got {given!r}")
    return whole


def as_ints(given: object) -> list[int]:
    assert isinstance(given, (list, tuple))
    return [as_int(one) for one in given]


def sum_over(x: Tensor, axes: list[int], keep: bool) -> Tensor:
    return x.sum(axes, keepdim=keep)


def norm_over(x: Tensor, axes: list[int], keep: bool) -> Tensor:
    norm: Tensor = torch.linalg.vector_norm(x, dim=axes, keepdim=keep)
    return norm
