"""Seed-OSS (ByteDance Seed 2025): Llama with biases on queries, keys and values."""

from __future__ import annotations

from hooked_lm.config import HookedTransformerConfig
from weight_conversion import tables
from weight_conversion.families import llama
from weight_conversion.family import Family
from weight_conversion.fields import Arguments, ConfigFields
from weight_conversion.rules import RuleTable

__all__ = ["FAMILY", "config", "rules"]


def config(fields: ConfigFields) -> Arguments:
    """Map a `SeedOssConfig`."""
    fields.ignore("residual_dropout")
    return llama.config(fields)


def rules(cfg: HookedTransformerConfig, fields: ConfigFields) -> RuleTable:
    """Map the tensors of a `SeedOssForCausalLM`."""
    block, qkv_bias, out_bias = "layers.{layer}", fields.take("attention_bias"), fields.take("attention_out_bias")
    return (
        *tables.embeddings(cfg),
        *tables.norm(f"{block}.input_layernorm", "blocks.{layer}.ln1"),
        *tables.attention(f"{block}.self_attn", qkv_bias=qkv_bias, out_bias=out_bias),
        *tables.norm(f"{block}.post_attention_layernorm", "blocks.{layer}.ln2"),
        *tables.gated_mlp(f"{block}.mlp", bias=fields.take("mlp_bias")),
        *tables.norm("norm", "ln_final"),
    )


FAMILY = Family("Seed-OSS", ("SeedOssForCausalLM",), config, rules)
