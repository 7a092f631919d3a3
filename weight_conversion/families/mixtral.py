"""Mixtral (Jiang et al. 2024, "Mixtral of Experts")."""

from __future__ import annotations

from typing import Any

from hooked_lm.config import HookedTransformerConfig
from weight_conversion import tables
from weight_conversion.family import Family
from weight_conversion.fields import ConfigFields
from weight_conversion.rotary import rotary
from weight_conversion.rules import RuleTable


def config(fields: ConfigFields) -> dict[str, Any]:
    """Map a `MixtralConfig`."""
    fields.ignore("attention_dropout", "output_router_logits", "router_aux_loss_coef", "router_jitter_noise")
    n_heads = fields.take("num_attention_heads")
    d_head = fields.take("head_dim") or fields.take("hidden_size") // n_heads
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
        "num_experts": fields.take("num_local_experts"),
        "experts_per_token": fields.take("num_experts_per_tok"),
        "eps": fields.take("rms_norm_eps"),
        "normalization_type": "RMS",
        "window_size": fields.take("sliding_window"),
        "tie_word_embeddings": fields.take("tie_word_embeddings"),
        **rotary(fields, d_head),
    }


def rules(cfg: HookedTransformerConfig, fields: ConfigFields) -> RuleTable:
    """Map the tensors of a `MixtralForCausalLM`, whose files keep the names its authors gave the experts."""
    block = "layers.{layer}"
    return (
        *tables.embeddings(cfg),
        *tables.norm(f"{block}.input_layernorm", "blocks.{layer}.ln1"),
        *tables.attention(f"{block}.self_attn"),
        *tables.norm(f"{block}.post_attention_layernorm", "blocks.{layer}.ln2"),
        *tables.router(f"{block}.block_sparse_moe.gate"),
        *tables.experts(f"{block}.block_sparse_moe.experts", names=("w1", "w3", "w2")),
        *tables.norm("norm", "ln_final"),
    )


FAMILY = Family("Mixtral", ("MixtralForCausalLM",), config, rules)
