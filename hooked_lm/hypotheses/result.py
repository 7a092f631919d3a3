"""EffectTest: the outcome of a test, in numbers and in words that follow them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from jaxtyping import Float
from torch import Tensor

from hooked_lm._support.integers import at_least_one
from hooked_lm.hypotheses.controls import ControlTest
from hooked_lm.hypotheses.corrections import Correction
from hooked_lm.hypotheses.permutation import Alternative
from hooked_lm.hypotheses.power import detectable_effect

if TYPE_CHECKING:
    from hooked_lm.plotting import Figure

__all__ = ["EffectTest"]

# A line of `EffectTest.rows`.
Row = dict[str, str | float | bool]
_NAMES = {"holm": "Holm", "bh": "Benjamini and Hochberg"}
# Lines of a table and of a figure.
_SHOWN = 30


@dataclass(frozen=True, eq=False)
class EffectTest:
    """A test of one mean difference, or of each of a grid. Shapes are those of the cells; of one effect, [].

    Attributes:
        n: pairs; or the sizes of the two groups.
        alternative: what the test asks for.
        labels: of the cells.
        mean: the mean difference.
        low, high: ends of its bootstrap interval.
        effect_size: Hedges' g: the mean in standard deviations.
        p: the permutation test's p-value.
        p_adjusted: the p-value after the correction for the number of cells.
        correction: which one; None for a single effect or none.
        alpha: a p-value at or below it is a finding.
        confidence: of the interval.
        n_permutations: how many were drawn; None where all there are were tried.
        smallest_p: the smallest p-value that the test can give.
        seed: of permutations and bootstrap.
        control: the effect beside those of controls; None where there were none.
    """

    n: int | tuple[int, int]
    alternative: Alternative
    labels: tuple[str, ...]
    mean: Float[Tensor, "*cell"]
    low: Float[Tensor, "*cell"]
    high: Float[Tensor, "*cell"]
    effect_size: Float[Tensor, "*cell"]
    p: Float[Tensor, "*cell"]
    p_adjusted: Float[Tensor, "*cell"]
    correction: Correction | None
    alpha: float
    confidence: float
    n_permutations: int | None
    smallest_p: float
    seed: int
    control: ControlTest | None = None

    @property
    def found(self) -> Tensor:
        """Whether each cell's adjusted p-value is at or below alpha, [*cell]."""
        return self.p_adjusted <= self.alpha

    @property
    def verdict(self) -> str:
        """What the numbers say, in words."""
        return self._verdict_of_grid() if self.mean.ndim else self._verdict_of_one()

    @property
    def headline(self) -> str:
        """The verdict without its numbers."""
        if self.mean.ndim:
            n = int(self.found.sum())
            return f"{n or 'none'} of {self.mean.numel()} cells show{'' if n > 1 else 's'} an effect, {self._how()}"
        return self.verdict.partition(":")[0]

    def _how(self) -> str:
        return (
            "without a correction" if self.correction is None else f"after the correction of {_NAMES[self.correction]}"
        )

    def _verdict_of_one(self) -> str:
        numbers = (
            f"{float(self.mean):+.3g} ({100 * self.confidence:g} % interval {float(self.low):.3g} to "
            f"{float(self.high):.3g}), g = {float(self.effect_size):.2f}, p = {float(self.p):.2g}, {self._sample()}"
        )
        control = self.control
        if not bool(self.found):
            return f"no effect shown: {numbers}; {self._what_could_be_found()}"
        if control is None:
            return f"an effect: {numbers}; compared with no control"
        if control.p <= self.alpha:
            return f"an effect: {numbers}; {control.verdict}"
        if control.n_reached == 0:
            few = f"{len(control.controls)} controls are too few to be sure"
            return f"an effect, of which {few}: {numbers}; {control.verdict}"
        return f"an effect, but not more than that of controls: {numbers}; {control.verdict}"

    def _verdict_of_grid(self) -> str:
        n, total = int(self.found.sum()), self.mean.numel()
        at = f"at alpha {self.alpha:g}, {self._how()}, {self._sample()}"
        if n == 0:
            return f"none of {total} cells shows an effect {at}; {self._what_could_be_found()}"
        first = self.top(1)[0]
        largest = f"the largest is {first['label']}, {first['mean']:+.3g} ({first['low']:.3g} to {first['high']:.3g})"
        return f"{n} of {total} cells show{'s' if n == 1 else ''} an effect {at}; {largest}"

    def _sample(self) -> str:
        return f"{self.n} pairs" if isinstance(self.n, int) else f"{self.n[0]} and {self.n[1]} values"

    def _what_could_be_found(self) -> str:
        """What a test of this size finds, so that its silence is not taken for more than it is."""
        tests = self.mean.numel() if self.correction is not None else 1
        if self.smallest_p * (tests if self.correction == "holm" else 1) > self.alpha:
            return f"{self._sample()} cannot show any: the smallest p-value there is is {self.smallest_p:.2g}"
        if not isinstance(self.n, int):
            return "an effect that is not shown may be there"
        # An effect that stands alone among the cells has to pass the strictest of the steps of either correction.
        alpha = self.alpha / tests
        size = abs(detectable_effect(self.n, alpha=alpha, alternative=self.alternative))
        return f"an effect of {size:.2f} standard deviations would be found four times in five"

    def top(self, k: int = 5) -> list[Row]:
        """Return the `k` cells with the largest effects among the findings, then among the others, as `rows` has them.

        Args:
            k: how many.

        Raises:
            ValueError: `k` is below 1.
        """
        at_least_one(k, "k")
        return sorted(self.rows(), key=lambda row: (not row["found"], -abs(float(row["mean"]))))[:k]

    def rows(self) -> list[Row]:
        """Return a dictionary for each cell; `pandas.DataFrame` takes them.

        Keys: `label`, `mean`, `low`, `high`, `effect_size`, `p`, `p_adjusted`, `found`.
        """
        keys = ("mean", "low", "high", "effect_size", "p", "p_adjusted", "found")
        columns = [getattr(self, key).flatten().tolist() for key in keys]
        return [
            {"label": label, **dict(zip(keys, values, strict=True))}
            for label, values in zip(self.labels, zip(*columns, strict=True), strict=True)
        ]

    def table(self, k: int = _SHOWN) -> str:
        """Return the verdict and, of a grid, the cells with the largest effects as text; findings have a star.

        Args:
            k: how many cells.

        Raises:
            ValueError: as `top`.
        """
        if not self.mean.ndim:
            return self.verdict
        shown = self.top(k)
        width = max(5, *(len(str(row["label"])) for row in shown))
        lines = [self.verdict, f"{'cell':<{width}}       mean  interval                     g         p  adjusted"]
        for row in shown:
            interval = f"{row['low']:.4g} to {row['high']:.4g}"
            lines.append(
                f"{row['label']:<{width}} {'*' if row['found'] else ' '} {row['mean']:>+8.4g}  {interval:<22}"
                f"  {row['effect_size']:>+6.2f}  {row['p']:>8.2g}  {row['p_adjusted']:>8.2g}"
            )
        left = self.mean.numel() - len(shown)
        return "\n".join([*lines, *([f"{left} more cells"] if left else [])])

    def __str__(self) -> str:
        return self.table()

    def figure(self, title: str = "") -> Figure:
        """Return the mean differences with their intervals; of a grid [layer head], a map on which findings are marked.

        Needs the extra `viz`.

        Args:
            title: of the figure; by default what was found, in short.

        Raises:
            ImportError: plotly is not installed.
        """
        # Plotting is an optional extra.
        from hooked_lm.plotting import effect_intervals, patching_grid

        if self.mean.ndim == 2:
            figure = patching_grid(self.mean, axis="head", unit="mean difference", title=title or self.headline)
            places = self.found.nonzero().tolist()
            return figure.add_scatter(
                x=[head for _, head in places],
                y=[layer for layer, _ in places],
                mode="markers",
                marker={"symbol": "square-open", "size": 18, "color": "black", "line": {"width": 2}},
                hoverinfo="skip",
                showlegend=False,
            )
        rows = self.top(_SHOWN)
        return effect_intervals(
            [str(row["label"]) for row in rows],
            *([float(row[key]) for row in rows] for key in ("mean", "low", "high")),
            marked=[bool(row["found"]) for row in rows],
            title=title or self.headline,
        )
