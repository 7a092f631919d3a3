"""Granite 4 (IBM 2025) where all layers are attention: GraniteMoE with a shared expert, or that expert alone."""

from __future__ import annotations

from dataclasses import replace

from hooked_lm.config import HookedTransformerConfig
from weight_conversion.errors import CheckpointError
from weight_conversion.families import granite_moe, granite_moe_shared
from weight_conversion.fields import Arguments, ConfigFields
from weight_conversion.rotary import LEGACY_FIELDS, rotary
from weight_conversion.rules import RuleTable
from weight_conversion.sizes import d_head

__all__ = ["FAMILY", "config", "rules"]


def config(fields: ConfigFields) -> Arguments:
    """Map a `GraniteMoeHybridConfig`.

    Raises:
        CheckpointError: some layers are Mamba layers.
    """
    kinds = fields.take("layer_types")
    if set(kinds) - {"attention", "full_attention"}:
        raise CheckpointError(
            f"{fields.family} with {sum(kind == 'full_attention' for kind in kinds)} layers of attention among "
            f"{len(kinds)} is not supported: its other layers are Mamba layers, which are recurrent"
        )
    fields.ignore(*(f"mamba_{name}" for name in ("n_heads", "n_groups", "d_state", "d_head", "d_conv", "expand")))
    fields.ignore("mamba_chunk_size", "mamba_conv_bias", "mamba_proj_bias", "time_step_limit", "layers_block_type")
    # Published files give these fields; transformers does not read them.
    fields.ignore("init_method")
    fields.require("normalization_function", "rmsnorm")
    return {**granite_moe.body(fields), **_mlp(fields), **_positions(fields)}


def _mlp(fields: ConfigFields) -> Arguments:
    shared = fields.take("shared_intermediate_size")
    if fields.take("num_local_experts"):
        return {"d_shared_expert": shared or None}
    return {"num_experts": None, "experts_per_token": None, "d_mlp": shared}


def _positions(fields: ConfigFields) -> Arguments:
    if fields.take("position_embedding_type") == "rope":
        return rotary(fields, d_head(fields))
    fields.ignore("rope_parameters", *LEGACY_FIELDS)
    return {"positional_embedding_type": "none", "n_ctx": fields.take("max_position_embeddings")}


def rules(cfg: HookedTransformerConfig, fields: ConfigFields) -> RuleTable:
    """Map the tensors of a `GraniteMoeHybridForCausalLM`."""
    if cfg.num_experts is not None:
        return granite_moe_shared.rules(cfg, fields)
    return (*granite_moe.around(cfg, fields), *granite_moe_shared.shared_mlp(fields, "blocks.{layer}.mlp", "d_mlp"))


FAMILY = replace(
    granite_moe_shared.FAMILY,
    name="Granite 4",
    architectures=("GraniteMoeHybridForCausalLM", "GraniteMoeHybridModel"),
    config=config,
    rules=rules,
)
