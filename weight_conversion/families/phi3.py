"""Phi-3 and Phi-4 (Abdin et al. 2024, "Phi-3 Technical Report"): Llama with fused projections, and LongRoPE."""

from __future__ import annotations

from hooked_lm.config import HookedTransformerConfig
from weight_conversion import tables
from weight_conversion.families import llama
from weight_conversion.family import Family
from weight_conversion.fields import Arguments, ConfigFields
from weight_conversion.rules import Rule, RuleTable

__all__ = ["FAMILY", "config", "rules"]


def config(fields: ConfigFields) -> Arguments:
    """Map a `Phi3Config`."""
    fields.ignore("resid_pdrop", "embd_pdrop")
    # Published files give these fields; transformers does not read them.
    fields.require("attention_bias", False)
    fields.require("mlp_bias", False)
    fields.require("lm_head_bias", False)
    fields.require("full_attn_mod", 1)
    fields.require("interpolate_factor", 1)
    return {**llama.config(fields, partial=True), "window_size": fields.take("sliding_window")}


def rules(cfg: HookedTransformerConfig, fields: ConfigFields) -> RuleTable:
    """Map the tensors of a `Phi3ForCausalLM`."""
    block, target = "layers.{layer}", "blocks.{layer}"
    gate_and_in = (f"{target}.mlp.W_gate", f"{target}.mlp.W_in")
    return (
        *tables.embeddings(cfg),
        *tables.norm(f"{block}.input_layernorm", f"{target}.ln1"),
        *tables.split_qkv(f"{block}.self_attn.qkv_proj"),
        *tables.attention_output(f"{block}.self_attn.o_proj"),
        *tables.norm(f"{block}.post_attention_layernorm", f"{target}.ln2"),
        Rule(f"{block}.mlp.gate_up_proj.weight", "(part d_mlp) d_model -> part d_model d_mlp", gate_and_in),
        Rule(f"{block}.mlp.down_proj.weight", "d_model d_mlp -> d_mlp d_model", f"{target}.mlp.W_out"),
        *tables.no_mlp_biases(gated=True),
        *tables.norm("norm", "ln_final"),
    )


FAMILY = Family("Phi-3", ("Phi3ForCausalLM",), config, rules, prepend_bos=True)
