"""GPT-Neo (Black et al. 2021) and TinyStories (Eldan and Li 2023): local layers in turn, and scores not scaled."""

from __future__ import annotations

from hooked_lm.config import HookedTransformerConfig
from weight_conversion import tables
from weight_conversion.family import Family, Sites
from weight_conversion.fields import Arguments, ConfigFields
from weight_conversion.rules import Rule, RuleTable

__all__ = ["FAMILY", "config", "rules"]


def config(fields: ConfigFields) -> Arguments:
    """Map a `GPTNeoConfig`."""
    fields.ignore("attention_dropout", "classifier_dropout", "embed_dropout", "resid_dropout")
    # `attention_layers` holds the same, layer by layer.
    fields.ignore("attention_types")
    d_model, layers = fields.take("hidden_size"), fields.take("attention_layers")
    window = fields.take("window_size")
    return {
        "n_layers": fields.take("num_layers"),
        "d_model": d_model,
        "n_heads": fields.take("num_heads"),
        "d_mlp": fields.take("intermediate_size") or 4 * d_model,
        "n_ctx": fields.take("max_position_embeddings"),
        "d_vocab": fields.take("vocab_size"),
        "act_fn": fields.take("activation_function"),
        "eps": fields.take("layer_norm_epsilon"),
        "attn_types": list(layers),
        "window_size": window if "local" in layers else None,
        "use_attn_scale": False,
        "normalization_type": "LN",
        "positional_embedding_type": "standard",
        "tie_word_embeddings": fields.take("tie_word_embeddings"),
    }


def rules(cfg: HookedTransformerConfig, fields: ConfigFields) -> RuleTable:
    """Map the tensors of a `GPTNeoForCausalLM`."""
    block, attention = "h.{layer}", "h.{layer}.attn.attention"
    names = ("q_proj", "k_proj", "v_proj", "out_proj")
    return (
        *tables.embeddings(cfg, "wte.weight"),
        Rule("wpe.weight", "n_ctx d_model -> n_ctx d_model", "pos_embed.W_pos"),
        *tables.norm(f"{block}.ln_1", "blocks.{layer}.ln1", bias=True),
        *tables.attention(attention, names=names, out_bias=True),
        *tables.stored_mask(attention),
        *tables.norm(f"{block}.ln_2", "blocks.{layer}.ln2", bias=True),
        *tables.mlp(f"{block}.mlp.c_fc", f"{block}.mlp.c_proj", up_bias=True, down_bias=True),
        *tables.norm("ln_f", "ln_final", bias=True),
    )


FAMILY = Family(
    "GPT-Neo",
    ("GPTNeoForCausalLM", "GPTNeoModel"),
    config,
    rules,
    embedding="wte.weight",
    prefix="transformer.",
    sites=Sites(layers="transformer.h", attn="attn"),
    prepend_bos=True,
)
