"""The way in which courses load small trained models: old state dicts, permanent hooks that mask, weights processed."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tests.classic_reference.weights import weights_of

PAD = 1
TOKENS = torch.tensor([[0, 3, 4, 3, 2, 1, 1], [0, 3, 3, 4, 4, 4, 2], [0, 4, 2, 1, 1, 1, 1]])
FIELDS: dict[str, Any] = {
    "n_ctx": 7, "d_model": 8, "d_head": 4, "n_heads": 2, "d_mlp": 12, "n_layers": 3, "act_fn": "relu", "d_vocab": 5,
    "d_vocab_out": 2, "attention_dir": "bidirectional", "normalization_type": "LN", "use_attn_result": True,
    "use_split_qkv_input": True, "use_hook_tokens": True, "seed": 42, "device": "cpu", "dtype": torch.float64,
}  # fmt: skip


def saved_state(model: Any) -> dict[str, Tensor]:
    """A state dict as older versions saved it: with a mask, and a finite score for what it masks."""
    shapes = {name: list(parameter.shape) for name, parameter in model.named_parameters()}
    state = weights_of(shapes, gated=False)
    for layer in range(model.cfg.n_layers):
        state[f"blocks.{layer}.attn.mask"] = torch.ones(7, 7, dtype=torch.bool).tril()
        state[f"blocks.{layer}.attn.IGNORE"] = torch.tensor(-1e5)
    return state


def mask_padding(model: Any) -> None:
    """Hide padding from every head: one permanent hook keeps where it is, others mask the scores in place."""
    tokens_point = model.hook_dict["hook_tokens"]

    def keep(tokens: Tensor, hook: Any) -> None:
        hook.ctx["padding"] = (tokens == PAD)[:, None, None, :]

    def mask(scores: Tensor, hook: Any) -> None:
        scores.masked_fill_(tokens_point.ctx["padding"], -1e5)
        if hook.layer() == model.cfg.n_layers - 1:
            del tokens_point.ctx["padding"]

    for name, hook in model.hook_dict.items():
        if name == "hook_tokens":
            hook.add_perma_hook(keep)
        elif name.endswith("attn_scores"):
            hook.add_perma_hook(mask)


def masked_results(model: Any) -> dict[str, Tensor]:
    """Load, mask and run; with a hook that a `reset_hooks` removes, while those that mask stay."""
    model.load_state_dict(saved_state(model))
    unmasked = model(TOKENS)
    mask_padding(model)
    logits, cache = model.run_with_cache(TOKENS, names_filter=lambda name: not name.endswith("hook_tokens"))
    found = {"unmasked": unmasked, "logits": logits, "probabilities": logits.softmax(-1)[:, 0]}
    for name in ("pattern", "result", "q_input", "resid_post", "post"):
        found[name] = cache[name, 1]
    found["decomposed"] = cache.stack_head_results(layer=2)
    model.add_hook("blocks.0.hook_attn_out", lambda x, hook: 0 * x)
    found["ablated"] = model(TOKENS)
    model.reset_hooks()
    found["again"] = model(TOKENS)
    model.reset_hooks(including_permanent=True)
    found["without"] = model(TOKENS)
    return found


def processed_results(model: Any) -> dict[str, Tensor]:
    """Process a saved state dict before it is loaded, and read circuits from the model's weights."""
    state = model.center_writing_weights(saved_state(model))
    state = model.center_unembed(state)
    state = model.fold_layer_norm(state)
    state = model.fold_value_biases(state)
    model.load_state_dict(state, strict=False)
    logits = model(TOKENS).log_softmax(-1)
    read = {name: getattr(model, name) for name in ("W_E", "W_Q", "W_V", "W_in", "W_U", "b_Q", "b_O", "b_U")}
    return {"logits": logits, **read, "W_OV": (model.W_V @ model.W_O)[0, 1]}
