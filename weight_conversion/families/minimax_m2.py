"""MiniMax-M2 (MiniMax 2025): a norm over all queries and one over all keys, and sigmoids that weight experts."""

from __future__ import annotations

from hooked_lm.config import HookedTransformerConfig
from weight_conversion import tables
from weight_conversion.families import llama
from weight_conversion.family import Family
from weight_conversion.fields import Arguments, ConfigFields
from weight_conversion.mixtures import ignore_training
from weight_conversion.rules import RuleTable

__all__ = ["FAMILY", "config", "rules"]


def config(fields: ConfigFields) -> Arguments:
    """Map a `MiniMaxM2Config`."""
    ignore_training(fields)
    # Published files give these fields; transformers does not read them. `rotary_dim` says in another way which part of
    # a head rotates.
    fields.ignore("rotary_dim", "mtp_transformer_layers", "num_mtp_modules", "shared_moe_mode")
    fields.require("attn_type_list", [1] * fields.take("num_hidden_layers"))
    fields.require("qk_norm_type", "per_layer")
    fields.require("scoring_func", "sigmoid")
    fields.require("shared_intermediate_size", 0)
    fields.require("sliding_window", None)
    fields.require("use_mtp", True)
    fields.require("use_qk_norm", True)
    fields.require("use_routing_bias", True)
    return {
        **llama.config(fields, partial=True),
        "use_qk_norm": True,
        "qk_norm_across_heads": True,
        "num_experts": fields.take("num_local_experts"),
        "experts_per_token": fields.take("num_experts_per_tok"),
        "norm_topk_prob": True,
        "router_scores": "sigmoid",
        "router_correction": True,
    }


def rules(cfg: HookedTransformerConfig, fields: ConfigFields) -> RuleTable:
    """Map the tensors of a `MiniMaxM2ForCausalLM`, whose files name the experts as Mixtral's do."""
    block = "layers.{layer}"
    experts = f"{block}.block_sparse_moe"
    return (
        *tables.embeddings(cfg),
        *tables.norm(f"{block}.input_layernorm", "blocks.{layer}.ln1"),
        *tables.attention(f"{block}.self_attn"),
        *tables.qk_norm_across_heads(f"{block}.self_attn"),
        *tables.norm(f"{block}.post_attention_layernorm", "blocks.{layer}.ln2"),
        *tables.router(f"{experts}.gate"),
        *tables.router_correction(f"{experts}.e_score_correction_bias"),
        *tables.experts(f"{experts}.experts", names=("w1", "w3", "w2")),
        *tables.norm("norm", "ln_final"),
    )


FAMILY = Family("MiniMax-M2", ("MiniMaxM2ForCausalLM",), config, rules)
