"""GLM-4.5 (GLM team 2025, "GLM-4.5: Agentic, Reasoning, and Coding Foundation Models")."""

from __future__ import annotations

from hooked_lm.config import HookedTransformerConfig
from weight_conversion import tables
from weight_conversion.families import llama
from weight_conversion.family import Family
from weight_conversion.fields import Arguments, ConfigFields
from weight_conversion.mixtures import dense_first, mixture, mixture_rules
from weight_conversion.rules import RuleTable

__all__ = ["FAMILY", "config", "rules"]


def config(fields: ConfigFields) -> Arguments:
    """Map a `Glm4MoeConfig`. A half of each head rotates."""
    return {
        **llama.config(fields, partial=True),
        "use_qk_norm": fields.take("use_qk_norm"),
        **mixture(fields),
        **dense_first(fields),
    }


def rules(cfg: HookedTransformerConfig, fields: ConfigFields) -> RuleTable:
    """Map the tensors of a `Glm4MoeForCausalLM`. What attention writes never has a bias."""
    block = "layers.{layer}"
    return (
        *tables.embeddings(cfg),
        *tables.norm(f"{block}.input_layernorm", "blocks.{layer}.ln1"),
        *tables.attention(f"{block}.self_attn", qkv_bias=fields.take("attention_bias")),
        *(tables.qk_norm(f"{block}.self_attn") if cfg.use_qk_norm else ()),
        *tables.norm(f"{block}.post_attention_layernorm", "blocks.{layer}.ln2"),
        *mixture_rules(cfg, f"{block}.mlp"),
        *tables.norm("norm", "ln_final"),
        *tables.added_layers(cfg, fields.get("num_nextn_predict_layers", 0)),
    )


FAMILY = Family("GLM 4 MoE", ("Glm4MoeForCausalLM",), config, rules)
