"""select_layers: the config and weights of a model with other layers, dropped, reordered or repeated."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping, Sequence

import torch
from torch import nn

from hooked_lm._support.integers import entries_of, integer
from hooked_lm._support.torch_internals import has_any_module_hooks, has_gradient_hooks
from hooked_lm.components import Attention, Norm
from hooked_lm.components.stock import not_stock
from hooked_lm.config import HookedTransformerConfig
from hooked_lm.hooks import HookPoint
from hooked_lm.weights.processing import Processed, Weights

__all__ = ["PER_LAYER", "check_nothing_lost", "chosen_layers", "place_copies", "select_layers", "sources"]

# The fields of a config that hold an entry for each layer.
PER_LAYER = ("attn_types", "rotary_layers", "moe_layers")
# What a model has besides weights and config, which the new model gets in its own way.
_GIVEN_OTHERWISE = ("training", "processed", "origin", "spread_over")
# The attributes of components that depend on where in the model they are.
_BY_PLACE = ("training", "name", "layer_id")

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


def check_nothing_lost(model: nn.Module, built: nn.Module, chosen: Sequence[int]) -> None:
    """Check that a model is its config and weights, so that one built from these computes and has all that it does.

    Args:
        model: a `HookedTransformer`.
        built: a model of the same class, built from the config with the chosen layers.
        chosen: indices of layers, counted from 0.

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
    lost = _lost_of_model(model, built)
    pairs = [(name, name) for name, _ in model.named_children() if name != "blocks"]
    pairs += [(f"blocks.{layer}", f"blocks.{place}") for place, layer in enumerate(chosen)]
    there = {name for name, _ in built.named_modules()}
    for name, counterpart in pairs:
        old = model.get_submodule(name)
        reason = not_stock(old, name=name)
        lost += [reason] if reason is not None else []
        if counterpart not in there:
            lost.append(f"{name} is no part of a new model")
        elif reason is None:
            lost += _differences(name, old, built.get_submodule(counterpart))
    if lost:
        raise ValueError(
            f"a model with other layers is built from config and weights, and would lack what else this one has: "
            f"{lost[0]}{f'; and {len(lost) - 1} more' if len(lost) > 1 else ''}"
        )


def _lost_of_model(model: nn.Module, built: nn.Module) -> list[str]:
    """Attributes of a model that a newly built model lacks."""
    own = {name: value for name, value in vars(model).items() if name not in _GIVEN_OTHERWISE}
    lost = [f"the attribute {name}" for name, value in own.items() if _changed(name, value, vars(built))]
    if has_any_module_hooks(model):
        lost.append("hooks of torch's")
    if "blocks" in dict(model.named_children()):
        reason = not_stock(model.get_submodule("blocks"), name="blocks", alone=True)
        lost += [reason] if reason is not None else []
    hooked = [name for name, one in model.named_parameters() if has_gradient_hooks(one)]
    return lost + [f"hooks on the gradient of {name}" for name in hooked]


def _differences(name: str, old: nn.Module, new: nn.Module) -> list[str]:
    """How a component differs from its counterpart in a model built anew, as clauses; weights apart."""
    counterparts, found = dict(new.named_modules()), list[str]()
    for path, module in old.named_modules():
        place = f"{name}.{path}" if path else name
        other = counterparts.get(path)
        same_kind = type(other) is type(module) or (isinstance(other, Norm) and isinstance(module, Norm))
        if other is None or not same_kind:
            found.append(f"{place} is a {type(module).__name__}, which the config does not ask for")
            continue
        own = {key: value for key, value in vars(module).items() if key not in _BY_PLACE}
        if isinstance(module, Attention) and own["scale"] == module.cfg.score_scale(module.layer_id):
            # Where scores are divided by the number of the layer, the new place has another divisor.
            del own["scale"]
        found += [f"{place}.{key} is {value!r}" for key, value in own.items() if _changed(key, value, vars(other))]
    return found


def _changed(name: str, value: object, built: Mapping[str, object]) -> bool:
    """Whether an attribute differs from that of a module that was built anew. Only plain values are compared."""
    if name not in built:
        return True
    plain = isinstance(value, (bool, int, float, str)) or value is None
    return plain and not name.startswith("_") and value != built[name]


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
