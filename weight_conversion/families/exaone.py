"""EXAONE 3.0 and 3.5 (LG AI Research 2024, "EXAONE 3.0 7.8B Instruction Tuned Language Model"): Llama, other names."""

from __future__ import annotations

from hooked_lm.config import HookedTransformerConfig
from weight_conversion import tables
from weight_conversion.family import Family
from weight_conversion.fields import Arguments, ConfigFields
from weight_conversion.rotary import plain_parameters, rotary
from weight_conversion.rules import RuleTable

__all__ = ["FAMILY", "config", "rules"]


def config(fields: ConfigFields) -> Arguments:
    """Map the fields of a config.json whose `model_type` is "exaone", by its published names."""
    fields.ignore("attention_dropout", "embed_dropout", "pretraining_tp")
    for bias in ("attention_bias", "mlp_bias"):
        fields.require(bias, False)
    d_model, n_heads = fields.take("hidden_size"), fields.take("num_attention_heads")
    width = d_model // n_heads
    # The published code does not read it.
    fields.require("head_dim", width)
    return {
        "n_layers": fields.take("num_layers"),
        "d_model": d_model,
        "n_heads": n_heads,
        "n_key_value_heads": fields.take("num_key_value_heads"),
        "d_mlp": fields.take("intermediate_size"),
        "d_vocab": fields.take("vocab_size"),
        "act_fn": fields.take("activation_function"),
        "gated_mlp": True,
        "eps": fields.take("layer_norm_epsilon"),
        "normalization_type": "RMS",
        "tie_word_embeddings": fields.take("tie_word_embeddings"),
        **rotary(fields, width, parameters=fields.get("rope_parameters", None) or plain_parameters(fields)),
    }


def rules(cfg: HookedTransformerConfig, fields: ConfigFields) -> RuleTable:
    """Map the tensors of an `ExaoneForCausalLM`."""
    block, names = "h.{layer}", ("q_proj", "k_proj", "v_proj", "out_proj")
    return (
        *tables.embeddings(cfg, "wte.weight"),
        *tables.norm(f"{block}.ln_1", "blocks.{layer}.ln1"),
        *tables.attention(f"{block}.attn.attention", names=names),
        *tables.norm(f"{block}.ln_2", "blocks.{layer}.ln2"),
        *tables.gated_mlp(f"{block}.mlp", names=("c_fc_0", "c_fc_1", "c_proj")),
        *tables.norm("ln_f", "ln_final"),
    )


FAMILY = Family(
    "EXAONE 3",
    ("ExaoneForCausalLM",),
    config,
    rules,
    embedding="wte.weight",
    prefix="transformer.",
    defaults={
        "activation_function": "silu",
        "intermediate_size": None,
        "layer_norm_epsilon": 1e-6,
        "max_position_embeddings": 2048,
        "num_key_value_heads": None,
        "tie_word_embeddings": True,
    },
    # As transformers writes them from 5.24 on.
    renamed={
        "num_hidden_layers": "num_layers",
        "rms_norm_eps": "layer_norm_epsilon",
        "hidden_act": "activation_function",
    },
)
