"""Sweeps by workers: the numbers of one process to the bit, whichever workers are lost on the way."""

from __future__ import annotations

import copy
import threading
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from hooked_lm import HookedTransformer, Intervention, metrics
from hooked_lm.patching import patch_pairs
from hooked_lm.sweep import sweep
from hooked_lm.sweep.engine import run_part
from hooked_lm.sweep.wire import part_from_bytes
from hooked_lm.workers import InProcess, Pool, Spawned, WorkerError, WorkerLost
from tests.helpers import tiny_model, tiny_tokens

TOKENS, OTHERS = tiny_tokens(2, 7), tiny_tokens(2, 7, seed=1)
DIFF = metrics.logit_diff([3, 4], [5, 6])
QUIET: dict[str, Any] = {"verbose": False}


@pytest.fixture(scope="module")
def model() -> HookedTransformer:
    return tiny_model(n_layers=3, dtype=torch.float32)


@pytest.fixture(scope="module")
def spawned(model: HookedTransformer) -> Iterator[Spawned]:
    with Spawned(model, 2, threads=torch.get_num_threads()) as workers:
        yield workers


def cells(n: int = 300) -> list[list[Intervention]]:
    """Cells that walk at every stage, and some that run whole: they edit embeddings, or nothing."""
    generator = torch.Generator().manual_seed(0)
    sites = ("resid_pre", "resid_mid", "mlp_out", "resid_post", "attn_out")
    made: list[list[Intervention]] = [[], [Intervention("hook_embed", "scale", 1.5, pos=2)]]
    for index in range(n):
        value = torch.randn(12, generator=generator)
        site = f"blocks.{index % 3}.hook_{sites[index % 5]}"
        made.append([Intervention(site, "add", value, pos=index % 7)])
    made.append([Intervention("blocks.1.attn.hook_z", "zero", head=1), Intervention("blocks.2.hook_mlp_out", "zero")])
    return made


def few_bytes(model: HookedTransformer) -> int:
    """A memory budget that makes a dozen chunks of these cells."""
    return 2 * 7 * 12 * (model.cfg.d_model + 100) * 4 * 25


def test_spawned_workers_give_the_numbers_of_one_process(model: HookedTransformer, spawned: Spawned) -> None:
    options = {"memory_budget": few_bytes(model), **QUIET}
    expected = sweep(model, TOKENS, cells(), DIFF, per_prompt=True, **options)
    found = sweep(model, TOKENS, cells(), DIFF, per_prompt=True, workers=spawned, **options)
    assert torch.equal(found, expected)
    assert len(set(expected[:, 0].tolist())) > 200
    noise = [Intervention("hook_embed", "add", 0.1)]
    mask = torch.ones_like(TOKENS)
    mask[0, :2] = 0
    more = {"always": noise, "attention_mask": mask, **options}
    assert torch.equal(
        sweep(model, TOKENS, cells(40), DIFF, workers=spawned, **more), sweep(model, TOKENS, cells(40), DIFF, **more)
    )
    for changes in ({"incremental": False}, {"always": [Intervention("blocks.0.hook_mlp_out", "scale", 0.5)]}):
        runs = {**options, **changes}
        assert torch.equal(
            sweep(model, TOKENS, cells(20), DIFF, workers=spawned, **runs),
            sweep(model, TOKENS, cells(20), DIFF, **runs),
        )


@pytest.mark.parametrize(
    "metric",
    [
        metrics.logit([1, 2]),
        metrics.prob(3, pos=-2),
        metrics.rank([4, 5]),
        metrics.kl_to(torch.randn(2, 7, 20, generator=torch.Generator().manual_seed(0))),
        metrics.preferred([1, 2], [3, 4]),
    ],
    ids=lambda metric: metric.name,
)
def test_every_metric_travels(model: HookedTransformer, spawned: Spawned, metric: metrics.Metric) -> None:
    found = sweep(model, TOKENS, cells(30), metric, workers=spawned, **QUIET)
    assert torch.equal(found, sweep(model, TOKENS, cells(30), metric, **QUIET))


def test_pairs_of_prompts(model: HookedTransformer, spawned: Spawned) -> None:
    expected = patch_pairs(model, TOKENS, OTHERS, DIFF, "attn_head_out_by_pos", **QUIET)
    found = patch_pairs(model, TOKENS, OTHERS, DIFF, "attn_head_out_by_pos", workers=spawned, **QUIET)
    assert torch.equal(found.per_pair, expected.per_pair)
    assert torch.equal(found.low, expected.low)


@pytest.mark.parametrize("grouped", [False, True])
def test_weights_keep_their_order_in_memory(grouped: bool) -> None:
    changes: dict[str, Any] = {"n_heads": 4, "d_head": 6, "n_key_value_heads": 2} if grouped else {}
    model = tiny_model(n_layers=3, **changes)
    model.blocks[0].mlp.W_in.data = model.blocks[0].mlp.W_in.data.T.contiguous().T
    model.process_weights_()
    with Spawned(model, 1, threads=torch.get_num_threads()) as workers:
        found = sweep(model, TOKENS, cells(20)[:20], DIFF, workers=workers, **QUIET)
    assert torch.equal(found, sweep(model, TOKENS, cells(20)[:20], DIFF, **QUIET))


def test_copies_of_a_model_in_this_process(model: HookedTransformer) -> None:
    with InProcess(model, copy.deepcopy(model)) as workers:
        found = sweep(model, TOKENS, cells(), DIFF, workers=workers, memory_budget=few_bytes(model), **QUIET)
    assert torch.equal(found, sweep(model, TOKENS, cells(), DIFF, memory_budget=few_bytes(model), **QUIET))
    with pytest.raises(ValueError, match="differ in weights or config"):
        InProcess(model, tiny_model(n_layers=3, seed=1))
    with pytest.raises(ValueError, match="takes a model"):
        InProcess()


def test_a_process_that_is_killed_is_done_without(model: HookedTransformer) -> None:
    expected = sweep(model, TOKENS, cells(), DIFF, memory_budget=few_bytes(model), **QUIET)
    with Spawned(model, 2, threads=torch.get_num_threads()) as workers:
        workers.workers[0].process.kill()  # type: ignore[attr-defined]
        found = sweep(model, TOKENS, cells(), DIFF, workers=workers, memory_budget=few_bytes(model), **QUIET)
        assert torch.equal(found, expected)
        assert len(workers.workers) == 1
        workers.workers[0].process.kill()  # type: ignore[attr-defined]
        with pytest.raises(WorkerError, match="every worker is lost"):
            sweep(model, TOKENS, cells(), DIFF, workers=workers, **QUIET)


class Losing:
    """A worker that is lost at its nth body."""

    def __init__(self, model: HookedTransformer, at: int, error: type[Exception] = WorkerLost) -> None:
        self.model, self.left, self.error, self.closed = model, at, error, False

    def run(self, body: bytes) -> bytes:
        self.left -= 1
        if self.left < 0:
            raise self.error("gone")
        return run_part(self.model, body)

    def close(self) -> None:
        self.closed = True


def test_the_part_of_a_lost_worker_is_run_again_once(model: HookedTransformer) -> None:
    options = {"memory_budget": few_bytes(model), **QUIET}
    expected = sweep(model, TOKENS, cells(), DIFF, **options)
    gone = threading.Event()

    class First(Losing):
        def close(self) -> None:
            gone.set()

    class After(Losing):
        def run(self, body: bytes) -> bytes:
            assert gone.wait(10)
            return super().run(body)

    kept = After(model, 10**6)
    pool = Pool([First(model, 1), kept], model)
    assert torch.equal(sweep(model, TOKENS, cells(), DIFF, workers=pool, **options), expected)
    assert pool.workers == [kept]
    with pytest.raises(WorkerError, match=r"lost with two workers|every worker is lost"):
        sweep(model, TOKENS, cells(), DIFF, workers=Pool([Losing(model, 0), Losing(model, 0)], model), **options)
    failing = Pool([Losing(model, 0, ValueError), kept], model)
    with pytest.raises(WorkerError, match=r"part \d+ of the sweep failed in a worker: gone"):
        sweep(model, TOKENS, cells(), DIFF, workers=failing, **options)
    assert not [one for one in threading.enumerate() if one.name.startswith("sweep worker") and one.is_alive()]


def test_a_part_that_is_out_when_the_others_are_done_is_waited_for(model: HookedTransformer) -> None:
    """A worker without work stays until the others answer: it may have to run a part again."""
    first_taken = threading.Event()

    class Late(Losing):
        def run(self, body: bytes) -> bytes:
            first_taken.set()
            threading.Event().wait(0.5)
            raise WorkerLost("gone late")

    class Prompt(Losing):
        def run(self, body: bytes) -> bytes:
            first_taken.wait(5)
            return run_part(self.model, body)

    pool = Pool([Late(model, 0), Prompt(model, 0)], model)
    found = sweep(model, TOKENS, cells(20), DIFF, workers=pool, memory_budget=few_bytes(model), **QUIET)
    assert torch.equal(found, sweep(model, TOKENS, cells(20), DIFF, memory_budget=few_bytes(model), **QUIET))


def test_what_workers_cannot_have_is_refused_before_anything_runs(
    model: HookedTransformer, spawned: Spawned, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(message: str, of: HookedTransformer = model, metric: Any = DIFF) -> None:
        with pytest.raises(ValueError, match=message):
            sweep(of, TOKENS, cells(3), metric, workers=spawned, **QUIET)

    refused("one of hooked_lm.metrics", metric=lambda logits: logits[0, -1, 0])
    refused("one of hooked_lm.metrics", metric=metrics.Metric("mine", -1, None, lambda logits: logits.sum(-1)))
    refused("another model", of=tiny_model(n_layers=3, dtype=torch.float32, seed=1))
    with model.hooks(fwd_hooks=[("blocks.0.hook_mlp_out", lambda x, hook: x * 2)]):
        refused("the model has hooks")
    before = model.W_U[0, 0].item()
    with torch.no_grad():
        model.unembed.W_U[0, 0] += 1
    refused("have changed since")
    with torch.no_grad():
        model.unembed.W_U[0, 0] = before
    sweep(model, TOKENS, cells(3), DIFF, workers=spawned, **QUIET)
    model.cfg.attention_dir = "bidirectional"
    refused("have changed since")
    model.cfg.attention_dir = "causal"


def test_a_process_that_does_not_start(model: HookedTransformer) -> None:
    with pytest.raises(WorkerLost, match="ended with code"):
        Spawned(model, 1, devices=["cuda:77"])
    with pytest.raises(ValueError, match="one worker at least"):
        Spawned(model, 0)
    with pytest.raises(ValueError, match="a device for each"):
        Spawned(model, 2, devices=["cpu"])


def a_body(model: HookedTransformer) -> bytes:
    bodies: list[bytes] = []

    class Keep(Losing):
        def run(self, body: bytes) -> bytes:
            bodies.append(body)
            return run_part(self.model, body)

    sweep(model, TOKENS, cells(5)[2:], DIFF, workers=Pool([Keep(model, 0)], model), **QUIET)
    return bodies[0]


def test_a_part_survives_its_bytes_and_damaged_ones_are_refused(model: HookedTransformer) -> None:
    body = a_body(model)
    part = part_from_bytes(body)
    assert torch.equal(part.tokens, TOKENS)
    assert len(part.cells) == len(part.firsts) == 6
    assert part.names is not None
    for damaged in (b"", body[:20], body[:-9], body[8:], body.replace(b"hooked_lm sweep", b"hooked_lm sleep")):
        with pytest.raises(ValueError):  # noqa: PT011 - each its own message
            run_part(model, damaged)
    generator = torch.Generator().manual_seed(0)
    for _ in range(300):
        changed = bytearray(body)
        changed[int(torch.randint(len(body), (), generator=generator))] ^= 1 << int(
            torch.randint(8, (), generator=generator)
        )
        try:
            answer = run_part(model, bytes(changed))
        except (ValueError, TypeError, KeyError):
            continue
        assert isinstance(answer, bytes)


def test_a_walk_that_does_not_fit_is_refused(model: HookedTransformer) -> None:
    body = a_body(model)
    start = body.index(b'"firsts":[') + len(b'"firsts":[')
    beyond = body[:start] + b"9" + body[start + 1 :]
    with pytest.raises(ValueError, match=r"cannot walk from position 9"):
        run_part(model, beyond)
