"""`F.linear`, by the kernel that is fastest on this processor."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor
from torch.autograd.function import FunctionCtx

from hooked_lm._support.torch_internals import ONEDNN_LINEAR, only_plain_operations
from hooked_lm.components.kernels import Kernel, product_kernel

__all__ = ["linear"]

# A matrix with fewer entries goes to `F.linear`, since splitting it, or choosing a oneDNN kernel, takes longer.
_LARGE = 2**17
# More threads than these do not read memory faster.
_MOST_PARTS = 16


def linear(
    x: Float[Tensor, "*batch d_in"], weight: Float[Tensor, "d_out d_in"], bias: Float[Tensor, " d_out"] | None = None
) -> Float[Tensor, "*batch d_out"]:
    """Return `x weight^T + bias`, computed by `F.linear` if the matrix is small or not on the CPU.

    Large matrices are multiplied by the kernel that `kernels.product_kernel` names for the processor. oneDNN's, in
    float32 only, adds the bias in the same pass; `torch.backends.mkldnn.enabled = False` turns it off.

    Args:
        x: the rows.
        weight: the matrix.
        bias: added to every row; None for none.
    """
    if weight.numel() < _LARGE or weight.device.type != "cpu" or weight.ndim != 2 or torch.compiler.is_compiling():
        return F.linear(x, weight, bias)
    kernel = product_kernel(x.numel() // weight.shape[1], weight)
    if kernel == "torch" or not (_fits(x, weight, bias) and only_plain_operations()):
        return F.linear(x, weight, bias)
    learned = x.requires_grad or weight.requires_grad or (bias is not None and bias.requires_grad)
    if learned and torch.is_grad_enabled():
        if not _suits_onednn(x, weight):
            return F.linear(x, weight, bias)
        product: Tensor = _DifferentiableProduct.apply(x, weight, bias)  # type: ignore[no-untyped-call]
        return product
    return _product(x, weight, bias, kernel)


def _fits(x: Tensor, weight: Tensor, bias: Tensor | None) -> bool:
    """Return whether the tensors can be multiplied; if not, `F.linear` raises."""
    alike = x.device == weight.device and x.dtype == weight.dtype and (bias is None or bias.dtype == x.dtype)
    return alike and x.shape[-1:] == weight.shape[1:]


def _suits_onednn(x: Tensor, weight: Tensor) -> bool:
    available = ONEDNN_LINEAR is not None and bool(torch.backends.mkldnn.enabled)
    # For a matrix with gaps (columns of a wider one) oneDNN uses a reference kernel, a hundred times as slow.
    dense = weight.is_contiguous() or weight.T.is_contiguous()
    return available and dense and x.dtype == torch.float32 and x.numel() > 0


def _product(x: Tensor, weight: Tensor, bias: Tensor | None, kernel: Kernel) -> Tensor:
    rows = x.numel() // x.shape[-1]
    if kernel == "parts" and rows > 0:
        by_rows, by_columns = weight.stride(1) == 1, weight.stride(0) == 1 and torch.get_num_threads() > 1
        if by_rows or by_columns:
            flat = x.reshape(rows, -1)
            product = _by_outputs(flat, weight) if by_rows else _by_inputs(flat, weight.T)
            return (product if bias is None else product + bias).view(*x.shape[:-1], -1)
    if ONEDNN_LINEAR is not None and _suits_onednn(x, weight):
        return ONEDNN_LINEAR(x, weight, bias, "none", [], "")
    return F.linear(x, weight, bias)


if TYPE_CHECKING:

    class _ProductContext(FunctionCtx):
        """What torch gives the context besides the attributes that its own class declares."""

        needs_input_grad: tuple[bool, bool, bool]
        saved_tensors: tuple[Tensor | None, Tensor | None]

else:
    _ProductContext = FunctionCtx


class _DifferentiableProduct(torch.autograd.Function):
    """oneDNN's product, which has no registered backward. Saves the same tensors for backward as `F.linear`."""

    @staticmethod
    def forward(ctx: _ProductContext, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        needs_x, needs_weight, _ = ctx.needs_input_grad
        # torch takes None too, though its annotation does not say so.
        ctx.save_for_backward(x if needs_weight else None, weight if needs_x else None)  # type: ignore[arg-type]
        return _product(x, weight, bias, product_kernel(x.numel() // x.shape[-1], weight))

    @staticmethod
    def backward(ctx: _ProductContext, *gradients: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        (gradient,), (x, weight) = gradients, ctx.saved_tensors
        rows = gradient.reshape(-1, gradient.shape[-1])
        of_x = None if weight is None else linear(gradient, weight.T)
        of_weight = None if x is None else rows.T @ x.reshape(-1, x.shape[-1])
        return of_x, of_weight, rows.sum(0) if ctx.needs_input_grad[2] else None


def _by_outputs(x: Float[Tensor, "row d_in"], weight: Float[Tensor, "d_out d_in"]) -> Float[Tensor, "row d_out"]:
    """Return the product, computed in parts that each give some of the outputs."""
    parts = min(max(2, torch.get_num_threads()), _MOST_PARTS)
    rest = len(weight) % parts
    shared = weight[: len(weight) - rest].unflatten(0, (parts, -1))
    product = torch.bmm(shared, x.T.expand(parts, -1, -1)).flatten(0, 1).T
    return torch.cat((product, x @ weight[len(weight) - rest :].T), 1) if rest else product.contiguous()


def _by_inputs(x: Float[Tensor, "row d_in"], matrix: Float[Tensor, "d_in d_out"]) -> Float[Tensor, "row d_out"]:
    """Return the product, computed in parts that each give a summand of every output."""
    parts = min(torch.get_num_threads(), _MOST_PARTS)
    rest = len(matrix) % parts
    n_shared = len(matrix) - rest
    pieces = x[:, :n_shared].unflatten(1, (parts, -1)).transpose(0, 1)
    product = torch.bmm(pieces, matrix[:n_shared].unflatten(0, (parts, -1))).sum(0)
    return torch.addmm(product, x[:, n_shared:], matrix[n_shared:]) if rest else product
