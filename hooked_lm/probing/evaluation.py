"""What a probe is worth: its accuracy on held-out examples, beside the majority class and beside control tasks."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from hooked_lm.probing.division import Entries, grouped_interval
from hooked_lm.probing.labels import LabelledExamples, Labels
from hooked_lm.probing.probe import Kind, Probe, check_settings, fit_probe

__all__ = ["ProbeResult", "evaluate_probe", "probe_activations"]


@dataclass(frozen=True, eq=False)
class ProbeResult:
    """A probe and its accuracy on examples that were held out from fitting it.

    Attributes:
        probe: fitted to the examples that are not held out.
        accuracy: the share of held-out examples whose label it predicts.
        low, high: the ends of the bootstrap interval of the accuracy; groups of examples are drawn. It has no width
            where all n held-out examples are right, and then up to 3/n of all examples may still be wrong.
        confidence: of the interval.
        fitted_accuracy: the same share of the examples that it was fitted to.
        majority: the share of held-out examples with the commonest label among those fitted: the accuracy of a probe
            that looks at nothing.
        control_accuracy: the mean accuracy, on control tasks, of probes of the same kind, over the held-out examples
            whose type was also fitted; None without types.
        selectivity: the probe's accuracy over the same examples, less `control_accuracy`: near 0 for a probe that knows
            every type by heart; None without types.
        n_fitted, n_held_out: how many examples.
    """

    probe: Probe
    accuracy: float
    low: float
    high: float
    confidence: float
    fitted_accuracy: float
    majority: float
    control_accuracy: float | None
    selectivity: float | None
    n_fitted: int
    n_held_out: int

    @property
    def above_majority(self) -> bool:
        """Whether the whole interval of the accuracy lies above the majority class."""
        return self.low > self.majority


def probe_activations(
    activations: Float[Tensor, "example d"],
    labels: Labels,
    *,
    kind: Kind = "logistic",
    l2: float = 0.01,
    groups: Entries | None = None,
    types: Entries | None = None,
    n_controls: int = 3,
    test_share: float = 0.25,
    confidence: float = 0.95,
    n_resamples: int = 1000,
    seed: int = 0,
) -> ProbeResult:
    """Fit a probe to a part of the examples and score it on those held out.

    Args:
        activations: one row for each example: a slice of a cache, `cache["resid_post", 3][:, -1]`.
        labels: strings or whole numbers, one for each example.
        kind, l2: as for `fit_probe`.
        groups: of the examples; those of one group are held out together or not at all. Give all examples of one
            prompt one group, so that no prompt is on both sides. By default each example is a group.
        types: of the examples, for control tasks: random labels of types (Hewitt and Liang 2019). Give the token that
            an activation is of, or whatever a probe could learn by heart. None for no control task.
        n_controls: how many control tasks to average over.
        test_share: the share of the examples to hold out.
        confidence, n_resamples: of the bootstrap interval.
        seed: of the division, the control tasks and the bootstrap.

    Raises:
        ValueError: as `fit_probe` and `LabelledExamples.divided`, or a setting out of range.
    """
    examples = LabelledExamples.divided(labels, groups, types, n_controls=n_controls, test_share=test_share, seed=seed)
    return evaluate_probe(activations, examples, kind, l2, confidence, n_resamples, seed)


def evaluate_probe(
    activations: Float[Tensor, "example d"],
    examples: LabelledExamples,
    kind: Kind = "logistic",
    l2: float = 0.01,
    confidence: float = 0.95,
    n_resamples: int = 1000,
    seed: int = 0,
) -> ProbeResult:
    """Fit a probe to examples that are divided already, and score it on those held out.

    Args:
        activations: one row for each example.
        examples: their labels and their division.
        kind, l2: as for `fit_probe`.
        confidence, n_resamples, seed: of the bootstrap interval.

    Raises:
        ValueError: as `fit_probe`, or a setting out of range.
    """
    check_settings(kind, l2)
    if activations.ndim != 2 or len(activations) != len(examples):
        raise ValueError(f"activations are [example d] with {len(examples)} labels, got {tuple(activations.shape)}")
    held_out, labels = examples.held_out, examples.labels
    probe, correct = _fitted(activations, labels, held_out, kind, l2)
    low, high = grouped_interval(correct[held_out], examples.groups[held_out], confidence, n_resamples, seed)
    majority = labels[~held_out].bincount().argmax()
    control = _control_accuracy(activations, examples, kind, l2)
    return ProbeResult(
        probe=Probe(kind, tuple(examples.classes[int(one)] for one in probe.classes), probe.weights, probe.bias),
        accuracy=float(correct[held_out].double().mean()),
        low=low,
        high=high,
        confidence=confidence,
        fitted_accuracy=float(correct[~held_out].double().mean()),
        majority=float((labels[held_out] == majority).double().mean()),
        control_accuracy=control,
        selectivity=None if control is None else float(correct[examples.recurring].double().mean()) - control,
        n_fitted=int((~held_out).sum()),
        n_held_out=int(held_out.sum()),
    )


def _fitted(
    activations: Float[Tensor, "example d"],
    labels: Int[Tensor, " example"],
    held_out: Bool[Tensor, " example"],
    kind: Kind,
    l2: float,
) -> tuple[Probe, Bool[Tensor, " example"]]:
    """A probe of the examples that are not held out, and which of all examples it gets right."""
    fitted = (~held_out).to(activations.device)
    probe = fit_probe(activations[fitted], labels[~held_out], kind, l2)
    predicted = torch.tensor(probe.predict(activations))
    return probe, predicted == labels


def _control_accuracy(
    activations: Float[Tensor, "example d"], examples: LabelledExamples, kind: Kind, l2: float
) -> float | None:
    if not len(examples.controls):
        return None
    accuracies = [
        _fitted(activations, control, examples.held_out, kind, l2)[1][examples.recurring].double().mean()
        for control in examples.controls
    ]
    return float(torch.stack(accuracies).mean())
