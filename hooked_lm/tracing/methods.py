"""Tracing: the model's method that begins a trace."""

from __future__ import annotations

from typing import cast

from hooked_lm.hooked_model import HookedModel
from hooked_lm.tracing.executor import run_trace
from hooked_lm.tracing.planner import DEFAULT_MEMORY_BUDGET
from hooked_lm.tracing.target import Target
from hooked_lm.tracing.trace import Trace

__all__ = ["Tracing"]


class Tracing:
    """The tracing method of `HookedTransformer`."""

    def trace(self, *, memory_budget: int = DEFAULT_MEMORY_BUDGET, together: bool = True) -> Trace:
        """Return a trace to record an experiment in: `with model.trace() as t:`. It runs when the block ends.

        Args:
            memory_budget: approximate memory, in bytes, for the activations of one pass.
            together: make several runs in one pass of the model, where they fit. False gives each a pass of its own.
        """
        model = cast(HookedModel, self)
        target = Target.of(model)
        return Trace(
            target, lambda graph: run_trace(model, graph, target, memory_budget=memory_budget, together=together)
        )
