"""Granite with windows and attention sinks (IBM 2026, Granite Swash), whose layers each have a rotary base or none."""

from __future__ import annotations

from collections.abc import Sequence

from hooked_lm.config import HookedTransformerConfig
from weight_conversion.errors import CheckpointError
from weight_conversion.families import granite
from weight_conversion.family import Family, Sites
from weight_conversion.fields import Arguments, ConfigFields
from weight_conversion.layer_types import layer_types
from weight_conversion.rules import Rule, RuleTable

__all__ = ["FAMILY", "config", "rules"]


def config(fields: ConfigFields) -> Arguments:
    """Map a `GraniteSWAConfig`."""
    windows = layer_types(fields)
    scaled = fields.take("rope_parameters")["rope_type"] != "default"
    bases = fields.take("layer_rope_theta")
    return {
        **granite.config(fields),
        **windows,
        "attention_sinks": True,
        "rotary_layers": [bool(base) for base in bases],
        **_bases(bases, windows["attn_types"], scaled=scaled),
    }


def _bases(bases: Sequence[float], kinds: Sequence[str], *, scaled: bool) -> Arguments:
    """Return the rotary base of the global and of the local layers; 0 stands for a layer that does not rotate."""
    by_kind = {kind: {base for base, own in zip(bases, kinds, strict=True) if base and own == kind} for kind in kinds}
    everywhere: set[float] = set().union(*by_kind.values())
    if any(len(several) > 1 for several in by_kind.values()) or (scaled and len(everywhere) > 1):
        raise CheckpointError(
            f"GraniteSWA with layer_rope_theta={list(bases)} is not supported: the layers of one kind in layer_types "
            "have one base, and with a rope_type other than 'default' all layers have"
        )
    if not everywhere:
        return {}
    overall = next(iter(by_kind.get("global") or everywhere))
    local = next(iter(by_kind.get("local") or {overall}))
    return {"rotary_base": float(overall), "rotary_base_local": None if local == overall else float(local)}


def rules(cfg: HookedTransformerConfig, fields: ConfigFields) -> RuleTable:
    """Map the tensors of a `GraniteSWAForCausalLM`."""
    sinks = Rule("layers.{layer}.self_attn.sinks", "head -> head", "blocks.{layer}.attn.sinks")
    return (*granite.rules(cfg, fields), sinks)


# The weights of attention that the reference returns are those before the sinks take their share.
FAMILY = Family(
    "GraniteSWA",
    ("GraniteSWAForCausalLM", "GraniteSWAModel"),
    config,
    rules,
    sites=Sites(write_scale="residual_multiplier", patterns=False),
)
