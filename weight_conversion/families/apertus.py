"""Apertus (Swiss AI 2025, "Apertus: Democratizing Open and Compliant LLMs"): xIELU, and normalised queries and keys."""

from __future__ import annotations

from hooked_lm.config import HookedTransformerConfig
from weight_conversion import tables
from weight_conversion.families import llama
from weight_conversion.family import Family
from weight_conversion.fields import Arguments, ConfigFields
from weight_conversion.rules import Drop, Entry, Rule, RuleTable

__all__ = ["FAMILY", "config", "rules"]


def config(fields: ConfigFields) -> Arguments:
    """Map an `ApertusConfig`, or an `Apertus1p5TextConfig`, whose unembedding may be of the first tokens only."""
    fields.ignore("hidden_dropout")
    # Published files give these fields; transformers does not read them.
    fields.require("mlp_bias", False)
    fields.require("post_norm", False)
    fields.require("qk_norm", True)
    d_vocab_out = fields.get("output_vocab_size", None) or fields.take("vocab_size")
    return {**llama.config(fields), "gated_mlp": False, "use_qk_norm": True, "d_vocab_out": d_vocab_out}


def rules(cfg: HookedTransformerConfig, fields: ConfigFields) -> RuleTable:
    """Map the tensors of an `ApertusForCausalLM`."""
    block, bias = "layers.{layer}", fields.take("attention_bias")
    return (
        *tables.embeddings(cfg),
        *tables.norm(f"{block}.attention_layernorm", "blocks.{layer}.ln1"),
        *tables.attention(f"{block}.self_attn", qkv_bias=bias, out_bias=bias),
        *tables.qk_norm(f"{block}.self_attn"),
        *tables.norm(f"{block}.feedforward_layernorm", "blocks.{layer}.ln2"),
        *tables.mlp(f"{block}.mlp.up_proj", f"{block}.mlp.down_proj"),
        *(_activation(f"{block}.mlp.act_fn") if cfg.act_fn == "xielu" else ()),
        *tables.norm("norm", "ln_final"),
    )


def _activation(source: str) -> tuple[Entry, ...]:
    """Return the rows of xIELU: two numbers that each layer learns, and two constants that checkpoints store."""
    target = "blocks.{layer}.mlp.act_fn"
    return (
        Rule(f"{source}.alpha_p", "1 -> 1", f"{target}.alpha_p"),
        Rule(f"{source}.alpha_n", "1 -> 1", f"{target}.alpha_n"),
        Drop(f"{source}.beta", "the slope at zero, which is the same in every layer", value=0.5),
        Drop(f"{source}.eps", "where the exponential is cut off just below zero", value=-1e-6),
    )


FAMILY = Family("Apertus", ("ApertusForCausalLM", "Apertus1p5TextForCausalLM"), config, rules, prepend_bos=True)
