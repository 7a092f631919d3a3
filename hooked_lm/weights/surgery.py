"""select_layers: the config and weights of a model with other layers, dropped, reordered or repeated."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping, Sequence

import torch
from torch import nn

from hooked_lm._support.integers import entries_of, integer
from hooked_lm._support.torch_internals import has_any_module_hooks
from hooked_lm.components.stock import not_stock
from hooked_lm.config import HookedTransformerConfig
from hooked_lm.hooks import HookPoint
from hooked_lm.weights.processing import Processed, Weights

__all__ = ["PER_LAYER", "check_nothing_lost", "chosen_layers", "place_copies", "select_layers", "sources"]

# The fields of a config that hold an entry for each layer.
PER_LAYER = ("attn_types", "rotary_layers", "moe_layers")
# What a model has besides weights and config, which the new model gets in its own way.
_GIVEN_OTHERWISE = ("training", "processed", "origin", "spread_over")

_IN_BLOCK = re.compile(r"blocks\.(\d+)\.(.+)")


def select_layers(cfg: HookedTransformerConfig, weights: Weights, layers: Sequence[int]) -> Processed:
    """Return the config and weights of a model whose blocks are these, in this order.

    Whatever the config says of a layer goes with its block: a window, a rotation, experts. With
    `scale_attn_by_inverse_layer_idx` the scores of block `i` are divided by `i + 1`; a block that moves from `l` to `i`
    keeps its own divisor, `l + 1`, because its `W_Q` and `b_Q` are multiplied by `(i + 1) / (l + 1)`.

    Args:
        cfg: the config that the weights are of.
        weights: tensors by their names. They are left as they are; the result holds the same tensors, a repeated
            layer's several times, but for those that are multiplied.
        layers: indices of layers; negative ones count from the end. An index may come several times, or not at all.

    Raises:
        TypeError: `layers` is not a sequence of integers.
        ValueError: a layer out of range, or blocks that do not stay the same elsewhere: one of a pair
            (`shortcut_experts`) without the other, the first of a model in which it has no norm (`first_norm`), or one
            whose `W_Q` does not scale its scores.
    """
    chosen = chosen_layers(cfg, layers)
    _check_places(cfg, chosen)
    changes = {name: [getattr(cfg, name)[layer] for layer in chosen] for name in PER_LAYER if getattr(cfg, name)}
    selected = {name: weights[source] for name, source in sources(weights, chosen).items()}
    if cfg.scale_attn_by_inverse_layer_idx:
        for place, layer in enumerate(chosen):
            for name in (f"blocks.{place}.attn.W_Q", f"blocks.{place}.attn.b_Q"):
                if place != layer and name in selected:
                    selected[name] = selected[name] * ((place + 1) / (layer + 1))
    return cfg.replace(n_layers=len(chosen), **changes), selected


def chosen_layers(cfg: HookedTransformerConfig, layers: Sequence[int]) -> list[int]:
    """Return indices of layers, counted from 0.

    Args:
        cfg: the config that they are of.
        layers: as for `select_layers`.

    Raises:
        TypeError: `layers` is not a sequence of integers.
        ValueError: a layer out of range.
    """
    entries = entries_of(layers)
    if entries is None:
        raise TypeError(f"layers is a sequence of indices of layers, such as [0, 2, 1]; got {layers!r}")
    chosen = [integer(entry, "a layer") for entry in entries]
    for layer in chosen:
        if not -cfg.n_layers <= layer < cfg.n_layers:
            raise ValueError(f"there is no layer {layer}: this model has layers 0-{cfg.n_layers - 1}")
    return [layer % cfg.n_layers for layer in chosen]


def _check_places(cfg: HookedTransformerConfig, chosen: Sequence[int]) -> None:
    """Check that each block computes in its new place what it computed in its old one."""
    if not cfg.first_norm and any((place == 0) != (layer == 0) for place, layer in enumerate(chosen)):
        raise ValueError(
            f"the first block of this model has no norm before attention (first_norm=False), and every other has one: "
            f"layer 0 comes first, and once; got {list(chosen)}"
        )
    if cfg.shortcut_experts:
        pairs = zip(chosen[::2], chosen[1::2], strict=False)
        if len(chosen) % 2 or any(first % 2 or second != first + 1 for first, second in pairs):
            raise ValueError(
                "blocks 0 and 1, 2 and 3, ... run in pairs, since the output of experts goes from one to the other "
                f"beside the stream (shortcut_experts): keep pairs together, such as [2, 3, 0, 1]; got {list(chosen)}"
            )
    moved = [(place, layer) for place, layer in enumerate(chosen) if place != layer]
    unscaled = cfg.use_qk_norm or cfg.clip_qkv is not None or cfg.d_latent_kv is not None
    if cfg.scale_attn_by_inverse_layer_idx and unscaled and moved:
        raise ValueError(
            f"scores in block {moved[0][1]} are divided by {moved[0][1] + 1} (scale_attn_by_inverse_layer_idx), and "
            f"would be by {moved[0][0] + 1} in its new place; with use_qk_norm, clip_qkv or latent attention no change "
            "of W_Q makes up for that"
        )


def sources(names: Iterable[str], chosen: Sequence[int]) -> dict[str, str]:
    """Return the name of each weight in a model with these layers -> its name in the model that it comes from.

    Args:
        names: of the weights of the model that they come from.
        chosen: indices of layers, counted from 0.
    """
    found: dict[str, str] = {}
    of_layer: dict[int, list[str]] = {layer: [] for layer in chosen}
    for name in names:
        in_block = _IN_BLOCK.fullmatch(name)
        if in_block is None:
            found[name] = name
        elif int(in_block[1]) in of_layer:
            of_layer[int(in_block[1])].append(in_block[2])
    for place, layer in enumerate(chosen):
        found |= {f"blocks.{place}.{name}": f"blocks.{layer}.{name}" for name in of_layer[layer]}
    return found


# Models


def check_nothing_lost(model: nn.Module, built: nn.Module) -> None:
    """Check that a model consists of its config and weights, and that another one, built from these, has all it has.

    Args:
        model: a `HookedTransformer`.
        built: a model of the same class, built from a config.

    Raises:
        ValueError: hooks, components of one's own or attributes of one's own, which the other would lack.
    """
    hooked = [name for name, one in model.named_modules() if isinstance(one, HookPoint) and one.has_hooks()]
    if hooked:
        more = f" and at {len(hooked) - 1} other hook points" if len(hooked) > 1 else ""
        raise ValueError(
            f"hooks are attached at {hooked[0]}{more}, and the new model would lack them: remove them first "
            "(reset_hooks(including_permanent=True)), and add them to the new model"
        )
    for name, child in model.named_children():
        # The list of blocks has no config, to which not_stock compares those of its modules.
        parts = child.named_children() if name == "blocks" else [("", child)]
        reasons = [not_stock(part, name=".".join(filter(None, (name, inner)))) for inner, part in parts]
        own = [reason for reason in (not_stock(child, name=name, alone=True), *reasons) if reason is not None]
        if own:
            raise ValueError(f"a model with other layers is built from config and weights, and {own[0]}")
    theirs = vars(built)
    lost = [name for name, value in vars(model).items() if _is_lost(name, value, theirs)]
    if has_any_module_hooks(model):
        lost.append("hooks of torch's")
    if lost:
        raise ValueError(
            f"a model with other layers is built from config and weights, and this one has {', '.join(lost)} besides"
        )


def _is_lost(name: str, value: object, built: Mapping[str, object]) -> bool:
    """Whether an attribute of a model differs from that of a model that was built anew."""
    if name in _GIVEN_OTHERWISE or (name.startswith("_") and name in built):
        return False
    plain = isinstance(value, (bool, int, float, str))
    return name not in built or (plain and value != built[name])


@torch.no_grad()
def place_copies(model: nn.Module, weights: Weights, trained: Collection[str]) -> None:
    """Make copies of weights the parameters of a model that was built on the meta device.

    Args:
        model: a `HookedTransformer`.
        weights: tensors by their names. A copy has a tensor's device, precision and order in memory.
        trained: the names of the parameters that have `requires_grad`.

    Raises:
        ValueError: a tensor is missing, is none of the model's, or has another shape.
    """
    places = dict(model.named_parameters())
    wrong = {name for name, old in places.items() if name not in weights or weights[name].shape != old.shape}
    wrong |= weights.keys() - places.keys()
    if wrong:
        raise ValueError(f"the weights are not those that the config implies: {', '.join(sorted(wrong))} differ")
    for name in places:
        path, _, attribute = name.rpartition(".")
        copied = nn.Parameter(weights[name].detach().clone(), requires_grad=name in trained)
        setattr(model.get_submodule(path), attribute, copied)
