"""What the tests of derivatives share: architectures, and differences to hold derivatives against."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from hooked_lm import HookedTransformer
from tests.architectures_helpers import LATENT
from tests.helpers import tiny_model, tiny_tokens

TOKENS = tiny_tokens(batch=3, pos=6)
# Padded on the left, on the right, and not at all.
MASK = torch.tensor([[0, 0, 1, 1, 1, 1], [1, 1, 1, 1, 1, 0], [1, 1, 1, 1, 1, 1]])

GATED: dict[str, Any] = {"normalization_type": "RMS", "gated_mlp": True, "act_fn": "silu"}
ROTARY: dict[str, Any] = {"positional_embedding_type": "rotary", "rotary_base": 100.0}
ARCHITECTURES: dict[str, dict[str, Any]] = {
    "layer-norm": {},
    "rotary, grouped queries, gated": {**GATED, **ROTARY, "n_key_value_heads": 2},
    "alibi": {"positional_embedding_type": "alibi"},
    "alibi, grouped queries": {"positional_embedding_type": "alibi", "n_key_value_heads": 2},
    "window": {"use_local_attn": True, "window_size": 2, "attn_types": ["local", "global"]},
    "latent attention": LATENT,
    "experts": {**GATED, **ROTARY, "num_experts": 3, "experts_per_token": 2, "norm_topk_prob": True},
    "soft caps": {**GATED, "attn_scores_soft_cap": 2.0, "output_logits_soft_cap": 3.0},
    "sinks": {"attention_sinks": True},
    "experts from block to block": {
        "shortcut_experts": True,
        "num_experts": 3,
        "identity_experts": 1,
        "experts_per_token": 2,
    },
    "a layer before the unembedding, no first norm": {"unembed_act_fn": "silu", "first_norm": False},
    "gated attention": {**ROTARY, "attention_gate": True, "n_key_value_heads": 2},
    "norm of queries and keys": {**GATED, **ROTARY, "use_qk_norm": True},
    "tied": {"tie_word_embeddings": True},
    "bidirectional": {"attention_dir": "bidirectional"},
    "parallel": {"parallel_attn_mlp": True, **ROTARY},
}


def model_of(architecture: str, **changes: Any) -> HookedTransformer:
    """A tiny model in float64, every parameter random: 2 layers, 4 heads of 4 dimensions, vocabulary 20."""
    return tiny_model(**{"d_model": 16, "n_heads": 4, **ARCHITECTURES[architecture], **changes})


def weights_of(model: HookedTransformer) -> dict[str, Tensor]:
    """The parameters as plain tensors, by name."""
    return {name: value.detach().clone() for name, value in model.named_parameters()}


def directions_of(weights: dict[str, Tensor], seed: int = 1) -> dict[str, Tensor]:
    """A random change of every parameter."""
    generator = torch.Generator().manual_seed(seed)
    return {
        name: torch.randn(value.shape, generator=generator, dtype=value.dtype) / 10 for name, value in weights.items()
    }


def slope(function: Callable[[float], Tensor], step: float = 1e-5) -> Tensor:
    """The derivative at 0 by a central difference of fourth order."""
    near, far = function(step) - function(-step), function(2 * step) - function(-2 * step)
    return (8 * near - far) / (12 * step)


def loaded(model: HookedTransformer, weights: dict[str, Tensor]) -> HookedTransformer:
    """Another model with these weights."""
    twin = HookedTransformer(model.cfg.replace())
    twin.load_state_dict(weights)
    return twin
