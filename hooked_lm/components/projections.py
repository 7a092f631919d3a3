"""From the stream to queries, keys and values: one matrix product for all heads."""

from __future__ import annotations

import torch
from einops import einsum
from jaxtyping import Float
from torch import Tensor, nn

from hooked_lm.components.linear import linear

__all__ = ["input_projection", "per_query_head", "project"]


def input_projection(heads: int, d_model: int, d_head: int) -> nn.Parameter:
    """Return a parameter of zeros, [head d_model d_head], in the memory order of the matrix product that uses it.

    In memory it is [d_model (head d_head)]: one matrix that projects to all heads at once.
    """
    return nn.Parameter(torch.zeros(d_model, heads, d_head).transpose(0, 1))


def project(
    x: Float[Tensor, "batch pos *head d_model"],
    W: Float[Tensor, "head d_model d_head"],
    b: Float[Tensor, "head d_head"] | None,
) -> Float[Tensor, "batch pos head d_head"]:
    """Return `x W + b` for every head: one matrix product on a view of `W` if the heads share their input.

    Args:
        x: the input, of all heads together or of each; `d_model` is the latent's width in latent attention.
        W: the weights of each head.
        b: the biases; None for none.
    """
    if x.ndim == 4:
        projected: Tensor = einsum(x, W, "batch pos head d_model, head d_model d_head -> batch pos head d_head")
        return projected if b is None else projected + b
    matrix = W.mT.flatten(0, 1)
    heads: Tensor = linear(x, matrix, None if b is None else b.flatten()).unflatten(-1, (W.shape[0], W.shape[2]))
    return heads


def per_query_head(x: Tensor, n_heads: int, dim: int = 0) -> Tensor:
    """Return `x` with an entry for each query head along `dim`; `x` itself if it has one already.

    Args:
        x: has an entry for each key-value head along `dim`, or for each query head.
        n_heads: query heads.
        dim: the axis.
    """
    group = n_heads // x.shape[dim]
    return x if group == 1 else x.repeat_interleave(group, dim=dim)
