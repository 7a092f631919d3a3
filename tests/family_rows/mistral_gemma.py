"""The Gemmas, Mistral and Ministral: windows, soft-caps, norms on both sides, two rotary bases."""

from __future__ import annotations

from typing import Any

from tests.family_rows.row import Row

ROTARY: dict[str, Any] = {"rope_type": "default", "rope_theta": 100.0}
LINEAR: dict[str, Any] = {"rope_type": "linear", "rope_theta": 100.0, "factor": 3.0}
LLAMA3: dict[str, Any] = {
    "rope_type": "llama3",
    "rope_theta": 100.0,
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 2.0,
    "original_max_position_embeddings": 16,
}
YARN: dict[str, Any] = {
    "rope_type": "yarn",
    "rope_theta": 100.0,
    "factor": 4.0,
    "beta_fast": 2.0,
    "beta_slow": 0.5,
    "original_max_position_embeddings": 8,
}
UNSCALED: dict[str, dict[str, Any]] = {"scaling": {"rope_parameters": ROTARY}}

COMMON: dict[str, Any] = {
    "hidden_size": 24,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "intermediate_size": 40,
    "max_position_embeddings": 32,
    "rope_parameters": ROTARY,
    "tie_word_embeddings": False,
}
WINDOWS: dict[str, Any] = {**COMMON, "num_hidden_layers": 4, "sliding_window": 4}
GLOBAL_FIRST = ["full_attention", "sliding_attention", "sliding_attention", "full_attention"]
ONLY_LOCAL, ONLY_GLOBAL = ["sliding_attention"] * 4, ["full_attention"] * 4

CAPS: dict[str, Any] = {"query_pre_attn_scalar": 3, "attn_logit_softcapping": 2.0, "final_logit_softcapping": 3.0}
NO_CAPS: dict[str, Any] = {"attn_logit_softcapping": None, "final_logit_softcapping": None}
CAPPED: dict[str, dict[str, Any]] = {
    "window": {"sliding_window": 40},
    "global-layers": {"layer_types": ONLY_LOCAL},
    "score-scale": {"query_pre_attn_scalar": 8},
    "score-cap": {"attn_logit_softcapping": None},
    "logit-cap": {"final_logit_softcapping": None},
}

LOCAL_ROTARY: dict[str, Any] = {"rope_type": "default", "rope_theta": 10.0}
GEMMA3: dict[str, Any] = {
    **WINDOWS,
    "sliding_window_pattern": 3,
    "query_pre_attn_scalar": 3,
    "rope_parameters": {"full_attention": ROTARY, "sliding_attention": LOCAL_ROTARY},
    "tie_word_embeddings": True,
}
GEMMA3_LINEAR: dict[str, Any] = {"full_attention": LINEAR, "sliding_attention": LOCAL_ROTARY}

ROWS = (
    Row(
        "gemma",
        "GemmaForCausalLM",
        "GemmaConfig",
        {**COMMON, "tie_word_embeddings": True},
        features={"activation": {"hidden_act": "silu"}},
    ),
    Row(
        "gemma-one-kv-head-biases-untied",
        "GemmaForCausalLM",
        "GemmaConfig",
        {**COMMON, "num_key_value_heads": 1, "attention_bias": True, "rope_parameters": LINEAR},
        features=UNSCALED,
    ),
    Row(
        "gemma2",
        "Gemma2ForCausalLM",
        "Gemma2Config",
        {**WINDOWS, **CAPS, "tie_word_embeddings": True},
        features=CAPPED,
    ),
    Row(
        "gemma2-global-first-no-caps-biases-untied",
        "Gemma2ForCausalLM",
        "Gemma2Config",
        {
            **WINDOWS,
            **NO_CAPS,
            "layer_types": GLOBAL_FIRST,
            "query_pre_attn_scalar": 5,
            "attention_bias": True,
            "rope_parameters": LLAMA3,
        },
        pos=24,
        features={"order": {"layer_types": GLOBAL_FIRST[1:] + GLOBAL_FIRST[:1]}, **UNSCALED},
    ),
    Row(
        "gemma3",
        "Gemma3ForCausalLM",
        "Gemma3TextConfig",
        GEMMA3,
        features={
            "window": {"sliding_window": 40},
            "pattern": {"sliding_window_pattern": 2},
            "score-scale": {"query_pre_attn_scalar": 8},
            "local-base": {"rope_parameters": {"full_attention": ROTARY, "sliding_attention": ROTARY}},
        },
    ),
    Row(
        "gemma3-linear-capped-biases-untied",
        "Gemma3ForCausalLM",
        "Gemma3TextConfig",
        {
            **GEMMA3,
            "layer_types": GLOBAL_FIRST,
            "final_logit_softcapping": 3.0,
            "attention_bias": True,
            "rope_parameters": GEMMA3_LINEAR,
            "tie_word_embeddings": False,
        },
        features={
            "order": {"layer_types": GLOBAL_FIRST[1:] + GLOBAL_FIRST[:1]},
            "logit-cap": {"final_logit_softcapping": None},
            "scaling": {"rope_parameters": GEMMA3["rope_parameters"]},
            "local-unscaled": {
                "rope_parameters": {"full_attention": LINEAR, "sliding_attention": {**LINEAR, "rope_theta": 10.0}}
            },
        },
    ),
    # The fields as the files of 2025 hold them.
    Row(
        "gemma3-fields-of-old",
        "Gemma3ForCausalLM",
        "Gemma3TextConfig",
        {
            **{name: value for name, value in GEMMA3.items() if name != "rope_parameters"},
            "rope_theta": 100.0,
            "rope_local_base_freq": 10.0,
            "rope_scaling": {"rope_type": "linear", "factor": 3.0},
            "cache_implementation": "hybrid",
        },
        features={
            "local-base": {"rope_local_base_freq": 100.0},
            "scaling": {"rope_scaling": {"rope_type": "default"}},
        },
    ),
    Row(
        "vaultgemma",
        "VaultGemmaForCausalLM",
        "VaultGemmaConfig",
        {**WINDOWS, **CAPS, "tie_word_embeddings": True},
        features=CAPPED,
    ),
    Row(
        "vaultgemma-no-caps-biases-untied",
        "VaultGemmaForCausalLM",
        "VaultGemmaConfig",
        {
            **WINDOWS,
            **NO_CAPS,
            "layer_types": GLOBAL_FIRST,
            "query_pre_attn_scalar": 5,
            "attention_bias": True,
            "rope_parameters": LINEAR,
        },
        features={"order": {"layer_types": GLOBAL_FIRST[1:] + GLOBAL_FIRST[:1]}, **UNSCALED},
    ),
    Row(
        "mistral",
        "MistralForCausalLM",
        "MistralConfig",
        {**COMMON, "sliding_window": 4},
        features={"window": {"sliding_window": None}},
    ),
    Row(
        "mistral-no-window-yarn-tied",
        "MistralForCausalLM",
        "MistralConfig",
        {**COMMON, "head_dim": None, "sliding_window": None, "rope_parameters": YARN, "tie_word_embeddings": True},
        pos=24,
        features={"no-window": {"sliding_window": 4}, **UNSCALED},
    ),
    Row(
        "ministral",
        "MinistralForCausalLM",
        "MinistralConfig",
        {**WINDOWS, "layer_types": GLOBAL_FIRST},
        features={
            "window": {"sliding_window": 40},
            "order": {"layer_types": GLOBAL_FIRST[1:] + GLOBAL_FIRST[:1]},
        },
    ),
    Row(
        "ministral-linear-tied",
        "MinistralForCausalLM",
        "MinistralConfig",
        {**WINDOWS, "rope_parameters": LINEAR, "tie_word_embeddings": True},
        features={"window": {"layer_types": ONLY_GLOBAL}, **UNSCALED},
    ),
)
