"""Mixtral (Jiang et al. 2024, "Mixtral of Experts")."""

from __future__ import annotations

from hooked_lm.config import HookedTransformerConfig
from weight_conversion import tables
from weight_conversion.families import llama
from weight_conversion.family import Family
from weight_conversion.fields import Arguments, ConfigFields
from weight_conversion.rules import RuleTable

__all__ = ["FAMILY", "config", "rules"]


def config(fields: ConfigFields) -> Arguments:
    """Map a `MixtralConfig`."""
    fields.ignore("output_router_logits", "router_aux_loss_coef", "router_jitter_noise")
    return {
        **llama.config(fields),
        "num_experts": fields.take("num_local_experts"),
        "experts_per_token": fields.take("num_experts_per_tok"),
        "norm_topk_prob": True,
        "window_size": fields.take("sliding_window"),
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


FAMILY = Family("Mixtral", ("MixtralForCausalLM",), config, rules, prepend_bos=True)
