"""Solar Open (Upstage 2025): Llama's attention, and experts in every layer."""

from __future__ import annotations

from hooked_lm.config import HookedTransformerConfig
from weight_conversion import tables
from weight_conversion.families import llama
from weight_conversion.family import Family
from weight_conversion.fields import Arguments, ConfigFields
from weight_conversion.mixtures import mixture, mixture_rules
from weight_conversion.rules import RuleTable

__all__ = ["FAMILY", "config", "rules"]


def config(fields: ConfigFields) -> Arguments:
    """Map a `SolarOpenConfig`, which has no width of dense MLPs, since there are none."""
    fields.ignore("first_k_dense_replace", "intermediate_size")
    width = fields.take("moe_intermediate_size")
    return {**llama.config(fields, d_mlp=width, partial=True), **mixture(fields)}


def rules(cfg: HookedTransformerConfig, fields: ConfigFields) -> RuleTable:
    """Map the tensors of a `SolarOpenForCausalLM`. What attention writes never has a bias."""
    block = "layers.{layer}"
    return (
        *tables.embeddings(cfg),
        *tables.norm(f"{block}.input_layernorm", "blocks.{layer}.ln1"),
        *tables.attention(f"{block}.self_attn", qkv_bias=fields.take("attention_bias")),
        *tables.norm(f"{block}.post_attention_layernorm", "blocks.{layer}.ln2"),
        *mixture_rules(cfg, f"{block}.mlp"),
        *tables.norm("norm", "ln_final"),
    )


FAMILY = Family("Solar Open", ("SolarOpenForCausalLM",), config, rules)
