"""From the stream to queries, keys and values: a product each, or one where their weights are one matrix."""

from __future__ import annotations

import torch
from einops import einsum
from jaxtyping import Float
from torch import Tensor, nn

from hooked_lm.components.linear import linear


def input_projection(heads: int, d_model: int, d_head: int) -> nn.Parameter:
    """Return an uninitialised [head d_model d_head] parameter in the memory order of the GEMM that uses it.

    In memory it is [d_model (head d_head)]: one matrix that projects to all heads at once.
    """
    return nn.Parameter(torch.empty(d_model, heads, d_head).transpose(0, 1))


def project(
    x: Float[Tensor, "batch pos *head d_model"],
    W: Float[Tensor, "head d_model d_head"],
    b: Float[Tensor, "head d_head"],
) -> Float[Tensor, "batch pos head d_head"]:
    """Return `x W + b` for every head: one GEMM on a view of `W` when the heads share their input."""
    if x.ndim == 4:
        return einsum(x, W, "batch pos head d_model, head d_model d_head -> batch pos head d_head") + b
    return linear(x, W.mT.flatten(0, 1), b.flatten()).unflatten(-1, b.shape)


def project_to_all(
    x: Float[Tensor, "batch pos d_model"], matrix: Float[Tensor, "head_d_head d_model"], b: Float[Tensor, "head d_head"]
) -> Float[Tensor, "batch pos head d_head"]:
    """Return what several projections give, one after the other along the heads: one product for all of them.

    Args:
        x: what they read.
        matrix: all of them, `as_one_matrix`.
        b: their biases, one below the other.
    """
    return linear(x, matrix, b.flatten()).unflatten(-1, b.shape)


def as_one_matrix(*projections: Tensor) -> Float[Tensor, "head_d_head d_model"] | None:
    """Return several projections [head d_model d_head] as one matrix, a view; None where their memory is not one.

    It is one where a checkpoint fuses them and they are views of its file. It is found anew each time, in the memory
    where the weights are now: whatever has become of a weight, it is never out of date.
    """
    first = projections[0]
    if torch.compiler.is_compiling() or first.device.type == "meta":
        return None
    (_, across, down), (_, d_model, d_head) = first.stride(), first.shape
    expected, rows = first.data_ptr(), 0
    for W in projections:
        # A tensor that stands in for a parameter, as under torch.func, may have no memory; one that learns needs its
        # own gradient.
        if type(W) is not nn.Parameter or (W.requires_grad and torch.is_grad_enabled()):
            return None
        if W.data_ptr() != expected or W.stride() != (d_head * down, across, down) or W.dtype != first.dtype:
            return None
        expected += W.numel() // d_model * down * W.element_size()
        rows += len(W) * d_head
    storage = first.untyped_storage()
    last = first.storage_offset() + (rows - 1) * down + (d_model - 1) * across
    if (last + 1) * first.element_size() > storage.nbytes():
        return None  # neighbours by chance, in memory that was given out separately
    return first.as_strided((rows, d_model), (down, across))
