"""GLM-4-0414 (GLM team 2025): GLM with norms also on what attention and MLP write."""

from __future__ import annotations

from hooked_lm.config import HookedTransformerConfig
from weight_conversion import tables
from weight_conversion.families import glm
from weight_conversion.family import Family, Sites
from weight_conversion.fields import Arguments, ConfigFields
from weight_conversion.rules import RuleTable

__all__ = ["FAMILY", "config", "rules"]


def config(fields: ConfigFields) -> Arguments:
    """Map a `Glm4Config`."""
    return {**glm.config(fields), "norm_placement": "before_and_after"}


def rules(cfg: HookedTransformerConfig, fields: ConfigFields) -> RuleTable:
    """Map the tensors of a `Glm4ForCausalLM`."""
    block = "layers.{layer}"
    return (
        *glm.rules(cfg, fields),
        *tables.norm(f"{block}.post_self_attn_layernorm", "blocks.{layer}.ln1_post"),
        *tables.norm(f"{block}.post_mlp_layernorm", "blocks.{layer}.ln2_post"),
    )


FAMILY = Family(
    "GLM 4",
    ("Glm4ForCausalLM",),
    config,
    rules,
    sites=Sites(attn="post_self_attn_layernorm", mlp="post_mlp_layernorm"),
)
