"""Observing never changes a run: every site edited, every other site observed, the same logits and gradients."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from hooked_lm import HookPoint
from tests.helpers import tiny_model, tiny_tokens
from tests.observing_helpers import (
    differing,
    edits_that_caching_disturbs,
    edits_that_observers_disturb,
    freeze,
    look,
    observers,
    outcome,
    tilt,
)


@pytest.mark.parametrize("architecture", ["GPT-2"])
def test_observing_any_site_changes_nothing_of_an_edit_at_any_other(architecture: str) -> None:
    assert not edits_that_observers_disturb(architecture)


@pytest.mark.parametrize("architecture", ["GPT-2"])
def test_caching_everything_with_gradients_changes_nothing_of_an_edit(architecture: str) -> None:
    assert not edits_that_caching_disturbs(architecture)


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


@torch.no_grad()
@pytest.mark.parametrize("site", ["hook_q_input", "hook_k_input", "hook_v_input", "hook_attn_in"])
def test_a_cache_has_the_norm_of_the_stream_whatever_is_done_to_the_copies(site: str) -> None:
    model, tokens, calls = tiny_model(), tiny_tokens(2, 5), []
    norms = [f"blocks.0.ln1.{name}" for name in ("hook_scale", "hook_normalized")]
    _, plain = model.run_with_cache(tokens, names_filter=norms)

    def count(x: Tensor, hook: HookPoint) -> None:
        calls.append(hook.name)

    count.reads_only = True  # type: ignore[attr-defined]
    with model.hooks(fwd_hooks=[(f"blocks.0.{site}", tilt), (norms, count)]):
        _, cache = model.run_with_cache(tokens, names_filter=norms)
    assert sorted(calls) == sorted(norms)
    for name in norms:
        torch.testing.assert_close(cache[name], plain[name], rtol=0, atol=1e-12)


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
