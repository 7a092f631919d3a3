"""Architectures in which every kind of hook site occurs, and the shapes of their sites."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from hooked_lm import HookedTransformer
from tests.helpers import tiny_model, tiny_tokens

ARCHITECTURES: dict[str, dict[str, Any]] = {
    "gpt2": {},
    "attention only": {"attn_only": True, "scale_attn_by_inverse_layer_idx": True},
    "parallel": {"parallel_attn_mlp": True, "positional_embedding_type": "rotary", "rotary_dim": 2},
    "grouped gated rms rotary": {
        "n_heads": 4,
        "d_head": 6,
        "n_key_value_heads": 2,
        "gated_mlp": True,
        "act_fn": "silu",
        "normalization_type": "RMS",
        "positional_embedding_type": "rotary",
    },
    "shortformer": {"positional_embedding_type": "shortformer"},
    "alibi": {"positional_embedding_type": "alibi", "post_embedding_ln": True},
    "qk norm": {
        "use_qk_norm": True,
        "n_key_value_heads": 1,
        "normalization_type": "RMS",
        "positional_embedding_type": "rotary",
        "rotary_adjacent_pairs": True,
    },
    "norms before and after": {"use_normalization_before_and_after": True, "normalization_type": "RMS"},
    "solu_ln": {"act_fn": "solu_ln"},
    "mixture": {"num_experts": 4, "experts_per_token": 2, "gated_mlp": True, "act_fn": "silu", "norm_topk_prob": True},
    "local": {"attn_types": ["global", "local"], "window_size": 3},
    "soft caps": {"attn_scores_soft_cap": 0.5, "output_logits_soft_cap": 0.7},
    "no norms, no positions": {"normalization_type": None, "positional_embedding_type": "none"},
    "folded, bidirectional": {"normalization_type": "LNPre", "attention_dir": "bidirectional"},
    "norms on what is written, qk norm across heads, clipped": {
        "n_layers": 1,
        "norm_placement": "after",
        "normalization_type": "RMS",
        "positional_embedding_type": "rotary",
        "n_heads": 4,
        "d_head": 6,
        "n_key_value_heads": 2,
        "use_qk_norm": True,
        "qk_norm_across_heads": True,
        "clip_qkv": 0.8,
    },
    "norms on the stream, xielu, no final norm": {
        "n_layers": 1,
        "norm_placement": "residual",
        "final_norm": False,
        "act_fn": "xielu",
    },
    "qk LN with a gain per head, some layers rotate, scaled queries, tied, scaled logits": {
        "use_qk_norm": True,
        "qk_norm_type": "LN",
        "qk_norm_per_head_gains": True,
        "positional_embedding_type": "rotary",
        "rotary_layers": [True, False],
        "query_scale_beta": 0.8,
        "query_scale_ctx_len": 2,
        "parallel_attn_mlp": True,
        "tie_word_embeddings": True,
        "logit_scale": 0.3,
    },
    "qk norm after rotary without gain, scaled embedding, wide yarn": {
        "n_layers": 1,
        "use_qk_norm": True,
        "qk_norm_type": "RMSPre",
        "qk_norm_after_rotary": True,
        "positional_embedding_type": "rotary",
        "use_yarn_rope": True,
        "yarn_attention_factor": 1.7,
        "embedding_scale": 3.5,
        "normalization_type": "RMSPre",
    },
    "sinks, mixture with a limit": {
        "attention_sinks": True,
        "n_heads": 4,
        "d_head": 6,
        "n_key_value_heads": 2,
        "attn_types": ["local", "global"],
        "window_size": 3,
        "num_experts": 4,
        "experts_per_token": 2,
        "gated_mlp": True,
        "act_fn": "quick_gelu",
        "gated_limit": 0.4,
    },
    "dense layer, then mixture with a shared gated expert": {
        "num_experts": 4,
        "experts_per_token": 2,
        "moe_layers": [False, True],
        "d_expert": 10,
        "d_shared_expert": 7,
        "shared_expert_gate": True,
        "gated_mlp": True,
        "act_fn": "silu",
        "norm_topk_prob": False,
    },
    "mixture with groups and a corrected choice": {
        "num_experts": 6,
        "experts_per_token": 2,
        "router_scores": "sigmoid",
        "router_correction": True,
        "routed_scale": 1.7,
        "expert_groups": 3,
        "expert_groups_per_token": 2,
        "gated_mlp": True,
        "act_fn": "silu",
    },
    "latent attention": {
        "d_head": 6,
        "positional_embedding_type": "rotary",
        "rotary_dim": 4,
        "rotary_adjacent_pairs": True,
        "d_latent_kv": 5,
        "d_latent_q": 7,
        "d_value": 3,
        "normalization_type": "RMS",
    },
    "latent attention, plain queries, norms on what is written": {
        "n_layers": 1,
        "d_head": 6,
        "positional_embedding_type": "rotary",
        "rotary_dim": 2,
        "d_latent_kv": 5,
        "norm_placement": "after",
        "latent_eps": 0.1,
    },
    "gated attention, norms before and after": {
        "attention_gate": True,
        "n_heads": 4,
        "d_head": 6,
        "n_key_value_heads": 2,
        "normalization_type": "RMS",
        "norm_placement": "before_and_after",
        "positional_embedding_type": "rotary",
        "rotary_layers": [True, False],
    },
    "a layer before the unembedding, no first norm": {
        "unembed_act_fn": "silu",
        "first_norm": False,
        "post_embedding_ln": True,
        "positional_embedding_type": "rotary",
        "logit_scale": 0.6,
    },
    "experts from block to block, some of them identities": {
        "shortcut_experts": True,
        "num_experts": 5,
        "identity_experts": 2,
        "experts_per_token": 3,
        "d_expert": 10,
        "norm_topk_prob": False,
        "routed_scale": 1.7,
        "normalization_type": "RMS",
        "gated_mlp": True,
        "act_fn": "silu",
    },
    "sparsemixer": {"n_layers": 1, "num_experts": 5, "experts_per_token": 2, "sparsemixer_jitter": 0.3},
    "alibi scaled, in bfloat16": {
        "n_layers": 1,
        "positional_embedding_type": "alibi",
        "alibi_scale": 0.7,
        "alibi_in_bfloat16": True,
    },
}
BATCH, POS = 2, 6
TOKENS = tiny_tokens(BATCH, POS)


def model_of(name: str) -> HookedTransformer:
    return tiny_model(**ARCHITECTURES[name])


def sites_of(model: HookedTransformer) -> dict[str, tuple[int, ...]]:
    """Every site the architecture has, with its shape: the table of the public surface."""
    cfg = model.cfg
    b, p, d, h, kv, dh = BATCH, POS, cfg.d_model, cfg.n_heads, cfg.n_kv_heads, cfg.d_head
    dv = cfg.d_value or dh
    stream, one = (b, p, d), (b, p, 1)

    def norm(module: str, shape: tuple[int, ...] = stream, axes: int = 1) -> dict[str, tuple[int, ...]]:
        if cfg.normalization_type is None:
            return {}
        return {f"{module}.hook_scale": (*shape[:-axes], *(1,) * axes), f"{module}.hook_normalized": shape}

    sites: dict[str, tuple[int, ...]] = {"hook_tokens": (b, p), "hook_embed": stream}
    if cfg.post_embedding_ln:
        sites |= norm("embed.ln")
    if cfg.positional_embedding_type in ("standard", "shortformer"):
        sites["hook_pos_embed"] = stream
    for layer in range(cfg.n_layers):
        at = f"blocks.{layer}."
        block = {
            "hook_resid_pre": stream,
            "hook_attn_in": (b, p, h, d),
            "hook_q_input": (b, p, h, d),
            "hook_k_input": (b, p, kv, d),
            "hook_v_input": (b, p, kv, d),
            **(norm("ln1") if cfg.norm_placement != "after" and (layer or cfg.first_norm) else {}),
            "attn.hook_q": (b, p, h, dh),
            "attn.hook_k": (b, p, kv, dh),
            "attn.hook_v": (b, p, kv, dv),
            "attn.hook_attn_scores": (b, h, p, p),
            "attn.hook_pattern": (b, h, p, p),
            "attn.hook_z": (b, p, h, dv),
            "attn.hook_result": (b, p, h, d),
            "hook_attn_out": stream,
            "hook_resid_post": stream,
        }
        if turns(model, layer):
            block |= {"attn.hook_rot_q": (b, p, h, dh), "attn.hook_rot_k": (b, p, kv, dh)}
        if cfg.attention_gate:
            block["attn.hook_gate"] = (b, p, h, dh)
        for name, width in (("latent_kv", cfg.d_latent_kv), ("latent_q", cfg.d_latent_q)):
            if width is not None:
                latent = (b, p, width)
                block |= {f"attn.hook_{name}": latent, f"attn.{name}_norm.hook_normalized": latent}
                block[f"attn.{name}_norm.hook_scale"] = one
        if cfg.use_qk_norm:
            axes = 2 if cfg.qk_norm_across_heads else 1
            block |= norm("attn.q_norm", (b, p, h, dh), axes) | norm("attn.k_norm", (b, p, kv, dh), axes)
        if cfg.norm_placement in ("before_and_after", "after"):
            block |= norm("ln1_post") | ({} if cfg.attn_only else norm("ln2_post"))
        if not cfg.attn_only:
            block |= {"hook_mlp_in": stream, "hook_mlp_out": stream}
            block |= norm("ln2") if cfg.norm_placement != "after" else {}
            if not cfg.parallel_attn_mlp:
                block["hook_resid_mid"] = stream
            if is_mixture(model, layer):
                block["mlp.hook_expert_weights"] = (b, p, cfg.num_experts or 0)
                block["mlp.hook_expert_indices"] = (b, p, cfg.experts_per_token or 0)
                if cfg.d_shared_expert is not None:
                    for site in ("hook_pre", "hook_pre_linear", "hook_post"):
                        block[f"mlp.shared.{site}"] = (b, p, cfg.d_shared_expert)
            else:
                if cfg.shortcut_experts and layer % 2 == 0:
                    block["shortcut.hook_expert_weights"] = (b, p, cfg.num_experts or 0)
                    block["shortcut.hook_expert_indices"] = (b, p, cfg.experts_per_token or 0)
                    block["hook_shortcut_out"] = stream
                hidden = (b, p, cfg.d_mlp or 0)
                block |= {"mlp.hook_pre": hidden, "mlp.hook_post": hidden}
                if cfg.gated_mlp:
                    block["mlp.hook_pre_linear"] = hidden
                if cfg.act_fn == "solu_ln":
                    block |= {"mlp.hook_mid": hidden, "mlp.ln.hook_scale": one, "mlp.ln.hook_normalized": hidden}
        sites |= {at + site: shape for site, shape in block.items()}
    logits = (b, p, cfg.d_vocab)
    final = norm("ln_final") if cfg.final_norm else {}
    if cfg.unembed_act_fn is not None:
        final |= {"unembed.transform.hook_pre": stream, "unembed.transform.hook_post": stream}
        final |= norm("unembed.transform.ln")
    return {**sites, **final, "unembed.hook_in": stream, "unembed.hook_out": logits}


def is_mixture(model: HookedTransformer, layer: int) -> bool:
    moe_layers = model.cfg.moe_layers or [True] * model.cfg.n_layers
    return model.cfg.num_experts is not None and moe_layers[layer] and not model.cfg.shortcut_experts


def carried_beside(model: HookedTransformer, layer: int, site: str) -> list[str]:
    """What goes on from a site beside the stream."""
    first = layer if site == "resid_post" else layer - 1
    return [f"blocks.{first}.hook_shortcut_out"] if model.cfg.shortcut_experts and first % 2 == 0 else []


def turns(model: HookedTransformer, layer: int) -> bool:
    rotary_layers = model.cfg.rotary_layers or [True] * model.cfg.n_layers
    return model.cfg.positional_embedding_type == "rotary" and rotary_layers[layer]


def direction_for(shape: tuple[int, ...], seed: int = 1) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
