"""Activation patching: run one prompt, put in an activation of another, and see what becomes of the answer.

The classic module's names. Each function returns the metric of every patched run, one per cell of a grid; all cells of
a call are swept at once (`hooked_lm.sweep`), so a grid costs a few runs and not one per cell. A patch that one of the
setters below cannot say is a function of one's own, and is then run cell by cell.

The direction taken here is "denoising": the corrupted run is patched with what the clean one did
(Heimersheim and Nanda 2024, "How to use and interpret activation patching").
"""

from __future__ import annotations

import itertools
import operator
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from tqdm.auto import tqdm

from hooked_lm._support.extras import require_pandas
from hooked_lm.hooks import HookPoint
from hooked_lm.interventions import Intervention
from hooked_lm.metrics import one_number
from hooked_lm.names import UnknownHookError, describe_unknown, get_act_name
from hooked_lm.sweep import AnyMetric, sweep

Index = Sequence[Any]
# (activation of the corrupted run, index of the cell, activation of the clean run) -> the activation to go on with
SetterFunction = Callable[[Tensor, list[Any], Tensor], Tensor | None]

# An axis of a grid -> the axis of an activation that it goes along, and the Intervention's field that selects there.
_ALONG = {"pos": ("pos", "pos"), "head": ("head", "head"), "dest_pos": ("query", "pos"), "src_pos": ("key", "feature")}
_ALIASES = {"head_index": "head"}
_KNOWN_AXES = ("layer", *_ALONG, *_ALIASES)


@dataclass(frozen=True)
class PatchSetter:
    """A patch of part of an activation, by the cell's index: a function, as one would write it, and data for a sweep.

    Attributes:
        name: its name in this module.
        index_axes: what the numbers of an index mean; the first is the layer.
        activation_axes: the axes that an activation must have after `batch`.
    """

    name: str
    index_axes: tuple[str, ...]
    activation_axes: tuple[str, ...]

    def __call__(self, corrupted_activation: Tensor, index: Index, clean_activation: Tensor) -> Tensor:
        """Write the clean activation's part into the corrupted one, in place, and return that."""
        where = self._where(index)
        corrupted_activation[where] = clean_activation[where]
        return corrupted_activation

    def intervention(self, site: str, index: Index, clean_activation: Tensor) -> Intervention:
        """Return the same patch at a hook name, as data.

        Args:
            site: the hook name.
            index: of the cell: an entry for each of `index_axes`, the layer first.
            clean_activation: of which the index picks what is put in.
        """
        fields = {_ALONG[axis][1]: entry for axis, entry in self._entries(index).items()}
        return Intervention(site, "replace", clean_activation[self._where(index)], **fields)

    def check(self, site: str, axes: Sequence[str]) -> None:
        """Check that a site's activations have the axes that are indexed.

        Args:
            site: the hook name; for the message.
            axes: the axes there, the batch first.

        Raises:
            ValueError: they have others.
        """
        found = tuple("head" if axis == "kv_head" else axis for axis in axes[1 : 1 + len(self.activation_axes)])
        if found != self.activation_axes:
            raise ValueError(
                f"{self.name} patches activations [batch {' '.join(self.activation_axes)} ...], "
                f"but those at {site!r} are [{' '.join(axes)}]"
            )

    def _entries(self, index: Index) -> dict[str, int]:
        if len(index) != len(self.index_axes):
            raise ValueError(f"{self.name} takes an index ({', '.join(self.index_axes)}), got {list(index)}")
        try:
            entries = [operator.index(entry) for entry in index]
        except TypeError:
            raise ValueError(f"the index of {self.name} is made of integers, got {list(index)}") from None
        return dict(zip(self.index_axes[1:], entries[1:], strict=True))

    def _where(self, index: Index) -> tuple[Any, ...]:
        chosen = {_ALONG[axis][0]: entry for axis, entry in self._entries(index).items()}
        return (slice(None), *(chosen.get(axis, slice(None)) for axis in self.activation_axes))


layer_pos_patch_setter = PatchSetter("layer_pos_patch_setter", ("layer", "pos"), ("pos",))
layer_pos_head_vector_patch_setter = PatchSetter(
    "layer_pos_head_vector_patch_setter", ("layer", "pos", "head"), ("pos", "head")
)
layer_head_vector_patch_setter = PatchSetter("layer_head_vector_patch_setter", ("layer", "head"), ("pos", "head"))
layer_head_pattern_patch_setter = PatchSetter(
    "layer_head_pattern_patch_setter", ("layer", "head"), ("head", "query", "key")
)
layer_head_pos_pattern_patch_setter = PatchSetter(
    "layer_head_pos_pattern_patch_setter", ("layer", "head", "dest_pos"), ("head", "query", "key")
)
layer_head_dest_src_pos_pattern_patch_setter = PatchSetter(
    "layer_head_dest_src_pos_pattern_patch_setter", ("layer", "head", "dest_pos", "src_pos"), ("head", "query", "key")
)


@dataclass(frozen=True)
class Patch:
    """What a grid patches.

    Attributes:
        activation: short name of the activation.
        setter: which part of it each cell patches.
        axes: of the result.
    """

    activation: str
    setter: PatchSetter
    axes: tuple[str, ...]


_HEAD_VECTORS = {"out": "z", "q": "q", "k": "k", "v": "v"}

# By the name of the function less `get_act_patch_`.
PATCHES: dict[str, Patch] = {
    **{
        name: Patch(name, layer_pos_patch_setter, ("layer", "pos"))
        for name in ("resid_pre", "resid_mid", "resid_post", "attn_out", "mlp_out")
    },
    **{
        f"attn_head_{name}_by_pos": Patch(site, layer_pos_head_vector_patch_setter, ("layer", "pos", "head"))
        for name, site in _HEAD_VECTORS.items()
    },
    **{
        f"attn_head_{name}_all_pos": Patch(site, layer_head_vector_patch_setter, ("layer", "head"))
        for name, site in _HEAD_VECTORS.items()
    },
    "attn_head_pattern_all_pos": Patch("pattern", layer_head_pattern_patch_setter, ("layer", "head")),
    "attn_head_pattern_by_pos": Patch("pattern", layer_head_pos_pattern_patch_setter, ("layer", "pos", "head")),
    "attn_head_pattern_dest_src_pos": Patch(
        "pattern", layer_head_dest_src_pos_pattern_patch_setter, ("layer", "head", "dest_pos", "src_pos")
    ),
}
_EVERY_BLOCK = ("resid_pre", "attn_out", "mlp_out")
_EVERY_HEAD = tuple(f"attn_head_{name}" for name in ("out", "q", "k", "v", "pattern"))


# Any activation, any index


@torch.no_grad()
def generic_activation_patch(
    model: Any,
    corrupted_tokens: Int[Tensor, "batch pos"] | Any,
    clean_cache: Mapping[Any, Tensor],
    patching_metric: AnyMetric,
    patch_setter: PatchSetter | SetterFunction,
    activation_name: str,
    index_axis_names: Sequence[str] | None = None,
    index_df: Any = None,
    return_index_df: bool = False,
    *,
    attention_mask: Int[Tensor, "batch pos"] | None = None,
    memory_budget: int = 2**29,
    verbose: bool = True,
) -> Any:
    """Return the metric of every patched run: the corrupted one with part of an activation taken from the clean one.

    Args:
        model: a `HookedTransformer`.
        corrupted_tokens: the prompts that are patched, as the model takes them.
        clean_cache: activations of the clean run, position by position those of the corrupted prompts; of as many
            prompts, or of one for all.
        patching_metric: one of `hooked_lm.metrics`, or a function from logits [batch pos vocab] to a scalar.
        patch_setter: a setter of this module, whose cells are swept together; or a function (activation of the
            corrupted run, index, activation of the clean run) that returns what the run goes on with, or changes the
            first in place. It costs one run per cell.
        activation_name: short name of an activation of the blocks: `"resid_pre"`, `"z"`, `"pattern"`.
        index_axis_names: the axes of the grid, `"layer"` first, then any of `"pos"`, `"head"` (or `"head_index"`),
            `"dest_pos"` and `"src_pos"`. Keys and values have key-value heads, of which there may be fewer.
        index_df: instead of the axes, a pandas DataFrame with one row per cell, the layer in the first column.
        return_index_df: also return the DataFrame of all indices. Needs pandas.
        attention_mask: [batch pos], 0 at padding.
        memory_budget: bytes that a sweep's activations may take, roughly.
        verbose: show a progress bar.

    Returns:
        The metric [*axes], or [row] with `index_df`; with `return_index_df` a pair of it and the DataFrame.

    Raises:
        UnknownHookError: the model has no such activation, or the cache lacks it.
        ValueError: an unknown axis, axes that do not fit the setter, a cache of prompts of another size, an entry out
            of range, or a metric that is no number. What can be told before the run is told before it.
    """
    tokens, mask = model.tokens_and_mask(corrupted_tokens, attention_mask)
    if (index_axis_names is None) == (index_df is None):
        raise ValueError("generic_activation_patch takes index_axis_names or index_df: one of them")
    if index_df is not None:
        indices, shape = _rows(index_df), None
    else:
        axes = _checked_axes(index_axis_names or (), patch_setter)
        shape = grid_shape(model, activation_name, axes, tokens.shape[1])
        indices = [list(index) for index in itertools.product(*map(range, shape))]
    sites = [get_act_name(activation_name, int(index[0])) for index in indices]
    clean = clean_activations(model, clean_cache, sites, tokens)
    if isinstance(patch_setter, PatchSetter):
        for site in clean:
            patch_setter.check(site, _axes_at(model, site))
        pairs = zip(sites, indices, strict=True)
        cells = [patch_setter.intervention(site, index, clean[site]) for site, index in pairs]
        scores = sweep(
            model,
            tokens,
            cells,
            patching_metric,
            attention_mask=mask,
            memory_budget=memory_budget,
            verbose=verbose,
        )
    else:
        scores = _one_by_one(model, tokens, mask, clean, patching_metric, patch_setter, sites, indices, verbose)
    result = scores if shape is None else scores.reshape(shape)
    if not return_index_df:
        return result
    return result, index_df if index_df is not None else _data_frame(indices, index_axis_names or ())


def _one_by_one(
    model: Any,
    tokens: Tensor,
    mask: Tensor | None,
    clean: Mapping[str, Tensor],
    metric: AnyMetric,
    setter: SetterFunction,
    sites: Sequence[str],
    indices: Sequence[list[Any]],
    verbose: bool,
) -> Float[Tensor, " cell"]:
    """Run the model once per cell, with a setter that may do anything."""
    precise = torch.promote_types(model.W_E.dtype, torch.float32)
    scores = torch.zeros(len(indices), dtype=precise, device=model.W_E.device)
    for place, (site, index) in enumerate(zip(sites, tqdm(indices, disable=not verbose, leave=False), strict=True)):

        def patch(activation: Tensor, hook: HookPoint, site: str = site, index: list[Any] = index) -> Tensor | None:
            return setter(activation, index, clean[site])

        logits = model.run_with_hooks(tokens, fwd_hooks=[(site, patch)], attention_mask=mask)
        score = one_number(metric, logits)
        if bool(score.isnan()):
            raise ValueError(f"the metric is not a number where {site!r} is patched at {index}")
        scores[place] = score
    return scores


def _checked_axes(names: Sequence[str], setter: PatchSetter | SetterFunction) -> tuple[str, ...]:
    """The axes by their own names, in the order given."""
    if isinstance(names, str):
        raise ValueError(f"index_axis_names is a tuple of names, got {names!r}")
    for name in names:
        if name not in _KNOWN_AXES:
            raise ValueError(
                f"unknown axis {name!r}: axes are {', '.join(_KNOWN_AXES)}; other indices are given with index_df"
            )
    axes = tuple(_ALIASES.get(name, name) for name in names)
    if not axes or axes[0] != "layer" or "layer" in axes[1:]:
        raise ValueError(f"the first axis is 'layer', and no other; got {tuple(names)}")
    if isinstance(setter, PatchSetter) and axes != setter.index_axes:
        raise ValueError(f"{setter.name} takes an index {setter.index_axes}, but the axes are {tuple(names)}")
    return axes


def _rows(index_df: Any) -> list[list[Any]]:
    if not hasattr(index_df, "itertuples"):
        raise TypeError(f"index_df is a pandas DataFrame with one row per cell, got {type(index_df).__name__}")
    rows = [list(row) for row in index_df.itertuples(index=False, name=None)]
    for row in rows:
        if not row or isinstance(row[0], bool) or not hasattr(row[0], "__index__"):
            raise ValueError(f"the first column of index_df is the layer, an integer; a row is {row}")
    return rows


def _data_frame(indices: Sequence[Sequence[int]], names: Sequence[str]) -> Any:
    return require_pandas("a table of indices").DataFrame(indices, columns=list(names))


def make_df_from_ranges(column_max_ranges: Sequence[int], column_names: Sequence[str]) -> Any:
    """Return a data frame with a row for every cell of a grid, the last column counting fastest. Needs pandas.

    Args:
        column_max_ranges: how many entries each axis has.
        column_names: the axes.

    Raises:
        ValueError: the two are not equally many.
    """
    if len(column_max_ranges) != len(column_names):
        raise ValueError(f"{len(column_max_ranges)} ranges for {len(column_names)} columns")
    return _data_frame(list(itertools.product(*map(range, column_max_ranges))), column_names)


# What is shared by everything that patches


def grid_shape(model: Any, activation: str, axes: Sequence[str], n_positions: int) -> tuple[int, ...]:
    """Return how long each axis of a grid is.

    Args:
        model: the model.
        activation: short name of the activation; whether its heads are key-value heads depends on it.
        axes: names of axes.
        n_positions: of the prompts.

    Raises:
        UnknownHookError: the model has no such activation.
    """
    cfg = model.cfg
    if not cfg.n_layers:
        raise ValueError("a model without layers has nothing to patch")
    of_kv_heads = "kv_head" in _axes_at(model, get_act_name(activation, 0))
    sizes = {"layer": cfg.n_layers, "head": cfg.n_kv_heads if of_kv_heads else cfg.n_heads}
    return tuple(sizes.get(axis, n_positions) for axis in axes)


def patch_cells(
    model: Any, patch: Patch, clean: Mapping[str, Tensor], n_positions: int
) -> tuple[list[Intervention], tuple[int, ...]]:
    """Return the interventions of a grid, in the order of its axes, and its shape.

    Args:
        model: the model.
        patch: what is patched.
        clean: full hook name -> the activation [batch ...] that values are taken from.
        n_positions: of the prompts.
    """
    shape = grid_shape(model, patch.activation, patch.axes, n_positions)
    # A grid's axes may be in another order than the setter's index.
    own_names = ["pos" if axis == "dest_pos" and "pos" in patch.axes else axis for axis in patch.setter.index_axes]
    order = [patch.axes.index(name) for name in own_names]
    cells = []
    for place in itertools.product(*map(range, shape)):
        site = get_act_name(patch.activation, place[0])
        cells.append(patch.setter.intervention(site, [place[axis] for axis in order], clean[site]))
    return cells, shape


def patch_sites(model: Any, patch: Patch) -> list[str]:
    """Return the hook names that a grid patches, one in each layer.

    Args:
        model: the model.
        patch: what is patched.

    Raises:
        UnknownHookError: a layer has no such hook.
        ValueError: its activations have other axes than the patch.
    """
    sites = [get_act_name(patch.activation, layer) for layer in range(model.cfg.n_layers)]
    for site in sites:
        patch.setter.check(site, _axes_at(model, site))
    return sites


def clean_activations(
    model: Any, cache: Mapping[Any, Tensor], sites: Iterable[str], tokens: Int[Tensor, "batch pos"]
) -> dict[str, Tensor]:
    """Return the cached activations that are put into a run on `tokens`, by full hook name, with a batch axis.

    Args:
        model: the model that is run.
        cache: of the clean run.
        sites: full hook names.
        tokens: of the run that is patched.

    Raises:
        UnknownHookError: the model has no such site, or the cache lacks it.
        ValueError: they are of another number of prompts or positions.
        TypeError: the cache is no mapping.
    """
    if not isinstance(cache, Mapping):
        raise TypeError(f"the clean cache maps hook names to activations; got {type(cache).__name__}")
    found: dict[str, Tensor] = {}
    for site in dict.fromkeys(sites):
        axes = _axes_at(model, site)
        if site not in cache:
            raise UnknownHookError(f"the clean cache has no {site!r}: name it in names_filter when recording")
        activation = cache[site].detach()
        found[site] = activation[None] if activation.ndim == len(axes) - 1 else activation
        _check_size(site, axes, found[site], tokens)
    return found


def _check_size(site: str, axes: Sequence[str], activation: Tensor, tokens: Tensor) -> None:
    (batch, n_positions), shape = tokens.shape, tuple(activation.shape)
    if len(shape) != len(axes):
        raise ValueError(f"the clean cache's {site!r} has shape {shape}; it should be [{' '.join(axes)}]")
    for axis, size in zip(axes, shape, strict=True):
        if axis in ("pos", "query", "key") and size != n_positions:
            raise ValueError(
                f"clean prompts have {size} positions and corrupted ones {n_positions} ({site!r} in the clean cache): "
                "patching goes position by position, so make them equally long"
            )
        if axis == "batch" and size not in (1, batch):
            raise ValueError(
                f"the clean cache is of {size} prompts ({site!r}), and there are {batch} corrupted ones: "
                "give as many, or one for all"
            )


def _axes_at(model: Any, site: str) -> list[str]:
    if site not in model.hook_dict:
        raise UnknownHookError(describe_unknown(site, list(model.hook_dict)))
    return (model.hook_dict[site].axes or "").split()


@torch.no_grad()
def _patched(
    names: Sequence[str],
    model: Any,
    corrupted_tokens: Any,
    clean_cache: Mapping[Any, Tensor],
    patching_metric: AnyMetric,
    *,
    attention_mask: Tensor | None = None,
    memory_budget: int = 2**29,
    verbose: bool = True,
) -> list[Tensor]:
    """The results of several grids, all cells in one sweep."""
    tokens, mask = model.tokens_and_mask(corrupted_tokens, attention_mask)
    grids = []
    for patch in (PATCHES[name] for name in names):
        clean = clean_activations(model, clean_cache, patch_sites(model, patch), tokens)
        grids.append(patch_cells(model, patch, clean, tokens.shape[1]))
    scores = sweep(
        model,
        tokens,
        [cell for cells, _ in grids for cell in cells],
        patching_metric,
        attention_mask=mask,
        memory_budget=memory_budget,
        verbose=verbose,
    )
    parts = scores.split([len(cells) for cells, _ in grids])
    return [part.reshape(shape) for part, (_, shape) in zip(parts, grids, strict=True)]


# The classic grids. Arguments, errors and `options` (attention_mask, memory_budget, verbose) are those of
# `generic_activation_patch`.


def get_act_patch_resid_pre(
    model: Any, corrupted_tokens: Any, clean_cache: Mapping[Any, Tensor], patching_metric: AnyMetric, **options: Any
) -> Float[Tensor, "layer pos"]:
    """Return the metric where the residual stream that enters a block is patched at a position, [layer pos].

    Args:
        model, corrupted_tokens, clean_cache, patching_metric: as for `generic_activation_patch`.
        options: `attention_mask`, `memory_budget` and `verbose`, as for `generic_activation_patch`.
    """
    return _patched(["resid_pre"], model, corrupted_tokens, clean_cache, patching_metric, **options)[0]


def get_act_patch_resid_mid(
    model: Any, corrupted_tokens: Any, clean_cache: Mapping[Any, Tensor], patching_metric: AnyMetric, **options: Any
) -> Float[Tensor, "layer pos"]:
    """Return the metric where the residual stream between attention and MLP is patched at a position, [layer pos].

    Args:
        model, corrupted_tokens, clean_cache, patching_metric: as for `generic_activation_patch`.
        options: `attention_mask`, `memory_budget` and `verbose`, as for `generic_activation_patch`.
    """
    return _patched(["resid_mid"], model, corrupted_tokens, clean_cache, patching_metric, **options)[0]


def get_act_patch_resid_post(
    model: Any, corrupted_tokens: Any, clean_cache: Mapping[Any, Tensor], patching_metric: AnyMetric, **options: Any
) -> Float[Tensor, "layer pos"]:
    """Return the metric where the residual stream that leaves a block is patched at a position, [layer pos].

    Args:
        model, corrupted_tokens, clean_cache, patching_metric: as for `generic_activation_patch`.
        options: `attention_mask`, `memory_budget` and `verbose`, as for `generic_activation_patch`.
    """
    return _patched(["resid_post"], model, corrupted_tokens, clean_cache, patching_metric, **options)[0]


def get_act_patch_attn_out(
    model: Any, corrupted_tokens: Any, clean_cache: Mapping[Any, Tensor], patching_metric: AnyMetric, **options: Any
) -> Float[Tensor, "layer pos"]:
    """Return the metric where what a layer's attention writes is patched at a position, [layer pos].

    Args:
        model, corrupted_tokens, clean_cache, patching_metric: as for `generic_activation_patch`.
        options: `attention_mask`, `memory_budget` and `verbose`, as for `generic_activation_patch`.
    """
    return _patched(["attn_out"], model, corrupted_tokens, clean_cache, patching_metric, **options)[0]


def get_act_patch_mlp_out(
    model: Any, corrupted_tokens: Any, clean_cache: Mapping[Any, Tensor], patching_metric: AnyMetric, **options: Any
) -> Float[Tensor, "layer pos"]:
    """Return the metric where what an MLP writes is patched at a position, [layer pos].

    Args:
        model, corrupted_tokens, clean_cache, patching_metric: as for `generic_activation_patch`.
        options: `attention_mask`, `memory_budget` and `verbose`, as for `generic_activation_patch`.
    """
    return _patched(["mlp_out"], model, corrupted_tokens, clean_cache, patching_metric, **options)[0]


def get_act_patch_attn_head_out_by_pos(
    model: Any, corrupted_tokens: Any, clean_cache: Mapping[Any, Tensor], patching_metric: AnyMetric, **options: Any
) -> Float[Tensor, "layer pos head"]:
    """Return the metric where a head's output (z) is patched at a position, [layer pos head].

    Args:
        model, corrupted_tokens, clean_cache, patching_metric: as for `generic_activation_patch`.
        options: `attention_mask`, `memory_budget` and `verbose`, as for `generic_activation_patch`.
    """
    return _patched(["attn_head_out_by_pos"], model, corrupted_tokens, clean_cache, patching_metric, **options)[0]


def get_act_patch_attn_head_q_by_pos(
    model: Any, corrupted_tokens: Any, clean_cache: Mapping[Any, Tensor], patching_metric: AnyMetric, **options: Any
) -> Float[Tensor, "layer pos head"]:
    """Return the metric where a head's query is patched at a position, [layer pos head].

    Args:
        model, corrupted_tokens, clean_cache, patching_metric: as for `generic_activation_patch`.
        options: `attention_mask`, `memory_budget` and `verbose`, as for `generic_activation_patch`.
    """
    return _patched(["attn_head_q_by_pos"], model, corrupted_tokens, clean_cache, patching_metric, **options)[0]


def get_act_patch_attn_head_k_by_pos(
    model: Any, corrupted_tokens: Any, clean_cache: Mapping[Any, Tensor], patching_metric: AnyMetric, **options: Any
) -> Float[Tensor, "layer pos kv_head"]:
    """Return the metric where a head's key is patched at a position, [layer pos kv_head].

    There is one column per key-value head.

    Args:
        model, corrupted_tokens, clean_cache, patching_metric: as for `generic_activation_patch`.
        options: `attention_mask`, `memory_budget` and `verbose`, as for `generic_activation_patch`.
    """
    return _patched(["attn_head_k_by_pos"], model, corrupted_tokens, clean_cache, patching_metric, **options)[0]


def get_act_patch_attn_head_v_by_pos(
    model: Any, corrupted_tokens: Any, clean_cache: Mapping[Any, Tensor], patching_metric: AnyMetric, **options: Any
) -> Float[Tensor, "layer pos kv_head"]:
    """Return the metric where a head's value is patched at a position, [layer pos kv_head].

    There is one column per key-value head.

    Args:
        model, corrupted_tokens, clean_cache, patching_metric: as for `generic_activation_patch`.
        options: `attention_mask`, `memory_budget` and `verbose`, as for `generic_activation_patch`.
    """
    return _patched(["attn_head_v_by_pos"], model, corrupted_tokens, clean_cache, patching_metric, **options)[0]


def get_act_patch_attn_head_out_all_pos(
    model: Any, corrupted_tokens: Any, clean_cache: Mapping[Any, Tensor], patching_metric: AnyMetric, **options: Any
) -> Float[Tensor, "layer head"]:
    """Return the metric where a head's outputs (z) are patched at all positions, [layer head].

    Args:
        model, corrupted_tokens, clean_cache, patching_metric: as for `generic_activation_patch`.
        options: `attention_mask`, `memory_budget` and `verbose`, as for `generic_activation_patch`.
    """
    return _patched(["attn_head_out_all_pos"], model, corrupted_tokens, clean_cache, patching_metric, **options)[0]


def get_act_patch_attn_head_q_all_pos(
    model: Any, corrupted_tokens: Any, clean_cache: Mapping[Any, Tensor], patching_metric: AnyMetric, **options: Any
) -> Float[Tensor, "layer head"]:
    """Return the metric where a head's queries are patched at all positions, [layer head].

    Args:
        model, corrupted_tokens, clean_cache, patching_metric: as for `generic_activation_patch`.
        options: `attention_mask`, `memory_budget` and `verbose`, as for `generic_activation_patch`.
    """
    return _patched(["attn_head_q_all_pos"], model, corrupted_tokens, clean_cache, patching_metric, **options)[0]


def get_act_patch_attn_head_k_all_pos(
    model: Any, corrupted_tokens: Any, clean_cache: Mapping[Any, Tensor], patching_metric: AnyMetric, **options: Any
) -> Float[Tensor, "layer kv_head"]:
    """Return the metric where a head's keys are patched at all positions, [layer kv_head].

    There is one column per key-value head.

    Args:
        model, corrupted_tokens, clean_cache, patching_metric: as for `generic_activation_patch`.
        options: `attention_mask`, `memory_budget` and `verbose`, as for `generic_activation_patch`.
    """
    return _patched(["attn_head_k_all_pos"], model, corrupted_tokens, clean_cache, patching_metric, **options)[0]


def get_act_patch_attn_head_v_all_pos(
    model: Any, corrupted_tokens: Any, clean_cache: Mapping[Any, Tensor], patching_metric: AnyMetric, **options: Any
) -> Float[Tensor, "layer kv_head"]:
    """Return the metric where a head's values are patched at all positions, [layer kv_head].

    There is one column per key-value head.

    Args:
        model, corrupted_tokens, clean_cache, patching_metric: as for `generic_activation_patch`.
        options: `attention_mask`, `memory_budget` and `verbose`, as for `generic_activation_patch`.
    """
    return _patched(["attn_head_v_all_pos"], model, corrupted_tokens, clean_cache, patching_metric, **options)[0]


def get_act_patch_attn_head_pattern_all_pos(
    model: Any, corrupted_tokens: Any, clean_cache: Mapping[Any, Tensor], patching_metric: AnyMetric, **options: Any
) -> Float[Tensor, "layer head"]:
    """Return the metric where a head's whole attention pattern is patched, [layer head].

    Args:
        model, corrupted_tokens, clean_cache, patching_metric: as for `generic_activation_patch`.
        options: `attention_mask`, `memory_budget` and `verbose`, as for `generic_activation_patch`.
    """
    return _patched(["attn_head_pattern_all_pos"], model, corrupted_tokens, clean_cache, patching_metric, **options)[0]


def get_act_patch_attn_head_pattern_by_pos(
    model: Any, corrupted_tokens: Any, clean_cache: Mapping[Any, Tensor], patching_metric: AnyMetric, **options: Any
) -> Float[Tensor, "layer pos head"]:
    """Return the metric where a head's attention from a position is patched, [layer pos head].

    Args:
        model, corrupted_tokens, clean_cache, patching_metric: as for `generic_activation_patch`.
        options: `attention_mask`, `memory_budget` and `verbose`, as for `generic_activation_patch`.
    """
    return _patched(["attn_head_pattern_by_pos"], model, corrupted_tokens, clean_cache, patching_metric, **options)[0]


def get_act_patch_attn_head_pattern_dest_src_pos(
    model: Any, corrupted_tokens: Any, clean_cache: Mapping[Any, Tensor], patching_metric: AnyMetric, **options: Any
) -> Float[Tensor, "layer head dest_pos src_pos"]:
    """Return the metric where one entry of a head's pattern is patched, [layer head dest_pos src_pos].

    Args:
        model, corrupted_tokens, clean_cache, patching_metric: as for `generic_activation_patch`.
        options: `attention_mask`, `memory_budget` and `verbose`, as for `generic_activation_patch`.
    """
    return _patched(
        ["attn_head_pattern_dest_src_pos"], model, corrupted_tokens, clean_cache, patching_metric, **options
    )[0]


def get_act_patch_block_every(
    model: Any, corrupted_tokens: Any, clean_cache: Mapping[Any, Tensor], patching_metric: AnyMetric, **options: Any
) -> Float[Tensor, "patch_type layer pos"]:
    """Return the grids of `resid_pre`, `attn_out` and `mlp_out`, in this order.

    Args:
        model, corrupted_tokens, clean_cache, patching_metric: as for `generic_activation_patch`.
        options: `attention_mask`, `memory_budget` and `verbose`, as for `generic_activation_patch`.
    """
    return torch.stack(_patched(_EVERY_BLOCK, model, corrupted_tokens, clean_cache, patching_metric, **options))


def get_act_patch_attn_head_all_pos_every(
    model: Any, corrupted_tokens: Any, clean_cache: Mapping[Any, Tensor], patching_metric: AnyMetric, **options: Any
) -> Float[Tensor, "patch_type layer head"]:
    """Return the grids of head output, query, key, value and pattern, in this order, all positions at once.

    Where several heads share a key-value head, the columns of keys and values repeat its result for each of them.

    Args:
        model, corrupted_tokens, clean_cache, patching_metric: as for `generic_activation_patch`.
        options: `attention_mask`, `memory_budget` and `verbose`, as for `generic_activation_patch`.
    """
    names = [f"{name}_all_pos" for name in _EVERY_HEAD]
    return _per_head(_patched(names, model, corrupted_tokens, clean_cache, patching_metric, **options), model)


def get_act_patch_attn_head_by_pos_every(
    model: Any, corrupted_tokens: Any, clean_cache: Mapping[Any, Tensor], patching_metric: AnyMetric, **options: Any
) -> Float[Tensor, "patch_type layer pos head"]:
    """Return the grids of head output, query, key, value and pattern, in this order, position by position.

    Where several heads share a key-value head, the columns of keys and values repeat its result for each of them.

    Args:
        model, corrupted_tokens, clean_cache, patching_metric: as for `generic_activation_patch`.
        options: `attention_mask`, `memory_budget` and `verbose`, as for `generic_activation_patch`.
    """
    names = [f"{name}_by_pos" for name in _EVERY_HEAD]
    return _per_head(_patched(names, model, corrupted_tokens, clean_cache, patching_metric, **options), model)


def _per_head(grids: Sequence[Tensor], model: Any) -> Tensor:
    n_heads = model.cfg.n_heads
    return torch.stack([grid.repeat_interleave(n_heads // grid.shape[-1], -1) for grid in grids])
