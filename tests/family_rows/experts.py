"""Mixtures of experts: Mixtral, Qwen2-MoE, Qwen3-MoE, OLMoE, FlexOlmo, GraniteMoE, Phi-MoE and GPT-OSS."""

from __future__ import annotations

from typing import Any

from tests.family_rows.row import Row

COMMON: dict[str, Any] = {
    "hidden_size": 24,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 32,
    "tie_word_embeddings": False,
}

MIXTRAL: dict[str, Any] = {
    **COMMON,
    "head_dim": 8,
    "intermediate_size": 20,
    "num_local_experts": 5,
    "num_experts_per_tok": 2,
}

QWEN2_MOE: dict[str, Any] = {
    **COMMON,
    "intermediate_size": 40,
    "moe_intermediate_size": 12,
    "shared_expert_intermediate_size": 20,
    "num_experts": 5,
    "num_experts_per_tok": 3,
}

QWEN3_MOE: dict[str, Any] = {
    **COMMON,
    "head_dim": 8,
    "intermediate_size": 40,
    "moe_intermediate_size": 12,
    "num_experts": 5,
    "num_experts_per_tok": 3,
    "norm_topk_prob": True,
}

OLMOE: dict[str, Any] = {**COMMON, "intermediate_size": 12, "num_experts": 6, "num_experts_per_tok": 3}

GRANITE_MOE: dict[str, Any] = {
    **COMMON,
    "intermediate_size": 20,
    "num_local_experts": 5,
    "num_experts_per_tok": 2,
    "attention_multiplier": 0.3,
    "embedding_multiplier": 4.0,
    "logits_scaling": 3.0,
    "residual_multiplier": 0.4,
}

PHIMOE: dict[str, Any] = {
    **COMMON,
    "intermediate_size": 20,
    "num_local_experts": 5,
    "num_experts_per_tok": 2,
    # The published 0.01 leaves nearly every expert out of the other's share.
    "router_jitter_noise": 0.4,
    "attention_bias": True,
    "lm_head_bias": True,
}

PHIMOE_LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 100.0,
    "short_factor": [1.0, 1.5, 2.0],
    "long_factor": [2.0, 4.0, 8.0],
    "short_mscale": 1.3,
    "long_mscale": 1.3,
    "original_max_position_embeddings": 16,
}

GPT_OSS: dict[str, Any] = {
    **COMMON,
    "num_hidden_layers": 4,
    "head_dim": 8,
    "intermediate_size": 20,
    "num_local_experts": 5,
    "num_experts_per_tok": 2,
    "sliding_window": 5,
    # Both factors of an expert reach it.
    "swiglu_limit": 0.8,
    "rope_parameters": {
        "rope_type": "yarn",
        "rope_theta": 100.0,
        "factor": 4.0,
        "beta_fast": 0.8,
        "beta_slow": 0.1,
        "truncate": False,
        "original_max_position_embeddings": 8,
    },
}

ROWS = (
    Row(
        "mixtral",
        "MixtralForCausalLM",
        "MixtralConfig",
        MIXTRAL,
        features={"second-expert": {"num_experts_per_tok": 1}},
    ),
    Row(
        "mixtral-window-tied",
        "MixtralForCausalLM",
        "MixtralConfig",
        {**MIXTRAL, "sliding_window": 4, "num_experts_per_tok": 3, "tie_word_embeddings": True},
        features={"window": {"sliding_window": None}},
    ),
    Row(
        "qwen3-moe",
        "Qwen3MoeForCausalLM",
        "Qwen3MoeConfig",
        {**QWEN3_MOE, "mlp_only_layers": [1]},
        features={"rescaling": {"norm_topk_prob": False}},
    ),
    Row(
        "qwen3-moe-every-second-layer-window-biases-tied",
        "Qwen3MoeForCausalLM",
        "Qwen3MoeConfig",
        {
            **QWEN3_MOE,
            "num_hidden_layers": 4,
            "decoder_sparse_step": 2,
            "norm_topk_prob": False,
            "attention_bias": True,
            "use_sliding_window": True,
            "sliding_window": 5,
            "tie_word_embeddings": True,
        },
        features={"window": {"use_sliding_window": False}, "no-rescaling": {"norm_topk_prob": True}},
    ),
    Row("qwen2-moe", "Qwen2MoeForCausalLM", "Qwen2MoeConfig", QWEN2_MOE),
    Row(
        "qwen2-moe-dense-layers-windows-tied",
        "Qwen2MoeForCausalLM",
        "Qwen2MoeConfig",
        {
            **QWEN2_MOE,
            "num_hidden_layers": 4,
            "mlp_only_layers": [1],
            "norm_topk_prob": True,
            "qkv_bias": False,
            "use_sliding_window": True,
            "sliding_window": 5,
            "max_window_layers": 3,
            "tie_word_embeddings": True,
        },
        features={"windows": {"use_sliding_window": False}, "rescaling": {"norm_topk_prob": False}},
    ),
    Row("olmoe", "OlmoeForCausalLM", "OlmoeConfig", OLMOE),
    Row(
        "olmoe-clipped-biases-tied",
        "OlmoeForCausalLM",
        "OlmoeConfig",
        {**OLMOE, "clip_qkv": 0.7, "norm_topk_prob": True, "attention_bias": True, "tie_word_embeddings": True},
        features={"clipping": {"clip_qkv": None}, "rescaling": {"norm_topk_prob": False}},
    ),
    Row("flex-olmo", "FlexOlmoForCausalLM", "FlexOlmoConfig", OLMOE),
    Row(
        "flex-olmo-biases-tied",
        "FlexOlmoForCausalLM",
        "FlexOlmoConfig",
        # Whether the experts' weights are rescaled cannot be seen: the norm on what they write undoes it.
        {**OLMOE, "norm_topk_prob": True, "attention_bias": True, "tie_word_embeddings": True},
    ),
    Row(
        "granite-moe",
        "GraniteMoeForCausalLM",
        "GraniteMoeConfig",
        GRANITE_MOE,
        features={
            "attention-multiplier": {"attention_multiplier": 1.0},
            "embedding-multiplier": {"embedding_multiplier": 1.0},
            "logits-scaling": {"logits_scaling": 1.0},
            "residual-multiplier": {"residual_multiplier": 1.0},
        },
    ),
    Row(
        "granite-moe-biases-tied",
        "GraniteMoeForCausalLM",
        "GraniteMoeConfig",
        {**GRANITE_MOE, "attention_bias": True, "num_experts_per_tok": 3, "tie_word_embeddings": True},
    ),
    Row(
        "granite-moe-shared-tied",
        "GraniteMoeSharedForCausalLM",
        "GraniteMoeSharedConfig",
        {**GRANITE_MOE, "shared_intermediate_size": 16, "tie_word_embeddings": True},
    ),
    Row(
        "granite-moe-none-shared",
        "GraniteMoeSharedForCausalLM",
        "GraniteMoeSharedConfig",
        {**GRANITE_MOE, "shared_intermediate_size": 0},
    ),
    Row(
        "phimoe",
        "PhimoeForCausalLM",
        "PhimoeConfig",
        PHIMOE,
        features={"jitter": {"router_jitter_noise": 0.01}, "no-limit": {"router_jitter_noise": 1000.0}},
    ),
    Row(
        "phimoe-longrope-window-tied",
        "PhimoeForCausalLM",
        "PhimoeConfig",
        {
            **PHIMOE,
            "router_jitter_noise": 0.01,
            "attention_bias": False,
            "lm_head_bias": False,
            "sliding_window": 10,
            "rope_parameters": PHIMOE_LONGROPE,
            "tie_word_embeddings": True,
        },
        pos=24,
        features={
            "window": {"sliding_window": None},
            "short-factors": {"rope_parameters": {**PHIMOE_LONGROPE, "short_factor": [1.0, 1.0, 1.0]}},
            "amplitude": {"rope_parameters": {**PHIMOE_LONGROPE, "short_mscale": 1.0, "long_mscale": 1.0}},
        },
    ),
    Row(
        "gpt-oss",
        "GptOssForCausalLM",
        "GptOssConfig",
        GPT_OSS,
        pos=24,
        features={
            "windows": {"layer_types": ["full_attention"] * 4},
            "limit": {"swiglu_limit": 7.0},
            "scaling": {"rope_parameters": {"rope_type": "default", "rope_theta": 100.0}},
            "no-rounding-of-the-range": {"rope_parameters": {**GPT_OSS["rope_parameters"], "truncate": True}},
        },
    ),
    Row(
        "gpt-oss-global-first-no-biases-tied",
        "GptOssForCausalLM",
        "GptOssConfig",
        {
            **GPT_OSS,
            "layer_types": ["full_attention", "sliding_attention", "sliding_attention", "full_attention"],
            "attention_bias": False,
            "num_experts_per_tok": 3,
            "tie_word_embeddings": True,
        },
        features={"order": {"layer_types": ["sliding_attention", "full_attention"] * 2}},
    ),
)
