"""OLMoE (Muennighoff et al. 2024, "OLMoE: Open Mixture-of-Experts Language Models")."""

from __future__ import annotations

from hooked_lm.config import HookedTransformerConfig
from weight_conversion import tables
from weight_conversion.families import llama
from weight_conversion.family import Family
from weight_conversion.fields import Arguments, ConfigFields
from weight_conversion.rules import RuleTable

__all__ = ["FAMILY", "config", "rules"]


def config(fields: ConfigFields) -> Arguments:
    """Map an `OlmoeConfig`."""
    fields.ignore("output_router_logits", "router_aux_loss_coef")
    return {
        **llama.config(fields),
        "num_experts": fields.take("num_experts"),
        "experts_per_token": fields.take("num_experts_per_tok"),
        "norm_topk_prob": fields.take("norm_topk_prob"),
        "use_qk_norm": True,
        "qk_norm_across_heads": True,
        # FlexOlmo, which shares this mapping, clips nothing.
        "clip_qkv": fields.get("clip_qkv", None),
    }


def rules(cfg: HookedTransformerConfig, fields: ConfigFields) -> RuleTable:
    """Map the tensors of an `OlmoeForCausalLM`."""
    block, bias = "layers.{layer}", fields.take("attention_bias")
    return (
        *tables.embeddings(cfg),
        *tables.norm(f"{block}.input_layernorm", "blocks.{layer}.ln1"),
        *tables.attention(f"{block}.self_attn", qkv_bias=bias, out_bias=bias),
        *tables.qk_norm_across_heads(f"{block}.self_attn"),
        *tables.norm(f"{block}.post_attention_layernorm", "blocks.{layer}.ln2"),
        *tables.router(f"{block}.mlp.gate"),
        *tables.experts(f"{block}.mlp.experts"),
        *tables.norm("norm", "ln_final"),
    )


FAMILY = Family("OLMoE", ("OlmoeForCausalLM",), config, rules, prepend_bos=True)
