"""Permutation tests of a mean difference: the signs of paired differences, or the labels of two groups."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import combinations
from math import comb
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

__all__ = ["ALTERNATIVES", "Alternative", "exact_count", "group_p_values", "sign_p_values"]

Alternative = Literal["two-sided", "greater", "less"]
ALTERNATIVES = ("two-sided", "greater", "less")
# Numbers that are held at once.
_CHUNK = 2**22
# Sums of the same numbers in another order differ by rounding: sums within this share of the largest are ties.
_TIE = 1e-10
Weights = Callable[[], Iterator[Tensor]]


def exact_count(n: int, other: int | None = None) -> int:
    """Return in how many ways the signs of `n` differences, or the labels of two groups, can be dealt out.

    Args:
        n: pairs, or the size of one group.
        other: the size of the other group; None for pairs.
    """
    return 2**n if other is None else comb(n + other, n)


def sign_p_values(
    differences: Float[Tensor, "*cell pair"],
    alternative: Alternative,
    n_permutations: int,
    seed: int,
    rounding: Float[Tensor, "*cell"] | float = 0.0,
) -> tuple[Float[Tensor, "*cell"], int | None]:
    """Return the p-values of the mean of paired differences, by flipping their signs.

    Where no treatment has an effect, a pair's difference is as likely as its negative. All signs are tried where there
    are no more than `n_permutations` ways, and the p-value is the share with a mean as extreme as the observed one.
    Otherwise signs are drawn, and p = (1 + as extreme) / (1 + drawn), which is never 0 (Phipson and Smyth 2010,
    "Permutation P-values Should Never Be Zero"). All cells share the signs.

    Args:
        differences: of pairs, along the last axis.
        alternative: `"greater"` asks for a mean above 0, `"less"` below, `"two-sided"` for either.
        n_permutations: how many ways are tried at most.
        seed: of the draws.
        rounding: by how much a sum of the differences may be off, since they were measured in a coarser precision:
            sums within it are ties.

    Returns:
        The p-values, and the number of draws; None where all ways were tried.
    """
    n = differences.shape[-1]
    values = differences.reshape(-1, n).double().cpu()
    observed, tie = values.sum(-1), _tie(values, rounding)
    exact = exact_count(n) <= n_permutations

    def ways() -> Iterator[Tensor]:
        rows = max(1, _CHUNK // n)
        if exact:
            for start in range(0, 2**n, rows):
                numbers = torch.arange(start, min(start + rows, 2**n))
                yield 1.0 - 2.0 * ((numbers[:, None] >> torch.arange(n)) & 1).double()
            return
        generator = torch.Generator().manual_seed(seed)
        for start in range(0, n_permutations, rows):
            drawn = torch.randint(2, (min(rows, n_permutations - start), n), generator=generator)
            yield 1.0 - 2.0 * drawn.double()

    count = _as_extreme(values, ways, observed, tie, alternative, 0.0)
    return _p_values(count, exact_count(n), exact, n_permutations).reshape(differences.shape[:-1]), (
        None if exact else n_permutations
    )


def group_p_values(
    treated: Float[Tensor, "*cell n"],
    control: Float[Tensor, "*cell m"],
    alternative: Alternative,
    n_permutations: int,
    seed: int,
    rounding: Float[Tensor, "*cell"] | float = 0.0,
) -> tuple[Float[Tensor, "*cell"], int | None]:
    """Return the p-values of the difference of two groups' means, by permuting the labels.

    Args:
        treated, control: of the two groups, along the last axis.
        alternative, n_permutations, seed, rounding: as for `sign_p_values`.

    Returns:
        The p-values, and the number of draws; None where all ways were tried.
    """
    n, m = treated.shape[-1], control.shape[-1]
    values = torch.cat([treated.reshape(-1, n), control.reshape(-1, m)], -1).double().cpu()
    # The difference of means is, up to a constant, the sum over the treated.
    observed, tie = values[:, :n].sum(-1), _tie(values, rounding)
    centre = values.sum(-1) * n / (n + m)
    exact = exact_count(n, m) <= n_permutations

    def ways() -> Iterator[Tensor]:
        rows = max(1, _CHUNK // (n + m))
        if exact:
            chosen = torch.tensor(list(combinations(range(n + m), n)))
            for part in chosen.split(rows):
                yield torch.zeros(len(part), n + m, dtype=torch.float64).scatter_(1, part, 1.0)
            return
        generator = torch.Generator().manual_seed(seed)
        for start in range(0, n_permutations, rows):
            order = torch.rand(min(rows, n_permutations - start), n + m, generator=generator).argsort(-1)
            yield (order < n).double()

    count = _as_extreme(values, ways, observed, tie, alternative, centre)
    return _p_values(count, exact_count(n, m), exact, n_permutations).reshape(treated.shape[:-1]), (
        None if exact else n_permutations
    )


def _tie(values: Float[Tensor, "cell n"], rounding: Tensor | float) -> Float[Tensor, " cell"]:
    """How close two sums of each cell are ties."""
    given = torch.as_tensor(rounding, dtype=torch.float64).reshape(-1)
    return torch.maximum(_TIE * values.abs().sum(-1), given.expand(len(values)))


def _as_extreme(
    values: Float[Tensor, "cell n"],
    ways: Weights,
    observed: Float[Tensor, " cell"],
    tie: Float[Tensor, " cell"],
    alternative: Alternative,
    centre: Float[Tensor, " cell"] | float,
) -> Float[Tensor, " cell"]:
    """How many ways give a sum as far from the centre as the observed one, in the direction asked for."""

    def extremeness(sums: Tensor, middle: Tensor | float) -> Tensor:
        away = sums - middle
        return away.abs() if alternative == "two-sided" else away if alternative == "greater" else -away

    count = torch.zeros(len(values), dtype=torch.float64)
    middle = centre if isinstance(centre, Tensor) else torch.full_like(observed, centre)
    least = extremeness(observed, middle) - tie
    for weights in ways():
        for part in torch.arange(len(values)).split(max(1, _CHUNK // len(weights))):
            sums = values[part] @ weights.T
            count[part] += (extremeness(sums, middle[part, None]) >= least[part, None]).sum(-1)
    return count


def _p_values(count: Float[Tensor, " cell"], n_ways: int, exact: bool, drawn: int) -> Float[Tensor, " cell"]:
    return count / n_ways if exact else (1 + count) / (1 + drawn)
