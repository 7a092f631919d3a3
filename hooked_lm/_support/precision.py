"""The precision that sums and decompositions are done in."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["at_least_single"]


def at_least_single(values: Tensor) -> Tensor:
    """Return the values in float32 if they are in half precision, and as they are otherwise."""
    return values.to(torch.promote_types(values.dtype, torch.float32))
