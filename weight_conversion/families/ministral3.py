"""Ministral 3 (Mistral AI 2025): Mistral whose queries are multiplied by a number that grows with their position."""

from __future__ import annotations

from weight_conversion.families import llama, mistral
from weight_conversion.family import Family
from weight_conversion.fields import Arguments, ConfigFields
from weight_conversion.rotary import rotary
from weight_conversion.sizes import d_head

__all__ = ["FAMILY", "config"]


def config(fields: ConfigFields) -> Arguments:
    """Map a `Ministral3Config`, whose `rope_parameters` also say how queries are scaled."""
    # Every layer has the window, whatever `layer_types` says.
    fields.ignore("layer_types")
    parameters = dict(fields.take("rope_parameters"))
    # A copy of the config's field of that name.
    parameters.pop("max_position_embeddings", None)
    beta = parameters.pop("llama_4_scaling_beta")
    return {
        **llama.body(fields),
        "window_size": fields.take("sliding_window"),
        "query_scale_beta": float(beta),
        "query_scale_ctx_len": parameters["original_max_position_embeddings"],
        **rotary(fields, d_head(fields), parameters=parameters),
    }


FAMILY = Family("Ministral 3", ("Ministral3ForCausalLM", "Ministral3Model"), config, mistral.rules)
