"""Nemotron (Parmar et al. 2024, "Nemotron-4 15B"): LayerNorms with gains around zero, squared ReLU."""

from __future__ import annotations

from hooked_lm.config import HookedTransformerConfig
from weight_conversion import tables
from weight_conversion.family import Family, Sites
from weight_conversion.fields import Arguments, ConfigFields
from weight_conversion.rotary import rotary
from weight_conversion.rules import RuleTable
from weight_conversion.sizes import d_head, sizes

__all__ = ["FAMILY", "config", "rules"]


def config(fields: ConfigFields) -> Arguments:
    """Map a `NemotronConfig`."""
    fields.ignore("attention_dropout", "pretraining_tp")
    # The width of a head by another name, which transformers does not read.
    fields.ignore("kv_channels")
    return {
        **sizes(fields),
        "eps": fields.take("norm_eps"),
        "normalization_type": "LN",
        **rotary(fields, d_head(fields), partial=True),
    }


def rules(cfg: HookedTransformerConfig, fields: ConfigFields, *, added_gain: float = 1.0) -> RuleTable:
    """Map the tensors of a `NemotronForCausalLM`, or of another model with its names.

    Args:
        cfg, fields: the config, ours and theirs.
        added_gain: the number that the model adds to the stored gains.
    """
    block, bias, mlp_bias = "layers.{layer}", fields.take("attention_bias"), fields.take("mlp_bias")
    up, down = f"{block}.mlp.up_proj", f"{block}.mlp.down_proj"
    return (
        *tables.embeddings(cfg),
        *tables.norm(f"{block}.input_layernorm", "blocks.{layer}.ln1", bias=True, add=added_gain),
        *tables.attention(f"{block}.self_attn", qkv_bias=bias, out_bias=bias),
        *tables.norm(f"{block}.post_attention_layernorm", "blocks.{layer}.ln2", bias=True, add=added_gain),
        *tables.mlp(up, down, up_bias=mlp_bias, down_bias=mlp_bias),
        *tables.norm("norm", "ln_final", bias=True, add=added_gain),
    )


# Its eager attention computes the softmax in float32 for weights of any dtype.
FAMILY = Family("Nemotron", ("NemotronForCausalLM",), config, rules, sites=Sites(attention="sdpa"))
