"""Weights and inputs that follow from names, shapes and places, so that two libraries can be given the same ones."""

from __future__ import annotations

import zlib
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor


def weights_of(shapes: Mapping[str, Sequence[int]], gated: bool) -> dict[str, Tensor]:
    """Return a float64 weight for every name; zeros for `b_in` of a gated MLP, which the libraries add differently."""
    weights = {}
    for name, shape in shapes.items():
        count = torch.Size(shape).numel()
        values = 0.3 * torch.sin(1.7 * torch.arange(count, dtype=torch.float64) + zlib.crc32(name.encode()) % 1000)
        values = values + 1.0 if name.endswith((".w", "ln.w")) else values
        values = torch.zeros_like(values) if gated and name.endswith("mlp.b_in") else values
        weights[name] = values.reshape(list(shape))
    return weights


def tokens_of(batch: int, pos: int, vocab: int) -> Tensor:
    """Return tokens [batch pos] that follow from their place."""
    return (torch.arange(batch * pos).reshape(batch, pos) * 7 + 3) % vocab


def activations_of(*shape: int) -> Tensor:
    """Return an activation of this shape that follows from its places."""
    return torch.cos(2.3 * torch.arange(torch.Size(shape).numel(), dtype=torch.float64)).reshape(shape)


def fingerprint(x: Tensor) -> dict[str, list[float]]:
    """Return the shape of a tensor and its products with four directions, by which two tensors are compared."""
    flat, place = x.detach().double().flatten(), torch.arange(x.numel(), dtype=torch.float64)
    return {"shape": list(x.shape), "along": [float(flat @ torch.sin(0.9 * k * place + k)) for k in range(1, 5)]}
