"""make_contiguous: parameters as `torch.distributed.fsdp.fully_shard` wants them."""

from __future__ import annotations

import torch
from torch import nn

__all__ = ["make_contiguous"]


def make_contiguous(model: nn.Module) -> None:
    """Store every parameter in the order of its axes, in place, so that `fully_shard` takes the model.

    The projections to queries, keys and values are kept in the order of the matrix product that uses them, which is
    another one; `fully_shard` refuses that. Afterwards they are copied in each pass.

    Args:
        model: a `HookedTransformer`, before `fully_shard`.
    """
    with torch.no_grad():
        for module in model.modules():
            for name, old in list(module.named_parameters(recurse=False)):
                if not old.is_contiguous():
                    setattr(module, name, nn.Parameter(old.contiguous(), requires_grad=old.requires_grad))
