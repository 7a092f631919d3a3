"""MiniCPM3 (OpenBMB 2024): Llama with latent attention and muP's factors on embeddings, writes and logits."""

from __future__ import annotations

import math

from hooked_lm.config import HookedTransformerConfig
from weight_conversion import tables
from weight_conversion.families import llama
from weight_conversion.family import Family, Sites
from weight_conversion.fields import Arguments, ConfigFields
from weight_conversion.latents import latent_attention, latent_config
from weight_conversion.rules import RuleTable

__all__ = ["FAMILY", "config", "rules"]


def config(fields: ConfigFields) -> Arguments:
    """Map a `MiniCPM3Config`."""
    d_model = fields.take("hidden_size")
    return {
        **llama.body(fields),
        **latent_config(fields, adjacent=False),
        "embedding_scale": float(fields.take("scale_emb")),
        "logit_scale": fields.take("dim_model_base") / d_model,
    }


def rules(cfg: HookedTransformerConfig, fields: ConfigFields) -> RuleTable:
    """Map the tensors of a `MiniCPM3ForCausalLM`. What is written is scaled by the model's depth."""
    block, scale = "layers.{layer}", fields.take("scale_depth") / math.sqrt(cfg.n_layers)
    return (
        *tables.embeddings(cfg),
        *tables.norm(f"{block}.input_layernorm", "blocks.{layer}.ln1"),
        *latent_attention(cfg, f"{block}.self_attn", bias=fields.take("attention_bias"), out_scale=scale),
        *tables.norm(f"{block}.post_attention_layernorm", "blocks.{layer}.ln2"),
        *tables.gated_mlp(f"{block}.mlp", bias=fields.take("mlp_bias"), out_scale=scale),
        *tables.norm("norm", "ln_final"),
    )


FAMILY = Family(
    "MiniCPM3",
    ("MiniCPM3ForCausalLM",),
    config,
    rules,
    sites=Sites(write_scale="residual_scale", read_divisor="logits_scaling"),
)
