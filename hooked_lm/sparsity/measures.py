"""How sparse a vector is, as one number, and how rare an event is that has not been seen."""

from __future__ import annotations

import math

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from hooked_lm._support.integers import integer
from hooked_lm._support.precision import at_least_single

__all__ = ["gini", "hoyer", "rate_bound"]


def hoyer(x: Float[Tensor, "*vector unit"]) -> Float[Tensor, "*vector"]:
    """Return the Hoyer sparsity of each vector, from 0 for equal magnitudes to 1 for one entry that is not zero.

    `(sqrt(n) - |x|_1 / |x|_2) / (sqrt(n) - 1)` for a vector of `n` entries (Hoyer 2004, "Non-negative Matrix
    Factorization with Sparseness Constraints"). NaN for a vector of zeros, and for one of a single entry.

    Args:
        x: vectors along the last axis; signs do not matter.
    """
    _check_not_empty(x)
    x = at_least_single(x).abs()
    # Divided by the largest entry first, so that squares neither overflow nor vanish.
    x = x / x.amax(-1, keepdim=True)
    root = math.sqrt(x.shape[-1])
    ratio = x.sum(-1) / torch.linalg.vector_norm(x, dim=-1)
    return (root - ratio) / (root - 1) if x.shape[-1] > 1 else torch.full_like(ratio, math.nan)


def gini(x: Float[Tensor, "*vector unit"]) -> Float[Tensor, "*vector"]:
    """Return the Gini index of each vector, from 0 for equal magnitudes to `1 - 1/n` for one entry that is not zero.

    With magnitudes in rising order, `x_1 <= ... <= x_n`, it is `1 - 2 sum_k (x_k / |x|_1) (n - k + 1/2) / n` (Hurley
    and Rickard 2009, "Comparing Measures of Sparsity"). NaN for a vector of zeros.

    Args:
        x: vectors along the last axis; signs do not matter.
    """
    _check_not_empty(x)
    n = x.shape[-1]
    x = _sorted(at_least_single(x).abs())
    # As in `hoyer`: the sum of large entries may overflow.
    x = x / x[..., -1:]
    weights = (n - torch.arange(1, n + 1, device=x.device, dtype=x.dtype) + 0.5) / n
    return 1 - 2 * (x * weights).sum(-1) / x.sum(-1)


def rate_bound(n_tokens: int, confidence: float = 0.95) -> float:
    """Return the highest rate of an event that is not ruled out by its not having occurred in so many tokens.

    With a rate `p`, no event occurs in `n` independent tokens with probability `(1 - p)^n`; the bound is the rate for
    which that is one minus the confidence, `1 - (1 - confidence)^(1/n)`. At 95% it is nearly `3 / n`, the rule of three
    (Hanley and Lippman-Hand 1983, "If Nothing Goes Wrong, Is Everything All Right?"). Tokens of a text are not
    independent: a corpus of few texts allows for higher rates than its number of tokens says.

    The bound is that of one event that was chosen beforehand. Of many units with a rate at the bound, one in twenty is
    dead at 95%, so that the dead ones among many need the confidence `1 - (1 - confidence) / units` (Bonferroni).

    Args:
        n_tokens: how many tokens were looked at.
        confidence: with which higher rates are ruled out.

    Raises:
        ValueError: there are no tokens, or the confidence is not between 0 and 1.
    """
    if integer(n_tokens, "n_tokens") < 1:
        raise ValueError(f"n_tokens is 1 or more, got {n_tokens}")
    if not 0 < confidence < 1:
        raise ValueError(f"confidence is between 0 and 1, got {confidence}")
    return -math.expm1(math.log1p(-confidence) / n_tokens)


def _sorted(x: Tensor) -> Tensor:
    """The entries of each vector in rising order."""
    if x.device.type == "cpu" and not x.requires_grad:
        # torch sorts indices along with the values, which takes twenty times as long.
        return torch.from_numpy(np.sort(x.numpy(), axis=-1))
    return x.sort(-1).values


def _check_not_empty(x: Tensor) -> None:
    if x.ndim == 0 or x.shape[-1] == 0:
        raise ValueError(f"sparsity is that of a vector of one entry or more; got shape {tuple(x.shape)}")
