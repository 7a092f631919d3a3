"""InternLM (InternLM team 2023) as published: Llama with biases in attention."""

from __future__ import annotations

from hooked_lm.config import HookedTransformerConfig
from weight_conversion.families import llama
from weight_conversion.family import Family
from weight_conversion.fields import Arguments, ConfigFields, HFConfig
from weight_conversion.rotary import rotary
from weight_conversion.rules import RuleTable
from weight_conversion.sizes import d_head

__all__ = ["DEFAULTS", "FAMILY", "config", "rules"]


def config(fields: ConfigFields) -> Arguments:
    """Map the fields of a config.json whose `model_type` is "internlm"."""
    fields.ignore("attn_implementation")
    parameters = _rotary_parameters(fields.take("rotary"))
    return {**llama.body(fields), **rotary(fields, d_head(fields), parameters=parameters)}


def _rotary_parameters(given: HFConfig) -> HFConfig:
    """Return rotary parameters by the names of transformers. A factor of 1 only changes prompts beyond the context."""
    kinds = {"origin": "default", "dynamic": "dynamic"}
    kind = kinds.get(given["type"], given["type"])
    return {"rope_type": kind, "rope_theta": given["base"], "factor": given.get("scaling_factor", 1.0)}


def rules(cfg: HookedTransformerConfig, fields: ConfigFields) -> RuleTable:
    """Map the tensors of an `InternLMForCausalLM`."""
    bias = fields.take("bias")
    return llama.table(cfg, qkv_bias=bias, out_bias=bias)


# Fields that a config.json may leave out, here and in InternLM2.
DEFAULTS: HFConfig = {
    "bias": True,
    "hidden_act": "silu",
    "max_position_embeddings": 2048,
    "num_key_value_heads": None,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": False,
}

FAMILY = Family(
    "InternLM",
    ("InternLMForCausalLM",),
    config,
    rules,
    defaults={**DEFAULTS, "rotary": {"type": "dynamic", "base": 10000}},
)
