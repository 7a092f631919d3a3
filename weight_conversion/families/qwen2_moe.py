"""Qwen1.5-MoE and Qwen2-MoE (Yang et al. 2024, "Qwen2 Technical Report"): experts, and one that every token uses."""

from __future__ import annotations

from hooked_lm.config import HookedTransformerConfig
from weight_conversion import tables
from weight_conversion.families import llama
from weight_conversion.family import Family
from weight_conversion.fields import Arguments, ConfigFields
from weight_conversion.layer_types import layer_types
from weight_conversion.rotary import rotary
from weight_conversion.rules import Constant, Entry, Rule, RuleTable
from weight_conversion.sizes import d_head

__all__ = ["FAMILY", "config", "mixture", "mlp_or_experts", "rules"]


def config(fields: ConfigFields) -> Arguments:
    """Map a `Qwen2MoeConfig`."""
    fields.ignore("output_router_logits", "router_aux_loss_coef")
    # `layer_types` decides which layers have a window, and these fields do not matter.
    fields.ignore("use_sliding_window", "max_window_layers")
    return {
        **llama.body(fields),
        **layer_types(fields),
        "num_experts": fields.take("num_experts"),
        "d_shared_expert": fields.take("shared_expert_intermediate_size"),
        "shared_expert_gate": True,
        **mixture(fields),
        **rotary(fields, d_head(fields)),
    }


def mixture(fields: ConfigFields) -> Arguments:
    """Return the arguments about experts, and about layers with one dense MLP instead, that both generations share."""
    dense, step = fields.take("mlp_only_layers"), fields.take("decoder_sparse_step")
    layers = range(fields.take("num_hidden_layers"))
    return {
        "d_expert": fields.take("moe_intermediate_size"),
        "experts_per_token": fields.take("num_experts_per_tok"),
        "norm_topk_prob": fields.take("norm_topk_prob"),
        "moe_layers": [layer not in dense and (layer + 1) % step == 0 for layer in layers],
    }


def rules(cfg: HookedTransformerConfig, fields: ConfigFields) -> RuleTable:
    """Map the tensors of a `Qwen2MoeForCausalLM`."""
    block = "layers.{layer}"
    return (
        *tables.embeddings(cfg),
        *tables.norm(f"{block}.input_layernorm", "blocks.{layer}.ln1"),
        *tables.attention(f"{block}.self_attn", qkv_bias=fields.take("qkv_bias")),
        *tables.norm(f"{block}.post_attention_layernorm", "blocks.{layer}.ln2"),
        *mlp_or_experts(cfg, f"{block}.mlp"),
        *_shared_expert(cfg, f"{block}.mlp"),
        *tables.norm("norm", "ln_final"),
    )


def mlp_or_experts(cfg: HookedTransformerConfig, module: str) -> tuple[Entry, ...]:
    """Return the rows of the experts in the layers that have some and of the dense MLP in the others."""
    sparse = _sparse_layers(cfg)
    return (
        *tables.router(f"{module}.gate", layers=sparse),
        *tables.experts(f"{module}.experts", layers=sparse),
        *tables.gated_mlp(module, layers=tuple(set(range(cfg.n_layers)) - set(sparse))),
    )


def _shared_expert(cfg: HookedTransformerConfig, module: str) -> tuple[Entry, ...]:
    sparse, target = _sparse_layers(cfg), "blocks.{layer}.mlp"
    shared, gate = f"{module}.shared_expert", f"{module}.shared_expert_gate.weight"
    return (
        *tables.gated_mlp(shared, target=f"{target}.shared", d_mlp="d_shared_expert", layers=sparse),
        Rule(gate, "1 d_model -> d_model 1", f"{target}.W_shared_gate", layers=sparse),
        Constant(f"{target}.b_shared_gate", "1", layers=sparse),
    )


def _sparse_layers(cfg: HookedTransformerConfig) -> tuple[int, ...]:
    return tuple(layer for layer in range(cfg.n_layers) if cfg.has_experts(layer))


FAMILY = Family("Qwen2-MoE", ("Qwen2MoeForCausalLM",), config, rules, prepend_bos=False)
