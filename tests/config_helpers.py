"""Fields of configs that go together."""

from __future__ import annotations

from typing import Any

import torch

# Every field the contract names, with a value that is not its default where one goes with a plain model.
CLASSIC_FIELDS: dict[str, Any] = {
    "n_layers": 3,
    "d_model": 12,
    "n_ctx": 9,
    "d_head": 4,
    "n_heads": 6,
    "d_mlp": 20,
    "d_vocab": 11,
    "act_fn": "silu",
    "attn_only": False,
    "normalization_type": "RMS",
    "positional_embedding_type": "rotary",
    "attention_dir": "bidirectional",
    "n_key_value_heads": 2,
    "gated_mlp": True,
    "parallel_attn_mlp": True,
    "window_size": 3,
    "attn_types": ["local", "global", "local"],
    "rotary_dim": 2,
    "rotary_base": 5000.0,
    "seed": 3,
    "init_mode": "xavier_normal",
    "dtype": torch.float64,
    "device": "cpu",
    "eps": 1e-6,
    "final_rms": True,
    "attn_scale": 3.0,
    "use_attn_scale": True,
    "attn_scores_soft_cap": 5.0,
    "output_logits_soft_cap": 7.0,
    "scale_attn_by_inverse_layer_idx": True,
    "use_local_attn": True,
    "use_qk_norm": True,
    "use_normalization_before_and_after": True,
    "post_embedding_ln": True,
    "rotary_adjacent_pairs": True,
    "rotary_base_local": 100.0,
    "use_NTK_by_parts_rope": True,
    "NTK_by_parts_factor": 4.0,
    "NTK_by_parts_low_freq_factor": 2.0,
    "NTK_by_parts_high_freq_factor": 3.0,
    "NTK_original_ctx_len": 16,
    "num_experts": 4,
    "experts_per_token": 2,
    "d_vocab_out": 13,
    "tokenizer_name": "some/name",
    "model_name": "mine",
    "original_architecture": "SomeForCausalLM",
    "default_prepend_bos": False,
    "init_weights": False,
    "initializer_range": 0.5,
    "use_attn_result": True,
    "use_split_qkv_input": True,
    "use_attn_in": True,
    "use_hook_mlp_in": True,
    "use_hook_tokens": True,
    "ungroup_grouped_query_attention": True,
    "from_checkpoint": True,
    "checkpoint_index": 5,
    "checkpoint_label_type": "step",
    "checkpoint_value": 512,
    "tokenizer_prepends_bos": True,
}


EXPERTS: dict[str, Any] = {"num_experts": 4, "experts_per_token": 2}
SHARED: dict[str, Any] = {**EXPERTS, "gated_mlp": True, "d_shared_expert": 7, "shared_expert_gate": True}
ROUTER: dict[str, Any] = {**EXPERTS, "router_scores": "sigmoid", "router_correction": True}
GROUPS: dict[str, Any] = {**ROUTER, "expert_groups": 2, "expert_groups_per_token": 1}
ROTARY: dict[str, Any] = {"positional_embedding_type": "rotary"}
