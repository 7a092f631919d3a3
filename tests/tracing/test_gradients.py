"""Gradients in a trace, against autograd on plain runs."""

from __future__ import annotations

import pytest
import torch

from hooked_lm.metrics import logit_diff
from hooked_lm.tracing import TraceError
from tests.helpers import tiny_model, tiny_tokens

MODEL = tiny_model(n_layers=3)
METRIC = logit_diff(1, 2)


def by_hand(tokens: torch.Tensor, names: list[str]) -> list[torch.Tensor]:
    kept: list[torch.Tensor] = []
    hooks = [(name, lambda x, hook: kept.append(x)) for name in names]
    logits = MODEL.run_with_hooks(tokens, fwd_hooks=hooks)
    return list(torch.autograd.grad(METRIC.per_prompt(logits).sum(), kept))


@pytest.mark.parametrize("order", [[0, 2, 1], [2, 1, 0], [1, 0, 2]])
def test_gradients_may_be_asked_for_in_any_order(order: list[int]) -> None:
    tokens = tiny_tokens()
    with MODEL.trace() as t:
        run = t.prompts(tokens)
        score = run.metric(METRIC).sum()
        gradients = [t.gradient(score, of=run["resid_post", layer]).save() for layer in order]  # type: ignore[union-attr]
    wanted = by_hand(tokens, [f"blocks.{layer}.hook_resid_post" for layer in sorted(order)])
    for layer, gradient in zip(order, gradients, strict=True):
        torch.testing.assert_close(gradient.value, wanted[layer], rtol=0, atol=1e-12)


def test_gradients_of_several_prompts_and_runs_stand_in_one_trace() -> None:
    one, other = tiny_tokens(2, 5), tiny_tokens(1, 7, seed=3)
    with MODEL.trace() as t:
        runs = [t.prompts(one), t.prompts(other)]
        found = [t.gradient(run.metric(METRIC).sum(), of=run["z", 1].at(head=1)).save() for run in runs]  # type: ignore[union-attr]
    assert len(t.estimate().passes) == 1
    for tokens, gradient in zip((one, other), found, strict=True):
        wanted = by_hand(tokens, ["blocks.1.attn.hook_z"])[0][:, :, 1]
        torch.testing.assert_close(gradient.value, wanted, rtol=0, atol=1e-12)


def test_a_gradient_flows_through_a_value_that_went_into_another_run() -> None:
    source_tokens, target_tokens = tiny_tokens(1, 5), tiny_tokens(1, 5, seed=4)
    with MODEL.trace() as t:
        source, target = t.prompts(source_tokens), t.prompts(target_tokens)
        target["resid_post", 0].at(pos=-1).replace(source["resid_post", 1].at(pos=-1))
        found = t.gradient(target.metric(METRIC).sum(), of=source["resid_post", 0]).save()  # type: ignore[union-attr]
    assert len(t.estimate().passes) == 2
    kept: dict[str, torch.Tensor] = {}
    hooks = [(f"blocks.{layer}.hook_resid_post", lambda x, hook: kept.__setitem__(hook.name, x)) for layer in (0, 1)]
    MODEL.run_with_hooks(source_tokens, fwd_hooks=hooks)
    value = kept["blocks.1.hook_resid_post"][:, -1]

    def put(x: torch.Tensor, hook: object) -> torch.Tensor:
        return torch.cat((x[:, :-1], value[:, None]), 1)

    logits = MODEL.run_with_hooks(target_tokens, fwd_hooks=[("blocks.0.hook_resid_post", put)])
    (wanted,) = torch.autograd.grad(METRIC.per_prompt(logits).sum(), kept["blocks.0.hook_resid_post"])
    torch.testing.assert_close(found.value, wanted, rtol=0, atol=1e-12)


def test_a_gradient_is_a_value_that_can_be_used_in_an_edit() -> None:
    tokens = tiny_tokens(1, 5)
    with MODEL.trace() as t:
        run, moved = t.prompts(tokens), t.prompts(tokens)
        score = run.metric(METRIC).sum()
        gradient = t.gradient(score, of=run["resid_post", 1].at(pos=-1))
        assert not isinstance(gradient, list)
        moved["resid_post", 1].at(pos=-1).add(gradient * 1e-6)
        before, after, slope = score.save(), moved.metric(METRIC).sum().save(), gradient.norm().save()
    rise = float(after.value - before.value) / 1e-6
    assert rise == pytest.approx(float(slope.value) ** 2, rel=1e-4)


def test_an_activation_that_a_number_does_not_depend_on_has_gradient_0() -> None:
    with MODEL.trace() as t:
        run = t.prompts(tiny_tokens(1, 5))
        early = run["resid_post", 0].at(pos=-1).tanh().sum()
        # The next block's input is the same tensor, and comes later.
        same_tensor, later = t.gradient(early, of=[run["resid_pre", 1], run["resid_post", 2]])  # type: ignore[misc]
        own = t.gradient(early, of=run["resid_post", 0])
        for value in (same_tensor, later, own):
            value.save()  # type: ignore[union-attr]
    assert same_tensor.value.eq(0).all()
    assert later.value.eq(0).all()
    assert own.value[:, -1].abs().min() > 0  # type: ignore[union-attr]


def test_weights_get_no_gradient_and_saved_values_no_graph() -> None:
    model = tiny_model()
    with model.trace() as t:
        run = t.prompts(tiny_tokens(1, 5))
        score = run.metric(METRIC).sum().save()
        t.gradient(score, of=run["resid_post", 0]).save("gradient")  # type: ignore[union-attr]
    assert not score.value.requires_grad
    assert not t["gradient"].requires_grad
    assert all(weight.grad is None for weight in model.parameters())


def test_a_gradient_at_a_norm_that_runs_on_several_copies_raises() -> None:
    trace = MODEL.trace(run=False)
    run = trace.prompts(tiny_tokens(1, 5))
    run["q_input", 1].at(head=0).add(1.0)
    trace.gradient(run.metric(METRIC).sum(), of=run["normalized", 1, "ln1"]).save()  # type: ignore[union-attr]
    with pytest.raises(TraceError, match="several copies there"):
        trace.run()
