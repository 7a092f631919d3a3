"""Jais 2 (Inception, MBZUAI and Cerebras 2025): Nemotron's plain MLP and LayerNorms, with the gains stored as used."""

from __future__ import annotations

from hooked_lm.config import HookedTransformerConfig
from weight_conversion.families import nemotron
from weight_conversion.family import Family, Sites
from weight_conversion.fields import Arguments, ConfigFields
from weight_conversion.rotary import rotary
from weight_conversion.rules import RuleTable
from weight_conversion.sizes import d_head, sizes

__all__ = ["FAMILY", "config", "rules"]


def config(fields: ConfigFields) -> Arguments:
    """Map a `Jais2Config`."""
    fields.ignore("attention_dropout")
    return {
        **sizes(fields),
        "eps": fields.take("layer_norm_eps"),
        "normalization_type": "LN",
        **rotary(fields, d_head(fields)),
    }


def rules(cfg: HookedTransformerConfig, fields: ConfigFields) -> RuleTable:
    """Map the tensors of a `Jais2ForCausalLM`."""
    return nemotron.rules(cfg, fields, added_gain=0.0)


# Its eager attention computes the softmax in float32 for weights of any dtype.
FAMILY = Family("Jais 2", ("Jais2ForCausalLM", "Jais2Model"), config, rules, sites=Sites(attention="sdpa"))
