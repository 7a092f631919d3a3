"""Tracing: the model's method that begins a trace, and traces that are read from files."""

from __future__ import annotations

from pathlib import Path
from typing import cast

from hooked_lm.hooked_model import HookedModel
from hooked_lm.tracing.executor import plan_of, run_trace
from hooked_lm.tracing.planner import DEFAULT_MEMORY_BUDGET
from hooked_lm.tracing.reading import load_graph
from hooked_lm.tracing.target import Target
from hooked_lm.tracing.trace import Trace

__all__ = ["Tracing", "load"]


class Tracing:
    """The tracing method of `HookedTransformer`."""

    def trace(self, *, memory_budget: int = DEFAULT_MEMORY_BUDGET, together: bool = True, run: bool = True) -> Trace:
        """Return a trace to record an experiment in: `with model.trace() as t:`. It runs when the block ends.

        Args:
            memory_budget: approximate memory, in bytes, for the activations of one pass.
            together: make several runs in one pass of the model, and score runs that differ only in their edits by a
                sweep. False gives each run a pass of its own, where values allow it.
            run: False only records; `t.run()` runs it.
        """
        model = cast(HookedModel, self)
        target = Target.of(model)
        trace = Trace(
            target,
            lambda graph: run_trace(model, graph, target, memory_budget=memory_budget, together=together),
            lambda graph: plan_of(model, graph, target, memory_budget=memory_budget, together=together),
        )
        trace.runs_at_exit = run
        return trace


def load(path: str | Path, model: Tracing) -> Trace:
    """Return the trace of a file that `trace.save` wrote, checked against a model. `.run()` runs it.

    Args:
        path: of the file.
        model: a `HookedTransformer`.

    Raises:
        TraceError: there is no such file, or no trace in it that fits the model.
    """
    trace = model.trace(run=False)
    trace.graph = load_graph(path, trace.target)
    return trace
