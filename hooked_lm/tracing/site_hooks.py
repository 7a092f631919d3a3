"""The reads and edits of a trace at one site, as a hook: of a pass over prompts, and of the steps of a generation."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from hooked_lm._support.memory import is_out_of_memory
from hooked_lm.hooks import HookPoint, current_pass
from hooked_lm.tracing.errors import TraceError
from hooked_lm.tracing.graph import Graph, Read, RunSpec, Write
from hooked_lm.tracing.ops import Operand
from hooked_lm.tracing.placing import Part, RunRows
from hooked_lm.tracing.store import ValueStore

__all__ = ["SiteHook", "StepCount", "StepHook"]


class Executing(Protocol):
    """What a hook needs of the executor.

    Attributes:
        graph: the trace.
        store: the values so far.
        paused: a piece of the model is applied to a value, which is no part of the run.
    """

    graph: Graph
    store: ValueStore
    paused: bool


class SiteHook:
    """The reads and writes at one site, as a hook.

    The hooks of a norm run again on the copies of its input that edits of single heads' inputs make: what writes acts
    there too, and the reads have been made.
    """

    edits_in_place = False

    def __init__(self, executor: Executing, events: Sequence[int], rows: dict[int, RunRows], gradients: bool) -> None:
        self.executor, self.store, self.events, self.rows = executor, executor.store, events, rows
        nodes = [(index, executor.graph.nodes[index]) for index in events]
        # The activations with respect to which gradients are taken, as (run, version).
        self.watched = {
            (node.run, node.version)
            for index, node in nodes
            if gradients and isinstance(node, Read) and index in self.store.watched_reads
        }
        self.reads_only = not self.watched and not any(isinstance(node, Write) for _, node in nodes)
        self.written: dict[int, Operand | None] = {}
        self.has_run = False

    def __call__(self, x: Tensor, point: HookPoint) -> Tensor:
        if self.executor.paused:
            return x
        if self.has_run and self.watched:
            raise TraceError(
                f"a gradient at {point.name!r} in a pass that edits single heads' inputs: the norm runs on several "
                "copies there; take the gradient at the residual stream, or in a run without those edits"
            )
        kept = current_pass().kept
        columns = None if kept is None or not point.name.startswith("unembed.") else kept.positions
        seen: dict[tuple[int, int], Tensor] = {}
        waiting = list(self.events)
        while waiting:
            index = self._next(waiting)
            waiting.remove(index)
            node = self.executor.graph.nodes[index]
            assert isinstance(node, (Read, Write))
            part = Part(self.rows[node.run], point.axes, node.select, columns)
            if isinstance(node, Write):
                x = self._written(x, index, node, part)
            elif not self.has_run:
                key = (node.run, node.version)
                if key not in seen:
                    if key in self.watched:
                        # A tensor of this site alone: neighbouring sites may have the same one.
                        x = x.view_as(x) if x.requires_grad else x.detach().requires_grad_()
                    seen[key] = x
                self.store.watch(index, seen[key], part.read)
                self.store.put(index, part.read(seen[key]))
        self.has_run = True
        return x

    def _next(self, waiting: Sequence[int]) -> int:
        """The first event whose value is there, of those that are the next ones of their runs."""
        runs: set[int] = set()
        for index in waiting:
            node = self.executor.graph.nodes[index]
            assert isinstance(node, (Read, Write))
            if node.run in runs:
                continue
            runs.add(node.run)
            if isinstance(node, Read) or node.value is None or index in self.written or self.store.has(node.value):
                return index
        first = self.executor.graph.nodes[waiting[0]]
        assert isinstance(first, Write)
        line = self.executor.graph.lines.get(waiting[0])
        raise TraceError(f"the edits at {first.site!r} of several runs wait for each other's values", line)

    def _written(self, x: Tensor, index: int, node: Write, part: Part) -> Tensor:
        if index not in self.written:
            self.written[index] = self.store.for_write(index)
        return written(self.executor.graph, x, index, node, part, self.written[index])


@dataclass
class StepCount:
    """How far a generation is.

    Attributes:
        longest: the length of the longest prompt.
        now: the present step.
    """

    longest: int
    now: int = 0


class StepHook:
    """The reads and writes of a generation at one site, as a hook.

    Without a key-value cache a step reads the whole text again; the writes of earlier steps are then made again, each
    where it was made.
    """

    edits_in_place = False

    def __init__(self, executor: Executing, events: Sequence[int], spec: RunSpec, steps: StepCount) -> None:
        self.executor, self.store, self.events, self.spec, self.steps = executor, executor.store, events, spec, steps
        self.reads_only = not any(isinstance(executor.graph.nodes[index], Write) for index in events)
        self.written: dict[int, Operand | None] = {}
        # Read node -> step -> the part at that step; None once the whole value has been put into the store.
        self.kept: dict[int, dict[int, Tensor | None]] = {}

    def __call__(self, x: Tensor, point: HookPoint) -> Tensor:
        if self.executor.paused:
            return x
        now, running = self.steps.now, current_pass()
        again = now > 0 and running.n_past == 0
        columns = None if running.kept is None or not point.name.startswith("unembed.") else running.kept.positions
        for step in range(now + 1) if again and columns is None else [now]:
            rows = self._rows(step, again)
            for index in self.events:
                node = self.executor.graph.nodes[index]
                assert isinstance(node, (Read, Write))
                if step not in self.spec.steps(node.select.step):
                    continue
                part = Part(rows, point.axes, node.select, columns)
                if isinstance(node, Write):
                    x = written(self.executor.graph, x, index, node, part, self._value(index, node, step))
                elif step == now and step not in self.kept.setdefault(index, {}):
                    self._keep(index, node, part.read(x))
        return x

    def _rows(self, step: int, again: bool) -> RunRows:
        """Where a step's positions are in the present pass, which reads the whole text again or what is new."""
        now, longest, lengths = self.steps.now, self.steps.longest, self.spec.lengths
        own, keys = self.spec.spans_at("pos", step), self.spec.spans_at("key", step)
        if again:
            n_columns, stop = longest + now, longest + step
        else:
            n_columns = stop = longest if step == 0 else 1
        return RunRows(0, own, stop, len(lengths), n_columns, keys, longest + step)

    def _value(self, index: int, node: Write, step: int) -> Operand | None:
        """The value of a write at one step."""
        if index not in self.written:
            self.written[index] = self.store.for_write(index)
        value = self.written[index]
        by_step = isinstance(value, Tensor) and not isinstance(node.select.step, int)
        if not isinstance(value, Tensor) or not by_step or value.ndim < len(node.type.shape):
            return value
        return value[0 if value.shape[0] == 1 else self.spec.steps(node.select.step).index(step)]

    def _keep(self, index: int, node: Read, value: Tensor) -> None:
        """Keep a part at the present step; with the last of the steps that are read the value is whole."""
        kept, now = self.kept[index], self.steps.now
        if isinstance(node.select.step, int):
            kept[now] = None
            self.store.put(index, value)
            return
        # A copy, where the part is a view of an activation much larger than it.
        kept[now] = value.clone()
        wanted = self.spec.steps(node.select.step)
        if now == max(wanted):
            self.store.put(index, torch.stack([one for step in wanted if (one := kept[step]) is not None]))
            self.kept[index] = dict.fromkeys(kept)


def written(graph: Graph, x: Tensor, index: int, node: Write, part: Part, value: Operand | None) -> Tensor:
    """Return an activation after a write.

    Args:
        graph: the trace.
        x: the activation of the pass.
        index: the node of the write.
        node: the write.
        part: where it writes.
        value: its value.

    Raises:
        TraceError: torch refused it.
    """
    try:
        return part.write(x, node.how, value)
    except (RuntimeError, IndexError) as error:
        if is_out_of_memory(error):
            raise
        raise TraceError(f"{node.how} at {node.site!r} failed: {error}", graph.lines.get(index)) from error
