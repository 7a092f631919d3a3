"""Gemma 2 (Gemma team 2024): norms before and after, soft-caps, and a window in every second layer."""

from __future__ import annotations

import math

from hooked_lm.config import HookedTransformerConfig
from weight_conversion import tables
from weight_conversion.errors import CheckpointError
from weight_conversion.families import gemma
from weight_conversion.family import Family, Sites
from weight_conversion.fields import Arguments, ConfigFields
from weight_conversion.layer_types import layer_types
from weight_conversion.rotary import rotary
from weight_conversion.rules import RuleTable
from weight_conversion.sizes import d_head

__all__ = ["FAMILY", "SITES", "body", "config", "rules", "soft_cap"]


def config(fields: ConfigFields) -> Arguments:
    """Map a `Gemma2Config`."""
    # Published files have these names too; transformers reads the same values under other names.
    fields.ignore("hidden_act", "sliding_window_size")
    return {
        **body(fields),
        **rotary(fields, d_head(fields)),
        "attn_scores_soft_cap": soft_cap(fields, "attn_logit_softcapping"),
        "norm_placement": "before_and_after",
    }


def body(fields: ConfigFields) -> Arguments:
    """Map the fields that all Gemmas after the first have."""
    return {
        **gemma.body(fields),
        **layer_types(fields),
        "attn_scale": math.sqrt(fields.take("query_pre_attn_scalar")),
        "output_logits_soft_cap": soft_cap(fields, "final_logit_softcapping"),
    }


def soft_cap(fields: ConfigFields, name: str) -> float:
    """Return a soft-cap, -1 for none, as `HookedTransformerConfig` has it.

    Raises:
        CheckpointError: it is not positive: transformers divides by it, and a config here has no such cap.
    """
    cap = fields.take(name)
    if cap is not None and not cap > 0:
        raise CheckpointError(f"{fields.family} has {name}={cap!r}: a soft-cap is positive, and null for none")
    return -1.0 if cap is None else float(cap)


def rules(cfg: HookedTransformerConfig, fields: ConfigFields) -> RuleTable:
    """Map the tensors of a `Gemma2ForCausalLM`. Its norms have other names than Gemma's."""
    norms = {
        "input_layernorm": "ln1",
        "post_attention_layernorm": "ln1_post",
        "pre_feedforward_layernorm": "ln2",
        "post_feedforward_layernorm": "ln2_post",
    }
    rows = gemma.around_the_norms(cfg, fields)
    for theirs, ours in norms.items():
        rows += tables.norm(f"layers.{{layer}}.{theirs}", f"blocks.{{layer}}.{ours}", add=gemma.GAIN)
    return rows


SITES = Sites(attn="post_attention_layernorm", mlp="post_feedforward_layernorm")

FAMILY = Family("Gemma 2", ("Gemma2ForCausalLM", "Gemma2Model"), config, rules, sites=SITES, prepend_bos=True)
