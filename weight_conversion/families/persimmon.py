"""Persimmon (Adept 2023): norms on queries and keys, a squared ReLU, part of each head rotating."""

from __future__ import annotations

from hooked_lm.config import HookedTransformerConfig
from weight_conversion import tables
from weight_conversion.family import Family
from weight_conversion.fields import Arguments, ConfigFields
from weight_conversion.rotary import rotary
from weight_conversion.rules import RuleTable

__all__ = ["FAMILY", "config", "rules"]


def config(fields: ConfigFields) -> Arguments:
    """Map a `PersimmonConfig`."""
    fields.ignore("attention_dropout", "hidden_dropout")
    n_heads = fields.take("num_attention_heads")
    fields.require("num_key_value_heads", n_heads)
    d_head = fields.take("hidden_size") // n_heads
    return {
        "n_layers": fields.take("num_hidden_layers"),
        "d_model": fields.take("hidden_size"),
        "n_heads": n_heads,
        "d_mlp": fields.take("intermediate_size"),
        "d_vocab": fields.take("vocab_size"),
        "act_fn": fields.take("hidden_act"),
        "eps": fields.take("layer_norm_eps"),
        "normalization_type": "LN",
        "use_qk_norm": fields.take("qk_layernorm"),
        "qk_norm_type": "LN",
        "tie_word_embeddings": fields.take("tie_word_embeddings"),
        **rotary(fields, d_head, partial=True),
    }


def rules(cfg: HookedTransformerConfig, fields: ConfigFields) -> RuleTable:
    """Map the tensors of a `PersimmonForCausalLM`."""
    block, attention = "layers.{layer}", "layers.{layer}.self_attn"
    return (
        *tables.embeddings(cfg),
        *tables.norm(f"{block}.input_layernorm", "blocks.{layer}.ln1", bias=True),
        *tables.fused_qkv(f"{attention}.query_key_value", bias=True),
        *(tables.qk_norm(attention, names=("q_layernorm", "k_layernorm"), bias=True) if cfg.use_qk_norm else ()),
        *tables.attention_output(f"{attention}.dense", bias=True),
        *tables.stored_rotary(attention),
        *tables.norm(f"{block}.post_attention_layernorm", "blocks.{layer}.ln2", bias=True),
        *tables.mlp(f"{block}.mlp.dense_h_to_4h", f"{block}.mlp.dense_4h_to_h", up_bias=True, down_bias=True),
        *tables.norm("final_layernorm", "ln_final", bias=True),
    )


FAMILY = Family("Persimmon", ("PersimmonForCausalLM",), config, rules)
