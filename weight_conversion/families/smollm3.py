"""SmolLM3 (Hugging Face 2025): Llama in which every fourth layer does not rotate."""

from __future__ import annotations

from weight_conversion.families import llama
from weight_conversion.family import Family
from weight_conversion.fields import Arguments, ConfigFields
from weight_conversion.layer_types import layer_types

__all__ = ["FAMILY", "config"]


def config(fields: ConfigFields) -> Arguments:
    """Map a `SmolLM3Config`."""
    # The list of layers holds the same.
    fields.ignore("no_rope_layer_interval", "max_window_layers")
    windows = layer_types(fields)
    if not fields.take("use_sliding_window"):
        windows = {}
    # In spite of its name, the field holds 1 for layers with rotary positions.
    return {**llama.config(fields), **windows, "rotary_layers": [bool(it) for it in fields.take("no_rope_layers")]}


FAMILY = Family("SmolLM3", ("SmolLM3ForCausalLM", "SmolLM3Model"), config, llama.rules)
