"""The audit of attribution patching: some cells of each grid, patched exactly."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from hooked_lm.hooked_model import HookedModel
from hooked_lm.patching.patches import GRIDS, patch_cell
from hooked_lm.sweep import AnyMetric, sweep

__all__ = ["Audit", "AuditedCell", "CellIndex", "ExactPatching", "choose_cells", "largest", "place_of", "spearman"]

# The place of a cell in a grid, one number for each axis.
CellIndex = tuple[int, ...]


@dataclass(frozen=True)
class AuditedCell:
    """One cell that was patched exactly.

    Attributes:
        cell: its place in the grid.
        estimate, exact: estimated and true change of the metric.
        chosen: for its large estimate, or at random.
    """

    cell: CellIndex
    estimate: float
    exact: float
    chosen: Literal["top", "random"]


@dataclass(frozen=True)
class Audit:
    """How far a grid's estimates can be trusted: some of its cells, patched exactly.

    Attributes:
        grid: its name.
        axes: the names of the grid's axes, one for each number of a cell.
        cells: the cells with the largest estimates, in that order, then the random ones.
        rank_correlation: Spearman's, between estimate and exact effect over these cells; NaN where all are equal.
        resolution: an effect smaller than this is rounding: it has no sign, and counts as zero among the ranks.
    """

    grid: str
    axes: tuple[str, ...]
    cells: tuple[AuditedCell, ...]
    rank_correlation: float
    resolution: float

    @classmethod
    def of(cls, grid: str, cells: Sequence[AuditedCell], resolution: float) -> Audit:
        """Return the audit that some cells of a grid make; an effect below the resolution counts as zero.

        Args:
            grid: its name.
            cells: the cells that were patched exactly.
            resolution: the size below which an effect is rounding.
        """
        pairs = torch.tensor([_pair(one) for one in cells], dtype=torch.float64)
        pairs = torch.where(pairs.abs() > resolution, pairs, 0.0)
        return cls(grid, GRIDS[grid].axes, tuple(cells), spearman(pairs[:, 0], pairs[:, 1]), resolution)

    @property
    def sign_flips(self) -> tuple[AuditedCell, ...]:
        """The cells whose exact effect and estimate differ in sign."""
        return tuple(
            one for one in self.cells if one.estimate * one.exact < 0 and min(map(abs, _pair(one))) > self.resolution
        )

    def __str__(self) -> str:
        flips = {one.cell for one in self.sign_flips}
        lines = [
            f"{self.grid}: {len(self.cells)} cells patched exactly, rank correlation {self.rank_correlation:.3f}, "
            f"{len(flips)} sign flips",
            f"  {' '.join(self.axes):<20} {'estimate':>12} {'exact':>12}",
        ]
        for one in self.cells:
            place = " ".join(f"{index:>{len(axis)}}" for index, axis in zip(one.cell, self.axes, strict=True))
            note = "  sign flip" if one.cell in flips else ""
            lines.append(f"  {place:<20} {one.estimate:>12.4g} {one.exact:>12.4g}  {one.chosen}{note}")
        return "\n".join(lines)


@dataclass(frozen=True, eq=False)
class ExactPatching:
    """The runs of an audit: the corrupted prompts, patched with the clean activations cell by cell.

    Attributes:
        model: the model.
        tokens, mask: the corrupted prompts and their padding.
        metric: of the audit.
        clean: full hook name -> clean activation [batch ...].
        verbose: show a progress bar.
    """

    model: HookedModel
    tokens: Tensor
    mask: Tensor
    metric: AnyMetric
    clean: Mapping[str, Tensor]
    verbose: bool

    def audits(self, estimates: Mapping[str, Tensor], corrupted: float, n: int, seed: int) -> dict[str, Audit]:
        """Return each grid's audit, all of them from one sweep.

        Args:
            estimates: name of a grid -> estimated effects.
            corrupted: the metric of the corrupted run.
            n: cells of each grid with the largest estimates, and as many of the others at random.
            seed: of the random choice.
        """
        generator = torch.Generator().manual_seed(seed)
        chosen = {name: choose_cells(effects, n, generator) for name, effects in estimates.items()}
        cells = [
            patch_cell(self.model, GRIDS[name], cell, self.clean)
            for name, places in chosen.items()
            for cell, _ in places
        ]
        scores = sweep(self.model, self.tokens, cells, self.metric, attention_mask=self.mask, verbose=self.verbose)
        exact = iter((scores.double() - corrupted).tolist())
        size = max(abs(corrupted), float(scores.abs().max()))
        resolution = 100 * torch.finfo(scores.dtype).eps * size
        audits = {}
        for name, places in chosen.items():
            effects = estimates[name]
            audited = [AuditedCell(cell, float(effects[cell]), next(exact), how) for cell, how in places]
            audits[name] = Audit.of(name, audited, resolution)
        return audits


def choose_cells(
    effects: Tensor, n: int, generator: torch.Generator
) -> list[tuple[CellIndex, Literal["top", "random"]]]:
    """Return the `n` cells with the largest effects of either sign, and `n` of the others at random.

    Args:
        effects: estimated, one per cell.
        n: how many of each kind.
        generator: of the random choice.
    """
    top = largest(effects, n)
    left = torch.ones(effects.numel(), dtype=torch.bool)
    left[top] = False
    others = torch.where(left)[0]
    drawn = others[torch.randperm(len(others), generator=generator)[:n]].tolist()
    return [(place_of(index, effects), "top") for index in top] + [
        (place_of(index, effects), "random") for index in drawn
    ]


def spearman(x: Tensor, y: Tensor) -> float:
    """Return the rank correlation of two samples: Pearson's, of their ranks, where equals share their mean rank.

    NaN where one of them is constant.

    Args:
        x, y: [sample].

    Raises:
        ValueError: they are not two samples of one length.
    """
    if x.shape != y.shape or x.ndim != 1:
        raise ValueError(f"spearman takes two samples of one length, got shapes {tuple(x.shape)} and {tuple(y.shape)}")
    a, b = _ranks(x), _ranks(y)
    a, b = a - a.mean(), b - b.mean()
    scale = float(a.square().sum().sqrt() * b.square().sum().sqrt())
    return float(a @ b) / scale if scale > 0 else float("nan")


def _ranks(x: Tensor) -> Tensor:
    values, counts = torch.unique(x, return_counts=True)
    last = counts.cumsum(0).double()
    ranks: Tensor = (last - (counts - 1) / 2)[torch.searchsorted(values, x.contiguous())]
    return ranks


def largest(effects: Tensor, n: int) -> list[int]:
    """Return the flat indices of the `n` largest effects of either sign, the largest first.

    Args:
        effects: one per cell.
        n: how many; fewer where there are fewer.
    """
    found: list[int] = effects.flatten().abs().topk(min(n, effects.numel())).indices.tolist()
    return found


def place_of(index: int, effects: Tensor) -> CellIndex:
    """Return the place in a grid of a flat index.

    Args:
        index: into the flattened grid.
        effects: the grid.
    """
    return tuple(int(one) for one in torch.unravel_index(torch.tensor(index), effects.shape))


def _pair(one: AuditedCell) -> tuple[float, float]:
    return one.estimate, one.exact
