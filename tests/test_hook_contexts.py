"""Hooks that come and go: contexts, `run_with_hooks`, permanent hooks, and resetting."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from hooked_lm import HookPoint, UnknownHookError
from tests.hooks_helpers import (
    FIRST,
    SECOND,
    SUBJECTS,
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
        RuntimeError,
        match=r"the hook at 'blocks.1.hook_resid_pre' never ran: the model did not compute that activation",
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
