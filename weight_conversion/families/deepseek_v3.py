"""DeepSeek-V3 and R1 (DeepSeek-AI 2024, "DeepSeek-V3 Technical Report"), Kimi K2 and Sarvam-105B, built so too."""

from __future__ import annotations

from hooked_lm.config import HookedTransformerConfig
from weight_conversion import tables
from weight_conversion.families import llama
from weight_conversion.family import Family
from weight_conversion.fields import Arguments, ConfigFields
from weight_conversion.latents import latent_attention, latent_config
from weight_conversion.mixtures import dense_first, mixture, mixture_rules
from weight_conversion.rules import RuleTable

__all__ = ["FAMILY", "config", "rules"]


def config(fields: ConfigFields) -> Arguments:
    """Map a `DeepseekV3Config`."""
    return {
        **llama.body(fields),
        **latent_config(fields, adjacent=fields.take("rope_interleave")),
        **mixture(fields),
        **dense_first(fields),
    }


def rules(cfg: HookedTransformerConfig, fields: ConfigFields) -> RuleTable:
    """Map the tensors of a `DeepseekV3ForCausalLM`."""
    block = "layers.{layer}"
    return (
        *tables.embeddings(cfg),
        *tables.norm(f"{block}.input_layernorm", "blocks.{layer}.ln1"),
        *latent_attention(cfg, f"{block}.self_attn", bias=fields.take("attention_bias")),
        *tables.norm(f"{block}.post_attention_layernorm", "blocks.{layer}.ln2"),
        *mixture_rules(cfg, f"{block}.mlp"),
        *tables.norm("norm", "ln_final"),
        *tables.added_layers(cfg, fields.get("num_nextn_predict_layers", 0)),
    )


FAMILY = Family("DeepSeek-V3", ("DeepseekV3ForCausalLM", "SarvamMLAForCausalLM"), config, rules)
