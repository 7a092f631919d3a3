"""dots.llm1 (rednote-hilab 2025, "dots.llm1 Technical Report")."""

from __future__ import annotations

from hooked_lm.config import HookedTransformerConfig
from weight_conversion import tables
from weight_conversion.families import llama
from weight_conversion.family import Family
from weight_conversion.fields import Arguments, ConfigFields
from weight_conversion.layer_types import layer_types
from weight_conversion.mixtures import dense_first, mixture, mixture_rules
from weight_conversion.rules import RuleTable

__all__ = ["FAMILY", "config", "rules"]


def config(fields: ConfigFields) -> Arguments:
    """Map a `Dots1Config`."""
    # `layer_types` decides which layers have a window.
    fields.ignore("max_window_layers", "use_sliding_window")
    return {
        **llama.config(fields),
        **layer_types(fields),
        "use_qk_norm": True,
        **mixture(fields),
        **dense_first(fields),
    }


def rules(cfg: HookedTransformerConfig, fields: ConfigFields) -> RuleTable:
    """Map the tensors of a `Dots1ForCausalLM`."""
    block, bias = "layers.{layer}", fields.take("attention_bias")
    return (
        *tables.embeddings(cfg),
        *tables.norm(f"{block}.input_layernorm", "blocks.{layer}.ln1"),
        *tables.attention(f"{block}.self_attn", qkv_bias=bias, out_bias=bias),
        *tables.qk_norm(f"{block}.self_attn"),
        *tables.norm(f"{block}.post_attention_layernorm", "blocks.{layer}.ln2"),
        *mixture_rules(cfg, f"{block}.mlp"),
        *tables.norm("norm", "ln_final"),
    )


FAMILY = Family("dots.llm1", ("Dots1ForCausalLM",), config, rules)
