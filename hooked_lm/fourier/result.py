"""What an analysis of modular arithmetic found."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from jaxtyping import Float
from torch import Tensor

from hooked_lm._support.integers import at_least_one

if TYPE_CHECKING:
    from hooked_lm.plotting import Figure

__all__ = ["ModularAnalysis"]

# A line of `ModularAnalysis.rows`.
Row = dict[str, int | float | bool]


@dataclass(frozen=True, eq=False)
class ModularAnalysis:
    """The frequencies with which a model adds modulo p.

    Attributes:
        p: the modulus.
        keys: the key frequencies, that with the largest share of the embedding first.
        embedding: each frequency's share of the embedding's variance; entry k-1 is frequency k.
        logits: each frequency's share of the logits' variance, along cos(k (a + b - c)).
        neuron_frequency, neuron_share: each neuron's frequency, and how much of its variance that explains.
        losses: in nats, of the logits as they are (`"all"`), along the key frequencies alone (`"only"`: the restricted
            loss) and with these removed (`"without"`: the excluded loss), each on `"train"` and `"held out"` pairs.
        accuracy: of the model, on both.
    """

    p: int
    keys: tuple[int, ...]
    embedding: Float[Tensor, " frequency"]
    logits: Float[Tensor, " frequency"]
    neuron_frequency: Float[Tensor, " neuron"]
    neuron_share: Float[Tensor, " neuron"]
    losses: Mapping[str, Mapping[str, float]]
    accuracy: Mapping[str, float]

    @property
    def logits_explained(self) -> float:
        """The share of the logits' variance that the key frequencies explain, along cos(k (a + b - c))."""
        return float(sum(self.logits[k - 1] for k in self.keys))

    @property
    def summary(self) -> str:
        """What was found, in a sentence."""
        half = "held out" if not math.isnan(self.losses["all"]["held out"]) else "train"
        whole, only, without = (self.losses[name][half] for name in ("all", "only", "without"))
        guess = math.log(self.p)
        needed = "needs them" if without > 0.5 * guess and without > 2 * whole else "does not need them"
        enough = "they are enough" if only < 0.1 * guess or only <= 2 * whole else "they are not enough"
        listed = ", ".join(map(str, self.keys))
        return (
            f"{len(self.keys)} key frequencies ({listed}) explain {100 * self.logits_explained:.0f} % of the logits; "
            f"{enough} (loss {only:.3g}, of all {whole:.3g}, a guess {guess:.3g}), and the model {needed} "
            f"(without them {without:.3g})"
        )

    def top(self, k: int = 5) -> list[tuple[int, float]]:
        """Return the `k` frequencies with the largest share of the embedding, as (frequency, share).

        Args:
            k: how many.

        Raises:
            ValueError: `k` is below 1.
        """
        at_least_one(k, "k")
        order = self.embedding.argsort(descending=True, stable=True)[:k].tolist()
        return [(one + 1, float(self.embedding[one])) for one in order]

    def rows(self) -> list[Row]:
        """Return a dictionary for each frequency; `pandas.DataFrame` takes them.

        Keys: `frequency`, `key`, `embedding`, `logits`, `neurons` (how many have it).
        """
        return [
            {
                "frequency": k,
                "key": k in self.keys,
                "embedding": float(self.embedding[k - 1]),
                "logits": float(self.logits[k - 1]),
                "neurons": int((self.neuron_frequency == k).sum()),
            }
            for k in range(1, len(self.embedding) + 1)
        ]

    def table(self) -> str:
        """Return the summary and the key frequencies as text."""
        lines = [self.summary, "frequency  embedding  logits  neurons"]
        rows = self.rows()
        for k in self.keys:
            row = rows[k - 1]
            lines.append(f"{k:>9}  {row['embedding']:>9.3f}  {row['logits']:>6.3f}  {row['neurons']:>7}")
        return "\n".join(lines)

    def __str__(self) -> str:
        return self.table()

    def figure(self, title: str = "") -> Figure:
        """Return each frequency's share of embedding and logits as curves. Needs the extra `viz`.

        Args:
            title: of the figure; by default the key frequencies.

        Raises:
            ImportError: plotly is not installed.
        """
        # Plotting is an optional extra.
        from hooked_lm.plotting import layer_curves

        labels = [str(k) for k in range(1, len(self.embedding) + 1)]
        named = title or f"key frequencies {', '.join(map(str, self.keys))}"
        curves = {"embedding": self.embedding, "logits": self.logits}
        return layer_curves(curves, labels, axis="share of the variance", title=named)
