"""Bytes that a model and what is computed with it take, from the config alone."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from hooked_lm.config import HookedTransformerConfig
from hooked_lm.interventions import axis_size
from hooked_lm.kv_cache import HookedTransformerKeyValueCache
from hooked_lm.names import POSITION_AXES, get_act_name
from hooked_lm.sweep.walk import key_site
from hooked_lm.transformer import HookedTransformer

__all__ = ["PRECISIONS", "MemoryUse", "memory_report", "memory_use", "readable_bytes"]

PRECISIONS: Mapping[str, torch.dtype] = {
    "float64": torch.float64,
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
}


@dataclass(frozen=True)
class MemoryUse:
    """Bytes at one precision.

    Attributes:
        weights: of all parameters; buffers, which are small, are not counted.
        cache_per_token: of the key-value cache, for one token of one prompt.
        activations: of a cache without `names_filter`, of one prompt of `length` tokens.
        patching_grid: of what a grid of `resid_pre` at every layer and position keeps of that prompt: the clean
            streams, and of the base run streams, keys and values. The cells themselves take `memory_budget`.
        length: that prompt's tokens.
    """

    weights: int
    cache_per_token: int
    activations: int
    patching_grid: int
    length: int


def memory_use(cfg: HookedTransformerConfig, dtype: torch.dtype, length: int | None = None) -> MemoryUse:
    """Return what a model of a config takes; no weight is made or read.

    Args:
        cfg: the config.
        dtype: the precision of weights and activations.
        length: tokens of the prompt whose activations are counted; by default `n_ctx`.

    Raises:
        ValueError: `length` is not from 1 to `n_ctx`, or an activation has an axis whose size the config does not tell.
    """
    length = cfg.n_ctx if length is None else length
    if not 1 <= length <= cfg.n_ctx:
        raise ValueError(f"memory_use counts a prompt of 1 to n_ctx={cfg.n_ctx} tokens; got length={length}")
    cfg = cfg.replace(dtype=dtype, device="meta", init_weights=False, tokenizer_name=None)
    # Parameters on `meta` have shapes and no memory, so each family's own constructor is what is counted.
    with torch.device("meta"):
        model = HookedTransformer(cfg)
    stored = HookedTransformerKeyValueCache.init_cache(cfg, "meta", batch_size=1, capacity=1)
    return MemoryUse(
        weights=sum(one.nbytes for one in model.parameters()),
        cache_per_token=sum(one.nbytes for entry in stored for one in entry.allocated),
        activations=dtype.itemsize * sum(_entries(model, name, length) for name in model.names_to_cache(None)),
        patching_grid=dtype.itemsize * sum(_entries(model, name, length) for name in _kept_by_a_grid(cfg)),
        length=length,
    )


def memory_report(uses: Mapping[str, MemoryUse]) -> str:
    """Return a table of bytes by precision as text.

    Args:
        uses: name of the precision -> the bytes.
    """
    length = next(iter(uses.values())).length
    head = ("precision", "weights", "cache per token", f"activations of {length:,} tokens", "patching grid of them")
    rows = [
        (name, *map(readable_bytes, (use.weights, use.cache_per_token, use.activations, use.patching_grid)))
        for name, use in uses.items()
    ]
    widths = [max(map(len, column)) for column in zip(head, *rows, strict=True)]
    return "\n".join("  " + "  ".join(map(str.rjust, row, widths)) for row in (head, *rows))


def _kept_by_a_grid(cfg: HookedTransformerConfig) -> list[str]:
    """The activations that a grid of `resid_pre` keeps; the clean streams, which are there twice, twice."""
    layers = range(cfg.n_layers)
    streams = [get_act_name("resid_pre", layer) for layer in layers]
    last = [get_act_name("resid_post", cfg.n_layers - 1)] if cfg.n_layers else []
    keys_and_values = [name for layer in layers for name in (key_site(cfg, layer), get_act_name("v", layer))]
    return [*streams, *streams, *last, *keys_and_values]


def _entries(model: HookedTransformer, name: str, length: int) -> int:
    """Return how many numbers a hook point's activation has, for one prompt."""
    count = 1
    for axis in model.hook_dict[name].axes:
        size = length if axis in POSITION_AXES else 1 if axis in ("batch", "1") else axis_size(model.cfg, name, axis)
        if size is None:
            raise ValueError(f"{name!r} has the axis {axis!r}, whose size the config does not tell")
        count *= size
    return count


def readable_bytes(n_bytes: int) -> str:
    """Return a number of bytes in the largest binary unit that leaves at least 1, to four digits.

    Args:
        n_bytes: the number.
    """
    size, units = float(n_bytes), ["B", "KiB", "MiB", "GiB", "TiB"]
    while size >= 1024 and len(units) > 1:
        size, units = size / 1024, units[1:]
    return f"{size:.4g} {units[0]}"
