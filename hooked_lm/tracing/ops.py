"""The closed table of operations in a trace. Each knows the type of its result before it runs.

None writes to its operands, none has a result whose shape depends on values, none takes a function or a path.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn import functional

from hooked_lm.tracing.op_rules import (
    DTYPES,
    Operand,
    Params,
    as_int,
    as_ints,
    as_tensor,
    as_tensors,
    axes_of,
    axis_indices,
    cast_type,
    cat_type,
    choose,
    clamp,
    clamp_type,
    contract,
    draw,
    einsum_type,
    expand_type,
    gather,
    gather_type,
    matmul_type,
    merge_type,
    move_type,
    norm_over,
    randn_type,
    select,
    select_type,
    split_type,
    stack_type,
    sum_over,
    topk_type,
    where_type,
)
from hooked_lm.tracing.types import Kind, TensorType, broadcast_types

__all__ = ["OPS", "Operand", "Params", "TraceOp", "compute", "describe_op", "infer_type", "register_op"]

Infer = Callable[[Sequence[TensorType], Params], TensorType]
Run = Callable[[Sequence[Operand], Params], Tensor]


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


# Makers of operations


def _pointwise(function: Callable[..., Tensor], arity: int, kind: Kind | None = None) -> TraceOp:
    return TraceOp(
        lambda types, params: broadcast_types(*types, kind=kind),
        lambda operands, params: function(*as_tensors(operands)),
        (arity, arity),
    )


def _real(function: Callable[[Tensor], Tensor]) -> TraceOp:
    """An operation of one operand, entry by entry, whose result is real."""

    def infer(types: Sequence[TensorType], params: Params) -> TensorType:
        return replace(types[0], kind="float")

    return TraceOp(infer, lambda operands, params: function(as_tensor(operands[0])), (1, 1))


def _arithmetic(function: Callable[[Tensor, Tensor], Tensor], real: bool = False) -> TraceOp:
    def infer(types: Sequence[TensorType], params: Params) -> TensorType:
        made = broadcast_types(*types)
        if made.kind == "bool":
            raise ValueError("truth values have no arithmetic: cast('int64') them first")
        return replace(made, kind="float") if real else made

    return TraceOp(infer, lambda operands, params: function(*as_tensors(operands)), (2, 2))


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
        x = as_tensor(operands[0])
        axes = axis_indices(x, params["axis"])
        return function(x, axes, bool(params["keep"])) if axes else function(x[None], [0], False)

    return TraceOp(infer, run, (1, 1), ("axis", "keep"))


def _along(function: Callable[[Tensor, int], Tensor], kind: Kind | None = None, drop: bool = False) -> TraceOp:
    """An operation along one axis."""

    def infer(types: Sequence[TensorType], params: Params) -> TensorType:
        axis = types[0].axis(params["axis"])
        if types[0].kind == "bool" or (kind is None and not drop and types[0].kind != "float"):
            raise ValueError(f"the operand holds {types[0].kind} values: cast('float32') it first")
        made = types[0].without([axis]) if drop else types[0]
        return replace(made, kind=kind or made.kind)

    return TraceOp(
        infer, lambda operands, params: function(as_tensor(operands[0]), as_int(params["axis"])), (1, 1), ("axis",)
    )


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
    "where": TraceOp(where_type, choose, (3, 3)),
    "neg": _pointwise(torch.neg, 1),
    "abs": _pointwise(torch.abs, 1),
    "exp": _real(torch.exp),
    "log": _real(torch.log),
    "sqrt": _real(torch.sqrt),
    "relu": _pointwise(torch.relu, 1),
    "gelu": _real(functional.gelu),
    "sigmoid": _real(torch.sigmoid),
    "tanh": _real(torch.tanh),
    "clamp": TraceOp(clamp_type, clamp, (1, 1), ("least", "most")),
    "sum": _reduction(sum_over, real=False),
    "mean": _reduction(lambda x, axes, keep: x.mean(axes, keepdim=keep)),
    "var": _reduction(lambda x, axes, keep: x.var(axes, correction=0, keepdim=keep)),
    "norm": _reduction(norm_over),
    "amax": _reduction(lambda x, axes, keep: x.amax(axes, keepdim=keep), real=False),
    "logsumexp": _reduction(lambda x, axes, keep: x.logsumexp(axes, keepdim=keep)),
    "argmax": _along(lambda x, axis: x.argmax(axis), kind="int", drop=True),
    "cumsum": _along(lambda x, axis: x.cumsum(axis)),
    "softmax": _along(lambda x, axis: x.softmax(axis)),
    "log_softmax": _along(lambda x, axis: x.log_softmax(axis)),
    "topk_values": TraceOp(
        topk_type,
        lambda operands, params: as_tensor(operands[0]).topk(as_int(params["k"]), as_int(params["axis"])).values,
        (1, 1),
        ("k", "axis"),
    ),
    "topk_indices": TraceOp(
        lambda types, params: replace(topk_type(types, params), kind="int"),
        lambda operands, params: as_tensor(operands[0]).topk(as_int(params["k"]), as_int(params["axis"])).indices,
        (1, 1),
        ("k", "axis"),
    ),
    "matmul": TraceOp(matmul_type, lambda operands, params: torch.matmul(*as_tensors(operands)), (2, 2)),
    "einsum": TraceOp(einsum_type, contract, (1, 3), ("equation",)),
    "select": TraceOp(select_type, select, (1, 1), ("axis", "entries")),
    "gather": TraceOp(gather_type, gather, (2, 2), ("axis",)),
    "cat": TraceOp(
        cat_type, lambda operands, params: torch.cat(as_tensors(operands), as_int(params["axis"])), (1, None), ("axis",)
    ),
    "stack": TraceOp(
        stack_type,
        lambda operands, params: torch.stack(as_tensors(operands), as_int(params["axis"])),
        (1, None),
        ("axis",),
    ),
    "split": TraceOp(
        split_type,
        lambda operands, params: as_tensor(operands[0]).unflatten(as_int(params["axis"]), as_ints(params["sizes"])),
        (1, 1),
        ("axis", "sizes"),
    ),
    "merge": TraceOp(
        merge_type,
        lambda operands, params: as_tensor(operands[0]).flatten(as_int(params["first"]), as_int(params["last"])),
        (1, 1),
        ("first", "last"),
    ),
    "move": TraceOp(
        move_type, lambda operands, params: as_tensor(operands[0]).permute(as_ints(params["order"])), (1, 1), ("order",)
    ),
    "expand": TraceOp(
        expand_type,
        lambda operands, params: as_tensor(operands[0]).expand(as_ints(params["shape"])),
        (1, 1),
        ("shape",),
    ),
    "cast": TraceOp(
        cast_type,
        lambda operands, params: as_tensor(operands[0]).to(DTYPES[str(params["dtype"])][0]),
        (1, 1),
        ("dtype",),
    ),
    "randn": TraceOp(randn_type, draw, (0, 0), ("shape", "seed")),
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
