"""Whether a cache on disk is one of a given model: by the sizes in the file, or by the shapes of its activations."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from hooked_lm.config import HookedTransformerConfig
from hooked_lm.hooks import HookPoint
from hooked_lm.names import SELECTED_AXES, layer_of

__all__ = ["differing_shapes", "differing_sizes", "sizes_of"]


def sizes_of(cfg: HookedTransformerConfig) -> dict[str, int | None]:
    """Return the sizes of a model that the shapes and names of its activations depend on.

    Args:
        cfg: of the model.
    """
    return {
        "n_layers": cfg.n_layers,
        "d_model": cfg.d_model,
        "n_heads": cfg.n_heads,
        "n_key_value_heads": cfg.n_kv_heads,
        "d_head": cfg.d_head,
        "d_mlp": None if cfg.attn_only else cfg.d_mlp,
        "d_vocab": cfg.d_vocab,
        "d_vocab_out": cfg.d_vocab_out,
        "num_experts": cfg.num_experts,
    }


def differing_sizes(saved: Mapping[str, object], cfg: HookedTransformerConfig) -> list[str]:
    """Return what differs between the sizes in a file and those of a model, in words.

    Args:
        saved: name -> size, as `sizes_of` gave them; a name that is absent, or not known here, is not compared.
        cfg: of the model.
    """
    ours = sizes_of(cfg)
    return [
        f"{name} is {saved[name]} in the file and {size} in the model"
        for name, size in ours.items()
        if name in saved and saved[name] != size
    ]


def differing_shapes(
    entries: Mapping[str, Tensor], points: Mapping[str, HookPoint], cfg: HookedTransformerConfig, has_batch_dim: bool
) -> list[str]:
    """Return which activations have shapes that a model's do not, in words.

    Names that the model lacks, and activations with other axes than the model's, are not compared.

    Args:
        entries: full hook name -> activation.
        points: the model's hook points, whose axes have names.
        cfg: of the model.
        has_batch_dim: whether the activations have their batch axis.
    """
    # Ungrouped keys and values have one entry for each query head.
    heads: set[int | None] = {cfg.n_kv_heads, cfg.n_heads}
    sizes: dict[str, set[int | None]] = {
        "d_model": {cfg.d_model},
        "head": {cfg.n_heads},
        "kv_head": heads,
        "d_head": {cfg.d_head, cfg.value_width},
        "d_latent_kv": {cfg.d_latent_kv},
        "d_latent_q": {cfg.d_latent_q},
        "vocab": {cfg.d_vocab_out},
        "expert": {cfg.num_experts},
    }
    if cfg.num_experts is None:
        sizes["d_mlp"] = {cfg.d_mlp}
    faults = []
    for name, tensor in entries.items():
        point = points.get(name.removesuffix("_grad"))
        if point is None or not point.axes:
            layer = layer_of(name)
            if layer is not None and layer >= cfg.n_layers and f"blocks.0.{name.split('.', 2)[2]}" in points:
                faults.append(f"{name!r} is of a layer that the model lacks: it has {cfg.n_layers}")
            continue
        axes = point.axes if has_batch_dim else point.axes[1:]
        if len(axes) == tensor.ndim + 1:  # one position was recorded
            axes = tuple(axis for axis in axes if axis not in SELECTED_AXES["pos"])
        if len(axes) != tensor.ndim:
            continue
        if any(size not in sizes.get(axis, {size}) for axis, size in zip(axes, tensor.shape, strict=True)):
            expected = " ".join(f"{axis}={'/'.join(map(str, sizes[axis]))}" if axis in sizes else axis for axis in axes)
            faults.append(f"{name!r} has shape {tuple(tensor.shape)}, and in the model [{expected}]")
    return faults
