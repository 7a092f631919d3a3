"""One model in several threads, each with hooks of its own; and a run inside a hook."""

from __future__ import annotations

import copy
import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
import torch.utils.checkpoint
from torch import Tensor

from hooked_lm import HookedTransformer, HookPoint, Intervention
from hooked_lm.hooks import current_pass
from tests.helpers import tiny_model, tiny_tokens

N_THREADS, N_RUNS = 4, 200


def job(model: HookedTransformer, number: int) -> tuple[Tensor, ...]:
    """One of five kinds of run, each with numbers of its own."""
    tokens, factor = tiny_tokens(2, 6, seed=number), 1 + number / 50
    site = f"blocks.{number % 2}.hook_resid_pre"

    def scale(x: Tensor, hook: HookPoint) -> Tensor:
        return x * factor

    kind = number % 5
    if kind == 0:
        return (model.run_with_hooks(tokens, fwd_hooks=[(site, scale)]),)
    if kind == 1:
        with model.hooks(fwd_hooks=[(site, scale)]):
            logits, cache = model.run_with_cache(tokens, names_filter=[site, "*hook_pattern"])
        return (logits, *cache.values())
    if kind == 2:
        return (model.run(tokens, interventions=[Intervention(site, "scale", factor, pos=-1)]),)
    if kind == 3:
        with model.intervening([Intervention(site, "add", factor, pos=(0, 7))]):
            return (model.generate(tokens, max_new_tokens=3, do_sample=False, verbose=False, stop_at_eos=False),)
    _, lazy = model.run_with_cache(tokens, lazy=True)
    return lazy["pattern", 1], lazy["unembed.hook_out"], model(tokens)


@torch.no_grad()
def test_two_hundred_runs_in_four_threads_are_what_each_is_alone() -> None:
    model = tiny_model()
    alone = [job(model, number) for number in range(N_RUNS)]
    with ThreadPoolExecutor(N_THREADS) as pool:
        together = list(pool.map(lambda number: job(model, number), range(N_RUNS)))
    for number, (came, expected) in enumerate(zip(together, alone, strict=True)):
        for one, other in zip(came, expected, strict=True):
            assert torch.equal(one, other), number
    assert not any(point.fwd_hooks or point.bwd_hooks for point in model.hook_points())


def test_hooks_of_add_hook_act_in_every_thread_and_those_of_a_block_in_its_own() -> None:
    model, seen = tiny_model(), []
    model.add_hook("hook_embed", lambda x, hook: seen.append(("added", threading.current_thread().name)))
    with model.hooks(fwd_hooks=[("hook_embed", lambda x, hook: seen.append(("block", "")))]):
        thread = threading.Thread(target=lambda: model(tiny_tokens()), name="other")
        thread.start()
        thread.join()
    assert seen == [("added", "other")]


def test_resetting_hooks_leaves_those_of_another_threads_block() -> None:
    model, seen = tiny_model(), []
    inside, done = threading.Event(), threading.Event()

    def run() -> None:
        with model.hooks(fwd_hooks=[("hook_embed", lambda x, hook: seen.append(1))]):
            inside.set()
            done.wait(10)
            model(tiny_tokens())

    thread = threading.Thread(target=run)
    thread.start()
    inside.wait(10)
    model.reset_hooks(including_permanent=True)
    done.set()
    thread.join()
    assert seen == [1]
    assert model.context_level == 0


def test_adding_and_removing_hooks_in_threads_loses_none() -> None:
    model = tiny_model()
    point = model.hook_dict["hook_embed"]

    def churn(number: int) -> None:
        for _ in range(200):
            handle = point.add_hook(lambda x, hook: None)
            point.has_hooks()
            handle.remove()

    with ThreadPoolExecutor(N_THREADS) as pool:
        list(pool.map(churn, range(N_THREADS)))
    assert point.fwd_hooks == []


# State of a pass


def test_a_cached_run_leaves_no_positions_behind() -> None:
    model, tokens = tiny_model(), tiny_tokens(1, 6)
    cache = model.new_kv_cache(1)
    model(tokens, past_kv_cache=cache)
    model(tokens[:, :2], past_kv_cache=cache)
    resid = torch.randn(1, 4, 12, dtype=torch.float64)
    edit = Intervention("blocks.0.hook_resid_pre", "zero", pos=1)
    with model.intervening([edit]):
        edited = model.blocks[0](resid)
    expected = resid.clone()
    expected[:, 1] = 0
    assert torch.equal(edited, model.blocks[0](expected))
    assert not torch.equal(edited, model.blocks[0](resid))


@torch.no_grad()
def test_a_run_inside_a_hook_does_not_move_the_positions_of_the_one_outside() -> None:
    model, tokens = tiny_model(), tiny_tokens(1, 6)
    cache = model.new_kv_cache(1)
    model(tokens[:, :4], past_kv_cache=cache)
    edits = [Intervention("blocks.1.hook_resid_pre", "zero", pos=5)]
    plain_cache = copy.deepcopy(cache)
    expected = model.run(tokens[:, 4:], interventions=edits, past_kv_cache=plain_cache)

    def run_inside(x: Tensor, hook: HookPoint) -> None:
        assert current_pass().n_past == 4
        with torch.no_grad():
            model(tokens)
        assert current_pass().n_past == 4

    with model.hooks(fwd_hooks=[("blocks.0.hook_mlp_out", run_inside)]):
        came = None
        point = model.hook_dict["blocks.0.hook_mlp_out"]
        assert point.live
        # The run inside runs under the hook too, so it must not go on for ever.
        point.fwd_hooks[-1].hook = once(run_inside)
        came = model.run(tokens[:, 4:], interventions=edits, past_kv_cache=cache)
    torch.testing.assert_close(came, expected, rtol=0, atol=1e-12)
    assert current_pass().n_past == 0


def once(function: Any) -> Any:
    called = []

    def first(x: Tensor, hook: HookPoint) -> None:
        if not called:
            called.append(1)
            function(x, hook)

    return first


def test_a_failed_run_leaves_no_pass_behind() -> None:
    model = tiny_model()
    cache = model.new_kv_cache(1)
    model(tiny_tokens(1, 3), past_kv_cache=cache)

    def fail(x: Tensor, hook: HookPoint) -> None:
        raise KeyError("stop")

    with pytest.raises(KeyError, match="stop"):
        model.run_with_hooks(tiny_tokens(1, 2), fwd_hooks=[("blocks.1.hook_mlp_out", fail)], past_kv_cache=cache)
    assert current_pass().n_past == 0


def test_a_copy_of_a_model_within_a_block_has_hooks_that_act() -> None:
    model, seen = tiny_model(), []
    with model.hooks(fwd_hooks=[("hook_embed", lambda x, hook: seen.append(1))]):
        copy.deepcopy(model)(tiny_tokens())
    assert seen == [1]


def test_a_block_run_by_hand_after_a_cache_counts_positions_from_the_texts_start() -> None:
    model, tokens = tiny_model(), tiny_tokens(1, 7)
    with torch.no_grad():
        cache = model.new_kv_cache(1)
        model(tokens[:, :5], past_kv_cache=cache)
        cache.rewind(5)
        resid = torch.randn(1, 2, 12, dtype=torch.float64)
        expected = resid.clone()
        expected[:, 1] = 0
        cache.freeze()
        plain = model.blocks[0](expected, past=cache[0])
        with model.intervening([Intervention("blocks.0.hook_resid_pre", "zero", pos=6)]):
            assert torch.equal(model.blocks[0](resid, past=cache[0]), plain)
        with model.intervening([Intervention("blocks.0.hook_resid_pre", "zero", pos=1)]):
            assert torch.equal(model.blocks[0](resid, past=cache[0]), model.blocks[0](resid, past=cache[0]))


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("use_reentrant", [False, True])
@pytest.mark.parametrize("site", ["attn.hook_z", "attn.hook_pattern", "ln1.hook_scale", "hook_q_input"])
def test_a_run_that_another_thread_recomputes_without_its_hooks_raises(site: str, use_reentrant: bool) -> None:
    model, raised = tiny_model(), []
    resid = torch.randn(2, 5, 12, dtype=torch.float64, requires_grad=True)

    def backward() -> None:
        try:
            out.sum().backward()
        except RuntimeError as error:
            raised.append(str(error))

    with model.hooks(fwd_hooks=[(f"blocks.0.{site}", lambda x, hook: 2 * x)]):
        out = torch.utils.checkpoint.checkpoint(model.blocks[0], resid, use_reentrant=use_reentrant)
        thread = threading.Thread(target=backward)
        thread.start()
        thread.join()
    assert len(raised) == 1
    assert "belongs to a `with` block of another thread" in raised[0]
