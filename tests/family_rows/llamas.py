"""Families near to Llama or Granite: CWM, Ministral 3, Jais 2, HyperCLOVA X, GraniteSWA, Granite 4."""

from __future__ import annotations

from typing import Any

from tests.family_rows.base import LLAMA, LLAMA3_SCALING
from tests.family_rows.row import Row
from tests.family_rows.variants import GLOBAL_FIRST, GRANITE, LINEAR, ROTARY, UNSCALED

WINDOWS: dict[str, Any] = {**LLAMA, "num_hidden_layers": 4, "sliding_window": 4}

MINISTRAL3_SCALING: dict[str, Any] = {
    "rope_type": "yarn",
    "rope_theta": 100.0,
    "factor": 4.0,
    "beta_fast": 2.0,
    "beta_slow": 0.5,
    "mscale": 1.0,
    "mscale_all_dim": 1.0,
    # Three contexts and a half within the prompts, so that the scale takes more than two values.
    "original_max_position_embeddings": 6,
    "llama_4_scaling_beta": 0.9,
}
MINISTRAL3: dict[str, Any] = {**LLAMA, "rope_parameters": MINISTRAL3_SCALING}

SCALED: dict[str, dict[str, Any]] = {
    "attention-multiplier": {"attention_multiplier": 1.0},
    "embedding-multiplier": {"embedding_multiplier": 1.0},
    "logits-scaling": {"logits_scaling": 1.0},
    "residual-multiplier": {"residual_multiplier": 1.0},
}
# Granite's models share their multipliers, and only some take the width of a head.
NARROW: dict[str, Any] = {name: value for name, value in GRANITE.items() if name != "head_dim"}
GRANITE4: dict[str, Any] = {
    **NARROW,
    "layer_types": ["full_attention"] * 3,
    "shared_intermediate_size": 16,
    "mamba_n_heads": 4,
}

ROWS = (
    Row(
        "cwm",
        "CwmForCausalLM",
        "CwmConfig",
        {**WINDOWS, "rope_parameters": LLAMA3_SCALING},
        pos=24,
        features={
            "windows": {"layer_types": ["full_attention"] * 4},
            "scaling": {"rope_parameters": ROTARY},
        },
    ),
    Row(
        "cwm-order-biases-tied",
        "CwmForCausalLM",
        "CwmConfig",
        {
            **WINDOWS,
            "layer_types": GLOBAL_FIRST,
            "rope_parameters": ROTARY,
            "mlp_bias": True,
            "tie_word_embeddings": True,
        },
        features={"order": {"layer_types": GLOBAL_FIRST[1:] + GLOBAL_FIRST[:1]}},
    ),
    Row(
        "ministral3",
        "Ministral3ForCausalLM",
        "Ministral3Config",
        MINISTRAL3,
        pos=21,
        features={
            "query-scale": {"rope_parameters": {**MINISTRAL3_SCALING, "llama_4_scaling_beta": 0.0}},
            "scaling": {"rope_parameters": {**MINISTRAL3_SCALING, "rope_type": "default"}},
        },
    ),
    Row(
        "ministral3-window-tied",
        "Ministral3ForCausalLM",
        "Ministral3Config",
        {
            **MINISTRAL3,
            "rope_parameters": {**MINISTRAL3_SCALING, "mscale": None, "mscale_all_dim": None},
            "sliding_window": 10,
            "tie_word_embeddings": True,
        },
        pos=21,
        features={
            "window": {"sliding_window": None},
            "query-scale": {"rope_parameters": {**MINISTRAL3_SCALING, "llama_4_scaling_beta": 0.0}},
            "amplitude": {"rope_parameters": MINISTRAL3_SCALING},
        },
    ),
    Row(
        "jais2",
        "Jais2ForCausalLM",
        "Jais2Config",
        {**LLAMA, "rope_parameters": ROTARY},
        float64=True,
        features={"activation": {"hidden_act": "gelu"}},
        attention="sdpa",
    ),
    Row(
        "jais2-no-biases-linear-tied",
        "Jais2ForCausalLM",
        "Jais2Config",
        {
            **LLAMA,
            "attention_bias": False,
            "mlp_bias": False,
            "rope_parameters": LINEAR,
            "tie_word_embeddings": True,
        },
        float64=True,
        features=UNSCALED,
        attention="sdpa",
    ),
    Row("hyperclovax", "HyperCLOVAXForCausalLM", "HyperCLOVAXConfig", GRANITE, features=SCALED),
    Row(
        "hyperclovax-no-second-norms-biases-tied",
        "HyperCLOVAXForCausalLM",
        "HyperCLOVAXConfig",
        {
            **GRANITE,
            "use_post_norm": False,
            "attention_bias": True,
            "mlp_bias": True,
            "rope_parameters": LINEAR,
            "tie_word_embeddings": True,
        },
        features={"no-second-norms": {"use_post_norm": True}, **UNSCALED},
    ),
    Row(
        "granite-swa",
        "GraniteSWAForCausalLM",
        "GraniteSWAConfig",
        {**NARROW, "num_hidden_layers": 4, "sliding_window": 4, "layer_rope_theta": [0, 50.0, 50.0, 50.0]},
        features={
            **SCALED,
            "windows": {"layer_types": ["full_attention"] * 4},
            "no-positions-in-global-layers": {"layer_rope_theta": [50.0] * 4},
            "base": {"layer_rope_theta": [0, 100.0, 100.0, 100.0]},
        },
    ),
    Row(
        "granite-swa-two-bases-biases-untied",
        "GraniteSWAForCausalLM",
        "GraniteSWAConfig",
        {
            **NARROW,
            "num_hidden_layers": 4,
            "sliding_window": 4,
            "layer_types": GLOBAL_FIRST,
            "layer_rope_theta": [1000.0, 10.0, 0, 1000.0],
            "attention_bias": True,
            "mlp_bias": True,
        },
        features={"two-bases": {"layer_rope_theta": [1000.0, 1000.0, 0, 1000.0]}},
    ),
    Row(
        "granite-swa-one-base-linear-tied",
        "GraniteSWAForCausalLM",
        "GraniteSWAConfig",
        {
            **NARROW,
            "num_hidden_layers": 4,
            "sliding_window": 4,
            "rope_parameters": LINEAR,
            "tie_word_embeddings": True,
        },
        features=UNSCALED,
    ),
    Row(
        "granite4",
        "GraniteMoeHybridForCausalLM",
        "GraniteMoeHybridConfig",
        {**GRANITE4, "num_local_experts": 0, "position_embedding_type": "rope", "tie_word_embeddings": True},
        features={**SCALED, "positions": {"position_embedding_type": None}},
    ),
    Row(
        "granite4-experts-no-positions-biases",
        "GraniteMoeHybridForCausalLM",
        "GraniteMoeHybridConfig",
        {**GRANITE4, "num_local_experts": 5, "num_experts_per_tok": 2, "attention_bias": True},
        features={
            "no-positions": {"position_embedding_type": "rope"},
            "second-expert": {"num_experts_per_tok": 1},
            "residual-multiplier": {"residual_multiplier": 1.0},
        },
    ),
)
