"""OLMoE (Muennighoff et al. 2024, "OLMoE: Open Mixture-of-Experts Language Models")."""

from __future__ import annotations

from typing import Any

from hooked_lm.config import HookedTransformerConfig
from weight_conversion import tables
from weight_conversion.family import Family
from weight_conversion.fields import ConfigFields
from weight_conversion.rotary import rotary
from weight_conversion.rules import RuleTable


def config(fields: ConfigFields) -> dict[str, Any]:
    """Map an `OlmoeConfig`."""
    fields.ignore("attention_dropout", "output_router_logits", "router_aux_loss_coef")
    n_heads = fields.take("num_attention_heads")
    d_head = fields.take("hidden_size") // n_heads
    return {
        "n_layers": fields.take("num_hidden_layers"),
        "d_model": fields.take("hidden_size"),
        "n_heads": n_heads,
        "n_key_value_heads": fields.take("num_key_value_heads"),
        "d_head": d_head,
        "d_mlp": fields.take("intermediate_size"),
        "d_vocab": fields.take("vocab_size"),
        "act_fn": fields.take("hidden_act"),
        "gated_mlp": True,
        "num_experts": fields.take("num_experts"),
        "experts_per_token": fields.take("num_experts_per_tok"),
        "norm_topk_prob": fields.take("norm_topk_prob"),
        "eps": fields.take("rms_norm_eps"),
        "normalization_type": "RMS",
        "use_qk_norm": True,
        "qk_norm_across_heads": True,
        # FlexOlmo, which shares this mapping, clips nothing.
        "clip_qkv": fields.get("clip_qkv", None),
        "tie_word_embeddings": fields.take("tie_word_embeddings"),
        **rotary(fields, d_head),
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


FAMILY = Family("OLMoE", ("OlmoeForCausalLM",), config, rules)
