"""FactoredMatrix: a low-rank product kept as its two factors.

The matrices of circuits (`W_Q W_K^T`, `W_V W_O`, their products with the embedding) have the rank of a head's few
dimensions. Everything here works on the factors; only `AB` multiplies them out.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from typing import Any, overload

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from hooked_lm._support.precision import not_autocast

__all__ = ["FactoredMatrix", "Index", "Product", "composition_scores"]

# A FactoredMatrix, or a plain tensor if the other factor is a vector: the type of a tensor does not say which.
Product = Any
# Whatever torch indexes a tensor with.
Index = Any


class FactoredMatrix:
    """The matrix `A @ B`, with leading axes broadcast.

    Args:
        A: [... ldim mdim]
        B: [... mdim rdim]

    Raises:
        ValueError: the inner dimensions differ, the leading ones do not broadcast, or a factor is not a matrix.
    """

    def __init__(self, A: Float[Tensor, "*leading_a ldim mdim"], B: Float[Tensor, "*leading_b mdim2 rdim"]) -> None:
        if A.ndim < 2 or B.ndim < 2 or A.shape[-1] != B.shape[-2]:
            raise ValueError(f"cannot multiply A with shape {tuple(A.shape)} and B with shape {tuple(B.shape)}")
        try:
            leading = np.broadcast_shapes(A.shape[:-2], B.shape[:-2])
        except ValueError as error:
            raise ValueError(
                f"the leading axes of A {tuple(A.shape)} and B {tuple(B.shape)} do not broadcast"
            ) from error
        self.A = A.expand(*leading, *A.shape[-2:])
        self.B = B.expand(*leading, *B.shape[-2:])

    # Shape

    @property
    def ldim(self) -> int:
        """Rows of the product."""
        return self.A.shape[-2]

    @property
    def mdim(self) -> int:
        """The inner dimension, a bound on the rank."""
        return self.A.shape[-1]

    @property
    def rdim(self) -> int:
        """Columns of the product."""
        return self.B.shape[-1]

    @property
    def shape(self) -> torch.Size:
        """The shape the product would have."""
        return torch.Size((*self.A.shape[:-1], self.rdim))

    @property
    def ndim(self) -> int:
        """How many axes the product would have."""
        return self.A.ndim

    @property
    def dtype(self) -> torch.dtype:
        """The dtype the product would have."""
        return torch.promote_types(self.A.dtype, self.B.dtype)

    @property
    def has_leading_dims(self) -> bool:
        """Whether this is a stack of matrices."""
        return self.ndim > 2

    @property
    def pair(self) -> tuple[Tensor, Tensor]:
        """The two factors."""
        return self.A, self.B

    # Products

    @property
    def AB(self) -> Float[Tensor, "*leading ldim rdim"]:
        """The product, multiplied out."""
        return self.A @ self.B

    @property
    def BA(self) -> Float[Tensor, "*leading mdim mdim"]:
        """The factors in the other order: a small matrix with the product's non-zero eigenvalues.

        Raises:
            ValueError: the product is not square.
        """
        self._require_square("BA")
        return self.B @ self.A

    @property
    def T(self) -> FactoredMatrix:
        """The transpose."""
        return FactoredMatrix(self.B.mT, self.A.mT)

    @overload
    def __matmul__(self, other: FactoredMatrix) -> FactoredMatrix: ...

    @overload
    def __matmul__(self, other: Tensor) -> Product: ...

    def __matmul__(self, other: FactoredMatrix | Tensor) -> Product:
        """Return `self @ other`: a FactoredMatrix, or a plain tensor when `other` is a vector.

        Between two factored matrices the narrower inner dimension becomes that of the product.
        """
        if isinstance(other, FactoredMatrix):
            self._require_inner(self.rdim, other.ldim, other)
            middle = self.B @ other.A
            if self.mdim <= other.mdim:
                return FactoredMatrix(self.A, middle @ other.B)
            return FactoredMatrix(self.A @ middle, other.B)
        if not isinstance(other, Tensor):
            return NotImplemented
        self._require_inner(self.rdim, other.shape[-2 if other.ndim > 1 else 0], other)
        if other.ndim == 1:
            return (self.A @ (self.B @ other)[..., None])[..., 0]
        return FactoredMatrix(self.A, self.B @ other)

    def __rmatmul__(self, other: Tensor) -> Product:
        """Return `other @ self`: a FactoredMatrix, or a plain tensor when `other` is a vector."""
        if not isinstance(other, Tensor):
            return NotImplemented
        self._require_inner(other.shape[-1], self.ldim, other)
        if other.ndim == 1:
            return ((other @ self.A)[..., None, :] @ self.B)[..., 0, :]
        return FactoredMatrix(other @ self.A, self.B)

    # Without this, torch would answer `tensor @ factored` itself: it raises instead of trying `__rmatmul__`.
    @classmethod
    def __torch_function__(
        cls, func: Callable[..., object], types: Sequence[type], args: Sequence[object] = (), kwargs: object = None
    ) -> object:
        """Return the product for `tensor @ factored` and `tensor * factored`; torch raises for any other function."""
        if len(args) == 2 and isinstance(args[0], Tensor) and isinstance(args[1], FactoredMatrix):
            left, right = args[0], args[1]
            if func in (torch.Tensor.matmul, torch.Tensor.__matmul__, torch.matmul):
                return right.__rmatmul__(left)
            if func in (torch.Tensor.mul, torch.Tensor.__mul__, torch.mul):
                return right.__rmul__(left)
        return NotImplemented

    def __mul__(self, scalar: int | float | Tensor) -> FactoredMatrix:
        """Return the product times a number."""
        if not isinstance(scalar, (int, float)) and not (isinstance(scalar, Tensor) and scalar.numel() == 1):
            raise TypeError(f"a FactoredMatrix is scaled by a number, not by {scalar!r}; use @ for matrices")
        return FactoredMatrix(self.A * scalar, self.B)

    __rmul__ = __mul__

    # Spectrum

    def svd(self) -> tuple[Tensor, Tensor, Tensor]:
        """Return U, S, V with `AB = U diag(S) V^T`; S has `min(ldim, mdim, rdim)` entries, largest first.

        The product is never formed: the triangular parts of the factors' QR decompositions carry all of it. Half
        precision is decomposed in float32, and the result rounded.

        Returns:
            U: [... ldim rank], S: [... rank], V: [... rdim rank], with orthonormal columns.
        """
        U, S, V = self._svd()
        return U.to(self.dtype), S.to(self.dtype), V.to(self.dtype)

    def _svd(self) -> tuple[Tensor, Tensor, Tensor]:
        """U, S, V in the precision that they are computed in."""
        single = self._in_single()
        Q_left, R_left = torch.linalg.qr(single.A)
        Q_right, R_right = torch.linalg.qr(single.B.mT)
        with not_autocast(self.A):
            U_core, S, Vh_core = torch.linalg.svd(R_left @ R_right.mT, full_matrices=False)
            return Q_left @ U_core, S, Q_right @ Vh_core.mT

    @property
    def U(self) -> Float[Tensor, "*leading ldim rank"]:
        """Left singular vectors, as columns."""
        return self.svd()[0]

    @property
    def S(self) -> Float[Tensor, "*leading rank"]:
        """Singular values, largest first."""
        return self.svd()[1]

    @property
    def V(self) -> Float[Tensor, "*leading rdim rank"]:
        """Right singular vectors, as columns."""
        return self.svd()[2]

    @property
    def Vh(self) -> Float[Tensor, "*leading rank rdim"]:
        """Right singular vectors, as rows."""
        return self.V.mT

    @property
    def eigenvalues(self) -> Tensor:
        """The `mdim` eigenvalues that can be non-zero, complex, read from `BA`. Raises ValueError if not square.

        Those of half precision are complex64.
        """
        with not_autocast(self.A):
            eigenvalues: Tensor = torch.linalg.eigvals(self._in_single().BA)
        return eigenvalues

    def norm(self) -> Float[Tensor, "*leading"]:
        """Return the Frobenius norm, from the factors' triangular parts: Gram matrices would square the error."""
        single = self._in_single()
        R_left = torch.linalg.qr(single.A, mode="r").R
        R_right = torch.linalg.qr(single.B.mT, mode="r").R
        with not_autocast(self.A):
            norm: Tensor = torch.linalg.matrix_norm(R_left @ R_right.mT)
        return norm.to(self.dtype)

    def _in_single(self) -> FactoredMatrix:
        """Both factors in the wider of their dtypes, in float32 at least."""
        dtype = torch.promote_types(self.dtype, torch.float32)
        return FactoredMatrix(self.A.to(dtype), self.B.to(dtype))

    def make_even(self) -> FactoredMatrix:
        """Return the same product with its singular values shared equally: `A = U sqrt(S)`, `B = sqrt(S) V^T`."""
        U, S, V = self._svd()
        root = S.sqrt()
        return FactoredMatrix((U * root[..., None, :]).to(self.dtype), (root[..., :, None] * V.mT).to(self.dtype))

    def collapse_l(self) -> Float[Tensor, "*leading rank rdim"]:
        """Return `diag(S) V^T`: the product with its left side rotated away, which keeps its right Gram matrix."""
        _, S, V = self._svd()
        return (S[..., :, None] * V.mT).to(self.dtype)

    def collapse_r(self) -> Float[Tensor, "*leading ldim rank"]:
        """Return `U diag(S)`: the product with its right side rotated away, which keeps its left Gram matrix."""
        U, S, _ = self._svd()
        return (U * S[..., None, :]).to(self.dtype)

    # Indexing

    def __getitem__(self, index: Index) -> FactoredMatrix:
        """Index the leading axes, then rows, then columns; the result stays factored.

        A single row or column keeps its axis, with length 1.
        """
        index = self._expand_index(index if isinstance(index, tuple) else (index,))
        n_leading = self.ndim - 2
        leading, rows, columns = index[:n_leading], index[n_leading:][:1], index[n_leading:][1:]
        # One after the other: torch would pair up lists of indices that are given together.
        A, B = self.A[leading], self.B[leading]
        for row in rows:
            A = A[..., _keep_axis(row, self.ldim), :]
        for column in columns:
            B = B[..., _keep_axis(column, self.rdim)]
        return FactoredMatrix(A, B)

    def _expand_index(self, index: tuple[Index, ...]) -> tuple[Index, ...]:
        if any(part is None for part in index):
            raise IndexError("a FactoredMatrix has no new axes by None: use unsqueeze")
        if sum(part is Ellipsis for part in index) > 1:
            raise IndexError("an index holds one ellipsis at most")
        if any(part is Ellipsis for part in index):
            at = next(i for i, part in enumerate(index) if part is Ellipsis)
            index = (*index[:at], *[slice(None)] * (self.ndim - len(index) + 1), *index[at + 1 :])
        if len(index) > self.ndim:
            raise IndexError(
                f"{len(index)} indices for a FactoredMatrix with {self.ndim} axes, shape {tuple(self.shape)}"
            )
        return index

    def unsqueeze(self, k: int) -> FactoredMatrix:
        """Return this with a new leading axis of length 1 at place `k`, from the left or, if negative, the right.

        Raises:
            IndexError: the place is not among the leading axes.
        """
        n_leading = self.ndim - 2
        if not -self.ndim - 1 <= k <= n_leading or -3 < k < 0:
            raise IndexError(f"unsqueeze({k}): only leading axes can be added, at 0-{n_leading}")
        k = k if k >= 0 else k + self.ndim + 1
        return FactoredMatrix(self.A.unsqueeze(k), self.B.unsqueeze(k))

    def get_corner(self, k: int = 3) -> Float[Tensor, "*leading rows columns"]:
        """Return the top left `k` by `k` entries of each matrix, multiplied out."""
        return self.A[..., :k, :] @ self.B[..., :, :k]

    def __repr__(self) -> str:
        return f"FactoredMatrix(shape={tuple(self.shape)}, mdim={self.mdim}, dtype={self.dtype})"

    # Checks

    def _require_square(self, what: str) -> None:
        if self.ldim != self.rdim:
            raise ValueError(f"{what} needs a square product; this one has shape {tuple(self.shape)}")

    def _require_inner(self, left: int, right: int, other: FactoredMatrix | Tensor) -> None:
        if left != right:
            raise ValueError(f"cannot multiply a FactoredMatrix {tuple(self.shape)} with {tuple(other.shape)}")


def _keep_axis(index: Index, size: int) -> Index:
    """Turn a whole-number index into a range of one, so that a row stays a 1-row matrix."""
    try:
        index = operator.index(index)  # also of numpy's integers and of tensors that are one number
    except (TypeError, ValueError):
        return index
    if not -size <= index < size:
        raise IndexError(f"index {index} is out of range for an axis of length {size}")
    return slice(index % size, index % size + 1)


def composition_scores(
    left: FactoredMatrix, right: FactoredMatrix, broadcast_dims: bool = True
) -> Float[Tensor, "*leading"]:
    """Return `||left right|| / (||left|| ||right||)` in Frobenius norms, a number between 0 and 1.

    How strongly the output of `left` feeds the input of `right` (Elhage et al. 2021, "A Mathematical
    Framework for Transformer Circuits", section on composition). Rotating the outer sides changes no norm, so each
    pair costs products of head-sized matrices only. Half precision is computed in float32, and the scores rounded.

    Args:
        left, right: factored matrices; `left.rdim` equals `right.ldim`.
        broadcast_dims: score every left against every right, [*left_leading *right_leading]; False pairs them up.

    Raises:
        ValueError: the dimensions do not match.
    """
    if left.rdim != right.ldim:
        raise ValueError(f"composition of {tuple(left.shape)} with {tuple(right.shape)}: inner dimensions differ")
    dtype = torch.promote_types(left.dtype, right.dtype)
    with not_autocast(left.A):
        norms, sizes = _composed(left._in_single(), right._in_single(), broadcast_dims)
    # A head that writes nothing composes with nothing.
    return torch.where(sizes > 0, norms / sizes, torch.zeros_like(norms)).to(dtype)


def _composed(left: FactoredMatrix, right: FactoredMatrix, broadcast_dims: bool) -> tuple[Tensor, Tensor]:
    """Return the norms of the products, and the products of the norms."""
    # A = Q R and B^T = Q' R': the orthogonal Q, Q' drop out of every norm.
    left_core = torch.linalg.qr(left.A, mode="r").R
    right_core = torch.linalg.qr(right.B.mT, mode="r").R.mT
    if broadcast_dims:
        n_left, n_right = left.ndim - 2, right.ndim - 2
        left_side, right_side = left_core @ left.B, right.A @ right_core
        products = torch.tensordot(left_side, right_side, dims=([-1], [-2]))  # [*left rank_l *right rank_r]
        axes = (n_left, n_left + 1 + n_right)
        norms = torch.linalg.vector_norm(products, dim=axes)
        sizes = left.norm()[(...,) + (None,) * n_right] * right.norm()
    else:
        norms = torch.linalg.matrix_norm(left_core @ (left.B @ right.A) @ right_core)
        sizes = left.norm() * right.norm()
    return norms, sizes
