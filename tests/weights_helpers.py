"""A model of every kind that processing treats differently."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from hooked_lm import HookedTransformer
from tests.architectures_helpers import LATENT
from tests.helpers import tiny_model, tiny_tokens

EXACT = 1e-9

KINDS: dict[str, dict[str, Any]] = {
    "layer norm": {},
    "rms": {"normalization_type": "RMS"},
    "no norm": {"normalization_type": None},
    "gated": {"gated_mlp": True, "act_fn": "silu"},
    "gated rms": {"gated_mlp": True, "act_fn": "silu", "normalization_type": "RMS"},
    "parallel": {"parallel_attn_mlp": True},
    "attention only": {"attn_only": True, "act_fn": None},
    "attention only rms": {"attn_only": True, "act_fn": None, "normalization_type": "RMS"},
    "grouped queries": {"n_heads": 6, "d_head": 4, "n_key_value_heads": 2},
    "one key-value head": {"n_key_value_heads": 1, "normalization_type": "RMS"},
    "rotary": {"positional_embedding_type": "rotary", "rotary_dim": 2},
    "alibi": {"positional_embedding_type": "alibi"},
    "shortformer": {"positional_embedding_type": "shortformer"},
    "no positions": {"positional_embedding_type": "none"},
    "bidirectional": {"attention_dir": "bidirectional"},
    "window": {"window_size": 3},
    "solu_ln": {"act_fn": "solu_ln"},
    "solu_ln rms": {"act_fn": "solu_ln", "normalization_type": "RMS"},
    "solu_ln without norms": {"act_fn": "solu_ln", "normalization_type": None},
    "final rms": {"final_rms": True},
    "norm after the embedding": {"post_embedding_ln": True},
    "rms after the embedding": {"post_embedding_ln": True, "normalization_type": "RMS"},
    "norms before and after": {"use_normalization_before_and_after": True},
    "rms before and after": {"use_normalization_before_and_after": True, "normalization_type": "RMS"},
    "query-key norm": {"use_qk_norm": True, "normalization_type": "RMS"},
    "experts": {"num_experts": 4, "experts_per_token": 2},
    "gated rms experts": {
        "num_experts": 4,
        "experts_per_token": 2,
        "gated_mlp": True,
        "norm_topk_prob": True,
        "normalization_type": "RMS",
    },
    "soft-caps": {"attn_scores_soft_cap": 2.0, "output_logits_soft_cap": 3.0},
    "odd head size": {"d_head": 5, "n_heads": 2},
    "wide heads": {"d_head": 14, "n_heads": 2},
    "another output vocabulary": {"d_vocab_out": 7},
    "norms on what is written": {"norm_placement": "after"},
    "rms on what is written": {"norm_placement": "after", "normalization_type": "RMS"},
    "norms on the stream": {"norm_placement": "residual"},
    "norms on the stream, none at the end": {"norm_placement": "residual", "final_norm": False},
    "no final norm": {"final_norm": False},
    "no final rms": {"final_norm": False, "normalization_type": "RMS"},
    "no first norm": {"first_norm": False},
    "no first norm, positions after the norm of the embeddings": {"first_norm": False, "post_embedding_ln": True},
    "no first norm, normed embeddings": {
        "first_norm": False,
        "post_embedding_ln": True,
        "positional_embedding_type": "alibi",
    },
    "a layer before the unembedding": {"unembed_act_fn": "silu"},
    "a layer before the unembedding, rms, tied": {
        "unembed_act_fn": "relu",
        "normalization_type": "RMS",
        "tie_word_embeddings": True,
    },
    "experts from block to block": {"shortcut_experts": True, "num_experts": 4, "experts_per_token": 2},
    "experts from block to block, rms, identities": {
        "shortcut_experts": True,
        "num_experts": 4,
        "experts_per_token": 2,
        "identity_experts": 1,
        "normalization_type": "RMS",
        "gated_mlp": True,
    },
    "identities among the experts": {"num_experts": 4, "experts_per_token": 2, "identity_experts": 2},
    "clipped": {"clip_qkv": 0.5},
    "attention sinks": {"attention_sinks": True, "n_heads": 4, "n_key_value_heads": 2},
    "gated attention": {"attention_gate": True, "n_heads": 4, "n_key_value_heads": 2},
    "gated attention, plain heads": {"attention_gate": True},
    "tied": {"tie_word_embeddings": True},
    "tied, scaled": {"tie_word_embeddings": True, "embedding_scale": 3.0, "logit_scale": 0.3},
    "tied, rms after the embedding": {
        "tie_word_embeddings": True,
        "post_embedding_ln": True,
        "normalization_type": "RMS",
    },
    "query-key LN after rotary": {
        "use_qk_norm": True,
        "qk_norm_type": "LN",
        "qk_norm_after_rotary": True,
        "positional_embedding_type": "rotary",
    },
    "some layers rotate": {"positional_embedding_type": "rotary", "rotary_layers": [False, True]},
    "xielu": {"act_fn": "xielu"},
    "shared expert": {
        "num_experts": 4,
        "experts_per_token": 2,
        "gated_mlp": True,
        "act_fn": "silu",
        "d_expert": 10,
        "d_shared_expert": 7,
        "shared_expert_gate": True,
        "moe_layers": [True, False],
    },
    "corrected choice of experts": {
        "num_experts": 6,
        "experts_per_token": 2,
        "router_scores": "sigmoid",
        "router_correction": True,
        "routed_scale": 1.7,
        "expert_groups": 3,
        "expert_groups_per_token": 2,
    },
    "latent attention": {**LATENT, "normalization_type": "RMS"},
    "latent attention, LN, plain queries": {**LATENT, "d_latent_q": None},
    "sparsemixer": {"num_experts": 4, "experts_per_token": 2, "sparsemixer_jitter": 0.3},
    "experts with a limit": {
        "num_experts": 4,
        "experts_per_token": 2,
        "gated_mlp": True,
        "act_fn": "quick_gelu",
        "gated_limit": 0.4,
        "normalization_type": "RMS",
    },
}

MODELS: dict[str, HookedTransformer] = {}


def model_of(kind: str) -> HookedTransformer:
    """A random model of a kind; made once, and not to be changed."""
    if kind not in MODELS:
        MODELS[kind] = tiny_model(**KINDS[kind])
    return MODELS[kind]


def log_probabilities(model: HookedTransformer) -> Tensor:
    with torch.no_grad():
        return model(tiny_tokens()).log_softmax(-1)


def mean(value: Tensor, axis: int) -> float:
    return value.mean(axis).abs().max().item()
