"""Weights in which one head of a layer stands for several: their OV circuits added up, and factored again."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from hooked_lm.circuits.stock_only import require_own_matrices, require_stock_attention
from hooked_lm.components import Attention
from hooked_lm.factored_matrix import FactoredMatrix
from hooked_lm.hooked_model import HookedModel

__all__ = ["check_mergeable", "lost_share", "merged_weights"]

# Singular values below this share of the largest are rounding, and the directions that belong to them arbitrary.
_NOTHING = 1e-12


def check_mergeable(model: HookedModel, layer: int) -> None:
    """Check that the output of a layer's heads is a sum of patterns times products of their matrices.

    Args:
        model: a `HookedTransformer`.
        layer: the block.

    Raises:
        ValueError: it is not (latents, gates, clipped values, attention sinks), a component is overridden, or this
            process has a part of the heads.
    """
    require_own_matrices(model, "a merged head", by_values=True)
    require_stock_attention(model, layer, "a merged head")
    if model.cfg.clip_qkv is not None:
        raise ValueError("a merged head's values would be clipped (clip_qkv) where those of its parts were not")
    if model.cfg.attention_sinks:
        raise ValueError(
            "heads with attention sinks are not merged: their patterns do not sum to one, so that value "
            "biases cannot be moved to the output"
        )


def merged_weights(attn: Attention, heads: Sequence[int], kept: int) -> tuple[dict[str, Tensor], float]:
    """Return an attention's weights in which one head stands for several, and the share of their sum that is lost.

    Where the heads' patterns are one pattern `A`, they write `A x (sum_h W_V_h W_O_h)`, so the merged head needs the
    sum as its own OV circuit. It is factored by its singular values, `W_V = U diag(S)` and `W_O = V^T`, as far as
    `d_head` of them go: the nearest matrix of that rank (Eckart and Young 1936). Value biases move to `b_O`, which is
    exact since patterns sum to one. With grouped queries, heads of one group share `W_V`, and the sum of their `W_O` is
    exact.

    The merged head is in the place of `kept` and keeps its queries and keys. The others write nothing: their `W_O` is
    zero, and so are `W_V` and `b_V`, unless other heads share them.

    Args:
        attn: of one layer. It is left as it is.
        heads: those that become one, with `kept` among them; with grouped queries, of one group.
        kept: whose pattern the merged head has.

    Returns:
        The changed weights by their names in the attention; and the share of the squared norm of the sum that is beyond
        rank `d_head`.
    """
    freed = [head for head in heads if head != kept]
    W_O = attn.W_O.detach().double().clone()
    if attn.n_kv_heads != attn.n_heads:
        W_O[kept] = W_O[list(heads)].sum(0)
        W_O[freed] = 0.0
        return {"W_O": W_O.to(attn.W_O.dtype)}, 0.0
    W_V, b_V, b_O = (one.detach().double().clone() for one in (attn.W_V, attn.b_V, attn.b_O))
    for head in heads:
        b_O += b_V[head] @ W_O[head]
    U, singular, V = _sum_of_circuits(W_V[list(heads)], W_O[list(heads)]).svd()
    rank = min(W_V.shape[-1], int((singular > _NOTHING * singular[0]).sum()))
    squared = singular.square()
    lost = float(squared[rank:].sum() / squared.sum()) if bool(squared.any()) else 0.0
    for weight in (W_V, W_O, b_V):
        weight[list(heads)] = 0.0
    W_V[kept, :, :rank] = U[:, :rank] * singular[:rank]
    W_O[kept, :rank] = V[:, :rank].T
    named = {"W_V": W_V, "W_O": W_O, "b_V": b_V, "b_O": b_O}
    return {name: value.to(getattr(attn, name).dtype) for name, value in named.items()}, lost


def lost_share(attn: Attention, heads: Sequence[int]) -> float:
    """Return the share of the squared norm of some heads' summed OV circuits that is beyond rank `d_head`.

    Args:
        attn: of one layer.
        heads: which.
    """
    W_V, W_O = (one.detach()[list(heads)].double() for one in (attn.W_V, attn.W_O))
    squared = _sum_of_circuits(W_V, W_O).svd()[1].square()
    return float(squared[W_V.shape[-1] :].sum() / squared.sum()) if bool(squared.any()) else 0.0


def _sum_of_circuits(
    W_V: Float[Tensor, "head d_model d_head"], W_O: Float[Tensor, "head d_head d_model"]
) -> FactoredMatrix:
    """The sum of heads' OV circuits, as a product of matrices of the joint width of the heads."""
    return FactoredMatrix(torch.cat(list(W_V), 1), torch.cat(list(W_O), 0))
