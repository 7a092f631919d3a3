"""Where a model's parameters come to lie as they are read: in memory of their own, or in the checkpoint's file."""

from __future__ import annotations

import re

import torch
from torch import Tensor, nn

from hooked_lm import weights as processing
from hooked_lm.config import HookedTransformerConfig
from hooked_lm.weights import Weights


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

    def take_in(self, chunk: Weights, cfg: HookedTransformerConfig, plan: list[str], *, keep_views: bool) -> None:
        """Give the parameters of some whole blocks their values.

        Args:
            chunk: the weights as they were read.
            cfg: the architecture as it is before processing.
            plan: the processing steps.
            keep_views: what is read may be kept rather than copied.
        """
        rewritten = re.compile("|".join(processing.STEPS[step].writes(cfg) for step in plan) or "(?!)")
        # What is processed reads also what is not: all of it in one precision.
        keep_views = keep_views and (not plan or self.dtype == self._precise)
        placed, kept = {}, set[int]()
        for name, value in chunk.items():
            home = self._home(name)
            unchanged = not rewritten.fullmatch(name)
            # Two parameters are never one memory, though a rule may read a tensor twice.
            if keep_views and unchanged and value.data_ptr() not in kept and self._serves(value, home):
                placed[name] = value
                kept.add(value.data_ptr())
            else:
                placed[name] = self._copied(value, home, precise=bool(plan))
        processing.process_(cfg, placed, plan)
        for name, value in placed.items():
            self._settle(name, value)

    def _home(self, name: str) -> Tensor | None:
        module, attribute = self._owners.get(name, (None, ""))
        return None if module is None else module._parameters[attribute]

    def _serves(self, value: Tensor, home: Tensor | None) -> bool:
        """Whether a value can be a parameter as it lies in memory."""
        if home is None or value.dtype != home.dtype or self.device.type != "cpu":
            return False
        repeats = any(stride == 0 and size > 1 for stride, size in zip(value.stride(), value.shape, strict=True))
        # A GEMM takes a matrix as it lies only if one of its axes is contiguous; else it is copied every time.
        scattered = value.ndim > 1 and 1 not in value.stride()[-2:]
        return not repeats and not scattered and _is_matrix_of_heads(value, home)

    def _copied(self, value: Tensor, home: Tensor | None, *, precise: bool) -> Tensor:
        """A copy on the model's device. What is to be processed is kept precise: low precision would round twice."""
        if home is None:
            return value.to(self.device, self._precise, copy=True)
        dtype = self._precise if precise else home.dtype
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


def _is_matrix_of_heads(value: Tensor, home: Tensor) -> bool:
    """Whether the heads of a projection lie evenly, so that all of them are one matrix without a copy.

    The axis that is merged with the heads is the one that the model's own layout has next to them in memory.
    """
    if value.ndim != 3 or value.shape[0] == 1:
        return True
    inner = 2 if home.stride(0) < home.stride(1) else 1
    return value.stride(0) == value.shape[inner] * value.stride(inner)
