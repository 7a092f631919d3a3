"""FactoredMatrix: the algebra of the product, without the product."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from hooked_lm import FactoredMatrix
from hooked_lm.utils import composition_scores
from tests.helpers import LargestTensor

EXACT = {"rtol": 1e-10, "atol": 1e-10}


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def factored(
    ldim: int = 5, mdim: int = 2, rdim: int = 4, leading: tuple[int, ...] = (), seed: int = 0
) -> FactoredMatrix:
    return FactoredMatrix(randn(*leading, ldim, mdim, seed=seed), randn(*leading, mdim, rdim, seed=seed + 1))


def dense(matrix: FactoredMatrix) -> Tensor:
    A, B = matrix.pair
    return torch.einsum("...lm,...mr->...lr", A, B)


sizes = st.integers(1, 5)
leadings = st.lists(st.integers(1, 3), max_size=2).map(tuple)


@st.composite
def factored_matrices(draw: st.DrawFn, square: bool = False) -> FactoredMatrix:
    ldim, mdim = draw(sizes), draw(sizes)
    rdim = ldim if square else draw(sizes)
    return factored(ldim, mdim, rdim, draw(leadings), draw(st.integers(0, 99)))


# Shape and parts


@given(factored_matrices())
def test_it_has_the_shape_and_entries_of_the_product(matrix: FactoredMatrix) -> None:
    full = dense(matrix)
    assert matrix.shape == full.shape
    assert matrix.ndim == full.ndim
    assert matrix.has_leading_dims == (full.ndim > 2)
    assert (matrix.ldim, matrix.rdim, matrix.mdim) == (*full.shape[-2:], matrix.A.shape[-1])
    torch.testing.assert_close(matrix.AB, full, **EXACT)
    assert matrix.pair == (matrix.A, matrix.B)


def test_leading_axes_broadcast() -> None:
    A, B = randn(3, 1, 5, 2), randn(4, 2, 6)
    matrix = FactoredMatrix(A, B)
    assert matrix.shape == (3, 4, 5, 6)
    assert matrix.A.shape == (3, 4, 5, 2)
    assert matrix.B.shape == (3, 4, 2, 6)
    torch.testing.assert_close(matrix.AB, A @ B, **EXACT)
    assert matrix.A.data_ptr() == A.data_ptr()


@pytest.mark.parametrize(
    ("A", "B", "message"),
    [
        ((5, 2), (3, 4), r"cannot multiply A with shape \(5, 2\) and B with shape \(3, 4\)"),
        ((3, 5, 2), (4, 2, 6), r"the leading axes of A \(3, 5, 2\) and B \(4, 2, 6\) do not broadcast"),
    ],
)
def test_factors_that_do_not_fit_raise(A: tuple[int, ...], B: tuple[int, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        FactoredMatrix(randn(*A), randn(*B))


# Products


@given(factored_matrices())
def test_the_transpose_is_that_of_the_product(matrix: FactoredMatrix) -> None:
    torch.testing.assert_close(matrix.T.AB, dense(matrix).mT, **EXACT)
    assert matrix.T.mdim == matrix.mdim


@given(factored_matrices(), st.integers(1, 6), st.integers(1, 6))
def test_products_of_two_factored_matrices_are_factored_through_the_narrower_one(
    left: FactoredMatrix, mdim: int, rdim: int
) -> None:
    right = factored(left.rdim, mdim, rdim, tuple(left.shape[:-2]), seed=7)
    product = left @ right
    assert isinstance(product, FactoredMatrix)
    assert product.mdim == min(left.mdim, mdim)
    torch.testing.assert_close(product.AB, dense(left) @ dense(right), **EXACT)


@given(factored_matrices(), sizes)
def test_products_with_plain_matrices_on_either_side_stay_factored(matrix: FactoredMatrix, size: int) -> None:
    right, left = randn(matrix.rdim, size, seed=3), randn(size, matrix.ldim, seed=4)
    assert isinstance(matrix @ right, FactoredMatrix)
    assert isinstance(left @ matrix, FactoredMatrix)
    torch.testing.assert_close((matrix @ right).AB, dense(matrix) @ right, **EXACT)
    torch.testing.assert_close((left @ matrix).AB, left @ dense(matrix), **EXACT)
    stack = randn(*matrix.shape[:-2], size, matrix.ldim, seed=5)
    torch.testing.assert_close((stack @ matrix).AB, stack @ dense(matrix), **EXACT)


@given(factored_matrices())
def test_products_with_vectors_are_plain_tensors(matrix: FactoredMatrix) -> None:
    right, left = randn(matrix.rdim, seed=3), randn(matrix.ldim, seed=4)
    torch.testing.assert_close(matrix @ right, dense(matrix) @ right, **EXACT)
    torch.testing.assert_close(left @ matrix, left @ dense(matrix), **EXACT)


def test_products_broadcast_over_leading_axes() -> None:
    left, right = factored(leading=(3, 1)), factored(4, 3, 2, leading=(4,), seed=5)
    torch.testing.assert_close((left @ right).AB, dense(left) @ dense(right), **EXACT)
    stack = randn(4, 4, 2, seed=9)
    torch.testing.assert_close((left @ stack).AB, dense(left) @ stack, **EXACT)


def test_parameters_multiply_from_the_left_too() -> None:
    matrix, weight = factored(), torch.nn.Parameter(randn(3, 5, seed=2))
    torch.testing.assert_close((weight @ matrix).AB, weight @ dense(matrix), **EXACT)
    torch.testing.assert_close(torch.matmul(weight, matrix).AB, weight @ dense(matrix), **EXACT)


@given(factored_matrices(), st.floats(-3, 3))
def test_a_number_scales_the_product_from_either_side(matrix: FactoredMatrix, number: float) -> None:
    for scaled in (matrix * number, number * matrix, matrix * torch.tensor(number), torch.tensor(number) * matrix):
        assert isinstance(scaled, FactoredMatrix)
        torch.testing.assert_close(scaled.AB, number * dense(matrix), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    ("operation", "error", "message"),
    [
        (lambda m: m @ randn(5, 2), ValueError, r"cannot multiply a FactoredMatrix \(5, 4\) with \(5, 2\)"),
        (lambda m: m @ randn(3), ValueError, r"cannot multiply a FactoredMatrix \(5, 4\) with \(3,\)"),
        (lambda m: randn(3) @ m, ValueError, r"cannot multiply a FactoredMatrix \(5, 4\) with \(3,\)"),
        (lambda m: randn(2, 4) @ m, ValueError, r"cannot multiply a FactoredMatrix \(5, 4\) with \(2, 4\)"),
        (lambda m: m @ m, ValueError, r"cannot multiply a FactoredMatrix \(5, 4\) with \(5, 4\)"),
        (lambda m: m @ 3, TypeError, "unsupported operand"),
        (lambda m: m * randn(5, 4), TypeError, "scaled by a number"),
        (lambda m: m.BA, ValueError, r"BA needs a square product; this one has shape \(5, 4\)"),
        (lambda m: m.eigenvalues, ValueError, "square"),
    ],
)
def test_operations_that_make_no_sense_raise(
    operation: Callable[[FactoredMatrix], Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        operation(factored())


# Spectrum


@given(factored_matrices())
def test_the_singular_vectors_and_values_are_those_of_the_product(matrix: FactoredMatrix) -> None:
    U, S, V = matrix.svd()
    rank = min(matrix.ldim, matrix.mdim, matrix.rdim)
    leading = matrix.shape[:-2]
    assert U.shape == (*leading, matrix.ldim, rank)
    assert S.shape == (*leading, rank)
    assert V.shape == (*leading, matrix.rdim, rank)
    torch.testing.assert_close(U @ torch.diag_embed(S) @ V.mT, dense(matrix), **EXACT)
    torch.testing.assert_close(S, torch.linalg.svdvals(dense(matrix))[..., :rank], **EXACT)
    for columns in (U, V):
        torch.testing.assert_close(columns.mT @ columns, torch.eye(rank).double().expand(*leading, -1, -1), **EXACT)
    for got, expected in ((matrix.U, U), (matrix.S, S), (matrix.V, V), (matrix.Vh, V.mT)):
        assert torch.equal(got, expected)


@given(factored_matrices())
def test_the_norm_is_that_of_the_product(matrix: FactoredMatrix) -> None:
    torch.testing.assert_close(matrix.norm(), torch.linalg.matrix_norm(dense(matrix)), **EXACT)


@given(factored_matrices(square=True))
def test_the_eigenvalues_are_the_products_up_to_zeros(matrix: FactoredMatrix) -> None:
    ours = matrix.eigenvalues
    assert ours.shape == (*matrix.shape[:-2], matrix.mdim)
    # Power sums determine the non-zero eigenvalues, and need no order.
    power = torch.eye(matrix.ldim).double()
    for k in range(1, 4):
        power = power @ dense(matrix)
        trace = power.diagonal(dim1=-2, dim2=-1).sum(-1)
        torch.testing.assert_close((ours**k).sum(-1).real, trace, rtol=1e-8, atol=1e-8)
    torch.testing.assert_close(matrix.BA, matrix.B @ matrix.A, **EXACT)


def test_eigenvalues_may_be_complex() -> None:
    turn = FactoredMatrix(torch.tensor([[0.0, -1.0], [1.0, 0.0]]), torch.eye(2))
    assert sorted(turn.eigenvalues.imag.tolist()) == pytest.approx([-1, 1])


@given(factored_matrices())
def test_making_even_shares_the_singular_values_and_keeps_the_product(matrix: FactoredMatrix) -> None:
    even = matrix.make_even()
    torch.testing.assert_close(even.AB, dense(matrix), **EXACT)
    expected = torch.diag_embed(matrix.S)
    torch.testing.assert_close(even.A.mT @ even.A, expected, **EXACT)
    torch.testing.assert_close(even.B @ even.B.mT, expected, **EXACT)


@given(factored_matrices())
def test_collapsing_a_side_keeps_the_gram_matrix_of_the_other(matrix: FactoredMatrix) -> None:
    full = dense(matrix)
    left, right = matrix.collapse_l(), matrix.collapse_r()
    rank = min(matrix.ldim, matrix.mdim, matrix.rdim)
    assert left.shape == (*matrix.shape[:-2], rank, matrix.rdim)
    assert right.shape == (*matrix.shape[:-2], matrix.ldim, rank)
    torch.testing.assert_close(left.mT @ left, full.mT @ full, **EXACT)
    torch.testing.assert_close(right @ right.mT, full @ full.mT, **EXACT)


# Indexing

INDICES: list[Any] = [
    0,
    -1,
    (1, -2),
    (slice(None), 2),
    (0, 1, 3),
    (0, 1, -1, -2),
    (0, 1, slice(1, 4), slice(None, None, 2)),
    (..., 0),
    (..., slice(1, 3), slice(0, 2)),
    (Ellipsis,),
    (0, ..., 1),
    (slice(1), slice(None), [0, 2]),
    (torch.tensor([0, 1]), 1),
    (0, slice(None), slice(None), torch.tensor([3, 0])),
    (slice(None), slice(None), slice(None), [True, False, False, True]),
]


@pytest.mark.parametrize("index", INDICES, ids=str)
def test_indexing_is_that_of_the_product_and_stays_factored(index: Any) -> None:
    matrix = factored(leading=(2, 3))
    got = matrix[index]
    assert isinstance(got, FactoredMatrix)
    assert got.mdim == matrix.mdim

    # A single row or column keeps its axis.
    parts = list(index) if isinstance(index, tuple) else [index]
    if any(part is Ellipsis for part in parts):
        at = next(i for i, part in enumerate(parts) if part is Ellipsis)
        parts[at : at + 1] = [slice(None)] * (5 - len(parts))
    for axis in (2, 3):
        if len(parts) > axis and isinstance(parts[axis], int):
            parts[axis] = [parts[axis]]
    expected = dense(matrix)
    for axis in (3, 2, 1, 0):
        if len(parts) > axis:
            expected = expected[(slice(None),) * axis + (parts[axis],)]
    torch.testing.assert_close(got.AB, expected, **EXACT)


@pytest.mark.parametrize(
    ("index", "message"),
    [
        ((0, 0, 5), "index 5 is out of range for an axis of length 5"),
        ((0, 0, -6), "index -6 is out of range for an axis of length 5"),
        ((0, 0, 0, 4), "index 4 is out of range for an axis of length 4"),
        ((2,), "out of (range|bounds)"),
        ((0, 0, 0, 0, 0), r"5 indices for a FactoredMatrix with 4 axes, shape \(2, 3, 5, 4\)"),
        ((None,), "use unsqueeze"),
        ((..., 0, ...), "one ellipsis at most"),
    ],
)
def test_an_index_that_is_not_there_raises(index: Any, message: str) -> None:
    with pytest.raises(IndexError, match=message):
        factored(leading=(2, 3))[index]


def test_unsqueeze_adds_a_leading_axis() -> None:
    matrix = factored(leading=(2, 3))
    for k, shape in ((0, (1, 2, 3, 5, 4)), (1, (2, 1, 3, 5, 4)), (2, (2, 3, 1, 5, 4)), (-3, (2, 3, 1, 5, 4))):
        assert matrix.unsqueeze(k).shape == shape
        torch.testing.assert_close(matrix.unsqueeze(k).AB, dense(matrix).unsqueeze(k), **EXACT)
    for k in (3, -1, -2, -6):
        with pytest.raises(IndexError, match=rf"unsqueeze\({k}\): only leading axes can be added, at 0-2"):
            matrix.unsqueeze(k)


def test_the_corner_is_that_of_the_product() -> None:
    matrix = factored(leading=(2,))
    torch.testing.assert_close(matrix.get_corner(), dense(matrix)[:, :3, :3], **EXACT)
    torch.testing.assert_close(matrix.get_corner(2), dense(matrix)[:, :2, :2], **EXACT)


def test_its_text_names_its_sizes() -> None:
    assert repr(factored(leading=(2,))) == "FactoredMatrix(shape=(2, 5, 4), mdim=2, dtype=torch.float64)"


# Composition


def frobenius(x: Tensor) -> Tensor:
    return x.pow(2).sum((-2, -1)).sqrt()


def test_composition_scores_every_left_against_every_right() -> None:
    left, right = factored(5, 2, 6, leading=(2, 3)), factored(6, 3, 4, leading=(4,), seed=5)
    scores = composition_scores(left, right)
    assert scores.shape == (2, 3, 4)
    L, R = dense(left)[:, :, None], dense(right)
    torch.testing.assert_close(scores, frobenius(L @ R) / (frobenius(L) * frobenius(R)), **EXACT)
    assert (scores > 0).all()
    assert (scores < 1).all()


@given(st.lists(st.integers(1, 3), max_size=2).map(tuple), leadings, sizes, sizes, sizes, sizes, sizes)
def test_composition_scores_equal_the_dense_formula_for_any_sizes(
    left_leading: tuple[int, ...],
    right_leading: tuple[int, ...],
    ldim: int,
    mdim: int,
    inner: int,
    other_mdim: int,
    rdim: int,
) -> None:
    left = factored(ldim, mdim, inner, left_leading)
    right = factored(inner, other_mdim, rdim, right_leading, seed=5)
    L = dense(left)[(...,) + (None,) * len(right_leading) + (slice(None), slice(None))]
    R = dense(right)
    expected = frobenius(L @ R) / (frobenius(L) * frobenius(R))
    torch.testing.assert_close(composition_scores(left, right), expected, **EXACT)


def test_composition_scores_may_pair_left_with_right() -> None:
    left, right = factored(5, 2, 6, leading=(2, 3)), factored(6, 3, 4, leading=(2, 3), seed=5)
    L, R = dense(left), dense(right)
    expected = frobenius(L @ R) / (frobenius(L) * frobenius(R))
    scores = composition_scores(left, right, broadcast_dims=False)
    assert scores.shape == (2, 3)
    torch.testing.assert_close(scores, expected, **EXACT)


def test_composition_of_matrices_that_do_not_fit_raises() -> None:
    with pytest.raises(ValueError, match=r"composition of \(5, 4\) with \(5, 4\): inner dimensions differ"):
        composition_scores(factored(), factored())


@pytest.mark.parametrize("broadcast_dims", [True, False])
def test_no_product_is_multiplied_out_on_the_way(broadcast_dims: bool) -> None:
    size, narrow = 200, 2
    left, right = factored(size, narrow, size), factored(size, narrow, size, seed=3)
    operations: list[Callable[[], Any]] = [
        lambda: composition_scores(left, right, broadcast_dims),
        lambda: (left @ right).norm(),
        lambda: left.svd(),
        lambda: left.eigenvalues,
        lambda: left.make_even(),
        lambda: left.collapse_l(),
        lambda: left.collapse_r(),
        lambda: (2 * left).T[3:5].get_corner(),
        lambda: randn(size) @ left @ randn(size),
    ]
    for operation in operations:
        with LargestTensor() as spy:
            operation()
        # The factors' own size is fine, size * size is not.
        assert 0 < spy.numbers <= 2 * size * narrow
    with LargestTensor() as spy:
        _ = left.AB
    assert spy.numbers == size * size


@pytest.mark.parametrize("index", [torch.tensor(2), np.int64(2)])
def test_an_index_that_is_a_number_in_another_form_is_a_number(index: Any) -> None:
    matrix = FactoredMatrix(torch.randn(4, 5, 3), torch.randn(4, 3, 6))
    assert torch.equal(matrix[:, index].AB, matrix[:, 2].AB)
    assert torch.equal(matrix[:, :, index].AB, matrix[:, :, 2].AB)
    assert matrix[index].shape == (5, 6)


def test_lists_of_indices_on_different_axes_are_not_paired_up() -> None:
    matrix = FactoredMatrix(torch.randn(4, 5, 3), torch.randn(4, 3, 6))
    expected = matrix.AB[[0, 1]][:, [1, 2, 3]][:, :, [5, 0]]
    torch.testing.assert_close(matrix[[0, 1], [1, 2, 3], [5, 0]].AB, expected)


# Low precision: computed in float32, rounded once


LOW = (torch.bfloat16, torch.float16)


def low_and_single(dtype: torch.dtype, rdim: int = 6, seed: int = 0) -> tuple[FactoredMatrix, FactoredMatrix]:
    """A matrix in low precision, and the same numbers in float32."""
    low = FactoredMatrix(randn(3, 6, 2, seed=seed).to(dtype), randn(3, 2, rdim, seed=seed + 1).to(dtype))
    return low, FactoredMatrix(low.A.float(), low.B.float())


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("dtype", LOW, ids=str)
def test_low_precision_is_computed_in_single_and_rounded_once(dtype: torch.dtype, autocast: bool) -> None:
    low, single = low_and_single(dtype)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        found = (*low.svd(), low.U, low.S, low.V, low.Vh, low.norm(), *low.make_even().pair, low.collapse_l())
        found += (low.collapse_r(), composition_scores(low, low), composition_scores(low, low, broadcast_dims=False))
        eigenvalues = low.eigenvalues
    expected = (*single.svd(), single.U, single.S, single.V, single.Vh, single.norm(), *single.make_even().pair)
    expected += (single.collapse_l(), single.collapse_r(), composition_scores(single, single))
    expected += (composition_scores(single, single, broadcast_dims=False),)
    for one, other in zip(found, expected, strict=True):
        assert one.dtype == dtype
        assert torch.equal(one, other.to(dtype))
    assert torch.equal(eigenvalues, single.eigenvalues)


@pytest.mark.parametrize("dtype", LOW, ids=str)
def test_low_precision_multiplies_indexes_and_has_corners(dtype: torch.dtype) -> None:
    low, single = low_and_single(dtype)
    vector = randn(6).to(dtype)
    pairs = [
        (low.AB, single.AB),
        (low.BA, single.BA),
        (low.T.AB, single.T.AB),
        (low.get_corner(), single.get_corner()),
        (low @ vector, single @ vector.float()),
        ((low @ low).AB, (single @ single).AB),
        (low[1, 2:, :3].AB, single[1, 2:, :3].AB),
        ((2 * low).AB, (2 * single).AB),
    ]
    for found, expected in pairs:
        assert found.dtype == dtype
        assert torch.allclose(found.float(), expected, rtol=0, atol=float(expected.abs().max()) * 0.03)


def test_factors_of_two_precisions_have_the_wider() -> None:
    mixed = FactoredMatrix(randn(4, 2).bfloat16(), randn(2, 4))
    assert mixed.dtype == torch.float64
    assert [one.dtype for one in mixed.svd()] == [torch.float64] * 3
    assert mixed.norm().dtype == torch.float64
