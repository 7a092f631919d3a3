"""Linear and logistic probes: from activations to labels, by a matrix and a bias for each class."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from hooked_lm._support.precision import not_autocast
from hooked_lm.probing.fitting import check_penalty, fit_affine, logistic, ridge
from hooked_lm.probing.labels import Label, Labels, encode_labels

__all__ = ["KINDS", "Kind", "Probe", "check_settings", "fit_probe"]

Kind = Literal["linear", "logistic"]
KINDS = ("linear", "logistic")


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
    changes no prediction. Where a few entries are a thousand times larger than all others (massive activations), they
    set `s^2`: take a smaller `l2`, or a normalized site. The linear probe is solved in closed form, the logistic by
    L-BFGS; both in float64, on the activations' device where that has it.

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
    y = torch.nn.functional.one_hot(encoded, len(classes))
    weights, bias = fit_affine(activations, y, ridge if kind == "linear" else logistic, l2)
    return Probe(kind, classes, weights, bias)


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
    check_penalty(l2)
