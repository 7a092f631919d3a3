"""ERNIE 4.5 with experts (Baidu 2025, "ERNIE 4.5 Technical Report"): a softmax, and a correction of the choice."""

from __future__ import annotations

from hooked_lm.config import HookedTransformerConfig
from weight_conversion import tables
from weight_conversion.families import llama
from weight_conversion.family import Family
from weight_conversion.fields import Arguments, ConfigFields
from weight_conversion.mixtures import ignore_training, mixture_rules, widths
from weight_conversion.rules import Drop, RuleTable

__all__ = ["FAMILY", "config", "rules"]


def config(fields: ConfigFields) -> Arguments:
    """Map an `Ernie4_5_MoeConfig`."""
    ignore_training(fields)
    every, first, last = (fields.take(f"moe_layer_{name}") for name in ("interval", "start_index", "end_index"))
    return {
        **llama.config(fields),
        "rotary_adjacent_pairs": True,
        "num_experts": fields.take("moe_num_experts"),
        "experts_per_token": fields.take("moe_k"),
        "norm_topk_prob": True,
        **widths(fields, "moe_num_shared_experts"),
        "norm_topk_min": fields.take("moe_norm_min"),
        "router_correction": True,
        "router_in_float32": True,
        "moe_layers": [
            first <= layer <= last and (layer + 1) % every == 0 for layer in range(fields.take("num_hidden_layers"))
        ],
    }


def rules(cfg: HookedTransformerConfig, fields: ConfigFields) -> RuleTable:
    """Map the tensors of an `Ernie4_5_MoeForCausalLM`. Linear layers all have a bias, or none; experts never do."""
    block, bias = "layers.{layer}", fields.take("use_bias")
    return (
        *tables.embeddings(cfg, bias=bias),
        *tables.norm(f"{block}.input_layernorm", "blocks.{layer}.ln1"),
        *tables.attention(f"{block}.self_attn", qkv_bias=bias, out_bias=bias),
        *tables.norm(f"{block}.post_attention_layernorm", "blocks.{layer}.ln2"),
        *mixture_rules(
            cfg,
            f"{block}.mlp",
            correction="moe_statics.e_score_correction_bias",
            correction_axes="1 expert -> expert",
            bias=bias,
        ),
        *tables.norm("norm", "ln_final"),
        Drop("mtp_*", "it predicts the tokens after the next one"),
    )


FAMILY = Family("ERNIE 4.5 MoE", ("Ernie4_5_MoeForCausalLM",), config, rules)
