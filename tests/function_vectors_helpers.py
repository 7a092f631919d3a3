"""Models and vectors for the tests of function vectors."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from hooked_lm import HookedTransformer, Intervention
from tests.helpers import tiny_tokens

TASK, CORRUPTED, ZERO_SHOT = tiny_tokens(5, 6, seed=1), tiny_tokens(3, 7, seed=2), tiny_tokens(4, 3, seed=3)
QUIET: dict[str, Any] = {"verbose": False}
EXACT: dict[str, Any] = {"atol": 1e-10, "rtol": 0.0}

MODELS: dict[str, dict[str, Any]] = {
    "plain": {},
    "grouped and gated": {"n_key_value_heads": 1, "gated_mlp": True, "normalization_type": "RMS"},
    "parallel rotary": {"parallel_attn_mlp": True, "positional_embedding_type": "rotary"},
    "attention only": {"attn_only": True},
    "norms on what is written": {"norm_placement": "before_and_after"},
    "norms on the stream": {"norm_placement": "residual"},
    "bidirectional": {"attention_dir": "bidirectional"},
}
every_model = pytest.mark.parametrize("kind", list(MODELS))


def last_logits(model: HookedTransformer, tokens: Tensor, *edits: Intervention, **kwargs: Any) -> Tensor:
    """The logits of a plain run at the last position, [batch vocab]."""
    with torch.no_grad():
        return model.run(tokens, interventions=edits, **kwargs)[:, -1]


def random_vector(*shape: int, seed: int = 6) -> Tensor:
    return torch.randn(*shape or (12,), generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
