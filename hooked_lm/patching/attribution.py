"""Attribution patching: what patching each cell of a grid would do, estimated for all cells by one backward pass.

To first order, replacing an activation of the corrupted run by the clean one changes the metric by

    gradient . (clean - corrupted)

with the metric's gradient by that activation, taken in the corrupted run (Nanda 2023, "Attribution Patching: Activation
Patching at Industrial Scale"). That is one forward and one backward pass, however many cells there are. It is an
estimate: it goes wrong where the model bends between the two activations, in saturated attention above all. So `audit`
patches some cells exactly, and `qk_fix` estimates queries and keys by way of the attention that they would cause
(Kramar et al. 2024, "AtP*: An efficient and scalable method for localizing LLM behaviour to components").
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
from einops import einsum
from jaxtyping import Float, Int
from torch import Tensor

from hooked_lm.components.sequence import SequenceLayout
from hooked_lm.hooks import HookPoint
from hooked_lm.interventions import Intervention, Selection
from hooked_lm.metrics import Metric
from hooked_lm.names import UnknownHookError, describe_unknown, get_act_name
from hooked_lm.sweep import AnyMetric, sweep

Cell = tuple[int, ...]


@dataclass(frozen=True)
class Grid:
    """Which activation a grid patches, and what its cells are.

    Attributes:
        activation: short name of the site, one in each layer.
        axes: the grid's axes. What they leave out is patched as a whole.
    """

    activation: str
    axes: tuple[str, ...]


_HEAD_ACTIVATIONS = {"out": "z", "q": "q", "k": "k", "v": "v", "pattern": "pattern"}

# By the name of the exact function: "resid_pre" estimates what `get_act_patch_resid_pre` computes.
GRIDS: dict[str, Grid] = {
    **{
        name: Grid(name, ("layer", "pos"))
        for name in ("resid_pre", "resid_mid", "resid_post", "attn_out", "mlp_out", "mlp_in")
    },
    **{f"attn_head_{name}_all_pos": Grid(site, ("layer", "head")) for name, site in _HEAD_ACTIVATIONS.items()},
    **{f"attn_head_{name}_by_pos": Grid(site, ("layer", "pos", "head")) for name, site in _HEAD_ACTIVATIONS.items()},
    "neuron_all_pos": Grid("post", ("layer", "d_mlp")),
    "neuron_by_pos": Grid("post", ("layer", "pos", "d_mlp")),
}
DEFAULT_GRIDS = ("resid_pre", "attn_out", "mlp_out", "attn_head_out_all_pos", "attn_head_out_by_pos")
_OF_SITE = {"pos": ("pos", "query"), "head": ("head", "kv_head"), "d_mlp": ("d_mlp",)}
_SELECTS = {"pos": "pos", "head": "head", "d_mlp": "feature"}


@dataclass(frozen=True)
class AuditedCell:
    """One cell that was patched exactly.

    Attributes:
        cell: its place in the grid.
        estimate, exact: estimated and true change of the metric.
        chosen: for its large estimate, or at random.
    """

    cell: Cell
    estimate: float
    exact: float
    chosen: Literal["top", "random"]


@dataclass(frozen=True)
class Audit:
    """How far a grid's estimates can be trusted: some of its cells, patched exactly.

    Attributes:
        grid: its name.
        axes: what a cell's numbers mean.
        cells: the cells with the largest estimates, in that order, then the random ones.
        rank_correlation: Spearman's, between estimate and exact effect over these cells; NaN where all are equal.
        resolution: what is smaller than this is rounding: it has no sign, and counts as zero among the ranks.
    """

    grid: str
    axes: tuple[str, ...]
    cells: tuple[AuditedCell, ...]
    rank_correlation: float
    resolution: float

    @classmethod
    def of(cls, grid: str, cells: Sequence[AuditedCell], resolution: float) -> Audit:
        """Return the audit that some cells of a grid make; what is below the resolution counts as zero.

        Args:
            grid: its name.
            cells: the cells that were patched for real.
            resolution: the size below which an effect is rounding.
        """
        pairs = torch.tensor([_pair(one) for one in cells], dtype=torch.float64)
        pairs = torch.where(pairs.abs() > resolution, pairs, 0.0)
        return cls(grid, GRIDS[grid].axes, tuple(cells), spearman(pairs[:, 0], pairs[:, 1]), resolution)

    @property
    def sign_flips(self) -> tuple[AuditedCell, ...]:
        """The cells whose effect has the other sign than its estimate."""
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
class Attribution:
    """Estimated effects of patching, grid by grid: `attribution["resid_pre"]` is [layer pos].

    Attributes:
        corrupted: the metric of the corrupted run; an exact grid, less this, is what a grid here estimates.
        grids: name -> estimated change of the metric, with the axes of `GRIDS[name]`.
        audits: name -> how well exact patching agrees; empty unless asked for.
    """

    corrupted: float
    grids: Mapping[str, Tensor]
    audits: Mapping[str, Audit] = field(default_factory=dict)

    def __getitem__(self, name: str) -> Tensor:
        if name not in self.grids:
            raise KeyError(f"no grid {name!r} was estimated; there are {', '.join(self.grids)}")
        return self.grids[name]

    def strongest(self, name: str, n: int = 10) -> list[tuple[Cell, float]]:
        """Return the cells of a grid with the largest estimated effects of either sign, and those effects.

        Args:
            name: of the grid.
            n: how many; fewer where there are fewer.
        """
        effects = self[name]
        return [(_place(index, effects), float(effects.flatten()[index])) for index in _largest(effects, n)]

    def __str__(self) -> str:
        lines = [f"attribution patching; the corrupted run's metric is {self.corrupted:.4g}"]
        for name in self.grids:
            if name in self.audits:
                lines.append(str(self.audits[name]))
            else:
                cell, effect = self.strongest(name, 1)[0]
                lines.append(f"{name}: largest {effect:.4g} at {_labelled(cell, GRIDS[name].axes)}; not audited")
        return "\n".join(lines)


def attribution_patch(
    model: Any,
    corrupted_tokens: Int[Tensor, "batch pos"] | Any,
    clean: Any,
    metric: AnyMetric,
    grids: Sequence[str] | None = None,
    *,
    audit: int = 0,
    seed: int = 0,
    qk_fix: bool = False,
    attention_mask: Int[Tensor, "batch pos"] | None = None,
    verbose: bool = True,
) -> Attribution:
    """Return what patching the clean run into the corrupted one would do, estimated for whole grids at once.

    Gradients are taken whatever the surrounding grad mode and whether or not parameters require them; neither those
    settings nor any `.grad` is changed. Swap clean and corrupted for the other direction.

    Args:
        model: a `HookedTransformer`. Hooks on it act in every run.
        corrupted_tokens: the prompts that are patched, as the model takes them.
        clean: the clean prompts, or the cache of a run on them.
        metric: one of `hooked_lm.metrics`, or any differentiable function from logits [batch pos vocab] to a scalar.
        grids: names in `GRIDS`, those of the exact functions less `get_act_patch_`: `"resid_pre"` [layer pos],
            `"attn_head_out_all_pos"` [layer head], `"attn_head_k_by_pos"` [layer pos head], also `"neuron_by_pos"`
            [layer pos d_mlp]. Keys and values have key-value heads. By default residual stream, attention, MLPs where
            there are any, and heads.
        audit: patch so many cells of each grid exactly, those with the largest estimates, and as many of the others
            at random.
        seed: of that choice.
        qk_fix: estimate queries and keys by the attention they would cause, softmax included, instead of by a gradient
            through it (Kramar et al. 2024). Costs one more attention per layer.
        attention_mask: [batch pos], 0 at padding.
        verbose: show the progress of the audit.

    Raises:
        UnknownHookError: a grid's site that the model does not have, or a clean cache without it.
        ValueError: an unknown grid, prompts of different shape, or a metric that is no scalar, not a number, or has no
            gradient.
    """
    names = _checked_grids(model, grids)
    if isinstance(audit, bool) or not isinstance(audit, int) or audit < 0:
        raise ValueError(f"audit is a number of cells, 0 or more; got {audit!r}")
    tokens, mask = model.tokens_and_mask(corrupted_tokens, attention_mask)
    if isinstance(metric, Metric):
        metric.check_run(tokens, model.cfg.d_vocab_out, mask)
    sites = list(dict.fromkeys(site for name in names for site in grid_sites(model, GRIDS[name])))
    fixed = [name for name in names if qk_fix and GRIDS[name].activation in ("q", "k")]
    extra = [get_act_name(one, layer) for one in "qkvz" for layer in range(model.cfg.n_layers)] if fixed else []
    clean_values = activations_of(model, clean, sites, tokens, attention_mask)
    run = _differentiate(model, tokens, mask, metric, list(dict.fromkeys([*sites, *extra])))
    effects = {name: _first_order(model, GRIDS[name], clean_values, run) for name in names if name not in fixed}
    if fixed:
        layout = SequenceLayout(tokens.shape[1], 0, tokens.device, _valid(mask))
        effects |= {name: _through_attention(model, GRIDS[name], clean_values, run, layout) for name in fixed}
    result = Attribution(run.score, {name: effects[name] for name in names})
    if not audit:
        return result
    patch = _Exact(model, tokens, mask, metric, clean_values, verbose)
    return replace(result, audits=patch.audits(result, audit, seed))


def _checked_grids(model: Any, grids: Sequence[str] | None) -> list[str]:
    if grids is None:
        return [name for name in DEFAULT_GRIDS if name != "mlp_out" or not model.cfg.attn_only]
    names = [grids] if isinstance(grids, str) else list(dict.fromkeys(grids))
    unknown = [name for name in names if name not in GRIDS]
    if unknown or not names:
        raise ValueError(f"grids are among {', '.join(GRIDS)}; got {', '.join(map(repr, unknown)) or 'none'}")
    return names


def grid_sites(model: Any, grid: Grid) -> list[str]:
    """Return a grid's site in every layer.

    Args:
        model: the model.
        grid: which grid.

    Raises:
        UnknownHookError: a layer has no such site.
        ValueError: the model has no layers.
    """
    sites = [get_act_name(grid.activation, layer) for layer in range(model.cfg.n_layers)]
    for site in sites:
        if site not in model.hook_dict:
            raise UnknownHookError(describe_unknown(site, list(model.hook_dict)))
    if not sites:
        raise ValueError("a model without layers has nothing to patch")
    return sites


# The clean run


@torch.no_grad()
def activations_of(
    model: Any,
    source: Any,
    sites: Sequence[str],
    tokens: Int[Tensor, "batch pos"],
    attention_mask: Tensor | None = None,
    run: str = "clean",
) -> dict[str, Tensor]:
    """Return a run's activations at some sites, by full hook name.

    Args:
        model: the model.
        source: a cache, or prompts to run.
        sites: full hook names.
        tokens: the corrupted prompts, which the run's match position by position.
        attention_mask: [batch pos], for prompts that are given as tokens.
        run: what to call the run in errors.

    Raises:
        UnknownHookError: the cache lacks a site.
        ValueError: another number of prompts or positions.
    """
    if isinstance(source, Mapping):
        if not getattr(source, "has_batch_dim", True):
            raise ValueError(f"the {run} cache has no batch axis: make it without remove_batch_dim")
        values = {site: _cached(source, site, run) for site in sites}
        for site, value in values.items():
            _check_size(model, site, value, tokens, run)
        return values
    prompts, mask = model.tokens_and_mask(source, None if _is_text(source) else attention_mask)
    if prompts.shape != tokens.shape:
        raise ValueError(
            f"{run} and corrupted prompts match position by position: the {run} ones are {_size(prompts)}, "
            f"the corrupted ones {_size(tokens)}"
        )
    _, recorded = model.run_with_cache(
        prompts, names_filter=list(sites), attention_mask=mask, return_type=None, return_cache_object=False
    )
    return dict(recorded)


def _is_text(prompts: Any) -> bool:
    return isinstance(prompts, str) or (
        isinstance(prompts, (list, tuple)) and any(isinstance(one, str) for one in prompts)
    )


def _cached(cache: Mapping[Any, Tensor], site: str, run: str) -> Tensor:
    if site not in cache:
        raise UnknownHookError(
            f"the {run} cache has no {site!r}: record it, by name if it is one of those computed on demand"
        )
    return cache[site].detach()


def _check_size(model: Any, site: str, value: Tensor, tokens: Tensor, run: str) -> None:
    axes = (model.hook_dict[site].axes or "").split()
    expected = {"batch": tokens.shape[0], **dict.fromkeys(("pos", "query", "key"), tokens.shape[1])}
    wrong = value.ndim != len(axes)
    if wrong or any(expected.get(axis, size) != size for axis, size in zip(axes, value.shape, strict=True)):
        raise ValueError(
            f"the {run} cache's {site!r} has shape {tuple(value.shape)} ({' '.join(axes)}), but the corrupted prompts "
            f"are {_size(tokens)}: the two match position by position"
        )


def _size(tokens: Tensor) -> str:
    return f"{tokens.shape[0]} of {tokens.shape[1]} positions each"


def _valid(mask: Tensor | None) -> Tensor | None:
    return None if mask is None or bool(mask.all()) else mask.bool()


def replacement(
    model: Any,
    site: str,
    value: Tensor,
    pos: Selection = None,
    head: Selection = None,
    feature: Selection = None,
) -> Intervention:
    """Return the intervention that puts part of an activation in place of the run's own.

    Args:
        model: the model, whose hook points name the axes.
        site: full hook name.
        value: a whole activation at that site.
        pos, head, feature: the part; None for all.
    """
    axes = (model.hook_dict[site].axes or "").split()
    kept = list(axes)
    for axis_names, selection in ((_OF_SITE["pos"], pos), (_OF_SITE["head"], head), ((axes[-1],), feature)):
        if selection is None:
            continue
        axis = next(name for name in axis_names if name in axes)
        where = kept.index(axis)
        if isinstance(selection, tuple):
            value = value.index_select(where, torch.tensor(selection, device=value.device) % value.shape[where])
        else:
            value = value.select(where, selection)
            kept.remove(axis)
    if (pos, head, feature) != (None, None, None):
        value = value.clone()  # a part must not keep the whole alive
    return Intervention(site, "replace", value, pos=pos, head=head, feature=feature)


# The corrupted run and its gradients


@dataclass(frozen=True, eq=False)
class _Run:
    """The corrupted run: its score, and at each site its activation and the score's gradient."""

    score: float
    values: dict[str, Tensor]
    grads: dict[str, Tensor]


def _differentiate(
    model: Any, tokens: Tensor, attention_mask: Tensor | None, metric: AnyMetric, sites: Sequence[str]
) -> _Run:
    """Run the corrupted prompts forward and backward. Nothing of the model is changed."""
    starts = [name for name in ("hook_embed", "hook_pos_embed") if name in model.hook_dict]
    with torch.inference_mode(False), torch.enable_grad():
        with model.hooks(fwd_hooks=[(starts, _begin_graph)]):
            logits, values = model.run_with_cache(
                tokens.clone(),
                names_filter=list(sites),
                attention_mask=None if attention_mask is None else attention_mask.clone(),
                return_cache_object=False,
            )
        score = _scalar(metric(logits), metric)
        grads = torch.autograd.grad(score, [values[site] for site in sites], allow_unused=True)
    values = {site: values[site].detach() for site in sites}
    # What the metric does not depend on has no gradient at all.
    found = {
        site: torch.zeros_like(values[site]) if one is None else one for site, one in zip(sites, grads, strict=True)
    }
    return _Run(float(score.detach()), values, found)


def _begin_graph(x: Tensor, hook: HookPoint) -> Tensor:
    """Start the graph here, so that it does not matter whether parameters require gradients."""
    return x.detach().requires_grad_()


def _scalar(score: Any, metric: AnyMetric) -> Tensor:
    name = f"the metric {metric.name!r}" if isinstance(metric, Metric) else "the metric"
    if not isinstance(score, Tensor) or score.numel() != 1:
        came = f"shape {tuple(score.shape)}" if isinstance(score, Tensor) else type(score).__name__
        raise ValueError(f"{name} returns a scalar tensor; it returned {came}")
    if bool(score.isnan()):
        raise ValueError(f"{name} is not a number for the corrupted run")
    if not score.requires_grad:
        raise ValueError(
            f"{name} has no gradient (ranks and accuracies count, and `.item()` or `.detach()` cut it off): "
            "attribution patching needs one that changes smoothly, such as logit_diff or log_prob"
        )
    return score.reshape(())


def _first_order(model: Any, grid: Grid, clean: Mapping[str, Tensor], run: _Run) -> Tensor:
    """Gradient times change, summed over prompts and over what the grid's axes leave out."""
    layers = []
    for site in grid_sites(model, grid):
        change = clean[site].to(run.values[site]) - run.values[site]
        layers.append(_cells(model, grid, site, run.grads[site], change))
    return torch.stack(layers)


def _cells(model: Any, grid: Grid, site: str, gradient: Tensor, change: Tensor) -> Tensor:
    axes = (model.hook_dict[site].axes or "").split()
    kept = [axis for wanted in grid.axes for axis in axes if axis in _OF_SITE.get(wanted, ())]
    exact = torch.promote_types(gradient.dtype, torch.float32)
    return einsum(
        gradient.to(exact), change.to(exact), f"{' '.join(axes)}, {' '.join(axes)} -> {' '.join(kept)}".strip()
    )


# Queries and keys, by way of attention


@torch.no_grad()
def _through_attention(
    model: Any, grid: Grid, clean: Mapping[str, Tensor], run: _Run, layout: SequenceLayout
) -> Tensor:
    """Gradient by z times the change of z that a patched query or key causes."""
    layers = []
    for layer in range(model.cfg.n_layers):
        attention = _HeadAttention(model.blocks[layer].attn, run, layer, layout)
        patched = clean[get_act_name(grid.activation, layer)].to(attention.q)
        if grid.activation == "q":
            layers.append(attention.effect_of_queries(patched, by_pos="pos" in grid.axes))
        elif "pos" in grid.axes:
            layers.append(attention.effect_of_each_key(patched))
        else:
            layers.append(attention.effect_of_all_keys(patched))
    return torch.stack(layers)


class _HeadAttention:
    """One layer's attention in the corrupted run, with queries or keys exchanged."""

    def __init__(self, attn: Any, run: _Run, layer: int, layout: SequenceLayout) -> None:
        self.attn, self.layout = attn, layout
        self.q, self.k, self.v, self.z = (run.values[get_act_name(name, layer)] for name in "qkvz")
        self.z_grad = run.grads[get_act_name("z", layer)]
        self.group = self.q.shape[2] // self.k.shape[2]

    def effect_of_queries(self, q: Tensor, by_pos: bool) -> Tensor:
        """Return the effects of the clean queries, [pos head] or [head]. A query changes its own position only."""
        axes = "batch pos head d_head"
        change = self.gathered(q, self.k)[0] - self.z
        return einsum(self.z_grad, change, f"{axes}, {axes} -> {'pos head' if by_pos else 'head'}")

    def effect_of_all_keys(self, k: Tensor) -> Float[Tensor, " kv_head"]:
        """Return the effects of the clean keys, each head's at all positions."""
        change = self.gathered(self.q, k)[0] - self.z
        effect = einsum(self.z_grad, change, "batch pos head d_head, batch pos head d_head -> head")
        return effect.unflatten(0, (-1, self.group)).sum(-1)

    def effect_of_each_key(self, k: Tensor) -> Float[Tensor, "pos kv_head"]:
        """Return the effects of the clean keys, one by one, from two sets of scores.

        A new score `s'` at one key turns its share of the attention from `sigmoid(s - r)` into `sigmoid(s' - r)`, where
        `r` is the log-sum-exp of the others. What it gains they lose in proportion, so its gain is worth as much as
        attention to it is, less the mean of what attention to the others is.
        """
        v = self.v.repeat_interleave(self.group, 2)
        worth = einsum(self.z_grad, v, "batch query head d_head, batch key head d_head -> batch head query key")
        scores, changed = (self.gathered(self.q, keys)[1].double() for keys in (self.k, k))
        columns, worths = scores, worth.double()
        if self.attn.sinks is not None:  # one more competitor for attention, worth nothing
            sinks = self.attn.sinks.double()[:, None, None].expand(*scores.shape[:-1], 1)
            columns, worths = torch.cat((scores, sinks), -1), torch.nn.functional.pad(worths, (0, 1))
        rest, mean_worth = (one[..., : scores.shape[-1]] for one in _of_the_others(columns, worths))
        gain = (changed - rest).sigmoid() - (scores - rest).sigmoid()
        effect = torch.where(scores > float("-inf"), gain * (worth - mean_worth), 0.0)
        return effect.sum((0, 2)).T.unflatten(1, (-1, self.group)).sum(-1)

    def gathered(self, q: Tensor, k: Tensor) -> tuple[Tensor, Float[Tensor, "batch head query key"]]:
        """Return z and the scores for queries and keys as their hook points show them."""
        seen: list[Tensor] = []
        handle = self.attn.hook_attn_scores.add_hook(lambda x, hook: seen.append(x), reads_only=True)
        try:
            z = self.attn.eager_attention(*self.attn.with_positions(q, k, self.layout), self.v, self.layout)
        finally:
            handle.remove()
        return z, seen[0]


def _of_the_others(
    scores: Float[Tensor, "batch head query key"], worth: Float[Tensor, "batch head query key"]
) -> tuple[Float[Tensor, "batch head query key"], Float[Tensor, "batch head query key"]]:
    """Return, for each key, log-sum-exp of the other keys' scores, and their mean worth by attention.

    Sums before and after the key, rather than all less its own: in saturated attention that would leave rounding only.
    """
    highest = scores.amax(-1, keepdim=True)
    weights = (scores - highest).exp()
    mass, total = _sum_of_the_others(weights), _sum_of_the_others(weights * worth)
    return mass.log() + highest, torch.where(mass > 0, total / mass, 0.0)


def _sum_of_the_others(x: Tensor) -> Tensor:
    nothing = torch.zeros_like(x[..., :1])
    before = torch.cat((nothing, x[..., :-1]), -1).cumsum(-1)
    after = torch.cat((x[..., 1:], nothing), -1).flip(-1).cumsum(-1).flip(-1)
    return before + after


# The audit


@dataclass(frozen=True, eq=False)
class _Exact:
    """Exact patching of chosen cells."""

    model: Any
    tokens: Tensor
    attention_mask: Tensor | None
    metric: AnyMetric
    clean: Mapping[str, Tensor]
    verbose: bool

    def audits(self, attribution: Attribution, n: int, seed: int) -> dict[str, Audit]:
        generator = torch.Generator().manual_seed(seed)
        chosen = {name: choose_cells(effects, n, generator) for name, effects in attribution.grids.items()}
        cells = [self.cell(name, cell) for name, places in chosen.items() for cell, _ in places]
        scores = sweep(
            self.model,
            self.tokens,
            cells,
            self.metric,
            attention_mask=self.attention_mask,
            verbose=self.verbose,
        )
        exact = iter((scores.double() - attribution.corrupted).tolist())
        size = max(abs(attribution.corrupted), float(scores.abs().max()))
        resolution = 100 * torch.finfo(scores.dtype).eps * size
        audits = {}
        for name, places in chosen.items():
            effects = attribution[name]
            audited = [AuditedCell(cell, float(effects[cell]), next(exact), how) for cell, how in places]
            audits[name] = Audit.of(name, audited, resolution)
        return audits

    def cell(self, name: str, cell: Cell) -> Intervention:
        grid = GRIDS[name]
        site = get_act_name(grid.activation, cell[0])
        selections: dict[str, Any] = {
            _SELECTS[axis]: index for axis, index in zip(grid.axes[1:], cell[1:], strict=True)
        }
        return replacement(self.model, site, self.clean[site], **selections)


def choose_cells(effects: Tensor, n: int, generator: torch.Generator) -> list[tuple[Cell, Literal["top", "random"]]]:
    """Return the `n` cells with the largest effects of either sign, and `n` of the others at random.

    Args:
        effects: estimated, one per cell.
        n: how many of each kind.
        generator: which others.
    """
    top = _largest(effects, n)
    left = torch.ones(effects.numel(), dtype=torch.bool)
    left[top] = False
    others = torch.where(left)[0]
    drawn = others[torch.randperm(len(others), generator=generator)[:n]].tolist()
    return [(_place(index, effects), "top") for index in top] + [(_place(index, effects), "random") for index in drawn]


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
    scale = float(a.norm() * b.norm())
    return float(a @ b) / scale if scale > 0 else float("nan")


def _ranks(x: Tensor) -> Tensor:
    _, place, counts = x.unique(return_inverse=True, return_counts=True)
    last = counts.cumsum(0).double()
    return (last - (counts - 1) / 2)[place]


def _largest(effects: Tensor, n: int) -> list[int]:
    found: list[int] = effects.flatten().abs().topk(min(n, effects.numel())).indices.tolist()
    return found


def _place(index: int, effects: Tensor) -> Cell:
    return tuple(int(one) for one in torch.unravel_index(torch.tensor(index), effects.shape))


def _labelled(cell: Cell, axes: Sequence[str]) -> str:
    return ", ".join(f"{axis} {index}" for axis, index in zip(axes, cell, strict=True))


def _pair(one: AuditedCell) -> tuple[float, float]:
    return one.estimate, one.exact
