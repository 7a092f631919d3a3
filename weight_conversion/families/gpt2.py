"""GPT-2 (Radford et al. 2019)."""

from __future__ import annotations

from hooked_lm.config import HookedTransformerConfig
from weight_conversion import tables
from weight_conversion.family import Family, Sites
from weight_conversion.fields import Arguments, ConfigFields
from weight_conversion.rules import Rule, RuleTable
from weight_conversion.sizes import gpt2_sizes

__all__ = ["FAMILY", "blocks", "config", "rules"]


def config(fields: ConfigFields) -> Arguments:
    """Map a `GPT2Config`."""
    fields.require("add_cross_attention", False)
    fields.ignore("attn_pdrop", "embd_pdrop", "resid_pdrop", "reorder_and_upcast_attn")
    # Fields of old files, which transformers does not read.
    fields.ignore("n_ctx", "predict_special_tokens")
    fields.require("n_special", 0)
    return {
        **gpt2_sizes(fields),
        "use_attn_scale": fields.take("scale_attn_weights"),
        "scale_attn_by_inverse_layer_idx": fields.take("scale_attn_by_inverse_layer_idx"),
        "positional_embedding_type": "standard",
        "tie_word_embeddings": fields.get("tie_word_embeddings", True),
    }


def rules(cfg: HookedTransformerConfig, fields: ConfigFields) -> RuleTable:
    """Map the tensors of a `GPT2LMHeadModel`."""
    return (
        *tables.embeddings(cfg, "wte.weight"),
        Rule("wpe.weight", "n_ctx d_model -> n_ctx d_model", "pos_embed.W_pos"),
        *blocks(),
        *tables.norm("ln_f", "ln_final", bias=True),
    )


def blocks() -> RuleTable:
    """Return the rows of the blocks. GPT-2 keeps its matrices as [in out]."""
    block = "blocks.{layer}"
    qkv_weights = tuple(f"{block}.attn.W_{letter}" for letter in "QKV")
    qkv_biases = tuple(f"{block}.attn.b_{letter}" for letter in "QKV")
    return (
        *tables.norm("h.{layer}.ln_1", f"{block}.ln1", bias=True),
        Rule("h.{layer}.attn.c_attn.weight", "d_model (part head d_head) -> part head d_model d_head", qkv_weights),
        Rule("h.{layer}.attn.c_attn.bias", "(part head d_head) -> part head d_head", qkv_biases),
        Rule("h.{layer}.attn.c_proj.weight", "(head d_head) d_model -> head d_head d_model", f"{block}.attn.W_O"),
        Rule("h.{layer}.attn.c_proj.bias", "d_model -> d_model", f"{block}.attn.b_O"),
        *tables.norm("h.{layer}.ln_2", f"{block}.ln2", bias=True),
        Rule("h.{layer}.mlp.c_fc.weight", "d_model d_mlp -> d_model d_mlp", f"{block}.mlp.W_in"),
        Rule("h.{layer}.mlp.c_fc.bias", "d_mlp -> d_mlp", f"{block}.mlp.b_in"),
        Rule("h.{layer}.mlp.c_proj.weight", "d_mlp d_model -> d_mlp d_model", f"{block}.mlp.W_out"),
        Rule("h.{layer}.mlp.c_proj.bias", "d_model -> d_model", f"{block}.mlp.b_out"),
        *tables.stored_mask("h.{layer}.attn"),
    )


FAMILY = Family(
    "GPT-2",
    ("GPT2LMHeadModel", "GPT2Model"),
    config,
    rules,
    embedding="wte.weight",
    prefix="transformer.",
    sites=Sites(layers="transformer.h", attn="attn"),
    prepend_bos=True,
)
