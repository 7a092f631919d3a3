"""Lazy caches beside full ones."""

from __future__ import annotations

from typing import Any

import torch

from hooked_lm import ActivationCache, HookedTransformer
from tests.helpers import tiny_tokens

TOKENS = tiny_tokens()


def both(model: HookedTransformer, *args: Any, **kwargs: Any) -> tuple[ActivationCache, ActivationCache]:
    """The full and the lazy cache of two runs that draw the same random numbers."""
    torch.manual_seed(0)
    output, full = model.run_with_cache(*args, **kwargs)
    torch.manual_seed(0)
    again, lazy = model.run_with_cache(*args, lazy=True, **kwargs)
    if output is not None:
        torch.testing.assert_close(again, output, rtol=0, atol=1e-10)
    return full, lazy


def assert_same(lazy: ActivationCache, full: ActivationCache) -> None:
    assert set(lazy) == set(full)
    assert len(lazy) == len(full)
    for name, expected in full.items():
        assert name in lazy
        torch.testing.assert_close(lazy[name], expected.detach(), rtol=0, atol=1e-10, msg=lambda m, n=name: f"{n}: {m}")
