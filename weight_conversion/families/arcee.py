"""Arcee (AFM-4.5B, Arcee AI 2025): Llama with a plain MLP, whose activation is the squared ReLU."""

from __future__ import annotations

from hooked_lm.config import HookedTransformerConfig
from weight_conversion import tables
from weight_conversion.families import llama
from weight_conversion.family import Family
from weight_conversion.fields import Arguments, ConfigFields
from weight_conversion.rules import RuleTable

__all__ = ["FAMILY", "config", "rules"]


def config(fields: ConfigFields) -> Arguments:
    """Map an `ArceeConfig`."""
    return {**llama.config(fields), "gated_mlp": False}


def rules(cfg: HookedTransformerConfig, fields: ConfigFields) -> RuleTable:
    """Map the tensors of an `ArceeForCausalLM`."""
    block, bias, mlp_bias = "layers.{layer}", fields.take("attention_bias"), fields.take("mlp_bias")
    up, down = f"{block}.mlp.up_proj", f"{block}.mlp.down_proj"
    return (
        *tables.embeddings(cfg),
        *tables.norm(f"{block}.input_layernorm", "blocks.{layer}.ln1"),
        *tables.attention(f"{block}.self_attn", qkv_bias=bias, out_bias=bias),
        *tables.norm(f"{block}.post_attention_layernorm", "blocks.{layer}.ln2"),
        *tables.mlp(up, down, up_bias=mlp_bias, down_bias=mlp_bias),
        *tables.norm("norm", "ln_final"),
    )


FAMILY = Family("Arcee", ("ArceeForCausalLM",), config, rules)
