"""Attribution patching: the effect of patching each cell of a grid, estimated for all cells by one backward pass.

To first order, replacing an activation of the corrupted run by the clean one changes the metric by

    gradient . (clean - corrupted)

with the metric's gradient by that activation, taken in the corrupted run (Nanda 2023, "Attribution Patching: Activation
Patching at Industrial Scale"). That is one forward and one backward pass, however many cells there are. It is an
estimate: it goes wrong where the model is not linear between the two activations, in saturated attention above all. So
`audit` patches some cells exactly, and `qk_fix` estimates queries and keys by way of the attention that they would
cause (Kramar et al. 2024, "AtP*: An efficient and scalable method for localizing LLM behaviour to components").
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from einops import einsum
from jaxtyping import Int
from torch import Tensor

from hooked_lm.components import SequenceLayout
from hooked_lm.hooked_model import HookedModel
from hooked_lm.hooks import HookPoint
from hooked_lm.metrics import Metric
from hooked_lm.patching.audit import (
    Audit,
    AuditedCell,
    CellIndex,
    ExactPatching,
    choose_cells,
    largest,
    place_of,
    spearman,
)
from hooked_lm.patching.patches import GRIDS, Patch, patch_sites
from hooked_lm.patching.qk_fix import DifferentiatedRun, attention_effects, attention_sites, check_attention
from hooked_lm.patching.sites import Clean, axes_at, axis_index, clean_activations, read_prompts, replacement
from hooked_lm.sweep import AnyMetric
from hooked_lm.tokenization import Prompts

__all__ = [
    "DEFAULT_GRIDS",
    "GRIDS",
    "Attribution",
    "Audit",
    "AuditedCell",
    "attribution_patch",
    "choose_cells",
    "differentiated_run",
    "replacement",
    "spearman",
]

DEFAULT_GRIDS = ("resid_pre", "attn_out", "mlp_out", "attn_head_out_all_pos", "attn_head_out_by_pos")


@dataclass(frozen=True, eq=False)
class Attribution:
    """Estimated effects of patching, grid by grid: `attribution["resid_pre"]` is [layer pos].

    Attributes:
        corrupted: the metric of the corrupted run. A grid here estimates an exact grid less this number.
        grids: name -> estimated change of the metric, with the axes of `GRIDS[name]`.
        audits: name -> comparison with exact patching; empty if `audit` was 0.
    """

    corrupted: float
    grids: Mapping[str, Tensor]
    audits: Mapping[str, Audit] = field(default_factory=dict)

    def __getitem__(self, name: str) -> Tensor:
        if name not in self.grids:
            raise KeyError(f"no grid {name!r} was estimated; there are {', '.join(self.grids)}")
        return self.grids[name]

    def strongest(self, name: str, n: int = 10) -> list[tuple[CellIndex, float]]:
        """Return the cells of a grid with the largest estimated effects of either sign, and those effects.

        Args:
            name: of the grid.
            n: how many; fewer where there are fewer.
        """
        effects = self[name]
        return [(place_of(index, effects), float(effects.flatten()[index])) for index in largest(effects, n)]

    def __str__(self) -> str:
        lines = [f"attribution patching; the corrupted run's metric is {self.corrupted:.4g}"]
        for name in self.grids:
            if name in self.audits:
                lines.append(str(self.audits[name]))
            else:
                cell, effect = self.strongest(name, 1)[0]
                lines.append(f"{name}: largest {effect:.4g} at {_labelled(cell, GRIDS[name].axes)}; not audited")
        return "\n".join(lines)


def _labelled(cell: CellIndex, axes: Sequence[str]) -> str:
    return ", ".join(f"{axis} {index}" for axis, index in zip(axes, cell, strict=True))


def attribution_patch(
    model: HookedModel,
    corrupted_tokens: Prompts,
    clean: Clean,
    metric: AnyMetric,
    grids: Sequence[str] | None = None,
    *,
    audit: int = 0,
    seed: int = 0,
    qk_fix: bool = False,
    attention_mask: Int[Tensor, "batch pos"] | None = None,
    verbose: bool = True,
) -> Attribution:
    """Return the effect of patching clean activations into the corrupted run, estimated for whole grids at once.

    Gradients are taken whatever the surrounding grad mode and whether or not parameters require them; neither those
    settings nor any `.grad` is changed. Swap clean and corrupted for the other direction.

    Args:
        model: a `HookedTransformer`. Hooks on it act in every run.
        corrupted_tokens: the prompts that are patched, as the model takes them.
        clean: the clean prompts, or a cache of a run on them; as many as the corrupted ones, or one for all.
        metric: one of `hooked_lm.metrics`, or any differentiable function from logits [batch pos vocab] to a scalar.
        grids: names in `GRIDS`, those of the exact functions less `get_act_patch_`: `"resid_pre"` [layer pos],
            `"attn_head_out_all_pos"` [layer head], `"attn_head_k_by_pos"` [layer pos head], also `"neuron_by_pos"`
            [layer pos d_mlp]. Keys and values have key-value heads. By default residual stream, attention, MLPs where
            there are any, and heads.
        audit: patch so many cells of each grid exactly, those with the largest estimates, and as many of the others
            at random.
        seed: of that choice.
        qk_fix: estimate queries and keys by the attention they would cause, softmax included, instead of by a gradient
            through it (Kramar et al. 2024). Costs one more attention per layer, which has to be the stock one.
        attention_mask: [batch pos], 0 at padding.
        verbose: show the progress of the audit.

    Raises:
        UnknownHookError: a grid's site that the model does not have, or a clean cache without it.
        ValueError: an unknown grid, clean prompts of another number or length, a metric that is no scalar, not a
            number, or has no gradient, or `qk_fix` where a layer's attention is not stock.
    """
    names = _checked_grids(model, grids)
    if isinstance(audit, bool) or not isinstance(audit, int) or audit < 0:
        raise ValueError(f"audit is a number of cells, 0 or more; got {audit!r}")
    tokens, mask = read_prompts(model, corrupted_tokens, attention_mask)
    if isinstance(metric, Metric):
        metric.check_run(tokens, model.cfg.d_vocab_out, mask)
    sites = list(dict.fromkeys(site for name in names for site in patch_sites(model, GRIDS[name])))
    fixed = [name for name in names if qk_fix and GRIDS[name].activation in ("q", "k")]
    extra = attention_sites(model) if fixed else []
    if fixed:
        check_attention(model)
    clean_values = clean_activations(model, clean, sites, tokens, mask, attention_mask)
    run = differentiated_run(model, tokens, mask, metric, list(dict.fromkeys([*sites, *extra])))
    effects = {name: _first_order(model, GRIDS[name], clean_values, run) for name in names if name not in fixed}
    if fixed:
        valid = None if bool(mask.all()) else mask.bool()
        layout = SequenceLayout(tokens.shape[1], 0, tokens.device, valid)
        effects |= {name: attention_effects(model, GRIDS[name], clean_values, run, layout) for name in fixed}
    result = Attribution(run.score, {name: effects[name] for name in names})
    if not audit:
        return result
    exact = ExactPatching(model, tokens, mask, metric, clean_values, verbose)
    return replace(result, audits=exact.audits(result.grids, result.corrupted, audit, seed))


def _checked_grids(model: HookedModel, grids: Sequence[str] | None) -> list[str]:
    if grids is None:
        return [name for name in DEFAULT_GRIDS if name != "mlp_out" or not model.cfg.attn_only]
    names = [grids] if isinstance(grids, str) else list(dict.fromkeys(grids))
    unknown = [name for name in names if name not in GRIDS]
    if unknown or not names:
        raise ValueError(f"grids are among {', '.join(GRIDS)}; got {', '.join(map(repr, unknown)) or 'none'}")
    return names


# The corrupted run and its gradients


def differentiated_run(
    model: HookedModel, tokens: Tensor, mask: Tensor, metric: AnyMetric, sites: Sequence[str]
) -> DifferentiatedRun:
    """Return the activations of a run at some sites, and the gradients of a metric by them. The model stays as it is.

    Args:
        model: a `HookedTransformer`.
        tokens, mask: the prompts, [batch pos], and 0 at their padding.
        metric: returns a scalar that has a gradient.
        sites: full hook names.

    Raises:
        ValueError: the metric is no such scalar.
    """
    starts = [name for name in ("hook_embed", "hook_pos_embed") if name in model.hook_dict]
    values: dict[str, Tensor] = {}

    def record(x: Tensor, hook: HookPoint) -> None:
        values[hook.name] = x

    with torch.inference_mode(False), torch.enable_grad():
        logits = model.run_with_hooks(
            tokens.clone(),
            fwd_hooks=[(starts, _begin_graph), (list(sites), record)],
            attention_mask=mask.clone(),
        )
        score = _scalar(metric(logits), metric)
        grads = torch.autograd.grad(score, [values[site] for site in sites], allow_unused=True)
    # An activation that the metric does not depend on has no gradient: torch gives None.
    found = {
        site: torch.zeros_like(values[site]) if one is None else one for site, one in zip(sites, grads, strict=True)
    }
    return DifferentiatedRun(float(score.detach()), {site: values[site].detach() for site in sites}, found)


def _begin_graph(x: Tensor, hook: HookPoint) -> Tensor:
    """Start the graph at the embeddings, whether or not the parameters require gradients."""
    return x.detach().requires_grad_()


def _scalar(score: object, metric: AnyMetric) -> Tensor:
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


def _first_order(model: HookedModel, patch: Patch, clean: Mapping[str, Tensor], run: DifferentiatedRun) -> Tensor:
    """Gradient times change, summed over prompts and over all axes of the activation that are none of the grid's."""
    layers = []
    for site in patch_sites(model, patch):
        axes = axes_at(model, site)
        kept = [axes[axis_index(site, axes, name)] for name in patch.axes[1:]]
        change = clean[site].to(run.values[site]) - run.values[site]
        precise = torch.promote_types(change.dtype, torch.float32)
        pattern = f"{' '.join(axes)}, {' '.join(axes)} -> {' '.join(kept)}".strip()
        effect = einsum(run.grads[site].to(precise), change.to(precise), pattern)
        layers.append(effect.to(model.embed.W_E.device))
    return torch.stack(layers)
