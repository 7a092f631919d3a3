"""The precision that sums and decompositions are done in."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

__all__ = ["at_least_single", "autocasts", "not_autocast"]


def at_least_single(values: Tensor) -> Tensor:
    """Return the values in float32 if they are in half precision, and as they are otherwise."""
    return values.to(torch.promote_types(values.dtype, torch.float32))


def autocasts(x: Tensor) -> bool:
    """Return whether torch computes in mixed precision now, on the device of a tensor.

    Args:
        x: the tensor.
    """
    kind = x.device.type
    return torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind)


def not_autocast(x: Tensor) -> AbstractContextManager[object]:
    """Return a context in which products on a tensor's device have the precision of their factors.

    Args:
        x: the tensor.
    """
    return torch.autocast(x.device.type, enabled=False) if autocasts(x) else nullcontext()
