"""The grids that can be patched, by name, and a function that adds others.

A `Patch` holds the activation that a grid patches and the names of the grid's axes. The classic functions,
`patch_pairs`, attribution patching and its audit all make their interventions from it.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor

from hooked_lm.hooked_model import HookedModel
from hooked_lm.interventions import Intervention
from hooked_lm.names import get_act_name, grid_axis
from hooked_lm.patching import setters
from hooked_lm.patching.setters import PatchSetter
from hooked_lm.patching.sites import axes_at, axis_index

__all__ = [
    "GRIDS",
    "PATCHES",
    "Patch",
    "patch_cell",
    "patch_cells",
    "patch_shape",
    "patch_sites",
    "register_patch_site",
]


@dataclass(frozen=True)
class Patch:
    """The activation that a grid patches, and the grid's axes.

    Attributes:
        activation: short name of the activation, `"z"`, one in each layer; or a full hook name with `{layer}` in it,
            `"blocks.{layer}.mlp.hook_post"`.
        axes: names of the grid's axes, the layer first. Along the activation's other axes all entries are patched.
        setter: the classic setter that does the same, if there is one.
    """

    activation: str
    axes: tuple[str, ...]
    setter: PatchSetter | None = None

    def site(self, layer: int) -> str:
        """Return the full hook name in a layer.

        Args:
            layer: the block.
        """
        if "{layer}" in self.activation:
            return self.activation.replace("{layer}", str(layer))
        return get_act_name(self.activation, layer)


_HEAD_VECTORS = {"out": "z", "q": "q", "k": "k", "v": "v"}
_STREAM = ("resid_pre", "resid_mid", "resid_post", "attn_out", "mlp_out")

# The grids of exact patching, by the name of the function less `get_act_patch_`.
PATCHES: dict[str, Patch] = {
    **{name: Patch(name, ("layer", "pos"), setters.layer_pos_patch_setter) for name in _STREAM},
    **{
        f"attn_head_{name}_by_pos": Patch(site, ("layer", "pos", "head"), setters.layer_pos_head_vector_patch_setter)
        for name, site in _HEAD_VECTORS.items()
    },
    **{
        f"attn_head_{name}_all_pos": Patch(site, ("layer", "head"), setters.layer_head_vector_patch_setter)
        for name, site in _HEAD_VECTORS.items()
    },
    "attn_head_pattern_all_pos": Patch("pattern", ("layer", "head"), setters.layer_head_pattern_patch_setter),
    "attn_head_pattern_by_pos": Patch("pattern", ("layer", "pos", "head"), setters.layer_head_pos_pattern_patch_setter),
    "attn_head_pattern_dest_src_pos": Patch(
        "pattern", ("layer", "head", "dest_pos", "src_pos"), setters.layer_head_dest_src_pos_pattern_patch_setter
    ),
}

# The grids of attribution patching: `"resid_pre"` is an estimate of `get_act_patch_resid_pre`.
GRIDS: dict[str, Patch] = {
    **{name: patch for name, patch in PATCHES.items() if name != "attn_head_pattern_dest_src_pos"},
    "mlp_in": Patch("mlp_in", ("layer", "pos")),
    "neuron_all_pos": Patch("post", ("layer", "d_mlp")),
    "neuron_by_pos": Patch("post", ("layer", "pos", "d_mlp")),
}


def register_patch_site(name: str, activation: str, axes: Sequence[str]) -> Patch:
    """Add a grid to `PATCHES` and `GRIDS`, and return it.

    `get_act_patch(name, ...)`, `patch_pairs(..., name)` and `attribution_patch(..., [name])` then patch it.

    Args:
        name: of the new grid; not one in use.
        activation: short name of an activation, `"expert_weights"`, or a full hook name with `{layer}` in it,
            `"blocks.{layer}.hook_mlp_out.hook_sae_acts_post"`.
        axes: names of its axes: `"layer"` first, then any of `"pos"`, `"head"`, `"dest_pos"`, `"src_pos"`, or the name
            of the activation's last axis, `"d_mlp"` or `"d_sae"`.

    Raises:
        ValueError: the name is in use, or these are no axes of a grid.
    """
    if not isinstance(name, str) or not name or name in PATCHES or name in GRIDS:
        raise ValueError(f"a grid named {name!r} cannot be added: names in use are {', '.join({**PATCHES, **GRIDS})}")
    if not isinstance(activation, str) or not activation:
        raise ValueError(
            f"activation is the short name of one, or a hook name with {{layer}} in it; got {activation!r}"
        )
    if isinstance(axes, str) or not axes or axes[0] != "layer" or "layer" in axes[1:]:
        raise ValueError(f"axes are a tuple of names, 'layer' first and only there; got {axes!r}")
    fields = [grid_axis(axis).field for axis in axes[1:]]
    if len(set(fields)) < len(fields):
        raise ValueError(f"two of the axes {tuple(axes)} go along one axis of the activation")
    patch = Patch(activation, tuple(axes))
    PATCHES[name] = GRIDS[name] = patch
    return patch


def patch_sites(model: HookedModel, patch: Patch) -> list[str]:
    """Return the hook names that a grid patches, one in each layer.

    Args:
        model: the model.
        patch: the grid.

    Raises:
        UnknownHookError: a layer has no such hook.
        ValueError: its activations lack an axis of the grid, or the model has no layers.
    """
    sites = [patch.site(layer) for layer in range(model.cfg.n_layers)]
    if not sites:
        raise ValueError("a model without layers has nothing to patch")
    for site in sites:
        axes = axes_at(model, site)
        for name in patch.axes[1:]:
            axis_index(site, axes, name)
    return sites


def patch_shape(model: HookedModel, patch: Patch, clean: Mapping[str, Tensor]) -> tuple[int, ...]:
    """Return the length of each axis of a grid.

    Args:
        model: the model.
        patch: the grid.
        clean: full hook name -> the activation [batch ...] in every layer.

    Raises:
        ValueError: the layers' activations differ in size.
    """
    sizes = set()
    for layer in range(model.cfg.n_layers):
        site = patch.site(layer)
        axes = axes_at(model, site)
        sizes.add(tuple(clean[site].shape[axis_index(site, axes, name)] for name in patch.axes[1:]))
    if len(sizes) != 1:
        raise ValueError(f"the layers' {patch.activation!r} differ in size, {sorted(sizes)}: no grid holds them all")
    return (model.cfg.n_layers, *sizes.pop())


def patch_cell(model: HookedModel, patch: Patch, cell: Sequence[int], clean: Mapping[str, Tensor]) -> Intervention:
    """Return the intervention of one cell of a grid.

    Args:
        model: the model.
        patch: the grid.
        cell: its place in the grid.
        clean: full hook name -> the activation [batch ...] that values are taken from.
    """
    site = patch.site(cell[0])
    axes = axes_at(model, site)
    where: list[int | slice] = [slice(None)] * len(axes)
    for name, entry in zip(patch.axes[1:], cell[1:], strict=True):
        where[axis_index(site, axes, name)] = entry
    fields = {grid_axis(name).field: entry for name, entry in zip(patch.axes[1:], cell[1:], strict=True)}
    return Intervention(site, "replace", clean[site][tuple(where)], **fields)


def patch_cells(
    model: HookedModel, patch: Patch, clean: Mapping[str, Tensor]
) -> tuple[list[Intervention], tuple[int, ...]]:
    """Return the interventions of a grid, in the order of its axes, and its shape.

    Args:
        model: the model.
        patch: the grid.
        clean: full hook name -> the activation [batch ...] that values are taken from.
    """
    shape = patch_shape(model, patch, clean)
    return [patch_cell(model, patch, cell, clean) for cell in itertools.product(*map(range, shape))], shape
