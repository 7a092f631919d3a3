"""Every site edited while every other one is observed: which edits that disturbs."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from hooked_lm import HookedTransformer, HookPoint
from tests.helpers import tiny_model, tiny_tokens

ROTARY: dict[str, Any] = {"positional_embedding_type": "rotary", "normalization_type": "RMS", "gated_mlp": True}
LATENT: dict[str, Any] = {**ROTARY, "n_heads": 3, "d_head": 6, "rotary_dim": 4, "d_latent_kv": 5, "d_value": 3}
ARCHITECTURES: dict[str, dict[str, Any]] = {
    "GPT-2": {},
    "Llama, three query heads to a key-value head": {**ROTARY, "n_heads": 6, "d_head": 4, "n_key_value_heads": 2},
    "Gemma 2": {
        **ROTARY,
        "n_heads": 4,
        "d_head": 4,
        "n_key_value_heads": 2,
        "norm_placement": "before_and_after",
        "attn_scores_soft_cap": 5.0,
        "output_logits_soft_cap": 5.0,
        "window_size": 3,
        "act_fn": "gelu_pytorch_tanh",
    },
    "parallel NeoX": {"positional_embedding_type": "rotary", "rotary_dim": 2, "parallel_attn_mlp": True},
    "Bloom": {"positional_embedding_type": "alibi", "post_embedding_ln": True},
    "gated attention": {**ROTARY, "n_heads": 4, "d_head": 4, "n_key_value_heads": 2, "attention_gate": True},
    "a layer before the unembedding, no first norm": {"unembed_act_fn": "gelu", "first_norm": False},
    "experts from block to block": {
        **ROTARY,
        "n_layers": 2,
        "shortcut_experts": True,
        "num_experts": 4,
        "identity_experts": 1,
        "experts_per_token": 2,
        "act_fn": "silu",
    },
    "latent attention": {**LATENT, "d_latent_q": 7, "act_fn": "silu"},
    "mixture with groups and a corrected choice": {
        **ROTARY,
        "num_experts": 6,
        "experts_per_token": 3,
        "d_shared_expert": 5,
        "router_scores": "sigmoid",
        "router_correction": True,
        "routed_scale": 1.7,
        "norm_topk_prob": True,
        "expert_groups": 3,
        "expert_groups_per_token": 2,
        "act_fn": "silu",
    },
}
Edit = Callable[[Tensor, HookPoint], Tensor]


# How many groups the observed sites are shared out among; neighbours come into different groups.
N_GROUPS = 12


def tilt(x: Tensor, hook: HookPoint) -> Tensor:
    slope = torch.linspace(-0.3, 0.3, x[0].numel(), dtype=x.dtype).reshape(x[0].shape)
    return x * (1 + slope) + slope


def freeze(x: Tensor, hook: HookPoint) -> Tensor:
    return (0.9 * x).detach()


def look(x: Tensor, hook: HookPoint) -> None:
    """A hook that does nothing, as far as it can be known from outside."""


def observers(names: list[str], edit: Edit) -> dict[str, Any]:
    """Hooks in both directions; none on gradients where the edit cuts off the graph above, and they could not run."""
    return {"fwd_hooks": [(names, look)], "bwd_hooks": [(names, look)] if edit is not freeze else []}


def outcome(model: HookedTransformer, tokens: Tensor, name: str, edit: Edit, dir: str = "fwd") -> list[Tensor]:
    """Logits and every parameter's gradient under an edit, under whatever else is on the model."""
    model.zero_grad()
    with model.hooks(**{f"{dir}_hooks": [(name, edit)]}):
        logits = model(tokens)
        (logits * torch.linspace(-1, 1, logits.numel(), dtype=logits.dtype).reshape(logits.shape)).sum().backward()
    return [logits.detach(), *(torch.zeros_like(p) if p.grad is None else p.grad.clone() for p in model.parameters())]


def differing(came: Iterable[Tensor], expected: Iterable[Tensor]) -> float:
    return max(
        float((a.detach() - b.detach()).abs().max() / b.detach().abs().max().clamp(min=1.0))
        for a, b in zip(came, expected, strict=True)
    )


def sites_of(model: HookedTransformer) -> list[str]:
    return [name for name, point in model.hook_dict.items() if point.differentiable]


def edits_that_observers_disturb(architecture: str) -> list[Any]:
    """Return the edits under which observing any other site changes logits or gradients."""
    model = tiny_model(**{"n_layers": 1, "act_fn": "gelu", **ARCHITECTURES[architecture]})
    tokens, names, wrong = tiny_tokens(2, 5), sites_of(model), []
    for edited in names:
        for edit, dir in ((tilt, "fwd"), (freeze, "fwd"), (tilt, "bwd")):
            if edit is freeze and not edited.startswith("blocks."):
                continue  # nothing above it would have a gradient, or nothing at all
            alone = outcome(model, tokens, edited, edit, dir)
            for group in range(N_GROUPS):
                observed = [name for name in names[group::N_GROUPS] if name != edited]
                with model.hooks(**observers(observed, edit)):
                    off = differing(outcome(model, tokens, edited, edit, dir), alone)
                if off > 1e-12:
                    wrong.append((edited, edit.__name__, dir, observed, off))
    return wrong


def edits_that_caching_disturbs(architecture: str) -> list[Any]:
    """Return the edits under which caching everything with gradients changes these, or misses some."""
    model = tiny_model(**{"act_fn": "gelu", **ARCHITECTURES[architecture]})
    tokens, names, wrong = tiny_tokens(2, 5), sites_of(model), []
    for edited in names:
        alone = outcome(model, tokens, edited, tilt)
        others = [name for name in names if name != edited]
        with torch.no_grad(), model.hooks(fwd_hooks=[(edited, tilt)]):
            logits, _ = model.run_with_cache(tokens, names_filter=others)
        model.zero_grad()
        with model.hooks(fwd_hooks=[(edited, tilt)]):
            loss, cache = model.run_with_cache(tokens, names_filter=others, incl_bwd=True, return_type="loss")
        gradients = [p.grad.clone() for p in model.parameters() if p.grad is not None]
        # Where every head's copy is edited, none reads the stream's norm and latents, which then have no gradient.
        unread = {"hook_attn_in": (".ln1.", "latent_"), "hook_q_input": ("latent_q",)}.get(edited.split(".")[-1], ())
        missing = [name for name in others if f"{name}_grad" not in cache and not any(one in name for one in unread)]
        model.zero_grad()
        with model.hooks(fwd_hooks=[(edited, tilt)]):
            plain = model(tokens, return_type="loss")
            plain.backward()
        expected = [p.grad for p in model.parameters() if p.grad is not None]
        off = max(differing([logits], alone[:1]), differing([loss, *gradients], [plain, *expected]))
        if off > 1e-12 or missing:
            wrong.append((edited, off, missing))
    return wrong
