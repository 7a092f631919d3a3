"""Mistral (Jiang et al. 2023, "Mistral 7B"): Llama with a sliding window, and Ministral, where some layers have it."""

from __future__ import annotations

from hooked_lm.config import HookedTransformerConfig
from weight_conversion.families import llama
from weight_conversion.family import Family
from weight_conversion.fields import Arguments, ConfigFields
from weight_conversion.layer_types import layer_types
from weight_conversion.rules import RuleTable

__all__ = ["FAMILY", "config", "rules"]


def config(fields: ConfigFields) -> Arguments:
    """Map a `MistralConfig` or `MinistralConfig`."""
    return {**llama.config(fields), **_windows(fields)}


def _windows(fields: ConfigFields) -> Arguments:
    # Ministral's files name the architecture of Mistral. The two differ in the model type: transformers sets that of
    # Ministral for files with `layer_types`, which its Mistral does not read.
    if fields.take("model_type") == "ministral":
        return layer_types(fields)
    fields.ignore("layer_types")
    return {"window_size": fields.take("sliding_window")}


def rules(cfg: HookedTransformerConfig, fields: ConfigFields) -> RuleTable:
    """Map the tensors of a `MistralForCausalLM` or `MinistralForCausalLM`."""
    return llama.table(cfg)


FAMILY = Family("Mistral", ("MistralForCausalLM",), config, rules, prepend_bos=True)
