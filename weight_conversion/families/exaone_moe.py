"""K-EXAONE (LG AI Research 2025): beside windows, global layers do not rotate; experts after dense layers."""

from __future__ import annotations

from hooked_lm.config import HookedTransformerConfig
from weight_conversion import tables
from weight_conversion.families import llama
from weight_conversion.family import Family
from weight_conversion.fields import Arguments, ConfigFields
from weight_conversion.layer_types import layer_types
from weight_conversion.mixtures import mixture, mixture_rules, where_sparse
from weight_conversion.rules import Drop, RuleTable

__all__ = ["FAMILY", "config", "rules"]


def config(fields: ConfigFields) -> Arguments:
    """Map an `ExaoneMoeConfig`. Without a window every layer is global and rotates."""
    # `layer_types` holds the same.
    fields.ignore("sliding_window_pattern")
    windows = layer_types(fields)
    return {
        **llama.config(fields),
        "use_qk_norm": True,
        **windows,
        "rotary_layers": [windows["window_size"] is None or kind == "local" for kind in windows["attn_types"]],
        **mixture(fields, n_experts="num_experts", n_shared="num_shared_experts"),
        **where_sparse(fields),
    }


def rules(cfg: HookedTransformerConfig, fields: ConfigFields) -> RuleTable:
    """Map the tensors of an `ExaoneMoeForCausalLM`."""
    block = "layers.{layer}"
    return (
        *tables.embeddings(cfg),
        *tables.norm(f"{block}.input_layernorm", "blocks.{layer}.ln1"),
        *tables.attention(f"{block}.self_attn"),
        *tables.qk_norm(f"{block}.self_attn"),
        *tables.norm(f"{block}.post_attention_layernorm", "blocks.{layer}.ln2"),
        *mixture_rules(cfg, f"{block}.mlp", correction="e_score_correction_bias"),
        *tables.norm("norm", "ln_final"),
        Drop("mtp.*", "it predicts the tokens after the next one"),
    )


FAMILY = Family("EXAONE MoE", ("ExaoneMoeForCausalLM",), config, rules)
