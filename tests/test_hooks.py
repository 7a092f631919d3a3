"""Hooks: adding, running and removing them, on a HookedTransformer and on any other module alike."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from hooked_lm import HookedRootModule, HookedTransformer, HookPoint, Intervention, UnknownHookError
from tests.helpers import randomise_, tiny_model, tiny_tokens

FIRST, SECOND = "blocks.0.hook_resid_pre", "blocks.1.hook_resid_pre"


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.hook_resid_pre = HookPoint("batch d_model")
        self.linear = nn.Linear(4, 4, dtype=torch.float64)

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(self.linear(self.hook_resid_pre(x)))


class Network(HookedRootModule):
    """A module that is no transformer, with hook points of the same names as those of one."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(20, 4, dtype=torch.float64)
        self.hook_embed = HookPoint()
        self.blocks = nn.ModuleList([Layer(), Layer()])
        self.setup()

    def forward(self, tokens: Tensor, stop_at_layer: int | None = None) -> Tensor:
        x = self.hook_embed(self.embed(tokens[:, 0]))
        for block in self.blocks[:stop_at_layer]:
            x = block(x)
        return x


@dataclass
class Subject:
    """A model, its input, and a weight that everything before `FIRST` hangs on."""

    model: HookedRootModule
    tokens: Tensor
    first_weight: nn.Parameter

    def output(self) -> Tensor:
        return self.model(self.tokens)

    def handles(self) -> list[Callable[..., Any]]:
        return [handle.hook for point in self.model.hook_points() for handle in (*point.fwd_hooks, *point.bwd_hooks)]


@pytest.fixture(params=["transformer", "any module"])
def subject(request: pytest.FixtureRequest) -> Subject:
    if request.param == "transformer":
        transformer = tiny_model()
        return Subject(transformer, tiny_tokens(), transformer.embed.W_E)
    network = Network()
    randomise_(network)
    return Subject(network, tiny_tokens(), network.embed.weight)


def double(x: Tensor, hook: HookPoint) -> Tensor:
    return 2 * x


def shift(x: Tensor, hook: HookPoint) -> Tensor:
    return x + torch.arange(x.shape[-1], dtype=x.dtype)


def look(x: Tensor, hook: HookPoint) -> None:
    return None


def zero_in_place(x: Tensor, hook: HookPoint) -> None:
    x.zero_()


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


# Contexts


def test_hooks_of_a_context_act_inside_it_only(subject: Subject) -> None:
    clean = subject.output()
    with subject.model.hooks(fwd_hooks=[(SECOND, zero_in_place)]) as inside:
        assert inside is subject.model
        assert not torch.allclose(subject.output(), clean)
    assert torch.equal(subject.output(), clean)
    assert subject.handles() == []


def test_an_inner_context_removes_its_own_hooks_and_no_others(subject: Subject) -> None:
    note = lambda x, hook: None  # noqa: E731
    subject.model.add_hook(FIRST, look)
    subject.model.add_perma_hook(FIRST, shift)
    with subject.model.hooks(fwd_hooks=[(FIRST, double)]):
        with subject.model.hooks(fwd_hooks=[(FIRST, double), (SECOND, note)]):
            subject.model.add_hook(SECOND, zero_in_place)
            assert subject.handles() == [look, shift, double, double, note, zero_in_place]
        assert subject.handles() == [look, shift, double, zero_in_place]
    assert subject.handles() == [look, shift, zero_in_place]


def test_hooks_know_how_deep_the_context_was_that_added_them(subject: Subject) -> None:
    point = subject.model.hook_dict[FIRST]
    subject.model.add_hook(FIRST, look)
    with subject.model.hooks([(FIRST, shift)]), subject.model.hooks([(FIRST, double)]):
        assert [handle.context_level for handle in point.fwd_hooks] == [None, 1, 2]
        assert [handle.hook for handle in point.fwd_hooks] == [look, shift, double]
        assert point.has_hooks(level=2)
        assert not point.has_hooks(level=3)
        subject.model.reset_hooks(level=2)
        assert subject.handles() == [look, shift]
    assert subject.handles() == [look]
    assert subject.model.context_level == 0


class Stop(BaseException):
    """No Exception, like KeyboardInterrupt."""


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt, SystemExit, Stop])
def test_hooks_of_a_context_go_away_whatever_happens_in_it(subject: Subject, error: type[BaseException]) -> None:
    def fail(x: Tensor, hook: HookPoint) -> None:
        raise error("stopped")

    subject.model.add_hook(FIRST, look)
    subject.model.add_perma_hook(SECOND, shift)
    with (
        pytest.raises(error, match="stopped"),
        subject.model.hooks(fwd_hooks=[(FIRST, double)], bwd_hooks=[(FIRST, double)]),
        subject.model.hooks(fwd_hooks=[(SECOND, fail)]),
    ):
        subject.output()
    assert subject.handles() == [look, shift]
    with pytest.raises(error, match="stopped"):
        subject.model.run_with_hooks(subject.tokens, fwd_hooks=[(FIRST, double), (SECOND, fail)])
    assert subject.handles() == [look, shift]
    subject.model.hook_dict[SECOND].add_hook(fail)
    with pytest.raises(error, match="stopped"):
        subject.model.run_with_cache(subject.tokens)
    assert subject.handles() == [look, shift, fail]
    assert subject.model.context_level == 0


def test_a_context_with_one_bad_name_adds_nothing(subject: Subject) -> None:
    with (
        pytest.raises(UnknownHookError, match=r"no hook 'blocks.0.nothing'"),
        subject.model.hooks(fwd_hooks=[(FIRST, double)], bwd_hooks=[("blocks.0.nothing", double)]),
    ):
        raise AssertionError("the block must not be entered")
    assert subject.handles() == []


def test_a_hook_may_remove_hooks_while_it_runs(subject: Subject) -> None:
    ran: list[str] = []

    def once(x: Tensor, hook: HookPoint) -> None:
        ran.append("once")
        handle.remove()

    (handle,) = subject.model.add_hook(FIRST, once)
    subject.model.add_hook(FIRST, lambda x, hook: ran.append("after"))
    subject.output()
    subject.output()
    assert ran == ["once", "after", "after"]


def test_a_context_whose_hooks_were_reset_inside_it_ends_quietly(subject: Subject) -> None:
    with subject.model.hooks([(FIRST, double)]):
        subject.model.reset_hooks()
        subject.model.add_hook(FIRST, double)
    assert subject.handles() == [double]


# run_with_hooks


def test_hooks_may_be_left_in_place_after_the_run(subject: Subject) -> None:
    clean = subject.output()
    hooked = subject.model.run_with_hooks(subject.tokens, fwd_hooks=[(SECOND, double)], reset_hooks_end=False)
    assert subject.handles() == [double]
    assert torch.equal(subject.output(), hooked)
    assert not torch.allclose(hooked, clean)
    subject.model.reset_hooks()
    assert subject.handles() == []
    assert torch.equal(subject.output(), clean)


def test_a_run_leaves_the_hooks_that_were_there(subject: Subject) -> None:
    subject.model.add_hook(FIRST, look)
    subject.model.run_with_hooks(subject.tokens, fwd_hooks=[(FIRST, double)], bwd_hooks=[(SECOND, look)])
    assert subject.handles() == [look]


def count_calls(x: Tensor, hook: HookPoint) -> None:
    hook.ctx["calls"] = hook.ctx.get("calls", 0) + 1


def test_a_hook_points_context_outlives_the_run_unless_it_is_cleared(subject: Subject) -> None:
    point = subject.model.hook_dict[FIRST]
    for _ in range(2):
        subject.model.run_with_hooks(subject.tokens, fwd_hooks=[(FIRST, count_calls)])
    assert point.ctx == {"calls": 2}
    assert subject.model.hook_dict[SECOND].ctx == {}
    subject.model.run_with_hooks(subject.tokens, fwd_hooks=[(FIRST, count_calls)], clear_contexts=True)
    assert point.ctx == {}
    with subject.model.hooks([(FIRST, count_calls)], clear_contexts=True):
        subject.output()
        assert point.ctx == {"calls": 1}
    assert point.ctx == {}
    subject.model.run_with_hooks(subject.tokens, fwd_hooks=[(FIRST, count_calls)])
    point.clear_context()
    assert point.ctx == {}


def test_reset_clears_contexts_by_default_and_leaves_them_if_asked(subject: Subject) -> None:
    point = subject.model.hook_dict[FIRST]
    point.ctx["kept"] = 1
    subject.model.add_hook(FIRST, look)
    subject.model.reset_hooks(clear_contexts=False)
    assert (point.ctx, subject.handles()) == ({"kept": 1}, [])
    subject.model.add_hook(FIRST, look)
    subject.model.remove_all_hook_fns()
    assert (point.ctx, subject.handles()) == ({"kept": 1}, [])
    subject.model.reset_hooks()
    assert point.ctx == {}


def test_a_hook_that_never_ran_raises_after_the_run(subject: Subject) -> None:
    with pytest.raises(
        RuntimeError, match=r"the hook at 'blocks.1.hook_resid_pre' was asked for but the model did not"
    ):
        subject.model.run_with_hooks(subject.tokens, stop_at_layer=1, fwd_hooks=[(FIRST, look), (SECOND, look)])
    with pytest.raises(RuntimeError, match=r"'blocks.1.hook_resid_pre'"):
        subject.model.run_with_hooks(subject.tokens, stop_at_layer=1, fwd_hooks=[([FIRST, SECOND], look)])
    with pytest.raises(RuntimeError, match=r"'blocks.1.hook_resid_pre'"):
        subject.model.run_with_hooks(subject.tokens, stop_at_layer=1, fwd_hooks=[("blocks.1.*", look)])
    with pytest.raises(RuntimeError, match=r"'blocks.1.hook_resid_pre'"):
        subject.model.run_with_cache(subject.tokens, stop_at_layer=1, names_filter=[FIRST, SECOND])
    assert subject.handles() == []


def test_a_pattern_may_reach_beyond_the_layers_that_run(subject: Subject) -> None:
    ran: list[str] = []
    subject.model.run_with_hooks(
        subject.tokens, stop_at_layer=1, fwd_hooks=[("blocks.*.hook_resid_pre", lambda x, hook: ran.append(hook.name))]
    )
    assert ran == [FIRST]
    _, cache = subject.model.run_with_cache(subject.tokens, stop_at_layer=1, names_filter="blocks.*.hook_resid_pre")
    assert list(cache) == [FIRST]


# Permanent hooks, and resetting


def test_permanent_hooks_survive_a_reset_unless_it_includes_them(subject: Subject) -> None:
    subject.model.add_perma_hook(FIRST, shift)
    subject.model.add_hook(SECOND, shift, is_permanent=True)
    subject.model.hook_dict["hook_embed"].add_perma_hook(shift)
    subject.model.add_hook(FIRST, double)
    subject.model.reset_hooks()
    assert subject.handles() == [shift] * 3
    assert all(point.fwd_hooks[0].is_permanent for point in subject.model.hook_points() if point.fwd_hooks)
    subject.model.reset_hooks(including_permanent=True)
    assert subject.handles() == []


def test_a_reset_may_spare_one_direction(subject: Subject) -> None:
    for direction, left in (("fwd", [double]), ("bwd", [shift]), ("both", [])):
        subject.model.add_hook(FIRST, shift)
        subject.model.add_hook(FIRST, double, dir="bwd")
        subject.model.reset_hooks(direction=direction)  # type: ignore[arg-type]
        assert subject.handles() == left
        subject.model.reset_hooks()


def test_a_hook_point_adds_and_removes_its_own_hooks() -> None:
    point = HookPoint()
    point.add_hook(shift)
    point.add_hook(look, dir="bwd", level=4)
    point.add_perma_hook(double)
    assert [handle.hook for handle in point.fwd_hooks] == [shift, double]
    assert [handle.hook for handle in point.bwd_hooks] == [look]
    assert [handle.is_permanent for handle in point.fwd_hooks] == [False, True]
    assert point.has_hooks()
    assert point.has_hooks("bwd", level=4)
    assert not point.has_hooks("fwd", level=4)
    point.remove_hooks("both", level=4)
    assert point.bwd_hooks == []
    point.remove_hooks()
    assert [handle.hook for handle in point.fwd_hooks] == [double]
    assert not point.has_hooks(including_permanent=False)
    assert torch.equal(point(torch.ones(3)), 2 * torch.ones(3))
    point.remove_hooks("fwd", including_permanent=True)
    assert not point.has_hooks()
    assert torch.equal(point(torch.ones(3)), torch.ones(3))


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


# The registry


def test_setup_names_every_hook_point_after_its_place() -> None:
    network = Network()
    assert list(network.hook_dict) == ["hook_embed", FIRST, SECOND]
    assert network.hook_dict[SECOND] is network.blocks[1].hook_resid_pre
    assert [point.name for point in network.hook_points()] == list(network.hook_dict)
    assert network.list_hooks() == list(network.hook_dict)
    assert network.mod_dict["blocks.1.linear"] is network.blocks[1].linear
    network.extra = HookPoint()
    network.setup()
    assert network.extra.name == "extra"
    assert "extra" in network.hook_dict
    assert not any("hook" in name for name in network.state_dict())


def test_hooks_leave_the_state_dict_alone(subject: Subject) -> None:
    before = list(subject.model.state_dict())
    subject.model.add_hook(FIRST, look)
    assert list(subject.model.state_dict()) == before


@pytest.mark.parametrize(
    "setter",
    [
        "set_use_attn_result",
        "set_use_split_qkv_input",
        "set_use_attn_in",
        "set_use_hook_mlp_in",
        "set_ungroup_grouped_query_attention",
    ],
)
def test_the_classic_gates_change_nothing(setter: str) -> None:
    model: HookedTransformer = tiny_model(n_key_value_heads=1)
    tokens, names = tiny_tokens(), list(model.hook_dict)
    clean, clean_cache = model.run_with_cache(tokens)
    for value in (True, False):
        assert getattr(model, setter)(value) is None
        logits, cache = model.run_with_cache(tokens)
        assert torch.equal(logits, clean)
        assert [(name, tensor.shape) for name, tensor in cache.items()] == [
            (name, tensor.shape) for name, tensor in clean_cache.items()
        ]
        assert list(model.hook_dict) == names


def test_torchs_own_hooks_run_at_a_hook_point_beside_ours() -> None:
    model, ran = tiny_model(), []
    point = model.hook_dict["blocks.0.hook_resid_mid"]
    plain = model(tiny_tokens())
    handles = [
        point.register_forward_pre_hook(lambda module, args: ran.append("before")),
        point.register_forward_hook(lambda module, args, out: (ran.append("after"), 2 * out)[1]),
        point.register_full_backward_hook(lambda module, grad_in, grad_out: ran.append("gradient")),
    ]
    point.add_hook(lambda x, hook: ran.append("ours"))
    edited = model(tiny_tokens())
    edited.sum().backward()
    assert ran == ["before", "ours", "after", "gradient"]
    model.reset_hooks()
    doubled = model.run_with_hooks(
        tiny_tokens(), fwd_hooks=[("blocks.0.hook_resid_mid", lambda x, hook: x)], bwd_hooks=[]
    )
    torch.testing.assert_close(edited, doubled)
    assert not torch.allclose(edited, plain)
    for handle in handles:
        handle.remove()
    torch.testing.assert_close(model(tiny_tokens()), plain)


def test_hooks_on_one_point_share_one_tensor_with_which_the_run_goes_on() -> None:
    model, kept = tiny_model(), []
    tokens = tiny_tokens()

    def keep(x: Tensor, hook: HookPoint) -> None:
        kept.append(x)

    def halve(x: Tensor, hook: HookPoint) -> None:
        x *= 0.5

    name = "blocks.0.hook_resid_post"
    logits = model.run_with_hooks(tokens, fwd_hooks=[(name, keep), (name, halve), (name, keep)])
    assert kept[0] is kept[1]
    halved = model.run_with_hooks(tokens, fwd_hooks=[(name, lambda x, hook: 0.5 * x)])
    torch.testing.assert_close(logits, halved, rtol=0, atol=1e-12)
    # What the first hook kept is what the gradient flows through.
    gradient = torch.autograd.grad(logits[0, -1, 3], kept[0])[0]
    onto = kept[0].detach().requires_grad_()
    expected = torch.autograd.grad(model(onto, start_at_layer=1)[0, -1, 3], onto)[0]
    torch.testing.assert_close(gradient, expected, rtol=0, atol=1e-12)


def test_a_stream_kept_in_one_hook_is_differentiated_from_another() -> None:
    """As replacement models do: what the MLP writes passes for a function of what it read, with the error frozen."""
    model, kept = tiny_model(), {}

    def keep(x: Tensor, hook: HookPoint) -> None:
        kept["in"] = x

    def skip(x: Tensor, hook: HookPoint) -> Tensor:
        linear = kept["in"] * 3.0
        return linear + (x - linear).detach()

    name = "blocks.0.hook_resid_mid"
    hooks = [(name, lambda x, hook: None), (name, keep), ("blocks.0.hook_mlp_out", skip)]
    logits = model.run_with_hooks(tiny_tokens(), fwd_hooks=hooks)
    torch.testing.assert_close(logits, model(tiny_tokens()), rtol=0, atol=1e-12)
    came = torch.autograd.grad(logits[0, -1, 3], kept["in"], retain_graph=True)[0]
    onto = kept["in"].detach().requires_grad_()
    after = onto + 3.0 * onto + (model.blocks[0].mlp_output(kept["in"]) - 3.0 * kept["in"]).detach()
    expected = torch.autograd.grad(model(after, start_at_layer=1)[0, -1, 3], onto)[0]
    torch.testing.assert_close(came, expected, rtol=0, atol=1e-12)


def test_a_hook_that_returns_somebody_elses_tensor_does_not_expose_it_to_the_next() -> None:
    model, tokens = tiny_model(), tiny_tokens()
    with torch.no_grad():
        _, cache = model.run_with_cache(tiny_tokens(seed=5))
        name = "blocks.0.hook_resid_post"
        before = cache[name].clone()

        def wipe(x: Tensor, hook: HookPoint) -> None:
            x.zero_()

        model.run_with_hooks(tokens, fwd_hooks=[(name, lambda x, hook: cache[name]), (name, wipe)])
        assert torch.equal(cache[name], before)
        model.run_with_hooks(tokens, fwd_hooks=[(name, lambda x, hook: cache[name]), ("blocks.1.hook_resid_pre", wipe)])
        assert torch.equal(cache[name], before)


def test_a_hook_may_change_how_many_prompts_there_are_and_no_other_axis() -> None:
    model, tokens = tiny_model(), tiny_tokens(2, 5)
    name = "blocks.0.hook_resid_pre"
    logits = model.run_with_hooks(tokens, fwd_hooks=[(name, lambda x, hook: torch.cat((x, x[:1])))])
    torch.testing.assert_close(logits, model(tokens[[0, 1, 0]]), rtol=0, atol=1e-12)
    with pytest.raises(ValueError, match=r"returned shape \(2, 4, 12\), but the activation has shape \(2, 5, 12\)"):
        model.run_with_hooks(tokens, fwd_hooks=[(name, lambda x, hook: x[:, 1:])])


def test_the_gradient_passes_a_later_point_first_though_both_are_shown_one_tensor() -> None:
    model, seen = tiny_model(), {}
    hooks = [
        ("blocks.0.hook_resid_post", lambda grad, hook: seen.update(before=grad.clone())),
        ("blocks.1.hook_resid_pre", lambda grad, hook: 3 * grad),
        ("blocks.1.hook_resid_pre", lambda grad, hook: seen.update(after=grad.clone())),
    ]
    with model.hooks(bwd_hooks=hooks):
        model(tiny_tokens(), return_type="loss").backward()
    assert torch.equal(seen["before"], seen["after"])


class Doubled(torch.nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * x


@pytest.mark.parametrize("name", [name for name, point in tiny_model().hook_dict.items() if point.differentiable])
def test_a_module_in_any_hook_points_place_is_run_as_a_hook_would_be(name: str) -> None:
    model, tokens = tiny_model(), tiny_tokens()
    expected = model.run_with_hooks(tokens, fwd_hooks=[(name, lambda x, hook: 2 * x)])
    parent, _, attribute = name.rpartition(".")
    setattr(model.get_submodule(parent), attribute, Doubled())
    torch.testing.assert_close(model(tokens), expected, rtol=0, atol=1e-12)
    model.setup()
    assert name not in model.hook_dict
    torch.testing.assert_close(model(tokens), expected, rtol=0, atol=1e-12)


def test_an_intervention_selects_features_of_an_axis_of_ones_own() -> None:
    class Spliced(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.W = torch.nn.Parameter(torch.randn(12, 20, dtype=torch.float64))
            self.hook_features = HookPoint("batch pos d_sae")

        def forward(self, x: Tensor) -> Tensor:
            return self.hook_features((x @ self.W).relu()) @ self.W.T

    model, tokens = tiny_model(), tiny_tokens()
    model.blocks[0].hook_mlp_out = Spliced()
    model.setup()
    site = "blocks.0.hook_mlp_out.hook_features"
    edit = Intervention(site, "zero", feature=(3, 19), pos=-1)

    def zero(x: Tensor, hook: HookPoint) -> None:
        x[:, -1, [3, 19]] = 0

    came = model.run(tokens, interventions=[edit])
    torch.testing.assert_close(came, model.run_with_hooks(tokens, fwd_hooks=[(site, zero)]), rtol=0, atol=1e-12)
    assert not torch.equal(came, model(tokens))
    with pytest.raises(ValueError, match="there is no feature 20"):
        model.run(tokens, interventions=[Intervention(site, "zero", feature=20)])


def test_a_copy_of_a_model_has_hook_points_of_its_own() -> None:
    model = tiny_model()
    twin = copy.deepcopy(model)
    called = []
    twin.add_hook("blocks.0.hook_resid_pre", lambda x, hook: called.append(hook))
    model(tiny_tokens())
    assert called == []
    twin(tiny_tokens())
    assert called == [twin.blocks[0].hook_resid_pre] == [twin.hook_dict["blocks.0.hook_resid_pre"]]
    model.blocks[0].hook_resid_pre = HookPoint("batch pos d_model")
    assert model.blocks[0].hook_resid_pre is not model.hook_dict["blocks.0.hook_resid_pre"]
