"""Ministral (Mistral AI 2024): Mistral, with a window in some layers only."""

from __future__ import annotations

from weight_conversion.families import llama, mistral
from weight_conversion.family import Family
from weight_conversion.fields import Arguments, ConfigFields
from weight_conversion.layer_types import layer_types

__all__ = ["FAMILY", "config"]


def config(fields: ConfigFields) -> Arguments:
    """Map a `MinistralConfig`."""
    return {**llama.config(fields), **layer_types(fields)}


FAMILY = Family("Ministral", ("MinistralForCausalLM",), config, mistral.rules)
