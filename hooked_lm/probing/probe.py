"""Linear and logistic probes: from activations to labels, by a matrix and a bias for each class."""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from hooked_lm._support.precision import at_least_single, not_autocast
from hooked_lm.probing.labels import Label, Labels, encode_labels

__all__ = ["KINDS", "Kind", "Probe", "check_settings", "fit_probe"]

Kind = Literal["linear", "logistic"]
KINDS = ("linear", "logistic")

# Iterations of L-BFGS, and the gradient (of a loss in nats, in activations of variance 1) at which it has converged.
_ITERATIONS = 2000
_CONVERGED = 1e-5


@dataclass(frozen=True, eq=False)
class Probe:
    """A score for each class, `x @ weights.T + bias`; the highest is the prediction.

    Attributes:
        kind: `"linear"` or `"logistic"`.
        classes: the labels that it predicts.
        weights: [class d].
        bias: [class].
    """

    kind: Kind
    classes: tuple[Label, ...]
    weights: Float[Tensor, "class d"]
    bias: Float[Tensor, " class"]

    def scores(self, activations: Float[Tensor, "*example d"]) -> Float[Tensor, "*example class"]:
        """Return the score of each class: log-probabilities up to a constant for a logistic probe, in nats.

        Args:
            activations: on any device and in any precision.

        Raises:
            ValueError: they do not have the width that was fitted.
        """
        if activations.shape[-1:] != self.weights.shape[-1:]:
            raise ValueError(
                f"this probe reads activations [*example {self.weights.shape[-1]}], got {tuple(activations.shape)}"
            )
        with not_autocast(self.weights):
            return activations.to(self.weights) @ self.weights.T + self.bias

    def predict(self, activations: Float[Tensor, "example d"]) -> list[Label]:
        """Return the predicted label of each example.

        Args:
            activations: as for `scores`.

        Raises:
            ValueError: as for `scores`.
        """
        return [self.classes[index] for index in self.scores(activations).argmax(-1).tolist()]

    @property
    def direction(self) -> Float[Tensor, " d"]:
        """The unit vector from the first class of two towards the second, along which the scores differ.

        Raises:
            ValueError: there are more classes than two; take a difference of two rows of `weights`.
        """
        if len(self.classes) != 2:
            raise ValueError(f"{len(self.classes)} classes have no one direction: take weights[i] - weights[j]")
        return torch.nn.functional.normalize(self.weights[1] - self.weights[0], dim=0)


def fit_probe(
    activations: Float[Tensor, "example d"], labels: Labels, kind: Kind = "logistic", l2: float = 0.01
) -> Probe:
    """Fit a probe to all the examples given. `probe_activations` holds some of them out and scores the probe.

    With x the activations less their mean and `s^2` the mean of their variances, both kinds minimise over weights W and
    a bias b, which has no penalty:

        linear:   mean |x W^T + b - y|^2 + l2 s^2 |W|^2          (y: 1 for the example's class and 0 for the others)
        logistic: mean cross-entropy of x W^T + b + l2/2 s^2 |W|^2

    So `l2` means the same at every layer whatever the size of the stream there, and a rotation of the activations
    changes no prediction. The linear probe is solved in closed form, the logistic by L-BFGS; both in float64, on the
    activations' device where that has it.

    Args:
        activations: one row for each example.
        labels: strings or whole numbers, one for each example.
        kind: `"linear"` for ridge regression, `"logistic"` for logistic regression.
        l2: the penalty, more than 0.

    Raises:
        ValueError: activations that are not [example d] and finite, labels that do not fit them or are all the same, an
            unknown kind, or a penalty that is not positive.
    """
    check_settings(kind, l2)
    classes, encoded = encode_labels(labels)
    if activations.ndim != 2 or len(activations) != len(encoded):
        raise ValueError(f"activations are [example d] with {len(encoded)} labels, got {tuple(activations.shape)}")
    n_wrong = int((~activations.isfinite()).any(-1).sum())
    if n_wrong:
        raise ValueError(f"{n_wrong} of {len(activations)} activations have entries that are NaN or infinite")
    # A probe made in inference mode could not be used where gradients are; and to leave that mode turns them on.
    with torch.inference_mode(False), torch.no_grad():
        x = activations.to("cpu" if activations.device.type == "mps" else activations.device).double()
        mean = x.mean(0)
        x = x - mean
        scale = math.sqrt(float(x.square().mean()))
        # Activations that differ by rounding alone are all the same: the probe has its bias only.
        noise = 100 * torch.finfo(activations.dtype).eps * float(mean.square().mean().sqrt())
        x = x / scale if scale > noise else torch.zeros_like(x)
        y = torch.nn.functional.one_hot(encoded.to(x.device), len(classes)).to(x)
        weights, bias = (_ridge if kind == "linear" else _logistic)(x, y, l2)
        weights = weights / scale if scale > noise else weights
        like = at_least_single(activations[:0])
        return Probe(kind, classes, weights.to(like), (bias - weights @ mean).to(like))


def check_settings(kind: str, l2: float) -> None:
    """Check the kind of a probe and its penalty.

    Args:
        kind: `"linear"` or `"logistic"`.
        l2: the penalty.

    Raises:
        ValueError: another kind, or a penalty that is not positive and finite.
    """
    if kind not in KINDS:
        raise ValueError(f"a probe's kind is 'linear' or 'logistic', got {kind!r}")
    if not 0 < l2 < math.inf:
        raise ValueError(f"l2 is a number above 0, got {l2!r}: without it separable classes have no best probe")


def _ridge(
    x: Float[Tensor, "example d"], y: Float[Tensor, "example class"], l2: float
) -> tuple[Float[Tensor, "class d"], Float[Tensor, " class"]]:
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


def _logistic(
    x: Float[Tensor, "example d"], y: Float[Tensor, "example class"], l2: float
) -> tuple[Float[Tensor, "class d"], Float[Tensor, " class"]]:
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
