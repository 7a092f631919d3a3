"""GPT-NeoX Japanese (ABEJA 2022): sequential, without biases but for the output of the last layer's attention."""

from __future__ import annotations

from hooked_lm.config import HookedTransformerConfig
from weight_conversion import tables
from weight_conversion.family import Family, Sites
from weight_conversion.fields import Arguments, ConfigFields
from weight_conversion.rotary import rotary
from weight_conversion.rules import Constant, Rule, RuleTable

__all__ = ["FAMILY", "config", "rules"]


def config(fields: ConfigFields) -> Arguments:
    """Map a `GPTNeoXJapaneseConfig`."""
    fields.ignore("attention_dropout", "hidden_dropout")
    # Old names of the fields in `rope_parameters`.
    fields.ignore("rotary_emb_base", "rotary_pct")
    d_model, n_heads = fields.take("hidden_size"), fields.take("num_attention_heads")
    return {
        "n_layers": fields.take("num_hidden_layers"),
        "d_model": d_model,
        "n_heads": n_heads,
        "d_mlp": int(d_model * fields.take("intermediate_multiple_size")),
        "d_vocab": fields.take("vocab_size"),
        "act_fn": fields.take("hidden_act"),
        "eps": fields.take("layer_norm_eps"),
        "normalization_type": "LN",
        "tie_word_embeddings": fields.take("tie_word_embeddings"),
        **rotary(fields, d_model // n_heads, partial=True),
    }


def rules(cfg: HookedTransformerConfig, fields: ConfigFields) -> RuleTable:
    """Map the tensors of a `GPTNeoXJapaneseForCausalLM`."""
    block, attention, b_O = "layers.{layer}", "layers.{layer}.attention", "blocks.{layer}.attn.b_O"
    *others, last = range(cfg.n_layers)
    return (
        *tables.embeddings(cfg, "embed_in.weight", "embed_out"),
        *tables.norm(f"{block}.input_layernorm", "blocks.{layer}.ln1", bias=True),
        *tables.fused_qkv(f"{attention}.query_key_value"),
        Rule(f"{attention}.dense.weight", "d_model (head d_head) -> head d_head d_model", "blocks.{layer}.attn.W_O"),
        Rule(f"{attention}.dense_bias", "d_model -> d_model", b_O, layers=(last,)),
        Constant(b_O, "d_model", layers=tuple(others)),
        *tables.stored_rotary(attention),
        *tables.stored_mask(attention),
        *tables.norm(f"{block}.post_attention_layernorm", "blocks.{layer}.ln2", bias=True),
        *tables.mlp(f"{block}.mlp.dense_h_to_4h", f"{block}.mlp.dense_4h_to_h"),
        *tables.norm("final_layer_norm", "ln_final", bias=True),
    )


FAMILY = Family(
    "GPT-NeoX Japanese",
    ("GPTNeoXJapaneseForCausalLM", "GPTNeoXJapaneseModel"),
    config,
    rules,
    embedding="embed_in.weight",
    unembedding="embed_out.weight",
    prefix="gpt_neox_japanese.",
    # The bias of the last layer's attention is added outside of its module.
    sites=Sites(layers="gpt_neox_japanese.layers", attn=None),
)
