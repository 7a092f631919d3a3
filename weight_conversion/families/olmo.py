"""OLMo (Groeneveld et al. 2024, "Accelerating the Science of Language Models"): LayerNorms without gain or bias."""

from __future__ import annotations

from hooked_lm.config import HookedTransformerConfig
from weight_conversion import tables
from weight_conversion.families import llama
from weight_conversion.family import Family
from weight_conversion.fields import Arguments, ConfigFields
from weight_conversion.rules import RuleTable

__all__ = ["FAMILY", "config", "rules"]


def config(fields: ConfigFields) -> Arguments:
    """Map an `OlmoConfig`. Transformers fixes the norms' epsilon."""
    fields.ignore("rms_norm_eps")
    return {
        **llama.config(fields, eps=1e-5),
        "normalization_type": "LNPre",
        "clip_qkv": fields.take("clip_qkv"),
    }


def rules(cfg: HookedTransformerConfig, fields: ConfigFields) -> RuleTable:
    """Map the tensors of an `OlmoForCausalLM`."""
    block, bias = "layers.{layer}", fields.take("attention_bias")
    return (
        *tables.embeddings(cfg),
        *tables.attention(f"{block}.self_attn", qkv_bias=bias, out_bias=bias),
        *tables.gated_mlp(f"{block}.mlp"),
    )


FAMILY = Family("OLMo", ("OlmoForCausalLM",), config, rules, prepend_bos=True)
