"""GPT-J (Wang and Komatsuzaki 2021): attention and MLP in parallel after one norm, neighbouring dimensions rotate."""

from __future__ import annotations

from hooked_lm.config import HookedTransformerConfig
from weight_conversion import tables
from weight_conversion.family import Family, Sites
from weight_conversion.fields import Arguments, ConfigFields
from weight_conversion.rules import Entry, RuleTable
from weight_conversion.sizes import gpt2_sizes

__all__ = ["FAMILY", "around", "config", "rules"]


def config(fields: ConfigFields) -> Arguments:
    """Map a `GPTJConfig`."""
    fields.ignore("attn_pdrop", "embd_pdrop", "resid_pdrop")
    # These models rotate by code of their own, which reads `rotary_dim` alone.
    fields.ignore("rope_parameters", "rope_scaling")
    # Fields of old files, each with the value of the one model that has them.
    fields.require("rotary", True)
    fields.require("scale_attn_weights", True)
    return {
        **gpt2_sizes(fields),
        "parallel_attn_mlp": True,
        "positional_embedding_type": "rotary",
        "rotary_dim": fields.take("rotary_dim"),
        "rotary_adjacent_pairs": True,
        "tie_word_embeddings": fields.take("tie_word_embeddings"),
    }


def rules(cfg: HookedTransformerConfig, fields: ConfigFields) -> RuleTable:
    """Map the tensors of a `GPTJForCausalLM`."""
    names = ("q_proj", "k_proj", "v_proj", "out_proj")
    return around(cfg, tables.attention("h.{layer}.attn", names=names))


def around(cfg: HookedTransformerConfig, attention: tuple[Entry, ...]) -> RuleTable:
    """Return all rows, given the rows of attention's weights and biases."""
    block = "h.{layer}"
    return (
        *tables.embeddings(cfg, "wte.weight", bias=True),
        *tables.norm(f"{block}.ln_1", "blocks.{layer}.ln1", bias=True),
        *attention,
        *tables.stored_mask(f"{block}.attn"),
        *tables.norm(f"{block}.ln_1", "blocks.{layer}.ln2", bias=True, again=True),
        *tables.mlp(f"{block}.mlp.fc_in", f"{block}.mlp.fc_out", up_bias=True, down_bias=True),
        *tables.norm("ln_f", "ln_final", bias=True),
    )


FAMILY = Family(
    "GPT-J",
    ("GPTJForCausalLM",),
    config,
    rules,
    embedding="wte.weight",
    prefix="transformer.",
    sites=Sites(layers="transformer.h", attn="attn"),
    prepend_bos=True,
)
