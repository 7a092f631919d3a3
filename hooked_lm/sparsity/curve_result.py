"""A metric over the number of ablated units, in an order and in random ones."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from jaxtyping import Float
from torch import Tensor

from hooked_lm._support.integers import at_least_one

if TYPE_CHECKING:
    from hooked_lm.plotting import Figure

__all__ = ["AblationCurve"]

# A line of `AblationCurve.rows`.
Row = dict[str, int | float | None]


@dataclass(frozen=True, eq=False)
class AblationCurve:
    """The metric as more and more units are ablated, in an order and in random ones.

    Attributes:
        unit, value: the arguments of `ablation_curve`.
        order: its name, or `"given"` for one of the caller's own.
        metric: `"loss"`, the metric's name, or `"metric"` for a plain function.
        places: the units in the order in which they are ablated, as (layer, unit).
        sizes: the numbers that they are ordered by, [unit] in the same order; None for a random or given order.
        counts: how many units are ablated at each step, 0 first.
        scores: the metric at each step, [step].
        random: the metric in each random order, [seed step].
        low, high: ends of the bootstrap interval of the mean over random orders, [step]; None without them.
        confidence: of the interval.
    """

    unit: str
    order: str
    value: str
    metric: str
    places: tuple[tuple[int, int], ...]
    sizes: Float[Tensor, " unit"] | None
    counts: tuple[int, ...]
    scores: Float[Tensor, " step"]
    random: Float[Tensor, "seed step"]
    low: Float[Tensor, " step"] | None
    high: Float[Tensor, " step"] | None
    confidence: float

    @property
    def shares(self) -> Float[Tensor, " step"]:
        """The share of the units that is ablated at each step."""
        return torch.tensor(self.counts, dtype=torch.float64) / len(self.places)

    @property
    def intact(self) -> float:
        """The metric without ablation."""
        return float(self.scores[0])

    @property
    def area(self) -> float:
        """The area under the change of the metric over the share of ablated units, by the trapezoidal rule.

        It ends at the last step: compare areas of curves that end at the same share.
        """
        return float(self._areas(self.scores))

    @property
    def random_areas(self) -> Float[Tensor, " seed"]:
        """The same area for each random order."""
        return self._areas(self.random)

    def _areas(self, scores: Float[Tensor, "*seed step"]) -> Float[Tensor, "*seed"]:
        return torch.trapezoid(scores - scores[..., :1], self.shares)

    def spared(self, change: float) -> float:
        """Return the share of units that can go before the metric has changed by so much: the last step before it has.

        Later steps do not count, even where the metric comes back. No step lies between two steps, so that the true
        share is up to one step higher.

        Args:
            change: of the metric; positive for a rise, as of a loss, negative for a fall.

        Raises:
            ValueError: it is 0 or no number.
        """
        return float(self._spared(self.scores, change))

    def random_spared(self, change: float) -> Float[Tensor, " seed"]:
        """Return the same share for each random order.

        Args:
            change: as for `spared`.

        Raises:
            ValueError: it is 0 or no number.
        """
        return self._spared(self.random, change)

    def _spared(self, scores: Float[Tensor, "*seed step"], change: float) -> Float[Tensor, "*seed"]:
        if not abs(change) > 0:
            raise ValueError(f"change is a rise above 0 or a fall below 0; got {change}")
        moved = scores - scores[..., :1]
        beyond = moved >= change if change > 0 else moved <= change
        # The first step is the intact model, which has not changed.
        steps_before = (beyond.cumsum(-1) == 0).sum(-1)
        return self.shares[steps_before - 1]

    def top(self, k: int = 10) -> list[tuple[int, int, float | None]]:
        """Return the `k` units that are ablated last, the very last first, as (layer, unit, size).

        Args:
            k: how many.

        Raises:
            ValueError: `k` is below 1.
        """
        at_least_one(k, "k")
        last = range(len(self.places) - 1, max(-1, len(self.places) - 1 - k), -1)
        return [(*self.places[index], None if self.sizes is None else float(self.sizes[index])) for index in last]

    def rows(self) -> list[Row]:
        """Return a dictionary for each step; `pandas.DataFrame` takes them.

        Keys: `ablated`, `share`, `score`, and `random` (the mean), `low`, `high`, which are None without random orders.
        """
        none = [None] * len(self.counts)
        mean = self.random.mean(0).tolist() if len(self.random) else none
        ends = [none if end is None else end.tolist() for end in (self.low, self.high)]
        columns = zip(self.counts, self.shares.tolist(), self.scores.tolist(), mean, *ends, strict=True)
        keys = ("ablated", "share", "score", "random", "low", "high")
        return [dict(zip(keys, column, strict=True)) for column in columns]

    def table(self) -> str:
        """Return the steps as text: units ablated, their share, the metric, and its mean in random orders."""
        name = self.metric if len(self.metric) > 7 else f"{self.metric:>7}"
        lines = [f"{len(self.places)} {self.unit}, by {self.order}, {self.value} ablation", f"ablated  share  {name}"]
        if len(self.random):
            lines[1] += f"  random order ({self.confidence:.0%})"
        for row in self.rows():
            line = f"{row['ablated']:>7}  {row['share']:>5.0%}  {row['score']:>{len(name)}.3f}"
            if row["random"] is not None:
                line += f"  {row['random']:.3f} ({row['low']:.3f} to {row['high']:.3f})"
            lines.append(line)
        areas = f"area under the change: {self.area:+.3f}"
        if len(self.random):
            random = self.random_areas
            areas += f"; of {len(random)} random orders {float(random.min()):+.3f} to {float(random.max()):+.3f}"
        return "\n".join([*lines, areas])

    def __str__(self) -> str:
        return self.table()

    def figure(self, title: str = "") -> Figure:
        """Return the metric over the share of ablated units, beside the random orders' mean. Needs the extra `viz`.

        Args:
            title: of the figure; by default the units and the order.

        Raises:
            ImportError: plotly is not installed.
        """
        # Plotting is an optional extra.
        from hooked_lm.plotting import layer_curves

        curves = {f"by {self.order}": self.scores}
        if self.low is not None and self.high is not None:
            interval = f"{self.confidence:.0%} interval"
            curves |= {"random orders, mean": self.random.mean(0)}
            curves |= {f"{interval}, low": self.low, f"{interval}, high": self.high}
        labels = [f"{share:.0%} ({count})" for share, count in zip(self.shares.tolist(), self.counts, strict=True)]
        name = f"{self.metric} with {self.unit} ablated ({self.value})"
        return layer_curves(curves, labels, axis=self.metric, levels={"intact": self.intact}, title=title or name)
