"""FlexOlmo (Shi et al. 2025, "FlexOlmo: Open Language Models for Flexible Data Use"): OLMoE with OLMo 2's norms."""

from __future__ import annotations

from hooked_lm.config import HookedTransformerConfig
from weight_conversion import tables
from weight_conversion.families import olmoe
from weight_conversion.family import Family, Sites
from weight_conversion.fields import Arguments, ConfigFields
from weight_conversion.rules import RuleTable

__all__ = ["FAMILY", "config", "rules"]


def config(fields: ConfigFields) -> Arguments:
    """Map a `FlexOlmoConfig`."""
    return {**olmoe.config(fields), "norm_placement": "after"}


def rules(cfg: HookedTransformerConfig, fields: ConfigFields) -> RuleTable:
    """Map the tensors of a `FlexOlmoForCausalLM`. Its norms stand on what attention and experts write."""
    block, bias = "layers.{layer}", fields.take("attention_bias")
    return (
        *tables.embeddings(cfg),
        *tables.attention(f"{block}.self_attn", qkv_bias=bias, out_bias=bias),
        *tables.qk_norm_across_heads(f"{block}.self_attn"),
        *tables.norm(f"{block}.post_attention_layernorm", "blocks.{layer}.ln1_post"),
        *tables.router(f"{block}.mlp.gate"),
        *tables.experts(f"{block}.mlp.experts"),
        *tables.norm(f"{block}.post_feedforward_layernorm", "blocks.{layer}.ln2_post"),
        *tables.norm("norm", "ln_final"),
    )


FAMILY = Family(
    "FlexOlmo",
    ("FlexOlmoForCausalLM",),
    config,
    rules,
    sites=Sites(attn="post_attention_layernorm", mlp="post_feedforward_layernorm"),
)
