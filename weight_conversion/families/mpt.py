"""MPT (MosaicML 2023): ALiBi and no biases anywhere."""

from __future__ import annotations

from hooked_lm.config import HookedTransformerConfig
from weight_conversion import tables
from weight_conversion.family import Family, Sites
from weight_conversion.fields import Arguments, ConfigFields
from weight_conversion.rules import RuleTable

__all__ = ["FAMILY", "config", "rules"]


def config(fields: ConfigFields) -> Arguments:
    """Map an `MptConfig`. What its code takes for granted whatever the config says is required to be so."""
    fields.require("no_bias", True)
    fields.require("norm_type", "low_precision_layernorm")
    fields.require("expansion_ratio", 4)
    fields.require("logit_scale", None)
    # ALiBi takes the place of learned positions; the fraction is of gradients.
    fields.ignore("learned_pos_emb", "embedding_fraction", "emb_pdrop", "resid_pdrop")
    fields.ignore("init_config", "init_device", "tokenizer_name", "verbose")
    d_model, n_heads = fields.take("d_model"), fields.take("n_heads")
    return {
        "n_layers": fields.take("n_layers"),
        "d_model": d_model,
        "n_heads": n_heads,
        "d_mlp": 4 * d_model,
        "n_ctx": fields.take("max_seq_len"),
        "d_vocab": fields.take("vocab_size"),
        "act_fn": "gelu",
        "eps": fields.take("layer_norm_epsilon"),
        "normalization_type": "LN",
        "positional_embedding_type": "alibi",
        "tie_word_embeddings": fields.take("tie_word_embeddings"),
        **_attention(fields.part(fields.take("attn_config"), "attn_config")),
    }


def _attention(fields: ConfigFields) -> Arguments:
    """Map an `MptAttentionConfig`."""
    fields.require("attn_type", "multihead_attention")
    fields.require("alibi", True)
    # Transformers always builds slopes with 8: it would run a model trained with another wrongly.
    fields.require("alibi_bias_max", 8)
    fields.require("qk_ln", False)
    fields.require("prefix_lm", False)
    fields.ignore("attn_impl", "attn_pdrop", "attn_uses_sequence_id")
    scale = fields.take("softmax_scale")
    # A clip of 0 means none.
    arguments = {"clip_qkv": fields.take("clip_qkv") or None}
    fields.finish()
    return arguments if scale is None else {**arguments, "attn_scale": 1 / scale}


def rules(cfg: HookedTransformerConfig, fields: ConfigFields) -> RuleTable:
    """Map the tensors of an `MptForCausalLM`."""
    block = "blocks.{layer}"
    return (
        *tables.embeddings(cfg, "wte.weight"),
        *tables.biasless_layer_norm(f"{block}.norm_1", f"{block}.ln1"),
        *tables.fused_qkv(f"{block}.attn.Wqkv", order="part head d_head"),
        *tables.attention_output(f"{block}.attn.out_proj"),
        *tables.biasless_layer_norm(f"{block}.norm_2", f"{block}.ln2"),
        *tables.mlp(f"{block}.ffn.up_proj", f"{block}.ffn.down_proj"),
        *tables.biasless_layer_norm("norm_f", "ln_final"),
    )


FAMILY = Family(
    "MPT",
    # Published checkpoints name the second.
    ("MptForCausalLM", "MPTForCausalLM", "MptModel"),
    config,
    rules,
    embedding="wte.weight",
    prefix="transformer.",
    # The output of `ffn` includes the residual stream.
    sites=Sites(layers="transformer.blocks", attn="attn", mlp="ffn.down_proj"),
)
