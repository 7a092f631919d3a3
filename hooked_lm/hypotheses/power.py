"""Power: how likely a test of pairs finds an effect of a given size, before any pair is run.

The power is that of the paired t-test, which the permutation test of a mean comes close to for differences that are
about normal. It is the noncentral t distribution's, by an integral over the estimated deviation s:

    P(T > c) = E[ Phi(d * sqrt(n) - c * s) ],    (n - 1) s^2 distributed as chi-squared with n - 1 degrees of freedom
"""

from __future__ import annotations

import math
from functools import lru_cache

import torch
from jaxtyping import Float
from torch import Tensor

from hooked_lm._support.integers import integer
from hooked_lm.hypotheses.permutation import ALTERNATIVES, Alternative

__all__ = ["detectable_effect", "pairs_needed", "power"]

_POINTS = 4001
_MOST_PAIRS = 10_000_000


def power(effect_size: float, n: int, alpha: float = 0.05, alternative: Alternative = "two-sided") -> float:
    """Return the probability that a test of `n` pairs finds an effect.

    Args:
        effect_size: the true mean of the differences, in units of their standard deviation.
        n: pairs, 2 or more.
        alpha: the chance of a finding where there is none.
        alternative: as for `effect_test`.

    Raises:
        ValueError: an argument is out of range.
    """
    _check(alpha, alternative)
    if not math.isfinite(effect_size):
        raise ValueError(f"an effect size is a finite number, got {effect_size}")
    if integer(n, "n") < 2:
        raise ValueError(f"a test takes two pairs or more, got {n}")
    return _power(float(effect_size), n, float(alpha), alternative)


def pairs_needed(
    effect_size: float, wanted: float = 0.8, alpha: float = 0.05, alternative: Alternative = "two-sided"
) -> int:
    """Return the fewest pairs with which a test finds an effect with the power that is wanted.

    Args:
        effect_size: the true mean of the differences, in units of their standard deviation; not 0.
        wanted: the power, between `alpha` and 1.
        alpha, alternative: as for `power`.

    Raises:
        ValueError: an argument is out of range, the effect is in the other direction than the alternative, or ten
            million pairs are too few.
    """
    _check(alpha, alternative)
    if not alpha < wanted < 1:
        raise ValueError(f"the power wanted is between alpha ({alpha}) and 1, got {wanted}")
    toward = abs(effect_size) if alternative == "two-sided" else effect_size * (1 if alternative == "greater" else -1)
    if not toward > 0:
        raise ValueError(f"no number of pairs finds an effect of {effect_size} with the alternative {alternative!r}")
    high = 2
    while power(effect_size, high, alpha, alternative) < wanted:
        high *= 2
        if high > _MOST_PAIRS:
            raise ValueError(f"an effect of {effect_size} takes more than ten million pairs")
    low = high // 2
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if power(effect_size, max(middle, 2), alpha, alternative) < wanted else (low, middle)
    return max(high, 2)


def detectable_effect(
    n: int, wanted: float = 0.8, alpha: float = 0.05, alternative: Alternative = "two-sided"
) -> float:
    """Return the smallest effect, in standard deviations, that a test of `n` pairs finds with the power wanted.

    Args:
        n: pairs, 2 or more.
        wanted: the power, between `alpha` and 1.
        alpha, alternative: as for `power`.

    Raises:
        ValueError: an argument is out of range.
    """
    _check(alpha, alternative)
    if not alpha < wanted < 1:
        raise ValueError(f"the power wanted is between alpha ({alpha}) and 1, got {wanted}")
    sign = -1.0 if alternative == "less" else 1.0
    low, high = 0.0, 1.0
    while power(sign * high, n, alpha, alternative) < wanted:
        low, high = high, 2 * high
    for _ in range(40):
        middle = (low + high) / 2
        low, high = (middle, high) if power(sign * middle, n, alpha, alternative) < wanted else (low, middle)
    return sign * high


def _check(alpha: float, alternative: str) -> None:
    if not 0 < alpha < 1:
        raise ValueError(f"alpha is between 0 and 1, got {alpha}")
    if alternative not in ALTERNATIVES:
        raise ValueError(f"alternative is 'two-sided', 'greater' or 'less', got {alternative!r}")


@lru_cache(maxsize=4096)
def _power(effect_size: float, n: int, alpha: float, alternative: Alternative) -> float:
    shift = effect_size * math.sqrt(n)
    if alternative == "less":
        return _beyond(_critical(n, alpha), -shift, n)
    if alternative == "greater":
        return _beyond(_critical(n, alpha), shift, n)
    critical = _critical(n, alpha / 2)
    return _beyond(critical, shift, n) + _beyond(critical, -shift, n)


@lru_cache(maxsize=4096)
def _critical(n: int, tail: float) -> float:
    """The value that Student's t with n - 1 degrees of freedom exceeds with a given probability below a half."""
    low, high = 0.0, 1.0
    while _beyond(high, 0.0, n) > tail:
        low, high = high, 2 * high
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if _beyond(middle, 0.0, n) > tail else (low, middle)
    return high


def _beyond(critical: float, shift: float, n: int) -> float:
    """The probability that a noncentral t with n - 1 degrees of freedom exceeds a value."""
    s, weights = _deviations(n)
    return float((torch.special.ndtr(shift - critical * s) * weights).sum())


@lru_cache(maxsize=256)
def _deviations(n: int) -> tuple[Float[Tensor, " point"], Float[Tensor, " point"]]:
    """Estimated deviations of n standard normal numbers, and the probability of each."""
    df = n - 1
    # s has a standard deviation of about 1 / sqrt(2 df); beyond twelve of them lies less than 1e-16 of the probability.
    spread = 12 / math.sqrt(2 * df)
    s = torch.linspace(max(1 - spread, 1e-9), 1 + spread, _POINTS, dtype=torch.float64)
    log_density = (df - 1) * s.log() - df * s**2 / 2
    density = (log_density - log_density.max()).exp()
    # The trapezoidal rule.
    density[[0, -1]] /= 2
    return s, density / density.sum()
