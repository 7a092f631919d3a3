"""Affine maps of activations: least squares in closed form, and cross-entropy by L-BFGS, both with an L2 penalty."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable

import torch
from jaxtyping import Float, Num
from torch import Tensor

from hooked_lm._support.precision import at_least_single

__all__ = ["Solver", "check_penalty", "fit_affine", "logistic", "ridge"]

# From activations of mean 0 and variance 1, targets and a penalty to weights [class d] and a bias [class].
Solver = Callable[[Tensor, Tensor, float], tuple[Tensor, Tensor]]

# Iterations of L-BFGS, and the gradient (of a loss in nats, in activations of variance 1) at which it has converged.
_ITERATIONS = 2000
_CONVERGED = 1e-5


def fit_affine(
    activations: Float[Tensor, "example d"], targets: Num[Tensor, "example class"], solve: Solver, l2: float
) -> tuple[Float[Tensor, "class d"], Float[Tensor, " class"]]:
    """Return the weights and the bias of the map that a solver finds for activations less their mean, of variance 1.

    The variance is the mean over all entries, so that a rotation of the activations rotates the weights. All is done in
    float64, on the activations' device where that has it.

    Args:
        activations: one row for each example.
        targets: of the examples.
        solve: `ridge` or `logistic`.
        l2: the penalty, in units of the variance.

    Raises:
        ValueError: activations that are NaN or infinite, or a penalty that is not positive.
    """
    check_penalty(l2)
    n_wrong = int((~activations.isfinite()).any(-1).sum())
    if n_wrong:
        raise ValueError(f"{n_wrong} of {len(activations)} activations have entries that are NaN or infinite")
    # A probe made in inference mode could not be used where gradients are; and to leave that mode turns them on.
    with torch.inference_mode(False), torch.no_grad():
        x = activations.to("cpu" if activations.device.type == "mps" else activations.device).double()
        mean = x.mean(0)
        x = x - mean
        scale = math.sqrt(float(x.square().mean()))
        # Activations that differ by rounding alone are all the same: the map is its bias only.
        noise = 100 * torch.finfo(activations.dtype).eps * float(mean.square().mean().sqrt())
        x = x / scale if scale > noise else torch.zeros_like(x)
        weights, bias = solve(x, targets.to(x), l2)
        weights = weights / scale if scale > noise else weights
        like = at_least_single(activations[:0])
        return weights.to(like), (bias - weights @ mean).to(like)


def check_penalty(l2: float) -> None:
    """Check a penalty.

    Args:
        l2: the penalty.

    Raises:
        ValueError: it is not positive and finite.
    """
    if not 0 < l2 < math.inf:
        raise ValueError(f"l2 is a number above 0, got {l2!r}: without it many maps may fit equally well")


def ridge(
    x: Float[Tensor, "example d"], y: Float[Tensor, "example class"], l2: float
) -> tuple[Float[Tensor, "class d"], Float[Tensor, " class"]]:
    """Return the minimum of the mean of `|x W^T + b - y|^2`, plus `l2 |W|^2`, in closed form.

    Args:
        x: activations of mean 0.
        y: what they are mapped to.
        l2: the penalty.
    """
    n_examples, width = x.shape
    bias = y.mean(0)
    targets = (y - bias) / n_examples
    # Of the two forms of the solution, the one with the smaller matrix.
    gram = (x.T @ x if width <= n_examples else x @ x.T) / n_examples
    gram.diagonal().add_(l2)
    factor = torch.linalg.cholesky(gram)
    if width <= n_examples:
        return torch.cholesky_solve(x.T @ targets, factor).T, bias
    return torch.cholesky_solve(targets, factor).T @ x, bias


def logistic(
    x: Float[Tensor, "example d"], y: Float[Tensor, "example class"], l2: float
) -> tuple[Float[Tensor, "class d"], Float[Tensor, " class"]]:
    """Return the minimum of the mean cross-entropy of `x W^T + b`, plus `l2 / 2 |W|^2`.

    Args:
        x: activations of mean 0.
        y: 1 for the example's class and 0 for the others.
        l2: the penalty.

    Warns:
        UserWarning: L-BFGS has not converged.
    """
    weights, bias = x.new_zeros(y.shape[1], x.shape[1]), y.mean(0).clamp(min=1 / len(y)).log()
    optimizer = torch.optim.LBFGS(
        [weights, bias],
        max_iter=_ITERATIONS,
        max_eval=2 * _ITERATIONS,
        tolerance_grad=_CONVERGED / 100,
        tolerance_change=1e-15,
        history_size=20,
        line_search_fn="strong_wolfe",
    )

    def loss_and_gradient() -> float:
        log_probs = (x @ weights.T + bias).log_softmax(-1)
        excess = (log_probs.exp() - y) / len(x)
        weights.grad, bias.grad = excess.T @ x + l2 * weights, excess.sum(0)
        return float(-(log_probs * y).sum() / len(x) + l2 / 2 * weights.square().sum())

    optimizer.step(loss_and_gradient)
    loss_and_gradient()
    largest = max(float(one.grad.abs().max()) for one in (weights, bias) if one.grad is not None)
    if largest > _CONVERGED:
        warnings.warn(
            f"the logistic probe has not converged after {_ITERATIONS} iterations (gradient {largest:.1e}): an l2 "
            f"larger than {l2:g} makes it easier",
            stacklevel=3,
        )
    return weights, bias
