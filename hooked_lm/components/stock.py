"""not_stock: tell whether a model's components are unmodified, so that their stages can be run one by one.

Sweeps and path patching run parts of a block, and rely on what the stock components do between their hook points. A
subclass may do something else; so may a replaced module, a method set on an instance, a parametrisation or a hook of
torch's. They call `not_stock` first and run the whole model if it returns a reason.

A subclass that overrides methods but keeps the stages (each hook point has the same activation as in the stock
component, computed from the same inputs, position by position outside attention) sets `keeps_stages = True`.
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
from hooked_lm.components.embed import Embed, Unembed
from hooked_lm.components.mlp import MLP, GatedMLP
from hooked_lm.components.moe import MoE
from hooked_lm.components.norm import LayerNorm, LayerNormPre, NoNorm, Norm, RMSNorm, RMSNormPre
from hooked_lm.components.positions import PosEmbed
from hooked_lm.hooks import HookPoint

__all__ = ["STOCK", "not_stock", "require_stock"]

_NORMS = (Norm, LayerNorm, LayerNormPre, RMSNorm, RMSNormPre, NoNorm)
_MLPS = (MLP, GatedMLP, MoE)
STOCK: frozenset[type] = frozenset(
    {TransformerBlock, Attention, *_MLPS, *_NORMS, Embed, Unembed, PosEmbed, XIELU, HookPoint, nn.ModuleList}
)
# Names that a subclass may define without changing the component's computation.
_HARMLESS = frozenset(
    {"__init__", "__module__", "__doc__", "__dict__", "__weakref__", "__annotations__", "__qualname__", "__repr__"}
    | {"__parameters__", "__static_attributes__", "__firstlineno__", "__orig_bases__", "extra_repr", "_get_name"}
)


def not_stock(
    root: nn.Module, stock_root: type | None = None, *, name: str = "the model", alone: bool = False
) -> str | None:
    """Return what in a module tree is not stock, as a clause such as `"ln_final is a Louder, which overrides forward"`.

    Args:
        root: a model, a block or any other component.
        stock_root: the stock class of `root`, if `root` is a model rather than a component.
        name: the name of `root` in the clause.
        alone: look at `root` itself and not at the modules inside it.

    Returns:
        The clause, or None if everything is stock.
    """
    if has_global_module_hooks():
        return "torch's global module hooks may do anything"
    inside = "" if name == "the model" else f"{name}."
    for path, module in (("", root),) if alone else root.named_modules():
        known = STOCK if stock_root is None or module is not root else STOCK | {stock_root}
        reason = _own_override(module, known)
        if reason is not None:
            return f"{inside}{path} {reason}" if path else f"{name} {reason}"
    return None


def require_stock(what: str, name: str, component: nn.Module, *, alone: bool = False) -> None:
    """Check that a component is stock, so that a quantity can be computed from its weights alone.

    Args:
        what: the quantity, for the error message.
        name, component, alone: as `name`, `root` and `alone` of `not_stock`.

    Raises:
        ValueError: the component is overridden.
    """
    reason = not_stock(component, name=name, alone=alone)
    if reason is not None:
        raise ValueError(
            f"{what} is computed from weights alone, as the components of hooked_lm use them, and {reason}: the result "
            "would not describe this model"
        )


def _own_override(module: nn.Module, known: frozenset[type]) -> str | None:
    """Return why one module, its children apart, is not stock; None if it is."""
    if parametrize.is_parametrized(module):
        return "is parametrised"
    if has_module_hooks(module):
        return "has hooks of torch's, which may do anything"
    kind: type = type(module)
    if kind not in known:
        override = _overridden(cast(Hashable, kind), known)
        if override is not None:
            return override
    patched = vars(module).keys() & _methods_of(cast(Hashable, kind))
    if patched:
        return f"has a {min(patched)} of its own"
    if isinstance(module, _MLPS) and not is_registered_activation(module.act_fn):
        return "has an act_fn that is not registered"
    return None


@lru_cache(maxsize=1024)
def _overridden(kind: Hashable, known: frozenset[type]) -> str | None:
    """Return what a class changes of the stock class it derives from; None if nothing."""
    assert isinstance(kind, type)
    if vars(kind).get("keeps_stages", False):
        return None
    stock = next((base for base in kind.__mro__ if base in known), None)
    if stock is None:
        return f"is a {kind.__name__}, which is no component of this package"
    for base in kind.__mro__[: kind.__mro__.index(stock)]:
        for name in vars(base):
            if name not in _HARMLESS and hasattr(stock, name):
                return f"is a {kind.__name__}, which overrides {name}"
    return None


@lru_cache(maxsize=1024)
def _methods_of(kind: Hashable) -> frozenset[str]:
    assert isinstance(kind, type)
    return frozenset(name for name in dir(kind) if inspect.isroutine(inspect.getattr_static(kind, name)))
