"""VaultGemma (Google 2025, "VaultGemma: A Differentially Private Gemma Model"): Gemma 2 with norms only before."""

from __future__ import annotations

from hooked_lm.config import HookedTransformerConfig
from weight_conversion import tables
from weight_conversion.families import gemma, gemma2
from weight_conversion.family import Family
from weight_conversion.fields import Arguments, ConfigFields
from weight_conversion.rules import RuleTable

__all__ = ["FAMILY", "config", "rules"]


def config(fields: ConfigFields) -> Arguments:
    """Map a `VaultGemmaConfig`."""
    return {**gemma2.config(fields), "norm_placement": "before"}


def rules(cfg: HookedTransformerConfig, fields: ConfigFields) -> RuleTable:
    """Map the tensors of a `VaultGemmaForCausalLM`."""
    return (
        *gemma.around_the_norms(cfg, fields),
        *tables.norm("layers.{layer}.input_layernorm", "blocks.{layer}.ln1", add=gemma.GAIN),
        *tables.norm("layers.{layer}.pre_feedforward_layernorm", "blocks.{layer}.ln2", add=gemma.GAIN),
    )


FAMILY = Family("VaultGemma", ("VaultGemmaForCausalLM", "VaultGemmaModel"), config, rules)
