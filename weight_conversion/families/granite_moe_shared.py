"""GraniteMoE with an expert that every token uses (IBM 2025, Granite 4.0 previews)."""

from __future__ import annotations

from dataclasses import replace

from hooked_lm.config import HookedTransformerConfig
from weight_conversion.families import granite_moe
from weight_conversion.family import Sites
from weight_conversion.fields import Arguments, ConfigFields
from weight_conversion.rules import Constant, Rule, RuleTable

__all__ = ["FAMILY", "config", "rules"]


def config(fields: ConfigFields) -> Arguments:
    """Map a `GraniteMoeSharedConfig`, in which a width of 0 means no shared expert."""
    return {**granite_moe.config(fields), "d_shared_expert": fields.take("shared_intermediate_size") or None}


def rules(cfg: HookedTransformerConfig, fields: ConfigFields) -> RuleTable:
    """Map the tensors of a `GraniteMoeSharedForCausalLM`."""
    table = granite_moe.rules(cfg, fields)
    if cfg.d_shared_expert is None:
        return table
    source, shared = "layers.{layer}.shared_mlp", "blocks.{layer}.mlp.shared"
    gate_and_up = "(part d_shared_expert) d_model -> part d_model d_shared_expert"
    down = "d_model d_shared_expert -> d_shared_expert d_model"
    return (
        *table,
        Rule(f"{source}.input_linear.weight", gate_and_up, (f"{shared}.W_gate", f"{shared}.W_in")),
        Rule(f"{source}.output_linear.weight", down, f"{shared}.W_out", scale=fields.take("residual_multiplier")),
        Constant(f"{shared}.b_gate", "d_shared_expert"),
        Constant(f"{shared}.b_in", "d_shared_expert"),
        Constant(f"{shared}.b_out", "d_model"),
    )


# The block adds the output of the experts and of the shared expert: no module's output is their sum.
FAMILY = replace(
    granite_moe.FAMILY,
    name="GraniteMoE with a shared expert",
    architectures=("GraniteMoeSharedForCausalLM", "GraniteMoeSharedModel"),
    config=config,
    rules=rules,
    sites=Sites(mlp=None, write_scale="residual_multiplier"),
)
