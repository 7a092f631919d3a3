"""OLMo 2 (OLMo team 2024, "2 OLMo 2 Furious"): norms on what is written, and over all queries and keys together."""

from __future__ import annotations

from hooked_lm.config import HookedTransformerConfig
from weight_conversion import tables
from weight_conversion.families import llama
from weight_conversion.family import Family, Sites
from weight_conversion.fields import Arguments, ConfigFields
from weight_conversion.rules import RuleTable

__all__ = ["FAMILY", "SITES", "config", "rules"]


def config(fields: ConfigFields) -> Arguments:
    """Map an `Olmo2Config`."""
    return {
        **llama.config(fields),
        "norm_placement": "after",
        "use_qk_norm": True,
        "qk_norm_across_heads": True,
    }


def rules(cfg: HookedTransformerConfig, fields: ConfigFields) -> RuleTable:
    """Map the tensors of an `Olmo2ForCausalLM`."""
    block, bias = "layers.{layer}", fields.take("attention_bias")
    return (
        *tables.embeddings(cfg),
        *tables.attention(f"{block}.self_attn", qkv_bias=bias, out_bias=bias),
        *tables.qk_norm_across_heads(f"{block}.self_attn"),
        *tables.norm(f"{block}.post_attention_layernorm", "blocks.{layer}.ln1_post"),
        *tables.gated_mlp(f"{block}.mlp"),
        *tables.norm(f"{block}.post_feedforward_layernorm", "blocks.{layer}.ln2_post"),
        *tables.norm("norm", "ln_final"),
    )


SITES = Sites(attn="post_attention_layernorm", mlp="post_feedforward_layernorm")

FAMILY = Family("OLMo 2", ("Olmo2ForCausalLM",), config, rules, sites=SITES, prepend_bos=True)
