"""Phi-1, 1.5 and 2 (Gunasekar et al. 2023): attention and MLP in parallel after one norm, biases throughout."""

from __future__ import annotations

from hooked_lm.config import HookedTransformerConfig
from weight_conversion import tables
from weight_conversion.family import Family
from weight_conversion.fields import Arguments, ConfigFields
from weight_conversion.rotary import rotary
from weight_conversion.rules import RuleTable
from weight_conversion.sizes import d_head, sizes

__all__ = ["FAMILY", "config", "rules"]


def config(fields: ConfigFields) -> Arguments:
    """Map a `PhiConfig`."""
    fields.ignore("attention_dropout", "embd_pdrop", "resid_pdrop")
    return {
        **sizes(fields),
        "eps": fields.take("layer_norm_eps"),
        "normalization_type": "LN",
        "parallel_attn_mlp": True,
        "use_qk_norm": fields.take("qk_layernorm"),
        "qk_norm_type": "LN",
        **rotary(fields, d_head(fields), partial=True),
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


FAMILY = Family("Phi", ("PhiForCausalLM",), config, rules, prepend_bos=False)
