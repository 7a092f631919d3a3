"""Activation patching: put part of the clean run into the corrupted one, and measure the answer.

The classic module's names. Each function returns the metric of every patched run, one per cell of a grid; all cells of
a call are swept at once (`hooked_lm.sweep`), so a grid costs a few runs and not one per cell. A patch that none of the
setters describes can be given as a function, and costs one run per cell.

The direction taken here is "denoising": the corrupted run is patched with activations of the clean one
(Heimersheim and Nanda 2024, "How to use and interpret activation patching").
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Protocol

import torch
from jaxtyping import Float, Int
from torch import Tensor
from tqdm.auto import tqdm

from hooked_lm.hooked_model import HookedModel
from hooked_lm.hooks import HookPoint
from hooked_lm.metrics import Metric, one_number
from hooked_lm.names import GRID_AXES, GRID_AXIS_ALIASES, POSITION_AXES, SELECTED_AXES, get_act_name
from hooked_lm.patching.grids import (
    get_act_patch,
    get_act_patch_attn_head_all_pos_every,
    get_act_patch_attn_head_by_pos_every,
    get_act_patch_attn_head_k_all_pos,
    get_act_patch_attn_head_k_by_pos,
    get_act_patch_attn_head_out_all_pos,
    get_act_patch_attn_head_out_by_pos,
    get_act_patch_attn_head_pattern_all_pos,
    get_act_patch_attn_head_pattern_by_pos,
    get_act_patch_attn_head_pattern_dest_src_pos,
    get_act_patch_attn_head_q_all_pos,
    get_act_patch_attn_head_q_by_pos,
    get_act_patch_attn_head_v_all_pos,
    get_act_patch_attn_head_v_by_pos,
    get_act_patch_attn_out,
    get_act_patch_block_every,
    get_act_patch_mlp_out,
    get_act_patch_resid_mid,
    get_act_patch_resid_post,
    get_act_patch_resid_pre,
)
from hooked_lm.patching.patches import (
    PATCHES,
    Patch,
    patch_cells,
    patch_sites,
    register_patch_site,
)
from hooked_lm.patching.setters import (
    Index,
    PatchSetter,
    SetterFunction,
    layer_head_dest_src_pos_pattern_patch_setter,
    layer_head_pattern_patch_setter,
    layer_head_pos_pattern_patch_setter,
    layer_head_vector_patch_setter,
    layer_pos_head_vector_patch_setter,
    layer_pos_patch_setter,
)
from hooked_lm.patching.sites import Clean, axes_at, clean_activations, read_prompts
from hooked_lm.patching.tables import data_frame, make_df_from_ranges
from hooked_lm.sweep import AnyMetric, sweep
from hooked_lm.sweep.options import DEFAULT_MEMORY_BUDGET
from hooked_lm.tokenization import Prompts

__all__ = [
    "PATCHES",
    "Index",
    "Patch",
    "PatchSetter",
    "SetterFunction",
    "clean_activations",
    "generic_activation_patch",
    "get_act_patch",
    "get_act_patch_attn_head_all_pos_every",
    "get_act_patch_attn_head_by_pos_every",
    "get_act_patch_attn_head_k_all_pos",
    "get_act_patch_attn_head_k_by_pos",
    "get_act_patch_attn_head_out_all_pos",
    "get_act_patch_attn_head_out_by_pos",
    "get_act_patch_attn_head_pattern_all_pos",
    "get_act_patch_attn_head_pattern_by_pos",
    "get_act_patch_attn_head_pattern_dest_src_pos",
    "get_act_patch_attn_head_q_all_pos",
    "get_act_patch_attn_head_q_by_pos",
    "get_act_patch_attn_head_v_all_pos",
    "get_act_patch_attn_head_v_by_pos",
    "get_act_patch_attn_out",
    "get_act_patch_block_every",
    "get_act_patch_mlp_out",
    "get_act_patch_resid_mid",
    "get_act_patch_resid_post",
    "get_act_patch_resid_pre",
    "layer_head_dest_src_pos_pattern_patch_setter",
    "layer_head_pattern_patch_setter",
    "layer_head_pos_pattern_patch_setter",
    "layer_head_vector_patch_setter",
    "layer_pos_head_vector_patch_setter",
    "layer_pos_patch_setter",
    "make_df_from_ranges",
    "patch_cells",
    "patch_sites",
    "register_patch_site",
]

# The axes along which the number of entries is known before anything runs: layers, heads and positions.
_COUNTED_AXES = {*SELECTED_AXES["head"], *POSITION_AXES}
_KNOWN_AXES = (
    "layer",
    *(name for name, axis in GRID_AXES.items() if _COUNTED_AXES.issuperset(axis.along)),
    *GRID_AXIS_ALIASES,
)


class IndexTable(Protocol):
    """A pandas DataFrame, as far as it is read here; naming its type would import pandas."""

    def itertuples(self, index: bool = ..., name: str | None = ...) -> Iterable[tuple[object, ...]]: ...


# The result's type is open: a tensor, or with `return_index_df` a pair. A union would need a cast at every call.
@torch.no_grad()
def generic_activation_patch(
    model: HookedModel,
    corrupted_tokens: Prompts,
    clean_cache: Clean,
    patching_metric: AnyMetric,
    patch_setter: PatchSetter | SetterFunction,
    activation_name: str,
    index_axis_names: Sequence[str] | None = None,
    index_df: IndexTable | None = None,
    return_index_df: bool = False,
    *,
    attention_mask: Int[Tensor, "batch pos"] | None = None,
    per_prompt: bool = False,
    memory_budget: int = DEFAULT_MEMORY_BUDGET,
    verbose: bool = True,
) -> Any:
    """Return the metric of every patched run: the corrupted one with part of an activation taken from the clean one.

    Args:
        model: a `HookedTransformer`.
        corrupted_tokens: the prompts that are patched, as the model takes them.
        clean_cache: the clean prompts, or a cache of a run on them, position by position those of the corrupted
            prompts; as many prompts, or one for all.
        patching_metric: one of `hooked_lm.metrics`, or a function from logits [batch pos vocab] to a scalar.
        patch_setter: a setter of this module, whose cells are swept together; or a function (activation of the
            corrupted run, index, activation of the clean run) that returns the activation to go on with, or
            changes the first in place. It costs one run per cell.
        activation_name: short name of an activation of the blocks: `"resid_pre"`, `"z"`, `"pattern"`.
        index_axis_names: the axes of the grid, `"layer"` first, then any of `"pos"`, `"head"` (or `"head_index"`),
            `"dest_pos"` and `"src_pos"`. Keys and values have key-value heads, which may be fewer.
        index_df: instead of the axes, a pandas DataFrame with one row per cell, the layer in the first column.
        return_index_df: also return the DataFrame of all indices. Needs pandas.
        attention_mask: [batch pos], 0 at padding.
        per_prompt: keep the prompts apart, as a last axis; needs a metric of `hooked_lm.metrics`.
        memory_budget: bytes that a sweep's activations may take, roughly.
        verbose: show a progress bar.

    Returns:
        The metric [*axes], or [row] with `index_df`; with `return_index_df` a pair of it and the DataFrame.

    Raises:
        UnknownHookError: the model has no such activation, or the cache lacks it.
        ValueError: an unknown axis, axes that do not fit the setter, clean prompts of another number or length, an
            entry out of range, or a metric that is no number. Found before the run wherever the run is not needed to
            find it.
    """
    tokens, mask = read_prompts(model, corrupted_tokens, attention_mask)
    indices, shape = _indices(model, tokens, activation_name, patch_setter, index_axis_names, index_df)
    sites = [get_act_name(activation_name, _layer(index)) for index in indices]
    if isinstance(patch_setter, PatchSetter):
        for site in dict.fromkeys(sites):
            patch_setter.check(site, axes_at(model, site))
    clean = clean_activations(model, clean_cache, sites, tokens, mask, attention_mask)
    if isinstance(patch_setter, PatchSetter):
        pairs = zip(sites, indices, strict=True)
        scores = sweep(
            model,
            tokens,
            [patch_setter.intervention(site, index, clean[site]) for site, index in pairs],
            patching_metric,
            attention_mask=mask,
            per_prompt=per_prompt,
            memory_budget=memory_budget,
            verbose=verbose,
        )
    else:
        if per_prompt and not isinstance(patching_metric, Metric):
            raise ValueError("per_prompt needs a metric of hooked_lm.metrics, which scores every prompt")
        places = tqdm(list(zip(sites, indices, strict=True)), disable=not verbose, leave=False)
        scores = _one_by_one(model, tokens, mask, clean, patching_metric, patch_setter, places, per_prompt)
    result = scores if shape is None else scores.reshape(*shape, *scores.shape[1:])
    if not return_index_df:
        return result
    return result, index_df if index_df is not None else data_frame(indices, index_axis_names or ())


def _one_by_one(
    model: HookedModel,
    tokens: Tensor,
    mask: Tensor,
    clean: Mapping[str, Tensor],
    metric: AnyMetric,
    setter: SetterFunction,
    places: Iterable[tuple[str, list[object]]],
    per_prompt: bool,
) -> Float[Tensor, "cell ..."]:
    """Run the model once per cell, with a setter that may do anything."""
    precise = torch.promote_types(model.embed.W_E.dtype, torch.float32)
    scores = []
    for site, index in places:

        def patch(activation: Tensor, hook: HookPoint, site: str = site, index: list[object] = index) -> Tensor | None:
            # A copy: the clean activation serves other cells too, and the function may write to it.
            return setter(activation, index, clean[site].clone())

        logits = model.run_with_hooks(tokens, fwd_hooks=[(site, patch)], attention_mask=mask)
        score = metric.per_prompt(logits) if per_prompt and isinstance(metric, Metric) else one_number(metric, logits)
        if bool(score.isnan().any()):
            raise ValueError(f"the metric is not a number where {site!r} is patched at {index}")
        scores.append(score.to(model.embed.W_E.device, precise))
    return torch.stack(scores) if scores else torch.zeros(0, dtype=precise, device=model.embed.W_E.device)


# Indices of cells


def _indices(
    model: HookedModel,
    tokens: Tensor,
    activation: str,
    setter: PatchSetter | SetterFunction,
    names: Sequence[str] | None,
    table: IndexTable | None,
) -> tuple[list[list[object]], tuple[int, ...] | None]:
    """The index of every cell, and the shape of their grid if they form one."""
    if (names is None) == (table is None):
        raise ValueError("generic_activation_patch takes index_axis_names or index_df: one of them")
    if table is not None:
        return _rows(table), None
    shape = _grid_shape(model, activation, _checked_axes(names or (), setter), tokens.shape[1])
    return [list(index) for index in itertools.product(*map(range, shape))], shape


def _grid_shape(model: HookedModel, activation: str, axes: Sequence[str], n_positions: int) -> tuple[int, ...]:
    """The lengths of the axes. A function may index by head or position an activation that has no such axis."""
    cfg = model.cfg
    if not cfg.n_layers:
        raise ValueError("a model without layers has nothing to patch")
    of_kv_heads = "kv_head" in axes_at(model, get_act_name(activation, 0))
    sizes = {"layer": cfg.n_layers, "head": cfg.n_hooked_kv_heads if of_kv_heads else cfg.n_heads}
    return tuple(sizes.get(axis, n_positions) for axis in axes)


def _checked_axes(names: Sequence[str], setter: PatchSetter | SetterFunction) -> tuple[str, ...]:
    """The axes by their own names, in the order given."""
    if isinstance(names, str):
        raise ValueError(f"index_axis_names is a tuple of names, got {names!r}")
    for name in names:
        if name not in _KNOWN_AXES:
            raise ValueError(
                f"unknown axis {name!r}: axes are {', '.join(_KNOWN_AXES)}; other indices are given with index_df"
            )
    axes = tuple(GRID_AXIS_ALIASES.get(name, name) for name in names)
    if not axes or axes[0] != "layer" or "layer" in axes[1:]:
        raise ValueError(f"the first axis is 'layer', and no other; got {tuple(names)}")
    if isinstance(setter, PatchSetter) and axes != setter.index_axes:
        raise ValueError(f"{setter.name} takes an index {setter.index_axes}, but the axes are {tuple(names)}")
    return axes


def _layer(index: Sequence[object]) -> int:
    if not index or isinstance(index[0], bool) or not hasattr(index[0], "__index__"):
        raise ValueError(f"the first column of index_df is the layer, an integer; a row is {list(index)}")
    return int(index[0].__index__())


def _rows(table: object) -> list[list[object]]:
    if not hasattr(table, "itertuples"):
        raise TypeError(f"index_df is a pandas DataFrame with one row per cell, got {type(table).__name__}")
    return [list(row) for row in table.itertuples(index=False, name=None)]
