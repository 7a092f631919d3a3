"""not_stock: tell whether a model's components are unmodified, so that their stages can be run one by one.

Sweeps and path patching run parts of a block, and rely on what the stock components do between their hook points. A
subclass may do something else; so may a replaced module, a method set on an instance, a parametrisation or a hook of
torch's. They call `not_stock` first and run the whole model if it returns a reason.

A subclass that overrides methods but keeps the stages (each hook point has the same activation as in the stock
component, computed from the same inputs, position by position outside attention) sets `keeps_stages = True`. So does a
function that replaces a method on a class or an instance, for example to count its calls.
"""

from __future__ import annotations

import inspect
from collections.abc import Hashable
from functools import lru_cache
from typing import cast

from torch import nn
from torch.nn.utils import parametrize

from hooked_lm._support.torch_internals import has_global_module_hooks, has_module_hooks
from hooked_lm.components.activations import XIELU, is_registered_activation
from hooked_lm.components.attention import Attention
from hooked_lm.components.block import TransformerBlock
from hooked_lm.components.embed import Embed, Unembed, UnembedTransform
from hooked_lm.components.latent_attention import LatentAttention
from hooked_lm.components.mlp import MLP, GatedMLP
from hooked_lm.components.moe import MoE
from hooked_lm.components.norm import LayerNorm, LayerNormPre, NoNorm, Norm, RMSNorm, RMSNormPre
from hooked_lm.components.positions import PosEmbed
from hooked_lm.components.shortcut import ShortcutBlock
from hooked_lm.hooks import HookPoint

__all__ = ["not_stock", "register_stock", "require_stock", "stages_obstacle"]

# What a class may define without changing what its modules compute.
_HARMLESS = frozenset(
    {"__init__", "__module__", "__doc__", "__dict__", "__weakref__", "__annotations__", "__qualname__", "__repr__"}
    | {"__parameters__", "__static_attributes__", "__firstlineno__", "__orig_bases__", "extra_repr", "_get_name"}
)
# Stock classes, with everything they define or inherit, as it was when this package was imported.
_STOCK: dict[type, dict[str, object]] = {}


def register_stock(*kinds: type) -> None:
    """Take classes as they are now for stock ones.

    Args:
        kinds: the classes.
    """
    for kind in kinds:
        found: dict[str, object] = {"__getattribute__": object.__getattribute__}
        for base in reversed(kind.__mro__[:-1]):
            found |= {name: value for name, value in vars(base).items() if name not in _HARMLESS}
        _STOCK[kind] = found


_MLPS = (MLP, GatedMLP, MoE)
register_stock(
    TransformerBlock,
    ShortcutBlock,
    Attention,
    LatentAttention,
    *_MLPS,
    Norm,
    LayerNorm,
    LayerNormPre,
    RMSNorm,
    RMSNormPre,
    NoNorm,
)
register_stock(Embed, Unembed, UnembedTransform, PosEmbed, XIELU, HookPoint, nn.ModuleList)


def not_stock(root: nn.Module, *, name: str = "", alone: bool = False) -> str | None:
    """Return what in a module tree is not stock, as a clause such as `"ln_final is a Louder, which overrides forward"`.

    Args:
        root: a model, a block or any other component.
        name: of `root` in its model, `"blocks.0.attn"`; empty for a model.
        alone: look at `root` itself and not at the modules inside it.

    Returns:
        The clause, or None if everything is stock.
    """
    if has_global_module_hooks():
        return "torch's global module hooks may do anything"
    cfg = getattr(root, "cfg", None)
    named = bool(name) or hasattr(root, "hook_dict")
    if not isinstance(getattr(root, "blocks", None), nn.ModuleList | None):
        return "model.blocks is no nn.ModuleList, so torch does not know the blocks"
    classes: dict[type, str | None] = {}
    seen: set[nn.Module] = set()
    for path, module in (("", root),) if alone else root.named_modules(remove_duplicate=False):
        place = ".".join(part for part in (name, path) if part)
        reason = _own_override(module, classes)
        if reason is None and isinstance(module, HookPoint):
            reason = _misplaced(module, place if named else module.name, again=module in seen)
        own = vars(module).get("cfg", cfg)
        if reason is None and cfg is not None and own is not cfg and getattr(own, "whole", None) is not cfg:
            reason = "has a config of its own"
        if reason is not None:
            return f"{place or 'the model'} {reason}"
        seen.add(module)
    return None


def stages_obstacle(model: nn.Module) -> str | None:
    """Return why the stages of a model's blocks cannot be run one by one, as a clause; None if they can.

    Args:
        model: a `HookedTransformer`.
    """
    if any(isinstance(block, ShortcutBlock) for block in model.modules()):
        return "the output of experts goes from one block to the next beside the stream"
    if getattr(model, "ranks", None) is not None:
        return "its heads are shared out among several processes"
    return not_stock(model)


def require_stock(what: str, name: str, component: nn.Module, *, alone: bool = False) -> None:
    """Check that a component is stock, for something that is worked out from its weights alone.

    Args:
        what: is worked out; for the message.
        name, component, alone: as `name`, `root` and `alone` of `not_stock`.

    Raises:
        ValueError: the component is overridden.
    """
    if any(getattr(module, "ranks", None) is not None for module in component.modules()):
        raise ValueError(
            f"{what} is worked out from weights, and this process has a part of those of {name}: load the model on one "
            "device, or take whole weights from the model's own properties (model.W_O)"
        )
    reason = not_stock(component, name=name, alone=alone)
    if reason is not None:
        raise ValueError(
            f"{what} is computed from weights alone, as the components of hooked_lm use them, and {reason}: the result "
            "would not describe this model"
        )


def _own_override(module: nn.Module, classes: dict[type, str | None]) -> str | None:
    """What about one module, the modules inside it apart, is not stock.

    Args:
        module: the module.
        classes: what is known of classes already, which is added to.
    """
    if parametrize.is_parametrized(module):
        return "is parametrised"
    if has_module_hooks(module):
        return "has hooks of torch's, which may do anything"
    kind: type = type(module)
    if kind not in classes:
        classes[kind] = _overridden(kind)
    if classes[kind] is not None:
        return classes[kind]
    own, methods = vars(module), _methods_of(cast(Hashable, kind))
    patched = [one for one in own.keys() & methods if not getattr(own[one], "keeps_stages", False)]
    if patched:
        return f"has a {min(patched)} of its own"
    if isinstance(module, (*_MLPS, UnembedTransform)) and not is_registered_activation(module.act_fn):
        return "has an act_fn that is not registered"
    return None


def _misplaced(point: HookPoint, place: str, *, again: bool) -> str | None:
    """Why the activation with a hook point's name is not the one in this place."""
    if again:
        return f"is the same hook point as {point.name}: two places share a module"
    return None if point.name in ("", place) else f"is still named {point.name}: call model.setup()"


def _overridden(kind: type) -> str | None:
    """What a class changes of the stock class that it is, or comes from."""
    if vars(kind).get("keeps_stages", False):
        return None
    stock = next((base for base in kind.__mro__ if base in _STOCK), None)
    if stock is None:
        return f"is a {kind.__name__}, which is no component of this package"
    for name, expected in _STOCK[stock].items():
        found = next(vars(base)[name] for base in kind.__mro__ if name in vars(base))
        if found is not expected and not getattr(found, "keeps_stages", False):
            how = "has another" if kind is stock else "overrides"
            return f"is a {kind.__name__}, which {how} {name}"
    return None


@lru_cache(maxsize=1024)
def _methods_of(kind: Hashable) -> frozenset[str]:
    assert isinstance(kind, type)
    return frozenset(name for name in dir(kind) if inspect.isroutine(inspect.getattr_static(kind, name)))
