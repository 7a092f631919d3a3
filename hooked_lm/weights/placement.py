"""Where a model's parameters come to lie as they are read: in memory of their own, or in the checkpoint's file."""

from __future__ import annotations

import re

import torch
from torch import Tensor, nn

from hooked_lm.config import HookedTransformerConfig
from hooked_lm.weights import processing
from hooked_lm.weights.processing import Weights


class Homes:
    """The parameters of a model on the meta device, each given a real one in its turn.

    A tensor that is a private view of a memory-mapped file, and right as it is, becomes the parameter itself: its pages
    are read when they are used, and a write to them stays in memory. Everything else is copied, in the memory order
    that the model's projections want, and processed there.

    Args:
        model: built on the meta device.
        device: where its parameters go.
    """

    def __init__(self, model: nn.Module, device: str | torch.device) -> None:
        self.device, self.dtype = torch.device(device), next(model.parameters()).dtype
        self._owners = {
            f"{path}.{name}": (module, name) for path, module in model.named_modules() for name in module._parameters
        }

    def take_in(self, chunk: Weights, cfg: HookedTransformerConfig, plan: list[str], *, keep_views: bool) -> bool:
        """Give the parameters of some whole blocks their values; return whether any of them is a view of the file.

        Args:
            chunk: the weights as they were read.
            cfg: the architecture as it is before processing.
            plan: the processing steps.
            keep_views: what is read may be kept rather than copied.
        """
        rewritten = re.compile("|".join(processing.STEPS[step].writes(cfg) for step in plan) or "(?!)")
        # What is processed reads also what is not: all of it in one precision.
        keep_views = keep_views and self.device.type == "cpu" and (not plan or self.dtype == self._precise)
        placed, kept = {}, set[int]()
        for name, value in chunk.items():
            home = self._home(name)
            unchanged = home is not None and value.dtype == home.dtype and not rewritten.fullmatch(name)
            # Two parameters are never one memory, though a rule may read a tensor twice.
            if keep_views and unchanged and value.data_ptr() not in kept and _serves(name, value):
                placed[name] = value
                kept.add(value.data_ptr())
            else:
                placed[name] = self._copied(name, value, home, processed=bool(plan))
        processing.process_(cfg, placed, plan)
        for name, value in placed.items():
            self._settle(name, value)
        return bool(kept)

    def _home(self, name: str) -> Tensor | None:
        module, attribute = self._owners.get(name, (None, ""))
        return None if module is None else module._parameters[attribute]

    def _copied(self, name: str, value: Tensor, home: Tensor | None, *, processed: bool) -> Tensor:
        """A copy on the model's device. What is to be processed is kept precise: low precision would round twice."""
        if home is None:
            return value.to(self.device, self._precise, copy=True)
        if not processed and _serves(name, value):
            # In the checkpoint's order, which serves as well: to transpose it on the way would be work for nobody.
            return value.to(self.device, home.dtype, copy=True)
        dtype = self._precise if processed else home.dtype
        return torch.empty_like(home, device=self.device, dtype=dtype).copy_(value)

    @property
    def _precise(self) -> torch.dtype:
        return torch.promote_types(self.dtype, torch.float32)

    def _settle(self, name: str, value: Tensor) -> None:
        if name not in self._owners:
            return
        module, attribute = self._owners[name]
        home = module._parameters[attribute]
        assert home is not None
        module._parameters[attribute] = nn.Parameter(value.to(home.dtype), requires_grad=home.requires_grad)


def _serves(name: str, value: Tensor) -> bool:
    """Whether a tensor can be a parameter in the order in which it lies in memory."""
    repeats = any(stride == 0 and size > 1 for stride, size in zip(value.stride(), value.shape, strict=True))
    # A GEMM takes a matrix as it lies only if one of its axes is contiguous; else it is copied every time.
    scattered = value.ndim > 1 and 1 not in value.stride()[-2:]
    return not repeats and not scattered and (".attn.W_" not in name or _heads_are_one_matrix(name, value))


def _heads_are_one_matrix(name: str, value: Tensor) -> bool:
    """Whether the heads of a projection lie evenly, so that all of them are one matrix without a copy.

    Merged with the heads is the axis that is inside them: `d_head`, the last of W_Q, W_K, W_V and the middle of W_O.
    """
    inner = 1 if name.endswith("W_O") else 2
    return value.shape[0] == 1 or value.stride(0) == value.shape[inner] * value.stride(inner)
