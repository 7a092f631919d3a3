"""Bloom (BigScience 2022): ALiBi, and a norm after the embedding."""

from __future__ import annotations

from hooked_lm.config import HookedTransformerConfig
from weight_conversion import tables
from weight_conversion.family import Family, Sites
from weight_conversion.fields import Arguments, ConfigFields
from weight_conversion.rules import RuleTable

__all__ = ["FAMILY", "config", "rules"]


def config(fields: ConfigFields) -> Arguments:
    """Map a `BloomConfig`."""
    fields.require("apply_residual_connection_post_layernorm", False)
    # With this field and tensor parallelism, transformers leaves out the output biases of attention and MLP.
    fields.require("slow_but_exact", False)
    fields.require("n_inner", None)
    fields.ignore("attention_dropout", "hidden_dropout", "pretraining_tp")
    # Settings of the training code; transformers has other names for the last two.
    fields.ignore("attention_softmax_in_fp32", "bias_dropout_fusion", "masked_softmax_fusion", "offset_alibi")
    fields.ignore("skip_bias_add", "skip_bias_add_qkv", "unk_token_id", "n_embed", "num_attention_heads")
    d_model = fields.take("hidden_size")
    return {
        "n_layers": fields.take("n_layer"),
        "d_model": d_model,
        "n_heads": fields.take("n_head"),
        "d_mlp": 4 * d_model,
        # ALiBi sets no limit on the context; the training sequences were this long.
        "n_ctx": fields.get("seq_length", 2048),
        "d_vocab": fields.take("vocab_size"),
        "act_fn": "gelu_new",
        "eps": fields.take("layer_norm_epsilon"),
        "normalization_type": "LN",
        "post_embedding_ln": True,
        "positional_embedding_type": "alibi",
        "tie_word_embeddings": fields.take("tie_word_embeddings"),
    }


def rules(cfg: HookedTransformerConfig, fields: ConfigFields) -> RuleTable:
    """Map the tensors of a `BloomForCausalLM`."""
    block = "h.{layer}"
    return (
        *tables.embeddings(cfg, "word_embeddings.weight"),
        *tables.norm("word_embeddings_layernorm", "embed.ln", bias=True),
        *tables.norm(f"{block}.input_layernorm", "blocks.{layer}.ln1", bias=True),
        *tables.fused_qkv(f"{block}.self_attention.query_key_value", bias=True),
        *tables.attention_output(f"{block}.self_attention.dense", bias=True),
        *tables.norm(f"{block}.post_attention_layernorm", "blocks.{layer}.ln2", bias=True),
        *tables.mlp(f"{block}.mlp.dense_h_to_4h", f"{block}.mlp.dense_4h_to_h", up_bias=True, down_bias=True),
        *tables.norm("ln_f", "ln_final", bias=True),
    )


FAMILY = Family(
    "Bloom",
    ("BloomForCausalLM", "BloomModel"),
    config,
    rules,
    embedding="word_embeddings.weight",
    prefix="transformer.",
    # The modules around these two add the residual stream.
    sites=Sites(layers="transformer.h", attn="self_attention.dense", mlp="mlp.dense_4h_to_h"),
    prepend_bos=False,
)
