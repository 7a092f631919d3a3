"""Models whose logits are attributed."""

from __future__ import annotations

from typing import Any

from hooked_lm import ActivationCache, HookedTransformer
from hooked_lm.circuits.direct_logit import LogitAttribution, logit_attribution
from tests.architectures_helpers import LATENT
from tests.helpers import tiny_tokens

BATCH, POS = 2, 5
SPLITS = ("component", "head", "neuron", "source")
MODELS: dict[str, dict[str, Any]] = {
    "layer norm": {},
    "folded": {"normalization_type": "LNPre"},
    "RMS norm, gated, grouped, rotary": {
        "normalization_type": "RMS",
        "gated_mlp": True,
        "positional_embedding_type": "rotary",
        "n_heads": 6,
        "d_head": 4,
        "n_key_value_heads": 2,
    },
    "norms before and after": {"norm_placement": "before_and_after"},
    "RMS norms after": {"norm_placement": "after", "normalization_type": "RMS"},
    "norms on the stream": {"norm_placement": "residual"},
    "norms on the stream, attention-only": {"norm_placement": "residual", "attn_only": True, "final_norm": False},
    "parallel, scaled logits": {"parallel_attn_mlp": True, "logit_scale": 0.3},
    "soft-capped logits": {"output_logits_soft_cap": 1.5, "logit_scale": 0.7},
    "no norm": {"normalization_type": None},
    "an RMS norm at the end": {"final_rms": True},
    "shortformer": {"positional_embedding_type": "shortformer"},
    "scaled and normalised embeddings": {"embedding_scale": 3.0, "post_embedding_ln": True},
    "tied": {"tie_word_embeddings": True},
    "attention sinks, a window": {"attention_sinks": True, "window_size": 3},
    "mixture of experts": {"num_experts": 4, "experts_per_token": 2},
    "gated attention": {"attention_gate": True, "norm_placement": "before_and_after"},
    "experts from block to block": {
        "shortcut_experts": True,
        "num_experts": 3,
        "identity_experts": 1,
        "experts_per_token": 2,
    },
    "latent attention": {**LATENT, "normalization_type": "RMS"},
    "normalised activations": {"act_fn": "solu_ln"},
}


def splits_of(model: HookedTransformer) -> list[str]:
    without_neurons = model.cfg.attn_only or model.cfg.num_experts is not None
    return [split for split in SPLITS if split != "neuron" or not without_neurons]


def recorded(model: HookedTransformer, pos: int = 7) -> ActivationCache:
    return model.run_with_cache(tiny_tokens(batch=BATCH, pos=pos))[1]


def attributed(cache: ActivationCache, split: str, **changes: Any) -> LogitAttribution:
    call = {"tokens": 3, "incorrect_tokens": 8, "pos": POS, "before_soft_cap": True, **changes}
    return logit_attribution(cache, split=split, **call)
