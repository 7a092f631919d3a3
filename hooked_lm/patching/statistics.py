"""Patching many pairs of prompts at once: the score of each pair, their mean, and the mean's bootstrap interval.

One pair of prompts shows the effect of a component on that pair. Its effect on the task is a mean over many pairs, with
an interval.

Two directions (Heimersheim and Nanda 2024, "How to use and interpret activation patching"). Denoising puts clean
activations into the corrupted run and finds components that are sufficient to restore the answer. Noising puts
corrupted activations into the clean run and finds components that are necessary for it. The two differ: of two heads
that do the same thing, either is sufficient and neither is necessary.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

from hooked_lm.hooked_model import HookedModel
from hooked_lm.metrics import Metric
from hooked_lm.patching.patches import PATCHES, Patch, patch_cells, patch_sites
from hooked_lm.patching.sites import clean_activations, clean_prompts, read_prompts
from hooked_lm.sweep import sweep
from hooked_lm.sweep.options import DEFAULT_MEMORY_BUDGET
from hooked_lm.sweep.workers import Workers
from hooked_lm.tokenization import Prompts

__all__ = [
    "Direction",
    "Normalization",
    "PairScores",
    "bootstrap_interval",
    "normalize_scores",
    "patch_pairs",
    "share_of_same_sign",
]

Direction = Literal["denoising", "noising"]
Normalization = Literal["mean", "pair"]

# Means that are held at once while an interval is computed.
_CHUNK = 2**22


@dataclass(frozen=True, eq=False)
class PairScores:
    """A grid of patched runs, for many pairs of prompts.

    Attributes:
        patch: the grid's name in `PATCHES`.
        direction: `"denoising"` or `"noising"`.
        axes: of the grid.
        normalize: the unit of the scores: see `normalize_scores`. None for the metric's own.
        per_pair: each pair's score, [*axes pair].
        base: each pair's score in the same run without a patch.
        clean, corrupted: each pair's metric in both runs, not normalized.
        mean: over pairs, [*axes].
        low, high: ends of the bootstrap interval of the mean, [*axes].
        same_sign: the share of pairs that are changed in the direction of the mean change, [*axes]. A pair that does
            not change by more than rounding has no direction.
        confidence: of the interval.
    """

    patch: str
    direction: Direction
    axes: tuple[str, ...]
    normalize: Normalization | None
    per_pair: Float[Tensor, "*axes pair"]
    base: Float[Tensor, " pair"]
    clean: Float[Tensor, " pair"]
    corrupted: Float[Tensor, " pair"]
    mean: Float[Tensor, "*axes"]
    low: Float[Tensor, "*axes"]
    high: Float[Tensor, "*axes"]
    same_sign: Float[Tensor, "*axes"]
    confidence: float

    def __repr__(self) -> str:
        shape = ", ".join(f"{axis} {size}" for axis, size in zip(self.axes, self.mean.shape, strict=True))
        return f"PairScores({self.patch!r}, {self.direction}, {shape}, {self.base.shape[0]} pairs)"


@torch.no_grad()
def patch_pairs(
    model: HookedModel,
    clean_tokens: Prompts,
    corrupted_tokens: Prompts,
    metric: Metric,
    patch: str = "resid_pre",
    *,
    direction: Direction = "denoising",
    normalize: Normalization | None = "mean",
    confidence: float = 0.95,
    n_resamples: int = 1000,
    seed: int = 0,
    attention_mask: Int[Tensor, "pair pos"] | None = None,
    memory_budget: int = DEFAULT_MEMORY_BUDGET,
    verbose: bool = True,
    workers: Workers | None = None,
) -> PairScores:
    """Return a grid's scores for every pair of a clean and a corrupted prompt, with their mean and its interval.

    Args:
        model: a `HookedTransformer`.
        clean_tokens, corrupted_tokens: the pairs; prompt `i` of one belongs to prompt `i` of the other, position by
            position. One clean prompt is paired with every corrupted one.
        metric: one of `hooked_lm.metrics`, with an answer for every pair or one for all.
        patch: the grid's name in `PATCHES`: `"resid_pre"` for `get_act_patch_resid_pre`.
        direction: `"denoising"` puts clean activations into corrupted runs, `"noising"` the other way round.
        normalize: `"mean"` or `"pair"`: 0 is the corrupted run and 1 the clean one, see `normalize_scores`. None keeps
            the metric's own unit.
        confidence: share of bootstrap means within the interval.
        n_resamples: number of bootstrap draws.
        seed: for the draws.
        attention_mask: [pair pos], 0 at padding, of both runs.
        memory_budget, verbose, workers: as for `sweep`.

    Raises:
        UnknownHookError: the model has no such activation.
        ValueError: an unknown patch or direction, prompts that do not match, fewer than two pairs, runs that the metric
            does not tell apart, or a metric that is not one of `hooked_lm.metrics`.
    """
    grid = _checked_patch(patch, direction, normalize, metric)
    _check_bootstrap(confidence, n_resamples)
    clean, corrupted, mask = _matching(model, clean_tokens, corrupted_tokens, attention_mask)
    metric.check_run(clean, model.cfg.d_vocab_out, mask)
    tokens, source = (corrupted, clean) if direction == "denoising" else (clean, corrupted)
    sites = patch_sites(model, grid)
    logits, cache = model.run_with_cache(source, names_filter=sites, attention_mask=mask)
    base, other = metric.per_prompt(model(tokens, attention_mask=mask)), metric.per_prompt(logits)
    del logits
    ends = (other, base) if direction == "denoising" else (base, other)
    in_unit = partial(normalize_scores, clean=ends[0], corrupted=ends[1], unit=normalize) if normalize else _as_it_is
    base_in_unit = in_unit(base)  # raises before the work is done
    cells, shape = patch_cells(model, grid, clean_activations(model, cache, sites, tokens, mask))
    patched = sweep(
        model,
        tokens,
        cells,
        metric,
        attention_mask=mask,
        per_prompt=True,
        memory_budget=memory_budget,
        verbose=verbose,
        workers=workers,
    ).reshape(*shape, -1)
    scores = in_unit(patched)
    low, high = bootstrap_interval(scores, confidence, n_resamples, seed)
    return PairScores(
        patch=patch,
        direction=direction,
        axes=grid.axes,
        normalize=normalize,
        per_pair=scores,
        base=base_in_unit,
        clean=ends[0],
        corrupted=ends[1],
        mean=scores.mean(-1),
        low=low,
        high=high,
        same_sign=share_of_same_sign((scores - base_in_unit).where(_moved(patched, base), 0.0)),
        confidence=confidence,
    )


def _as_it_is(scores: Tensor) -> Tensor:
    return scores


def _moved(patched: Float[Tensor, "*axes pair"], base: Float[Tensor, " pair"]) -> Tensor:
    """Whether a score has changed by more than rounding; it is computed from logits, of size 1 or larger."""
    size = torch.maximum(patched.abs(), base.abs()).clamp(min=1.0)
    return (patched - base).abs() > 100 * torch.finfo(patched.dtype).eps * size


def _checked_patch(patch: str, direction: str, normalize: str | None, metric: object) -> Patch:
    if patch not in PATCHES:
        raise ValueError(f"unknown patch {patch!r}: it is one of {', '.join(PATCHES)}")
    if direction not in ("denoising", "noising"):
        raise ValueError(f"direction is 'denoising' or 'noising', got {direction!r}")
    if normalize not in ("mean", "pair", None):
        raise ValueError(f"normalize is 'mean', 'pair' or None, got {normalize!r}")
    if not isinstance(metric, Metric):
        raise ValueError("patch_pairs needs a metric of hooked_lm.metrics, which scores every pair")
    return PATCHES[patch]


def _matching(
    model: HookedModel, clean_tokens: Prompts, corrupted_tokens: Prompts, attention_mask: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """The tokens of both runs and their mask, checked to match position by position."""
    corrupted, mask = read_prompts(model, corrupted_tokens, attention_mask)
    clean = clean_prompts(model, clean_tokens, corrupted, mask, attention_mask).expand_as(corrupted)
    if clean.shape[0] < 2:
        raise ValueError("one pair of prompts has no interval: give several, or use get_act_patch_*")
    return clean, corrupted, mask


# The statistics, of any scores


def normalize_scores(
    scores: Float[Tensor, "*cell pair"],
    clean: Float[Tensor, " pair"],
    corrupted: Float[Tensor, " pair"],
    unit: Normalization = "mean",
) -> Float[Tensor, "*cell pair"]:
    """Return scores on a scale on which the corrupted run is 0 and the clean run is 1.

    Args:
        scores: of patched runs.
        clean, corrupted: of the two runs.
        unit: `"mean"` divides each pair's distance from its corrupted run by the mean distance between the runs, so
            that the mean over pairs is 1 for clean runs, and pairs that hardly differ stay small. `"pair"` divides by
            the pair's own distance: every pair has its 0 and 1, and small differences count as much as large ones.

    Raises:
        ValueError: the distance is 0, or as small as rounding.
    """
    gap = clean - corrupted
    unit_of = gap.mean(-1, keepdim=True) if unit == "mean" else gap
    size = torch.maximum(clean.abs(), corrupted.abs())
    resolution = 8 * torch.finfo(gap.dtype).eps * (size.amax(-1, keepdim=True) if unit == "mean" else size)
    indistinct = torch.where(unit_of.abs() <= resolution)[0].tolist()
    if indistinct:
        where = "on average" if unit == "mean" else f"for pair {indistinct[0]}"
        raise ValueError(
            f"clean and corrupted runs score the same {where}: there is no scale between them. Take prompts that the "
            "metric tells apart, or normalize=None"
        )
    return (scores - corrupted) / unit_of


def bootstrap_interval(
    values: Float[Tensor, "*cell pair"],
    confidence: float = 0.95,
    n_resamples: int = 1000,
    seed: int = 0,
    weights: Float[Tensor, " pair"] | None = None,
) -> tuple[Float[Tensor, "*cell"], Float[Tensor, "*cell"]]:
    """Return the ends of the percentile bootstrap interval of the mean over pairs (Efron 1979).

    The pairs are drawn anew with replacement, as many as there are, `n_resamples` times; the interval holds the middle
    `confidence` of the means. All cells share the draws, so their differences are comparable.

    Args:
        values: of the pairs, along the last axis.
        confidence: between 0 and 1.
        n_resamples: how many draws.
        seed: of the draws.
        weights: positive, of the pairs in the mean, such as their sizes where a "pair" is a group of examples that
            belong together and are drawn together; by default all the same.

    Raises:
        ValueError: fewer than two pairs, or a setting out of range.
    """
    _check_bootstrap(confidence, n_resamples)
    n_pairs = values.shape[-1]
    if n_pairs < 2:
        raise ValueError(f"an interval needs two values or more along the last axis; shape {tuple(values.shape)}")
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randint(n_pairs, (n_resamples, n_pairs), generator=generator)
    times = torch.zeros(n_resamples, n_pairs, dtype=torch.float64)
    times.scatter_add_(1, drawn, torch.ones_like(drawn, dtype=torch.float64))
    if weights is not None:
        times *= weights.double().cpu()
    shares = times / times.sum(-1, keepdim=True)
    ends = torch.tensor([(1 - confidence) / 2, (1 + confidence) / 2], dtype=torch.float64)
    found = [
        torch.quantile(part.double().cpu() @ shares.T, ends, dim=-1)
        for part in torch.split(values.reshape(-1, n_pairs), max(1, _CHUNK // n_resamples))
    ]
    low, high = torch.cat(found, 1).to(values).reshape(2, *values.shape[:-1])
    return low, high


def share_of_same_sign(changes: Float[Tensor, "*cell pair"]) -> Float[Tensor, "*cell"]:
    """Return the share of pairs whose change has the sign of the mean change. A change of 0 has no sign."""
    return (changes * changes.mean(-1, keepdim=True) > 0).to(changes.dtype).mean(-1)


def _check_bootstrap(confidence: float, n_resamples: int) -> None:
    if not 0 < confidence < 1:
        raise ValueError(f"confidence is between 0 and 1, got {confidence}")
    if n_resamples < 1:
        raise ValueError(f"n_resamples is 1 or more, got {n_resamples}")
