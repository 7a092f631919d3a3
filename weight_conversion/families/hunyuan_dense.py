"""Hunyuan without experts (Tencent 2025): queries and keys are normalised after they have rotated."""

from __future__ import annotations

from hooked_lm.config import HookedTransformerConfig
from weight_conversion import tables
from weight_conversion.family import Family
from weight_conversion.fields import Arguments, ConfigFields, HFConfig
from weight_conversion.rotary import rotary
from weight_conversion.rules import Entry, RuleTable
from weight_conversion.sizes import d_head, sizes

__all__ = ["FAMILY", "around", "config", "rules"]


def config(fields: ConfigFields) -> Arguments:
    """Map a `HunYuanDenseV1Config`."""
    fields.ignore("attention_dropout", "pretraining_tp")
    # Of a classifier, of images, and special tokens.
    fields.ignore("add_classification_head", "class_num", "dense_list", "pool_type", "mask_init_id", "org_vocab_size")
    fields.ignore("im_start_id", "im_end_id", "im_newline_id", "text_start_id", "text_end_id", "pad_id", "eod_token_id")
    # Published files give these fields; transformers does not read them. `head_dim` is the width of a head.
    fields.ignore("attention_head_dim", "cla_share_factor")
    fields.require("mlp_bias", False)
    fields.require("norm_type", "rms")
    fields.require("use_cla", False)
    fields.require("use_qk_norm", True)
    fields.require("use_rotary_pos_emb", True)
    return {
        **sizes(fields),
        "gated_mlp": True,
        "eps": fields.take("rms_norm_eps"),
        "normalization_type": "RMS",
        "use_qk_norm": True,
        "qk_norm_after_rotary": True,
        **rotary(fields, d_head(fields), parameters=_with_alpha(fields.take("rope_parameters"), d_head(fields))),
    }


def _with_alpha(given: HFConfig, d_head: int) -> HFConfig:
    """Return the rotary parameters with their `alpha` in the base.

    Published files call it "dynamic", but it is a fixed change of base, and nothing else they give is read then.
    """
    alpha = given.get("alpha")
    if given["rope_type"] != "dynamic" or not alpha:
        return {name: value for name, value in given.items() if name != "alpha"}
    return {"rope_type": "default", "rope_theta": given["rope_theta"] * alpha ** (d_head / (d_head - 2))}


def rules(cfg: HookedTransformerConfig, fields: ConfigFields) -> RuleTable:
    """Map the tensors of a `HunYuanDenseV1ForCausalLM`."""
    return around(cfg, fields, tables.gated_mlp("layers.{layer}.mlp"))


def around(cfg: HookedTransformerConfig, fields: ConfigFields, mlp: tuple[Entry, ...]) -> RuleTable:
    """Return all rows, given those of the MLP."""
    block, bias = "layers.{layer}", fields.take("attention_bias")
    return (
        *tables.embeddings(cfg),
        *tables.norm(f"{block}.input_layernorm", "blocks.{layer}.ln1"),
        *tables.attention(f"{block}.self_attn", qkv_bias=bias, out_bias=bias),
        *tables.qk_norm(f"{block}.self_attn", names=("query_layernorm", "key_layernorm")),
        *tables.norm(f"{block}.post_attention_layernorm", "blocks.{layer}.ln2"),
        *mlp,
        *tables.norm("norm", "ln_final"),
    )


FAMILY = Family("Hunyuan", ("HunYuanDenseV1ForCausalLM", "HunYuanDenseV1Model"), config, rules)
