"""Random traces: planner and executor against the naive interpreter, and traces as bytes."""

from __future__ import annotations

import os

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor

from hooked_lm.tracing import Trace, TraceError
from hooked_lm.tracing.executor import plan_of, run_trace
from hooked_lm.tracing.graph import Graph
from hooked_lm.tracing.planner import plan_trace
from hooked_lm.tracing.reading import from_bytes
from hooked_lm.tracing.target import Target
from hooked_lm.tracing.wire import to_bytes
from tests.tracing.draw import CONFIGS, model_of, record
from tests.tracing.interpreter import UndefinedGradientError, interpret

# The full run draws 2,000: HOOKED_LM_TRACES=2000.
CASES = int(os.environ.get("HOOKED_LM_TRACES", "60"))


def recorded(which: int, seed: int, moves_only: bool = False) -> Graph:
    """A random trace that can be planned; other draws are not counted."""
    target = Target.of(model_of(which))
    trace = Trace(target, lambda graph: {}, lambda graph: plan_trace(graph, target))
    assume(record(trace, seed, moves_only))
    try:
        plan_trace(trace.graph, target)
    except TraceError as error:
        if "which comes later" not in str(error) and "no order of passes" not in str(error):
            raise
        assume(False)
    return trace.graph


def outcome(which: int, graph: Graph, **options: bool) -> dict[str, Tensor]:
    model = model_of(which)
    try:
        return run_trace(model, graph, Target.of(model), **options)  # type: ignore[arg-type]
    except TraceError as error:
        # The one thing that a run refuses: see test_gradients.
        assume("single heads' inputs" not in str(error))
        raise


def assert_close(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> None:
    assert found.keys() == wanted.keys()
    for name, tensor in wanted.items():
        assert found[name].shape == tensor.shape
        torch.testing.assert_close(found[name].double(), tensor.double(), rtol=1e-10, atol=1e-10, equal_nan=True)


@settings(max_examples=CASES)
@given(which=st.integers(0, len(CONFIGS) - 1), seed=st.integers(0, 10**9))
def test_random_traces_give_what_the_naive_interpreter_gives(which: int, seed: int) -> None:
    graph = recorded(which, seed)
    together = outcome(which, graph)
    for name, node in graph.saves.items():
        assert tuple(together[name].shape) == graph.nodes[node].type.shape
    try:
        expected = interpret(model_of(which), graph)
    except UndefinedGradientError:
        assume(False)
    assert_close(together, expected)
    assert_close(outcome(which, graph, together=False), together)


# The same cases each time: of millions, some may lie in memory otherwise, and round otherwise.
@settings(max_examples=CASES, derandomize=True)
@given(which=st.integers(0, len(CONFIGS) - 1), seed=st.integers(0, 10**9))
def test_on_one_batch_layout_the_numbers_are_the_interpreters_to_the_bit(which: int, seed: int) -> None:
    target = Target.of(model_of(which))
    # Without what nothing depends on, which the planner leaves out.
    graph = from_bytes(to_bytes(recorded(which, seed, moves_only=True), target), target)
    found, expected = outcome(which, graph, together=False), interpret(model_of(which), graph, watched=True)
    for name, tensor in expected.items():
        assert torch.equal(found[name].nan_to_num(), tensor.nan_to_num()), name


@settings(max_examples=CASES)
@given(which=st.integers(0, len(CONFIGS) - 1), seed=st.integers(0, 10**9))
def test_a_trace_read_from_its_bytes_is_the_same_experiment(which: int, seed: int) -> None:
    graph, target = recorded(which, seed), Target.of(model_of(which))
    content = to_bytes(graph, target)
    again = from_bytes(content, target)
    assert to_bytes(again, target) == content
    assert_close(outcome(which, again), outcome(which, graph))


@pytest.mark.parametrize("which", range(len(CONFIGS)))
def test_declared_axes_are_the_shapes_and_hook_dict_is_the_order_of_firing(which: int) -> None:
    model = model_of(which)
    fired: list[str] = []
    shapes: dict[str, tuple[int, ...]] = {}

    def note(x: Tensor, hook: object) -> None:
        name: str = hook.name  # type: ignore[attr-defined]
        fired.append(name)
        shapes[name] = tuple(x.shape)

    tokens = torch.tensor([[1, 2, 3, 4], [5, 6, 7, 8]])
    model.run_with_hooks(tokens, fwd_hooks=[(lambda name: True, note)])
    assert fired == [name for name in model.hook_dict if name in shapes]
    trace = model.trace(run=False)
    run = trace.prompts(tokens)
    assert {name: trace.target.type_of(name, run.spec).shape for name in shapes} == shapes


def test_the_plan_is_that_of_the_run() -> None:
    model = model_of(0)
    target = Target.of(model)
    trace = model.trace(run=False)
    trace.prompts([[1, 2, 3]])["resid_post", 0].save()
    assert len(plan_of(model, trace.graph, target).passes) == len(trace.estimate().passes) == 1
