"""Qwen2 and Qwen2.5 (Yang et al. 2024, "Qwen2 Technical Report"): Llama with biases on queries, keys and values."""

from __future__ import annotations

from hooked_lm.config import HookedTransformerConfig
from weight_conversion.families import llama
from weight_conversion.family import Family
from weight_conversion.fields import Arguments, ConfigFields
from weight_conversion.layer_types import layer_types
from weight_conversion.rules import RuleTable

__all__ = ["FAMILY", "config", "rules"]


def config(fields: ConfigFields) -> Arguments:
    """Map a `Qwen2Config`."""
    # `layer_types` decides which layers have a window, and these fields do not matter.
    fields.ignore("use_sliding_window", "max_window_layers", "use_mrope")
    return {**llama.config(fields), **layer_types(fields)}


def rules(cfg: HookedTransformerConfig, fields: ConfigFields) -> RuleTable:
    """Map the tensors of a `Qwen2ForCausalLM`."""
    return llama.table(cfg, qkv_bias=True)


FAMILY = Family("Qwen2", ("Qwen2ForCausalLM", "Qwen2Model"), config, rules, prepend_bos=False)
