"""effect_test: is there an effect, how large is it, and how sure is that?"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from hooked_lm._support.integers import at_least_one, integer
from hooked_lm.hooked_model import HookedModel
from hooked_lm.hypotheses.controls import ControlTest, Head, against_controls, control_heads, shuffled
from hooked_lm.hypotheses.corrections import CORRECTIONS, Correction, adjusted
from hooked_lm.hypotheses.permutation import ALTERNATIVES, Alternative, exact_count, group_p_values, sign_p_values
from hooked_lm.hypotheses.result import EffectTest
from hooked_lm.patching.statistics import bootstrap_interval
from hooked_lm.utils import ArrayLike, to_numpy

__all__ = ["controlled_test", "effect_test"]

# Bootstrap means that are held at once.
_CHUNK = 2**22


def effect_test(
    treated: ArrayLike,
    baseline: ArrayLike | None = None,
    *,
    pairs: bool = True,
    alternative: Alternative = "two-sided",
    correction: Correction | None = "holm",
    alpha: float = 0.05,
    confidence: float = 0.95,
    n_permutations: int = 10_000,
    n_resamples: int = 1000,
    labels: Sequence[str] | None = None,
    seed: int = 0,
) -> EffectTest:
    """Return a test of whether a mean difference is more than chance, for one effect or each of a grid.

    The p-value is that of a permutation test: under the hypothesis that nothing has an effect, a pair's difference is
    as likely as its negative, and with two groups each value is as likely in either. The interval of the mean is the
    bootstrap's. The effect size is Hedges' g: the mean over the standard deviation of the differences (of the two
    groups, pooled), times 1 - 3 / (4 df - 1) for small samples (Hedges 1981).

    Args:
        treated: the measurement with the treatment, [*cell pair]; or differences, where there is no baseline.
        baseline: without it, of the same shape; of two groups, [*cell other].
        pairs: entry i of one belongs to entry i of the other. False for two groups.
        alternative: `"greater"` asks whether the treated are larger, `"less"` smaller, `"two-sided"` for either.
        correction: of the p-values of a grid: `"holm"`, `"bh"` (Benjamini and Hochberg) or None.
        alpha: a p-value at or below it is a finding.
        confidence: of the interval.
        n_permutations: how many are tried; where there are no more, all are.
        n_resamples: of the bootstrap.
        labels: of the cells, in order; by default their indices. Cells [layer head] are `L0H1`.
        seed: of permutations and bootstrap.

    Raises:
        ValueError: shapes that do not fit, values that are not finite, fewer than two, or a setting out of range.
    """
    _check_settings(alternative, correction, alpha, n_permutations)
    first, second = _checked(treated, "treated"), None if baseline is None else _checked(baseline, "baseline")
    rounding = _rounding(treated, first) + (0.0 if second is None else _rounding(baseline, second))
    if not pairs and second is None:
        raise ValueError("two groups are needed: give the second as baseline, or pairs=True for differences")
    if second is not None and (first.shape != second.shape if pairs else first.shape[:-1] != second.shape[:-1]):
        raise ValueError(
            f"treated has shape {tuple(first.shape)} and baseline {tuple(second.shape)}: "
            + ("pairs have the same shape" if pairs else "all axes but the last are the same")
        )
    if pairs:
        differences = first if second is None else first - second
        p, drawn = sign_p_values(differences, alternative, n_permutations, seed, rounding)
        low, high = bootstrap_interval(differences, confidence, n_resamples, seed)
        mean, size = differences.mean(-1), _hedges(differences)
        n: int | tuple[int, int] = differences.shape[-1]
        ways = exact_count(differences.shape[-1])
    else:
        assert second is not None
        p, drawn = group_p_values(first, second, alternative, n_permutations, seed, rounding)
        low, high = _group_interval(first, second, confidence, n_resamples, seed)
        mean, size = first.mean(-1) - second.mean(-1), _hedges_of_groups(first, second)
        n = (first.shape[-1], second.shape[-1])
        ways = exact_count(*n)
    return EffectTest(
        n=n,
        alternative=alternative,
        labels=_labels(labels, mean),
        mean=mean,
        low=low,
        high=high,
        effect_size=size,
        p=p,
        p_adjusted=adjusted(p, correction),
        correction=correction if mean.numel() > 1 else None,
        alpha=alpha,
        confidence=confidence,
        n_permutations=drawn,
        smallest_p=min(1.0, (2 if alternative == "two-sided" else 1) / ways if drawn is None else 1 / (1 + drawn)),
        seed=seed,
    )


def controlled_test(
    effect: Callable[..., ArrayLike],
    *,
    heads: Sequence[Head] | None = None,
    model: HookedModel | None = None,
    labels: Sequence[Hashable] | None = None,
    groups: Sequence[Hashable] | None = None,
    n_controls: int = 20,
    alternative: Alternative = "two-sided",
    seed: int = 0,
    **settings: object,
) -> EffectTest:
    """Return the test of an effect that is measured again on controls: other heads, or shuffled labels.

    Args:
        effect: of heads, or of labels, to the difference that they make in each pair, [pair].
        heads: whose effect it is, as (layer, head). Controls are random other heads, as many in each layer.
        model: whose heads they are.
        labels: whose effect it is, where there are no heads. Controls are the labels in random orders.
        groups: one for each label; labels are shuffled within groups.
        n_controls: how many; 19 or more reach p = 0.05.
        alternative, seed: as for `effect_test`; the seed is that of the controls too.
        settings: of `effect_test`.

    Raises:
        ValueError: neither heads with a model nor labels are given, an effect is not [pair], or as `effect_test`,
            `control_heads` and `shuffled`.
    """
    if (heads is None) == (labels is None) or (heads is not None and model is None):
        raise ValueError(
            "a control is made of heads, which need their model, or of labels: give heads=[(layer, head)] and model=, "
            "or labels=. To test without a control, give the measured numbers instead of a function"
        )
    given: object = heads if heads is not None else labels
    found = effect_test(effect(given), alternative=alternative, seed=seed, **settings)  # type: ignore[arg-type]
    if found.mean.ndim:
        raise ValueError(f"an effect that is compared with controls is [pair]; got cells {tuple(found.mean.shape)}")
    controls: Sequence[object]
    if heads is not None and model is not None:
        controls, kind = control_heads(model, heads, n_controls, seed), "random heads"
        kind = kind if len(heads) == 1 else f"random sets of {len(heads)} heads"
    else:
        controls, kind = shuffled(list(labels or ()), n_controls, groups, seed), "shuffles of the labels"
    means = [float(_checked(effect(one), "the effect of a control").mean()) for one in controls]
    return replace(found, control=_control(float(found.mean), means, alternative, kind))


def _control(effect: float, means: Sequence[float], alternative: Alternative, kind: str) -> ControlTest:
    return against_controls(effect, means, alternative, kind)


def _check_settings(alternative: str, correction: str | None, alpha: float, n_permutations: int) -> None:
    if alternative not in ALTERNATIVES:
        raise ValueError(f"alternative is 'two-sided', 'greater' or 'less', got {alternative!r}")
    if correction is not None and correction not in CORRECTIONS:
        raise ValueError(f"correction is 'holm', 'bh' or None, got {correction!r}")
    if not 0 < alpha < 1:
        raise ValueError(f"alpha is between 0 and 1, got {alpha}")
    at_least_one(n_permutations, "n_permutations")


def _checked(values: ArrayLike, what: str) -> Tensor:
    """Values as float64 on the CPU."""
    found = torch.as_tensor(to_numpy(values)).double()
    if found.ndim < 1 or found.shape[-1] < 2 or found.numel() == 0:
        raise ValueError(f"{what} has shape {tuple(found.shape)}: a test takes two values or more along the last axis")
    if not bool(found.isfinite().all()):
        raise ValueError(
            f"{what} has {int((~found.isfinite()).sum())} values that are not finite: leave those pairs out"
        )
    return found


def _rounding(given: ArrayLike | None, values: Tensor) -> Tensor:
    """By how much the sum of measured values may be off: each is rounded to the precision that it came in."""
    came = to_numpy(given) if given is not None else None
    if came is None or came.dtype.kind != "f":
        return torch.zeros(values.shape[:-1], dtype=torch.float64)
    return float(np.finfo(came.dtype).eps) * values.abs().sum(-1)


def _hedges(differences: Tensor) -> Tensor:
    df = differences.shape[-1] - 1
    return _ratio(differences.mean(-1), differences.std(-1)) * _small_sample(df)


def _hedges_of_groups(first: Tensor, second: Tensor) -> Tensor:
    n, m = first.shape[-1], second.shape[-1]
    pooled = (((n - 1) * first.var(-1) + (m - 1) * second.var(-1)) / (n + m - 2)).sqrt()
    return _ratio(first.mean(-1) - second.mean(-1), pooled) * _small_sample(n + m - 2)


def _ratio(mean: Tensor, deviation: Tensor) -> Tensor:
    """The mean in deviations: 0 for no difference at all, infinite for one that is always the same, up to rounding."""
    always = deviation <= 1e-12 * mean.abs()
    return torch.where(mean == 0, 0.0, torch.where(always, mean.sign() * torch.inf, mean / deviation))


def _small_sample(df: int) -> float:
    return 1 - 3 / (4 * df - 1)


def _group_interval(
    first: Tensor, second: Tensor, confidence: float, n_resamples: int, seed: int
) -> tuple[Tensor, Tensor]:
    """The percentile bootstrap interval of the difference of two means; each group is resampled."""
    if not 0 < confidence < 1 or integer(n_resamples, "n_resamples") < 1:
        raise ValueError(f"confidence is between 0 and 1 and n_resamples at least 1, got {confidence}, {n_resamples}")
    generator = torch.Generator().manual_seed(seed)
    shares = []
    for n in (first.shape[-1], second.shape[-1]):
        drawn = torch.randint(n, (n_resamples, n), generator=generator)
        shares.append(
            torch.zeros(n_resamples, n, dtype=torch.float64).scatter_add_(1, drawn, torch.ones_like(drawn).double()) / n
        )
    ends = torch.tensor([(1 - confidence) / 2, (1 + confidence) / 2], dtype=torch.float64)
    flat = [one.reshape(-1, one.shape[-1]) for one in (first, second)]
    rows = max(1, _CHUNK // n_resamples)
    found = [
        torch.quantile(a @ shares[0].T - b @ shares[1].T, ends, dim=-1)
        for a, b in zip(flat[0].split(rows), flat[1].split(rows), strict=True)
    ]
    low, high = torch.cat(found, 1).reshape(2, *first.shape[:-1])
    return low, high


def _labels(labels: Sequence[str] | None, mean: Tensor) -> tuple[str, ...]:
    if labels is not None:
        if len(labels) != mean.numel():
            raise ValueError(f"labels are one for each of the {mean.numel()} cells, got {len(labels)}")
        return tuple(map(str, labels))
    if mean.ndim == 0:
        return ("effect",)
    if mean.ndim == 2:
        return tuple(f"L{layer}H{head}" for layer in range(mean.shape[0]) for head in range(mean.shape[1]))
    return tuple(", ".join(map(str, index)) for index in (mean == mean).nonzero().tolist())
