"""OPT (Zhang et al. 2022) and Galactica (Taylor et al. 2022)."""

from __future__ import annotations

from hooked_lm.config import HookedTransformerConfig
from weight_conversion import tables
from weight_conversion.family import Family, Sites
from weight_conversion.fields import Arguments, ConfigFields
from weight_conversion.rules import Constant, Drop, Entry, Product, Rule, RuleTable

__all__ = ["FAMILY", "OFFSET", "config", "rules"]

# The first row of positions that is in use.
OFFSET = 2


def config(fields: ConfigFields) -> Arguments:
    """Map an `OPTConfig`."""
    fields.ignore("activation_dropout", "attention_dropout", "dropout", "init_std", "layerdrop")
    # Galactica's files have these fields about embeddings.
    fields.require("learned_embeddings", True)
    fields.require("scale_embeddings", False)
    pre_norm, d_model = fields.take("do_layer_norm_before"), fields.take("hidden_size")
    projected = fields.take("word_embed_proj_dim") != d_model
    # Models fine-tuned before a bug was fixed have no final norm.
    no_final_norm = fields.get("_remove_final_layer_norm", False)
    return {
        "n_layers": fields.take("num_hidden_layers"),
        "d_model": d_model,
        "n_heads": fields.take("num_attention_heads"),
        "d_mlp": fields.take("ffn_dim"),
        "n_ctx": fields.take("max_position_embeddings"),
        "d_vocab": fields.take("vocab_size"),
        "act_fn": fields.take("activation_function"),
        "eps": 1e-5,
        "normalization_type": "LN" if fields.take("layer_norm_elementwise_affine") else "LNPre",
        "norm_placement": "before" if pre_norm else "residual",
        "final_norm": pre_norm and not no_final_norm,
        "positional_embedding_type": "standard",
        # With projections around it, the one embedding of the checkpoint becomes two matrices here.
        "tie_word_embeddings": fields.take("tie_word_embeddings") and not projected,
    }


def rules(cfg: HookedTransformerConfig, fields: ConfigFields) -> RuleTable:
    """Map the tensors of an `OPTForCausalLM`."""
    block, bias = "decoder.layers.{layer}", fields.take("enable_bias")
    names = ("q_proj", "k_proj", "v_proj", "out_proj")
    positions = "n_ctx d_model -> n_ctx d_model"
    projected = fields.take("word_embed_proj_dim") != cfg.d_model
    return (
        *(_projected(fields) if projected else tables.embeddings(cfg, "decoder.embed_tokens.weight")),
        Rule("decoder.embed_positions.weight", positions, "pos_embed.W_pos", skip=OFFSET),
        *_norm(cfg, f"{block}.self_attn_layer_norm", "blocks.{layer}.ln1"),
        *tables.attention(f"{block}.self_attn", names=names, qkv_bias=bias, out_bias=bias),
        *_norm(cfg, f"{block}.final_layer_norm", "blocks.{layer}.ln2"),
        *tables.mlp(f"{block}.fc1", f"{block}.fc2", up_bias=bias, down_bias=bias),
        *(_norm(cfg, "decoder.final_layer_norm", "ln_final") if cfg.final_norm else ()),
        Drop("decoder.version", "a mark that the training code left"),
    )


def _norm(cfg: HookedTransformerConfig, source: str, target: str) -> tuple[Entry, ...]:
    return tables.norm(source, target, bias=True) if cfg.normalization_type == "LN" else ()


def _projected(fields: ConfigFields) -> tuple[Entry, ...]:
    """Embeddings narrower than the residual stream, projected into it and, for the logits, out of it again."""
    embedding, unembedding = "decoder.embed_tokens.weight", "lm_head.weight"
    W_E = Product(embedding, "decoder.project_in.weight.T", "embed.W_E")
    b_U = Constant("unembed.b_U", "vocab_out")
    if not fields.take("tie_word_embeddings"):
        return (W_E, Product("decoder.project_out.weight.T", f"{unembedding}.T", "unembed.W_U"), b_U)
    W_U = Product("decoder.project_out.weight.T", f"{embedding}.T", "unembed.W_U", again=(embedding,))
    return (W_E, W_U, Drop(unembedding, "it is the token embedding"), b_U)


FAMILY = Family(
    "OPT",
    ("OPTForCausalLM", "OPTModel"),
    config,
    rules,
    embedding="decoder.embed_tokens.weight",
    # Names on the hub have this prefix or lack its first part: the first checkpoints begin with "decoder.".
    sites=Sites(layers="model.decoder.layers", mlp="fc2"),
    prepend_bos=True,
)
