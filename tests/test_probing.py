"""Probes find what was planted, nothing where nothing was, and by heart what can only be learned by heart."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from hooked_lm.patching import bootstrap_interval
from hooked_lm.probing import KINDS, Kind, LabelledExamples, fit_probe, probe_activations


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def planted(
    n: int = 2000, d: int = 30, strength: float = 1.0, seed: int = 0, dtype: torch.dtype = torch.float64
) -> tuple[Tensor, Tensor, Tensor]:
    """Gaussians around a point, moved along a unit direction by plus or minus `strength`; labels; the direction."""
    random = generator(seed)
    direction = torch.nn.functional.normalize(torch.randn(d, generator=random, dtype=torch.float64), dim=0)
    labels = torch.randint(0, 2, (n,), generator=random)
    x = torch.randn(n, d, generator=random, dtype=torch.float64) + 5
    return (x + strength * (2 * labels[:, None] - 1) * direction).to(dtype), labels, direction


# What is found


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("strength", [0.7, 1.5])
def test_a_planted_direction_is_found_with_the_accuracy_of_bayes_rule(kind: Kind, strength: float) -> None:
    x, labels, direction = planted(n=4000, strength=strength)
    found = probe_activations(x, labels, kind=kind, test_share=0.5)
    bayes = 0.5 * (1 + math.erf(strength / math.sqrt(2)))
    sampling_error = math.sqrt(bayes * (1 - bayes) / found.n_held_out)
    assert float(found.probe.direction @ direction) > 0.95
    assert abs(found.accuracy - bayes) < 3 * sampling_error
    assert found.low < bayes < found.high
    assert found.above_majority
    assert found.control_accuracy is None


@pytest.mark.parametrize("kind", KINDS)
def test_shuffled_labels_are_at_chance(kind: Kind) -> None:
    results = []
    for seed in range(12):
        x, labels, _ = planted(n=400, strength=1.5, seed=seed)
        shuffled = labels[torch.randperm(len(labels), generator=generator(seed))]
        results.append(probe_activations(x, shuffled, kind=kind, seed=seed))
    mean = sum(one.accuracy for one in results) / len(results)
    assert abs(mean - 0.5) < 3 * 0.5 / math.sqrt(100 * len(results))
    assert sum(one.above_majority for one in results) <= 2


@pytest.mark.parametrize("kind", KINDS)
def test_several_classes_are_told_apart(kind: Kind) -> None:
    centres = 4 * torch.eye(5, dtype=torch.float64)[:4]
    which = torch.randint(0, 4, (600,), generator=generator())
    x = centres[which] + torch.randn(600, 5, dtype=torch.float64, generator=generator(1))
    names = ["d", "b", "a", "c"]
    found = probe_activations(x, [names[one] for one in which.tolist()], kind=kind)
    assert found.probe.classes == ("a", "b", "c", "d")
    assert found.accuracy > 0.9
    assert found.probe.predict(centres) == names
    with pytest.raises(ValueError, match="4 classes have no one direction"):
        _ = found.probe.direction


# The probes minimise what they say


@pytest.mark.parametrize(("n", "d"), [(50, 6), (8, 20)])
def test_the_linear_probe_is_ridge_regression(n: int, d: int) -> None:
    """As least squares with a row for each weight's penalty, and the mean taken off by hand."""
    x = torch.randn(n, d, dtype=torch.float64, generator=generator()) * 3 + 1
    labels = torch.arange(n) % 3
    probe = fit_probe(x, labels, "linear", l2=0.3)
    variance = float(x.var(0, correction=0).mean())
    y = torch.nn.functional.one_hot(labels, 3).double()
    penalty = math.sqrt(0.3 * variance * n) * torch.eye(d, dtype=torch.float64)
    design = torch.cat([x - x.mean(0), penalty])
    target = torch.cat([y - y.mean(0), torch.zeros(d, 3, dtype=torch.float64)])
    solution = torch.linalg.lstsq(design, target).solution
    torch.testing.assert_close(probe.weights, solution.T)
    torch.testing.assert_close(probe.bias, y.mean(0) - x.mean(0) @ solution)


def test_the_logistic_probe_is_at_the_minimum_of_its_loss() -> None:
    x = torch.randn(80, 5, dtype=torch.float64, generator=generator()) * 7 - 2
    labels = torch.randint(0, 3, (80,), generator=generator(1))
    probe = fit_probe(x, labels, "logistic", l2=0.05)
    weights, bias = probe.weights.clone().requires_grad_(), probe.bias.clone().requires_grad_()
    variance = x.var(0, correction=0).mean()
    loss = torch.nn.functional.cross_entropy(x @ weights.T + bias, labels)
    loss = loss + 0.05 / 2 * variance * weights.square().sum()
    for gradient in torch.autograd.grad(loss, [weights, bias]):
        assert float(gradient.abs().max()) < 1e-5


@pytest.mark.parametrize("kind", KINDS)
def test_size_and_rotation_of_the_activations_change_no_prediction(kind: Kind) -> None:
    x, labels, _ = planted(n=200, d=10, strength=0.5)
    rotation = torch.linalg.qr(torch.randn(10, 10, dtype=torch.float64, generator=generator(2))).Q
    changed = 1000 * x @ rotation + 3
    before, after = (fit_probe(one, labels, kind) for one in (x, changed))
    torch.testing.assert_close(after.scores(changed), before.scores(x), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("rounding", [0.0, 1e-6])
def test_activations_that_are_all_the_same_give_the_commonest_label(kind: Kind, rounding: float) -> None:
    """At the first layer, the same token at the same position: what differs is the rounding of batches."""
    labels = [0] * 30 + [1] * 20
    x = torch.full((50, 4), 3.0) + rounding * torch.tensor(labels)[:, None]
    probe = fit_probe(x, labels, kind)
    assert probe.predict(x) == [0] * 50
    assert not probe.weights.any()


@pytest.mark.parametrize("kind", KINDS)
def test_a_single_precision_probe_is_that_of_double_precision(kind: Kind) -> None:
    x, labels, _ = planted(n=200, d=10)
    exact, single = fit_probe(x, labels, kind), fit_probe(x.float(), labels, kind)
    assert (single.weights.dtype, fit_probe(x.bfloat16(), labels, kind).weights.dtype) == (torch.float32,) * 2
    torch.testing.assert_close(single.weights, exact.weights.float(), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_probes_are_the_same_without_gradients_in_inference_mode_and_under_autocast(kind: Kind) -> None:
    x, labels, _ = planted(n=100, d=6, dtype=torch.float32)
    plain = fit_probe(x, labels, kind)
    with torch.inference_mode():
        inferred = fit_probe(x * 1, labels, kind)
    with torch.autocast("cpu", torch.bfloat16):
        autocast = fit_probe(x.clone().requires_grad_(), labels, kind)
    for other in (inferred, autocast):
        assert torch.equal(other.weights, plain.weights)
        assert not other.weights.requires_grad
        assert not other.weights.is_inference()


def test_a_probe_that_does_not_converge_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hooked_lm.probing.fitting._ITERATIONS", 2)
    x, labels, _ = planted(n=100, d=6)
    with pytest.warns(UserWarning, match="has not converged after 2 iterations .*an l2 larger than 0.01"):
        fit_probe(x, labels)


# Held-out groups


def test_no_group_is_on_both_sides() -> None:
    groups = torch.randint(0, 40, (300,), generator=generator())
    for seed in range(5):
        examples = LabelledExamples.divided(torch.arange(300) % 2, groups, seed=seed)
        held_out, fitted = groups[examples.held_out], groups[~examples.held_out]
        assert not set(held_out.tolist()) & set(fitted.tolist())
        assert 75 <= len(held_out) <= 75 + int(groups.bincount().max())
    first, second = (LabelledExamples.divided(torch.arange(300) % 2, groups, seed=seed).held_out for seed in (0, 1))
    assert not torch.equal(first, second)


def test_groups_show_that_a_probe_only_knows_the_groups() -> None:
    """Each of 60 groups has a place of its own and a random label: nothing carries over to other groups."""
    groups = torch.arange(600) % 60
    places = torch.randn(60, 100, generator=generator())
    x = places[groups] + 0.1 * torch.randn(600, 100, generator=generator(1))
    labels = torch.randint(0, 2, (60,), generator=generator(2))[groups]
    assert probe_activations(x, labels).accuracy > 0.99
    assert probe_activations(x, labels, groups=groups.tolist(), test_share=0.5).accuracy < 0.75


def test_the_interval_draws_groups_and_not_examples() -> None:
    x, labels, _ = planted(n=200, d=3, strength=0.7)
    x, labels, groups = x.repeat(6, 1), labels.repeat(6), torch.arange(200).repeat(6)
    by_group, by_example = (probe_activations(x, labels, groups=one, seed=3) for one in (groups, None))
    assert by_group.high - by_group.low > 1.8 * (by_example.high - by_example.low)


def test_groups_count_by_their_size_in_the_interval() -> None:
    x, labels, _ = planted(n=400, strength=0.7)
    groups = torch.randint(0, 20, (400,), generator=generator(3)).square() // 20
    found = probe_activations(x, labels, groups=groups, seed=4)
    examples = LabelledExamples.divided(labels, groups, seed=4)
    held_out, groups = examples.held_out, examples.groups
    right = (torch.tensor(found.probe.predict(x)) == labels)[held_out].double()
    of_group = [right[groups[held_out] == group] for group in groups[held_out].unique()]
    shares, sizes = torch.stack([one.mean() for one in of_group]), torch.tensor([float(len(one)) for one in of_group])
    assert len(set(sizes.tolist())) > 2
    low, high = bootstrap_interval(shares, seed=4, weights=sizes)
    assert (found.low, found.high) == pytest.approx((float(low), float(high)))


def test_the_interval_of_a_weighted_mean_is_that_of_the_examples_drawn() -> None:
    """Groups of several sizes, drawn as wholes: the same draws, written out."""
    values, sizes = torch.tensor([0.2, 0.9, 0.5, 0.0], dtype=torch.float64), torch.tensor([1.0, 4.0, 2.0, 3.0])
    drawn = torch.randint(4, (50, 4), generator=generator(7))
    means = [
        sum(float(sizes[i] * values[i]) for i in draw) / sum(float(sizes[i]) for i in draw) for draw in drawn.tolist()
    ]
    ends = torch.quantile(torch.tensor(means, dtype=torch.float64), torch.tensor([0.1, 0.9], dtype=torch.float64))
    low, high = bootstrap_interval(values, 0.8, 50, 7, weights=sizes)
    torch.testing.assert_close(torch.stack([low, high]), ends)
    even = bootstrap_interval(values, 0.8, 50, 7, weights=torch.full((4,), 3.0))
    torch.testing.assert_close(even, bootstrap_interval(values, 0.8, 50, 7))


def test_the_majority_is_that_of_the_examples_fitted() -> None:
    labels = ["rare"] * 20 + ["common"] * 60
    x = torch.randn(80, 3, generator=generator())
    examples = LabelledExamples.divided(labels)
    found = probe_activations(x, labels)
    held_out = [label for label, out in zip(labels, examples.held_out.tolist(), strict=True) if out]
    assert found.majority == held_out.count("common") / len(held_out)
    assert (found.n_fitted, found.n_held_out) == (60, 20)
    turned = ["a" if out or index % 3 == 0 else "b" for index, out in enumerate(examples.held_out.tolist())]
    assert probe_activations(x, turned).majority == 0  # "b" among those fitted, "a" among those held out


# Control tasks


def test_a_probe_that_memorises_its_types_is_not_selective() -> None:
    """As many dimensions as types: any labels of types can be learned by heart."""
    types = torch.arange(800) % 40
    x = torch.randn(40, 60, generator=generator())[types] + 0.05 * torch.randn(800, 60, generator=generator(1))
    labels = torch.randint(0, 2, (40,), generator=generator(2))[types]
    found = probe_activations(x, labels, types=types)
    assert found.accuracy > 0.99
    assert found.control_accuracy is not None
    assert found.selectivity is not None
    assert found.control_accuracy > 0.99
    assert abs(found.selectivity) < 0.01


def test_a_probe_that_finds_what_types_share_is_selective() -> None:
    """Hundreds of types in few dimensions, and a direction that half of them have in common."""
    types = torch.arange(2000) % 400
    labels = types % 2
    x = torch.randn(400, 8, generator=generator())[types]
    x[:, 0] += 4 * labels
    found = probe_activations(x, labels, types=types)
    assert found.control_accuracy is not None
    assert found.selectivity is not None
    assert found.accuracy > 0.95
    assert found.control_accuracy < 0.7
    assert found.selectivity == pytest.approx(found.accuracy - found.control_accuracy)


def test_a_control_task_is_a_random_function_of_the_type_with_the_labels_that_there_are() -> None:
    types = [f"word {index % 200}" for index in range(1000)]
    labels = ["a" if index % 5 else "b" for index in range(1000)]
    examples = LabelledExamples.divided(labels, types=types, n_controls=4)
    assert examples.controls.shape == (4, 1000)
    for control in examples.controls:
        assert all(len(set(control[one::200].tolist())) == 1 for one in range(200))
        assert 0.08 < float(control.double().mean()) < 0.32  # "b" is a fifth of the labels
    assert not torch.equal(examples.controls[0], examples.controls[1])


def test_a_control_task_has_two_labels_at_least(monkeypatch: pytest.MonkeyPatch) -> None:
    types = torch.arange(100) % 2
    examples = LabelledExamples.divided([index % 10 == 0 for index in range(100)], types=types, n_controls=20)
    assert all(len(control.unique()) == 2 for control in examples.controls)
    monkeypatch.setattr("hooked_lm.probing.labels._MOST_DRAWS", 0)
    with pytest.raises(ValueError, match="0 control tasks had one label each"):
        LabelledExamples.divided([0, 1] * 50, types=types)


def test_control_tasks_are_scored_on_types_that_were_fitted() -> None:
    """A type that was never fitted cannot be known by heart, and would make any probe look selective."""
    types = [index % 30 if index < 600 else 1000 + index for index in range(800)]
    examples = LabelledExamples.divided(torch.arange(800) % 2, types=types)
    known = {types[index] for index in (~examples.held_out).nonzero()[:, 0].tolist()}
    expected = [bool(out) and kind in known for out, kind in zip(examples.held_out, types, strict=True)]
    assert examples.recurring.tolist() == expected
    assert 0 < sum(expected) < int(examples.held_out.sum())
    x = torch.randn(1030, 60, generator=generator())[torch.tensor([kind % 1030 for kind in types])]
    found = probe_activations(x, torch.tensor(types) % 2, types=types)
    assert found.control_accuracy is not None
    assert found.selectivity is not None
    assert found.control_accuracy > 0.98
    assert abs(found.selectivity) < 0.02  # of the same examples: on all of them the probe does worse
    assert found.accuracy < 0.95


# What is refused


@pytest.mark.usefixtures("no_type_checks")
@pytest.mark.parametrize(
    ("x", "labels", "how", "message"),
    [
        (torch.zeros(8, 2), [0, 1] * 3, {}, r"activations are \[example d\] with 6 labels, got \(8, 2\)"),
        (torch.zeros(8), [0, 1] * 4, {}, r"got \(8,\)"),
        (torch.full((8, 2), float("nan")), [0, 1] * 4, {}, "6 of 6 activations have entries that are NaN"),
        (torch.zeros(8, 2), [0.5, 1.5] * 4, {}, "strings or whole numbers, one for each example; got float"),
        (torch.zeros(8, 2), ["a", 1] * 4, {}, "got int, str"),
        (torch.zeros(0, 2), [], {}, "got none"),
        (torch.zeros(8, 2), [3] * 8, {}, "all 8 examples have 3"),
        (torch.zeros(8, 2), [0, 1] * 4, {"kind": "mlp"}, "'linear' or 'logistic', got 'mlp'"),
        (torch.zeros(8, 2), [0, 1] * 4, {"l2": 0}, "l2 is a number above 0"),
        (torch.zeros(8, 2), [0, 1] * 4, {"test_share": 1.0}, "test_share is between 0 and 1"),
        (torch.zeros(8, 2), [0, 1] * 4, {"groups": [1, 2]}, "2 groups came for 8 examples"),
        (torch.zeros(8, 2), [0, 1] * 4, {"groups": [1, 1, 1, 1, 2, 2, 3, 3]}, "3 groups cannot be divided"),
        (torch.zeros(8, 2), [0, 1] * 4, {"types": [1] * 8}, "all examples are of one type"),
        (torch.zeros(8, 2), [0, 1] * 4, {"types": list(range(8))}, "0 of 2 held-out examples have a type"),
        (torch.zeros(8, 2), [0, 1] * 4, {"types": [1, 2] * 4, "n_controls": 0}, "n_controls is 1 or more"),
        (torch.zeros(8, 2), [0, 1] * 4, {"confidence": 1.0}, "confidence is between 0 and 1"),
    ],
)
def test_what_cannot_be_probed_raises(x: Tensor, labels: Any, how: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        probe_activations(x, labels, **how)


def test_fitted_examples_of_one_label_raise() -> None:
    x, labels = torch.zeros(8, 2), ["same"] * 7 + ["other"]
    held_out = LabelledExamples.divided(torch.arange(8) % 2).held_out.tolist().index(True)
    labels[7], labels[held_out] = labels[held_out], labels[7]
    with pytest.raises(ValueError, match="all 6 examples to fit have the label 'same'"):
        probe_activations(x, labels)


def test_a_probe_refuses_activations_of_another_width() -> None:
    x, labels, _ = planted(n=20, d=4)
    with pytest.raises(ValueError, match=r"reads activations \[\*example 4\], got \(2, 3\)"):
        fit_probe(x, labels).scores(torch.zeros(2, 3))


def test_labels_may_be_true_and_false() -> None:
    x, labels, direction = planted(n=400, d=4, strength=2)
    probe = fit_probe(x, labels.bool())
    assert probe.classes == (0, 1)
    assert float(probe.direction @ direction) > 0.9


@pytest.mark.usefixtures("no_type_checks")
def test_entries_are_compared_by_value_in_whatever_they_come() -> None:
    """Tensors without axes hash by identity: each would be a group or a type of its own."""
    groups, types, labels = (torch.arange(120) % n for n in (30, 7, 2))
    expected = LabelledExamples.divided(labels, groups, types)
    for kind in (list, np.asarray, lambda one: list(np.asarray(one)), lambda one: one.tolist()):
        got = LabelledExamples.divided(kind(labels), kind(groups), kind(types))
        assert torch.equal(got.held_out, expected.held_out)
        assert torch.equal(got.controls, expected.controls)
        assert got.classes == expected.classes == (0, 1)
    named = LabelledExamples.divided(np.array(["a", "b"])[labels.numpy()])
    assert named.classes == ("a", "b")


def test_a_label_that_was_never_fitted_counts_as_wrong() -> None:
    labels = ["a", "b"] * 20
    held_out = LabelledExamples.divided(torch.arange(40) % 2).held_out.tolist()
    labels[held_out.index(True)] = "rare"
    x = torch.tensor([[{"a": -1.0, "b": 1.0, "rare": 9.0}[label]] for label in labels])
    found = probe_activations(x, labels)
    assert found.probe.classes == ("a", "b")
    assert found.accuracy == 0.9


def test_probes_score_under_autocast_in_their_own_precision() -> None:
    x, labels, _ = planted(n=100, d=6, dtype=torch.float32)
    probe = fit_probe(x, labels)
    alone = probe.scores(x)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(probe.scores(x), alone)
