"""Compute the stored numbers: `python -m tests.classic_reference.make`, where transformer_lens 3.9.0 is installed.

The library is no dependency: run this in an environment of its own, from the root of the repository.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tests.classic_reference.calls import CALLED_BY_HAND, calls_by_hand, with_a_cache
from tests.classic_reference.toy import FIELDS, masked_results, processed_results
from tests.classic_reference.weights import fingerprint, tokens_of, weights_of

FOLDER = Path(__file__).parent
BASE: dict[str, Any] = {
    "n_layers": 2, "d_model": 8, "n_ctx": 10, "d_head": 4, "n_heads": 2, "d_mlp": 12, "d_vocab": 11,
    "act_fn": "gelu_new", "device": "cpu", "dtype": torch.float64, "seed": 1,
}  # fmt: skip
LOCAL = {"use_local_attn": True, "window_size": 3, "attn_types": ["global", "local"]}
ROTARY = {"positional_embedding_type": "rotary"}
CHANGES: dict[str, dict[str, Any]] = {
    "plain": {},
    "relu": {"act_fn": "relu"},
    "gelu": {"act_fn": "gelu"},
    "silu": {"act_fn": "silu"},
    "gelu_fast": {"act_fn": "gelu_fast"},
    "solu_ln": {"act_fn": "solu_ln"},
    "no norm": {"normalization_type": None},
    "folded": {"normalization_type": "LNPre"},
    "rms": {"normalization_type": "RMS", "eps": 1e-6},
    "rms folded": {"normalization_type": "RMSPre"},
    "final rms": {"final_rms": True},
    "attention only": {"attn_only": True, "act_fn": None},
    "shortformer": {"positional_embedding_type": "shortformer"},
    "rotary": ROTARY,
    "rotary part": {**ROTARY, "rotary_dim": 2, "rotary_adjacent_pairs": True},
    "rotary base": {**ROTARY, "rotary_base": 50},
    "llama 3 rope": {**ROTARY, "use_NTK_by_parts_rope": True, "NTK_original_ctx_len": 8, "NTK_by_parts_factor": 4.0},
    "linear rope": {**ROTARY, "rotary_scaling_factor": 2.0},
    "local rope": {**ROTARY, **LOCAL, "rotary_base_local": 30.0},
    "alibi": {"positional_embedding_type": "alibi"},
    "bidirectional": {"attention_dir": "bidirectional"},
    "local": LOCAL,
    "grouped": {"n_heads": 4, "n_key_value_heads": 2},
    "grouped rotary": {**ROTARY, "n_heads": 4, "n_key_value_heads": 1, "normalization_type": "RMS"},
    "gated": {"gated_mlp": True, "act_fn": "silu"},
    "parallel": {"parallel_attn_mlp": True, **ROTARY},
    "scaled": {"use_attn_scale": True, "attn_scale": 0.7, "scale_attn_by_inverse_layer_idx": True},
    "unscaled": {"use_attn_scale": False},
    "capped": {"attn_scores_soft_cap": 1.5, "output_logits_soft_cap": 0.8},
    "query-key norm": {**ROTARY, "use_qk_norm": True, "normalization_type": "RMS"},
    "norms after": {"use_normalization_before_and_after": True, "normalization_type": "RMS"},
    "embedding norm": {"post_embedding_ln": True},
    "classes": {"d_vocab_out": 3},
    "experts": {"num_experts": 3, "experts_per_token": 2, "gated_mlp": True, "act_fn": "silu"},
    "experts as they are": {"num_experts": 3, "experts_per_token": 2, "gated_mlp": True, "norm_topk_prob": False},
    "sinks": {"use_attention_sinks": True},
    "clipped": {"clip_qkv": 0.2},
    "flags": {"use_attn_result": True, "use_split_qkv_input": True, "use_hook_mlp_in": True, "use_hook_tokens": True},
}  # fmt: skip


def numbers(x: Tensor) -> Any:
    return json.loads(
        json.dumps(x.detach().double().tolist(), allow_nan=True), parse_float=lambda one: round(float(one), 10)
    )


def made(**changes: Any) -> tuple[Any, dict[str, list[int]]]:
    """Return a model of the classic library with the weights of `weights_of`, and the shapes of its state dict."""
    from transformer_lens import HookedTransformer, HookedTransformerConfig

    cfg = HookedTransformerConfig(**{**BASE, **changes})
    model = HookedTransformer(cfg)
    model = model.to(torch.float64)
    skipped = ("mask", "IGNORE", "rotary_sin", "rotary_cos")
    state = model.state_dict()
    shapes = {name: list(value.shape) for name, value in state.items() if name.rpartition(".")[2] not in skipped}
    model.load_state_dict({**state, **weights_of(shapes, cfg.gated_mlp)})
    return model, shapes


def configs() -> dict[str, Any]:
    found = {}
    for name, changes in CHANGES.items():
        model, shapes = made(**changes)
        fields = {key: str(value) if key == "dtype" else value for key, value in model.cfg.to_dict().items()}
        with torch.no_grad():
            logits = model(tokens_of(1, 6, 11))
        buffers = {key: list(value.shape) for key, value in model.state_dict().items() if key not in shapes}
        found[name] = {"cfg": fields, "shapes": shapes, "buffers": buffers, "logits": numbers(logits)}
    return found


def by_hand() -> dict[str, Any]:
    from transformer_lens.cache.key_value_cache_entry import TransformerLensKeyValueCacheEntry

    found = {}
    for name in CALLED_BY_HAND:
        model, _ = made(**CHANGES[name])
        with torch.no_grad():
            entry = TransformerLensKeyValueCacheEntry.init_cache_entry(model.cfg, "cpu", 2)
            results = {**calls_by_hand(model), **with_a_cache(model, entry)}
            found[name] = {call: fingerprint(x) for call, x in results.items()}
    return found


def toy() -> dict[str, Any]:
    from transformer_lens import HookedTransformer, HookedTransformerConfig

    found = {}
    for name, results in {"masked": masked_results, "processed": processed_results}.items():
        model = HookedTransformer(HookedTransformerConfig(**FIELDS)).to(torch.float64)
        with torch.no_grad():
            found[name] = {call: fingerprint(x) for call, x in results(model).items()}
    return found


def main() -> None:
    for name, compute in {"configs": configs, "by_hand": by_hand, "toy": toy}.items():
        (FOLDER / f"{name}.json").write_text(json.dumps(compute(), separators=(",", ":")) + "\n")


if __name__ == "__main__":
    main()
