"""Slice: one index along one axis."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from hooked_lm import Slice, utils


@st.composite
def axes_and_indices(draw: st.DrawFn) -> tuple[np.ndarray, int, Any, Any]:
    """An array, an axis, what to slice it with, and the same index in numpy's words."""
    shape = draw(st.lists(st.integers(1, 4), min_size=1, max_size=4))
    axis = draw(st.integers(-len(shape), len(shape) - 1))
    length = shape[axis]
    place = st.integers(-length, length - 1)
    bound = st.none() | st.integers(-6, 6)
    kind = draw(st.sampled_from(["none", "int", "tuple", "slice", "list", "array", "tensor", "slice object"]))
    given_index: Any = None
    meant: Any = slice(None)
    if kind in ("int", "slice object"):
        meant = draw(place)
        given_index = Slice(meant) if kind == "slice object" else meant
    elif kind in ("tuple", "slice"):
        meant = slice(draw(bound), draw(bound), draw(st.none() | st.integers(1, 3)))
        given_index = meant if kind == "slice" else (meant.start, meant.stop, meant.step)
    elif kind != "none":
        meant = draw(st.lists(place, min_size=1, max_size=5))
        given_index = {"list": list, "array": np.array, "tensor": torch.tensor}[kind](meant)
    values = np.arange(int(np.prod(shape))).reshape(shape)
    return values, axis, given_index, meant


@given(axes_and_indices())
def test_applying_a_slice_equals_numpy_indexing(case: tuple[np.ndarray, int, Any, Any]) -> None:
    values, axis, index, meant = case
    expected = np.moveaxis(values, axis, 0)[meant]
    if not isinstance(meant, int):
        expected = np.moveaxis(expected, 0, axis)
    got = Slice(index).apply(torch.as_tensor(values), dim=axis)
    assert got.shape == expected.shape
    np.testing.assert_array_equal(got.numpy(), expected)


@given(axes_and_indices())
def test_the_indices_of_a_slice_pick_the_same_positions(case: tuple[np.ndarray, int, Any, Any]) -> None:
    values, axis, index, meant = case
    positions = np.arange(values.shape[axis])
    np.testing.assert_array_equal(positions[Slice(index).indices(len(positions))], np.atleast_1d(positions[meant]))


def test_an_int_drops_the_axis_and_a_list_of_one_keeps_it() -> None:
    x = torch.arange(24).reshape(2, 3, 4)
    assert torch.equal(Slice(1).apply(x, dim=1), x[:, 1])
    assert torch.equal(Slice([1]).apply(x, dim=1), x[:, 1:2])
    assert torch.equal(Slice(torch.tensor(1)).apply(x, dim=1), x[:, 1])
    assert torch.equal(Slice(np.int64(1)).apply(x, dim=1), x[:, 1])


def test_only_none_is_the_identity() -> None:
    assert Slice().is_identity
    assert Slice(None).is_identity
    assert Slice(Slice()).is_identity
    assert not any(Slice(index).is_identity for index in (0, (None, None), [0], slice(None)))


def test_unwrap_takes_any_form_and_leaves_a_slice_as_it_is() -> None:
    given_slice = Slice((1, 3))
    assert Slice.unwrap(given_slice) is given_slice
    assert torch.equal(Slice.unwrap((1, 3)).apply(torch.arange(5)), torch.tensor([1, 2]))
    assert utils.Slice is Slice


def test_a_tuple_of_one_is_an_end() -> None:
    assert torch.equal(Slice((2,)).apply(torch.arange(5)), torch.tensor([0, 1]))


@pytest.mark.parametrize(
    "bad", ["1", 1.0, True, [1.5], [True, False], torch.tensor([[1]]), np.array([0.5]), (1, 2, 3, 4), (), ("a", 2), {1}]
)
def test_what_is_no_index_raises(bad: object) -> None:
    with pytest.raises(TypeError, match=r"slice|index list"):
        Slice(bad)


def test_an_axis_the_tensor_lacks_raises() -> None:
    for dim in (2, -3):
        with pytest.raises(IndexError, match=rf"axis {dim} of a tensor with shape \(2, 3\)"):
            Slice(0).apply(torch.zeros(2, 3), dim=dim)


@pytest.mark.parametrize("index", [5, -6, [0, 5]])
def test_a_position_out_of_range_raises(index: object) -> None:
    with pytest.raises(IndexError, match=r"out of (range|bounds)"):
        Slice(index).apply(torch.arange(5))


def test_the_indices_of_a_range_need_the_length_of_the_axis() -> None:
    with pytest.raises(ValueError, match="needs max_ctx"):
        Slice((1, None)).indices()
    assert Slice(3).indices().tolist() == [3]
