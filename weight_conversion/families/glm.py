"""GLM-4 (GLM team 2024, "ChatGLM"): a part of each head rotates, each dimension with its neighbour."""

from __future__ import annotations

from hooked_lm.config import HookedTransformerConfig
from weight_conversion import tables
from weight_conversion.families import llama
from weight_conversion.family import Family
from weight_conversion.fields import Arguments, ConfigFields
from weight_conversion.rules import Rule, RuleTable

__all__ = ["FAMILY", "config", "rules"]


def config(fields: ConfigFields) -> Arguments:
    """Map a `GlmConfig`."""
    return {**llama.config(fields, partial=True), "rotary_adjacent_pairs": True}


def rules(cfg: HookedTransformerConfig, fields: ConfigFields) -> RuleTable:
    """Map the tensors of a `GlmForCausalLM`. The gate comes first in `gate_up_proj`."""
    block, mlp = "layers.{layer}", "blocks.{layer}.mlp"
    gate_and_up = "(part d_mlp) d_model -> part d_model d_mlp"
    return (
        *tables.embeddings(cfg),
        *tables.norm(f"{block}.input_layernorm", "blocks.{layer}.ln1"),
        *tables.attention(f"{block}.self_attn", qkv_bias=fields.take("attention_bias")),
        *tables.norm(f"{block}.post_attention_layernorm", "blocks.{layer}.ln2"),
        Rule(f"{block}.mlp.gate_up_proj.weight", gate_and_up, (f"{mlp}.W_gate", f"{mlp}.W_in")),
        Rule(f"{block}.mlp.down_proj.weight", "d_model d_mlp -> d_mlp d_model", f"{mlp}.W_out"),
        *tables.no_mlp_biases(gated=True),
        *tables.norm("norm", "ln_final"),
    )


FAMILY = Family("GLM", ("GlmForCausalLM",), config, rules)
