"""The circuits of heads with the linear part of the norms before and after them folded in."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor, nn

from hooked_lm._support.precision import at_least_single
from hooked_lm.circuits.stock_only import require_own_matrices, require_stock_attention
from hooked_lm.components import TransformerBlock
from hooked_lm.components.norm import Norm
from hooked_lm.components.projections import per_query_head
from hooked_lm.factored_matrix import FactoredMatrix
from hooked_lm.hooked_model import HookedModel

__all__ = [
    "folded_ov",
    "folded_qk",
    "head_norm_linear_part",
    "linear_part",
    "read_through",
    "reads_centred",
    "require_additive",
    "require_scores_by_head",
]


def folded_ov(model: HookedModel, layer: int) -> FactoredMatrix:
    """Return `W_V W_O` of each head of a layer, [head d_model d_model], with the norms on the way folded in.

    The gain and the centring of the norm that the heads read through, and of the norm on what they write, where there
    are such norms; not their scales and biases. For weights that were folded on loading it is `model.OV[layer]`.

    Raises:
        ValueError: no such layer, norms on the residual stream itself, gates, or overridden attention or norms.
    """
    require_additive(model)
    block = _block(model, layer, "an OV circuit", by_values=True)
    home = model.embed.W_E.device
    W_V = per_query_head(read_through(block.ln1, _exact(block.attn.W_V, home)), model.cfg.n_heads)
    return FactoredMatrix(W_V, linear_part(block.ln1_post, _exact(block.attn.W_O, home)))


def folded_qk(model: HookedModel, layer: int) -> FactoredMatrix:
    """Return `W_Q W_K^T` of each head of a layer, [head d_model d_model], with the norms on the way folded in.

    The gain and the centring of the norm that the heads read through, and of norms on queries and keys; not their
    scales and biases. For weights that were folded on loading, without such norms, it is `model.QK[layer]`.

    Raises:
        ValueError: no such layer; norms stand where the circuit is no product of matrices; or attention or norms are
            overridden.
    """
    require_additive(model)
    require_scores_by_head(model)
    block = _block(model, layer, "a QK circuit", by_values=False)
    attn, home = block.attn, model.embed.W_E.device
    W_Q = head_norm_linear_part(attn.q_norm, read_through(block.ln1, _exact(attn.W_Q, home)))
    W_K = head_norm_linear_part(attn.k_norm, read_through(block.ln1, _exact(attn.W_K, home)))
    return FactoredMatrix(W_Q, per_query_head(W_K, model.cfg.n_heads).mT)


def linear_part(norm: nn.Module, rows: Float[Tensor, "*leading d_model"]) -> Float[Tensor, "*leading d_model"]:
    """Return what a norm does to every row alike: centring, then the gain. A module that is no norm does nothing."""
    if not isinstance(norm, Norm):
        return rows
    rows = rows - rows.mean(-1, keepdim=True) if norm.centred else rows
    return rows if norm.w is None else rows * norm.w.to(rows)


def read_through(norm: nn.Module, W: Float[Tensor, "*head d_model column"]) -> Float[Tensor, "*head d_model column"]:
    """Return weights that read before a norm what `W` reads after it, apart from the norm's scale and bias."""
    if not isinstance(norm, Norm):
        return W
    W = W if norm.w is None else W * _exact(norm.w, W.device)[:, None]
    return W - W.mean(-2, keepdim=True) if norm.centred else W


def head_norm_linear_part(
    norm: nn.Module, rows: Float[Tensor, "*head row d_head"], head: int | None = None
) -> Float[Tensor, "*head row d_head"]:
    """Return the linear part of a norm on queries or keys.

    Args:
        norm: its gain is [d_head], or [head d_head] where each head has its own.
        rows: of every head, or of one head.
        head: the head, if the rows are of one.
    """
    if not isinstance(norm, Norm):
        return rows
    rows = rows - rows.mean(-1, keepdim=True) if norm.centred else rows
    if norm.w is None:
        return rows
    gain = norm.w if head is None or norm.w.ndim == 1 else norm.w[head]
    return rows * gain.to(rows)[..., None, :]


def reads_centred(model: HookedModel) -> bool:
    """Return whether heads read the residual stream less its mean."""
    # The last block's: the first may have none, and its heads read no other head.
    norm = model.blocks[-1].ln1
    return isinstance(norm, Norm) and norm.centred


def require_additive(model: HookedModel) -> None:
    """Raise a ValueError for a model in which no product of weights describes what reaches a head."""
    if model.cfg.norm_placement == "residual":
        raise ValueError(
            "this model normalises the residual stream itself after each layer has written to it, so no product of "
            "weights describes how a token's embedding or a head's output reaches a head"
        )


def require_scores_by_head(model: HookedModel) -> None:
    """Raise a ValueError for a model in which attention scores are no product of each head's own matrices."""
    if model.cfg.qk_norm_after_rotary or (model.cfg.qk_norm_across_heads and model.cfg.qk_norm_type == "LN"):
        raise ValueError(
            "this model's norm of queries and keys comes after their rotation or centres over all heads at once: a "
            "head's scores are no product of its own matrices"
        )


def _block(model: HookedModel, layer: int, what: str, *, by_values: bool) -> TransformerBlock:
    if not 0 <= layer < model.cfg.n_layers:
        raise ValueError(f"no layer {layer}: this model has layers 0-{model.cfg.n_layers - 1}")
    require_own_matrices(model, what, by_values=by_values)
    require_stock_attention(model, layer, what)
    return model.blocks[layer]


def _exact(weights: Tensor, home: torch.device) -> Tensor:
    """Detached, and in single precision at least: torch has no eigenvalues and singular values of half precision."""
    return at_least_single(weights.detach().to(home))
