"""Checksums: equal for equal bytes, and different once any entry has changed or two have changed places."""

from __future__ import annotations

import pytest
import torch

from hooked_lm._support.checksums import checksums

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.int64, torch.bool, torch.complex64]


def _some(shape: tuple[int, ...], dtype: torch.dtype = torch.float32) -> torch.Tensor:
    drawn = torch.randn(shape, generator=torch.Generator().manual_seed(0)) * 100
    return drawn > 0 if dtype == torch.bool else drawn.to(dtype)


def checksum(x: torch.Tensor) -> int:
    return checksums([x])[0]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("n", [1, 3, 64, 1021 * 16 + 5, 1021 * 128 + 3])
def test_a_changed_bit_changes_it(n: int, dtype: torch.dtype) -> None:
    x = _some((n,), dtype)
    before = checksum(x)
    assert checksum(x.clone()) == before
    for at in {0, n // 2, n - 1}:
        changed = x.clone()
        changed.view(torch.uint8).view(n, -1)[at, 0] ^= 1
        assert checksum(changed) != before


@pytest.mark.parametrize("shape", [(4, 6), (12, 64, 8), (768, 300)])
def test_rows_or_columns_that_change_places_change_it(shape: tuple[int, ...]) -> None:
    x = _some(shape)
    for axis in range(x.ndim):
        assert checksum(x.flip(axis).clone()) != checksum(x)
        assert checksum(x.roll(1, axis)) != checksum(x)


def test_views_are_read_as_their_copies_are() -> None:
    x = _some((6, 10))
    assert checksum(x.T) == checksum(x)
    for view in (x[:, 2:7], x[1:, 3:], x.flatten()[1:], x[:1].expand(3, 10), x[0, 0]):
        assert checksum(view) == checksum(view.clone(memory_format=torch.contiguous_format))
    assert checksum(x[:0]) == 0


def test_many_tensors_have_the_sums_that_each_has_alone() -> None:
    some = [_some(shape, dtype) for shape in [(3,), (), (64, 7), (0, 2), (300, 400)] for dtype in DTYPES]
    some.insert(2, torch.empty(3, device="meta"))
    assert checksums(some) == [checksum(one) for one in some]
    assert len({*checksums([one for one in some if one.numel() > 9 and not one.is_meta])}) == 2 * len(DTYPES)
