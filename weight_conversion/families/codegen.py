"""CodeGen (Nijkamp et al. 2023): GPT-J with one layer for queries, values and keys, laid out for four TPU cores."""

from __future__ import annotations

from hooked_lm.config import HookedTransformerConfig
from weight_conversion import tables
from weight_conversion.families import gptj
from weight_conversion.family import Family
from weight_conversion.fields import Arguments, ConfigFields
from weight_conversion.rules import Drop, Rule, RuleTable

__all__ = ["CORES", "FAMILY", "config", "rules"]

CORES = 4


def config(fields: ConfigFields) -> Arguments:
    """Map a `CodeGenConfig`."""
    # transformers reads `n_positions` instead.
    fields.ignore("n_ctx")
    return gptj.config(fields)


def rules(cfg: HookedTransformerConfig, fields: ConfigFields) -> RuleTable:
    """Map the tensors of a `CodeGenForCausalLM`. Each core had a share of the heads: its queries, values, keys."""
    attention = "h.{layer}.attn"
    queries_values_keys = Rule(
        f"{attention}.qkv_proj.weight",
        "(core part share d_head) d_model -> part (core share) d_model d_head",
        tuple(f"{tables.BLOCK}.attn.W_{letter}" for letter in "QVK"),
        sizes=(("core", CORES), ("share", cfg.n_heads // CORES)),
    )
    return (
        *gptj.around(
            cfg,
            (queries_values_keys, *tables.no_qkv_biases(), *tables.attention_output(f"{attention}.out_proj")),
        ),
        Drop(f"{attention}.causal_mask", "the causal mask of old checkpoints"),
    )


FAMILY = Family(
    "CodeGen",
    ("CodeGenForCausalLM",),
    config,
    rules,
    embedding="wte.weight",
    prefix="transformer.",
    sites=gptj.FAMILY.sites,
)
