"""Hunyuan 3 (Tencent 2026): a norm on each head's queries and keys, and experts after a dense layer."""

from __future__ import annotations

from hooked_lm.config import HookedTransformerConfig
from weight_conversion import tables
from weight_conversion.families import llama
from weight_conversion.family import Family
from weight_conversion.fields import Arguments, ConfigFields
from weight_conversion.mixtures import ignore_training, mixture_rules, where_sparse, widths
from weight_conversion.rules import RuleTable

__all__ = ["FAMILY", "config", "rules"]


def config(fields: ConfigFields) -> Arguments:
    """Map a `HYV3Config`."""
    ignore_training(fields)
    # In what precision experts and shared expert are added; see `router_in_float32` for the router.
    fields.ignore("enable_moe_fp32_combine")
    return {
        **llama.config(fields),
        "use_qk_norm": True,
        "num_experts": fields.take("num_experts"),
        "experts_per_token": fields.take("num_experts_per_tok"),
        "norm_topk_prob": True,
        **widths(fields, "num_shared_experts"),
        "routed_scale": fields.take("router_scaling_factor"),
        "router_scores": "sigmoid",
        "router_correction": True,
        "router_in_float32": True,
        **where_sparse(fields),
    }


def rules(cfg: HookedTransformerConfig, fields: ConfigFields) -> RuleTable:
    """Map the tensors of a `HYV3ForCausalLM`."""
    block, bias = "layers.{layer}", fields.take("attention_bias")
    return (
        *tables.embeddings(cfg),
        *tables.norm(f"{block}.input_layernorm", "blocks.{layer}.ln1"),
        *tables.attention(f"{block}.self_attn", qkv_bias=bias, out_bias=bias),
        *tables.qk_norm(f"{block}.self_attn"),
        *tables.norm(f"{block}.post_attention_layernorm", "blocks.{layer}.ln2"),
        *mixture_rules(
            cfg,
            f"{block}.mlp",
            router="router.gate",
            correction="expert_bias",
            shared="shared_mlp",
            bias=fields.take("mlp_bias"),
        ),
        *tables.norm("norm", "ln_final"),
    )


FAMILY = Family("Hunyuan 3", ("HYV3ForCausalLM",), config, rules)
