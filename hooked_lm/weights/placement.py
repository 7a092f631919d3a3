"""Decide where each loaded parameter is stored: in its own memory, or as a copy-on-write view of the mapped file."""

from __future__ import annotations

import re

import torch
from torch import Tensor, nn

from hooked_lm.config import HookedTransformerConfig
from hooked_lm.weights import processing
from hooked_lm.weights.processing import Weights

__all__ = ["ParameterPlacement"]


class ParameterPlacement:
    """Loads values into the parameters of a model that was built on the meta device.

    A tensor that is a copy-on-write view of a memory-mapped file, and needs no processing, becomes the parameter
    itself: its pages are read when they are used, and a write to them stays in memory. Every other tensor is copied, in
    the memory order that the model's projections use, and processed there.

    Args:
        model: built on the meta device.
        device: the device of the loaded parameters.
    """

    def __init__(self, model: nn.Module, device: str | torch.device) -> None:
        self.device, self.dtype = torch.device(device), next(model.parameters()).dtype
        self._owners = {
            f"{path}.{name}": (module, name)
            for path, module in model.named_modules()
            for name, _ in module.named_parameters(recurse=False)
        }

    def load_chunk(self, chunk: Weights, cfg: HookedTransformerConfig, plan: list[str], *, keep_views: bool) -> bool:
        """Load the parameters of some whole blocks; return whether any of them is a view of the file.

        Args:
            chunk: weight name -> tensor as read from the checkpoint.
            cfg: the config before processing.
            plan: the names of the processing steps.
            keep_views: whether tensors may become parameters without a copy.
        """
        rewritten = re.compile("|".join(processing.STEPS[step].writes(cfg) for step in plan) or "(?!)")
        # A processing step also reads tensors that it does not change, and needs all of them in one precision.
        keep_views = keep_views and self.device.type == "cpu" and (not plan or self.dtype == self._precise)
        placed, kept = {}, set[int]()
        for name, value in chunk.items():
            parameter = self._parameter(name)
            unchanged = parameter is not None and value.dtype == parameter.dtype and not rewritten.fullmatch(name)
            # A conversion rule may use a tensor twice, but two parameters must not share memory.
            if keep_views and unchanged and value.data_ptr() not in kept and _usable_in_place(name, value):
                placed[name] = value
                kept.add(value.data_ptr())
            else:
                placed[name] = self._copied(name, value, parameter, processed=bool(plan))
        processing.process_(cfg, placed, plan)
        for name, value in placed.items():
            self._set_parameter(name, value)
        return bool(kept)

    def _parameter(self, name: str) -> Tensor | None:
        module, attribute = self._owners.get(name, (None, ""))
        return None if module is None else module.get_parameter(attribute)

    def _copied(self, name: str, value: Tensor, parameter: Tensor | None, *, processed: bool) -> Tensor:
        """Return a copy on the model's device; in float32 or better for processing, which low precision would round."""
        if parameter is None:
            return value.to(self.device, self._precise, copy=True)
        if not processed and _usable_in_place(name, value):
            # BLAS can use the checkpoint's memory order in place, so it is kept.
            return value.to(self.device, parameter.dtype, copy=True)
        dtype = self._precise if processed else parameter.dtype
        return torch.empty_like(parameter, device=self.device, dtype=dtype).copy_(value)

    @property
    def _precise(self) -> torch.dtype:
        return torch.promote_types(self.dtype, torch.float32)

    def _set_parameter(self, name: str, value: Tensor) -> None:
        if name not in self._owners:
            return
        module, attribute = self._owners[name]
        parameter = module.get_parameter(attribute)
        setattr(module, attribute, nn.Parameter(value.to(parameter.dtype), requires_grad=parameter.requires_grad))


def _usable_in_place(name: str, value: Tensor) -> bool:
    """Return whether the model can use a tensor in its present memory order."""
    repeats = any(stride == 0 and size > 1 for stride, size in zip(value.stride(), value.shape, strict=True))
    # BLAS uses a matrix in place only if one of its last two strides is 1; otherwise PyTorch copies it on every call.
    scattered = value.ndim > 1 and 1 not in value.stride()[-2:]
    by_head = ".attn.W_" in name and value.ndim == 3
    return not repeats and not scattered and (not by_head or _heads_are_one_matrix(name, value))


def _heads_are_one_matrix(name: str, value: Tensor) -> bool:
    """Return whether the heads of a projection can be viewed as one matrix without a copy.

    The view merges the head axis with `d_head`, the middle axis of W_O and the last axis of every other.
    """
    inner = 1 if name.endswith("W_O") else 2
    return value.shape[0] == 1 or value.stride(0) == value.shape[inner] * value.stride(inner)
