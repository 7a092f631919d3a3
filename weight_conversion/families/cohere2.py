"""Cohere 2 (Command R7B and Command A, Cohere 2024): local layers rotate, global ones know no positions."""

from __future__ import annotations

from weight_conversion.families import cohere
from weight_conversion.family import Family
from weight_conversion.fields import Arguments, ConfigFields
from weight_conversion.layer_types import layer_types

__all__ = ["FAMILY", "config"]


def config(fields: ConfigFields) -> Arguments:
    """Map a `Cohere2Config`."""
    # `layer_types` holds the same.
    fields.ignore("sliding_window_pattern", "_sliding_window_pattern", "layer_switch")
    fields.ignore("cache_implementation", "use_parallel_embedding")
    # Published files give these fields; transformers does not read them.
    fields.require("order_of_interleaved_layers", "local_attn_first")
    fields.require("position_embedding_type", "rope_gptj")
    fields.require("rotary_pct", 1.0)
    fields.require("use_embedding_sharing", True)
    fields.require("use_gated_activation", True)
    fields.require("use_parallel_block", True)
    fields.require("use_qk_norm", False)
    windows = layer_types(fields)
    return {
        **cohere.shared_config(fields),
        **windows,
        "rotary_layers": [kind == "local" for kind in windows["attn_types"]],
    }


FAMILY = Family("Cohere 2", ("Cohere2ForCausalLM", "Cohere2Model"), config, cohere.rules)
