"""HyperCLOVA X (NAVER 2025, "HyperCLOVA X THINK"): Granite's multipliers, and norms on what is written too."""

from __future__ import annotations

from hooked_lm.config import HookedTransformerConfig
from weight_conversion import tables
from weight_conversion.families import granite
from weight_conversion.family import Family, Sites
from weight_conversion.fields import Arguments, ConfigFields
from weight_conversion.rules import RuleTable

__all__ = ["FAMILY", "config", "rules"]


def config(fields: ConfigFields) -> Arguments:
    """Map a `HyperCLOVAXConfig`. Logits are multiplied by what Granite divides them by."""
    return {
        **granite.config(fields),
        "logit_scale": fields.take("logits_scaling"),
        "norm_placement": "before_and_after" if fields.take("use_post_norm") else "before",
    }


def rules(cfg: HookedTransformerConfig, fields: ConfigFields) -> RuleTable:
    """Map the tensors of a `HyperCLOVAXForCausalLM`, with the residual multiplier in the gains of the second norms."""
    if not cfg.normalizes_writes:
        return granite.rules(cfg, fields)
    block, bias = "layers.{layer}", fields.take("attention_bias")
    scale = fields.take("residual_multiplier")
    return (
        *tables.embeddings(cfg),
        *tables.norm(f"{block}.input_layernorm", "blocks.{layer}.ln1"),
        *tables.attention(f"{block}.self_attn", qkv_bias=bias, out_bias=bias),
        *tables.norm(f"{block}.post_norm1", "blocks.{layer}.ln1_post", scale=scale),
        *tables.norm(f"{block}.post_attention_layernorm", "blocks.{layer}.ln2"),
        *tables.gated_mlp(f"{block}.mlp", bias=fields.take("mlp_bias")),
        *tables.norm(f"{block}.post_norm2", "blocks.{layer}.ln2_post", scale=scale),
        *tables.norm("norm", "ln_final"),
    )


FAMILY = Family(
    "HyperCLOVA X",
    ("HyperCLOVAXForCausalLM", "HyperCLOVAXModel"),
    config,
    rules,
    sites=Sites(attn="post_norm1", mlp="post_norm2", write_scale="residual_multiplier"),
)
