"""How often units are active in a corpus, which never are, and how sparse layers are."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

from jaxtyping import Bool, Float
from torch import Tensor

from hooked_lm._support.integers import at_least_one, integer
from hooked_lm.sparsity.measures import rate_bound

if TYPE_CHECKING:
    from hooked_lm.plotting import Figure

__all__ = ["ActiveUnit", "UnitActivity"]

# A line of `UnitActivity.rows`.
Row = dict[str, str | int | float]


class ActiveUnit(NamedTuple):
    """A unit of a layer, the share of tokens on which it is active, and its mean and highest activation."""

    layer: int
    unit: int
    rate: float
    mean: float
    max: float


@dataclass(frozen=True, eq=False)
class UnitActivity:
    """The activity of every unit of some layers, over the tokens of a corpus; BOS and padding are not counted.

    Attributes:
        site: whose activations were read.
        layers: the blocks, in the order asked for.
        units: the names of a layer's units: `"feature 17"`, `"head 3"`.
        rate: the share of tokens on which a unit is active, [layer unit].
        mean, max, mean_square: of a unit's activation over tokens, [layer unit].
        l0, l0_std: how many units of a layer are active on a token: mean over tokens and standard deviation, [layer].
        hoyer, gini: the sparsity of a token's activations in a layer, as `measures.hoyer` and `measures.gini` define
            it, averaged over tokens, [layer]. Tokens on which all units are 0 have none and are left out; NaN if all
            are such.
        threshold: magnitudes above it are active.
        relative: whether it is a multiple of the root mean square of a token's activations in the layer.
        n_texts, n_tokens: how many were read.
    """

    site: str
    layers: tuple[int, ...]
    units: tuple[str, ...]
    rate: Float[Tensor, "layer unit"]
    mean: Float[Tensor, "layer unit"]
    max: Float[Tensor, "layer unit"]
    mean_square: Float[Tensor, "layer unit"]
    l0: Float[Tensor, " layer"]
    l0_std: Float[Tensor, " layer"]
    hoyer: Float[Tensor, " layer"]
    gini: Float[Tensor, " layer"]
    threshold: float
    relative: bool
    n_texts: int
    n_tokens: int

    @property
    def dead(self) -> Bool[Tensor, "layer unit"]:
        """Which units are active on no token of the corpus. Another corpus may wake them: see `rate_bound`."""
        return self.rate == 0

    @property
    def dead_units(self) -> tuple[tuple[int, int], ...]:
        """The units that are active on no token, as (layer, unit)."""
        return tuple((self.layers[row], unit) for row, unit in self.dead.nonzero().tolist())

    def rate_bound(self, confidence: float = 0.95, *, all_units: bool = False) -> float:
        """Return the highest rate of a unit that is not ruled out by its being dead in this corpus.

        Args:
            confidence: with which higher rates are ruled out, were tokens independent; see `measures.rate_bound`.
            all_units: rule them out for all dead units at once, whichever these are. Otherwise the bound is that of one
                unit that was chosen before the corpus was read: among many units with a rate at that bound some are
                dead by chance, and those are the ones that are seen. By Bonferroni, over all units that were read.

        Raises:
            ValueError: the confidence is not between 0 and 1.
        """
        bound = rate_bound(self.n_tokens, confidence)
        return rate_bound(self.n_tokens, 1 - (1 - confidence) / self.rate.numel()) if all_units else bound

    def top(self, k: int = 10, *, least: bool = False) -> list[ActiveUnit]:
        """Return the `k` units of all layers that are active most often; of equal ones the first comes first.

        Args:
            k: how many.
            least: those that are active least often instead.

        Raises:
            ValueError: `k` is below 1.
        """
        at_least_one(k, "k")
        order = self.rate.flatten().argsort(descending=not least, stable=True)[:k].tolist()
        return [self._unit(*divmod(place, len(self.units))) for place in order]

    def _unit(self, row: int, unit: int) -> ActiveUnit:
        values = (float(values[row, unit]) for values in (self.rate, self.mean, self.max))
        return ActiveUnit(self.layers[row], unit, *values)

    def rows(self) -> list[Row]:
        """Return a dictionary for each unit of each layer; `pandas.DataFrame` takes them.

        Keys: `layer`, `unit` (its name), `rate`, `mean`, `max`, `mean_square`.
        """
        columns = {"rate": self.rate, "mean": self.mean, "max": self.max, "mean_square": self.mean_square}
        return [
            {"layer": layer, "unit": name, **{key: float(values[row, unit]) for key, values in columns.items()}}
            for row, layer in enumerate(self.layers)
            for unit, name in enumerate(self.units)
        ]

    def table(self) -> str:
        """Return the layers as text: units active on a token, dead units, the median rate and both sparsities."""
        above = f"{self.threshold:g}" + (" of a token's root mean square" if self.relative else "")
        lines = [
            f"{self.site}: {len(self.units)} units a layer on {self.n_tokens} tokens; active above {above}",
            "layer  active on a token  dead  median rate  Hoyer  Gini",
        ]
        for row, layer in enumerate(self.layers):
            active = f"{self.l0[row]:.1f} +- {self.l0_std[row]:.1f}"
            dead, median = int(self.dead[row].sum()), float(self.rate[row].quantile(0.5))
            sparse = f"{self.hoyer[row]:>5.2f}  {self.gini[row]:>4.2f}"
            lines.append(f"{layer:>5}  {active:>17}  {dead:>4}  {median:>11.3f}  {sparse}")
        if self.dead.any():
            bound = f"{self.rate_bound(all_units=True):.2g}"
            lines.append(f"the rate of each dead unit is below {bound}, of all of them at 95%, were tokens independent")
        return "\n".join(lines)

    def __str__(self) -> str:
        return self.table()

    def figure(self, layers: Sequence[int] | None = None, title: str = "") -> Figure:
        """Return the rates of a layer's units, the most active first, over the share of units. Needs the extra `viz`.

        Args:
            layers: which, up to five; by default all, or of more than five some from first to last.
            title: of the figure; by default the site and the number of tokens.

        Raises:
            ValueError: a layer that was not read, or more than five, whose curves cannot be told apart.
            ImportError: plotly is not installed.
        """
        # Plotting is an optional extra.
        from hooked_lm.plotting import layer_curves

        last = len(self.layers) - 1
        some = [self.layers[row] for row in sorted({round(part * last / 4) for part in range(5)})]
        drawn = some if layers is None else [integer(layer, "a layer") for layer in layers]
        missing = [layer for layer in drawn if layer not in self.layers]
        if missing:
            raise ValueError(f"layer {missing[0]} was not read: there are {', '.join(map(str, self.layers))}")
        shares = [part / 20 for part in range(21)]
        places = [round(share * (len(self.units) - 1)) for share in shares]
        ordered = self.rate.sort(1, descending=True).values
        curves = {f"layer {layer}": ordered[self.layers.index(layer), places] for layer in drawn}
        name = f"How often units at {self.site} are active, on {self.n_tokens} tokens"
        labels = [f"{share:.0%}" for share in shares]
        return layer_curves(curves, labels, axis="share of tokens", title=title or name)
