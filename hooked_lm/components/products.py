"""`F.linear`, but few rows, as in a step of generation, are multiplied by all threads."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

# More rows keep the threads busy by themselves, and smaller matrices are done before their parts are handed out.
_FEW, _WORTH_SHARING = 16, 2**17


def linear(
    x: Float[Tensor, "*batch d_in"], weight: Float[Tensor, "d_out d_in"], bias: Float[Tensor, " d_out"] | None = None
) -> Float[Tensor, "*batch d_out"]:
    """Return `x weight^T + bias`.

    A product of few rows with a matrix is as fast as the matrix can be read. On the CPU torch reads it with one thread
    for one row, and not much faster for a few; as a batch of products with parts of the matrix it is read by all. (On
    two cores of an AMD EPYC, GPT-2 small's matrices: 1.8 times as fast for one row if they are stored `[d_in d_out]`,
    3 times if `[d_out d_in]`; for 8 rows 1.5 times.)
    """
    rows = x.numel() // x.shape[-1]
    if rows > _FEW or not _is_shared(x, weight):
        return F.linear(x, weight, bias)
    flat = x.reshape(rows, -1)
    product = _by_outputs(flat, weight) if weight.stride(1) == 1 else _by_inputs(flat, weight.T)
    return (product if bias is None else product + bias).view(*x.shape[:-1], -1)


def _is_shared(x: Tensor, weight: Tensor) -> bool:
    if weight.numel() < _WORTH_SHARING or x.device.type != "cpu" or x.dtype not in (torch.float32, torch.float64):
        return False
    by_rows, by_columns = weight.stride(1) == 1, weight.stride(0) == 1 and torch.get_num_threads() > 1
    differentiable = torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad)
    return (by_rows or by_columns) and not differentiable and not torch.compiler.is_compiling()


def _by_outputs(x: Float[Tensor, "row d_in"], weight: Float[Tensor, "d_out d_in"]) -> Float[Tensor, "row d_out"]:
    """Each part of the matrix gives some of the outputs."""
    parts = max(2, torch.get_num_threads())
    rest = len(weight) % parts
    shared = weight[: len(weight) - rest].unflatten(0, (parts, -1))
    product = torch.bmm(shared, x.T.expand(parts, -1, -1)).flatten(0, 1).T
    return torch.cat((product, x @ weight[len(weight) - rest :].T), 1) if rest else product.contiguous()


def _by_inputs(x: Float[Tensor, "row d_in"], matrix: Float[Tensor, "d_in d_out"]) -> Float[Tensor, "row d_out"]:
    """Each part of the matrix gives a part of every output."""
    parts = torch.get_num_threads()
    rest = len(matrix) % parts
    n_shared = len(matrix) - rest
    pieces = x[:, :n_shared].unflatten(1, (parts, -1)).transpose(0, 1)
    product = torch.bmm(pieces, matrix[:n_shared].unflatten(0, (parts, -1))).sum(0)
    return torch.addmm(product, x[:, n_shared:], matrix[n_shared:]) if rest else product
