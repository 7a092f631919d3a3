"""AFMoE (Arcee AI 2025, "Trinity"): gates on what heads read, global layers that do not rotate, corrected routing."""

from __future__ import annotations

import math

from hooked_lm.config import HookedTransformerConfig
from weight_conversion import tables
from weight_conversion.families import llama
from weight_conversion.family import Family, Sites
from weight_conversion.fields import Arguments, ConfigFields
from weight_conversion.layer_types import layer_types
from weight_conversion.mixtures import dense_first, ignore_training, mixture_rules
from weight_conversion.rules import RuleTable

__all__ = ["FAMILY", "config", "rules"]


def config(fields: ConfigFields) -> Arguments:
    """Map an `AfmoeConfig`."""
    ignore_training(fields)
    # `layer_types` holds the same.
    fields.ignore("global_attn_every_n_layers")
    # Published files describe their router in words too, and how it is trained. Transformers does not read them.
    fields.require("score_func", "sigmoid")
    fields.require("route_norm", True)
    for groups in ("n_group", "topk_group", "num_expert_groups", "num_limited_groups"):
        fields.require(groups, 1)
    fields.ignore("load_balance_coeff", "use_grouped_mm")
    windows, width = layer_types(fields), fields.take("moe_intermediate_size")
    return {
        **llama.config(fields),
        **windows,
        "rotary_layers": [kind == "local" for kind in windows["attn_types"]],
        "norm_placement": "before_and_after",
        "use_qk_norm": True,
        "attention_gate": True,
        "embedding_scale": math.sqrt(fields.take("hidden_size")) if fields.take("mup_enabled") else 1.0,
        "num_experts": fields.take("num_experts"),
        "experts_per_token": fields.take("num_experts_per_tok"),
        "norm_topk_prob": True,
        "d_expert": width,
        "d_shared_expert": width * fields.take("num_shared_experts") or None,
        "routed_scale": float(fields.take("route_scale")),
        "router_scores": "sigmoid",
        "router_correction": True,
        **dense_first(fields, "num_dense_layers"),
    }


def rules(cfg: HookedTransformerConfig, fields: ConfigFields) -> RuleTable:
    """Map the tensors of an `AfmoeForCausalLM`."""
    block, bias = "layers.{layer}", fields.take("attention_bias")
    return (
        *tables.embeddings(cfg),
        *tables.norm(f"{block}.input_layernorm", "blocks.{layer}.ln1"),
        *tables.attention(f"{block}.self_attn", qkv_bias=bias, out_bias=bias),
        *tables.attention_gate(f"{block}.self_attn.gate_proj"),
        *tables.qk_norm(f"{block}.self_attn"),
        *tables.norm(f"{block}.post_attention_layernorm", "blocks.{layer}.ln1_post"),
        *tables.norm(f"{block}.pre_mlp_layernorm", "blocks.{layer}.ln2"),
        *mixture_rules(cfg, f"{block}.mlp", router="router.gate", correction="expert_bias"),
        *tables.norm(f"{block}.post_mlp_layernorm", "blocks.{layer}.ln2_post"),
        *tables.norm("norm", "ln_final"),
    )


SITES = Sites(attn="post_attention_layernorm", mlp="post_mlp_layernorm")

FAMILY = Family("AFMoE", ("AfmoeForCausalLM",), config, rules, sites=SITES)
