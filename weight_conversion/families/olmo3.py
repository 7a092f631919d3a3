"""OLMo 3 (OLMo team 2025): OLMo 2 with windows; only global layers scale their rotary positions."""

from __future__ import annotations

from weight_conversion.families import llama, olmo2
from weight_conversion.family import Family
from weight_conversion.fields import Arguments, ConfigFields, HFConfig
from weight_conversion.layer_types import layer_types
from weight_conversion.rotary import rotary
from weight_conversion.sizes import d_head

__all__ = ["FAMILY", "config", "unscaled_base"]


def config(fields: ConfigFields) -> Arguments:
    """Map an `Olmo3Config`."""
    by_type = fields.take("rope_parameters")
    return {
        **llama.body(fields),
        **layer_types(fields),
        **rotary(fields, d_head(fields), parameters=by_type["full_attention"]),
        "rotary_base_local": unscaled_base(fields, by_type["sliding_attention"]),
        "norm_placement": "after",
        "use_qk_norm": True,
        "qk_norm_across_heads": True,
    }


def unscaled_base(fields: ConfigFields, parameters: HFConfig) -> float:
    """Return the rotary base of local layers, whose frequencies are not scaled.

    Raises:
        CheckpointError: something does.
    """
    given = fields.part({"rope_type": "default", **parameters}, "rotary parameters")
    given.require("rope_type", "default")
    base = float(given.take("rope_theta"))
    given.finish()
    return base


FAMILY = Family("OLMo 3", ("Olmo3ForCausalLM",), config, olmo2.rules, sites=olmo2.SITES, prepend_bos=True)
