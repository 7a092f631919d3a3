"""Youtu-LLM (Tencent 2025): Llama with latent attention."""

from __future__ import annotations

from hooked_lm.config import HookedTransformerConfig
from weight_conversion import tables
from weight_conversion.families import llama
from weight_conversion.family import Family
from weight_conversion.fields import Arguments, ConfigFields
from weight_conversion.latents import latent_attention, latent_config
from weight_conversion.rules import RuleTable

__all__ = ["FAMILY", "config", "rules"]


def config(fields: ConfigFields) -> Arguments:
    """Map a `YoutuConfig`."""
    fields.ignore("embedding_initializer_range")
    return {**llama.body(fields), **latent_config(fields, adjacent=fields.take("rope_interleave"))}


def rules(cfg: HookedTransformerConfig, fields: ConfigFields) -> RuleTable:
    """Map the tensors of a `YoutuForCausalLM`."""
    block = "layers.{layer}"
    return (
        *tables.embeddings(cfg),
        *tables.norm(f"{block}.input_layernorm", "blocks.{layer}.ln1"),
        *latent_attention(cfg, f"{block}.self_attn", bias=fields.take("attention_bias")),
        *tables.norm(f"{block}.post_attention_layernorm", "blocks.{layer}.ln2"),
        *tables.gated_mlp(f"{block}.mlp", bias=fields.get("mlp_bias", False)),
        *tables.norm("norm", "ln_final"),
    )


FAMILY = Family("Youtu", ("YoutuForCausalLM",), config, rules)
