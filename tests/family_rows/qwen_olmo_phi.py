"""Qwen2, Qwen3, Phi-3, OLMo in three generations, SmolLM3."""

from __future__ import annotations

from typing import Any

from tests.family_rows.base import LLAMA
from tests.family_rows.row import Row

WINDOW = {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 1}
NO_WINDOW = {"window": {"use_sliding_window": False}}
HEADLESS = {name: value for name, value in LLAMA.items() if name != "head_dim"}
OLMO = {**HEADLESS, "attention_bias": True}
LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 100.0,
    "partial_rotary_factor": 2 / 3,
    "short_factor": [1.0, 1.5],
    "long_factor": [2.0, 6.0],
}
YARN = {
    "rope_type": "yarn",
    "rope_theta": 100.0,
    "factor": 4.0,
    "beta_fast": 2.0,
    "beta_slow": 0.5,
    "original_max_position_embeddings": 8,
}
PLAIN = {"rope_type": "default", "rope_theta": 100.0}


def longrope(original: int) -> dict[str, Any]:
    """A Phi-3 whose long factors come in beyond so many positions."""
    return {
        **HEADLESS,
        "original_max_position_embeddings": original,
        "rope_parameters": {**LONGROPE, "original_max_position_embeddings": original},
    }


ROWS = (
    Row("qwen2", "Qwen2ForCausalLM", "Qwen2Config", HEADLESS),
    Row(
        "qwen2-windows-tied",
        "Qwen2ForCausalLM",
        "Qwen2Config",
        {**HEADLESS, **WINDOW, "tie_word_embeddings": True},
        features=NO_WINDOW,
    ),
    Row("qwen3", "Qwen3ForCausalLM", "Qwen3Config", LLAMA),
    Row(
        "qwen3-windows-biases-tied",
        "Qwen3ForCausalLM",
        "Qwen3Config",
        {**LLAMA, **WINDOW, "attention_bias": True, "tie_word_embeddings": True},
        features=NO_WINDOW,
    ),
    Row("phi3", "Phi3ForCausalLM", "Phi3Config", HEADLESS),
    Row(
        "phi3-window-tied",
        "Phi3ForCausalLM",
        "Phi3Config",
        {**HEADLESS, "sliding_window": 5, "tie_word_embeddings": True},
        features={"window": {"sliding_window": None}},
    ),
    Row(
        "phi3-longrope-long",
        "Phi3ForCausalLM",
        "Phi3Config",
        longrope(8),
        features={"long factors": longrope(16)},
    ),
    Row("phi3-longrope-short", "Phi3ForCausalLM", "Phi3Config", longrope(16), features={"short factors": longrope(8)}),
    Row("olmo", "OlmoForCausalLM", "OlmoConfig", HEADLESS),
    Row(
        "olmo-clipped-biases-tied",
        "OlmoForCausalLM",
        "OlmoConfig",
        {**OLMO, "clip_qkv": 0.8, "tie_word_embeddings": True},
        features={"clip": {"clip_qkv": None}},
    ),
    Row("olmo2", "Olmo2ForCausalLM", "Olmo2Config", HEADLESS),
    Row("olmo2-biases-tied", "Olmo2ForCausalLM", "Olmo2Config", {**OLMO, "tie_word_embeddings": True}),
    Row(
        "olmo3",
        "Olmo3ForCausalLM",
        "Olmo3Config",
        {
            **HEADLESS,
            "num_hidden_layers": 4,
            "sliding_window": 5,
            "rope_parameters": {"full_attention": YARN, "sliding_attention": PLAIN},
        },
        pos=16,
        features={
            "window": {"sliding_window": 32},
            "scaling": {"rope_parameters": {"full_attention": PLAIN, "sliding_attention": PLAIN}},
        },
    ),
    Row(
        "olmo3-biases-tied",
        "Olmo3ForCausalLM",
        "Olmo3Config",
        {**OLMO, "num_hidden_layers": 4, "sliding_window": 5, "tie_word_embeddings": True},
    ),
    Row(
        "smollm3",
        "SmolLM3ForCausalLM",
        "SmolLM3Config",
        {**HEADLESS, "no_rope_layers": [1, 0, 1], "tie_word_embeddings": True},
        features={"unrotated": {"no_rope_layers": [1, 1, 1]}},
    ),
    Row(
        "smollm3-windows-biases",
        "SmolLM3ForCausalLM",
        "SmolLM3Config",
        {
            **HEADLESS,
            "no_rope_layers": [1, 0, 1],
            "use_sliding_window": True,
            "sliding_window": 5,
            "attention_bias": True,
            "mlp_bias": True,
        },
        features={"window": {"use_sliding_window": False}},
    ),
)
