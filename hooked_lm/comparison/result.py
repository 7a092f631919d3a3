"""What a comparison of two models found, in numbers and in words that follow them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from hooked_lm._support.integers import at_least_one, integer

if TYPE_CHECKING:
    from hooked_lm.plotting import Figure, HtmlFigure

__all__ = [
    "CheckpointComparison",
    "ConfigDifference",
    "EffectDifferences",
    "ModelComparison",
    "SiteDifference",
    "WeightDifference",
]

# A line of `ModelComparison.rows`.
Row = dict[str, str | int | float | bool | None]
_SHOWN = 12


@dataclass(frozen=True)
class ConfigDifference:
    """A field of the config in which two models differ: its value in `a` and in `b`, as text."""

    field: str
    a: str
    b: str

    def __str__(self) -> str:
        return f"{self.field}: {self.a} and {self.b}"


@dataclass(frozen=True)
class WeightDifference:
    """A parameter in which two models differ.

    Attributes:
        name: of the parameter.
        kind: `"values"`, `"shape"`, `"only in a"` or `"only in b"`.
        n_entries: of the parameter.
        n_differing: entries that differ at all; None where there is nothing to compare.
        largest: the largest difference.
        relative: that, over the largest entry of `a`; None where all are 0.
        index: where it is.
    """

    name: str
    kind: str
    n_entries: int
    n_differing: int | None = None
    largest: float | None = None
    relative: float | None = None
    index: tuple[int, ...] | None = None

    def __str__(self) -> str:
        if self.kind != "values":
            return f"{self.name}: {self.kind}" if self.kind != "shape" else f"{self.name}: other shapes"
        share = "" if self.relative is None else f" ({self.relative:.2g} of the largest)"
        return (
            f"{self.name}: {self.n_differing} of {self.n_entries} entries, by at most {self.largest:.3g}{share} at "
            f"{list(self.index or ())}"
        )


@dataclass(frozen=True, eq=False)
class SiteDifference:
    """How far the activations of two models are apart at a site.

    Attributes:
        site: the full hook name; `"log-probabilities"` for the outputs.
        absolute: the largest difference.
        relative: that, over the largest value of `a` at the site.
        differs: whether it is beyond rounding.
        prompt, pos: the first place where it is, in prompts in their order; -1 where there is none.
        by_position: the largest relative difference at each position of any prompt, [pos].
        note: what was compared, if not the activations as they are; or why nothing was.
    """

    site: str
    absolute: float
    relative: float
    differs: bool
    prompt: int
    pos: int
    by_position: Float[Tensor, " pos"]
    note: str = ""


@dataclass(frozen=True, eq=False)
class EffectDifferences:
    """What interventions do to a metric in both models.

    Attributes:
        labels: of the interventions.
        a, b: the metric with the intervention less that without, of each.
        shape: `(layers, heads)` where the interventions are one for each head; otherwise (number,).
    """

    labels: tuple[str, ...]
    a: Float[Tensor, " cell"]
    b: Float[Tensor, " cell"]
    shape: tuple[int, ...]

    def top(self, k: int = 5) -> list[tuple[str, float, float]]:
        """Return the `k` interventions whose effects differ most, as (label, in a, in b)."""
        order = (self.b - self.a).abs().argsort(descending=True, stable=True)[: at_least_one(k, "k")].tolist()
        return [(self.labels[i], float(self.a[i]), float(self.b[i])) for i in order]

    def rows(self) -> list[Row]:
        """Return a dictionary for each intervention: `label`, `a`, `b`; `pandas.DataFrame` takes them."""
        return [
            {"label": label, "a": float(a), "b": float(b)}
            for label, a, b in zip(self.labels, self.a, self.b, strict=True)
        ]

    def table(self, k: int = _SHOWN) -> str:
        """Return the interventions whose effects differ most as text.

        Args:
            k: how many.

        Raises:
            ValueError: `k` is below 1.
        """
        return "\n".join(_part("effects", [f"{label}: {a:+.3g} and {b:+.3g}" for label, a, b in self.top(k)], k))

    def __str__(self) -> str:
        return self.table()

    def figure(self, title: str = "") -> Figure:
        """Return the difference of the effects: a map of heads, or bars. Needs the extra `viz`.

        Args:
            title: of the figure; by default the largest difference.

        Raises:
            ImportError: plotly is not installed.
        """
        # Plotting is an optional extra.
        from hooked_lm.plotting import effect_intervals, patching_grid

        [(label, a, b)] = self.top(1)
        named, change = title or f"{label} differs most, {b - a:+.3g}", self.b - self.a
        if len(self.shape) == 2:
            return patching_grid(change.view(self.shape), axis="head", unit="effect in b less that in a", title=named)
        return effect_intervals(self.labels, change, change, change, axis="effect in b less that in a", title=named)


@dataclass(frozen=True, eq=False)
class ModelComparison:
    """Two models side by side, on the same prompts.

    Attributes:
        config: fields that differ.
        weights: parameters that differ, in the order of the model.
        n_weights: how many parameters the models have, together.
        processing: what processing was applied to each, where it is not the same.
        sites: of the activations that both have, in the order in which they are computed, log-probabilities last.
        tolerance: the relative difference that rounding may explain.
        tokens: of the prompts, [prompt pos]; -1 at padding, which is left out everywhere.
        strings: the tokens as texts, by number; None without a tokenizer.
        kl: the divergence of b's next-token distribution from a's, KL(a || b) in nats, [prompt pos]; NaN at padding.
        kl_low, kl_high: ends of the bootstrap interval of the mean over prompts; NaN for one prompt.
        same_argmax: the share of positions at which both find the same token likeliest.
        loss_a, loss_b: the mean next-token loss of each, in nats; NaN for prompts of one token.
        effects: of interventions, where a metric was given.
    """

    config: tuple[ConfigDifference, ...]
    weights: tuple[WeightDifference, ...]
    n_weights: int
    processing: tuple[tuple[str, ...], tuple[str, ...]] | None
    sites: tuple[SiteDifference, ...]
    tolerance: float
    tokens: Int[Tensor, "prompt pos"]
    strings: dict[int, str] | None
    kl: Float[Tensor, "prompt pos"]
    kl_low: float
    kl_high: float
    same_argmax: float
    loss_a: float
    loss_b: float
    effects: EffectDifferences | None = None

    @property
    def real(self) -> Bool[Tensor, "prompt pos"]:
        """Where there is a token and no padding."""
        return self.tokens >= 0

    @property
    def mean_kl(self) -> float:
        """The mean of the divergence over all positions."""
        return float(self.kl[self.real].mean())

    @property
    def first(self) -> SiteDifference | None:
        """The first site at which the models differ beyond rounding; None where they nowhere do."""
        return next((site for site in self.sites if site.differs), None)

    @property
    def same(self) -> bool:
        """Whether the models' outputs are the same on these prompts, up to rounding."""
        return not self.sites[-1].differs

    @property
    def summary(self) -> str:
        """What was found, in a sentence or two."""
        return f"{self._of_weights()}. {self._of_outputs()}."

    def _of_weights(self) -> str:
        if not self.weights:
            return f"All {self.n_weights} parameters are equal"
        names = ", ".join(one.name for one in self.weights[:3])
        more = f" and {len(self.weights) - 3} more" if len(self.weights) > 3 else ""
        verb = "differs" if len(self.weights) == 1 else "differ"
        return f"{len(self.weights)} of {self.n_weights} parameters {verb}: {names}{more}"

    def _of_outputs(self) -> str:
        first = self.first
        if first is None:
            why = ""
            if self.processing is not None:
                why = ", so the processing of the weights explains what differs in them"
            elif self.weights:
                why = ", so these prompts do not show the difference"
            return f"Activations and outputs are equal up to rounding ({self.tolerance:g}){why}"
        if first.absolute != first.absolute:  # NaN: there is nothing to subtract
            where = f"They first differ at {first.site}, which has {first.note}"
        else:
            place = f"position {first.pos} of prompt {first.prompt}"
            where = f"They first differ at {first.site}, {place}, by {first.relative:.2g} of its largest value"
        if self.same:
            return f"{where}; the outputs are equal up to rounding ({self.tolerance:g})"
        agreed = f"the same likeliest token at {100 * self.same_argmax:.4g} % of positions"
        return f"{where}; KL {self.mean_kl:.3g} nats, {agreed}"

    def top(self, k: int = 5) -> list[Row]:
        """Return the `k` positions with the largest divergence: `prompt`, `pos`, `token`, `context`, `kl`.

        Args:
            k: how many.

        Raises:
            ValueError: `k` is below 1.
        """
        values = self.kl.where(self.real, -1.0).flatten()
        order = values.argsort(descending=True, stable=True)[: min(at_least_one(k, "k"), int(self.real.sum()))].tolist()
        return [self._place(*divmod(index, self.tokens.shape[1])) for index in order]

    def _place(self, prompt: int, pos: int) -> Row:
        shown = self._texts(prompt)
        real = int(self.real[prompt, : pos + 1].sum()) - 1
        return {
            "prompt": prompt,
            "pos": real,
            "token": shown[real],
            "context": "".join(shown[max(0, real - 8) : real + 1]),
            "kl": float(self.kl[prompt, pos]),
        }

    def _texts(self, prompt: int) -> list[str]:
        tokens = self.tokens[prompt][self.real[prompt]].tolist()
        return [str(token) if self.strings is None else self.strings[token] for token in tokens]

    def rows(self) -> list[Row]:
        """Return a dictionary for each site; `pandas.DataFrame` takes them.

        Keys: `site`, `absolute`, `relative`, `differs`, `prompt`, `pos`, `note`.
        """
        keys = ("site", "absolute", "relative", "differs", "prompt", "pos", "note")
        return [{key: getattr(site, key) for key in keys} for site in self.sites]

    def table(self, k: int = _SHOWN) -> str:
        """Return the summary, and what differs in config, weights, sites, outputs and effects, as text.

        Args:
            k: lines of each part.

        Raises:
            ValueError: `k` is below 1.
        """
        at_least_one(k, "k")
        lines = [self.summary]
        lines += _part("config", [str(one) for one in self.config], k)
        lines += _part("parameters", [str(one) for one in self.weights], k)
        differing = [site for site in self.sites if site.differs and site.absolute == site.absolute]
        lines += _part(
            "sites",
            [f"{one.site}: {one.relative:.2g}, from prompt {one.prompt}, pos {one.pos}" for one in differing],
            k,
        )
        lines += _part(
            "not compared", [f"{one.site}: {one.note}" for one in self.sites if one.absolute != one.absolute], k
        )
        if not self.same:
            interval = "" if self.kl_low != self.kl_low else f" ({self.kl_low:.3g} to {self.kl_high:.3g})"
            lines.append(f"KL {self.mean_kl:.4g} nats{interval}; loss {self.loss_a:.4g} and {self.loss_b:.4g}")
            lines += [
                f"  {row['kl']:.3g}  prompt {row['prompt']}, pos {row['pos']}: {row['context']!r}"
                for row in self.top(5)
            ]
        if self.effects is not None:
            lines.append(self.effects.table(k))
        return "\n".join(lines)

    def __str__(self) -> str:
        return self.table()

    def figure(self, title: str = "") -> Figure:
        """Return the relative difference of each site at each position as a map, in powers of ten.

        Needs the extra `viz`.

        Args:
            title: of the figure; by default the first site that differs.

        Raises:
            ImportError: plotly is not installed.
        """
        # Plotting is an optional extra.
        from hooked_lm.plotting import site_map

        sites = [site for site in self.sites if site.absolute == site.absolute]
        values = torch.stack([site.by_position for site in sites]).clamp(min=1e-16).log10()
        first = self.first
        named = "equal up to rounding" if first is None else f"first different at {first.site}"
        labels = self._texts(0) if len(self.tokens) == 1 else None
        return site_map(
            values, [site.site for site in sites], labels, unit="log10 of the relative difference", title=title or named
        )

    def kl_figure(self, prompt: int = 0, title: str = "") -> HtmlFigure:
        """Return a prompt's tokens on the colour of the divergence after each. Needs the extra `viz`.

        Args:
            prompt: its number.
            title: of the figure.

        Raises:
            ValueError: there is no such prompt.
            ImportError: plotly is not installed.
        """
        # Plotting is an optional extra.
        from hooked_lm.plotting import coloured_tokens

        if not 0 <= integer(prompt, "prompt") < len(self.tokens):
            raise ValueError(f"no prompt {prompt}: there are 0 to {len(self.tokens) - 1}")
        values = self.kl[prompt][self.real[prompt]].tolist()
        named = title or f"KL(a || b), {sum(values) / len(values):.3g} nats on average"
        return coloured_tokens(self._texts(prompt), values, unit="KL (nats)", title=named)


@dataclass(frozen=True, eq=False)
class CheckpointComparison:
    """Several checkpoints beside the last of them.

    Attributes:
        names: of the checkpoints, in their order.
        comparisons: of each with the last, which is `b`; the last with itself too.
    """

    names: tuple[str, ...]
    comparisons: tuple[ModelComparison, ...]

    @property
    def kl(self) -> Float[Tensor, " checkpoint"]:
        """The mean divergence of the last from each."""
        return torch.tensor([one.mean_kl for one in self.comparisons])

    @property
    def loss(self) -> Float[Tensor, " checkpoint"]:
        """The loss of each on the prompts."""
        return torch.tensor([one.loss_a for one in self.comparisons])

    def top(self, k: int = 5) -> list[tuple[str, float]]:
        """Return the `k` checkpoints that differ most from the last, as (name, KL).

        Args:
            k: how many.

        Raises:
            ValueError: `k` is below 1.
        """
        order = self.kl.argsort(descending=True, stable=True)[: at_least_one(k, "k")].tolist()
        return [(self.names[i], float(self.kl[i])) for i in order]

    def rows(self) -> list[Row]:
        """Return a dictionary for each checkpoint: `name`, `kl`, `loss`, `same_argmax`, `first` (site)."""
        return [
            {
                "name": name,
                "kl": one.mean_kl,
                "loss": one.loss_a,
                "same_argmax": one.same_argmax,
                "first": None if one.first is None else one.first.site,
            }
            for name, one in zip(self.names, self.comparisons, strict=True)
        ]

    def table(self) -> str:
        """Return the checkpoints as text."""
        width = max(10, *map(len, self.names))
        lines = [f"{'checkpoint':<{width}}  {'KL':>9}  {'loss':>8}  same token  first different at"]
        for row in self.rows():
            kl, loss, same = (float(row[key] or 0) for key in ("kl", "loss", "same_argmax"))
            lines.append(
                f"{row['name']:<{width}}  {kl:>9.3g}  {loss:>8.4g}  {100 * same:>8.1f} %  {row['first'] or 'nowhere'}"
            )
        return "\n".join(lines)

    def __str__(self) -> str:
        return self.table()

    def figure(self, title: str = "") -> Figure:
        """Return loss and divergence over the checkpoints as curves. Needs the extra `viz`.

        Args:
            title: of the figure.

        Raises:
            ImportError: plotly is not installed.
        """
        # Plotting is an optional extra.
        from hooked_lm.plotting import layer_curves

        last = self.names[-1]
        return layer_curves({"loss": self.loss, f"KL to {last}": self.kl}, self.names, axis="nats", title=title)


def _part(title: str, found: Sequence[str], k: int) -> list[str]:
    if not found:
        return []
    left = [f"  and {len(found) - k} more"] if len(found) > k else []
    return [title, *(f"  {line}" for line in found[:k]), *left]
