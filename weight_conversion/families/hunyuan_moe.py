"""Hunyuan with experts (Tencent 2025, Hunyuan-A13B), and one that every token uses."""

from __future__ import annotations

from hooked_lm.config import HookedTransformerConfig
from weight_conversion import tables
from weight_conversion.errors import CheckpointError
from weight_conversion.families import hunyuan_dense
from weight_conversion.family import Family
from weight_conversion.fields import Arguments, ConfigFields
from weight_conversion.rules import Entry, RuleTable

__all__ = ["FAMILY", "config", "rules"]


def config(fields: ConfigFields) -> Arguments:
    """Map a `HunYuanMoEV1Config`. The shared expert is as wide as the others."""
    fields.ignore("output_router_logits")
    return {
        **hunyuan_dense.config(fields),
        "num_experts": _same_in_all_layers(fields, "num_experts"),
        "experts_per_token": _same_in_all_layers(fields, "moe_topk"),
        "norm_topk_prob": True,
        "d_shared_expert": fields.take("intermediate_size"),
    }


def _same_in_all_layers(fields: ConfigFields, name: str) -> int:
    """Return a number that the config gives once or for each layer."""
    given: int | list[int] = fields.take(name)
    different = set(given) if isinstance(given, list) else {given}
    if len(different) != 1:
        raise CheckpointError(f"{fields.family} with {name}={given} is not supported: it is the same in all layers")
    return different.pop()


def rules(cfg: HookedTransformerConfig, fields: ConfigFields) -> RuleTable:
    """Map the tensors of a `HunYuanMoEV1ForCausalLM`."""
    return hunyuan_dense.around(cfg, fields, _mixture("layers.{layer}.mlp"))


def _mixture(module: str) -> tuple[Entry, ...]:
    shared = "blocks.{layer}.mlp.shared"
    return (
        *tables.router(f"{module}.gate.wg"),
        *tables.experts(f"{module}.experts"),
        *tables.gated_mlp(f"{module}.shared_mlp", target=shared, d_mlp="d_shared_expert"),
    )


FAMILY = Family("Hunyuan-MoE", ("HunYuanMoEV1ForCausalLM", "HunYuanMoEV1Model"), config, rules)
