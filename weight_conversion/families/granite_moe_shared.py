"""GraniteMoE with an expert that every token uses (IBM 2025, Granite 4.0 previews)."""

from __future__ import annotations

from dataclasses import replace

from hooked_lm.config import HookedTransformerConfig
from weight_conversion.families import granite_moe
from weight_conversion.family import Sites
from weight_conversion.fields import Arguments, ConfigFields
from weight_conversion.rules import Constant, Rule, RuleTable

__all__ = ["FAMILY", "config", "rules", "shared_mlp"]


def config(fields: ConfigFields) -> Arguments:
    """Map a `GraniteMoeSharedConfig`, in which a width of 0 means no shared expert."""
    return {**granite_moe.config(fields), "d_shared_expert": fields.take("shared_intermediate_size") or None}


def rules(cfg: HookedTransformerConfig, fields: ConfigFields) -> RuleTable:
    """Map the tensors of a `GraniteMoeSharedForCausalLM`."""
    table = granite_moe.rules(cfg, fields)
    if cfg.d_shared_expert is None:
        return table
    return (*table, *shared_mlp(fields, "blocks.{layer}.mlp.shared", "d_shared_expert"))


def shared_mlp(fields: ConfigFields, target: str, width: str) -> RuleTable:
    """Return the rows of the MLP that every token uses.

    Args:
        fields: of the config.
        target: the MLP of ours.
        width: the axis of its hidden layer.
    """
    source, scale = "layers.{layer}.shared_mlp", fields.take("residual_multiplier")
    gate_and_up, down = f"(part {width}) d_model -> part d_model {width}", f"d_model {width} -> {width} d_model"
    return (
        Rule(f"{source}.input_linear.weight", gate_and_up, (f"{target}.W_gate", f"{target}.W_in")),
        Rule(f"{source}.output_linear.weight", down, f"{target}.W_out", scale=scale),
        Constant(f"{target}.b_gate", width),
        Constant(f"{target}.b_in", width),
        Constant(f"{target}.b_out", "d_model"),
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
