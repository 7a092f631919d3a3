"""What differs between the configs and the parameters of two models."""

from __future__ import annotations

import torch
from torch import Tensor

from hooked_lm.comparison.result import ConfigDifference, WeightDifference
from hooked_lm.hooked_model import HookedModel

__all__ = ["compare_configs", "compare_weights"]

# Names and places, which no activation depends on.
_NOT_COMPUTED_WITH = frozenset({"device", "model_name", "tokenizer_name", "seed", "from_checkpoint"})
# Entries that are compared at a time.
_CHUNK = 2**24


def compare_configs(a: HookedModel, b: HookedModel) -> list[ConfigDifference]:
    """Return the fields of the configs that differ, but for names and devices.

    Args:
        a, b: the models.
    """
    one, other = a.cfg.to_dict(), b.cfg.to_dict()
    names = [name for name in dict.fromkeys([*one, *other]) if name not in _NOT_COMPUTED_WITH]
    return [
        ConfigDifference(name, repr(one.get(name)), repr(other.get(name)))
        for name in names
        if repr(one.get(name)) != repr(other.get(name))
    ]


def compare_weights(a: HookedModel, b: HookedModel) -> tuple[list[WeightDifference], int]:
    """Return the parameters that differ, and how many there are in both models together.

    Args:
        a, b: the models; on any devices and of any dtypes.
    """
    one, other = dict(a.named_parameters()), dict(b.named_parameters())
    names = list(dict.fromkeys([*one, *other]))
    found = []
    for name in names:
        if name not in other or name not in one:
            kind = "only in a" if name in one else "only in b"
            found.append(WeightDifference(name, kind, (one if name in one else other)[name].numel()))
        elif one[name].shape != other[name].shape:
            found.append(WeightDifference(name, "shape", one[name].numel()))
        elif one[name] is not other[name] and (difference := _difference(name, one[name], other[name])) is not None:
            found.append(difference)
    return found, len(names)


@torch.no_grad()
def _difference(name: str, a: Tensor, b: Tensor) -> WeightDifference | None:
    """The difference of two parameters; None if every entry is equal. Chunk by chunk, so it takes little memory."""
    first, second = a.detach().reshape(-1), b.detach().reshape(-1)
    differing, largest, place, scale = 0, 0.0, 0, 0.0
    for start in range(0, len(first), _CHUNK):
        x, y = (one[start : start + _CHUNK].cpu() for one in (first, second))
        scale = max(scale, float(x.abs().max()))
        apart = (x != y) & ~(x.isnan() & y.isnan())
        if not bool(apart.any()):
            continue
        differing += int(apart.sum())
        gaps = (x.double() - y.double()).abs().where(apart, 0.0).nan_to_num(nan=float("inf"))
        if float(gaps.max()) > largest:
            largest, place = float(gaps.max()), start + int(gaps.argmax())
    if not differing:
        return None
    index = tuple(int(one) for one in torch.unravel_index(torch.tensor(place), a.shape))
    return WeightDifference(name, "values", len(first), differing, largest, largest / scale if scale else None, index)
