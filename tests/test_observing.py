"""Observing never changes a run: every site edited, every other site observed, the same logits and gradients."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import pytest
import torch
from torch import Tensor

from hooked_lm import HookedTransformer, HookPoint
from tests.helpers import tiny_model, tiny_tokens

ROTARY: dict[str, Any] = {"positional_embedding_type": "rotary", "normalization_type": "RMS", "gated_mlp": True}
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
    "mixture": {**ROTARY, "num_experts": 3, "experts_per_token": 2, "act_fn": "silu"},
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


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_observing_any_site_changes_nothing_of_an_edit_at_any_other(architecture: str) -> None:
    model = tiny_model(n_layers=1, **{"act_fn": "gelu", **ARCHITECTURES[architecture]})
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
    assert not wrong


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_caching_everything_with_gradients_changes_nothing_of_an_edit(architecture: str) -> None:
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
        # Where every head's copy is edited, none reads the norm of the stream, which then has no gradient.
        unread = ".ln1." if edited.endswith("hook_attn_in") else "nothing"
        missing = [name for name in others if f"{name}_grad" not in cache and unread not in name]
        model.zero_grad()
        with model.hooks(fwd_hooks=[(edited, tilt)]):
            plain = model(tokens, return_type="loss")
            plain.backward()
        expected = [p.grad for p in model.parameters() if p.grad is not None]
        off = max(differing([logits], alone[:1]), differing([loss, *gradients], [plain, *expected]))
        if off > 1e-12 or missing:
            wrong.append((edited, off, missing))
    assert not wrong


def test_an_edited_copy_is_normalised_as_the_norms_hooks_say() -> None:
    """With the scale frozen, a head's own input is divided by the frozen scale, not by its own."""
    model = tiny_model(n_layers=1)
    tokens, block = tiny_tokens(2, 5), model.blocks[0]
    _, cache = model.run_with_cache(tokens)
    frozen = cache["scale", 0, "ln1"] * 1.5
    seen = {}

    def shift(x: Tensor, hook: HookPoint) -> Tensor:
        x[:, :, 1] += torch.arange(12, dtype=x.dtype)
        return x

    model.run_with_hooks(
        tokens,
        fwd_hooks=[
            ("blocks.0.ln1.hook_scale", lambda x, hook: frozen.clone()),
            ("blocks.0.hook_q_input", shift),
            ("blocks.0.attn.hook_q", lambda x, hook: seen.update(q=x)),
            ("blocks.0.attn.hook_k", lambda x, hook: seen.update(k=x)),
        ],
    )
    resid = cache["resid_pre", 0]

    def read(x: Tensor) -> Tensor:
        return (x - x.mean(-1, keepdim=True)) / frozen * block.ln1.w + block.ln1.b

    copies = torch.stack([resid, resid + torch.arange(12), resid], 2)
    expected_q = torch.stack([read(copies[:, :, h]) @ block.attn.W_Q[h] for h in range(3)], 2) + block.attn.b_Q
    expected_k = torch.einsum("bpd,hde->bphe", read(resid), block.attn.W_K) + block.attn.b_K
    torch.testing.assert_close(seen["q"], expected_q, rtol=0, atol=1e-12)
    torch.testing.assert_close(seen["k"], expected_k, rtol=0, atol=1e-12)


def test_the_gradient_of_a_heads_input_is_that_of_its_own_head_through_the_frozen_norm() -> None:
    model = tiny_model(n_layers=1)
    tokens, gradients = tiny_tokens(2, 5), {}

    def keep(grad: Tensor, hook: HookPoint) -> None:
        gradients[hook.name] = grad.clone()

    hooks: dict[str, Any] = {
        "fwd_hooks": [("blocks.0.ln1.hook_scale", freeze)],
        "bwd_hooks": [(["blocks.0.hook_q_input", "blocks.0.attn.hook_q"], keep)],
    }
    with model.hooks(**hooks):
        model(tokens, return_type="loss").backward()
    _, cache = model.run_with_cache(tokens)
    scale, attn = 0.9 * cache["scale", 0, "ln1"], model.blocks[0].attn
    onto_head = torch.einsum("bphe,hde->bphd", gradients["blocks.0.attn.hook_q"], attn.W_Q)
    through = onto_head * model.blocks[0].ln1.w / scale[:, :, None]
    expected = through - through.mean(-1, keepdim=True)
    torch.testing.assert_close(gradients["blocks.0.hook_q_input"], expected, rtol=0, atol=1e-12)


# Hooks of the norm run once, whoever observes the copies


@pytest.mark.parametrize("observed", ["blocks.0.hook_attn_in", "blocks.0.hook_q_input", "blocks.0.hook_v_input"])
@pytest.mark.parametrize("site", ["blocks.0.ln1.hook_scale", "blocks.0.ln1.hook_normalized"])
def test_a_hook_that_counts_or_draws_runs_once_and_keeps_the_tensor_of_the_run(site: str, observed: str) -> None:
    model, tokens = tiny_model(), tiny_tokens(2, 5)

    def run(**hooks: Any) -> tuple[Tensor, Tensor, int]:
        calls: list[Tensor] = []
        generator = torch.Generator().manual_seed(3)

        def noise(x: Tensor, hook: HookPoint) -> Tensor:
            calls.append(x)
            return x * (1 + 0.3 * torch.rand(x.shape, generator=generator, dtype=x.dtype))

        with model.hooks(fwd_hooks=[(site, noise)]), model.hooks(**hooks):
            logits = model(tokens)
        return logits, torch.autograd.grad(logits[0, -1, 3], calls[0])[0], len(calls)

    logits, gradient, n_calls = run()
    for hooks in ({"fwd_hooks": [(observed, look)]}, {"bwd_hooks": [(observed, look)]}):
        observed_logits, observed_gradient, observed_calls = run(**hooks)
        assert observed_calls == n_calls == 1
        torch.testing.assert_close(observed_logits, logits, rtol=0, atol=1e-12)
        torch.testing.assert_close(observed_gradient, gradient, rtol=0, atol=1e-12)


def test_a_wrapped_norm_keeps_its_hooks_and_is_called_with_the_stream() -> None:
    class Wrapped(torch.nn.Module):
        def __init__(self, base: torch.nn.Module) -> None:
            super().__init__()
            self.base, self.mask = base, torch.linspace(0.5, 1.5, 5, dtype=torch.float64)[None, :, None]

        def forward(self, x: Tensor) -> Tensor:
            return self.base(x) * self.mask

    model, tokens = tiny_model(), tiny_tokens(2, 5)
    model.blocks[0].ln1 = Wrapped(model.blocks[0].ln1)
    model.setup()
    for edited in ("blocks.0.ln1.base.hook_scale", "blocks.0.ln1.base.hook_normalized"):
        for edit, dir in ((tilt, "fwd"), (tilt, "bwd")):
            alone = outcome(model, tokens, edited, edit, dir)
            for observed in ("blocks.0.hook_attn_in", "blocks.0.hook_q_input", "blocks.0.hook_k_input"):
                with model.hooks(**observers([observed], edit)):
                    assert differing(outcome(model, tokens, edited, edit, dir), alone) < 1e-12


def test_a_cached_tensor_is_not_changed_by_hooks_before_or_after_the_recorder() -> None:
    model, tokens, name = tiny_model(), tiny_tokens(2, 5), "blocks.0.hook_resid_pre"
    kept, buffer = [], torch.randn(2, 5, 12, dtype=torch.float64)
    store, fwd, _ = model.get_caching_hooks(name)

    def keep(x: Tensor, hook: HookPoint) -> None:
        kept.append(x)

    def reuse(x: Tensor, hook: HookPoint) -> Tensor:
        return buffer

    def wipe(x: Tensor, hook: HookPoint) -> None:
        x.zero_()

    with torch.no_grad():
        expected = model(tokens, stop_at_layer=0)
        model.run_with_hooks(tokens, fwd_hooks=[(name, keep), *fwd, (name, wipe)])
        torch.testing.assert_close(store[name], expected)
        kept[0].fill_(7.0)
        torch.testing.assert_close(store[name], expected)
        model.run_with_hooks(tokens, fwd_hooks=[(name, reuse), *fwd])
        before = buffer.clone()
        buffer.zero_()
        torch.testing.assert_close(store[name], before)
