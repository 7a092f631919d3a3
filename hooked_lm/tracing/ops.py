"""The closed table of operations in a trace. Each knows the type of its result before it runs.

None writes to its operands, none has a result whose shape depends on values, none takes a function or a path.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn import functional

from hooked_lm.tracing.types import Kind, TensorType, broadcast_shapes, broadcast_types

__all__ = ["OPS", "Operand", "Params", "TraceOp", "compute", "describe_op", "infer_type", "register_op"]

# A number takes the precision of the tensor that it is combined with.
Operand = Tensor | float | int | bool
Params = Mapping[str, object]
Infer = Callable[[Sequence[TensorType], Params], TensorType]
Run = Callable[[Sequence[Operand], Params], Tensor]

_DTYPES: dict[str, tuple[torch.dtype, Kind]] = {
    "float32": (torch.float32, "float"),
    "float64": (torch.float64, "float"),
    "bfloat16": (torch.bfloat16, "float"),
    "float16": (torch.float16, "float"),
    "int64": (torch.int64, "int"),
    "bool": (torch.bool, "bool"),
}


@dataclass(frozen=True)
class TraceOp:
    """An operation of a trace.

    Attributes:
        infer: types of the operands, parameters -> type of the result; raises ValueError where they do not fit.
        run: operands, parameters -> the result.
        arity: the least and the largest number of operands; None for any number.
        params: the names of its parameters.
    """

    infer: Infer
    run: Run
    arity: tuple[int, int | None]
    params: tuple[str, ...] = ()


def infer_type(name: str, types: Sequence[TensorType], params: Params) -> TensorType:
    """Return the type of an operation's result.

    Args:
        name: of the operation.
        types: of its operands.
        params: its parameters.

    Raises:
        ValueError: no such operation, parameter or number of operands, or operands that do not fit.
    """
    if name not in OPS:
        raise ValueError(describe_op(name))
    op = OPS[name]
    least, most = op.arity
    if not least <= len(types) or (most is not None and len(types) > most):
        wanted = str(least) if most == least else f"{least} or more" if most is None else f"{least} to {most}"
        raise ValueError(f"{name} takes {wanted} operands, got {len(types)}")
    if set(params) != set(op.params):
        raise ValueError(f"{name} takes the parameters {list(op.params)}, got {sorted(params)}")
    try:
        return op.infer(types, params)
    except (TypeError, KeyError, AttributeError) as error:
        raise ValueError(f"{name} cannot take the parameters {dict(params)!r}: {error}") from error


def compute(name: str, operands: Sequence[Operand], params: Params, device: torch.device) -> Tensor:
    """Return an operation's result.

    Args:
        name: of the operation.
        operands: tensors, or numbers.
        params: its parameters, which `infer_type` has accepted.
        device: of the result.
    """
    return OPS[name].run(operands, params).to(device)


def describe_op(name: object) -> str:
    """Say that there is no such operation, and which come near.

    Args:
        name: what was asked for.
    """
    near = difflib.get_close_matches(str(name), OPS, n=3)
    return f"no operation {name!r} in a trace; " + (
        f"did you mean {' or '.join(map(repr, near))}?" if near else f"there are {', '.join(OPS)}"
    )


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


def _tensor(operand: Operand, like: Tensor | None = None) -> Tensor:
    if isinstance(operand, Tensor):
        return operand
    if like is None or (isinstance(operand, float) and not like.is_floating_point()):
        return torch.as_tensor(operand, device=None if like is None else like.device)
    return torch.as_tensor(operand, dtype=like.dtype, device=like.device)


def _together(operands: Sequence[Operand]) -> list[Tensor]:
    """The operands as tensors; numbers take the precision of the first tensor."""
    like = next((one for one in operands if isinstance(one, Tensor)), None)
    return [_tensor(one, like) for one in operands]


# Makers of operations


def _pointwise(function: Callable[..., Tensor], arity: int, kind: Kind | None = None) -> TraceOp:
    return TraceOp(
        lambda types, params: broadcast_types(*types, kind=kind),
        lambda operands, params: function(*_together(operands)),
        (arity, arity),
    )


def _real(function: Callable[[Tensor], Tensor]) -> TraceOp:
    """An operation of one operand, entry by entry, whose result is real."""

    def infer(types: Sequence[TensorType], params: Params) -> TensorType:
        return replace(types[0], kind="float")

    return TraceOp(infer, lambda operands, params: function(_tensor(operands[0])), (1, 1))


def _arithmetic(function: Callable[[Tensor, Tensor], Tensor], real: bool = False) -> TraceOp:
    def infer(types: Sequence[TensorType], params: Params) -> TensorType:
        made = broadcast_types(*types)
        if made.kind == "bool":
            raise ValueError("truth values have no arithmetic: cast('int64') them first")
        return replace(made, kind="float") if real else made

    return TraceOp(infer, lambda operands, params: function(*_together(operands)), (2, 2))


def _reduction(function: Callable[[Tensor, list[int], bool], Tensor], real: bool = True) -> TraceOp:
    def infer(types: Sequence[TensorType], params: Params) -> TensorType:
        dropped = axes_of(types[0], params["axis"])
        if not dropped and params["axis"] is not None:
            raise ValueError("axis is an axis, a list of them, or None for all; got an empty list")
        if types[0].kind != "float" and real:
            raise ValueError(f"the operand holds {types[0].kind} values: cast('float32') it first")
        if types[0].kind == "bool":
            return replace(types[0].without(dropped, bool(params["keep"])), kind="int")
        return types[0].without(dropped, bool(params["keep"]))

    def run(operands: Sequence[Operand], params: Params) -> Tensor:
        x = _tensor(operands[0])
        axes = _positions(x, params["axis"])
        return function(x, axes, bool(params["keep"])) if axes else function(x[None], [0], False)

    return TraceOp(infer, run, (1, 1), ("axis", "keep"))


def _positions(x: Tensor, given: object) -> list[int]:
    """Axes as indices. Names were turned into indices when the operation was recorded."""
    if given is None:
        return list(range(x.ndim))
    return [_int(one) for one in given] if isinstance(given, (list, tuple)) else [_int(given)]


def _along(function: Callable[[Tensor, int], Tensor], kind: Kind | None = None, drop: bool = False) -> TraceOp:
    """An operation along one axis."""

    def infer(types: Sequence[TensorType], params: Params) -> TensorType:
        axis = types[0].axis(params["axis"])
        if types[0].kind == "bool" or (kind is None and not drop and types[0].kind != "float"):
            raise ValueError(f"the operand holds {types[0].kind} values: cast('float32') it first")
        made = types[0].without([axis]) if drop else types[0]
        return replace(made, kind=kind or made.kind)

    return TraceOp(
        infer, lambda operands, params: function(_tensor(operands[0]), _int(params["axis"])), (1, 1), ("axis",)
    )


def _int(given: object) -> int:
    assert isinstance(given, int)
    return given


# Single operations


def _clamp_type(types: Sequence[TensorType], params: Params) -> TensorType:
    bounds = [params["least"], params["most"]]
    if bounds == [None, None] or any(
        isinstance(one, bool) or not isinstance(one, int | float | None) for one in bounds
    ):
        raise ValueError(f"clamp needs least=, most= or both, as numbers; got {bounds}")
    return types[0]


def _clamp(operands: Sequence[Operand], params: Params) -> Tensor:
    return _tensor(operands[0]).clamp(_bound(params["least"]), _bound(params["most"]))


def _bound(given: object) -> float | None:
    assert given is None or isinstance(given, (int, float))
    return given


def _where_type(types: Sequence[TensorType], params: Params) -> TensorType:
    if types[0].kind != "bool":
        raise ValueError(f"the condition of where holds truth values, got {types[0].kind}: compare first")
    chosen = broadcast_types(*types[1:])
    return replace(broadcast_types(*types), kind=chosen.kind)


def _where(operands: Sequence[Operand], params: Params) -> Tensor:
    one, other = _together(operands[1:])
    return torch.where(_tensor(operands[0]), one, other)


def _topk_type(types: Sequence[TensorType], params: Params) -> TensorType:
    axis, k = types[0].axis(params["axis"]), params["k"]
    if not isinstance(k, int) or isinstance(k, bool) or not 1 <= k <= types[0].shape[axis]:
        raise ValueError(f"k is 1 to {types[0].shape[axis]}, the size of the axis; got {k!r}")
    shape = (*types[0].shape[:axis], k, *types[0].shape[axis + 1 :])
    axes = (*types[0].axes[:axis], "", *types[0].axes[axis + 1 :])
    return TensorType(axes, shape, types[0].kind)


def _matmul_type(types: Sequence[TensorType], params: Params) -> TensorType:
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


def _einsum_type(types: Sequence[TensorType], params: Params) -> TensorType:
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


def _einsum(operands: Sequence[Operand], params: Params) -> Tensor:
    before, after = str(params["equation"]).split("->", 1)
    terms, result = [term.split() for term in before.split(",")], after.split()
    letters: dict[str, int] = {}
    for term in (*terms, result):
        for name in term:
            letters.setdefault(name, len(letters))
    flat: list[object] = []
    for operand, term in zip(operands, terms, strict=True):
        flat += [_tensor(operand), [letters[name] for name in term]]
    made: Tensor = torch.einsum(*flat, [letters[name] for name in result])
    return made


def _gather_type(types: Sequence[TensorType], params: Params) -> TensorType:
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


def _gather(operands: Sequence[Operand], params: Params) -> Tensor:
    x, index = _tensor(operands[0]), _tensor(operands[1])
    axis = _int(params["axis"])
    if index.ndim < x.ndim:
        return x.gather(axis, index.unsqueeze(axis)).squeeze(axis)
    return x.gather(axis, index)


def _stack_type(types: Sequence[TensorType], params: Params) -> TensorType:
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


def _cat_type(types: Sequence[TensorType], params: Params) -> TensorType:
    axis = types[0].axis(params["axis"])
    for other in types[1:]:
        fits = len(other.shape) == len(types[0].shape) and other.kind == types[0].kind
        if not fits or other.without([axis]).shape != types[0].without([axis]).shape:
            raise ValueError(f"cat takes values that differ along one axis only, got {types[0]} and {other}")
    shape = list(types[0].shape)
    shape[axis] = sum(one.shape[axis] for one in types)
    return TensorType(types[0].axes, tuple(shape), types[0].kind)


def _split_type(types: Sequence[TensorType], params: Params) -> TensorType:
    axis, sizes = types[0].axis(params["axis"]), _whole(params["sizes"], "sizes", least=1)
    if math.prod(sizes) != types[0].shape[axis]:
        raise ValueError(f"the axis has {types[0].shape[axis]} entries, and the sizes {sizes} make {math.prod(sizes)}")
    shape, axes = types[0].shape, types[0].axes
    return TensorType(
        (*axes[:axis], *("" for _ in sizes), *axes[axis + 1 :]),
        (*shape[:axis], *sizes, *shape[axis + 1 :]),
        types[0].kind,
    )


def _merge_type(types: Sequence[TensorType], params: Params) -> TensorType:
    first, last = types[0].axis(params["first"]), types[0].axis(params["last"])
    if first >= last:
        raise ValueError(f"merge joins the axes from first to last, in this order; got {first} and {last}")
    shape, axes = types[0].shape, types[0].axes
    size = math.prod(shape[first : last + 1])
    return TensorType((*axes[:first], "", *axes[last + 1 :]), (*shape[:first], size, *shape[last + 1 :]), types[0].kind)


def _move_type(types: Sequence[TensorType], params: Params) -> TensorType:
    order = _whole(params["order"], "order", least=0)
    if sorted(order) != list(range(len(types[0].shape))):
        raise ValueError(f"order names each of the axes {types[0]} once, got {order}")
    return TensorType(tuple(types[0].axes[i] for i in order), tuple(types[0].shape[i] for i in order), types[0].kind)


def _expand_type(types: Sequence[TensorType], params: Params) -> TensorType:
    shape = tuple(_whole(params["shape"], "shape", least=0))
    if broadcast_shapes(types[0].shape, shape) != shape:
        raise ValueError(f"a value with axes {types[0]} does not broadcast to {shape}")
    return TensorType((*("" for _ in shape[len(types[0].shape) :]), *types[0].axes), shape, types[0].kind)


def _cast_type(types: Sequence[TensorType], params: Params) -> TensorType:
    if params["dtype"] not in _DTYPES:
        raise ValueError(f"dtype {params['dtype']!r} is none of {', '.join(_DTYPES)}")
    return replace(types[0], kind=_DTYPES[str(params["dtype"])][1])


def _randn_type(types: Sequence[TensorType], params: Params) -> TensorType:
    shape, seed = tuple(_whole(params["shape"], "shape", least=1)), params["seed"]
    if not isinstance(seed, int) or isinstance(seed, bool) or not 0 <= seed < 2**63:
        raise ValueError(f"seed is an integer from 0 to 2**63 - 1, got {seed!r}")
    return TensorType(("",) * len(shape), shape)


def _randn(operands: Sequence[Operand], params: Params) -> Tensor:
    generator = torch.Generator().manual_seed(_int(params["seed"]))
    return torch.randn(_whole(params["shape"], "shape", least=1), generator=generator)


def _select_type(types: Sequence[TensorType], params: Params) -> TensorType:
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


def _select(operands: Sequence[Operand], params: Params) -> Tensor:
    x, axis, entries = _tensor(operands[0]), _int(params["axis"]), params["entries"]
    if isinstance(entries, (list, tuple)):
        chosen = [_int(one) % x.shape[axis] for one in entries]
        return x.index_select(axis, torch.tensor(chosen, device=x.device))
    return x.select(axis, _int(entries))


def _whole(given: object, what: str, least: int) -> list[int]:
    if not isinstance(given, (list, tuple)) or any(not isinstance(one, int) or isinstance(one, bool) for one in given):
        raise ValueError(f"{what} is a list of integers, got {given!r}")
    whole = _ints(given)
    if any(one < least for one in whole):
        raise ValueError(f"{what} has entries of {least} or more, got {given!r}")
    return whole


def _ints(given: object) -> list[int]:
    assert isinstance(given, (list, tuple))
    return [_int(one) for one in given]


def _sum(x: Tensor, axes: list[int], keep: bool) -> Tensor:
    return x.sum(axes, keepdim=keep)


def _norm(x: Tensor, axes: list[int], keep: bool) -> Tensor:
    norm: Tensor = torch.linalg.vector_norm(x, dim=axes, keepdim=keep)
    return norm


OPS: dict[str, TraceOp] = {
    "add": _arithmetic(torch.add),
    "sub": _arithmetic(torch.sub),
    "mul": _arithmetic(torch.mul),
    "div": _arithmetic(torch.div, real=True),
    "pow": _arithmetic(torch.pow),
    "maximum": _arithmetic(torch.maximum),
    "minimum": _arithmetic(torch.minimum),
    "eq": _pointwise(torch.eq, 2, "bool"),
    "ne": _pointwise(torch.ne, 2, "bool"),
    "lt": _pointwise(torch.lt, 2, "bool"),
    "le": _pointwise(torch.le, 2, "bool"),
    "gt": _pointwise(torch.gt, 2, "bool"),
    "ge": _pointwise(torch.ge, 2, "bool"),
    "where": TraceOp(_where_type, _where, (3, 3)),
    "neg": _pointwise(torch.neg, 1),
    "abs": _pointwise(torch.abs, 1),
    "exp": _real(torch.exp),
    "log": _real(torch.log),
    "sqrt": _real(torch.sqrt),
    "relu": _pointwise(torch.relu, 1),
    "gelu": _real(functional.gelu),
    "sigmoid": _real(torch.sigmoid),
    "tanh": _real(torch.tanh),
    "clamp": TraceOp(_clamp_type, _clamp, (1, 1), ("least", "most")),
    "sum": _reduction(_sum, real=False),
    "mean": _reduction(lambda x, axes, keep: x.mean(axes, keepdim=keep)),
    "var": _reduction(lambda x, axes, keep: x.var(axes, correction=0, keepdim=keep)),
    "norm": _reduction(_norm),
    "amax": _reduction(lambda x, axes, keep: x.amax(axes, keepdim=keep), real=False),
    "logsumexp": _reduction(lambda x, axes, keep: x.logsumexp(axes, keepdim=keep)),
    "argmax": _along(lambda x, axis: x.argmax(axis), kind="int", drop=True),
    "cumsum": _along(lambda x, axis: x.cumsum(axis)),
    "softmax": _along(lambda x, axis: x.softmax(axis)),
    "log_softmax": _along(lambda x, axis: x.log_softmax(axis)),
    "topk_values": TraceOp(
        _topk_type,
        lambda operands, params: _tensor(operands[0]).topk(_int(params["k"]), _int(params["axis"])).values,
        (1, 1),
        ("k", "axis"),
    ),
    "topk_indices": TraceOp(
        lambda types, params: replace(_topk_type(types, params), kind="int"),
        lambda operands, params: _tensor(operands[0]).topk(_int(params["k"]), _int(params["axis"])).indices,
        (1, 1),
        ("k", "axis"),
    ),
    "matmul": TraceOp(_matmul_type, lambda operands, params: torch.matmul(*_together(operands)), (2, 2)),
    "einsum": TraceOp(_einsum_type, _einsum, (1, 3), ("equation",)),
    "select": TraceOp(_select_type, _select, (1, 1), ("axis", "entries")),
    "gather": TraceOp(_gather_type, _gather, (2, 2), ("axis",)),
    "cat": TraceOp(
        _cat_type, lambda operands, params: torch.cat(_together(operands), _int(params["axis"])), (1, None), ("axis",)
    ),
    "stack": TraceOp(
        _stack_type,
        lambda operands, params: torch.stack(_together(operands), _int(params["axis"])),
        (1, None),
        ("axis",),
    ),
    "split": TraceOp(
        _split_type,
        lambda operands, params: _tensor(operands[0]).unflatten(_int(params["axis"]), _ints(params["sizes"])),
        (1, 1),
        ("axis", "sizes"),
    ),
    "merge": TraceOp(
        _merge_type,
        lambda operands, params: _tensor(operands[0]).flatten(_int(params["first"]), _int(params["last"])),
        (1, 1),
        ("first", "last"),
    ),
    "move": TraceOp(
        _move_type, lambda operands, params: _tensor(operands[0]).permute(_ints(params["order"])), (1, 1), ("order",)
    ),
    "expand": TraceOp(
        _expand_type, lambda operands, params: _tensor(operands[0]).expand(_ints(params["shape"])), (1, 1), ("shape",)
    ),
    "cast": TraceOp(
        _cast_type,
        lambda operands, params: _tensor(operands[0]).to(_DTYPES[str(params["dtype"])][0]),
        (1, 1),
        ("dtype",),
    ),
    "randn": TraceOp(_randn_type, _randn, (0, 0), ("shape", "seed")),
}
_BUILT_IN = frozenset(OPS)


def register_op(name: str, op: TraceOp, *, replace: bool = False) -> None:
    """Add an operation to the table. A trace that uses it runs only where it is registered.

    Args:
        name: of the operation; those of the package cannot be taken.
        op: its rule and its computation.
        replace: take a name that has been registered before.

    Raises:
        ValueError: the name is taken, or is no identifier.
    """
    if not isinstance(name, str) or not name.isidentifier():
        raise ValueError(f"an operation's name is an identifier, got {name!r}")
    if name in _BUILT_IN or (name in OPS and OPS[name] is not op and not replace):
        raise ValueError(f"the operation {name!r} is there already: register yours under another name")
    OPS[name] = op
