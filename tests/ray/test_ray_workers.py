"""Sweeps by Ray actors: `make test-ray`, since a cluster starts in seconds, or not at all on a busy machine."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch

from hooked_lm import HookedTransformer, Intervention, metrics
from hooked_lm.sweep import sweep
from hooked_lm.workers import RayActors, WorkerError
from tests.helpers import tiny_model, tiny_tokens

pytestmark = pytest.mark.ray
TOKENS = tiny_tokens(2, 7)
DIFF = metrics.logit_diff([3, 4], [5, 6])
# A dozen chunks.
OPTIONS: dict[str, Any] = {"verbose": False, "memory_budget": 2 * 7 * 12 * 112 * 4 * 25}


def cells() -> list[Intervention]:
    generator = torch.Generator().manual_seed(0)
    return [
        Intervention(f"blocks.{index % 3}.hook_resid_pre", "add", torch.randn(12, generator=generator), pos=index % 7)
        for index in range(300)
    ]


@pytest.fixture(scope="module")
def model() -> HookedTransformer:
    return tiny_model(n_layers=3, dtype=torch.float32)


@pytest.fixture(scope="module")
def actors(model: HookedTransformer) -> Iterator[RayActors]:
    with RayActors(model, 2) as workers:
        yield workers


def test_actors_give_the_numbers_of_one_process(model: HookedTransformer, actors: RayActors) -> None:
    found = sweep(model, TOKENS, cells(), DIFF, workers=actors, **OPTIONS)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as each actor has
    assert torch.equal(found, sweep(model, TOKENS, cells(), DIFF, **OPTIONS))
    torch.set_num_threads(threads)


def test_an_actor_that_is_lost_is_done_without(model: HookedTransformer, actors: RayActors) -> None:
    expected = sweep(model, TOKENS, cells(), DIFF, workers=actors, **OPTIONS)
    actors.workers[0].close()
    assert torch.equal(sweep(model, TOKENS, cells(), DIFF, workers=actors, **OPTIONS), expected)
    assert len(actors.workers) == 1
    with pytest.raises(RuntimeError, match="begins with the length of its JSON"):
        actors.workers[0].run(b"?")
    actors.workers[0].close()
    with pytest.raises(WorkerError, match="every worker is lost"):
        sweep(model, TOKENS, cells(), DIFF, workers=actors, **OPTIONS)
