"""Hooks: adding, running and removing them, on a HookedTransformer and on any other module alike."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from hooked_lm import HookPoint
from tests.helpers import randomise_, tiny_model, tiny_tokens
from tests.hooks_helpers import (
    FIRST,
    SECOND,
    SUBJECTS,
    Network,
    Subject,
    double,
    look,
    shift,
    subject_of,
    zero_in_place,
)


@pytest.fixture(params=SUBJECTS)
def subject(request: pytest.FixtureRequest) -> Subject:
    return subject_of(request.param)


# What a hook is given, and what it gives back


def test_a_hook_is_given_the_activation_and_its_hook_point(subject: Subject) -> None:
    seen: list[tuple[str, int, tuple[int, ...]]] = []

    def note(x: Tensor, hook: HookPoint) -> None:
        seen.append((hook.name, hook.layer(), tuple(x.shape)))

    subject.model.run_with_hooks(subject.tokens, fwd_hooks=[(SECOND, note), (FIRST, note)])
    assert [(name, layer) for name, layer, _ in seen] == [(FIRST, 0), (SECOND, 1)]
    assert all(shape[0] == subject.tokens.shape[0] for *_, shape in seen)


def test_a_hook_point_outside_the_blocks_has_no_layer(subject: Subject) -> None:
    with pytest.raises(ValueError, match="'hook_embed' is in no block"):
        subject.model.hook_dict["hook_embed"].layer()


def test_a_returned_tensor_and_an_edit_in_place_change_the_output_alike(subject: Subject) -> None:
    clean = subject.output()
    returned = subject.model.run_with_hooks(subject.tokens, fwd_hooks=[(SECOND, lambda x, hook: torch.zeros_like(x))])
    in_place = subject.model.run_with_hooks(subject.tokens, fwd_hooks=[(SECOND, zero_in_place)])
    assert not torch.allclose(returned, clean)
    assert torch.equal(returned, in_place)


def test_a_hook_that_returns_none_changes_nothing(subject: Subject) -> None:
    assert torch.equal(subject.model.run_with_hooks(subject.tokens, fwd_hooks=[(SECOND, look)]), subject.output())


def test_hooks_run_in_the_order_they_were_added_each_on_the_last_ones_result(subject: Subject) -> None:
    seen: list[Tensor] = []
    keep = lambda x, hook: seen.append(x.clone())  # noqa: E731
    subject.model.run_with_hooks(
        subject.tokens, fwd_hooks=[(FIRST, keep), (FIRST, shift), (FIRST, double), (FIRST, keep)]
    )
    before, after = seen
    assert torch.equal(after, 2 * (before + torch.arange(before.shape[-1])))


def test_a_prepended_hook_runs_first(subject: Subject) -> None:
    order: list[str] = []
    subject.model.add_hook(FIRST, lambda x, hook: order.append("added"))
    subject.model.add_hook(FIRST, lambda x, hook: order.append("prepended"), prepend=True)
    subject.model.hook_dict[FIRST].add_hook(lambda x, hook: order.append("at the point"), prepend=True)
    subject.output()
    assert order == ["at the point", "prepended", "added"]


@pytest.mark.parametrize(
    ("names", "picked"),
    [
        (FIRST, [FIRST]),
        ("blocks.*.hook_resid_pre", [FIRST, SECOND]),
        ([SECOND, FIRST], [FIRST, SECOND]),
        (["hook_embed", "blocks.1.hook_resid_*re"], ["hook_embed", SECOND]),
        (lambda name: name.endswith("resid_pre"), [FIRST, SECOND]),
    ],
)
def test_names_globs_lists_and_predicates_say_where_hooks_go(subject: Subject, names: Any, picked: list[str]) -> None:
    ran: list[str] = []
    note = lambda x, hook: ran.append(hook.name)  # noqa: E731
    subject.model.run_with_hooks(subject.tokens, fwd_hooks=[(names, note)])
    assert ran == picked
    ran.clear()
    handles = subject.model.add_hook(names, note)
    subject.output()
    assert ran == picked
    assert len(handles) == len(picked)
    for handle in handles:
        handle.remove()
    assert subject.handles() == []


def scaled(factor: float, x: Tensor, hook: HookPoint) -> Tensor:
    return factor * x


def scaled_last(x: Tensor, hook: HookPoint, factor: float) -> Tensor:
    return factor * x


def scaled_between(x: Tensor, factor: float, hook: HookPoint) -> Tensor:
    return factor * x


def scaled_by_name(x: Tensor, *, hook: HookPoint, factor: float) -> Tensor:
    return factor * x


def scaled_point(x: Tensor, point: HookPoint, factor: float = 3.0) -> Tensor:
    return factor * x


def scaled_positionally(x: Tensor, hook: HookPoint, /) -> Tensor:
    return 3.0 * x


def scaled_with_extras(x: Tensor, point: HookPoint, **extras: float) -> Tensor:
    return extras.get("factor", 3.0) * x


class Scaler:
    factor = 3.0

    def __call__(self, x: Tensor, hook: HookPoint) -> Tensor:
        return self.factor * x

    def method(self, x: Tensor, hook: HookPoint) -> Tensor:
        return self.factor * x


@pytest.mark.parametrize(
    "hook",
    [
        partial(scaled, 3.0),
        partial(scaled_last, factor=3.0),
        partial(scaled_between, factor=3.0),
        partial(scaled_by_name, factor=3.0),
        partial(scaled_point, factor=3.0),
        partial(partial(scaled_last), factor=3.0),
        scaled_point,
        scaled_positionally,
        scaled_with_extras,
        lambda x, _: 3.0 * x,
        lambda *both: 3.0 * both[0],
        lambda x, **named: 3.0 * x,
        Scaler(),
        Scaler().method,
    ],
)
def test_a_hook_may_be_any_callable_whatever_its_arguments_are_called(hook: Callable[..., Any]) -> None:
    network, tokens = Network(), tiny_tokens()
    randomise_(network)
    expected = network.run_with_hooks(tokens, fwd_hooks=[(SECOND, lambda x, hook: 3.0 * x)])
    assert torch.equal(network.run_with_hooks(tokens, fwd_hooks=[(SECOND, hook)]), expected)


@pytest.mark.parametrize(
    ("bad", "error", "message"),
    [
        (
            lambda x, hook: x[..., :1],
            ValueError,
            r"the hook at 'blocks.1.hook_resid_pre' returned shape \(2, .*1\), but",
        ),
        (lambda x, hook: x.float(), ValueError, r"the hook at 'blocks.1.hook_resid_pre' returned dtype torch.float32"),
        (lambda x, hook: x.to("meta"), ValueError, r"the hook at 'blocks.1.hook_resid_pre' returned device meta"),
        (lambda x, hook: 3.0, TypeError, r"the hook at 'blocks.1.hook_resid_pre' returned float: return a tensor, or"),
        (lambda x, hook: (x,), TypeError, r"the hook at 'blocks.1.hook_resid_pre' returned tuple"),
        (lambda x, hook: x.numpy(), TypeError, r"the hook at 'blocks.1.hook_resid_pre' returned ndarray"),
    ],
)
def test_a_hook_that_returns_something_else_raises_and_leaves_the_model_usable(
    subject: Subject, bad: Callable[..., Any], error: type[Exception], message: str
) -> None:
    with torch.no_grad():
        clean = subject.output()
        with pytest.raises(error, match=message):
            subject.model.run_with_hooks(subject.tokens, fwd_hooks=[(FIRST, double), (SECOND, bad)])
        assert subject.handles() == []
        assert torch.equal(subject.output(), clean)


def test_a_backward_hook_that_returns_another_shape_raises_and_says_so(subject: Subject) -> None:
    with (
        pytest.raises(ValueError, match=r"the backward hook at 'blocks.1.hook_resid_pre' returned shape"),
        subject.model.hooks(bwd_hooks=[(SECOND, lambda grad, hook: grad[..., :1])]),
    ):
        subject.output().sum().backward()
    assert subject.handles() == []
    subject.output().sum().backward()


def test_what_is_no_function_cannot_be_a_hook(subject: Subject) -> None:
    with pytest.raises(TypeError, match=r"the hook for 'blocks.0.hook_resid_pre' is not callable: 3"):
        subject.model.add_hook(FIRST, 3)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="is not callable"), subject.model.hooks([(SECOND, double), (FIRST, None)]):  # type: ignore[list-item]
        pass
    with pytest.raises(TypeError, match=r"a hook is given as \(name, function\)"):
        subject.model.run_with_hooks(subject.tokens, fwd_hooks=[FIRST])  # type: ignore[list-item]
    assert subject.handles() == []


def test_a_direction_is_forward_or_backward(subject: Subject) -> None:
    with pytest.raises(ValueError, match="'fwd' or 'bwd', not 'up'"):
        subject.model.add_hook(FIRST, double, dir="up")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="direction 'up' is none of"):
        subject.model.reset_hooks(direction="up")  # type: ignore[arg-type]


# Backward hooks


def gradient_of_first_weight(subject: Subject, *hooks: tuple[Any, Callable[..., Any]]) -> Tensor:
    subject.model.zero_grad()
    with subject.model.hooks(bwd_hooks=hooks):
        (subject.output() ** 2).sum().backward()
    assert subject.first_weight.grad is not None
    return subject.first_weight.grad.clone()


def halve_in_place(grad: Tensor, hook: HookPoint) -> None:
    grad.mul_(0.5)


@pytest.mark.parametrize(
    ("hook", "factor"),
    [
        (lambda grad, hook: 3 * grad, 3.0),
        (lambda grad, hook: (3 * grad,), 3.0),
        (halve_in_place, 0.5),
        (lambda grad, hook: None, 1.0),
        (lambda grad, hook: torch.zeros_like(grad), 0.0),
    ],
)
def test_what_a_backward_hook_gives_back_replaces_the_gradient(
    subject: Subject, hook: Callable[..., Any], factor: float
) -> None:
    clean = gradient_of_first_weight(subject)
    assert clean.abs().max() > 0
    torch.testing.assert_close(gradient_of_first_weight(subject, (FIRST, hook)), factor * clean, rtol=1e-12, atol=0)


def test_backward_hooks_run_in_order_each_on_the_last_ones_result(subject: Subject) -> None:
    seen: list[Tensor] = []
    keep = lambda grad, hook: seen.append(grad.clone())  # noqa: E731
    clean = gradient_of_first_weight(subject)
    twice = gradient_of_first_weight(
        subject, (FIRST, keep), (FIRST, double), (FIRST, keep), (FIRST, halve_in_place), (FIRST, keep)
    )
    torch.testing.assert_close(twice, clean, rtol=1e-12, atol=0)
    assert torch.equal(seen[1], 2 * seen[0])
    assert torch.equal(seen[2], seen[0])


def test_a_backward_hook_sees_the_gradient_of_the_edited_activation(subject: Subject) -> None:
    seen: dict[str, Tensor] = {}
    with subject.model.hooks(
        fwd_hooks=[(SECOND, double)], bwd_hooks=[(SECOND, lambda grad, hook: seen.update({hook.name: grad.clone()}))]
    ):
        _, cache = subject.model.run_with_cache(subject.tokens, names_filter=SECOND)
        output = subject.output()
    assert seen == {}
    (output**2).sum().backward()
    edited = cache[SECOND].detach().requires_grad_()
    with subject.model.hooks(fwd_hooks=[(SECOND, lambda x, hook: edited)]):
        (expected,) = torch.autograd.grad((subject.output() ** 2).sum(), edited)
    torch.testing.assert_close(seen[SECOND], expected, rtol=1e-10, atol=1e-12)


def test_a_backward_hook_acts_on_what_was_computed_inside_its_context_only(subject: Subject) -> None:
    calls: list[str] = []
    note = lambda grad, hook: calls.append(hook.name)  # noqa: E731
    outside = subject.output().sum()
    with subject.model.hooks(bwd_hooks=[(SECOND, note)]):
        inside = subject.output().sum()
        outside.backward()
        assert calls == []
    inside.backward()
    assert calls == [SECOND]


def test_permanent_backward_hooks_act_on_every_pass(subject: Subject) -> None:
    clean = gradient_of_first_weight(subject)
    subject.model.add_perma_hook(SECOND, lambda grad, hook: 3 * grad, dir="bwd")
    subject.model.reset_hooks()
    torch.testing.assert_close(gradient_of_first_weight(subject), 3 * clean, rtol=1e-12, atol=0)


def test_a_backward_hook_where_no_gradient_flows_raises(subject: Subject) -> None:
    with (
        torch.no_grad(),
        pytest.raises(RuntimeError, match=r"the backward hook at 'blocks.0.hook_resid_pre' can never"),
    ):
        subject.model.run_with_hooks(subject.tokens, bwd_hooks=[(FIRST, look)])
    assert subject.handles() == []


def test_no_backward_hook_goes_on_integers() -> None:
    model = tiny_model()
    with pytest.raises(ValueError, match="no backward hook can run at 'hook_tokens': its activation holds integers"):
        model.add_hook("hook_tokens", look, dir="bwd")
    # A pattern means the sites where one can run.
    handles = model.add_hook("hook_*", look, dir="bwd")
    assert sorted(handle.point.name for handle in handles) == ["hook_embed", "hook_pos_embed"]
