"""Attention by torch's fused kernels, which can be differentiated once; differentiated again, by the plain formula."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor
from torch.autograd.function import FunctionCtx

from hooked_lm._support.torch_internals import transforms_active

__all__ = ["fused_attention"]

Gradients = tuple[Tensor, Tensor, Tensor]


def fused_attention(
    q: Float[Tensor, "batch query head d_head"],
    k: Float[Tensor, "batch key kv_head d_head"],
    v: Float[Tensor, "batch key kv_head d_value"],
    mask: Tensor | None,
    causal: bool,
    scale: float,
) -> Float[Tensor, "batch query head d_value"]:
    """Return `softmax(scale q k^T + mask) v` for every head, without forming the softmax.

    Backward uses the kernel's own derivative. That has none itself, so with `create_graph=True` the gradient is
    computed by the plain formula instead, which forms the softmax and can be differentiated as often as wanted.

    Args:
        q, k, v: queries, keys and values; query heads share keys and values in groups.
        mask: [batch_or_1 head_or_1 query key], True where a query attends to a key, or numbers to add to the scores.
        causal: queries attend to no later keys. Then there is no mask, and as many keys as queries.
        scale: multiplies the scores.
    """
    z = F.scaled_dot_product_attention(
        q.transpose(1, 2),
        k.transpose(1, 2),
        v.transpose(1, 2),
        attn_mask=mask,
        is_causal=causal,
        scale=scale,
        enable_gqa=q.shape[2] != k.shape[2],
    ).transpose(1, 2)
    if torch.compiler.is_compiling() or not z.requires_grad:
        return z
    watched: Tensor = _Differentiable.apply(z, q, k, v, mask, causal, scale)  # type: ignore[no-untyped-call]
    return watched


if TYPE_CHECKING:

    class _Context(FunctionCtx):
        """What `_Differentiable` keeps for its backward pass."""

        saved_tensors: Gradients
        mask: Tensor | None
        causal: bool
        scale: float

else:
    _Context = FunctionCtx


class _Differentiable(torch.autograd.Function):
    """The identity of z, which sends its gradient to the fused kernel, or past it if it is to be differentiated."""

    @staticmethod
    def forward(
        ctx: _Context, z: Tensor, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, causal: bool, scale: float
    ) -> Tensor:
        ctx.save_for_backward(q, k, v)
        ctx.mask, ctx.causal, ctx.scale = mask, causal, scale
        return z.detach()

    @staticmethod
    def backward(ctx: _Context, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (gradient,) = gradients
        # Autograd records what backward computes if and only if it was asked to create a graph. Under `torch.func`
        # (a gradient taken inside `vmap` of a graph made outside) the kernel's derivative has no rule.
        if not (torch.is_grad_enabled() or transforms_active()):
            return gradient, None, None, None, None, None, None
        q, k, v = ctx.saved_tensors
        return None, *_gradients(gradient, q, k, v, ctx.mask, ctx.causal, ctx.scale), None, None, None


def _gradients(
    gradient: Float[Tensor, "batch query head d_value"],
    q: Float[Tensor, "batch query head d_head"],
    k: Float[Tensor, "batch key kv_head d_head"],
    v: Float[Tensor, "batch key kv_head d_value"],
    mask: Tensor | None,
    causal: bool,
    scale: float,
) -> Gradients:
    """Return the gradients at queries, keys and values for one at z, by operations that have derivatives."""
    # Under autocast they differ in precision; the softmax is taken in float32 at least, as the kernels do.
    dtypes, precision = (q.dtype, k.dtype, v.dtype), torch.promote_types(gradient.dtype, torch.float32)
    group, kv_heads = q.shape[2] // k.shape[2], k.shape[2]
    # [batch head pos d_head]. No einsum or unflatten, which torch cannot do to a batch of gradients.
    q, k, v, gradient = (one.to(precision).transpose(1, 2) for one in (q, k, v, gradient))
    k, v = (one.repeat_interleave(group, dim=1) for one in (k, v))
    scores = scale * q @ k.mT
    if causal:
        mask = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).tril()
    if mask is not None:
        scores = scores.masked_fill(~mask, float("-inf")) if mask.dtype == torch.bool else scores + mask
    pattern = scores.softmax(-1)
    to_pattern = gradient @ v.mT
    to_scores = scale * pattern * (to_pattern - (to_pattern * pattern).sum(-1, keepdim=True))
    of_q, of_k, of_v = to_scores @ k, to_scores.mT @ q, pattern.mT @ gradient
    of_k, of_v = (one.reshape(-1, kv_heads, group, *one.shape[2:]).sum(2) for one in (of_k, of_v))
    of_q, of_k, of_v = (one.transpose(1, 2).to(dtype) for one, dtype in zip((of_q, of_k, of_v), dtypes, strict=True))
    return of_q, of_k, of_v
