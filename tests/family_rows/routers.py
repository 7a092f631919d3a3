"""Mixtures with sigmoid scores, a correction of the choice, groups of experts and dense layers before them."""

from __future__ import annotations

from typing import Any

from tests.family_rows.experts import COMMON
from tests.family_rows.row import Row

DENSE: dict[str, Any] = {**COMMON, "head_dim": 8, "intermediate_size": 40, "moe_intermediate_size": 12}

# A token chooses three of the eight experts, among the four of two groups.
GROUPS: dict[str, Any] = {"num_experts_per_tok": 3, "n_group": 4, "topk_group": 2, "routed_scaling_factor": 1.7}
DEEPSEEK: dict[str, Any] = {"n_routed_experts": 8, "n_shared_experts": 2, **GROUPS}

GLM4_MOE: dict[str, Any] = {**DENSE, **DEEPSEEK}
SOLAR: dict[str, Any] = {name: value for name, value in GLM4_MOE.items() if name != "intermediate_size"}
MINIMAX: dict[str, Any] = {
    **COMMON,
    "head_dim": 8,
    "intermediate_size": 20,
    "num_local_experts": 5,
    "num_experts_per_tok": 2,
}
ERNIE: dict[str, Any] = {**DENSE, "moe_num_experts": 6, "moe_k": 3}
EXAONE: dict[str, Any] = {**DENSE, **GROUPS, "num_experts": 8, "num_hidden_layers": 4, "sliding_window": 5}
AFMOE: dict[str, Any] = {
    **DENSE,
    "num_hidden_layers": 4,
    "num_dense_layers": 1,
    "num_experts": 6,
    "num_experts_per_tok": 3,
    "route_scale": 1.7,
    "sliding_window": 5,
    "global_attn_every_n_layers": 2,
    "mup_enabled": True,
}
HY_V3: dict[str, Any] = {**DENSE, "num_experts": 6, "num_experts_per_tok": 3}

ROUTER_FEATURES: dict[str, Any] = {
    "groups": {"n_group": 1, "topk_group": 1},
    "rescaling": {"norm_topk_prob": False},
    "scale": {"routed_scaling_factor": 1.0},
}
DENSE_FEATURE = {"dense-layers": {"first_k_dense_replace": 0}}

ROWS = (
    Row(
        "glm4-moe",
        "Glm4MoeForCausalLM",
        "Glm4MoeConfig",
        {**GLM4_MOE, "use_qk_norm": True},
        features={**ROUTER_FEATURES, "query-key-norm": {"use_qk_norm": False}},
    ),
    Row(
        "glm4-moe-biases-one-group-tied",
        "Glm4MoeForCausalLM",
        "Glm4MoeConfig",
        {
            **GLM4_MOE,
            "n_group": 1,
            "topk_group": 1,
            "norm_topk_prob": False,
            "first_k_dense_replace": 2,
            "attention_bias": True,
            "tie_word_embeddings": True,
        },
    ),
    Row("dots1", "Dots1ForCausalLM", "Dots1Config", {**GLM4_MOE, "norm_topk_prob": True}, features=ROUTER_FEATURES),
    Row(
        "dots1-windows-dense-layer-biases-tied",
        "Dots1ForCausalLM",
        "Dots1Config",
        {
            **GLM4_MOE,
            "first_k_dense_replace": 1,
            "sliding_window": 5,
            "max_window_layers": 1,
            "attention_bias": True,
            "tie_word_embeddings": True,
        },
        features={"windows": {"sliding_window": None}, "no-rescaling": {"norm_topk_prob": True}},
    ),
    Row("solar-open", "SolarOpenForCausalLM", "SolarOpenConfig", SOLAR, features=ROUTER_FEATURES),
    Row(
        "solar-open-biases-tied",
        "SolarOpenForCausalLM",
        "SolarOpenConfig",
        {**SOLAR, "attention_bias": True, "norm_topk_prob": False, "tie_word_embeddings": True},
    ),
    Row("minimax-m2", "MiniMaxM2ForCausalLM", "MiniMaxM2Config", {**MINIMAX, "rotary_dim": 4}),
    Row(
        "minimax-m2-tied",
        "MiniMaxM2ForCausalLM",
        "MiniMaxM2Config",
        {**MINIMAX, "num_experts_per_tok": 3, "tie_word_embeddings": True},
    ),
    Row(
        "ernie4.5-moe",
        "Ernie4_5_MoeForCausalLM",
        "Ernie4_5_MoeConfig",
        {**ERNIE, "use_bias": True, "moe_norm_min": 0.5},
        features={"least-sum": {"moe_norm_min": 1e-12}, "shared-experts": {"moe_num_shared_experts": 0}},
    ),
    Row(
        "ernie4.5-moe-every-second-layer-tied",
        "Ernie4_5_MoeForCausalLM",
        "Ernie4_5_MoeConfig",
        {
            **ERNIE,
            "num_hidden_layers": 5,
            "moe_layer_interval": 2,
            "moe_layer_end_index": 2,
            "moe_num_shared_experts": 0,
            "tie_word_embeddings": True,
        },
    ),
    Row(
        "exaone-moe",
        "ExaoneMoeForCausalLM",
        "ExaoneMoeConfig",
        EXAONE,
        features={**ROUTER_FEATURES, "windows": {"layer_types": ["full_attention"] * 4}},
    ),
    Row(
        "exaone-moe-dense-layers-in-between-tied",
        "ExaoneMoeForCausalLM",
        "ExaoneMoeConfig",
        {
            **EXAONE,
            "layer_types": ["full_attention", "sliding_attention"] * 2,
            "mlp_layer_types": ["sparse", "dense", "sparse", "dense"],
            "norm_topk_prob": False,
            "num_shared_experts": 2,
            "tie_word_embeddings": True,
        },
    ),
    Row("hy-v3", "HYV3ForCausalLM", "HYV3Config", HY_V3, features={"scale": {"router_scaling_factor": 1.0}}),
    Row(
        "hy-v3-biases-tied",
        "HYV3ForCausalLM",
        "HYV3Config",
        {
            **HY_V3,
            "attention_bias": True,
            "mlp_bias": True,
            "mlp_layer_types": ["sparse", "dense", "sparse"],
            "num_shared_experts": 2,
            "tie_word_embeddings": True,
        },
    ),
    Row(
        "afmoe",
        "AfmoeForCausalLM",
        "AfmoeConfig",
        AFMOE,
        features={
            "scale": {"route_scale": 1.0},
            "embedding-scale": {"mup_enabled": False},
            "layer-types": {"layer_types": ["full_attention"] * 4},
            "windows": {"sliding_window": 20},
            "dense-layer": {"num_dense_layers": 0},
        },
    ),
    Row(
        "afmoe-biases-one-shared-expert-tied",
        "AfmoeForCausalLM",
        "AfmoeConfig",
        {
            **AFMOE,
            "attention_bias": True,
            "num_shared_experts": 1,
            "num_dense_layers": 2,
            "mup_enabled": False,
            "tie_word_embeddings": True,
        },
    ),
)
