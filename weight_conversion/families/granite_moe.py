"""GraniteMoE (IBM 2024, "Granite 3.0 Language Models"): Granite's multipliers, and experts packed into one tensor."""

from __future__ import annotations

from hooked_lm.config import HookedTransformerConfig
from weight_conversion import tables
from weight_conversion.families import llama
from weight_conversion.family import Family, Sites
from weight_conversion.fields import Arguments, ConfigFields
from weight_conversion.rotary import rotary
from weight_conversion.rules import Rule, RuleTable
from weight_conversion.sizes import d_head

__all__ = ["FAMILY", "around", "body", "config", "rules"]


def config(fields: ConfigFields) -> Arguments:
    """Map a `GraniteMoeConfig`."""
    return {**body(fields), **rotary(fields, d_head(fields))}


def body(fields: ConfigFields) -> Arguments:
    """Map all but the positions."""
    fields.ignore("output_router_logits", "router_aux_loss_coef")
    return {
        **llama.body(fields),
        "num_experts": fields.take("num_local_experts"),
        "experts_per_token": fields.take("num_experts_per_tok"),
        "norm_topk_prob": True,
        "attn_scale": 1 / fields.take("attention_multiplier"),
        "embedding_scale": fields.take("embedding_multiplier"),
        "logit_scale": 1 / fields.take("logits_scaling"),
    }


def rules(cfg: HookedTransformerConfig, fields: ConfigFields) -> RuleTable:
    """Map the tensors of a `GraniteMoeForCausalLM`. The gate comes first in `input_linear`."""
    mlp, experts, scale = "blocks.{layer}.mlp", "layers.{layer}.block_sparse_moe", fields.take("residual_multiplier")
    gate_and_up = "expert (part d_expert) d_model -> part expert d_model d_expert"
    down = "expert d_model d_expert -> expert d_expert d_model"
    return (
        *around(cfg, fields),
        *tables.router(f"{experts}.router.layer"),
        Rule(f"{experts}.input_linear.weight", gate_and_up, (f"{mlp}.W_gate", f"{mlp}.W_in")),
        Rule(f"{experts}.output_linear.weight", down, f"{mlp}.W_out", scale=scale),
        *tables.no_expert_biases(),
    )


def around(cfg: HookedTransformerConfig, fields: ConfigFields) -> RuleTable:
    """Return the rows of all but the experts."""
    block, bias = "layers.{layer}", fields.take("attention_bias")
    scale = fields.take("residual_multiplier")
    return (
        *tables.embeddings(cfg),
        *tables.norm(f"{block}.input_layernorm", "blocks.{layer}.ln1"),
        *tables.attention(f"{block}.self_attn", qkv_bias=bias, out_bias=bias, out_scale=scale),
        *tables.norm(f"{block}.post_attention_layernorm", "blocks.{layer}.ln2"),
        *tables.norm("norm", "ln_final"),
    )


FAMILY = Family(
    "GraniteMoE",
    ("GraniteMoeForCausalLM", "GraniteMoeModel"),
    config,
    rules,
    sites=Sites(mlp="block_sparse_moe", write_scale="residual_multiplier"),
)
