"""A model in a folder for workers of the same machine: its weights as they lie in memory, so that bits are the same.

Matrix products round by the order in which a matrix is stored, and a checkpoint's order need not be that of the file
formats for keeping.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import cast

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from hooked_lm.config import HookedTransformerConfig
from hooked_lm.hooked_model import HookedModel
from hooked_lm.transformer import HookedTransformer

__all__ = ["FILES", "read_model", "write_model"]

_WEIGHTS, _DESCRIPTION = FILES = ("weights.safetensors", "model.json")


def write_model(model: HookedModel, folder: str | Path) -> None:
    """Write a model to a folder.

    Args:
        model: a `HookedTransformer`.
        folder: that is there.
    """
    tensors, orders = {}, {}
    for name, one in cast(nn.Module, model).named_parameters():
        order = sorted(range(one.ndim), key=one.stride, reverse=True)
        orders[name] = order
        tensors[name] = one.detach().permute(order).cpu().contiguous()
    config = model.cfg.to_dict()
    config.update(device=None, tokenizer_name=None)
    save_file(tensors, Path(folder) / _WEIGHTS)
    described = {"config": config, "orders": orders, "processed": list(model.processed)}
    (Path(folder) / _DESCRIPTION).write_text(json.dumps(described), encoding="utf-8")


def read_model(folder: str | Path, device: str = "cpu") -> HookedTransformer:
    """Return the model of a folder that `write_model` wrote. On a CPU the weights are views of the file.

    Args:
        folder: the folder.
        device: where the model is to be.
    """
    described = json.loads((Path(folder) / _DESCRIPTION).read_text("utf-8"))
    with torch.device("meta"):
        model = HookedTransformer(
            HookedTransformerConfig.from_dict({**described["config"], "init_weights": False}), move_to_device=False
        )
    weights = {
        name: _as_stored(one, described["orders"][name])
        for name, one in load_file(Path(folder) / _WEIGHTS, device=device).items()
    }
    for path, module in model.named_modules():
        for name, old in list(module.named_parameters(recurse=False)):
            given = weights.get(f"{path}.{name}" if path else name)
            setattr(module, name, None if given is None else nn.Parameter(given, requires_grad=old.requires_grad))
    model.processed = tuple(described["processed"])
    model.cfg.set_unlocked(device=device)
    return model


def _as_stored(x: Tensor, order: list[int]) -> Tensor:
    back = [order.index(axis) for axis in range(len(order))]
    return x.permute(back)
