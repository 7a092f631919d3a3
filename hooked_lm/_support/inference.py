"""Tensors made under `torch.inference_mode()`, used where gradients are recorded."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["as_differentiable"]


def as_differentiable(tensor: Tensor) -> Tensor:
    """Return a tensor that autograd can save for backward: a copy, if it was made under `torch.inference_mode()`.

    Args:
        tensor: returned itself where no gradients are recorded.
    """
    if torch.compiler.is_compiling() or not torch.is_grad_enabled() or torch.is_inference_mode_enabled():
        return tensor
    return tensor.clone() if tensor.is_inference() else tensor
