"""Runs whose caches are taken apart."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from hooked_lm import ActivationCache, HookedTransformer
from tests.helpers import tiny_model, tiny_tokens

TOKENS = tiny_tokens()
BATCH, POS = TOKENS.shape
EXACT: dict[str, float] = {"rtol": 0, "atol": 1e-10}

MODELS: dict[str, dict[str, Any]] = {
    "LN": {"n_layers": 3},
    "LNPre": {"normalization_type": "LNPre"},
    "RMS": {"normalization_type": "RMS", "positional_embedding_type": "rotary", "gated_mlp": True, "act_fn": "silu"},
    "RMSPre": {"normalization_type": "RMSPre", "n_key_value_heads": 1},
    "attention only": {"attn_only": True},
    "parallel": {"parallel_attn_mlp": True},
    "shortformer": {"positional_embedding_type": "shortformer"},
    "no norms": {"normalization_type": None},
}
every_model = pytest.mark.parametrize("name", MODELS)


def run(name: str = "LN") -> tuple[HookedTransformer, Tensor, ActivationCache]:
    model = tiny_model(**MODELS[name])
    with torch.no_grad():
        logits, cache = model.run_with_cache(TOKENS)
    return model, logits, cache


def norm_without_bias(x: Tensor, scale: Tensor, norm: Any) -> Tensor:
    """The linear part of a norm whose scale is known."""
    if norm.centred:
        x = x - x.mean(-1, keepdim=True)
    return x / scale if norm.w is None else x / scale * norm.w
