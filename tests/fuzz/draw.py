"""Random architectures with random weights, and random prompts."""

from __future__ import annotations

import random
from typing import Any

import torch

from hooked_lm import HookedTransformer, HookedTransformerConfig
from tests.fuzz.batch import Batch
from tests.fuzz.reference import ACTIVATIONS
from tests.helpers import randomise_

N_CTX = 16


def draw_model(rng: random.Random) -> HookedTransformer:
    """Return a small model in float64 with every parameter random; fields that do not go together are drawn again."""
    while True:
        fields = draw_fields(rng)
        try:
            config = HookedTransformerConfig(**fields)
        except ValueError:
            continue
        model = HookedTransformer(config)
        randomise_(model, seed=rng.randrange(2**31), std=rng.choice([0.2, 0.4]))
        return model


def draw_fields(rng: random.Random) -> dict[str, Any]:
    """Return the fields of a config, some of which may not go together."""
    n_layers, n_heads = rng.randint(1, 3), rng.choice([1, 2, 3, 4])
    d_vocab = rng.randint(8, 14)
    fields: dict[str, Any] = {
        "n_layers": n_layers,
        "n_heads": n_heads,
        "d_head": rng.choice([2, 4, 6]),
        "d_model": rng.choice([6, 8, 12]),
        "n_ctx": N_CTX,
        "d_vocab": d_vocab,
        "d_mlp": rng.choice([5, 8, 16]),
        "act_fn": rng.choice([*ACTIVATIONS, "xielu"]),
        "dtype": torch.float64,
        "seed": 0,
        "normalization_type": rng.choice(["LN", "LN", "LNPre", "RMS", "RMS", "RMSPre", None]),
        "eps": rng.choice([1e-5, 1e-2]),
    }
    fields |= draw_attention(rng, n_heads, n_layers) | draw_positions(rng, fields["d_head"], n_layers)
    if rng.random() < 0.2:
        fields |= draw_latents(rng)
    sometimes = {
        "attn_only": True,
        "gated_mlp": True,
        "parallel_attn_mlp": True,
        "final_rms": True,
        "final_norm": False,
        "first_norm": False,
        "unembed_act_fn": rng.choice(["relu", "silu"]),
        "norm_placement": rng.choice(["before_and_after", "after", "residual"]),
        "post_embedding_ln": True,
        "embedding_scale": 2.5,
        "logit_scale": 0.4,
        "output_logits_soft_cap": 3.0,
        "tie_word_embeddings": True,
        "d_vocab_out": d_vocab + 3,
    }
    fields |= {name: value for name, value in sometimes.items() if rng.random() < 0.18}
    if rng.random() < 0.25:
        fields |= draw_experts(rng, n_layers)
    return fields


def draw_attention(rng: random.Random, n_heads: int, n_layers: int) -> dict[str, Any]:
    sometimes = {
        "n_key_value_heads": rng.choice([one for one in range(1, n_heads + 1) if n_heads % one == 0]),
        "use_attn_scale": False,
        "attn_scale": 3.0,
        "scale_attn_by_inverse_layer_idx": True,
        "attn_scores_soft_cap": 1.5,
        "clip_qkv": 0.7,
        "attention_sinks": True,
        "attention_gate": True,
        "attention_dir": "bidirectional",
    }
    fields = {name: value for name, value in sometimes.items() if rng.random() < 0.2}
    if rng.random() < 0.25:
        kinds = [rng.choice(["local", "global"]) for _ in range(n_layers)]
        fields |= {"window_size": rng.randint(1, 4), "use_local_attn": True, "attn_types": kinds}
    if rng.random() < 0.2:
        fields |= {"query_scale_beta": 0.8, "query_scale_ctx_len": rng.randint(1, 4)}
    if rng.random() < 0.25:
        fields |= {"use_qk_norm": True, "qk_norm_type": rng.choice(["RMS", "RMSPre", "LN"])}
        for name in ("qk_norm_across_heads", "qk_norm_per_head_gains", "qk_norm_after_rotary"):
            fields[name] = rng.random() < 0.3
    return fields


def draw_latents(rng: random.Random) -> dict[str, Any]:
    """Latent attention, without what does not go with it."""
    d_head = rng.choice([4, 6])
    return {
        "d_head": d_head,
        "n_key_value_heads": None,
        "use_qk_norm": False,
        "qk_norm_across_heads": False,
        "qk_norm_per_head_gains": False,
        "qk_norm_after_rotary": False,
        "clip_qkv": None,
        "attention_gate": False,
        "positional_embedding_type": "rotary",
        "rotary_dim": rng.choice([2, d_head - 2]),
        "d_latent_kv": rng.choice([3, 5]),
        "d_latent_q": rng.choice([None, 4]),
        "d_value": rng.choice([None, 3, 7]),
    }


def draw_positions(rng: random.Random, d_head: int, n_layers: int) -> dict[str, Any]:
    kind = rng.choice(["standard", "standard", "rotary", "rotary", "alibi", "shortformer", "none"])
    fields: dict[str, Any] = {"positional_embedding_type": kind}
    if kind == "alibi" and rng.random() < 0.3:
        fields["alibi_scale"] = 0.5
    if kind != "rotary":
        return fields
    fields |= {
        "rotary_dim": rng.choice([d_head, d_head - d_head % 4 or d_head]),
        "rotary_base": rng.choice([100.0, 10000.0]),
        "rotary_adjacent_pairs": rng.random() < 0.5,
    }
    scalings: list[dict[str, Any]] = [
        {"rotary_scaling_factor": 2.0},
        {"use_dynamic_rope": True, "dynamic_rope_factor": 3.0, "dynamic_rope_original_ctx_len": 6},
        {
            "use_longrope": True,
            "longrope_short_factors": [1.0 + 0.5 * pair for pair in range(fields["rotary_dim"] // 2)],
            "longrope_long_factors": [3.0 + pair for pair in range(fields["rotary_dim"] // 2)],
            "longrope_attention_factor": 1.2,
            "longrope_original_ctx_len": 6,
        },
        {"rotary_layers": [rng.random() < 0.5 for _ in range(n_layers)]},
        {"rotary_base_local": 50.0},
    ]
    return fields | (rng.choice(scalings) if rng.random() < 0.5 else {})


def draw_experts(rng: random.Random, n_layers: int) -> dict[str, Any]:
    fields: dict[str, Any] = {"num_experts": rng.randint(2, 4), "experts_per_token": rng.randint(1, 2)}
    sometimes = {
        "d_expert": 7,
        "norm_topk_prob": False,
        "moe_layers": [rng.random() < 0.6 for _ in range(n_layers)],
        "gated_limit": 0.8,
        "identity_experts": 1,
        "shortcut_experts": True,
    }
    fields |= {name: value for name, value in sometimes.items() if rng.random() < 0.3}
    if rng.random() < 0.5:
        fields |= draw_router(rng)
    if rng.random() < 0.4:
        fields |= {"d_shared_expert": 6, "shared_expert_gate": rng.random() < 0.5}
    return fields


def draw_router(rng: random.Random) -> dict[str, Any]:
    n_experts, chosen_groups = rng.choice([4, 6]), rng.randint(1, 2)
    fields: dict[str, Any] = {
        "num_experts": n_experts,
        "router_scores": rng.choice(["sigmoid", "softmax"]),
        "router_correction": rng.random() < 0.7,
        "routed_scale": rng.choice([1.0, 1.7]),
        "norm_topk_min": rng.choice([0.0, 0.6]),
    }
    if rng.random() < 0.6:
        fields |= {
            "expert_groups": n_experts // 2,
            "expert_groups_per_token": chosen_groups,
            "expert_group_score": rng.choice(["max", "top2"]),
        }
    return fields


def draw_batch(
    rng: random.Random, d_vocab: int, *, longest: int = 9, left_only: bool = False, alone: float = 0.6
) -> Batch:
    """Return one to three prompts, padded on one side or not.

    Args:
        d_vocab: tokens are below it.
        longest: at most so many tokens.
        left_only: padding is on the left.
        alone: how often there is no padding.
    """
    n_prompts, length = rng.randint(1, 3), rng.randint(1, longest)
    tokens = torch.tensor([[rng.randrange(d_vocab) for _ in range(length)] for _ in range(n_prompts)])
    if length == 1 or rng.random() < alone:
        return Batch(tokens, (0,) * n_prompts, (length,) * n_prompts)
    lengths = [rng.randint(1, length) for _ in range(n_prompts)]
    lengths[rng.randrange(n_prompts)] = length
    if left_only or rng.random() < 0.5:
        return Batch(tokens, tuple(length - one for one in lengths), (length,) * n_prompts)
    return Batch(tokens, (0,) * n_prompts, tuple(lengths))
