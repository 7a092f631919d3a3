"""EXAONE 4.0 (LG AI Research 2025): norms only on what is written; beside windows, global layers do not rotate."""

from __future__ import annotations

from hooked_lm.config import HookedTransformerConfig
from weight_conversion import tables
from weight_conversion.families import llama
from weight_conversion.family import Family, Sites
from weight_conversion.fields import Arguments, ConfigFields
from weight_conversion.layer_types import layer_types
from weight_conversion.rules import RuleTable

__all__ = ["FAMILY", "config", "rules"]


def config(fields: ConfigFields) -> Arguments:
    """Map an `Exaone4Config`. Without a window every layer is global and rotates."""
    # `layer_types` holds the same.
    fields.ignore("sliding_window_pattern")
    windows = layer_types(fields)
    return {
        **llama.config(fields),
        "norm_placement": "after",
        "use_qk_norm": True,
        **windows,
        "rotary_layers": [windows["window_size"] is None or kind == "local" for kind in windows["attn_types"]],
    }


def rules(cfg: HookedTransformerConfig, fields: ConfigFields) -> RuleTable:
    """Map the tensors of an `Exaone4ForCausalLM`."""
    block = "layers.{layer}"
    return (
        *tables.embeddings(cfg),
        *tables.attention(f"{block}.self_attn"),
        *tables.qk_norm(f"{block}.self_attn"),
        *tables.norm(f"{block}.post_attention_layernorm", "blocks.{layer}.ln1_post"),
        *tables.gated_mlp(f"{block}.mlp"),
        *tables.norm(f"{block}.post_feedforward_layernorm", "blocks.{layer}.ln2_post"),
        *tables.norm("norm", "ln_final"),
    )


FAMILY = Family(
    "EXAONE 4",
    ("Exaone4ForCausalLM",),
    config,
    rules,
    sites=Sites(attn="post_attention_layernorm", mlp="post_feedforward_layernorm"),
)
