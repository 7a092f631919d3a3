"""The text model of Aria (Li et al. 2024, "Aria: An Open Multimodal Native Mixture-of-Experts Model")."""

from __future__ import annotations

from hooked_lm.config import HookedTransformerConfig
from weight_conversion import tables
from weight_conversion.errors import CheckpointError
from weight_conversion.families import llama
from weight_conversion.family import Family
from weight_conversion.fields import Arguments, ConfigFields
from weight_conversion.rules import Entry, Rule, RuleTable

__all__ = ["FAMILY", "config", "rules"]


def config(fields: ConfigFields) -> Arguments:
    """Map an `AriaTextConfig`."""
    # The experts have this activation whatever the field says, which is about the shared one only.
    fields.require("hidden_act", "silu")
    shared = fields.take("moe_num_shared_experts")
    if shared < 1:
        raise CheckpointError(f"Aria with moe_num_shared_experts={shared} is not supported; 1 and more are")
    return {
        **llama.config(fields),
        "num_experts": fields.take("moe_num_experts"),
        "experts_per_token": fields.take("moe_topk"),
        "norm_topk_prob": True,
        # One expert, as wide as so many.
        "d_shared_expert": fields.take("intermediate_size") * shared,
    }


def rules(cfg: HookedTransformerConfig, fields: ConfigFields) -> RuleTable:
    """Map the tensors of an `AriaTextForCausalLM`. Its experts are kept as [in out], and the gate comes first."""
    block, bias, mlp = "layers.{layer}", fields.take("attention_bias"), "blocks.{layer}.mlp"
    gate_and_up = "expert d_model (part d_expert) -> part expert d_model d_expert"
    down = "expert d_expert d_model -> expert d_expert d_model"
    return (
        *tables.embeddings(cfg),
        *tables.norm(f"{block}.input_layernorm", "blocks.{layer}.ln1"),
        *tables.attention(f"{block}.self_attn", qkv_bias=bias, out_bias=bias),
        *tables.norm(f"{block}.post_attention_layernorm", "blocks.{layer}.ln2"),
        *tables.router(f"{block}.mlp.router"),
        Rule(f"{block}.mlp.experts.fc1.weight", gate_and_up, (f"{mlp}.W_gate", f"{mlp}.W_in")),
        Rule(f"{block}.mlp.experts.fc2.weight", down, f"{mlp}.W_out"),
        *tables.no_expert_biases(),
        *_shared(cfg, f"{block}.mlp.shared_experts", bias=fields.take("mlp_bias")),
        *tables.norm("norm", "ln_final"),
    )


def _shared(cfg: HookedTransformerConfig, module: str, *, bias: bool) -> tuple[Entry, ...]:
    return tables.gated_mlp(module, target="blocks.{layer}.mlp.shared", d_mlp="d_shared_expert", bias=bias)


FAMILY = Family("Aria", ("AriaTextForCausalLM", "AriaTextModel"), config, rules)
