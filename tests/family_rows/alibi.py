"""Families with ALiBi, and others with LayerNorm: Bloom, Falcon, MPT, XGLM, Persimmon, Phi, StableLM, StarCoder 2."""

from __future__ import annotations

from typing import Any

from tests.family_rows.row import Row

BLOOM: dict[str, Any] = {"hidden_size": 24, "n_layer": 3, "n_head": 4}

# Falcon without the defaults of other families: `multi_query` and `parallel_attn` are on.
FALCON: dict[str, Any] = {
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": 32,
    "rope_parameters": {"rope_type": "default", "rope_theta": 100.0},
}

NEW_FALCON: dict[str, Any] = {**FALCON, "new_decoder_architecture": True, "num_kv_heads": 2}

MPT: dict[str, Any] = {"d_model": 24, "n_layers": 3, "n_heads": 4, "max_seq_len": 32}

XGLM: dict[str, Any] = {
    "d_model": 24,
    "num_layers": 3,
    "attention_heads": 4,
    "ffn_dim": 40,
    "max_position_embeddings": 32,
}

PARTLY_ROTARY = {"rope_type": "default", "rope_theta": 100.0, "partial_rotary_factor": 0.5}
WHOLLY_ROTARY = {**PARTLY_ROTARY, "partial_rotary_factor": 1.0}

# Persimmon, Phi, StableLM and StarCoder 2 name these alike.
NAMED_ALIKE: dict[str, Any] = {
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "intermediate_size": 40,
    "max_position_embeddings": 32,
    "rope_parameters": PARTLY_ROTARY,
    "tie_word_embeddings": False,
}
PARTLY: dict[str, dict[str, Any]] = {"partly": {"rope_parameters": WHOLLY_ROTARY}}
GROUPED: dict[str, Any] = {**NAMED_ALIKE, "num_key_value_heads": 2}

ROWS = (
    Row("bloom", "BloomForCausalLM", "BloomConfig", BLOOM),
    # Six heads are no power of two, so that the last ones have slopes of a finer sequence.
    Row(
        "bloom-six-heads-untied",
        "BloomForCausalLM",
        "BloomConfig",
        {**BLOOM, "n_head": 6, "tie_word_embeddings": False},
    ),
    Row("falcon", "FalconForCausalLM", "FalconConfig", FALCON, float64=True),
    Row(
        "falcon-two-norms-untied",
        "FalconForCausalLM",
        "FalconConfig",
        {**NEW_FALCON, "tie_word_embeddings": False},
        float64=True,
    ),
    Row(
        "falcon-one-norm-biases",
        "FalconForCausalLM",
        "FalconConfig",
        {**NEW_FALCON, "num_ln_in_parallel_attn": 1, "bias": True, "ffn_hidden_size": 40},
        float64=True,
    ),
    Row(
        "falcon-sequential-multi-head",
        "FalconForCausalLM",
        "FalconConfig",
        {**FALCON, "multi_query": False, "parallel_attn": False, "activation": "gelu_new"},
        float64=True,
        features={"activation": {"activation": "relu"}},
    ),
    # Sixteen heads have slopes that bfloat16 rounds. Unfused, transformers adds ALiBi twice.
    Row(
        "falcon-alibi",
        "FalconForCausalLM",
        "FalconConfig",
        {
            **FALCON,
            "num_attention_heads": 16,
            "alibi": True,
            "multi_query": False,
            "parallel_attn": False,
            "bias": True,
        },
        pos=24,
        float64=True,
        features={"alibi": {"alibi": False}},
        attention="sdpa",
    ),
    Row("mpt", "MptForCausalLM", "MptConfig", MPT),
    Row(
        "mpt-clipped-untied",
        "MptForCausalLM",
        "MptConfig",
        {
            **MPT,
            "n_heads": 6,
            "attn_config": {"clip_qkv": 0.5, "softmax_scale": 0.9},
            "tie_word_embeddings": False,
        },
        features={
            "clip": {"attn_config": {"softmax_scale": 0.9}},
            "scale": {"attn_config": {"clip_qkv": 0.5}},
        },
    ),
    Row(
        "xglm",
        "XGLMForCausalLM",
        "XGLMConfig",
        XGLM,
        features={"embedding-scale": {"scale_embedding": False}},
    ),
    Row(
        "xglm-padding-row-untied",
        "XGLMForCausalLM",
        "XGLMConfig",
        {**XGLM, "pad_token_id": 7, "scale_embedding": False, "tie_word_embeddings": False},
        features={"padding": {"pad_token_id": None}},
    ),
    Row("persimmon", "PersimmonForCausalLM", "PersimmonConfig", NAMED_ALIKE, features=PARTLY),
    Row(
        "persimmon-no-qk-norm-tied",
        "PersimmonForCausalLM",
        "PersimmonConfig",
        {
            **NAMED_ALIKE,
            "qk_layernorm": False,
            "tie_word_embeddings": True,
            "rope_parameters": {**PARTLY_ROTARY, "rope_type": "linear", "factor": 3.0},
        },
        features={"scaling": {"rope_parameters": PARTLY_ROTARY}},
    ),
    Row("phi", "PhiForCausalLM", "PhiConfig", NAMED_ALIKE, features=PARTLY),
    Row(
        "phi-qk-norm-grouped-tied",
        "PhiForCausalLM",
        "PhiConfig",
        {**GROUPED, "qk_layernorm": True, "tie_word_embeddings": True},
        features=PARTLY,
    ),
    Row("stablelm", "StableLmForCausalLM", "StableLmConfig", GROUPED, features=PARTLY),
    Row(
        "stablelm-parallel-qk-norm-tied",
        "StableLmForCausalLM",
        "StableLmConfig",
        {
            **GROUPED,
            "use_parallel_residual": True,
            "qk_layernorm": True,
            "use_qkv_bias": True,
            "tie_word_embeddings": True,
        },
        features=PARTLY,
    ),
    Row(
        "starcoder2",
        "Starcoder2ForCausalLM",
        "Starcoder2Config",
        {
            **GROUPED,
            "rope_parameters": {"rope_type": "default", "rope_theta": 100.0},
            "sliding_window": 4,
            "tie_word_embeddings": True,
        },
        features={"window": {"sliding_window": None}},
    ),
    Row(
        "starcoder2-no-biases-untied",
        "Starcoder2ForCausalLM",
        "Starcoder2Config",
        {
            **GROUPED,
            "hidden_size": 24,
            "head_dim": 8,
            "rope_parameters": {"rope_type": "default", "rope_theta": 100.0},
            "use_bias": False,
        },
    ),
)
