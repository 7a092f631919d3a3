"""More mixtures of experts: Aria's text model, DBRX, Hunyuan-MoE and Cohere 2-MoE."""

from __future__ import annotations

from typing import Any

from tests.family_rows.experts import COMMON
from tests.family_rows.row import Row
from tests.family_rows.variants import ALPHA, GLOBAL_FIRST, LINEAR, ROTARY, UNSCALED

ARIA: dict[str, Any] = {**COMMON, "intermediate_size": 12, "moe_num_experts": 5, "moe_topk": 2}

DBRX_FFN: dict[str, Any] = {"ffn_hidden_size": 20, "moe_num_experts": 5, "moe_top_k": 3}
DBRX: dict[str, Any] = {
    "d_model": 24,
    "n_heads": 4,
    "n_layers": 3,
    "max_seq_len": 32,
    "rope_parameters": ROTARY,
    "attn_config": {"kv_n_heads": 2, "clip_qkv": 0.7, "rope_theta": 100.0},
    "ffn_config": DBRX_FFN,
}

HUNYUAN: dict[str, Any] = {
    **COMMON,
    "head_dim": 8,
    "intermediate_size": 12,
    "num_experts": 5,
    "moe_topk": 2,
    "rope_parameters": ROTARY,
}

COHERE2_MOE: dict[str, Any] = {
    **COMMON,
    "num_hidden_layers": 4,
    "head_dim": 8,
    "intermediate_size": 12,
    "num_experts": 5,
    "num_experts_per_tok": 2,
    "num_shared_experts": 2,
    "sliding_window": 4,
    "logit_scale": 0.4,
    "rope_theta": 100.0,
}

ROWS = (
    Row("aria-text", "AriaTextForCausalLM", "AriaTextConfig", ARIA, features={"second-expert": {"moe_topk": 1}}),
    Row(
        "aria-text-biases-linear-tied",
        "AriaTextForCausalLM",
        "AriaTextConfig",
        {
            **ARIA,
            "moe_num_shared_experts": 1,
            "attention_bias": True,
            "mlp_bias": True,
            "rope_parameters": LINEAR,
            "tie_word_embeddings": True,
        },
        features=UNSCALED,
    ),
    Row(
        "dbrx",
        "DbrxForCausalLM",
        "DbrxConfig",
        DBRX,
        float64=True,
        attention="sdpa",
        features={
            "clipping": {"attn_config": {**DBRX["attn_config"], "clip_qkv": 100.0}},
            "rescaling": {"ffn_config": {**DBRX_FFN, "moe_normalize_expert_weights": None}},
            "activation": {"ffn_config": {**DBRX_FFN, "ffn_act_fn": {"name": "gelu"}}},
        },
    ),
    Row(
        "dbrx-one-key-head-hardly-clipped-no-rescaling",
        "DbrxForCausalLM",
        "DbrxConfig",
        {
            **DBRX,
            "attn_config": {"kv_n_heads": 1, "clip_qkv": 100.0, "rope_theta": 100.0},
            "ffn_config": {
                **DBRX_FFN,
                "moe_top_k": 2,
                "moe_normalize_expert_weights": None,
                "ffn_act_fn": {"name": "gelu"},
            },
        },
        float64=True,
        attention="sdpa",
        features={"no-rescaling": {"ffn_config": {**DBRX_FFN, "moe_top_k": 2, "ffn_act_fn": {"name": "gelu"}}}},
    ),
    Row(
        "hunyuan-moe",
        "HunYuanMoEV1ForCausalLM",
        "HunYuanMoEV1Config",
        HUNYUAN,
        features={"second-expert": {"moe_topk": 1}},
    ),
    Row(
        "hunyuan-moe-listed-experts-alpha-biases-tied",
        "HunYuanMoEV1ForCausalLM",
        "HunYuanMoEV1Config",
        {
            **HUNYUAN,
            "moe_topk": [3, 3, 3],
            "rope_parameters": ALPHA,
            "attention_bias": True,
            "tie_word_embeddings": True,
        },
        features={"alpha": {"rope_parameters": ROTARY}},
    ),
    Row(
        "cohere2-moe",
        "Cohere2MoeForCausalLM",
        "Cohere2MoeConfig",
        {**COHERE2_MOE, "tie_word_embeddings": True},
        features={
            "window": {"sliding_window": 40},
            "mean-with-the-shared-expert": {"shared_expert_combination_strategy": "sum"},
            "second-expert": {"num_experts_per_tok": 1},
            "layers": {"layer_types": ["sliding_attention"] * 4},
        },
    ),
    Row(
        "cohere2-moe-dense-first-rms-sum-biases-untied",
        "Cohere2MoeForCausalLM",
        "Cohere2MoeConfig",
        {
            **COHERE2_MOE,
            "layer_types": GLOBAL_FIRST,
            "mlp_layer_types": ["dense", "sparse", "sparse", "sparse"],
            "prefix_dense_intermediate_size": 20,
            "rms_norm_eps": 1e-5,
            "shared_expert_combination_strategy": "sum",
            "attention_bias": True,
        },
        features={
            "dense-layers-rotate": {"prefix_dense_sliding_window_pattern": 2},
            "sum": {"shared_expert_combination_strategy": "average"},
            "rms": {"rms_norm_eps": None},
        },
    ),
    Row(
        "cohere2-moe-dense-by-pattern-none-shared-tied",
        "Cohere2MoeForCausalLM",
        "Cohere2MoeConfig",
        {
            **COHERE2_MOE,
            "layer_types": GLOBAL_FIRST,
            "mlp_layer_types": ["dense", "sparse", "sparse", "sparse"],
            "prefix_dense_sliding_window_pattern": 2,
            "num_shared_experts": 0,
            "tie_word_embeddings": True,
        },
        features={"dense-layers-do-not-rotate": {"prefix_dense_sliding_window_pattern": 1}},
    ),
)
