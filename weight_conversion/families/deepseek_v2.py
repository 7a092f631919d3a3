"""DeepSeek-V2 (DeepSeek-AI 2024, "DeepSeek-V2"): latent attention, and experts in groups under a softmax."""

from __future__ import annotations

from hooked_lm.config import HookedTransformerConfig
from weight_conversion import tables
from weight_conversion.families import llama
from weight_conversion.family import Family
from weight_conversion.fields import Arguments, ConfigFields
from weight_conversion.latents import latent_attention, latent_config
from weight_conversion.mixtures import dense_first, groups, ignore_training, mixture_rules
from weight_conversion.rules import RuleTable

__all__ = ["FAMILY", "config", "rules"]


def config(fields: ConfigFields) -> Arguments:
    """Map a `DeepseekV2Config`."""
    ignore_training(fields)
    # transformers does not rescale the weights of the chosen experts, whatever the field says.
    fields.ignore("norm_topk_prob")
    fields.require("scoring_func", "softmax")
    grouped = fields.take("topk_method") == "group_limited_greedy"
    if not grouped:
        fields.require("topk_method", "greedy")
        fields.ignore("n_group", "topk_group")
    width = fields.take("moe_intermediate_size")
    return {
        **llama.body(fields),
        **latent_config(fields, adjacent=True),
        "num_experts": fields.take("n_routed_experts"),
        "experts_per_token": fields.take("num_experts_per_tok"),
        "d_expert": width,
        "d_shared_expert": width * fields.take("n_shared_experts"),
        "norm_topk_prob": False,
        "routed_scale": fields.take("routed_scaling_factor"),
        "router_in_float32": True,
        **(groups(fields) if grouped else {}),
        "expert_group_score": "max",
        **dense_first(fields),
    }


def rules(cfg: HookedTransformerConfig, fields: ConfigFields) -> RuleTable:
    """Map the tensors of a `DeepseekV2ForCausalLM`."""
    block = "layers.{layer}"
    return (
        *tables.embeddings(cfg),
        *tables.norm(f"{block}.input_layernorm", "blocks.{layer}.ln1"),
        *latent_attention(cfg, f"{block}.self_attn", bias=fields.take("attention_bias")),
        *tables.norm(f"{block}.post_attention_layernorm", "blocks.{layer}.ln2"),
        *mixture_rules(cfg, f"{block}.mlp", correction=None, bias=fields.take("mlp_bias")),
        *tables.norm("norm", "ln_final"),
    )


FAMILY = Family("DeepSeek-V2", ("DeepseekV2ForCausalLM",), config, rules)
