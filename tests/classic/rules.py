"""Configs, parameters and tokens by rule: both libraries make the same ones, and nothing has to be stored for them."""

from __future__ import annotations

import math
import zlib
from typing import Any

import numpy as np
import torch
from torch import Tensor

BASE: dict[str, Any] = {
    "n_layers": 2,
    "d_model": 8,
    "n_ctx": 12,
    "d_head": 4,
    "n_heads": 2,
    "d_mlp": 12,
    "d_vocab": 11,
    "act_fn": "gelu",
    "normalization_type": "LN",
    "seed": 0,
    "device": "cpu",
}
ROTARY: dict[str, Any] = {"positional_embedding_type": "rotary"}
GROUPED: dict[str, Any] = {"n_heads": 4, "n_key_value_heads": 2}
LOCAL: dict[str, Any] = {"use_local_attn": True, "window_size": 3, "attn_types": ["global", "local"]}
EXPERTS: dict[str, Any] = {
    "normalization_type": "RMS",
    "num_experts": 4,
    "experts_per_token": 2,
    "gated_mlp": True,
    "act_fn": "silu",
    "norm_topk_prob": True,
}
NTK: dict[str, Any] = {
    "use_NTK_by_parts_rope": True,
    "NTK_by_parts_factor": 4.0,
    "NTK_by_parts_low_freq_factor": 1.0,
    "NTK_by_parts_high_freq_factor": 4.0,
    "NTK_original_ctx_len": 64,
}

# What differs from BASE in each config.
CONFIGS: dict[str, dict[str, Any]] = {
    "plain": {},
    "attn_only": {"attn_only": True},
    "attn_only_bare": {"attn_only": True, "normalization_type": None},
    "ln_pre": {"normalization_type": "LNPre"},
    "rms": {"normalization_type": "RMS", "eps": 1e-2},
    "rms_pre": {"normalization_type": "RMSPre"},
    "no_norm": {"normalization_type": None, "act_fn": "relu"},
    "rotary": ROTARY,
    "rotary_part": {**ROTARY, "rotary_dim": 2, "rotary_base": 100.0},
    "rotary_adjacent": {**ROTARY, "rotary_adjacent_pairs": True, "rotary_base": 50.0},
    "rotary_ntk": {**ROTARY, **NTK},
    "rotary_scaled": {**ROTARY, "rotary_scaling_factor": 3.0},
    "alibi": {"positional_embedding_type": "alibi"},
    "shortformer": {"positional_embedding_type": "shortformer"},
    "gated": {"gated_mlp": True, "act_fn": "silu"},
    "parallel": {"parallel_attn_mlp": True, "act_fn": "gelu_new"},
    "gpt_j": {**ROTARY, "rotary_dim": 2, "rotary_adjacent_pairs": True, "parallel_attn_mlp": True},
    "local": LOCAL,
    "grouped": GROUPED,
    "grouped_rotary": {**GROUPED, **ROTARY, "normalization_type": "RMS"},
    "ungrouped": {**GROUPED, "ungroup_grouped_query_attention": True},
    "experts": EXPERTS,
    "soft_caps": {"attn_scores_soft_cap": 1.5, "output_logits_soft_cap": 2.0},
    "inverse_layer": {"scale_attn_by_inverse_layer_idx": True},
    "qk_norm": {**ROTARY, "normalization_type": "RMS", "use_qk_norm": True},
    "both_sides": {"normalization_type": "RMS", "use_normalization_before_and_after": True},
    "bidirectional": {"attention_dir": "bidirectional"},
    "no_scale": {"use_attn_scale": False},
    "own_scale": {"attn_scale": 3.0},
    "solu_ln": {"act_fn": "solu_ln"},
    "solu_ln_pre": {"act_fn": "solu_ln", "normalization_type": "LNPre"},
    "final_rms": {"final_rms": True},
    "vocab_out": {"d_vocab_out": 5},
    "embedding_norm": {"post_embedding_ln": True, "positional_embedding_type": "alibi"},
    "wide_heads": {"d_head": 6, "n_heads": 3, "n_layers": 3, "act_fn": "gelu_fast"},
    "llama": {**GROUPED, **ROTARY, "normalization_type": "RMS", "gated_mlp": True, "act_fn": "silu"},
    "gemma": {
        **GROUPED,
        **ROTARY,
        **LOCAL,
        "normalization_type": "RMS",
        "gated_mlp": True,
        "act_fn": "gelu_new",
        "use_normalization_before_and_after": True,
        "attn_scores_soft_cap": 2.0,
        "output_logits_soft_cap": 3.0,
    },
    "clipped": {"clip_qkv": 0.8, "normalization_type": "RMS"},
}
# Their texts are read by the tokenizer of `tokenizers.py`, whose vocabulary is larger.
TEXT: dict[str, Any] = {"n_ctx": 24, "d_vocab": 40}
TEXT_CONFIGS = tuple(
    f"text_{name}"
    for name in (
        *(
            "plain",
            "rotary",
            "alibi",
            "shortformer",
            "grouped",
            "grouped_rotary",
            "local",
            "gemma",
            "llama",
            "parallel",
        ),
        *("gpt_j", "attn_only", "vocab_out"),
    )
)


def config_fields(config: str) -> dict[str, Any]:
    """Return the keyword arguments of `HookedTransformerConfig` for one of the configs; `text_X` is X for texts."""
    name = config.removeprefix("text_")
    return {**BASE, **CONFIGS[name], **(TEXT if name != config else {})}


def numbers(name: str, shape: tuple[int, ...]) -> Tensor:
    """Return the numbers that belong to a name: uniform, with standard deviation 1, in float32.

    Raw bits of PCG64 are the same in every release of NumPy, which its distributions are not.
    """
    raw = np.random.PCG64(zlib.crc32(name.encode())).random_raw(math.prod(shape))
    uniform = (raw >> np.uint64(11)).astype(np.float64) / 2**53
    return torch.from_numpy(((2 * uniform - 1) * math.sqrt(3)).astype(np.float32).reshape(shape))


def parameter(name: str, shape: tuple[int, ...]) -> Tensor:
    """Return the value of a parameter: every one random, gains of norms around one."""
    last = name.split(".")[-1]
    if last == "w":
        return 1 + 0.3 * numbers(name, shape)
    return (0.3 if last.startswith("b") else 0.5) * numbers(name, shape)


def state(shapes: dict[str, list[int]], gated: bool = False) -> dict[str, Tensor]:
    """Return values for parameters by their names there.

    The bias `b_in` of a gated MLP is zero: the two libraries add it at different places, which a test of its own holds.
    """
    values = {name: parameter(name, tuple(shape)) for name, shape in shapes.items()}
    if gated:
        values = {name: torch.zeros_like(v) if name.endswith("mlp.b_in") else v for name, v in values.items()}
    return values


def tokens(batch: int, pos: int, vocab: int = BASE["d_vocab"], name: str = "tokens") -> Tensor:
    """Return integers [batch pos] below `vocab`."""
    raw = np.random.PCG64(zlib.crc32(name.encode())).random_raw(batch * pos)
    return torch.from_numpy((raw % np.uint64(vocab)).astype(np.int64).reshape(batch, pos))
