"""The bytes of a tensor's values."""

from __future__ import annotations

import torch
from jaxtyping import UInt8
from torch import Tensor

__all__ = ["bytes_of"]


def bytes_of(tensor: Tensor) -> UInt8[Tensor, " byte"]:
    """Return the bytes of a tensor's values in row-major order, on the CPU, without a copy where there need be none.

    Args:
        tensor: of any dtype and layout in memory.
    """
    data = tensor.detach().cpu().contiguous()
    # An axis of one entry may keep any stride, with which torch does not view a tensor as bytes.
    return data.as_strided((data.numel(),), (1,)).view(torch.uint8)
