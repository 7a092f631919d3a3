"""Llama (Touvron et al. 2023), with every scaling of its rotary positions."""

from __future__ import annotations

from hooked_lm.config import HookedTransformerConfig
from weight_conversion import tables
from weight_conversion.family import Family
from weight_conversion.fields import Arguments, ConfigFields
from weight_conversion.rotary import rotary
from weight_conversion.rules import RuleTable
from weight_conversion.sizes import d_head, sizes

__all__ = ["FAMILY", "body", "config", "rules", "table"]


def config(
    fields: ConfigFields, *, eps: float | None = None, d_mlp: int | None = None, partial: bool = False
) -> Arguments:
    """Map a `LlamaConfig`, or another that has its fields.

    Args:
        fields: of the config.
        eps: of the norms, where the config does not say it.
        d_mlp: hidden width of dense MLPs, where the config does not say it.
        partial: the family may rotate a part of each head.
    """
    return {**body(fields, eps=eps, d_mlp=d_mlp), **rotary(fields, d_head(fields), partial=partial)}


def body(fields: ConfigFields, *, eps: float | None = None, d_mlp: int | None = None) -> Arguments:
    """Map all but the rotary positions."""
    fields.ignore("attention_dropout", "pretraining_tp", "rope_interleaved")
    # Left in files by training code and other tools; transformers reads none of them.
    fields.ignore("is_llama_config", "max_sequence_length", "transformers.js_config")
    return {
        **sizes(fields, d_mlp=d_mlp),
        "gated_mlp": True,
        "eps": fields.take("rms_norm_eps") if eps is None else eps,
        "normalization_type": "RMS",
    }


def rules(cfg: HookedTransformerConfig, fields: ConfigFields) -> RuleTable:
    """Map the tensors of a `LlamaForCausalLM`."""
    # Configs of CWM, whose tensors have these names too, have no such field.
    bias = fields.get("attention_bias", False)
    return table(cfg, qkv_bias=bias, out_bias=bias, mlp_bias=fields.take("mlp_bias"))


def table(
    cfg: HookedTransformerConfig, *, qkv_bias: bool = False, out_bias: bool = False, mlp_bias: bool = False
) -> RuleTable:
    """Return the rows of Llama's tensors and of those of the families that differ from it in their biases.

    Args:
        cfg: the config.
        qkv_bias, out_bias, mlp_bias: which linear layers have a bias.
    """
    block = "layers.{layer}"
    return (
        *tables.embeddings(cfg),
        *tables.norm(f"{block}.input_layernorm", "blocks.{layer}.ln1"),
        *tables.attention(f"{block}.self_attn", qkv_bias=qkv_bias, out_bias=out_bias),
        *tables.stored_rotary(f"{block}.self_attn"),
        *tables.norm(f"{block}.post_attention_layernorm", "blocks.{layer}.ln2"),
        *tables.gated_mlp(f"{block}.mlp", bias=mlp_bias),
        *tables.norm("norm", "ln_final"),
    )


FAMILY = Family("Llama", ("LlamaForCausalLM", "LlamaModel"), config, rules, prepend_bos=True)
