"""Seed-OSS (ByteDance Seed 2025): Llama with biases on queries, keys and values."""

from __future__ import annotations

from hooked_lm.config import HookedTransformerConfig
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
    qkv_bias, out_bias = fields.take("attention_bias"), fields.take("attention_out_bias")
    return llama.table(cfg, qkv_bias=qkv_bias, out_bias=out_bias, mlp_bias=fields.take("mlp_bias"))


FAMILY = Family("Seed-OSS", ("SeedOssForCausalLM",), config, rules)
