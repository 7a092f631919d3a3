"""CWM (Meta 2025, "CWM: An Open-Weights LLM for Research on Code Generation with World Models"): Llama with windows."""

from __future__ import annotations

from weight_conversion.families import llama
from weight_conversion.family import Family
from weight_conversion.fields import Arguments, ConfigFields
from weight_conversion.layer_types import layer_types

__all__ = ["FAMILY", "config"]


def config(fields: ConfigFields) -> Arguments:
    """Map a `CwmConfig`."""
    return {**llama.config(fields), **layer_types(fields)}


FAMILY = Family("CWM", ("CwmForCausalLM", "CwmModel"), config, llama.rules)
