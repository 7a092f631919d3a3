"""Gemma 3, its text models (Gemma team 2025): Gemma 2 with normalised queries and keys; two rotary bases."""

from __future__ import annotations

from hooked_lm.config import HookedTransformerConfig
from weight_conversion import tables
from weight_conversion.families import gemma, gemma2
from weight_conversion.families.olmo3 import unscaled_base
from weight_conversion.family import Family
from weight_conversion.fields import Arguments, ConfigFields
from weight_conversion.rotary import rotary
from weight_conversion.rules import RuleTable
from weight_conversion.sizes import d_head

__all__ = ["FAMILY", "config", "rules"]


def config(fields: ConfigFields) -> Arguments:
    """Map a `Gemma3TextConfig`."""
    # `layer_types` and `rope_parameters` hold the same.
    fields.ignore("sliding_window_pattern", "_sliding_window_pattern", "rope_local_base_freq")
    # Transformers has the field and does not use it.
    fields.require("attn_logit_softcapping", None)
    by_type = fields.take("rope_parameters")
    return {
        **gemma2.body(fields),
        **rotary(fields, d_head(fields), parameters=by_type["full_attention"]),
        "rotary_base_local": unscaled_base(fields, by_type["sliding_attention"]),
        "norm_placement": "before_and_after",
        "use_qk_norm": True,
    }


def rules(cfg: HookedTransformerConfig, fields: ConfigFields) -> RuleTable:
    """Map the tensors of a `Gemma3ForCausalLM`."""
    return (*gemma2.rules(cfg, fields), *tables.qk_norm("layers.{layer}.self_attn", add=gemma.GAIN))


FAMILY = Family(
    "Gemma 3", ("Gemma3ForCausalLM", "Gemma3TextModel"), config, rules, sites=gemma2.SITES, prepend_bos=True
)
