"""Ablation: replace the activation of a head, an MLP, a neuron or a position, and measure how the answer changes.

The replacement value matters. Zero may be a value that the activation never has. The mean over some prompts removes the
differences between prompts and keeps their common part (Wang et al. 2022, "Interpretability in the Wild"). The
activation of another prompt is one that the model does compute; scores are averaged over such prompts (Chan et al.
2022, "Causal Scrubbing").
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

from hooked_lm._support.integers import integer, is_integer
from hooked_lm._support.precision import at_least_single
from hooked_lm.hooked_model import HookedModel
from hooked_lm.interventions import Intervention, draw_prompts
from hooked_lm.metrics import Metric
from hooked_lm.names import UnknownHookError, describe_unknown, get_act_name, grid_axis
from hooked_lm.patching.sites import axes_at, read_prompts
from hooked_lm.sweep import AnyMetric, sweep
from hooked_lm.sweep.options import DEFAULT_MEMORY_BUDGET
from hooked_lm.tokenization import Prompts

__all__ = ["AblationScores", "Method", "Unit", "ablate"]

Unit = Literal["heads", "attention", "mlps", "neurons", "positions"]
Method = Literal["zero", "mean", "resample"]

# The unit -> the activation that is replaced, and the grid axis along which its units are, if one site has several.
_UNITS: dict[str, tuple[str, str | None]] = {
    "heads": ("z", "head"),
    "attention": ("attn_out", None),
    "mlps": ("mlp_out", None),
    "neurons": ("post", "neuron"),
    "positions": ("resid_pre", None),
}
_METHODS = ("zero", "mean", "resample")


@dataclass(frozen=True, eq=False)
class AblationScores:
    """The metric without each of the model's parts.

    The prompt axis has length 1 where the metric is a plain function, which scores all prompts together.

    Attributes:
        unit, method: the arguments of `ablate`.
        axes: the names of the grid's axes.
        layers, positions, neurons: the entries along the grid's axes; `positions` and `neurons` are None where the grid
            has no such axis.
        intact: the metric of the model without ablation, [prompt].
        scores: the metric with each ablation, [*axes prompt]; the mean over several draws.
    """

    unit: Unit
    method: Method
    axes: tuple[str, ...]
    layers: tuple[int, ...]
    positions: tuple[int, ...] | None
    neurons: tuple[int, ...] | None
    intact: Float[Tensor, " prompt"]
    scores: Float[Tensor, "*axes prompt"]

    @property
    def per_prompt(self) -> Float[Tensor, "*axes prompt"]:
        """How each prompt's metric changes: ablated less intact."""
        return self.scores - self.intact

    @property
    def effect(self) -> Float[Tensor, "*axes"]:
        """How the metric changes, averaged over prompts: ablated less intact."""
        return self.per_prompt.mean(-1)

    def __repr__(self) -> str:
        shape = ", ".join(f"{axis} {size}" for axis, size in zip(self.axes, self.effect.shape, strict=True))
        return f"AblationScores({self.unit!r}, {self.method!r}, {shape}, intact {float(self.intact.mean()):.4g})"


@torch.no_grad()
def ablate(
    model: HookedModel,
    tokens: Prompts,
    metric: AnyMetric,
    unit: Unit = "heads",
    method: Method = "zero",
    *,
    by_pos: bool | Sequence[int] = False,
    layers: Sequence[int] | None = None,
    neurons: Sequence[int] | None = None,
    reference: Prompts | None = None,
    per_position: bool = False,
    n_draws: int = 1,
    seed: int = 0,
    attention_mask: Int[Tensor, "batch pos"] | None = None,
    reference_mask: Int[Tensor, "reference_batch reference_pos"] | None = None,
    memory_budget: int = DEFAULT_MEMORY_BUDGET,
    verbose: bool = True,
) -> AblationScores:
    """Return the metric of the model without each of its parts, one at a time.

    Args:
        model: a `HookedTransformer`.
        tokens: the prompts, as the model takes them.
        metric: one of `hooked_lm.metrics`, or a function from logits [batch pos vocab] to a scalar.
        unit: `"heads"` (z) [layer head], `"attention"` (the output of a layer's attention) and `"mlps"` [layer],
            `"neurons"` (after the activation function, and the gate if there is one) [layer neuron], `"positions"`
            (the residual stream at the start of a layer, at one position) [layer pos].
        method: the replacement: `"zero"`; the `"mean"` over `reference`; or `"resample"`, the activation of another
            prompt.
        by_pos: True ablates at one position at a time, [layer pos ...], a list of positions at these only. Positions
            are always apart for `"positions"`.
        layers, neurons: those to ablate; all by default. Neurons are the same in each layer.
        reference: the prompts that means and other activations are taken from; by default `tokens`. Means are over all
            of them, the ablated prompt included; for `"resample"` a prompt never gets its own.
        per_position: take means at each position; the reference is then as long as the prompts. Otherwise means are
            over all positions but padding.
        n_draws: the number of draws of other prompts over which scores are averaged, for `"resample"`.
        seed: for the draws.
        attention_mask, reference_mask: [batch pos], 0 at padding.
        memory_budget, verbose: as for `sweep`.

    Raises:
        UnknownHookError: the model has no such part: no MLPs, or no neurons in a mixture of experts.
        ValueError: an unknown unit or method, a layer, neuron or position out of range, a reference that does not fit,
            an option that this method would not use, or a metric that is no number.
    """
    n_draws, seed = integer(n_draws, "n_draws"), integer(seed, "seed")
    tokens, mask = read_prompts(model, tokens, attention_mask)
    _check_options(unit, method, neurons, reference, reference_mask, per_position, n_draws)
    grid = _AblationGrid.of(model, unit, tokens.shape[1], by_pos, layers, neurons)
    if method == "zero":
        draws: list[dict[str, Tensor]] = [{}]
    else:
        source = _ReferenceRun(model, grid.sites, tokens, mask, reference, reference_mask)
        means = method == "mean"
        draws = [source.means(per_position)] if means else source.draws(n_draws, torch.Generator().manual_seed(seed))
    cells = [cell for values in draws for cell in grid.cells(values)]
    scores = sweep(
        model,
        tokens,
        [(), *cells],
        metric,
        attention_mask=mask,
        per_prompt=isinstance(metric, Metric),
        memory_budget=memory_budget,
        verbose=verbose,
    ).reshape(len(cells) + 1, -1)
    ablated = scores[1:].reshape(len(draws), *grid.shape, scores.shape[1]).mean(0)
    return AblationScores(
        unit, method, grid.axes, grid.layers, grid.positions, grid.neurons, intact=scores[0], scores=ablated
    )


def _check_options(
    unit: str,
    method: str,
    neurons: Sequence[int] | None,
    reference: object,
    reference_mask: Tensor | None,
    per_position: bool,
    n_draws: int,
) -> None:
    if unit not in _UNITS:
        raise ValueError(f"unit is one of {', '.join(_UNITS)}; got {unit!r}")
    if method not in _METHODS:
        raise ValueError(f"method is one of {', '.join(_METHODS)}; got {method!r}")
    if neurons is not None and unit != "neurons":
        raise ValueError(f"neurons are chosen among neurons; the unit is {unit!r}")
    if method == "zero" and reference is not None:
        raise ValueError("method 'zero' takes nothing from a reference: use 'mean' or 'resample'")
    if reference is None and reference_mask is not None:
        raise ValueError("reference_mask belongs to a reference, and there is none")
    if per_position and method != "mean":
        raise ValueError(f"per_position is about means; the method is {method!r}")
    if n_draws < 1 or (n_draws > 1 and method != "resample"):
        raise ValueError(f"n_draws is 1 or more, and 1 unless the method is 'resample'; got {n_draws} for {method!r}")


# The parts that are ablated


@dataclass(frozen=True)
class _AblationGrid:
    """The parts that are ablated, one at a time."""

    model: HookedModel
    unit: str
    layers: tuple[int, ...]
    positions: tuple[int, ...] | None
    units: tuple[int, ...] | None

    @classmethod
    def of(
        cls,
        model: HookedModel,
        unit: str,
        n_positions: int,
        by_pos: bool | Sequence[int],
        layers: Sequence[int] | None,
        neurons: Sequence[int] | None,
    ) -> _AblationGrid:
        cfg = model.cfg
        chosen = _chosen("layer", layers, cfg.n_layers)
        for layer in chosen:
            site = get_act_name(_UNITS[unit][0], layer)
            if site not in model.hook_dict:
                lacking = f"this model has no {unit} in layer {layer}: "
                raise UnknownHookError(lacking + describe_unknown(site, list(model.hook_dict)))
        positions = None
        if unit == "positions" or by_pos is not False:
            positions = _chosen("position", None if isinstance(by_pos, bool) else by_pos, n_positions)
        units = tuple(range(cfg.n_heads)) if unit == "heads" else None
        if unit == "neurons":
            units = _chosen("neuron", neurons, cfg.d_mlp or 0)
        return cls(model, unit, chosen, positions, units)

    @property
    def sites(self) -> list[str]:
        return [get_act_name(_UNITS[self.unit][0], layer) for layer in self.layers]

    @property
    def axes(self) -> tuple[str, ...]:
        names = ("layer", "pos" if self.positions is not None else None, _UNITS[self.unit][1])
        return tuple(name for name in names if name is not None)

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(len(entries) for entries in (self.layers, self.positions, self.units) if entries is not None)

    @property
    def neurons(self) -> tuple[int, ...] | None:
        return self.units if self.unit == "neurons" else None

    def cells(self, values: dict[str, Tensor]) -> list[Intervention]:
        """The interventions, in the order of the axes.

        Args:
            values: hook name -> the replacement, [(batch) (pos) ...]; empty for zero.
        """
        axis = _UNITS[self.unit][1]
        cells = []
        for site, pos, unit in itertools.product(self.sites, self.positions or (None,), self.units or (None,)):
            selections: dict[str, int | None] = {"pos": pos}
            if axis is not None:
                selections[grid_axis(axis).field] = unit
            if values:
                cells.append(Intervention(site, "replace", self._part(site, values[site], pos, unit), **selections))
            else:
                cells.append(Intervention(site, "zero", **selections))
        return cells

    def _part(self, site: str, value: Tensor, pos: int | None, unit: int | None) -> Tensor:
        inner = axes_at(self.model, site)[2:]  # the axes after batch and pos
        has_pos = value.ndim > len(inner)
        if unit is not None:
            value = value.select(value.ndim - len(inner), unit)
        if pos is not None and has_pos:
            value = value.select(value.ndim - len(inner) - 1 + (unit is not None), pos)
        return value


def _chosen(what: str, given: Sequence[int] | None, size: int) -> tuple[int, ...]:
    """The chosen entries along an axis, counted from 0; all of them by default."""
    chosen = range(size) if given is None else given
    for one in chosen:
        if not is_integer(one) or not -size <= one < size:
            raise ValueError(f"no {what} {one!r}: there are {what}s 0-{size - 1}")
    if not len(chosen):
        raise ValueError(f"there is no {what} to ablate")
    return tuple(integer(one, what) % size for one in chosen)


# The replacement values


class _ReferenceRun:
    """The activations of the reference prompts."""

    def __init__(
        self,
        model: HookedModel,
        sites: Sequence[str],
        tokens: Tensor,
        mask: Tensor,
        reference: Prompts | None,
        reference_mask: Tensor | None,
    ) -> None:
        self.tokens, self.is_other = tokens, reference is not None
        prompts, own_mask = (tokens, mask) if reference is None else read_prompts(model, reference, reference_mask)
        self.mask = own_mask.bool()
        self.padded = not bool(mask.all()) or not bool(self.mask.all())
        self.cache: dict[str, Tensor] = model.run_with_cache(
            prompts, names_filter=list(sites), attention_mask=own_mask, return_type=None, return_cache_object=False
        )[1]

    def means(self, per_position: bool) -> dict[str, Tensor]:
        """Means over prompts, [pos ...], or over prompts and positions, [...]. Padding is left out."""
        if per_position:
            self._check_positions("means per position")
        return {
            site: at_least_single(value).mean(0) if per_position else at_least_single(value[self.mask]).mean(0)
            for site, value in self.cache.items()
        }

    def draws(self, n_draws: int, generator: torch.Generator) -> list[dict[str, Tensor]]:
        """The activations of other prompts, [batch pos ...], drawn for each prompt on its own."""
        self._check_positions("activations of other prompts")
        n_prompts = self.tokens.shape[0] if self.is_other else None
        found = []
        for _ in range(n_draws):
            drawn = draw_prompts(self.mask.shape[0], n_prompts, generator)
            found.append({site: value[drawn.to(value.device)] for site, value in self.cache.items()})
        return found

    def _check_positions(self, what: str) -> None:
        n_positions, n_reference = self.tokens.shape[1], self.mask.shape[1]
        if n_positions != n_reference:
            raise ValueError(
                f"{what} go position by position: the prompts have {n_positions} positions, the reference {n_reference}"
            )
        if self.padded:
            raise ValueError(f"{what} go position by position, and padding shifts positions: take equally long prompts")
