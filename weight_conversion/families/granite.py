"""Granite (IBM 2024, "Granite 3.0 Language Models"): Llama with a multiplier for every part."""

from __future__ import annotations

from hooked_lm.config import HookedTransformerConfig
from weight_conversion import tables
from weight_conversion.families import llama
from weight_conversion.family import Family, Sites
from weight_conversion.fields import Arguments, ConfigFields
from weight_conversion.rules import RuleTable

__all__ = ["FAMILY", "config", "rules"]


def config(fields: ConfigFields) -> Arguments:
    """Map a `GraniteConfig`. Scores are multiplied by a number of its own, whatever the width of a head."""
    return {
        **llama.config(fields),
        "attn_scale": 1 / fields.take("attention_multiplier"),
        "embedding_scale": fields.take("embedding_multiplier"),
        "logit_scale": 1 / fields.take("logits_scaling"),
    }


def rules(cfg: HookedTransformerConfig, fields: ConfigFields) -> RuleTable:
    """Map the tensors of a `GraniteForCausalLM`, with the residual multiplier in what is written to the stream."""
    block, bias = "layers.{layer}", fields.take("attention_bias")
    scale = fields.take("residual_multiplier")
    return (
        *tables.embeddings(cfg),
        *tables.norm(f"{block}.input_layernorm", "blocks.{layer}.ln1"),
        *tables.attention(f"{block}.self_attn", qkv_bias=bias, out_bias=bias, out_scale=scale),
        *tables.norm(f"{block}.post_attention_layernorm", "blocks.{layer}.ln2"),
        *tables.gated_mlp(f"{block}.mlp", bias=fields.take("mlp_bias"), out_scale=scale),
        *tables.norm("norm", "ln_final"),
    )


FAMILY = Family(
    "Granite",
    ("GraniteForCausalLM", "GraniteModel"),
    config,
    rules,
    sites=Sites(write_scale="residual_multiplier"),
)
