"""Refuse to compute from weights alone what an overridden component may compute in another way.

A circuit is a product of weight matrices, and it describes the model only as long as attention, norms and unembedding
are the components of this package. A subclass, a module in a component's place, a method set on an instance, a
parametrisation or a torch hook may change what those weights do: then no number is better than a wrong one.
"""

from __future__ import annotations

from hooked_lm.components.stock import require_stock
from hooked_lm.hooked_model import HookedModel

__all__ = ["require_own_matrices", "require_stock", "require_stock_attention", "require_stock_unembedding"]


def require_own_matrices(model: HookedModel, what: str, *, by_values: bool = False) -> None:
    """Raise a ValueError unless heads read the stream by matrices of their own, and write what they read by values.

    Args:
        model: a `HookedTransformer`.
        what: is computed from these matrices; for the message.
        by_values: it describes what heads write of what they read, and not only where they attend to.

    Raises:
        ValueError: the model has latent attention; or gates, which act on what heads write.
    """
    if by_values and model.cfg.attention_gate:
        raise ValueError(
            f"{what} is a product of matrices, and this model multiplies what its heads read by a gate, which is "
            "another at every position: no product of weights describes what they write"
        )
    if model.cfg.d_latent_kv is not None:
        raise ValueError(
            f"{what} is a product of matrices, and this model's heads read the stream by way of latents, which a norm "
            "divides by another scale at every position: no product of weights describes them"
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
    """Raise a ValueError unless the final norm and the unembedding are stock components, and the latter is a matrix.

    Args:
        model: a `HookedTransformer`.
        what: is computed from their weights; for the message.

    Raises:
        ValueError: one of them is overridden, or a layer with an activation function stands before `W_U`.
    """
    for name, part in (("ln_final", model.ln_final), ("unembed", model.unembed)):
        require_stock(what, name, part)
    model.unembed.require_linear(what)
