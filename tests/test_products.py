"""The product of few rows with a matrix is `F.linear`'s, shared out among threads."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from hooked_lm.components import products


@pytest.fixture(params=[1, 2, 3])
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


@pytest.fixture
def small_is_shared(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(products, "_WORTH_SHARING", 1)


def matrix(kind: str, d_out: int, d_in: int) -> torch.Tensor:
    """A weight [d_out d_in] that is stored in one of the ways that checkpoints have."""
    generator = torch.Generator().manual_seed(0)
    if kind == "[d_out d_in]":
        return torch.randn(d_out, d_in, generator=generator, dtype=torch.float64)
    if kind == "[d_in d_out]":
        return torch.randn(d_in, d_out, generator=generator, dtype=torch.float64).T
    return torch.randn(d_in, 3 * d_out, generator=generator, dtype=torch.float64)[:, d_out : 2 * d_out].T


def refuse(*args: Any) -> None:
    raise AssertionError("F.linear was called")


@pytest.mark.usefixtures("small_is_shared")
@pytest.mark.parametrize("kind", ["[d_out d_in]", "[d_in d_out]", "columns of a wider one"])
@pytest.mark.parametrize(("d_out", "d_in"), [(12, 18), (7, 5), (2, 1), (1, 7)])
@pytest.mark.parametrize("biased", [True, False])
def test_few_rows_give_what_linear_gives(kind: str, d_out: int, d_in: int, biased: bool, threads: int) -> None:
    weight, bias = matrix(kind, d_out, d_in), torch.arange(d_out).double() if biased else None
    for shape in ((1, 1, d_in), (1, d_in), (d_in,), (3, d_in), (2, 4, d_in)):
        x = torch.randn(shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
        torch.testing.assert_close(products.linear(x, weight, bias), F.linear(x, weight, bias), rtol=0, atol=1e-13)


@pytest.mark.usefixtures("small_is_shared")
def test_few_rows_are_shared_out_and_many_are_not(threads: int, monkeypatch: pytest.MonkeyPatch) -> None:
    weight, row = matrix("[d_out d_in]", 12, 18), torch.ones(1, 1, 18, dtype=torch.float64)
    monkeypatch.setattr(F, "linear", refuse)
    for rows in (row, row.expand(2, 8, 18)):
        products.linear(rows, weight)
        if threads > 1:
            products.linear(rows, matrix("[d_in d_out]", 12, 18))
    with pytest.raises(AssertionError, match="was called"):
        products.linear(row.expand(1, 17, 18), weight)


@pytest.mark.usefixtures("small_is_shared")
def test_gradients_go_through_linear(monkeypatch: pytest.MonkeyPatch) -> None:
    weight, row = matrix("[d_out d_in]", 12, 18), torch.ones(1, 18, dtype=torch.float64, requires_grad=True)
    products.linear(row, weight).sum().backward()
    torch.testing.assert_close(row.grad, weight.sum(0, keepdim=True))
    monkeypatch.setattr(F, "linear", refuse)
    with pytest.raises(AssertionError, match="was called"):
        products.linear(row, weight)
    with torch.no_grad():
        products.linear(row, weight)


def test_small_matrices_and_half_precision_are_left_to_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(F, "linear", refuse)
    products.linear(torch.ones(1, 512), torch.ones(512, 512))
    for dtype, size in ((torch.float32, 64), (torch.bfloat16, 512)):
        with pytest.raises(AssertionError, match="was called"):
            products.linear(torch.ones(1, size, dtype=dtype), torch.ones(size, size, dtype=dtype))
