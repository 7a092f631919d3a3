"""The table of operations: values against torch, types against what comes out, and what is refused."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from hooked_lm.tracing import OPS, TensorType, TraceError, TraceOp, register_op
from hooked_lm.tracing.ops import compute, infer_type
from tests.helpers import tiny_model

A = torch.randn(2, 3, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
B = torch.randn(3, 4, generator=torch.Generator().manual_seed(1), dtype=torch.float64).abs() + 0.1
M = torch.randn(2, 4, 5, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
INDEX = torch.tensor([[0, 3, 1], [2, 2, 0]])
CPU = torch.device("cpu")

Case = tuple[str, list[Any], dict[str, Any], Callable[[], Tensor]]
CASES: list[Case] = [
    ("add", [A, B], {}, lambda: A + B),
    ("add", [INDEX, 2], {}, lambda: INDEX + 2),
    ("sub", [B, A], {}, lambda: B - A),
    ("mul", [A, 0.3], {}, lambda: A * 0.3),
    ("div", [A, B], {}, lambda: A / B),
    ("div", [INDEX, 2], {}, lambda: INDEX / 2),
    ("pow", [B, 1.5], {}, lambda: B**1.5),
    ("maximum", [A, 0.25], {}, lambda: A.clamp(min=0.25)),
    ("minimum", [A, B], {}, lambda: torch.where(A < B, A, B)),
    ("eq", [INDEX, 2], {}, lambda: INDEX == 2),
    ("ne", [INDEX, 2], {}, lambda: INDEX != 2),
    ("lt", [A, B], {}, lambda: A < B),
    ("le", [A, 0.5], {}, lambda: A <= 0.5),
    ("gt", [A, B], {}, lambda: A > B),
    ("ge", [INDEX, 2], {}, lambda: INDEX >= 2),
    ("where", [A > 0, A, 0.5], {}, lambda: torch.where(A > 0, A, 0.5)),
    ("neg", [A], {}, lambda: -A),
    ("abs", [A], {}, lambda: A.abs()),
    ("exp", [A], {}, lambda: A.exp()),
    ("log", [B], {}, lambda: B.log()),
    ("sqrt", [B], {}, lambda: B.sqrt()),
    ("relu", [A], {}, lambda: A.clamp(min=0)),
    ("gelu", [A], {}, lambda: A * 0.5 * (1 + torch.erf(A / 2**0.5))),
    ("sigmoid", [A], {}, lambda: 1 / (1 + (-A).exp())),
    ("tanh", [A], {}, lambda: A.tanh()),
    ("clamp", [A], {"least": -0.5, "most": None}, lambda: A.clamp(min=-0.5)),
    ("sum", [A], {"axis": [0, 2], "keep": False}, lambda: A.sum((0, 2))),
    ("sum", [A > 0], {"axis": None, "keep": False}, lambda: (A > 0).sum()),
    ("mean", [A], {"axis": 1, "keep": True}, lambda: A.sum(1, keepdim=True) / 3),
    ("var", [A], {"axis": 2, "keep": False}, lambda: (A - A.mean(2, keepdim=True)).square().mean(2)),
    ("norm", [A], {"axis": [1, 2], "keep": False}, lambda: A.square().sum((1, 2)).sqrt()),
    ("amax", [A], {"axis": 0, "keep": False}, lambda: A.max(0).values),
    ("amax", [INDEX], {"axis": None, "keep": False}, lambda: INDEX.max()),
    ("logsumexp", [A], {"axis": 2, "keep": False}, lambda: A.exp().sum(2).log()),
    ("argmax", [A], {"axis": 2}, lambda: A.max(2).indices),
    ("cumsum", [A], {"axis": 1}, lambda: torch.stack([A[:, 0], A[:, :2].sum(1), A.sum(1)], 1)),
    ("softmax", [A], {"axis": 2}, lambda: A.exp() / A.exp().sum(2, keepdim=True)),
    ("log_softmax", [A], {"axis": 1}, lambda: A - A.exp().sum(1, keepdim=True).log()),
    ("topk_values", [A], {"k": 2, "axis": 2}, lambda: A.sort(2, descending=True).values[..., :2]),
    ("topk_indices", [A], {"k": 2, "axis": 2}, lambda: A.argsort(2, descending=True)[..., :2]),
    ("matmul", [A, M], {}, lambda: torch.einsum("bij,bjk->bik", A, M)),
    ("matmul", [A, B[0]], {}, lambda: (A * B[0]).sum(-1)),
    ("einsum", [A, B], {"equation": "x y z, y z -> x"}, lambda: (A * B).sum((1, 2))),
    ("select", [A], {"axis": 1, "entries": -1}, lambda: A[:, -1]),
    ("select", [A], {"axis": 2, "entries": [3, 0]}, lambda: A[:, :, [3, 0]]),
    (
        "gather",
        [A, INDEX],
        {"axis": 2},
        lambda: torch.stack([A[i, j, INDEX[i, j]] for i in range(2) for j in range(3)]).reshape(2, 3),
    ),
    ("gather", [A, INDEX[..., None]], {"axis": 2}, lambda: A.gather(2, INDEX[..., None])),
    ("cat", [A, A], {"axis": 1}, lambda: torch.cat((A, A), 1)),
    ("stack", [B, B], {"axis": 1}, lambda: torch.stack((B, B), 1)),
    ("split", [A], {"axis": 2, "sizes": [2, 2]}, lambda: A.reshape(2, 3, 2, 2)),
    ("merge", [A], {"first": 0, "last": 1}, lambda: A.reshape(6, 4)),
    ("move", [A], {"order": [2, 0, 1]}, lambda: A.permute(2, 0, 1)),
    ("expand", [B], {"shape": [2, 3, 4]}, lambda: torch.stack((B, B))),
    ("cast", [A], {"dtype": "int64"}, lambda: A.long()),
    ("randn", [], {"shape": [2, 3], "seed": 5}, lambda: torch.randn(2, 3, generator=torch.Generator().manual_seed(5))),
]


def type_of(operand: Any) -> TensorType:
    tensor = torch.as_tensor(operand)
    kind: Any = "float" if tensor.is_floating_point() else "bool" if tensor.dtype == torch.bool else "int"
    return TensorType(("",) * tensor.ndim, tuple(tensor.shape), kind)


@pytest.mark.parametrize("case", CASES, ids=[f"{index}-{case[0]}" for index, case in enumerate(CASES)])
def test_an_operation_gives_torchs_numbers_and_the_type_it_promised(case: Case) -> None:
    name, operands, params, wanted = case
    promised = infer_type(name, [type_of(one) for one in operands], params)
    found = compute(name, operands, params, CPU)
    assert tuple(found.shape) == promised.shape == tuple(wanted().shape)
    assert type_of(found).kind == promised.kind
    torch.testing.assert_close(found, wanted())


def test_every_operation_of_the_table_is_tried_here() -> None:
    assert {case[0] for case in CASES} == set(OPS)


def test_operations_never_write_to_their_operands() -> None:
    for name, operands, params, _ in CASES:
        before = [one.clone() for one in operands if isinstance(one, Tensor)]
        compute(name, operands, params, CPU)
        after = [one for one in operands if isinstance(one, Tensor)]
        assert all(torch.equal(one, other) for one, other in zip(before, after, strict=True)), name


REFUSED: list[tuple[str, list[Any], dict[str, Any], str]] = [
    ("add", [A, torch.zeros(5)], {}, "do not broadcast"),
    ("add", [A > 0, A > 0], {}, "no arithmetic"),
    ("add", [A], {}, "takes 2 operands, got 1"),
    ("eval", [A], {}, "no operation 'eval'"),
    ("sum", [A], {"axis": 3, "keep": False}, "no axis 3"),
    ("sum", [A], {"axis": 0}, "takes the parameters"),
    ("mean", [INDEX], {"axis": 0, "keep": False}, "int values"),
    ("where", [A, A, A], {}, "truth values"),
    ("topk_values", [A], {"k": 9, "axis": 2}, "k is 1 to 4"),
    ("matmul", [A, B], {}, "matmul takes"),
    ("einsum", [A, B], {"equation": "a b c, b a -> c"}, "names each axis once|has sizes"),
    ("einsum", [A], {"equation": "a b c -> d"}, "names axes of the operands"),
    ("select", [A], {"axis": 2, "entries": 4}, "entries 0-3"),
    ("gather", [A, A], {"axis": 2}, "takes indices"),
    ("stack", [A, B], {"axis": 0}, "one shape"),
    ("split", [A], {"axis": 2, "sizes": [3, 2]}, "make 6"),
    ("move", [A], {"order": [0, 0, 1]}, "each of the axes"),
    ("cast", [A], {"dtype": "complex64"}, "is none of"),
    ("randn", [], {"shape": [2], "seed": -1}, "seed"),
    ("clamp", [A], {"least": None, "most": None}, "least="),
]


@pytest.mark.parametrize(("name", "operands", "params", "message"), REFUSED)
def test_what_does_not_fit_is_refused_before_it_runs(
    name: str, operands: list[Any], params: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        infer_type(name, [type_of(one) for one in operands], params)


def test_an_own_operation_is_registered_by_name_and_those_of_the_package_stay() -> None:
    double = TraceOp(lambda types, params: types[0], lambda operands, params: torch.as_tensor(operands[0]) * 2, (1, 1))
    register_op("double_for_this_test", double)
    try:
        with tiny_model().trace() as t:
            value = t.op("double_for_this_test", torch.ones(2)).save()
        assert value.value.tolist() == [2.0, 2.0]
        with pytest.raises(ValueError, match="there already"):
            register_op("add", double)
    finally:
        del OPS["double_for_this_test"]


def test_operators_of_values_take_tensors_and_numbers_on_either_side() -> None:
    with tiny_model().trace() as t:
        x = t.constant(torch.tensor([1.0, 2.0]))
        made = [
            (torch.ones(2) + x, [2.0, 3.0]),
            (3 - x, [2.0, 1.0]),
            (torch.ones(2) * x, [1.0, 2.0]),
            (2 / x, [2.0, 1.0]),
            (x**2, [1.0, 4.0]),
            (-x, [-1.0, -2.0]),
            (abs(-x), [1.0, 2.0]),
            (torch.eye(2) @ x, [1.0, 2.0]),
            (x[::1], [1.0, 2.0]),
            (t.maximum(x, 1.5), [1.5, 2.0]),
            (t.where(x > 1.5, x, 0.0), [0.0, 2.0]),
        ]
        for value, _ in made:
            value.save()
    for value, wanted in made:
        assert value.value.tolist() == wanted


@pytest.mark.parametrize("use", [bool, float, int, len, list, lambda x: torch.ones(2)[x], lambda x: 1 if x else 0])
def test_what_needs_numbers_raises_and_says_what_to_do(use: Callable[[Any], Any]) -> None:
    value = tiny_model().trace(run=False).constant(torch.tensor([1.0, 2.0]))
    with pytest.raises((TraceError, TypeError), match=r"before the trace has run|interpreted as an ind|index"):
        use(value)
