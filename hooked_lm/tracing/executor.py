"""Run a trace: its passes in order, with one hook at every site that is read or edited."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext

import torch
from torch import Tensor

from hooked_lm.hooked_model import HookedModel
from hooked_lm.hooks import HookHandle, HookPoint, current_pass
from hooked_lm.names import layer_of
from hooked_lm.tracing.errors import TraceError
from hooked_lm.tracing.graph import Graph, Read, Write
from hooked_lm.tracing.ops import Operand
from hooked_lm.tracing.placing import Part, RunRows
from hooked_lm.tracing.planner import DEFAULT_MEMORY_BUDGET, PlannedPass, plan_trace
from hooked_lm.tracing.store import ValueStore
from hooked_lm.tracing.target import Target

__all__ = ["run_trace"]


def run_trace(
    model: HookedModel,
    graph: Graph,
    target: Target,
    *,
    memory_budget: int = DEFAULT_MEMORY_BUDGET,
    together: bool = True,
) -> dict[str, Tensor]:
    """Return what a trace saves.

    Args:
        model: a `HookedTransformer`.
        graph: the trace.
        target: what the trace was recorded for.
        memory_budget: approximate memory, in bytes, for the activations of one pass.
        together: make several runs in one pass.

    Raises:
        TraceError: values go around in a circle, or an operation fails.
    """
    plan = plan_trace(graph, target, memory_budget=memory_budget, together=together)
    executor = _Executor(model, graph, plan.live)
    with torch.no_grad():
        executor.store.begin()
        for one in plan.passes:
            executor.run(one)
    return {name: executor.store.results[name] for name in graph.saves}


class _Executor:
    """The state of a trace while it runs."""

    def __init__(self, model: HookedModel, graph: Graph, live: set[int]) -> None:
        self.model, self.graph = model, graph
        weights = dict(model.named_parameters())
        self.store = ValueStore(graph, live, self._apply, lambda name: weights[name].detach(), model.embed.W_E.device)
        # A piece of the model that a value is put through is not a part of the run: the trace's hooks leave it alone.
        self.paused = False

    def run(self, planned: PlannedPass) -> None:
        """Make one pass."""
        specs = [self.graph.runs[run] for run in planned.runs]
        longest = max(max(spec.lengths) for spec in specs)
        prompts = [prompt for spec in specs for prompt in spec.tokens]
        rows: dict[int, RunRows] = {}
        start = 0
        for run, spec in zip(planned.runs, specs, strict=True):
            rows[run] = RunRows(start, spec.lengths, len(prompts), longest)
            start += spec.n_prompts
        device = self.model.embed.W_E.device
        padded = [[0] * (longest - len(prompt)) + list(prompt) for prompt in prompts]
        tokens = torch.tensor(padded, device=device)
        lengths = torch.tensor([len(prompt) for prompt in prompts], device=device)
        mask = (torch.arange(longest, device=device) >= longest - lengths[:, None]).long()
        handles = [self._handle(name, events, rows, planned.gradients) for name, events in planned.events.items()]
        grad = torch.enable_grad() if planned.gradients else nullcontext()
        with grad, self.model.attached(handles):
            self.model(tokens, attention_mask=mask, padding_side="left", **self._extent(planned, rows, longest))

    def _handle(self, name: str, events: Sequence[int], rows: dict[int, RunRows], gradients: bool) -> HookHandle:
        hook = _SiteHook(self, events, rows, gradients)
        point = self.model.hook_dict[name]
        return HookHandle(point, hook, "fwd", reads_only=hook.reads_only, by_keyword=False, this_thread=True)

    def _extent(self, planned: PlannedPass, rows: dict[int, RunRows], longest: int) -> dict[str, object]:
        """The options of the model that leave out layers and logits which nothing reads."""
        reads = [
            node.site
            for events in planned.events.values()
            for index in events
            if isinstance(node := self.graph.nodes[index], Read)
        ]
        deepest = max(reads, key=list(self.model.hook_dict).index)
        layer = layer_of(deepest)
        if layer is not None:
            return {"stop_at_layer": layer + 1}
        if not deepest.startswith(("ln_final.", "unembed.")):
            return {"stop_at_layer": 0}
        if not deepest.startswith("unembed."):
            return {"return_type": None}
        columns = self._columns(planned, rows, longest)
        return {} if columns is None else {"logits_to_keep": torch.tensor(columns)}

    def _columns(self, planned: PlannedPass, rows: dict[int, RunRows], longest: int) -> list[int] | None:
        """The columns of the pass whose logits are read or edited; None for all."""
        found: set[int] = set()
        for name, events in planned.events.items():
            if not name.startswith("unembed."):
                continue
            for index in events:
                node = self.graph.nodes[index]
                assert isinstance(node, (Read, Write))
                if node.select.pos is None:
                    return None
                entries = node.select.pos if isinstance(node.select.pos, tuple) else (node.select.pos,)
                for length in rows[node.run].lengths:
                    found.update(longest - length + one % length for one in entries)
        return None if len(found) == longest else sorted(found)

    def _apply(self, piece: str, operand: Tensor) -> Tensor:
        self.paused = True
        try:
            return self._piece(piece, operand)
        finally:
            self.paused = False

    def _piece(self, piece: str, operand: Tensor) -> Tensor:
        flat = operand.reshape(-1, 1) if piece == "embed" else operand.reshape(-1, 1, operand.shape[-1])
        if piece == "embed":
            made: Tensor = self.model.embed(flat)
        elif piece == "logits_of":
            made = self.model.logits_of(flat)
        else:
            made = self.model.ln_final(flat) if piece == "ln_final" else self.model.unembed(flat)
        shape = operand.shape if piece == "embed" else operand.shape[:-1]
        return made.reshape(*shape, made.shape[-1])


class _SiteHook:
    """The reads and writes at one site, as a hook.

    The hooks of a norm run again on the copies of its input that edits of single heads' inputs make: what writes acts
    there too, and the reads have been made.
    """

    edits_in_place = False

    def __init__(self, executor: _Executor, events: Sequence[int], rows: dict[int, RunRows], gradients: bool) -> None:
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
        for index in self.events:
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
                self.store.put_read(index, part.read(seen[key]), seen[key], part.read)
        self.has_run = True
        return x

    def _written(self, x: Tensor, index: int, node: Write, part: Part) -> Tensor:
        if index not in self.written:
            self.written[index] = self.store.for_write(index)
        try:
            return part.write(x, node.how, self.written[index])
        except (RuntimeError, IndexError) as error:
            line = self.executor.graph.lines.get(index)
            raise TraceError(f"{node.how} at {node.site!r} failed: {error}", line) from error
