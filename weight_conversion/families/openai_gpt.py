"""The first GPT (Radford et al. 2018): norms on the residual stream itself, and none at the end."""

from __future__ import annotations

from hooked_lm.config import HookedTransformerConfig
from weight_conversion import tables
from weight_conversion.families import gpt2
from weight_conversion.family import Family, Sites
from weight_conversion.fields import Arguments, ConfigFields
from weight_conversion.rules import Drop, Rule, RuleTable

__all__ = ["ACTIVATIONS", "FAMILY", "config", "rules"]

# The functions that these names stand for in this model.
ACTIVATIONS = {"gelu": "gelu_new", "relu": "relu", "silu": "silu", "swish": "silu"}


def config(fields: ConfigFields) -> Arguments:
    """Map an `OpenAIGPTConfig`."""
    fields.ignore("attn_pdrop", "embd_pdrop", "resid_pdrop")
    # Old files repeat `n_positions`, and give a number of tokens beyond `vocab_size`.
    fields.ignore("n_ctx", "predict_special_tokens")
    fields.require("n_special", 0)
    d_model, act_fn = fields.take("n_embd"), fields.take("afn")
    return {
        "n_layers": fields.take("n_layer"),
        "d_model": d_model,
        "n_heads": fields.take("n_head"),
        "d_mlp": 4 * d_model,
        "n_ctx": fields.take("n_positions"),
        "d_vocab": fields.take("vocab_size"),
        "act_fn": ACTIVATIONS.get(act_fn, act_fn),
        "eps": fields.take("layer_norm_epsilon"),
        "normalization_type": "LN",
        "norm_placement": "residual",
        "final_norm": False,
        "positional_embedding_type": "standard",
        "tie_word_embeddings": fields.take("tie_word_embeddings"),
    }


def rules(cfg: HookedTransformerConfig, fields: ConfigFields) -> RuleTable:
    """Map the tensors of an `OpenAIGPTLMHeadModel`, whose blocks have the tensors of GPT-2's."""
    return (
        *tables.embeddings(cfg, "tokens_embed.weight"),
        Rule("positions_embed.weight", "n_ctx d_model -> n_ctx d_model", "pos_embed.W_pos"),
        Drop("position_ids", "the numbers from 0 on, in old checkpoints"),
        *gpt2.blocks(),
    )


FAMILY = Family(
    "GPT",
    ("OpenAIGPTLMHeadModel", "OpenAIGPTModel"),
    config,
    rules,
    embedding="tokens_embed.weight",
    prefix="transformer.",
    sites=Sites(layers="transformer.h", attn="attn"),
)
