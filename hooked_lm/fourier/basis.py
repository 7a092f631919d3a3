"""The real Fourier basis of functions on 0 ... p-1, and transforms along any axis of a tensor."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from hooked_lm._support.integers import integer

__all__ = ["fourier_basis", "frequency_of_row", "from_fourier", "row_labels", "to_fourier"]


def fourier_basis(p: int, dtype: torch.dtype = torch.float64) -> Float[Tensor, "row p"]:
    """Return an orthonormal basis of functions of 0 ... p-1, [row p].

    Row 0 is constant, rows 2k-1 and 2k are cos(2 pi k n / p) and sin(2 pi k n / p), for k = 1 ... (p-1)//2. For even p
    the last row alternates between 1 and -1. Each row has norm 1.

    Args:
        p: how many values, 1 or more.
        dtype: of the result.

    Raises:
        ValueError: `p` is below 1.
    """
    if integer(p, "p") < 1:
        raise ValueError(f"p is 1 or more, got {p}")
    # Angles are reduced as whole numbers: cos of large arguments would lose digits.
    n = torch.arange(p)
    rows = [torch.ones(p, dtype=torch.float64)]
    for k in range(1, (p - 1) // 2 + 1):
        angle = 2 * math.pi * ((k * n) % p).double() / p
        rows += [angle.cos(), angle.sin()]
    if p % 2 == 0:
        rows.append(1.0 - 2.0 * (n % 2))
    basis = torch.stack(rows)
    sizes: Tensor = basis.norm(dim=-1, keepdim=True)
    return (basis / sizes).to(dtype)


def frequency_of_row(p: int) -> list[int]:
    """Return the frequency of each row of the basis: 0, 1, 1, 2, 2, ...

    Args:
        p: how many values.
    """
    return [(row + 1) // 2 for row in range(p)]


def row_labels(p: int) -> list[str]:
    """Return the name of each row of the basis: `constant`, `cos 1`, `sin 1`, ...

    Args:
        p: how many values.
    """
    names = ["constant"] + [f"{'cos' if row % 2 else 'sin'} {(row + 1) // 2}" for row in range(1, p)]
    return names


def to_fourier(x: Float[Tensor, "..."], dims: int | Sequence[int] = 0) -> Float[Tensor, "..."]:
    """Return the coefficients of a tensor in the Fourier basis along one axis or several; norms are kept.

    Args:
        x: a function of residues along those axes.
        dims: the axes, each of which becomes that of the basis's rows.

    Raises:
        ValueError: an axis comes twice, or is not there.
    """
    return _along(x, dims, forward=True)


def from_fourier(x: Float[Tensor, "..."], dims: int | Sequence[int] = 0) -> Float[Tensor, "..."]:
    """Return the tensor that has given coefficients: the inverse of `to_fourier`.

    Args:
        x: coefficients along those axes.
        dims: the axes.

    Raises:
        ValueError: an axis comes twice, or is not there.
    """
    return _along(x, dims, forward=False)


def _along(x: Tensor, dims: int | Sequence[int], forward: bool) -> Tensor:
    axes = [dims] if isinstance(dims, int) else list(dims)
    if any(not -x.ndim <= axis < x.ndim for axis in axes) or len({axis % x.ndim for axis in axes}) < len(axes):
        raise ValueError(f"dims are different axes of a tensor with {x.ndim}, got {axes}")
    for axis in axes:
        basis = fourier_basis(x.shape[axis], x.dtype).to(x.device)
        x = torch.tensordot(x, basis if forward else basis.T, dims=([axis], [1])).movedim(-1, axis)
    return x
