"""Refuse to compute from weights alone what an overridden component may compute in another way.

A circuit is a product of weight matrices, and it describes the model only as long as attention, norms and unembedding
are the components of this package. A subclass, a module in a component's place, a method set on an instance, a
parametrisation or a torch hook may change what those weights do: then no number is better than a wrong one.
"""

from __future__ import annotations

from torch import nn

from hooked_lm.components.stock import not_stock
from hooked_lm.hooked_model import HookedModel

__all__ = ["override_of", "require_stock", "require_stock_attention", "require_stock_unembedding"]


def override_of(name: str, component: nn.Module, *, alone: bool = False) -> str | None:
    """Return how a component differs from the stock one, as a clause such as `"ln_final is a Louder, which ..."`.

    Args:
        name: of the component in the model.
        component: the module, with all modules inside it.
        alone: leave the modules inside it out.

    Returns:
        The clause, or None for a stock component.
    """
    reason = not_stock(component)
    if reason is None:
        return None
    # `not_stock` looks at the component first, then inside it: a reason about a child begins with the child's name.
    inside = any(reason.startswith((f"{child} ", f"{child}.")) for child, _ in component.named_children())
    if inside:
        return None if alone else f"{name}.{reason}"
    return reason.replace("the model", name, 1)


def require_stock(what: str, name: str, component: nn.Module, *, alone: bool = False) -> None:
    """Raise a ValueError with the reason, unless a component is a stock one.

    Args:
        what: is computed from the component's weights; for the message.
        name, component, alone: as for `override_of`.

    Raises:
        ValueError: the component is overridden.
    """
    reason = override_of(name, component, alone=alone)
    if reason is not None:
        raise ValueError(
            f"{what} is computed from weights alone, as the components of hooked_lm use them, and {reason}: the result "
            "would not describe this model"
        )


def require_stock_attention(model: HookedModel, layer: int, what: str) -> None:
    """Raise a ValueError unless a block, its attention and the norms around the attention are stock components.

    Args:
        model: a `HookedTransformer`.
        layer: the block.
        what: is computed from their weights; for the message.

    Raises:
        ValueError: one of them is overridden. The block's MLP may be.
    """
    block, path = model.blocks[layer], f"blocks.{layer}"
    require_stock(what, path, block, alone=True)
    for name, part in (("ln1", block.ln1), ("attn", block.attn), ("ln1_post", block.ln1_post)):
        require_stock(what, f"{path}.{name}", part)


def require_stock_unembedding(model: HookedModel, what: str) -> None:
    """Raise a ValueError unless the final norm and the unembedding are stock components.

    Args:
        model: a `HookedTransformer`.
        what: is computed from their weights; for the message.

    Raises:
        ValueError: one of them is overridden.
    """
    for name, part in (("ln_final", model.ln_final), ("unembed", model.unembed)):
        require_stock(what, name, part)
