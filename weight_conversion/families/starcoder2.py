"""StarCoder 2 (Lozhkov et al. 2024): grouped queries, a sliding window, biases throughout."""

from __future__ import annotations

from hooked_lm.config import HookedTransformerConfig
from weight_conversion import tables
from weight_conversion.family import Family
from weight_conversion.fields import Arguments, ConfigFields
from weight_conversion.rotary import rotary
from weight_conversion.rules import RuleTable
from weight_conversion.sizes import d_head, sizes

__all__ = ["FAMILY", "config", "rules"]


def config(fields: ConfigFields) -> Arguments:
    """Map a `Starcoder2Config`."""
    fields.ignore("attention_dropout", "embedding_dropout", "residual_dropout")
    # Left in checkpoints by the training code. Transformers reads none of them; it has other names for most.
    fields.ignore("activation_function", "layer_norm_epsilon", "mlp_type", "norm_type", "scale_attn_weights")
    fields.ignore("attention_softmax_in_fp32", "scale_attention_softmax_in_fp32")
    return {
        **sizes(fields),
        "eps": fields.take("norm_epsilon"),
        "normalization_type": "LN",
        "window_size": fields.take("sliding_window"),
        **rotary(fields, d_head(fields)),
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
