"""How many weights a model of a config has."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from hooked_lm.config.config import HookedTransformerConfig

__all__ = ["attention_parameters", "count_parameters", "experts_parameters", "mlp_parameters"]


def count_parameters(cfg: HookedTransformerConfig) -> int:
    """Return the number of weights of attention and MLPs: no embeddings, biases, norms (Kaplan et al. 2020)."""
    count = cfg.n_layers * attention_parameters(cfg)
    if cfg.d_mlp is not None and not cfg.attn_only:
        per_width = (3 if cfg.gated_mlp else 2) * cfg.d_model
        for layer in range(cfg.n_layers):
            count += mlp_parameters(cfg, layer, per_width)
            count += experts_parameters(cfg, per_width) if cfg.has_shortcut(layer) else 0
    return count


def attention_parameters(cfg: HookedTransformerConfig) -> int:
    """Return the number of weights of one layer's attention."""
    if cfg.d_latent_kv is None:
        return cfg.d_model * cfg.d_head * ((3 if cfg.attention_gate else 2) * cfg.n_heads + 2 * cfg.n_kv_heads)
    rotary, values = cfg.rotary_dim or 0, cfg.n_heads * cfg.value_width
    count = (cfg.d_latent_q or cfg.d_model) * cfg.n_heads * cfg.d_head + cfg.d_model * (cfg.d_latent_q or 0)
    count += cfg.d_model * (cfg.d_latent_kv + rotary)
    return count + cfg.d_latent_kv * (cfg.n_heads * (cfg.d_head - rotary) + values) + values * cfg.d_model


def mlp_parameters(cfg: HookedTransformerConfig, layer: int, per_width: int) -> int:
    """Return the number of weights of one layer's MLP, given their number per unit of its hidden width."""
    if not cfg.has_experts(layer):
        return per_width * (cfg.d_mlp or 0)
    return experts_parameters(cfg, per_width)


def experts_parameters(cfg: HookedTransformerConfig, per_width: int) -> int:
    """Return the number of weights of a mixture of experts, given their number per unit of an expert's hidden width."""
    shared = per_width * (cfg.d_shared_expert or 0) + (cfg.d_model if cfg.shared_expert_gate else 0)
    return shared + per_width * cfg.expert_width * cfg.weighted_experts + cfg.d_model * (cfg.num_experts or 0)
