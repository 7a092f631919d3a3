"""Gemma (Gemma team 2024): Llama with embeddings times the root of the width, gains stored less 1."""

from __future__ import annotations

import math

from hooked_lm.config import HookedTransformerConfig
from weight_conversion import tables
from weight_conversion.errors import CheckpointError
from weight_conversion.family import Family
from weight_conversion.fields import Arguments, ConfigFields
from weight_conversion.rotary import rotary
from weight_conversion.rules import Entry, RuleTable
from weight_conversion.sizes import d_head

__all__ = ["FAMILY", "GAIN", "around_the_norms", "body", "config", "rules"]

# The number that the model adds to a stored gain.
GAIN = 1.0


def config(fields: ConfigFields) -> Arguments:
    """Map a `GemmaConfig`."""
    # Some published files have a second name for this field; transformers reads the first.
    fields.ignore("hidden_activation")
    return {**body(fields, act_fn="hidden_act"), **rotary(fields, d_head(fields))}


def body(fields: ConfigFields, act_fn: str = "hidden_activation") -> Arguments:
    """Map all but the rotary positions. The activation has one of two names.

    Raises:
        CheckpointError: the model attends in both directions, as those that embed text do.
    """
    if fields.get("use_bidirectional_attention", None):
        raise CheckpointError(f"{fields.family} with use_bidirectional_attention=True is not supported")
    # It is about the cache while generating.
    fields.ignore("cache_implementation", "attention_dropout")
    d_model = fields.take("hidden_size")
    return {
        "n_layers": fields.take("num_hidden_layers"),
        "d_model": d_model,
        "n_heads": fields.take("num_attention_heads"),
        "n_key_value_heads": fields.take("num_key_value_heads"),
        "d_head": d_head(fields),
        "d_mlp": fields.take("intermediate_size"),
        "d_vocab": fields.take("vocab_size"),
        "act_fn": fields.take(act_fn),
        "gated_mlp": True,
        "eps": fields.take("rms_norm_eps"),
        "normalization_type": "RMS",
        "embedding_scale": math.sqrt(d_model),
        "tie_word_embeddings": fields.take("tie_word_embeddings"),
    }


def rules(cfg: HookedTransformerConfig, fields: ConfigFields) -> RuleTable:
    """Map the tensors of a `GemmaForCausalLM`."""
    return (
        *around_the_norms(cfg, fields),
        *tables.norm("layers.{layer}.input_layernorm", "blocks.{layer}.ln1", add=GAIN),
        *tables.norm("layers.{layer}.post_attention_layernorm", "blocks.{layer}.ln2", add=GAIN),
    )


def around_the_norms(cfg: HookedTransformerConfig, fields: ConfigFields) -> tuple[Entry, ...]:
    """Return the rows of everything but the blocks' norms, whose names differ from Gemma to Gemma."""
    attention, bias = "layers.{layer}.self_attn", fields.take("attention_bias")
    return (
        *tables.embeddings(cfg),
        *tables.attention(attention, qkv_bias=bias, out_bias=bias),
        *tables.stored_rotary(attention),
        *tables.gated_mlp("layers.{layer}.mlp"),
        *tables.norm("norm", "ln_final", add=GAIN),
    )


FAMILY = Family("Gemma", ("GemmaForCausalLM", "GemmaModel"), config, rules, prepend_bos=True)
