"""The classic grids of activation patching: one function for each grid, and three that stack several.

Arguments, options and errors are those of `get_act_patch`, which patches any grid of `PATCHES` by name.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import TypeVar, Unpack, cast

import torch
from jaxtyping import Float
from torch import Tensor

from hooked_lm._support.extras import require_pandas
from hooked_lm.hooked_model import HookedModel
from hooked_lm.patching.patches import PATCHES, Patch, patch_cells, patch_sites
from hooked_lm.patching.sites import Clean, clean_activations, read_prompts
from hooked_lm.patching.tables import make_df_from_ranges
from hooked_lm.sweep import AnyMetric, sweep
from hooked_lm.sweep.options import SweepOptions, check_options
from hooked_lm.tokenization import Prompts

__all__ = [
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
]

_EVERY_BLOCK = ("resid_pre", "attn_out", "mlp_out")
_EVERY_HEAD = tuple(f"attn_head_{name}" for name in ("out", "q", "k", "v", "pattern"))

_Function = TypeVar("_Function", bound=Callable[..., Tensor])


def get_act_patch(
    name: str,
    model: HookedModel,
    corrupted_tokens: Prompts,
    clean_cache: Clean,
    patching_metric: AnyMetric,
    **options: Unpack[SweepOptions],
) -> Float[Tensor, "*axes"]:
    """Return the metric of every patched run of a grid, by the grid's name.

    Args:
        name: in `PATCHES`, `"resid_pre"`; those added by `register_patch_site` too.
        model: a `HookedTransformer`.
        corrupted_tokens: the prompts that are patched, as the model takes them.
        clean_cache: the clean prompts, or a cache of a run on them, position by position those of the corrupted
            prompts; as many prompts, or one for all.
        patching_metric: one of `hooked_lm.metrics`, or a function from logits [batch pos vocab] to a scalar.
        options: `attention_mask` [batch pos], 0 at padding; `per_prompt`, True to keep the prompts apart as a last
            axis; `memory_budget`, bytes that a sweep's activations may take, roughly; `verbose`.

    Raises:
        UnknownHookError: the model has no such activation, or the cache lacks it.
        ValueError: no grid has this name, clean prompts of another number or length, or a metric that is no number.
    """
    if name not in PATCHES:
        raise ValueError(f"unknown grid {name!r}: it is one of {', '.join(PATCHES)}")
    return _swept([PATCHES[name]], model, corrupted_tokens, clean_cache, patching_metric, **options)[0]


@torch.no_grad()
def _swept(
    patches: Sequence[Patch],
    model: HookedModel,
    corrupted_tokens: Prompts,
    clean_cache: Clean,
    patching_metric: AnyMetric,
    **options: Unpack[SweepOptions],
) -> list[Tensor]:
    """The results of several grids, whose cells share one sweep."""
    check_options(options)
    attention_mask = options.get("attention_mask")
    tokens, options["attention_mask"] = read_prompts(model, corrupted_tokens, attention_mask)
    sites = [site for patch in patches for site in patch_sites(model, patch)]
    clean = clean_activations(model, clean_cache, sites, tokens, options["attention_mask"], attention_mask)
    grids = [patch_cells(model, patch, clean) for patch in patches]
    scores = sweep(model, tokens, [cell for cells, _ in grids for cell in cells], patching_metric, **options)
    parts = torch.split(scores, [len(cells) for cells, _ in grids])
    return [part.reshape(*shape, *scores.shape[1:]) for part, (_, shape) in zip(parts, grids, strict=True)]


def _classic(function: _Function) -> _Function:
    """Add the arguments to a docstring, the same for all classic functions, and take the metric as `metric=` too."""
    if function.__doc__ is not None:  # None under `python -OO`
        function.__doc__ += """

    Args:
        model, corrupted_tokens, clean_cache, patching_metric: as for `get_act_patch`; `metric=` is a second name.
        options: `attention_mask`, `per_prompt`, `memory_budget` and `verbose`, as for `get_act_patch`; of a single grid
            `return_index_df=True`, which returns a pair of it and the data frame of its indices (needs pandas).
    """
    patch = PATCHES.get(function.__name__.removeprefix("get_act_patch_"))

    @functools.wraps(function)
    def by_either_name(*args: object, **kwargs: object) -> object:
        if "metric" in kwargs:
            if "patching_metric" in kwargs:
                raise TypeError(f"{function.__name__} got metric= and patching_metric=, two names of one thing")
            kwargs["patching_metric"] = kwargs.pop("metric")
        if patch is None or not kwargs.pop("return_index_df", False):
            return function(*args, **kwargs)
        require_pandas("a table of indices")
        grid = function(*args, **kwargs)
        return grid, make_df_from_ranges(grid.shape[: len(patch.axes)], patch.axes)

    return cast(_Function, by_either_name)


@_classic
def get_act_patch_resid_pre(
    model: HookedModel,
    corrupted_tokens: Prompts,
    clean_cache: Clean,
    patching_metric: AnyMetric,
    **options: Unpack[SweepOptions],
) -> Float[Tensor, "layer pos *prompt"]:
    """Return the metric where the residual stream at the start of a block is patched at a position, [layer pos]."""
    return get_act_patch("resid_pre", model, corrupted_tokens, clean_cache, patching_metric, **options)


@_classic
def get_act_patch_resid_mid(
    model: HookedModel,
    corrupted_tokens: Prompts,
    clean_cache: Clean,
    patching_metric: AnyMetric,
    **options: Unpack[SweepOptions],
) -> Float[Tensor, "layer pos *prompt"]:
    """Return the metric where the residual stream between attention and MLP is patched at a position, [layer pos]."""
    return get_act_patch("resid_mid", model, corrupted_tokens, clean_cache, patching_metric, **options)


@_classic
def get_act_patch_resid_post(
    model: HookedModel,
    corrupted_tokens: Prompts,
    clean_cache: Clean,
    patching_metric: AnyMetric,
    **options: Unpack[SweepOptions],
) -> Float[Tensor, "layer pos *prompt"]:
    """Return the metric where the residual stream at the end of a block is patched at a position, [layer pos]."""
    return get_act_patch("resid_post", model, corrupted_tokens, clean_cache, patching_metric, **options)


@_classic
def get_act_patch_attn_out(
    model: HookedModel,
    corrupted_tokens: Prompts,
    clean_cache: Clean,
    patching_metric: AnyMetric,
    **options: Unpack[SweepOptions],
) -> Float[Tensor, "layer pos *prompt"]:
    """Return the metric where the output of a layer's attention is patched at a position, [layer pos]."""
    return get_act_patch("attn_out", model, corrupted_tokens, clean_cache, patching_metric, **options)


@_classic
def get_act_patch_mlp_out(
    model: HookedModel,
    corrupted_tokens: Prompts,
    clean_cache: Clean,
    patching_metric: AnyMetric,
    **options: Unpack[SweepOptions],
) -> Float[Tensor, "layer pos *prompt"]:
    """Return the metric where the output of a layer's MLP is patched at a position, [layer pos]."""
    return get_act_patch("mlp_out", model, corrupted_tokens, clean_cache, patching_metric, **options)


@_classic
def get_act_patch_attn_head_out_by_pos(
    model: HookedModel,
    corrupted_tokens: Prompts,
    clean_cache: Clean,
    patching_metric: AnyMetric,
    **options: Unpack[SweepOptions],
) -> Float[Tensor, "layer pos head *prompt"]:
    """Return the metric where a head's output (z) is patched at a position, [layer pos head]."""
    return get_act_patch("attn_head_out_by_pos", model, corrupted_tokens, clean_cache, patching_metric, **options)


@_classic
def get_act_patch_attn_head_q_by_pos(
    model: HookedModel,
    corrupted_tokens: Prompts,
    clean_cache: Clean,
    patching_metric: AnyMetric,
    **options: Unpack[SweepOptions],
) -> Float[Tensor, "layer pos head *prompt"]:
    """Return the metric where a head's query is patched at a position, [layer pos head]."""
    return get_act_patch("attn_head_q_by_pos", model, corrupted_tokens, clean_cache, patching_metric, **options)


@_classic
def get_act_patch_attn_head_k_by_pos(
    model: HookedModel,
    corrupted_tokens: Prompts,
    clean_cache: Clean,
    patching_metric: AnyMetric,
    **options: Unpack[SweepOptions],
) -> Float[Tensor, "layer pos kv_head *prompt"]:
    """Return the metric where a key-value head's key is patched at a position, [layer pos kv_head]."""
    return get_act_patch("attn_head_k_by_pos", model, corrupted_tokens, clean_cache, patching_metric, **options)


@_classic
def get_act_patch_attn_head_v_by_pos(
    model: HookedModel,
    corrupted_tokens: Prompts,
    clean_cache: Clean,
    patching_metric: AnyMetric,
    **options: Unpack[SweepOptions],
) -> Float[Tensor, "layer pos kv_head *prompt"]:
    """Return the metric where a key-value head's value is patched at a position, [layer pos kv_head]."""
    return get_act_patch("attn_head_v_by_pos", model, corrupted_tokens, clean_cache, patching_metric, **options)


@_classic
def get_act_patch_attn_head_out_all_pos(
    model: HookedModel,
    corrupted_tokens: Prompts,
    clean_cache: Clean,
    patching_metric: AnyMetric,
    **options: Unpack[SweepOptions],
) -> Float[Tensor, "layer head *prompt"]:
    """Return the metric where a head's outputs (z) are patched at all positions, [layer head]."""
    return get_act_patch("attn_head_out_all_pos", model, corrupted_tokens, clean_cache, patching_metric, **options)


@_classic
def get_act_patch_attn_head_q_all_pos(
    model: HookedModel,
    corrupted_tokens: Prompts,
    clean_cache: Clean,
    patching_metric: AnyMetric,
    **options: Unpack[SweepOptions],
) -> Float[Tensor, "layer head *prompt"]:
    """Return the metric where a head's queries are patched at all positions, [layer head]."""
    return get_act_patch("attn_head_q_all_pos", model, corrupted_tokens, clean_cache, patching_metric, **options)


@_classic
def get_act_patch_attn_head_k_all_pos(
    model: HookedModel,
    corrupted_tokens: Prompts,
    clean_cache: Clean,
    patching_metric: AnyMetric,
    **options: Unpack[SweepOptions],
) -> Float[Tensor, "layer kv_head *prompt"]:
    """Return the metric where a key-value head's keys are patched at all positions, [layer kv_head]."""
    return get_act_patch("attn_head_k_all_pos", model, corrupted_tokens, clean_cache, patching_metric, **options)


@_classic
def get_act_patch_attn_head_v_all_pos(
    model: HookedModel,
    corrupted_tokens: Prompts,
    clean_cache: Clean,
    patching_metric: AnyMetric,
    **options: Unpack[SweepOptions],
) -> Float[Tensor, "layer kv_head *prompt"]:
    """Return the metric where a key-value head's values are patched at all positions, [layer kv_head]."""
    return get_act_patch("attn_head_v_all_pos", model, corrupted_tokens, clean_cache, patching_metric, **options)


@_classic
def get_act_patch_attn_head_pattern_all_pos(
    model: HookedModel,
    corrupted_tokens: Prompts,
    clean_cache: Clean,
    patching_metric: AnyMetric,
    **options: Unpack[SweepOptions],
) -> Float[Tensor, "layer head *prompt"]:
    """Return the metric where a head's whole attention pattern is patched, [layer head]."""
    return get_act_patch("attn_head_pattern_all_pos", model, corrupted_tokens, clean_cache, patching_metric, **options)


@_classic
def get_act_patch_attn_head_pattern_by_pos(
    model: HookedModel,
    corrupted_tokens: Prompts,
    clean_cache: Clean,
    patching_metric: AnyMetric,
    **options: Unpack[SweepOptions],
) -> Float[Tensor, "layer pos head *prompt"]:
    """Return the metric where a head's attention from a position is patched, [layer pos head]."""
    return get_act_patch("attn_head_pattern_by_pos", model, corrupted_tokens, clean_cache, patching_metric, **options)


@_classic
def get_act_patch_attn_head_pattern_dest_src_pos(
    model: HookedModel,
    corrupted_tokens: Prompts,
    clean_cache: Clean,
    patching_metric: AnyMetric,
    **options: Unpack[SweepOptions],
) -> Float[Tensor, "layer head dest_pos src_pos *prompt"]:
    """Return the metric where one entry of a head's pattern is patched, [layer head dest_pos src_pos]."""
    return get_act_patch(
        "attn_head_pattern_dest_src_pos", model, corrupted_tokens, clean_cache, patching_metric, **options
    )


@_classic
def get_act_patch_block_every(
    model: HookedModel,
    corrupted_tokens: Prompts,
    clean_cache: Clean,
    patching_metric: AnyMetric,
    **options: Unpack[SweepOptions],
) -> Float[Tensor, "patch_type layer pos *prompt"]:
    """Return the grids of `resid_pre`, `attn_out` and `mlp_out`, in this order, [patch_type layer pos]."""
    patches = [PATCHES[name] for name in _EVERY_BLOCK]
    return torch.stack(_swept(patches, model, corrupted_tokens, clean_cache, patching_metric, **options))


@_classic
def get_act_patch_attn_head_all_pos_every(
    model: HookedModel,
    corrupted_tokens: Prompts,
    clean_cache: Clean,
    patching_metric: AnyMetric,
    **options: Unpack[SweepOptions],
) -> Float[Tensor, "patch_type layer head *prompt"]:
    """Return the grids of head output, query, key, value and pattern, in this order, all positions at once.

    Where several heads share a key-value head, the columns of keys and values repeat its result for each of them.
    """
    patches = [PATCHES[f"{name}_all_pos"] for name in _EVERY_HEAD]
    grids = _swept(patches, model, corrupted_tokens, clean_cache, patching_metric, **options)
    return _per_query_head(grids, model.cfg.n_heads, axis=1)


@_classic
def get_act_patch_attn_head_by_pos_every(
    model: HookedModel,
    corrupted_tokens: Prompts,
    clean_cache: Clean,
    patching_metric: AnyMetric,
    **options: Unpack[SweepOptions],
) -> Float[Tensor, "patch_type layer pos head *prompt"]:
    """Return the grids of head output, query, key, value and pattern, in this order, position by position.

    Where several heads share a key-value head, the columns of keys and values repeat its result for each of them.
    """
    patches = [PATCHES[f"{name}_by_pos"] for name in _EVERY_HEAD]
    grids = _swept(patches, model, corrupted_tokens, clean_cache, patching_metric, **options)
    return _per_query_head(grids, model.cfg.n_heads, axis=2)


def _per_query_head(grids: Sequence[Tensor], n_heads: int, axis: int) -> Tensor:
    """The grids, stacked, with a column for every query head."""
    return torch.stack([grid.repeat_interleave(n_heads // grid.shape[axis], axis) for grid in grids])
