"""Metrics that are functions of one's own: a sweep computes the logits that they read, and the scores are a loop's."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from hooked_lm import HookedTransformer
from hooked_lm.components import Unembed
from hooked_lm.interventions import Intervention
from hooked_lm.sweep import sweep
from hooked_lm.sweep.watched import UnreadError, watched_score
from tests.helpers import tiny_model, tiny_tokens

N = 7


def plain(logits: Tensor) -> Tensor:
    return logits[0, 2, 1] + logits[:, 3].sum()


with warnings.catch_warnings():
    warnings.simplefilter("ignore", DeprecationWarning)  # people's metrics may be scripted all the same
    scripted = torch.jit.script(plain)


class Picked(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: Tensor) -> Tensor:
        return logits[0, 1, 1].clone()


def subtracts_the_mean(logits: Tensor) -> Tensor:
    logits -= logits.mean(-1, keepdim=True)
    return logits[0, -1, 4]


def zeroes_a_position(logits: Tensor) -> Tensor:
    logits[:, 2] = 0.0
    return logits.sum()


def scales_what_it_reads(logits: Tensor) -> Tensor:
    last = logits[:, -1]
    last *= 2.0
    return last[:, 3].sum()


def follows_the_answer(logits: Tensor) -> Tensor:
    return logits[0, int(logits[0, -1].argmax()) % N, 2]


def takes_what_it_can_get(logits: Tensor) -> Tensor:
    try:
        return logits[0, 0 if logits[0, -1, 0] > 0 else 1, 1] + logits[0, -1, 2]
    except UnreadError:
        return logits[0, -1, 2]


def squeezes_in_place(logits: Tensor) -> Tensor:
    first = logits[:1, -1]
    first.squeeze_(0)
    return first[first.shape[0] // 2]


def transposes_in_place(logits: Tensor) -> Tensor:
    logits.transpose_(0, 1)
    return logits[-1, 0, 3] * logits.shape[0]


def replaces_the_data(logits: Tensor) -> Tensor:
    last = logits[:, -1]
    last.data = last.data[:, :5].clone()
    return last.sum() / last.shape[-1]


def asks_for_the_gradient(logits: Tensor) -> Tensor:
    with torch.enable_grad():
        last = logits[:, -1].clone()
        last.requires_grad = True
        last.logsumexp(-1).sum().backward()
    assert last.grad is not None
    return last.grad[0, 3] * last.requires_grad


def gathers_into_a_tensor(logits: Tensor) -> Tensor:
    out = torch.empty(2, 1, 20, dtype=logits.dtype)
    torch.gather(logits, 1, torch.full((2, 1, 20), 3), out=out)
    return out[0, 0, 2]


def reads_unseen(logits: Tensor) -> Tensor:
    whole = torch.from_dlpack(torch.utils.dlpack.to_dlpack(logits))  # type: ignore[attr-defined]
    return torch.nan_to_num(whole)[0, 2, 3] + logits[0, -1, 2]


EVERY = set(range(N))
# A metric, and the positions it reads of [2 7 vocab]; None where that depends on the values.
METRICS: dict[str, tuple[Callable[[Tensor], Any], set[int] | None]] = {
    "the last": (lambda x: x[0, -1, 3] - x[0, -1, 4], {N - 1}),
    "the last of all prompts": (lambda x: x[:, -1, 3].mean(), {N - 1}),
    "one by ellipsis": (lambda x: x[..., 2, :].max(), {2}),
    "several by index": (lambda x: x[torch.arange(2), torch.tensor([1, 3]), torch.tensor([0, 5])].sum(), {1, 3}),
    "several by slice": (lambda x: x[:, -3:, 2].mean(), {N - 3, N - 2, N - 1}),
    "those of a mask": (lambda x: x[torch.tensor([[0, 0, 0, 1, 0, 0, 0], [0] * N]).bool()].sum(), {3}),
    "log probabilities": (lambda x: x.log_softmax(-1)[0, -1, 2], {N - 1}),
    "probabilities, then a position": (lambda x: F.softmax(x, dim=-1)[:, -2, 2].sum(), {N - 2}),
    "softmax over positions": (lambda x: x.softmax(1)[0, -1, 2], EVERY),
    "a gather": (lambda x: x[:, -1].gather(-1, torch.tensor([[1], [2]])).mean(), {N - 1}),
    "double precision": (lambda x: x.double().detach().clone()[1, 0, 0], {0}),
    "transposed": (lambda x: x.transpose(0, 1)[-1].T[3].sum(), {N - 1}),
    "parts": (lambda x: x.split(4, dim=1)[0].unbind(1)[1].sum(), {1}),
    "a Python number": (lambda x: float(x[0, 4, 2]), {4}),
    "an iteration": (lambda x: sum(float(row[-1, 0]) for row in x), {N - 1}),
    "numpy": (lambda x: float(x[0, -1].numpy()[3]), {N - 1}),
    "numpy of all": (lambda x: float(x.numpy()[0, 2, 1]), EVERY),
    "the largest": (lambda x: x.max(), EVERY),
    "a loss": (lambda x: F.cross_entropy(x[:, :-1].flatten(0, 1), torch.zeros(12, dtype=torch.long)), set(range(6))),
    "a comparison of all": (lambda x: (x[..., 1] > 0).double().mean(), EVERY),
    "the rank of a token": (lambda x: (x[0, -1] > x[0, -1, 3]).sum(), {N - 1}),
    "scripted": (scripted, EVERY),
    "scripted and not": (lambda x: scripted(x) + x[0, -1, 2], EVERY),
    "vmap": (lambda x: torch.vmap(lambda row: row[-1, 2])(x).sum(), EVERY),
    "a function of autograd": (Picked.apply, {1}),
    "nothing": (lambda x: 3.0, set()),
    "writes": (subtracts_the_mean, EVERY),
    "writes to a position": (zeroes_a_position, EVERY),
    "writes to what it reads": (scales_what_it_reads, {N - 1}),
    "an array of no axes": (lambda x: x[0, -1, 3].numpy(), {N - 1}),
    "squeezes in place": (squeezes_in_place, None),
    "transposes in place": (transposes_in_place, None),
    "replaces the data": (replaces_the_data, None),
    "asks for the gradient": (asks_for_the_gradient, {N - 1}),
    "gathers into a tensor": (gathers_into_a_tensor, EVERY),
    "another type": (lambda x: x.view(torch.int64)[0, -1, 3] >> 40, {N - 1}),
    "the same type": (lambda x: x.view(torch.float64)[0, -1, 3], EVERY),
    "reads unseen": (reads_unseen, None),
    "is given a subclass": (lambda x: x[0, -1, 3] if type(x) is Tensor else x[0, -1, 4] * 0, None),
    "a view on some branches": (lambda x: x[0, -2, 1] if x[0, -1, 1] > 0 else x.view(-1, 20)[3, 1], None),
    "a parameter on some branches": (lambda x: x[0, -1, 2] if x[0, -1, 1] > 0 else nn.Parameter(x[0, -1])[2], None),
    "branches": (lambda x: x[0, -1, 1] if x[0, -2, 1] > 0 else x[1, 0, 1], None),
    "follows the answer": (follows_the_answer, None),
    # A comparison with NaN is False: only that the position is watched makes this right.
    "compares at the answer's position": (lambda x: (x[0, int(x[0, -1].argmax()) % N, :5] > 0).double().sum(), None),
    "catches errors": (takes_what_it_can_get, None),
}


def cells(seed: int, n: int = 12) -> list[list[Intervention]]:
    """Edits of all kinds of sites and positions, one that changes nothing among them."""
    generator = torch.Generator().manual_seed(seed)
    sites = ["hook_resid_pre", "attn.hook_z", "hook_mlp_out", "hook_resid_post", "attn.hook_pattern", "attn.hook_v"]
    drawn: list[list[Intervention]] = [[], [Intervention("blocks.1.hook_resid_mid", "scale", 1.0, pos=3)]]
    for _ in range(n):
        layer, site, pos = (int(torch.randint(high, (), generator=generator)) for high in (2, len(sites), N))
        value = float(torch.randn((), generator=generator)) * 4
        drawn.append([Intervention(f"blocks.{layer}.{sites[site]}", "add", value, pos=pos)])
    return drawn


def looped(model: HookedTransformer, tokens: Tensor, some: list[list[Intervention]], metric: Any) -> Tensor:
    return torch.tensor([float(metric(model.run(tokens, interventions=cell))) for cell in some], dtype=torch.float64)


@torch.no_grad()
@pytest.mark.parametrize("name", METRICS)
def test_scores_are_those_of_a_loop_and_the_positions_read_are_known(name: str) -> None:
    metric, read = METRICS[name]
    model, tokens = tiny_model(), tiny_tokens(batch=2, pos=N)
    if read is not None:
        assert watched_score(metric, model(tokens)).read == read
    some = cells(0)
    expected = looped(model, tokens, some, metric)
    for budget in (1, 2**30):
        found = sweep(model, tokens, some, metric, memory_budget=budget, verbose=False)
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-9)


@torch.no_grad()
@settings(max_examples=25)
@given(seed=st.integers(0, 2**31), name=st.sampled_from(sorted(METRICS)))
def test_scores_are_those_of_a_loop_for_any_edits(seed: int, name: str) -> None:
    metric, _ = METRICS[name]
    model, tokens, some = tiny_model(), tiny_tokens(batch=2, pos=N, seed=seed % 7), cells(seed, 6)
    expected = looped(model, tokens, some, metric)
    torch.testing.assert_close(sweep(model, tokens, some, metric, verbose=False), expected, rtol=0, atol=1e-9)


@torch.no_grad()
def test_only_the_positions_that_are_read_are_unembedded(monkeypatch: pytest.MonkeyPatch) -> None:
    model, tokens, some = tiny_model(), tiny_tokens(batch=2, pos=N), cells(0, 40)[1:]
    rows = 0
    forward = Unembed.forward

    def counted(self: Unembed, x: Tensor) -> Tensor:
        nonlocal rows
        rows += x.shape[:-1].numel()
        return forward(self, x)

    counted.keeps_stages = True  # type: ignore[attr-defined]
    monkeypatch.setattr(Unembed, "forward", counted)
    sweep(model, tokens, some, METRICS["the last"][0], verbose=False)
    assert rows <= 2 * N + 2 * len(some)  # the base run, and one position of each cell
    rows = 0
    sweep(model, tokens, some, METRICS["the largest"][0], verbose=False)
    assert rows > 2 * N + 2 * 2 * len(some)


@torch.no_grad()
def test_a_metric_that_keeps_its_logits_keeps_whole_ones() -> None:
    model, tokens, some = tiny_model(), tiny_tokens(batch=2, pos=N), cells(0)
    kept: list[Tensor] = []

    def keeps(logits: Tensor) -> Tensor:
        kept.append(logits)
        return logits[0, -1, 2]

    scores = sweep(model, tokens, some, keeps, verbose=False)
    torch.testing.assert_close(scores, looped(model, tokens, some, lambda x: x[0, -1, 2]), rtol=0, atol=1e-9)
    assert all(bool(one.isfinite().all()) for one in kept)


@torch.no_grad()
def test_arrays_that_a_metric_keeps_stay_as_they_are() -> None:
    model, tokens, some = tiny_model(), tiny_tokens(batch=2, pos=N), cells(0)
    kept: list[Any] = []

    def keeps(logits: Tensor) -> float:
        kept.append(logits[0, -1].numpy()[2:])
        return float(kept[-1][0])

    expected = looped(model, tokens, some, lambda x: x[0, -1, 2])
    found = sweep(model, tokens, some, keeps, verbose=False)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-9)
    of_cells = sorted({round(float(one), 9) for one in expected})
    assert sorted({round(float(one[0]), 9) for one in kept}) == of_cells


@torch.no_grad()
def test_an_error_of_the_metric_is_its_own() -> None:
    def fails(logits: Tensor) -> Tensor:
        raise KeyError("no such token")

    with pytest.raises(KeyError, match="no such token"):
        sweep(tiny_model(), tiny_tokens(batch=2, pos=N), cells(0), fails, verbose=False)
    with pytest.raises(IndexError):
        sweep(tiny_model(), tiny_tokens(batch=2, pos=N), cells(0), lambda x: x[0, N, 2], verbose=False)
