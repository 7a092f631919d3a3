"""Cohere 2 with experts (Command A+, Cohere 2026), beside attention in each layer or from some layer on."""

from __future__ import annotations

from hooked_lm.config import HookedTransformerConfig
from weight_conversion import tables
from weight_conversion.errors import CheckpointError
from weight_conversion.families import cohere
from weight_conversion.family import Family
from weight_conversion.fields import Arguments, ConfigFields
from weight_conversion.layer_types import layer_types
from weight_conversion.rules import Entry, RuleTable

__all__ = ["FAMILY", "config", "rules"]


def config(fields: ConfigFields) -> Arguments:
    """Map a `Cohere2MoeConfig`.

    Raises:
        CheckpointError: the experts' weights are sigmoids of their scores.
    """
    # `layer_types` and `mlp_layer_types` hold the same.
    fields.ignore("sliding_window_pattern", "first_k_dense_replace", "output_router_logits")
    if fields.take("expert_selection_fn") != "softmax":
        raise CheckpointError(f"{fields.family} is supported with expert_selection_fn='softmax' only")
    # It is about sigmoids.
    fields.ignore("norm_topk_prob")
    windows, sparse = layer_types(fields), [kind == "sparse" for kind in fields.take("mlp_layer_types")]
    wide = fields.take("intermediate_size")
    # Layers without experts rotate in any case, unless they have a pattern of windows.
    dense_rotate = fields.take("prefix_dense_sliding_window_pattern") == 1
    return {
        **cohere.shared_config(fields),
        **windows,
        **_norms(fields),
        "rotary_layers": [
            kind == "local" or (dense_rotate and not experts)
            for kind, experts in zip(windows["attn_types"], sparse, strict=True)
        ],
        "moe_layers": sparse,
        "num_experts": fields.take("num_experts"),
        "experts_per_token": fields.take("num_experts_per_tok"),
        "norm_topk_prob": True,
        "d_expert": wide,
        "d_shared_expert": wide * fields.take("num_shared_experts") or None,
        "d_mlp": fields.take("prefix_dense_intermediate_size") or wide,
    }


def _norms(fields: ConfigFields) -> Arguments:
    """Return the arguments about norms: RMS norms if `rms_norm_eps` is given, LayerNorms otherwise."""
    eps = fields.take("rms_norm_eps")
    return {} if eps is None else {"normalization_type": "RMS", "eps": eps}


def rules(cfg: HookedTransformerConfig, fields: ConfigFields) -> RuleTable:
    """Map the tensors of a `Cohere2MoeForCausalLM`."""
    block, bias = "layers.{layer}", fields.take("attention_bias")
    norm = tables.biasless_layer_norm if cfg.normalization_type == "LN" else tables.norm
    return (
        *tables.embeddings(cfg),
        *norm(f"{block}.input_layernorm", "blocks.{layer}.ln1"),
        *tables.attention(f"{block}.self_attn", qkv_bias=bias, out_bias=bias),
        *norm(f"{block}.input_layernorm", "blocks.{layer}.ln2", again=True),
        *_mlps(cfg, f"{block}.mlp", fields.take("shared_expert_combination_strategy")),
        *norm("norm", "ln_final"),
    )


def _mlps(cfg: HookedTransformerConfig, module: str, combination: str) -> tuple[Entry, ...]:
    sparse = tuple(layer for layer in range(cfg.n_layers) if cfg.has_experts(layer))
    dense = tuple(set(range(cfg.n_layers)) - set(sparse))
    shares = cfg.d_shared_expert is not None
    # The mean of the two is written, or their sum.
    scale = 0.5 if shares and combination == "average" else 1.0
    rows = (
        *tables.router(f"{module}.gate", layers=sparse),
        *tables.experts(f"{module}.experts", out_scale=scale, layers=sparse),
        *tables.gated_mlp(module, layers=dense),
    )
    if not shares:
        return rows
    shared, target = f"{module}.shared_experts", "blocks.{layer}.mlp.shared"
    d_mlp = "d_shared_expert"
    return (*rows, *tables.gated_mlp(shared, target=target, d_mlp=d_mlp, out_scale=scale, layers=sparse))


FAMILY = Family("Cohere 2-MoE", ("Cohere2MoeForCausalLM", "Cohere2MoeModel"), config, rules)
