"""Qwen3-MoE (Yang et al. 2025, "Qwen3 Technical Report")."""

from __future__ import annotations

from hooked_lm.config import HookedTransformerConfig
from weight_conversion import tables
from weight_conversion.families import llama
from weight_conversion.families.qwen2_moe import mixture, mlp_or_experts
from weight_conversion.family import Family
from weight_conversion.fields import Arguments, ConfigFields
from weight_conversion.rotary import rotary
from weight_conversion.rules import RuleTable
from weight_conversion.sizes import d_head

__all__ = ["FAMILY", "config", "rules"]


def config(fields: ConfigFields) -> Arguments:
    """Map a `Qwen3MoeConfig`."""
    fields.ignore("output_router_logits", "router_aux_loss_coef")
    # There is a window in every layer or in none, and none without `use_sliding_window`. The count of experts has
    # another name in files.
    fields.ignore("use_sliding_window", "max_window_layers", "num_experts")
    # Left in checkpoints by the training code. Transformers reads none of them.
    fields.require("qkv_bias", False)
    fields.require("use_qk_norm", True)
    fields.require("shared_expert_intermediate_size", 0)
    return {
        **llama.body(fields),
        "use_qk_norm": True,
        "window_size": fields.take("sliding_window"),
        "num_experts": fields.take("num_local_experts"),
        **mixture(fields),
        **rotary(fields, d_head(fields)),
    }


def rules(cfg: HookedTransformerConfig, fields: ConfigFields) -> RuleTable:
    """Map the tensors of a `Qwen3MoeForCausalLM`."""
    block, bias = "layers.{layer}", fields.take("attention_bias")
    return (
        *tables.embeddings(cfg),
        *tables.norm(f"{block}.input_layernorm", "blocks.{layer}.ln1"),
        *tables.attention(f"{block}.self_attn", qkv_bias=bias, out_bias=bias),
        *tables.qk_norm(f"{block}.self_attn"),
        *tables.norm(f"{block}.post_attention_layernorm", "blocks.{layer}.ln2"),
        *mlp_or_experts(cfg, f"{block}.mlp"),
        *tables.norm("norm", "ln_final"),
    )


FAMILY = Family("Qwen3-MoE", ("Qwen3MoeForCausalLM",), config, rules, prepend_bos=False)
