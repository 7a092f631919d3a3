"""GPT-2 and Llama."""

from __future__ import annotations

from typing import Any

from tests.family_rows.row import Row

GPT2: dict[str, Any] = {"n_layer": 3, "n_embd": 24, "n_head": 4, "n_positions": 32}

LLAMA: dict[str, Any] = {
    "hidden_size": 24,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "intermediate_size": 40,
    "max_position_embeddings": 32,
    "tie_word_embeddings": False,
}

LLAMA3_SCALING = {
    "rope_type": "llama3",
    "rope_theta": 100.0,
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 2.0,
    "original_max_position_embeddings": 16,
}

ROWS = (
    Row("gpt2", "GPT2LMHeadModel", "GPT2Config", GPT2, float64=True),
    Row(
        "gpt2-scaled-by-layer-untied",
        "GPT2LMHeadModel",
        "GPT2Config",
        {**GPT2, "scale_attn_by_inverse_layer_idx": True, "n_inner": 40, "tie_word_embeddings": False},
        float64=True,
        features={"layer": {"scale_attn_by_inverse_layer_idx": False}},
    ),
    Row("llama", "LlamaForCausalLM", "LlamaConfig", LLAMA),
    Row(
        "llama-biases-tied",
        "LlamaForCausalLM",
        "LlamaConfig",
        {**LLAMA, "attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True},
    ),
    Row(
        "llama-linear",
        "LlamaForCausalLM",
        "LlamaConfig",
        {**LLAMA, "rope_parameters": {"rope_type": "linear", "rope_theta": 100.0, "factor": 3.0}},
        features={"scaling": {"rope_parameters": {"rope_type": "default", "rope_theta": 100.0}}},
    ),
    Row(
        "llama-llama3",
        "LlamaForCausalLM",
        "LlamaConfig",
        {**LLAMA, "rope_parameters": LLAMA3_SCALING},
        pos=24,
        features={"scaling": {"rope_parameters": {"rope_type": "default", "rope_theta": 100.0}}},
    ),
    Row(
        "llama-dynamic",
        "LlamaForCausalLM",
        "LlamaConfig",
        {
            **LLAMA,
            "max_position_embeddings": 8,
            "rope_parameters": {"rope_type": "dynamic", "rope_theta": 100.0, "factor": 3.0},
        },
        pos=20,
        features={"scaling": {"rope_parameters": {"rope_type": "default", "rope_theta": 100.0}}},
    ),
    Row(
        "llama-yarn",
        "LlamaForCausalLM",
        "LlamaConfig",
        {
            **LLAMA,
            "rope_parameters": {
                "rope_type": "yarn",
                "rope_theta": 100.0,
                "factor": 4.0,
                "beta_fast": 2.0,
                "beta_slow": 0.5,
                "original_max_position_embeddings": 8,
            },
        },
        pos=24,
        features={"scaling": {"rope_parameters": {"rope_type": "default", "rope_theta": 100.0}}},
    ),
)
