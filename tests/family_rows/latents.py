"""Latent attention: DeepSeek-V2 and V3, GLM 4 MoE Lite, MiniCPM3, Youtu and LongCat-Flash."""

from __future__ import annotations

from typing import Any

from tests.family_rows.experts import COMMON
from tests.family_rows.routers import DEEPSEEK, ROUTER_FEATURES
from tests.family_rows.row import Row

LATENT: dict[str, Any] = {
    **COMMON,
    "num_key_value_heads": 4,
    "intermediate_size": 40,
    "kv_lora_rank": 10,
    "q_lora_rank": 14,
    "qk_nope_head_dim": 6,
    "qk_rope_head_dim": 4,
    "v_head_dim": 5,
}
MIXTURE: dict[str, Any] = {**LATENT, **DEEPSEEK, "moe_intermediate_size": 12, "first_k_dense_replace": 1}
LITE: dict[str, Any] = {name: value for name, value in MIXTURE.items() if name != "first_k_dense_replace"}
GREEDY: dict[str, Any] = {"topk_method": "greedy", "n_group": None, "topk_group": None}
YARN: dict[str, Any] = {
    "rope_type": "yarn",
    "rope_theta": 100.0,
    "factor": 4.0,
    "beta_fast": 2.0,
    "beta_slow": 0.5,
    "mscale": 1.2,
    "mscale_all_dim": 0.8,
    "original_max_position_embeddings": 8,
}
UNSCALED = {"rope_type": "default", "rope_theta": 100.0}
MUP = {"embeddings": {"scale_emb": 1}, "depth": {"scale_depth": None}, "logits": {"dim_model_base": None}}

LONGCAT: dict[str, Any] = {
    "hidden_size": 24,
    "num_layers": 2,
    "num_attention_heads": 3,
    "max_position_embeddings": 32,
    "ffn_hidden_size": 40,
    "q_lora_rank": 10,
    "kv_lora_rank": 8,
    "qk_nope_head_dim": 6,
    "qk_rope_head_dim": 4,
    "head_dim": 4,
    "v_head_dim": 5,
    "moe_topk": 3,
    "n_routed_experts": 4,
    "zero_expert_num": 2,
    "expert_ffn_hidden_size": 12,
    "routed_scaling_factor": 1.7,
}

ROWS = (
    Row(
        "deepseek-v3",
        "DeepseekV3ForCausalLM",
        "DeepseekV3Config",
        {**MIXTURE, "rope_parameters": YARN},
        pos=24,
        features={
            **ROUTER_FEATURES,
            "scaling": {"rope_parameters": UNSCALED},
            "factor-on-scores": {"rope_parameters": {**YARN, "mscale_all_dim": 0.0}},
            "neighbours": {"rope_interleave": False},
        },
    ),
    Row(
        "deepseek-v3-halves-plain-queries-biases-tied",
        "DeepseekV3ForCausalLM",
        "DeepseekV3Config",
        {
            **MIXTURE,
            "q_lora_rank": None,
            "rope_interleave": False,
            "attention_bias": True,
            "n_group": 1,
            "topk_group": 1,
            "norm_topk_prob": False,
            "tie_word_embeddings": True,
        },
        features={"halves": {"rope_interleave": True}},
    ),
    Row(
        "deepseek-v2",
        "DeepseekV2ForCausalLM",
        "DeepseekV2Config",
        {**MIXTURE, "topk_method": "group_limited_greedy", "rope_parameters": YARN},
        pos=24,
        features={
            "groups": GREEDY,
            "scale": {"routed_scaling_factor": 1.0},
            "scaling": {"rope_parameters": UNSCALED},
            "factor-on-scores": {"rope_parameters": {**YARN, "mscale_all_dim": 0.0}},
        },
    ),
    Row(
        "deepseek-v2-greedy-plain-queries-biases-tied",
        "DeepseekV2ForCausalLM",
        "DeepseekV2Config",
        {**MIXTURE, **GREEDY, "q_lora_rank": None, "attention_bias": True, "tie_word_embeddings": True},
    ),
    Row(
        "glm4-moe-lite",
        "Glm4MoeLiteForCausalLM",
        "Glm4MoeLiteConfig",
        LITE,
        features={**ROUTER_FEATURES, "neighbours": {"rope_interleave": False}},
    ),
    Row(
        "glm4-moe-lite-halves-sparse-first-biases-tied",
        "Glm4MoeLiteForCausalLM",
        "Glm4MoeLiteConfig",
        {
            **LITE,
            "rope_interleave": False,
            "mlp_layer_types": ["sparse", "dense", "sparse"],
            "attention_bias": True,
            "tie_word_embeddings": True,
        },
    ),
    Row("minicpm3", "MiniCPM3ForCausalLM", "MiniCPM3Config", {**LATENT, "dim_model_base": 8}, features=MUP),
    Row(
        "minicpm3-longrope-plain-queries-biases-tied",
        "MiniCPM3ForCausalLM",
        "MiniCPM3Config",
        {
            **LATENT,
            "q_lora_rank": None,
            "v_head_dim": None,
            "scale_depth": 0.7,
            "scale_emb": 3.5,
            "attention_bias": True,
            "rope_parameters": {
                "rope_type": "longrope",
                "rope_theta": 100.0,
                "short_factor": [1.0, 1.5],
                "long_factor": [2.0, 4.0],
                "original_max_position_embeddings": 16,
            },
            "tie_word_embeddings": True,
        },
        pos=24,
        features={**MUP, "scaling": {"rope_parameters": UNSCALED}},
    ),
    Row("youtu", "YoutuForCausalLM", "YoutuConfig", LATENT, features={"neighbours": {"rope_interleave": False}}),
    Row(
        "youtu-plain-queries-biases-tied",
        "YoutuForCausalLM",
        "YoutuConfig",
        {**LATENT, "q_lora_rank": None, "attention_bias": True, "tie_word_embeddings": True},
    ),
    Row(
        "longcat-flash",
        "LongcatFlashForCausalLM",
        "LongcatFlashConfig",
        LONGCAT,
        features={
            "scale": {"routed_scaling_factor": 1.0},
            "chosen": {"moe_topk": 2},
            "identities": {"n_routed_experts": 6, "zero_expert_num": 0},
        },
    ),
    Row(
        "longcat-flash-biases-no-identities-tied",
        "LongcatFlashForCausalLM",
        "LongcatFlashConfig",
        {
            **LONGCAT,
            "zero_expert_num": 0,
            "attention_bias": True,
            "rope_parameters": YARN,
            "tie_word_embeddings": True,
        },
        pos=24,
    ),
)
