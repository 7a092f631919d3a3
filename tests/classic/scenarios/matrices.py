"""Factored matrices."""

from __future__ import annotations

from typing import Any

import torch

from tests.classic.library import Library
from tests.classic.rules import numbers
from tests.classic.scenario import Outcome, scenario


def _pair(lib: Library, *leading: int, name: str = "") -> Any:
    return lib.FactoredMatrix(numbers(f"left{name}", (*leading, 5, 3)), numbers(f"right{name}", (*leading, 3, 4)))


def _square(lib: Library, *leading: int) -> Any:
    return lib.FactoredMatrix(numbers("left", (*leading, 5, 3)), numbers("right", (*leading, 3, 5)))


def _described(matrix: Any) -> Outcome:
    return {
        "AB": matrix.AB,
        "shape": list(matrix.shape),
        "ndim": matrix.ndim,
        "leading": matrix.has_leading_dims,
        "sizes": [matrix.ldim, matrix.mdim, matrix.rdim],
        "norm": matrix.norm(),
        "pair": list(matrix.pair),
    }


@scenario()
def described(lib: Library) -> Outcome:
    return {"plain": _described(_pair(lib)), "leading": _described(_pair(lib, 2, 3)), "T": _described(_pair(lib, 2).T)}


@scenario()
def singular_values(lib: Library) -> Outcome:
    out: Outcome = {}
    for leading in ((), (2,), (2, 2)):
        matrix = _pair(lib, *leading)
        left, values, right = matrix.svd()
        out[f"{leading} S"], out[f"{leading} property"] = values, matrix.S
        out[f"{leading} AB"] = left @ values.diag_embed() @ right.transpose(-1, -2)
        out[f"{leading} shapes"] = [list(part.shape) for part in (left, values, right, matrix.U, matrix.Vh)]
        out[f"{leading} U"] = matrix.U.abs()
        out[f"{leading} Vh"] = matrix.Vh.abs()
    return out


@scenario()
def eigenvalues(lib: Library) -> Outcome:
    out: Outcome = {}
    for leading in ((), (3,)):
        found = _square(lib, *leading).eigenvalues
        out[f"{leading} shape"], out[f"{leading} sum"] = list(found.shape), found.sum(-1).real
        out[f"{leading} sizes"] = found.abs().sort(-1).values
    return out


@scenario()
def even(lib: Library) -> Outcome:
    matrix = _pair(lib, 2).make_even()
    return {
        "AB": matrix.AB,
        "left norms": matrix.A.norm(dim=-2),
        "right norms": matrix.B.norm(dim=-1),
        "collapsed left": _pair(lib).collapse_l().abs(),
        "collapsed right": _pair(lib).collapse_r().abs(),
    }


@scenario()
def products(lib: Library) -> Outcome:
    matrix, vector, other = _pair(lib), numbers("vector", (4,)), numbers("other", (4, 6))
    column = numbers("column", (5,))
    return {
        "with a vector": matrix @ vector,
        "of a vector": column @ matrix,
        "with a matrix": (matrix @ other).AB,
        "of a matrix": (numbers("third", (2, 5)) @ matrix).AB,
        "with a factored": (matrix @ _pair(lib, name=" more").T).AB,
        "with leading": (_pair(lib, 2) @ other).AB,
        "times": (matrix * 3.0).AB,
        "times from the left": (torch.tensor(0.5) * matrix).AB,
        "BA": _square(lib).BA,
    }


@scenario()
def indices(lib: Library) -> Outcome:
    matrix, batched = _pair(lib), _pair(lib, 2, 3)
    found = {
        "row": matrix[1],
        "rows": matrix[1:3],
        "columns": matrix[:, :2],
        "column": matrix[:, 1],
        "element": matrix[1, 2],
        "leading": batched[1],
        "leading two": batched[1, 2],
        "leading and rows": batched[0, 1, 2:],
        "leading and columns": batched[:, 0, :, 1:3],
        "listed": batched[[0, 1]],
        "unsqueezed": matrix.unsqueeze(0),
    }
    out: Outcome = {name: value.AB for name, value in found.items()}
    out["shapes"] = {
        name: list(value.shape) for name, value in found.items() if name not in ("row", "column", "element")
    }
    out["corner"] = _pair(lib).get_corner()
    out["small corner"] = _pair(lib, 2).get_corner(2)
    return out


@scenario()
def scores(lib: Library) -> Outcome:
    left, right = lib.FactoredMatrix(numbers("a", (2, 5, 3)), numbers("b", (2, 3, 5))), _square(lib, 3)
    return {
        "broadcast": lib.utils.composition_scores(left, right, broadcast_dims=True),
        "pairwise": lib.utils.composition_scores(left, right[:2], broadcast_dims=False),
    }
