"""GLM-4.7-Flash (GLM team 2026): GLM 4 MoE with latent attention."""

from __future__ import annotations

from weight_conversion.families import deepseek_v3, llama
from weight_conversion.family import Family
from weight_conversion.fields import Arguments, ConfigFields
from weight_conversion.latents import latent_config
from weight_conversion.mixtures import mixture, where_sparse

__all__ = ["FAMILY", "config"]


def config(fields: ConfigFields) -> Arguments:
    """Map a `Glm4MoeLiteConfig`."""
    return {
        **llama.body(fields),
        **latent_config(fields, adjacent=fields.take("rope_interleave")),
        **mixture(fields),
        **where_sparse(fields),
    }


FAMILY = Family("GLM 4 MoE Lite", ("Glm4MoeLiteForCausalLM",), config, deepseek_v3.rules)
