"""Phi-1, 1.5 and 2 (Gunasekar et al. 2023): attention and MLP in parallel after one norm, biases throughout."""

from __future__ import annotations

from typing import Any

from hooked_lm.config import HookedTransformerConfig
from weight_conversion import tables
from weight_conversion.family import Family
from weight_conversion.fields import ConfigFields
from weight_conversion.rotary import rotary
from weight_conversion.rules import RuleTable


def config(fields: ConfigFields) -> dict[str, Any]:
    """Map a `PhiConfig`."""
    fields.ignore("attention_dropout", "embd_pdrop", "resid_pdrop")
    n_heads = fields.take("num_attention_heads")
    d_head = fields.get("head_dim", None) or fields.take("hidden_size") // n_heads
    return {
        "n_layers": fields.take("num_hidden_layers"),
        "d_model": fields.take("hidden_size"),
        "n_heads": n_heads,
        "n_key_value_heads": fields.take("num_key_value_heads"),
        "d_head": d_head,
        "d_mlp": fields.take("intermediate_size"),
        "d_vocab": fields.take("vocab_size"),
        "act_fn": fields.take("hidden_act"),
        "eps": fields.take("layer_norm_eps"),
        "normalization_type": "LN",
        "parallel_attn_mlp": True,
        "use_qk_norm": fields.take("qk_layernorm"),
        "qk_norm_type": "LN",
        "tie_word_embeddings": fields.take("tie_word_embeddings"),
        **rotary(fields, d_head, partial=True),
    }


def rules(cfg: HookedTransformerConfig, fields: ConfigFields) -> RuleTable:
    """Map the tensors of a `PhiForCausalLM`."""
    block, attention = "layers.{layer}", "layers.{layer}.self_attn"
    names = ("q_proj", "k_proj", "v_proj", "dense")
    return (
        *tables.embeddings(cfg, bias=True),
        *tables.norm(f"{block}.input_layernorm", "blocks.{layer}.ln1", bias=True),
        *tables.attention(attention, names=names, qkv_bias=True, out_bias=True),
        *(tables.qk_norm(attention, names=("q_layernorm", "k_layernorm"), bias=True) if cfg.use_qk_norm else ()),
        *tables.stored_rotary(attention),
        *tables.norm(f"{block}.input_layernorm", "blocks.{layer}.ln2", bias=True, again=True),
        *tables.mlp(f"{block}.mlp.fc1", f"{block}.mlp.fc2", up_bias=True, down_bias=True),
        *tables.norm("final_layernorm", "ln_final", bias=True),
    )


FAMILY = Family("Phi", ("PhiForCausalLM",), config, rules)
