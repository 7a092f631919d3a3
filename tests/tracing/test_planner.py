"""The planner against brute force: every way to put up to five runs into passes."""

from __future__ import annotations

import itertools
import random

import pytest

from hooked_lm.tracing import TraceError
from hooked_lm.tracing.planner import TracePlan, plan_trace
from hooked_lm.tracing.trace import Trace
from tests.helpers import tiny_model

LAYERS = 3
# A value of one run, read at a layer, that another run takes at a layer: (source, read, target, written).
Value = tuple[int, int, int, int]


def values_between(n_runs: int, generator: random.Random) -> list[Value]:
    """Random values between runs, none of which goes back in its own run."""
    found = []
    for _ in range(generator.randint(1, 2 * n_runs)):
        source, target = generator.sample(range(n_runs), 2)
        found.append((source, generator.randrange(LAYERS), target, generator.randrange(LAYERS)))
    return found


def fewest_passes(n_runs: int, values: list[Value]) -> int | None:
    """The fewest passes that bring every value where it is used in time; None if no number does."""
    for n_passes in range(1, n_runs + 1):
        for passes in itertools.product(range(n_passes), repeat=n_runs):
            if all(passes[source] + (read > written) <= passes[target] for source, read, target, written in values):
                return n_passes
    return None


def planned(n_runs: int, values: list[Value]) -> TracePlan:
    trace: Trace = tiny_model(n_layers=LAYERS).trace(run=False)
    runs = [trace.prompts([[number, 1, 2]]) for number in range(n_runs)]
    # All are read before any is edited, so that values go around in circles of the layers only.
    parts = [runs[source]["resid_pre", read].at(pos=0) for source, read, _, _ in values]
    for part in parts:
        part.node  # noqa: B018
    for part, (_, _, target, written) in zip(parts, values, strict=True):
        runs[target]["resid_pre", written].at(pos=-1).add(part)
    for run in runs:
        run["resid_post", LAYERS - 1].save()
    return plan_trace(trace.graph, trace.target)


@pytest.mark.parametrize("seed", range(150))
def test_as_few_passes_as_any_order_needs_and_an_error_where_there_is_none(seed: int) -> None:
    generator = random.Random(seed)
    n_runs = generator.randint(2, 5)
    values = values_between(n_runs, generator)
    fewest = fewest_passes(n_runs, values)
    if fewest is None:
        with pytest.raises(TraceError, match="no order of passes serves both"):
            planned(n_runs, values)
        return
    plan = planned(n_runs, values)
    assert len(plan.passes) == fewest
    place = {run: number for number, one in enumerate(plan.passes) for run in one.runs}
    assert sorted(place) == list(range(n_runs))
    for source, read, target, written in values:
        assert place[source] + (read > written) <= place[target]


def test_the_seeds_draw_both_kinds() -> None:
    found = []
    for seed in range(150):
        generator = random.Random(seed)
        n_runs = generator.randint(2, 5)
        found.append(fewest_passes(n_runs, values_between(n_runs, generator)))
    assert {None, 1, 2, 3} <= set(found)
