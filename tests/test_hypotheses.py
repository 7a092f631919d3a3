"""Tests of hypotheses: p-values right under the null, effects that are found, words that follow the numbers."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from torch import Tensor

from hooked_lm import HookedTransformer, HookedTransformerConfig
from hooked_lm.hypotheses import (
    EffectTest,
    adjusted,
    against_controls,
    control_heads,
    controlled_test,
    detectable_effect,
    effect_test,
    pairs_needed,
    power,
    shuffled,
)
from hooked_lm.patching.statistics import bootstrap_interval


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def model() -> HookedTransformer:
    return HookedTransformer(
        HookedTransformerConfig(n_layers=3, d_model=8, n_ctx=4, n_heads=4, d_head=2, d_vocab=5, act_fn="relu")
    )


# p-values


def signs_by_hand(differences: list[float], alternative: str) -> float:
    observed = sum(differences)
    sums = [
        sum(s * d for s, d in zip(signs, differences, strict=True))
        for signs in itertools.product((1, -1), repeat=len(differences))
    ]
    if alternative == "two-sided":
        return sum(abs(one) >= abs(observed) - 1e-9 for one in sums) / len(sums)
    sign = 1 if alternative == "greater" else -1
    return sum(sign * one >= sign * observed - 1e-9 for one in sums) / len(sums)


def groups_by_hand(first: list[float], second: list[float], alternative: str) -> float:
    values, n = [*first, *second], len(first)
    gaps = []
    for chosen in itertools.combinations(range(len(values)), n):
        inside = [values[i] for i in chosen]
        outside = [values[i] for i in range(len(values)) if i not in chosen]
        gaps.append(sum(inside) / n - sum(outside) / len(outside))
    observed = sum(first) / n - sum(second) / len(second)
    if alternative == "two-sided":
        return sum(abs(one) >= abs(observed) - 1e-9 for one in gaps) / len(gaps)
    sign = 1 if alternative == "greater" else -1
    return sum(sign * one >= sign * observed - 1e-9 for one in gaps) / len(gaps)


@pytest.mark.parametrize("alternative", ["two-sided", "greater", "less"])
@pytest.mark.parametrize(
    "differences", [[1.0, 2.0, 3.0, 4.0], [0.1, 0.2, 0.3, -0.6, 0.0], [1.0, -1.0], [0.3] * 7, [-0.1, -0.2, 0.1, -0.7]]
)
def test_p_values_of_pairs_are_those_by_hand(differences: list[float], alternative: str) -> None:
    found = effect_test(differences, alternative=alternative)  # type: ignore[arg-type]
    assert float(found.p) == pytest.approx(signs_by_hand(differences, alternative), abs=1e-12)
    assert found.n_permutations is None


@pytest.mark.parametrize("alternative", ["two-sided", "greater", "less"])
@pytest.mark.parametrize(
    ("first", "second"),
    [([1.0, 2.0, 3.5], [0.0, 0.5, 1.0, 2.0]), ([0.1, 0.2], [0.3, 0.4]), ([1.0, 1.0], [1.0, 1.0, 1.0])],
)
def test_p_values_of_groups_are_those_by_hand(first: list[float], second: list[float], alternative: str) -> None:
    found = effect_test(first, second, pairs=False, alternative=alternative)  # type: ignore[arg-type]
    assert float(found.p) == pytest.approx(groups_by_hand(first, second, alternative), abs=1e-12)
    assert found.n == (len(first), len(second))


def test_four_pairs_that_agree_have_the_smallest_p_there_is() -> None:
    found = effect_test([1.0, 2.0, 3.0, 4.0])
    assert float(found.p) == found.smallest_p == 2 / 16


@pytest.mark.parametrize("pairs", [True, False])
def test_drawn_permutations_come_close_to_all_of_them_and_are_never_zero(pairs: bool) -> None:
    values = normal(2, 14, seed=3) + 0.3
    other = None if pairs else normal(2, 9, seed=4)
    all_of_them = effect_test(values, other, pairs=pairs, n_permutations=10**6)
    drawn = effect_test(values, other, pairs=pairs, n_permutations=9_999)
    assert all_of_them.n_permutations is None
    assert drawn.n_permutations == 9_999
    deviations = (all_of_them.p * (1 - all_of_them.p) / 9_999).sqrt()
    assert bool(((drawn.p - all_of_them.p).abs() < 4 * deviations + 1e-4).all())
    far = effect_test(normal(40) + 10, None if pairs else normal(40, seed=1), pairs=pairs, n_permutations=999)
    assert float(far.p) == 1 / 1000 == far.smallest_p


def kolmogorov_smirnov(p: Tensor) -> float:
    ordered = p.sort().values
    steps = torch.arange(1, len(p) + 1) / len(p)
    return float(torch.maximum(steps - ordered, ordered - steps + 1 / len(p)).max())


@pytest.mark.parametrize("pairs", [True, False])
def test_p_values_are_uniform_where_there_is_no_effect(pairs: bool) -> None:
    # Skewed, with another scale in each draw; pairs have the symmetry that the hypothesis says.
    scale = normal(2000, 1, seed=5).exp()
    skewed = normal(2000, 24, seed=6).exp() * scale
    if pairs:
        found = effect_test(skewed[:, :12] - skewed[:, 12:], correction=None, n_permutations=4096)
    else:
        found = effect_test(skewed[:, :10], skewed[:, 10:], pairs=False, correction=None, n_permutations=2000)
    assert kolmogorov_smirnov(found.p) < 1.63 / math.sqrt(2000)  # the value that 1 in 100 exceeds
    assert abs(float(found.found.double().mean()) - 0.05) < 3 * math.sqrt(0.05 * 0.95 / 2000)


def test_a_known_effect_is_found_as_often_as_the_power_says() -> None:
    draws, n, size = 1500, 20, 0.7
    found = effect_test(normal(draws, n, seed=7) + size, correction=None, n_permutations=1000, n_resamples=1)
    expected = power(size, n)
    rate = float(found.found.double().mean())
    assert abs(rate - expected) < 4 * math.sqrt(expected * (1 - expected) / draws) + 0.01


def test_two_groups_with_a_known_difference_are_told_apart_and_equal_ones_are_not() -> None:
    first, second = normal(30, seed=8) + 1.5, normal(25, seed=9)
    assert bool(effect_test(first, second, pairs=False).found)
    assert not bool(effect_test(first - 1.5, second, pairs=False).found)


def test_pairs_are_used_as_pairs() -> None:
    base = 100 * normal(30, seed=1)
    treated = base + 1 + 0.1 * normal(30, seed=2)
    assert bool(effect_test(treated, base).found)
    assert not bool(effect_test(treated, base, pairs=False).found)


@pytest.mark.parametrize("alternative", ["two-sided", "greater", "less"])
@pytest.mark.parametrize("offset", [0.0, 3.7])
def test_numbers_in_single_precision_have_the_ties_that_they_have_in_double(alternative: str, offset: float) -> None:
    differences = torch.tensor([0.1, 0.2, 0.3, -0.6, 0.4, -0.4], dtype=torch.float64)
    base = torch.tensor([0.3, 1.1, 0.2, 0.9, 2.3, 0.7], dtype=torch.float64) + offset
    exact = signs_by_hand(differences.tolist(), alternative)
    in_single = effect_test((base + differences).float(), base.float(), alternative=alternative)  # type: ignore[arg-type]
    assert float(in_single.p) == pytest.approx(exact)
    alone = effect_test(differences.float(), alternative=alternative)  # type: ignore[arg-type]
    assert float(alone.p) == pytest.approx(exact)


# Numbers beside the p-value


def test_mean_interval_and_effect_size_are_those_by_hand() -> None:
    treated, baseline = normal(3, 8, seed=1) + 0.5, normal(3, 8, seed=2)
    found = effect_test(treated.float(), baseline.float().numpy())
    gaps = treated.float().double() - baseline.float().double()
    assert torch.allclose(found.mean, gaps.mean(-1))
    assert torch.allclose(found.effect_size, gaps.mean(-1) / gaps.std(-1) * (1 - 3 / (4 * 7 - 1)))
    low, high = bootstrap_interval(gaps, 0.95, 1000, 0)
    assert torch.equal(found.low, low)
    assert torch.equal(found.high, high)


def test_effect_size_and_interval_of_groups_are_those_by_hand() -> None:
    first, second = normal(6, seed=1) + 1, 2 * normal(9, seed=2)
    found = effect_test(first, second, pairs=False, n_resamples=4000)
    pooled = math.sqrt((5 * float(first.var()) + 8 * float(second.var())) / 13)
    gap = float(first.mean() - second.mean())
    assert float(found.effect_size) == pytest.approx(gap / pooled * (1 - 3 / (4 * 13 - 1)))
    # The bootstrap's deviation: of each group, the one with n in place of n - 1.
    deviation = math.sqrt(float(first.var(correction=0)) / 6 + float(second.var(correction=0)) / 9)
    assert float(found.low) == pytest.approx(gap - 1.96 * deviation, abs=0.12)
    assert float(found.high) == pytest.approx(gap + 1.96 * deviation, abs=0.12)


def test_no_difference_at_all_is_no_effect_and_one_that_never_varies_is_infinite() -> None:
    none = effect_test([2.0, 3.0, 4.0], [2.0, 3.0, 4.0])
    assert (float(none.p), float(none.effect_size), float(none.mean)) == (1.0, 0.0, 0.0)
    assert float(effect_test([1.0] * 8).effect_size) == math.inf
    assert float(effect_test([-0.1] * 7).effect_size) == -math.inf


# Many tests


@pytest.mark.usefixtures("no_type_checks")
def test_holm_and_benjamini_hochberg_by_hand() -> None:
    p = torch.tensor([[0.01, 0.04], [0.03, 0.005]], dtype=torch.float64)
    assert adjusted(p, "holm").flatten().tolist() == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert adjusted(p, "bh").flatten().tolist() == pytest.approx([0.02, 0.04, 0.04, 0.02])
    assert torch.equal(adjusted(p, None), p)
    assert adjusted(torch.tensor([0.7, 0.9]), "holm").tolist() == pytest.approx([1.0, 1.0])
    with pytest.raises(ValueError, match="correction is 'holm', 'bh' or None, got 'bonferroni'"):
        adjusted(p, "bonferroni")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="p-values are between 0 and 1"):
        adjusted(p - 0.02)


def test_holm_holds_the_chance_of_any_false_finding_and_bh_their_share() -> None:
    generator = np.random.default_rng(0)
    families, m, true = 600, 20, 8
    p = torch.tensor(generator.uniform(size=(families, m)))
    p[:, :true] = torch.tensor(generator.beta(0.1, 6, size=(families, true)))  # small ones: real effects
    false = {"holm": 0, "bh": 0.0, None: 0}
    for row in p:
        for correction in false:
            found = adjusted(row, correction) <= 0.05  # type: ignore[arg-type]
            wrong = int(found[true:].sum())
            false[correction] += wrong / max(1, int(found.sum())) if correction == "bh" else wrong > 0
    bound = 0.05 + 3 * math.sqrt(0.05 * 0.95 / families)
    assert false["holm"] / families < bound
    assert false["bh"] / families < bound
    assert false[None] / families > 0.3


def test_one_head_with_an_effect_among_many_is_found_alone() -> None:
    differences = normal(4, 8, 40, seed=2)
    differences[2, 5] += 1.2
    found = effect_test(differences)
    assert found.found.nonzero().tolist() == [[2, 5]]
    assert found.verdict.startswith(
        "1 of 32 cells shows an effect at alpha 0.05, after the correction of Holm, 40 pairs; the largest is L2H5, +1.3"
    )
    assert found.top(1)[0]["label"] == "L2H5"
    assert str(found).splitlines()[2].startswith("L2H5  * ")
    none = effect_test(normal(4, 8, 40, seed=3))
    assert none.verdict.startswith(
        "none of 32 cells shows an effect at alpha 0.05, after the correction of Holm, 40 pairs"
    )
    assert none.headline == "none of 32 cells shows an effect, after the correction of Holm"


# Power


@pytest.mark.parametrize(
    ("size", "n", "alternative", "expected"),
    # G*Power and R's power.t.test(type = "paired") agree on these.
    [
        (0.5, 34, "two-sided", 0.8078),
        (0.8, 15, "two-sided", 0.8213),
        (0.5, 27, "greater", 0.8118),
        (0.3, 10, "greater", 0.2200),
    ],
)
def test_power_is_that_of_the_noncentral_t(size: float, n: int, alternative: str, expected: float) -> None:
    assert power(size, n, alternative=alternative) == pytest.approx(expected, abs=2e-3)  # type: ignore[arg-type]


def test_power_agrees_with_draws() -> None:
    for size, n in ((0.6, 5), (1.0, 3), (0.2, 60)):
        x = normal(200_000, n, seed=n) + size
        t = x.mean(-1) / (x.std(-1) / math.sqrt(n))
        null = normal(200_000, n, seed=n + 100)
        critical = float((null.mean(-1) / (null.std(-1) / math.sqrt(n))).abs().quantile(0.95)) if n < 80 else 0
        assert power(size, n) == pytest.approx(float((t.abs() > critical).double().mean()), abs=0.012)


def test_without_an_effect_the_power_is_alpha_and_a_wrong_direction_has_next_to_none() -> None:
    for n in (2, 3, 10, 1000):
        assert power(0.0, n) == pytest.approx(0.05, abs=1e-6)
    assert power(-0.8, 30, alternative="greater") < 1e-4
    assert power(-0.8, 30, alternative="less") == power(0.8, 30, alternative="greater")


def test_pairs_needed_are_the_fewest_and_the_detectable_effect_is_the_smallest() -> None:
    for size in (0.3, 0.5, 1.5):
        n = pairs_needed(size)
        assert power(size, n) >= 0.8 > power(size, n - 1)
        assert detectable_effect(n) <= size < detectable_effect(n - 1)
    assert pairs_needed(0.5) == 34
    assert pairs_needed(-0.5, alternative="less") == 27
    assert detectable_effect(27, alternative="less") == pytest.approx(-0.5, abs=0.01)
    assert pairs_needed(50.0) == 2


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: power(0.5, 1), "two pairs or more, got 1"),
        (lambda: power(math.nan, 5), "an effect size is a finite number"),
        (lambda: power(0.5, 5, alpha=1.5), "alpha is between 0 and 1"),
        (lambda: power(0.5, 5, alternative="more"), "alternative is"),  # type: ignore[arg-type]
        (lambda: pairs_needed(0.0), "no number of pairs finds an effect of 0.0"),
        (lambda: pairs_needed(-0.5, alternative="greater"), "no number of pairs finds"),
        (lambda: pairs_needed(0.5, wanted=1.0), "the power wanted is between alpha"),
        (lambda: pairs_needed(1e-6), "more than ten million pairs"),
    ],
)
@pytest.mark.usefixtures("no_type_checks")
def test_settings_of_power_that_make_no_sense_raise(call: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()  # type: ignore[operator]


# Controls


def test_control_heads_are_others_as_many_in_each_layer() -> None:
    given = [(0, 1), (2, 0), (2, 3)]
    found = control_heads(model(), given, n=50, seed=3)
    assert len(found) == 50
    for control in found:
        assert not set(control) & set(given)
        assert sorted(layer for layer, _ in control) == [0, 2, 2]
        assert len(set(control)) == 3
    assert len(set(found)) > 2
    assert found == control_heads(model(), given, n=50, seed=3) != control_heads(model(), given, n=50, seed=4)
    # Of the last layer's heads all are given: the others come from elsewhere.
    most = control_heads(model(), [(2, head) for head in range(4)], n=5)
    assert all(layer < 2 for control in most for layer, _ in control)
    with pytest.raises(ValueError, match="the model has 5 other heads, and 7 are needed"):
        control_heads(model(), [(layer, head) for layer in range(3) for head in range(4)][:7])
    for wrong in ([], [(0, 4)], [(3, 0)], [(0, 0), (0, 0)]):
        with pytest.raises(ValueError, match="heads are different pairs"):
            control_heads(model(), wrong)


def test_shuffled_labels_keep_their_groups() -> None:
    labels, groups = ["a", "b", "c", "d", "a", "b"], [0, 0, 0, 1, 1, 1]
    for order in shuffled(labels, 30, groups):
        assert sorted(order[:3]) == ["a", "b", "c"]
        assert sorted(order[3:]) == ["a", "b", "d"]
    assert len({tuple(order) for order in shuffled(labels, 30, groups)}) > 10
    assert shuffled(labels, 2, seed=1) == shuffled(labels, 2, seed=1)
    with pytest.raises(ValueError, match="within each group all labels are the same"):
        shuffled(["a", "a", "b"], groups=[0, 0, 1])
    with pytest.raises(ValueError, match="groups are one for each of the 2 labels, got 1"):
        shuffled(["a", "b"], groups=[0])


def test_a_control_is_reached_or_not() -> None:
    best = against_controls(2.0, [0.1, -0.5, 1.9], kind="random heads")
    assert (best.n_reached, best.p) == (0, 0.25)
    assert best.verdict == "larger than that of all 3 random heads (p = 0.25)"
    tied = against_controls(2.0, [0.1, -2.0, 2.0])
    assert (tied.n_reached, tied.p) == (2, 0.75)
    assert tied.verdict == "2 of 3 controls have as large a one (p = 0.75)"
    assert against_controls(2.0, [0.1, -2.0, 2.0], "greater").n_reached == 1
    assert against_controls(-2.0, [0.1, -2.0, 2.0], "less").n_reached == 1
    for wrong in ([], [math.nan]):
        with pytest.raises(ValueError, match="one control or more, all of them finite"):
            against_controls(1.0, wrong)


def effects_of(strong: set[tuple[int, int]], base: float = 0.0) -> object:
    def effect(heads: list[tuple[int, int]]) -> Tensor:
        return normal(30, seed=1) * 0.3 + sum(head in strong for head in heads) + base

    return effect


def test_the_heads_that_matter_are_told_from_random_ones() -> None:
    found = controlled_test(effects_of({(1, 2)}), heads=[(1, 2)], model=model())  # type: ignore[arg-type]
    assert found.control is not None
    assert (found.control.n_reached, len(found.control.controls)) == (0, 20)
    assert found.verdict.startswith("an effect: +")
    assert found.verdict.endswith("30 pairs; larger than that of all 20 random heads (p = 0.0476)")


def test_an_effect_that_any_head_has_is_no_finding() -> None:
    found = controlled_test(effects_of(set(), base=1.0), heads=[(1, 2), (0, 0)], model=model())  # type: ignore[arg-type]
    assert bool(found.found)
    assert found.verdict.startswith("an effect, but not more than that of controls: ")
    assert found.verdict.endswith("20 of 20 random sets of 2 heads have as large a one (p = 1)")


def test_labels_that_matter_are_told_from_shuffled_ones() -> None:
    truth = torch.tensor([0, 1] * 15)

    def effect(labels: list[int]) -> Tensor:
        return (torch.tensor(labels) == truth).double() - 0.5

    found = controlled_test(effect, labels=truth.tolist(), seed=2)
    assert found.control is not None
    assert found.control.n_reached == 0
    assert "larger than that of all 20 shuffles of the labels" in found.verdict
    few = controlled_test(effect, labels=truth.tolist(), n_controls=3)
    assert few.verdict.startswith("an effect, of which 3 controls are too few to be sure: ")


def test_a_control_needs_heads_with_their_model_or_labels() -> None:
    for settings in ({}, {"heads": [(0, 0)]}, {"heads": [(0, 0)], "model": model(), "labels": [0, 1]}):
        with pytest.raises(ValueError, match="a control is made of heads, which need their model, or of labels"):
            controlled_test(effects_of(set()), **settings)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"an effect that is compared with controls is \[pair\]; got cells \(3,\)"):
        controlled_test(lambda heads: normal(3, 5), heads=[(0, 0)], model=model())


# Words


def test_a_single_effect_in_words() -> None:
    values = normal(40, seed=5) + 0.9
    found = effect_test(values)
    assert found.verdict == (
        f"an effect: {float(values.mean()):+.3g} (95 % interval {float(found.low):.3g} to {float(found.high):.3g}), "
        f"g = {float(found.effect_size):.2f}, p = {float(found.p):.2g}, 40 pairs; compared with no control"
    )
    assert str(found) == found.verdict
    assert found.headline == "an effect"


def test_no_effect_in_words_says_what_would_have_been_found() -> None:
    found = effect_test(normal(30, seed=6))
    assert found.verdict.startswith("no effect shown: ")
    size = detectable_effect(30)
    assert found.verdict.endswith(f"an effect of {size:.2f} standard deviations would be found four times in five")


@pytest.mark.parametrize("correction", ["holm", "bh"])
def test_what_would_be_found_in_a_grid_is_found_so_often(correction: str) -> None:
    nothing = effect_test(normal(100, 20, seed=11), correction=correction, n_resamples=1)  # type: ignore[arg-type]
    said = float(nothing.verdict.rpartition("an effect of ")[2].split()[0])
    hits = 0
    for seed in range(40):
        values = normal(100, 20, seed=100 + seed)
        values[3] += said
        found = effect_test(values, correction=correction, n_permutations=20_000, n_resamples=1)  # type: ignore[arg-type]
        hits += bool(found.found[3])
    assert hits >= 24  # four in five are expected; fewer in 1 of 1000


def test_too_few_pairs_are_said_to_be_too_few() -> None:
    assert effect_test([1.0, 2.0, 3.0, 4.0]).verdict.endswith(
        "4 pairs cannot show any: the smallest p-value there is is 0.12"
    )
    grid = effect_test(normal(100, 8, seed=1) + 5)
    assert grid.verdict.endswith("8 pairs cannot show any: the smallest p-value there is is 0.0078")
    assert effect_test([1.0, 2.0], [3.0, 5.0], pairs=False).verdict.endswith(
        "2 and 2 values cannot show any: the smallest p-value there is is 0.33"
    )


@pytest.mark.parametrize(
    ("arguments", "settings", "message"),
    [
        (([1.0],), {}, r"treated has shape \(1,\): a test takes two values or more"),
        ((1.0,), {}, r"treated has shape \(\)"),
        (([1.0, math.nan],), {}, "treated has 1 values that are not finite: leave those pairs out"),
        (([1.0, 2.0], [1.0, math.inf]), {}, "baseline has 1 values that are not finite"),
        (([1.0, 2.0], [1.0, 2.0, 3.0]), {}, "pairs have the same shape"),
        (([[1.0, 2.0]], [1.0, 2.0, 3.0]), {"pairs": False}, "all axes but the last are the same"),
        (([1.0, 2.0],), {"pairs": False}, "two groups are needed"),
        (([1.0, 2.0],), {"alternative": "more"}, "alternative is 'two-sided', 'greater' or 'less', got 'more'"),
        (([1.0, 2.0],), {"correction": "fdr"}, "correction is 'holm', 'bh' or None, got 'fdr'"),
        (([1.0, 2.0],), {"alpha": 0.0}, "alpha is between 0 and 1"),
        (([1.0, 2.0],), {"n_permutations": 0}, "n_permutations is at least 1"),
        (([1.0, 2.0],), {"confidence": 1.0}, "confidence is between 0 and 1"),
        (([1.0, 2.0], [1.0, 2.0]), {"pairs": False, "confidence": 1.0}, "confidence is between 0 and 1"),
        (([[1.0, 2.0]],), {"labels": ["a", "b"]}, "labels are one for each of the 1 cells, got 2"),
    ],
)
@pytest.mark.usefixtures("no_type_checks")
def test_what_makes_no_test_raises(arguments: tuple[object, ...], settings: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        effect_test(*arguments, **settings)  # type: ignore[arg-type]


# Figures and rows


def test_rows_and_figures_hold_the_numbers() -> None:
    found: EffectTest = effect_test(normal(3, 30, seed=2) + torch.tensor([[0.0], [2.0], [0.5]]), labels=["a", "b", "c"])
    rows = found.rows()
    assert [row["label"] for row in rows] == ["a", "b", "c"]
    assert rows[1]["found"] is True
    assert [row["mean"] for row in rows] == found.mean.tolist()
    figure = found.figure()
    points = [trace for trace in figure.data if trace.mode == "markers"]
    assert sorted(x for trace in points for x in trace.x) == sorted(found.mean.tolist())
    assert figure.layout.title.text.startswith(found.headline[:20])
    grid = effect_test(normal(2, 3, 30, seed=2) + torch.eye(2, 3)[..., None] * 2)
    marks = grid.figure().data[1]
    assert [[y, x] for x, y in zip(marks.x, marks.y, strict=True)] == grid.found.nonzero().tolist()
    assert {(0, 0), (1, 1)} <= set(zip(marks.y, marks.x, strict=True))
    with pytest.raises(ValueError, match="k is at least 1"):
        found.top(0)
