"""StarCoder 2 (Lozhkov et al. 2024): grouped queries, a sliding window, biases throughout."""

from __future__ import annotations

from typing import Any

from hooked_lm.config import HookedTransformerConfig
from weight_conversion import tables
from weight_conversion.family import Family
from weight_conversion.fields import ConfigFields
from weight_conversion.rotary import rotary
from weight_conversion.rules import RuleTable


def config(fields: ConfigFields) -> dict[str, Any]:
    """Map a `Starcoder2Config`."""
    fields.ignore("attention_dropout", "embedding_dropout", "residual_dropout")
    # Left in checkpoints by the training code. Transformers reads none of them, but has names of its own for most.
    fields.ignore("activation_function", "layer_norm_epsilon", "mlp_type", "norm_type", "scale_attn_weights")
    fields.ignore("attention_softmax_in_fp32", "scale_attention_softmax_in_fp32")
    n_heads = fields.take("num_attention_heads")
    d_head = fields.get("head_dim", None) or fields.take("hidden_size") // n_heads
    return {
        "n_layers": fields.take("num_hidden_layers"),
        "d_model": fields.take("hidden_size"),
        "n_heads": n_heads,
        "n_key_value_heads": fields.take("num_key_value_heads"),
        "d_head": d_head,
        "d_mlp": fields.take("intermediate_size"),
        "d_vocab": fields.take("vocab_size"),
        "act_fn": fields.take("hidden_act"),
        "eps": fields.take("norm_epsilon"),
        "normalization_type": "LN",
        "window_size": fields.take("sliding_window"),
        "tie_word_embeddings": fields.take("tie_word_embeddings"),
        **rotary(fields, d_head),
    }


def rules(cfg: HookedTransformerConfig, fields: ConfigFields) -> RuleTable:
    """Map the tensors of a `Starcoder2ForCausalLM`."""
    block, bias = "layers.{layer}", fields.take("use_bias")
    return (
        *tables.embeddings(cfg),
        *tables.norm(f"{block}.input_layernorm", "blocks.{layer}.ln1", bias=True),
        *tables.attention(f"{block}.self_attn", qkv_bias=bias, out_bias=bias),
        *tables.norm(f"{block}.post_attention_layernorm", "blocks.{layer}.ln2", bias=True),
        *tables.mlp(f"{block}.mlp.c_fc", f"{block}.mlp.c_proj", up_bias=bias, down_bias=bias),
        *tables.norm("norm", "ln_final", bias=True),
    )


FAMILY = Family("StarCoder 2", ("Starcoder2ForCausalLM", "Starcoder2Model"), config, rules)
