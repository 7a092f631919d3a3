"""Sarvam-30B (Sarvam AI 2026): GLM 4 MoE whose heads rotate whole, under other names."""

from __future__ import annotations

from hooked_lm.config import HookedTransformerConfig
from weight_conversion import tables
from weight_conversion.families import glm4_moe
from weight_conversion.family import Family
from weight_conversion.fields import Arguments, ConfigFields
from weight_conversion.mixtures import mixture_rules
from weight_conversion.rules import RuleTable

__all__ = ["FAMILY", "config", "rules"]


def config(fields: ConfigFields) -> Arguments:
    """Map a `SarvamMoEConfig`, which transformers has from 5.24 on."""
    # The published names of fields that transformers has read by now under its own.
    fields.ignore("num_experts", "num_shared_experts", "use_qkv_bias")
    return glm4_moe.config(fields)


def rules(cfg: HookedTransformerConfig, fields: ConfigFields) -> RuleTable:
    """Map the tensors of a `SarvamMoEForCausalLM`, which transformers loads into a `Glm4MoeForCausalLM`."""
    block = "layers.{layer}"
    attention = f"{block}.attention"
    return (
        *tables.embeddings(cfg, "word_embeddings.weight"),
        *tables.norm(f"{block}.input_layernorm", "blocks.{layer}.ln1"),
        *tables.split_qkv(f"{attention}.query_key_value", bias=fields.take("attention_bias")),
        *tables.attention_output(f"{attention}.dense"),
        *(tables.qk_norm(attention, names=("query_layernorm", "key_layernorm")) if cfg.use_qk_norm else ()),
        *tables.norm(f"{block}.post_attention_layernorm", "blocks.{layer}.ln2"),
        *mixture_rules(cfg, f"{block}.mlp", correction="gate.expert_bias"),
        *tables.norm("norm", "ln_final"),
        *tables.added_layers(cfg, fields.get("num_nextn_predict_layers", 0)),
    )


FAMILY = Family("Sarvam MoE", ("SarvamMoEForCausalLM",), config, rules, embedding="word_embeddings.weight")
